//! The engine's thread: takes commands between steps, runs steps, tells the sinks. Steps run on the
//! backend's threads where it has some; a step of a small model in lanes, side by side from the
//! embedding to the sinks.
//!
//! Never here: checks of requests (they were made before the request came in).

mod ahead;

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use genmill_grammar::Guide;

use crate::ask::Chosen;
use crate::backend::Batch;
use crate::decoder::{Encore, Forward, Lane, Next};
use crate::engine::gauge::Gauge;
use crate::engine::group::{self, Group, Whole};
use crate::engine::guided::{After, Guided, Masker};
use crate::engine::run::ahead::Flight;
use crate::engine::{FinishReason, Load, Output, RequestError, RequestId, Sink};
use crate::measure::{Cost, Measured, Part};
use crate::sampler::{NotFinite, Sampling, Scored, Workspace, score};
use crate::schedule::{Admitted, Arrival, Limits, Schedule, Slice, Step};
use crate::shape::{Shaper, Shaping};
use crate::text::{Cut, StopStrings, TokenStream};

/// What is asked of the thread.
pub(super) enum Command {
    Submit(Box<Ticket>),
    Cancel(RequestId),
    Stop,
}

/// A checked request.
pub(super) struct Ticket {
    /// Of its first sample; the others follow.
    pub(super) id: RequestId,
    pub(super) samples: usize,
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: usize,
    pub(super) overtakes: u64,
    pub(super) sampling: Sampling,
    pub(super) shaping: Shaping,
    /// What leads each text along its form, and the token that stands for its end there.
    pub(super) guide: Option<(Guide, u32)>,
    pub(super) logprobs: Option<usize>,
    pub(super) prompt_logprobs: Option<usize>,
    /// What each text begins with.
    pub(super) echo: String,
    pub(super) end_tokens: Vec<u32>,
    pub(super) stop: Vec<String>,
    pub(super) stream: TokenStream,
    pub(super) deadline: Option<Instant>,
    /// KV tokens reserved in whole blocks.
    pub(super) needed: usize,
    pub(super) submitted: Instant,
    pub(super) label: Arc<str>,
    pub(super) sink: Sink,
}

/// The thread's state.
pub(super) struct Runner {
    forward: Box<dyn Forward>,
    schedule: Schedule,
    limits: Limits,
    load: Arc<Load>,
    gauge: Arc<Gauge>,
    cost: Cost,
    commands: Receiver<Command>,
    sequences: BTreeMap<RequestId, Sequence>,
    lanes: Vec<LaneState>,
    /// A step whose tokens are not known yet, of a device that chooses them.
    flight: Option<Flight>,
    /// Started with the first request that wants a form.
    masker: Option<Masker>,
    stopping: bool,
}

/// What is kept between the steps of a lane.
#[derive(Default)]
struct LaneState {
    batch: Batch,
    workspace: Workspace,
    /// The sequences that ended in this step.
    ends: Vec<(RequestId, End)>,
}

/// A lane on its way: one turn with all of its shares, then its encore.
struct Turns<'a> {
    schedule: &'a Schedule,
    load: &'a Load,
    vocabulary: usize,
    encore: Encore,
    /// What the batch holds now.
    shares: Vec<Share<'a>>,
    /// Turns that these still have.
    left: usize,
    /// What comes after them.
    later: Vec<Vec<Share<'a>>>,
    workspace: &'a mut Workspace,
    ends: &'a mut Vec<(RequestId, End)>,
}

/// A sequence and its slice of a step.
struct Share<'a> {
    slice: Slice,
    sequence: &'a mut Sequence,
}

/// A sample of a request on its way.
struct Sequence {
    /// The id of the request's first sample.
    first: RequestId,
    group: Group,
    /// The prompt, then what was sampled.
    ids: Vec<u32>,
    prompt_tokens: usize,
    max_tokens: usize,
    sampling: Sampling,
    shaper: Shaper,
    /// Where the text must have a form: what leads it, and the token that stands for its end there.
    guided: Option<(Guided, u32)>,
    /// Forced tokens that the schedule does not know of yet.
    forced: usize,
    /// How the text ends, once the forced tokens that end it are computed, as their log probabilities are wanted.
    ending: Option<FinishReason>,
    scores: Scores,
    end_tokens: Vec<u32>,
    stream: TokenStream,
    stops: StopStrings,
    echo: String,
    text: String,
    deadline: Option<Instant>,
    needed: usize,
    first_token: Option<Instant>,
    engine_time: Duration,
    /// How far it has come in a step that the schedule does not know of yet.
    turn: Turn,
}

