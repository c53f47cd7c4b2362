//! The engine's thread: takes commands between steps, runs steps, tells the sinks.
//!
//! Never here: checks of requests (they were made before the request came in).

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use crate::backend::Batch;
use crate::decoder::Forward;
use crate::engine::{Completion, Event, FinishReason, Load, RequestError, RequestId, Sink};
use crate::sampler::{Sampling, Workspace};
use crate::schedule::{Limits, Schedule, Slice, Step};
use crate::text::{Cut, StopStrings, TokenStream};

/// What is asked of the thread.
pub(super) enum Command {
    Submit(Box<Ticket>),
    Cancel(RequestId),
    Stop,
}

/// A checked request.
pub(super) struct Ticket {
    pub(super) id: RequestId,
    pub(super) prompt: Vec<u32>,
    pub(super) max_tokens: usize,
    pub(super) sampling: Sampling,
    pub(super) end_tokens: Vec<u32>,
    pub(super) stop: Vec<String>,
    pub(super) stream: TokenStream,
    pub(super) deadline: Option<Instant>,
    /// KV tokens reserved in whole blocks.
    pub(super) needed: usize,
    pub(super) submitted: Instant,
    pub(super) sink: Sink,
}

/// The thread's state.
pub(super) struct Runner {
    forward: Box<dyn Forward>,
    schedule: Schedule,
    limits: Limits,
    load: Arc<Load>,
    sequences: HashMap<RequestId, Sequence>,
    batch: Batch,
    workspace: Workspace,
    stopping: bool,
}

/// A request on its way.
struct Sequence {
    /// The prompt, then what was sampled.
    ids: Vec<u32>,
    prompt_tokens: usize,
    max_tokens: usize,
    sampling: Sampling,
    end_tokens: Vec<u32>,
    stream: TokenStream,
    stops: StopStrings,
    text: String,
    deadline: Option<Instant>,
    needed: usize,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    engine_time: Duration,
    sink: Sink,
}

/// How a request ends.
enum End {
    Finished(FinishReason),
    Failed(RequestError),
}

impl Runner {
    pub(super) fn new(forward: Box<dyn Forward>, schedule: Schedule, limits: Limits, load: Arc<Load>) -> Self {
        Self {
            forward,
            schedule,
            limits,
            load,
            sequences: HashMap::new(),
            batch: Batch::default(),
            workspace: Workspace::default(),
            stopping: false,
        }
    }

    /// Runs until told to stop, or until nobody is left to tell it.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        loop {
            self.take_commands(commands);
            if self.stopping {
                break;
            }
            self.end_overdue();
            self.step();
        }
        let open: Vec<RequestId> = self.sequences.keys().copied().collect();
        for id in open {
            self.end(id, End::Finished(FinishReason::Cancelled));
        }
    }

    /// Takes what has come in; with nothing to do, waits for something.
    fn take_commands(&mut self, commands: &Receiver<Command>) {
        if self.schedule.is_idle() {
            match commands.recv() {
                Ok(command) => self.obey(command),
                Err(_) => self.stopping = true,
            }
        }
        while !self.stopping {
            match commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.stopping = true,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(ticket) => self.queue(*ticket),
            Command::Cancel(id) => self.end(id, End::Finished(FinishReason::Cancelled)),
            Command::Stop => self.stopping = true,
        }
    }

    fn queue(&mut self, ticket: Ticket) {
        let id = ticket.id;
        let added = self.schedule.add(id, ticket.prompt.len(), ticket.max_tokens);
        self.sequences.insert(id, Sequence::new(ticket));
        if let Err(error) = added {
            // `submit` has checked this against the same pool.
            self.end(id, End::Failed(RequestError::Step { message: error.to_string() }));
        }
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
        let begun = Instant::now();
        let step = self.schedule.next(&self.limits);
        for id in &step.admitted {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.started = Some(begun);
                sequence.tell(Event::Started);
            }
        }
        if step.slices.is_empty() {
            return;
        }
        self.fill_batch(&step);
        let computed = catch_unwind(AssertUnwindSafe(|| {
            let vocabulary = self.forward.vocabulary();
            let mut rows = self.forward.forward(&self.batch).chunks_exact(vocabulary);
            let samples = step.slices.iter().filter(|slice| slice.samples);
            let samples = samples.filter_map(|slice| {
                let sequence = self.sequences.get(&slice.id)?;
                Some((slice.id, sequence.sample(rows.next()?, slice, &mut self.workspace)))
            });
            samples.collect::<Vec<_>>()
        }));
        let time = begun.elapsed();
        match computed {
            Ok(samples) => self.record(&step, samples, time),
            Err(panic) => self.fail_step(&step, panic.as_ref()),
        }
    }

    fn fill_batch(&mut self, step: &Step) {
        self.batch.clear();
        for slice in &step.slices {
            if let Some(sequence) = self.sequences.get(&slice.id) {
                let ids = &sequence.ids[slice.start..slice.start + slice.tokens];
                self.batch.push(ids, slice.start, self.schedule.table(slice.id));
                if slice.samples {
                    self.batch.want_logits();
                }
            }
        }
    }

    fn record(&mut self, step: &Step, samples: Vec<(RequestId, Result<u32, RequestError>)>, time: Duration) {
        self.schedule.commit(step);
        let tokens = u32::try_from(step.tokens()).unwrap_or(u32::MAX);
        for slice in &step.slices {
            if let Some(sequence) = self.sequences.get_mut(&slice.id) {
                let share = u32::try_from(slice.tokens).unwrap_or(u32::MAX);
                sequence.engine_time += time * share / tokens;
            }
        }
        for (id, sampled) in samples {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let end = match sampled {
                Ok(token) => sequence.take(token).map(End::Finished),
                Err(error) => Some(End::Failed(error)),
            };
            if let Some(end) = end {
                self.end(id, end);
            }
        }
    }

    /// A panic in a step: whose fault it was is not known, so all sequences of the step fail, and
    /// the engine goes on with the others.
    fn fail_step(&mut self, step: &Step, panic: &(dyn Any + Send)) {
        let message = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_else(|| "a panic without words".to_owned());
        tracing::error!(message, sequences = step.slices.len(), "a step failed");
        for slice in &step.slices {
            self.end(slice.id, End::Failed(RequestError::Step { message: message.clone() }));
        }
    }

    /// Takes a request out and tells its sink how it ended. One that has ended is left alone.
    fn end(&mut self, id: RequestId, end: End) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        self.schedule.remove(id);
        // Before the last event, so that who hears of the end finds the place free.
        self.load.give_place(sequence.needed);
        let event = match end {
            End::Finished(reason) => Event::Finished(sequence.complete(reason)),
            End::Failed(error) => Event::Failed(error),
        };
        sequence.tell(event);
    }
}