/// How far a sequence has come in a step: what tells, after a panic, whose fault it was and who has to be computed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Turn {
    /// Turns whose logits it has taken: that of its slice, then those of a lane's encore.
    taken: usize,
    /// It is at its logits now.
    taking: bool,
}

impl Turn {
    /// Tokens it has taken in a lane's encore.
    const fn ahead(self) -> usize {
        self.taken.saturating_sub(1)
    }
}

/// The log probabilities that are wanted, with how many of the best tokens, and those collected.
#[derive(Default)]
struct Scores {
    wanted: Option<usize>,
    generated: Vec<Scored>,
    wanted_of_prompt: Option<usize>,
    prompt: Vec<Scored>,
}

/// What a step gives for an output.
enum Given<'a> {
    /// Logits, from which a token is chosen here.
    Logits(&'a [f32]),
    /// What the device chose or scored.
    Chosen(Chosen),
}

impl Given<'_> {
    /// The log probability of a token that is known.
    fn score(&self, token: u32, top: usize, workspace: &mut Workspace) -> Result<Scored, NotFinite> {
        match self {
            Self::Logits(logits) => score(logits, token, top, workspace),
            Self::Chosen(chosen) => chosen.clone(),
        }
    }
}

/// Whether what a sequence computed may serve others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Went {
    Well,
    Wrong,
}

/// How a request ends.
enum End {
    Finished(FinishReason),
    Failed(RequestError),
}

impl Runner {
    pub(super) fn new(
        forward: Box<dyn Forward>,
        schedule: Schedule,
        limits: Limits,
        (load, gauge): (Arc<Load>, Arc<Gauge>),
        commands: Receiver<Command>,
    ) -> Self {
        let (sequences, lanes, cost) = (BTreeMap::new(), Vec::new(), forward.cost());
        let (flight, masker, stopping) = (None, None, false);
        Self { forward, schedule, limits, load, gauge, cost, commands, sequences, lanes, flight, masker, stopping }
    }

    /// Runs until told to stop, or until nobody is left to tell it.
    pub(super) fn run(mut self) {
        let pool = self.forward.pool();
        while !self.stopping {
            match self.commands.recv() {
                Ok(command) => self.obey(command),
                Err(_) => self.stopping = true,
            }
            // Going to the pool's threads and back costs two wake-ups, so all steps up to the next
            // pause go there at once.
            match &pool {
                _ if self.schedule.is_idle() => {}
                Some(pool) => pool.install(|| self.work()),
                None => self.work(),
            }
        }
        let open: Vec<RequestId> = self.sequences.keys().copied().collect();
        for id in open {
            self.end(id, End::Finished(FinishReason::Cancelled));
        }
    }

    /// Runs steps until there is nothing to do.
    fn work(&mut self) {
        loop {
            self.take_commands();
            if self.stopping || self.schedule.is_idle() && self.flight.is_none() {
                break;
            }
            self.end_overdue();
            if self.forward.chooses() {
                self.step_ahead();
            } else {
                self.step();
            }
        }
    }

    /// Takes what has come in.
    fn take_commands(&mut self) {
        self.load.news.store(false, Ordering::Relaxed);
        while !self.stopping {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.stopping = true,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(ticket) => self.queue(*ticket),
            Command::Cancel(first) => {
                for id in self.samples_of(first) {
                    self.end(id, End::Finished(FinishReason::Cancelled));
                }
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn queue(&mut self, ticket: Ticket) {
        let arrival = Arrival {
            prompt: ticket.prompt.as_slice().into(),
            max_tokens: ticket.max_tokens,
            overtakes: ticket.overtakes,
            scored: false,
        };
        let (formed, label) = (ticket.guide.is_some(), ticket.label.clone());
        if formed && self.masker.is_none() {
            match Masker::start() {
                Ok(masker) => self.masker = Some(masker),
                Err(error) => tracing::error!(%error, "cannot start the thread that computes masks"),
            }
        }
        for (index, sequence) in Sequence::all(ticket, self.masker.as_ref()).into_iter().enumerate() {
            let scored = sequence.wants_all_logits();
            let id = RequestId(sequence.first.0 + index as u64);
            self.sequences.insert(id, sequence);
            self.gauge.open(id, label.clone());
            let arrival = Arrival { scored, ..arrival.clone() };
            if let Err(error) = self.schedule.add(id, arrival) {
                // `submit` has checked this against the same pool.
                self.end(id, End::Failed(RequestError::Step { message: error.to_string() }));
            }
            if formed && self.masker.is_none() {
                let message = "the thread that computes masks cannot be started".to_owned();
                self.end(id, End::Failed(RequestError::Form { message }));
            }
        }
    }

    /// What still runs or waits of a request.
    fn samples_of(&self, first: RequestId) -> Vec<RequestId> {
        let samples = self.sequences.range(first..).take_while(|(_, sequence)| sequence.first == first);
        samples.map(|(id, _)| *id).collect()
    }

    fn end_overdue(&mut self) {
        let now = Instant::now();
        let overdue = self.sequences.iter().filter(|(_, s)| s.deadline.is_some_and(|d| d <= now));
        for id in overdue.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.end(id, End::Finished(FinishReason::Deadline));
        }
    }

    /// One step: decide, compute, sample, record.
    fn step(&mut self) {
        let step = self.next();
        if !step.slices.is_empty() {
            self.run_step(&step);
        }
    }

    /// The next step; those that begin with it are told.
    fn next(&mut self) -> Step {
        let begun = Instant::now();
        let step = self.schedule.next(&self.limits);
        self.forward.forget(&step.stale);
        for Admitted { id, cached } in &step.admitted {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.group.start(begun, *cached);
                self.gauge.admit(sequence.prompt_tokens, *cached);
                let echo = std::mem::take(&mut sequence.echo);
                sequence.give(echo);
            }
        }
        step
    }

    fn run_step(&mut self, step: &Step) {
        let begun = Instant::now();
        self.gauge.begin(step);
        let computed = catch_unwind(AssertUnwindSafe(|| self.compute(step)));
        let time = self.forward.device_time().unwrap_or_else(|| begun.elapsed());
        self.gauge.end();
        if self.has_failed() {
            return;
        }
        match computed {
            Ok(()) => self.record(step, time),
            Err(panic) => self.recover(step, time, &words(panic.as_ref())),
        }
    }

    /// Whether the device has failed; then the engine ends.
    fn has_failed(&mut self) -> bool {
        let fault = self.forward.fault();
        if let Some(fault) = &fault {
            // Nobody's request is at fault. They end as when the engine is told to stop, so that others do them.
            tracing::error!(fault, "the device failed, and this engine ends");
            self.stopping = true;
        }
        fault.is_some()
    }

    /// Computes a step in lanes: rows, logits, samples, text.
    fn compute(&mut self, step: &Step) {
        let tokens = step.tokens();
        let count = self.forward.lanes(tokens).min(step.slices.len());
        self.lanes.resize_with(count, LaneState::default);
        let parts = divide(shares(step, &mut self.sequences), tokens.div_ceil(count), count);
        let (schedule, load, vocabulary) = (&self.schedule, self.load.as_ref(), self.forward.vocabulary());
        // The schedule must hear of forced tokens before the next step.
        let free = parts.iter().flatten().all(|share| share.sequence.guided.is_none());
        let alone = free && step.slices.iter().all(|slice| slice.samples) && schedule.runs_only(step);
        let parts = parts.into_iter().filter(|part| !part.is_empty());
        let lanes = parts.zip(&mut self.lanes).map(|(shares, state)| {
            let LaneState { batch, workspace, ends } = state;
            fill(batch, &shares, schedule);
            let encore = if alone { self.forward.encore(shares.len()) } else { Encore::default() };
            let later = Vec::new();
            let mut turns = Turns { schedule, load, vocabulary, encore, shares, left: 1, later, workspace, ends };
            Lane { batch, finish: Box::new(move |logits, batch| turns.take(logits, batch)) }
        });
        let lanes = lanes.collect();
        self.forward.forward_lanes(lanes);
    }

    fn record(&mut self, step: &Step, time: Duration) {
        self.schedule.commit(step);
        self.settle(step, time);
    }

    /// What follows from a step that the schedule knows of.
    fn settle(&mut self, step: &Step, time: Duration) {
        let mut shares = shares(step, &mut self.sequences);
        if let Some(longest) = self.forward.restarts_after() {
            // Computed with what holds for shorter texts, and now known to be longer.
            for Share { slice, sequence } in &shares {
                if slice.samples && slice.start + slice.tokens == longest && sequence.ids.len() > longest {
                    self.schedule.restart(slice.id);
                }
            }
        }
        self.gauge.add(&measured(&shares, &self.cost, time));
        let tokens: usize = shares.iter().map(Share::tokens).sum();
        let time = time / u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
        for share in &mut shares {
            share.sequence.engine_time += time * u32::try_from(share.tokens()).unwrap_or(u32::MAX);
            let turn = std::mem::take(&mut share.sequence.turn);
            self.schedule.commit_ahead(share.slice.id, turn.ahead());
            self.schedule.extend(share.slice.id, std::mem::take(&mut share.sequence.forced));
        }
        let ends: Vec<_> = self.lanes.iter_mut().flat_map(|lane| lane.ends.drain(..)).collect();
        for (id, end) in ends {
            self.end(id, end);
        }
    }

    /// After a panic in a step: what took its logits before is recorded, and what was at its logits fails. What is left
    /// is computed again one by one, so that whoever makes the kernels panic fails alone: nothing of it was recorded, and
    /// keys and values are written to the same places again.
    fn recover(&mut self, step: &Step, time: Duration, message: &str) {
        tracing::error!(message, sequences = step.slices.len(), "a step panicked");
        let of = |wanted: fn(Turn) -> bool, sequences: &BTreeMap<RequestId, Sequence>| -> Vec<Slice> {
            let is = |slice: &&Slice| sequences.get(&slice.id).is_some_and(|sequence| wanted(sequence.turn));
            step.slices.iter().filter(is).copied().collect()
        };
        let mut faulty = of(|turn| turn.taking, &self.sequences);
        let taken = of(|turn| turn.taken > 0 && !turn.taking, &self.sequences);
        let mut open = of(|turn| turn == Turn::default(), &self.sequences);
        if taken.is_empty() && faulty.is_empty() && open.len() == 1 {
            std::mem::swap(&mut faulty, &mut open);
        }
        self.record(&Step { slices: taken, ..Step::default() }, time);
        // What a panic left in the lanes is not to be trusted.
        self.lanes.clear();
        for slice in faulty {
            self.end(slice.id, End::Failed(RequestError::Step { message: message.to_owned() }));
        }
        for slice in open {
            // Another sample of its request may have failed meanwhile and taken it along.
            if self.sequences.contains_key(&slice.id) {
                self.run_step(&Step { slices: vec![slice], ..Step::default() });
            }
        }
    }

    /// Takes a sample out and tells its group how it ended; one that fails takes the others of its request along. One
    /// that has ended is left alone.
    fn end(&mut self, id: RequestId, end: End) {
        let went = if matches!(end, End::Finished(_)) { Went::Well } else { Went::Wrong };
        let Some(sequence) = self.remove(id, went) else { return };
        match end {
            End::Finished(reason) => sequence.finish(reason),
            End::Failed(error) => {
                for id in self.samples_of(sequence.first) {
                    self.remove(id, Went::Wrong);
                }
                sequence.group.fail(error);
            }
        }
    }

    /// Takes a sequence out. Before its last event, so that who hears of the end finds the place free.
    fn remove(&mut self, id: RequestId, went: Went) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        let computed = if went == Went::Well { sequence.ids.as_slice() } else { &[] };
        self.schedule.remove(id, computed);
        self.load.give_place(sequence.needed);
        self.gauge.close(id);
        Some(sequence)
    }
}