impl Sequence {
    fn new(ticket: Ticket) -> Self {
        let mut ids = ticket.prompt;
        let prompt_tokens = ids.len();
        ids.reserve_exact(ticket.max_tokens);
        Self {
            ids,
            prompt_tokens,
            max_tokens: ticket.max_tokens,
            sampling: ticket.sampling,
            end_tokens: ticket.end_tokens,
            stream: ticket.stream,
            stops: StopStrings::new(ticket.stop),
            text: String::new(),
            deadline: ticket.deadline,
            needed: ticket.needed,
            submitted: ticket.submitted,
            started: None,
            first_token: None,
            engine_time: Duration::ZERO,
            sink: ticket.sink,
        }
    }

    /// The token after a slice.
    fn sample(&self, logits: &[f32], slice: &Slice, workspace: &mut Workspace) -> Result<u32, RequestError> {
        let position = slice.start + slice.tokens;
        let counter = u32::try_from(position).unwrap_or(u32::MAX);
        self.sampling.choose(logits, counter, workspace).map_err(|source| RequestError::NotFinite { position, source })
    }

    /// Takes the next token; returns why the text ends with it, if it does.
    fn take(&mut self, token: u32) -> Option<FinishReason> {
        self.first_token.get_or_insert_with(Instant::now);
        self.ids.push(token);
        if self.end_tokens.contains(&token) {
            self.flush();
            return Some(FinishReason::Stop);
        }
        let piece = self.stream.push(token);
        if self.cut(&piece) {
            return Some(FinishReason::Stop);
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
        if self.cut(&rest) {
            return true;
        }
        let held = self.stops.finish();
        self.give(held);
        false
    }

    /// Passes text on up to a stop string; whether there was one.
    fn cut(&mut self, piece: &str) -> bool {
        let (text, stopped) = match self.stops.push(piece) {
            Cut::Open(text) => (text, false),
            Cut::Stopped(text) => (text, true),
        };
        self.give(text);
        stopped
    }

    fn give(&mut self, delta: String) {
        if !delta.is_empty() {
            self.text.push_str(&delta);
            self.tell(Event::Text { delta });
        }
    }

    fn complete(&mut self, reason: FinishReason) -> Completion {
        if matches!(reason, FinishReason::Cancelled | FinishReason::Deadline) {
            self.flush();
        }
        let now = Instant::now();
        let since = |time: Instant| time.saturating_duration_since(self.submitted);
        Completion {
            reason,
            text: std::mem::take(&mut self.text),
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.ids.len() - self.prompt_tokens,
            queued: since(self.started.unwrap_or(now)),
            first_token: self.first_token.map(since),
            total: since(now),
            engine_time: self.engine_time,
        }
    }

    /// A sink that panics loses its events, nothing else.
    fn tell(&mut self, event: Event) {
        if catch_unwind(AssertUnwindSafe(|| (self.sink)(event))).is_err() {
            tracing::error!("a request's sink panicked");
        }
    }
}