/// What a step needed and gave. The tokens of an encore are computed one after the other; of the weights that they read,
/// those of one way through the model are counted for each.
fn measured(shares: &[Share<'_>], cost: &Cost, time: Duration) -> Measured {
    let mut measured = Measured { sequences: shares.len() as u64, time, ..Measured::default() };
    let first = shares.iter().map(|Share { slice, .. }| Part {
        start: slice.start,
        tokens: slice.tokens,
        outputs: slice.outputs,
    });
    measured.work = cost.work(first);
    let longest = shares.iter().map(|share| share.sequence.turn.ahead()).max().unwrap_or(0);
    for ahead in 0..longest {
        let takes = shares.iter().filter(|share| share.sequence.turn.ahead() > ahead);
        let next = |share: &Share<'_>| share.slice.start + share.slice.tokens + ahead;
        let work = cost.work(takes.map(|share| Part { start: next(share), tokens: 1, outputs: 1 }));
        measured.work.bytes += work.bytes;
        measured.work.operations += work.operations;
    }
    for share in shares {
        let of_prompt = share.sequence.prompt_tokens.saturating_sub(share.slice.start).min(share.slice.tokens);
        measured.prefill_tokens += of_prompt as u64;
        measured.decode_tokens += (share.tokens() - of_prompt) as u64;
    }
    measured
}

/// What a panic said.
fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".to_owned())
}

/// The slices of a step with their sequences, in the order of the requests.
fn shares<'a>(step: &Step, sequences: &'a mut BTreeMap<RequestId, Sequence>) -> Vec<Share<'a>> {
    let mut slices = step.slices.clone();
    slices.sort_unstable_by_key(|slice| slice.id);
    let mut sequences = sequences.iter_mut();
    let shares = slices.into_iter().filter_map(|slice| {
        let (_, sequence) = sequences.find(|(id, _)| **id == slice.id)?;
        Some(Share { slice, sequence })
    });
    shares.collect()
}

/// Divides shares into so many parts of about so many tokens; some may be empty.
fn divide(shares: Vec<Share<'_>>, tokens: usize, count: usize) -> Vec<Vec<Share<'_>>> {
    let mut parts: Vec<Vec<_>> = (0..count).map(|_| Vec::with_capacity(shares.len())).collect();
    let mut before = 0;
    for share in shares {
        let part = before / tokens;
        before += share.slice.tokens;
        parts[part].push(share);
    }
    parts
}

fn fill(batch: &mut Batch, shares: &[Share<'_>], schedule: &Schedule) {
    batch.clear();
    for Share { slice, sequence } in shares {
        let ids = &sequence.ids[slice.start..slice.start + slice.tokens];
        batch.push(ids, slice.start, sequence.ids.len(), schedule.table(slice.id));
        batch.share(|block| schedule.is_shared(block));
        batch.want_logits_of(slice.outputs);
    }
}

impl Share<'_> {
    /// Tokens of the step and of the encore.
    const fn tokens(&self) -> usize {
        self.slice.tokens + self.sequence.turn.ahead()
    }
}

impl<'a> Turns<'a> {
    /// Samples and takes the next token of each share, then chooses the next turn.
    fn take(&mut self, logits: &[f32], batch: &mut Batch) -> Next {
        let (workspace, ends) = (&mut *self.workspace, &mut *self.ends);
        let mut rows = logits.chunks_exact(self.vocabulary).map(Given::Logits);
        self.shares.retain_mut(|share| match share.turn(&mut rows, workspace) {
            None => true,
            Some(end) => {
                ends.push((share.slice.id, end));
                false
            }
        });
        self.left -= 1;
        if !self.choose() {
            return Next::Done;
        }
        for share in &mut self.shares {
            share.slice.start += share.slice.tokens;
            (share.slice.tokens, share.slice.outputs) = (1, 1);
        }
        fill(batch, &self.shares, self.schedule);
        Next::Again
    }

    /// Whether there is another turn; then `shares` are those that take it.
    fn choose(&mut self) -> bool {
        if self.encore.turns == 0 || self.load.news.load(Ordering::Relaxed) {
            return false;
        }
        if self.later.is_empty() && self.encore.sequences > 0 {
            self.later = groups(std::mem::take(&mut self.shares), self.encore.sequences);
            self.encore.sequences = 0;
        }
        while self.left == 0 || self.shares.is_empty() {
            let Some(shares) = self.later.pop() else { return false };
            self.shares = shares;
            self.left = self.encore.turns;
        }
        true
    }
}

/// Divides shares into as few groups of at most so many as there can be, of about the same size.
fn groups(shares: Vec<Share<'_>>, most: usize) -> Vec<Vec<Share<'_>>> {
    let count = shares.len().div_ceil(most).max(1);
    let size = shares.len().div_ceil(count);
    let mut shares = shares.into_iter();
    (0..count).map(|_| shares.by_ref().take(size).collect()).collect()
}

impl Share<'_> {
    /// One turn of the sequence, see [`Self::advance`].
    fn turn<'b>(&mut self, rows: &mut impl Iterator<Item = Given<'b>>, workspace: &mut Workspace) -> Option<End> {
        self.sequence.turn.taking = true;
        let end = self.advance(rows, workspace);
        self.sequence.turn = Turn { taken: self.sequence.turn.taken + 1, taking: false };
        end
    }

    /// Takes what is given for the slice's outputs, and the next token where it samples; returns how the sequence ends, if it does.
    fn advance<'b>(&mut self, rows: &mut impl Iterator<Item = Given<'b>>, workspace: &mut Workspace) -> Option<End> {
        let end = self.slice.start + self.slice.tokens;
        let mut last = None;
        for next in end - self.slice.outputs + 1..=end {
            let row = rows.next()?;
            if let Err(error) = self.sequence.score_known(&row, next, workspace) {
                return Some(End::Failed(error));
            }
            last = Some(row);
        }
        let given = if self.slice.samples { last? } else { return None };
        if let Some(reason) = self.sequence.ending {
            return Some(End::Finished(reason));
        }
        match self.sequence.sample(&given, end, workspace) {
            Ok(token) => self.sequence.take(token),
            Err(error) => Some(End::Failed(error)),
        }
    }
}

impl Sequence {
    /// The samples of a request.
    fn all(ticket: Ticket, masker: Option<&Masker>) -> Vec<Self> {
        let whole = Whole {
            first_prompt_token: ticket.prompt_logprobs.and_then(|_| ticket.prompt.first().copied()),
            prompt_tokens: ticket.prompt.len(),
            submitted: ticket.submitted,
        };
        let group = Group::new(ticket.samples, whole, ticket.sink);
        let guided = |(guide, end): &(Guide, u32)| Some((Guided::new(masker?.clone(), guide.fork()), *end));
        let sample = |sample: u32| {
            let prompt_tokens = ticket.prompt.len();
            let mut ids = Vec::with_capacity(prompt_tokens + ticket.max_tokens);
            ids.extend_from_slice(&ticket.prompt);
            // The prompt is the same for all, so it is scored once.
            let wanted_of_prompt = ticket.prompt_logprobs.filter(|_| sample == 0);
            Self {
                first: ticket.id,
                group: group.clone(),
                prompt_tokens,
                max_tokens: ticket.max_tokens,
                sampling: Sampling { sample, ..ticket.sampling },
                shaper: Shaper::new(ticket.shaping.clone(), ticket.end_tokens.clone(), &ids),
                ids,
                guided: ticket.guide.as_ref().and_then(guided),
                forced: 0,
                ending: None,
                scores: Scores { wanted: ticket.logprobs, wanted_of_prompt, ..Scores::default() },
                end_tokens: ticket.end_tokens.clone(),
                stream: ticket.stream.clone(),
                stops: StopStrings::new(ticket.stop.clone()),
                echo: ticket.echo.clone(),
                text: String::new(),
                deadline: ticket.deadline,
                needed: ticket.needed,
                first_token: None,
                engine_time: Duration::ZERO,
                turn: Turn::default(),
            }
        };
        (0..).map(sample).take(ticket.samples).collect()
    }

    /// Whether the logits of more tokens than those sampled from are wanted: of the prompt's, or of forced ones.
    fn wants_all_logits(&self) -> bool {
        self.scores.wanted_of_prompt.is_some() || self.scores.wanted.is_some() && self.guided.is_some()
    }

    /// Scores the token at a position by the logits before it, when it is known already and that is wanted. A sequence that
    /// is computed again from its beginning keeps the scores that it has.
    fn score_known(
        &mut self,
        given: &Given<'_>,
        position: usize,
        workspace: &mut Workspace,
    ) -> Result<(), RequestError> {
        let Some(token) = self.ids.get(position) else { return Ok(()) };
        // Nothing stands before the prompt's first token, so it has none.
        let (scores, before) = if position < self.prompt_tokens {
            (&mut self.scores.prompt, position - 1)
        } else {
            (&mut self.scores.generated, position - self.prompt_tokens)
        };
        let wanted = if position < self.prompt_tokens { self.scores.wanted_of_prompt } else { self.scores.wanted };
        if let Some(top) = wanted
            && scores.len() == before
        {
            let scored = given.score(*token, top, workspace);
            scores.push(scored.map_err(|source| RequestError::NotFinite { position, source })?);
        }
        Ok(())
    }

    /// The token at a position.
    fn sample(&mut self, given: &Given<'_>, position: usize, workspace: &mut Workspace) -> Result<u32, RequestError> {
        let wrong = |source| RequestError::NotFinite { position, source };
        let logits = match given {
            Given::Logits(logits) => *logits,
            Given::Chosen(chosen) => {
                let scored = chosen.clone().map_err(wrong)?;
                let token = scored.token;
                if self.scores.wanted.is_some() {
                    self.scores.generated.push(scored);
                }
                return Ok(token);
            }
        };
        let counter = u32::try_from(position).unwrap_or(u32::MAX);
        let chosen = if self.shaper.is_off() && self.guided.is_none() {
            self.sampling.choose(logits, counter, workspace)
        } else {
            let mut shaped = std::mem::take(&mut workspace.shaped);
            shaped.clear();
            shaped.extend_from_slice(logits);
            self.shaper.apply(&mut shaped);
            if let Some((guided, end)) = &mut self.guided {
                guided.apply(&mut shaped, &self.end_tokens, *end).map_err(|message| RequestError::Form { message })?;
            }
            let chosen = self.sampling.choose(&shaped, counter, workspace);
            workspace.shaped = shaped;
            chosen
        };
        let token = chosen.map_err(wrong)?;
        if let Some(top) = self.scores.wanted {
            self.scores.generated.push(score(logits, token, top, workspace).map_err(wrong)?);
        }
        Ok(token)
    }

    /// Takes the token that was chosen and those that must follow it; returns how the text ends with them, if it does.
    fn take(&mut self, token: u32) -> Option<End> {
        let end = self.append(token);
        let Some((guided, _)) = &mut self.guided else { return end.map(End::Finished) };
        if end == Some(FinishReason::Stop) {
            return end.map(End::Finished);
        }
        let After { forced, whole } = match guided.take(token) {
            Ok(after) => after,
            Err(message) => return Some(End::Failed(RequestError::Form { message })),
        };
        let mut end = end;
        let mut open = forced.len();
        for token in forced {
            if end.is_none() {
                end = self.append(token);
                (self.forced, open) = (self.forced + 1, open - 1);
            }
        }
        if whole && open == 0 && end != Some(FinishReason::Stop) {
            self.flush();
            end = Some(FinishReason::Stop);
        }
        if self.forced > 0 && self.scores.wanted.is_some() {
            self.ending = end.take();
        }
        end.map(End::Finished)
    }

    /// Appends a token; returns why the text ends with it, if it does.
    fn append(&mut self, token: u32) -> Option<FinishReason> {
        self.first_token.get_or_insert_with(Instant::now);
        self.ids.push(token);
        self.shaper.count(token);
        if self.end_tokens.contains(&token) {
            self.flush();
            return Some(FinishReason::Stop);
        }
        let piece = self.stream.push(token);
        if self.shaper.may_end() {
            if self.cut(piece) {
                return Some(FinishReason::Stop);
            }
        } else {
            self.give(piece);
        }
        if self.ids.len() - self.prompt_tokens < self.max_tokens {
            return None;
        }
        // What the last tokens leave open may still complete a stop string.
        Some(if self.flush() { FinishReason::Stop } else { FinishReason::Length })
    }

    /// Gives out what was held back; whether that met a stop string.
    fn flush(&mut self) -> bool {
        let rest = self.stream.finish();
        if self.cut(rest) {
            return true;
        }
        let held = self.stops.finish();
        self.give(held);
        false
    }

    /// Passes text on up to a stop string; whether there was one.
    fn cut(&mut self, piece: String) -> bool {
        if self.stops.is_empty() {
            self.give(piece);
            return false;
        }
        let (text, stopped) = match self.stops.push(&piece) {
            Cut::Open(text) => (text, false),
            Cut::Stopped(text) => (text, true),
        };
        self.give(text);
        stopped
    }

    fn give(&mut self, delta: String) {
        if !delta.is_empty() {
            self.text.push_str(&delta);
            self.group.text(self.sampling.sample as usize, delta);
        }
    }

    fn finish(mut self, reason: FinishReason) {
        if reason.is_early() {
            self.flush();
        }
        self.group.finish(group::Share {
            sample: self.sampling.sample as usize,
            output: Output { reason, text: self.text, logprobs: self.scores.generated },
            tokens: self.ids.len() - self.prompt_tokens,
            first_token: self.first_token,
            engine_time: self.engine_time,
            prompt_logprobs: self.scores.prompt,
        });
    }
}
