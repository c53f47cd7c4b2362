//! Every state that two jobs and two workers can get into while things go wrong: the protocol between the queue's
//! scripts and its workers as a model, explored to the end. Without one of its parts it must break a promise.
//!
//! Never here: Redis (`queue_model.rs` compares the scripts with a model of theirs); deadlines, which end a job where
//! a cancellation does.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::attempt::{Failure, FailureClass, FinishReason, Generation, Outcome};
use genmill_core::judge::{Policy, Throttle, judge, judge_loss};
use genmill_core::state::{Event, State, TRANSITIONS, transition};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::BTreeSet;

/// How many things go wrong at most in one run, wherever and whenever they do. With four, all promises hold as well, but
/// there are ten times as many states.
const MISHAPS_MAX: u32 = 3;

/// Patience that ends within so many mishaps.
const POLICY: Policy = Policy { retries_max: 1, delay_ms_first: 1, delay_ms_max: 1, losses_max: 2 };

/// The protocol, or what is left of it without one of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Whole,
    /// Finish keeps whatever comes.
    NoFence,
    /// Finish looks at state and worker, not at the epoch.
    NoEpoch,
    NoReclaim,
    /// A job that is released stays pending in the stream.
    NoAcknowledgement,
    BooksFencedAgain,
    /// A job that goes back to wait does so even when it was cancelled.
    ForgetsCancel,
}

/// Where a job is known. Leases are kept beside, with their workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Place {
    Backlog,
    /// In the stream, before delivery and after it.
    Undelivered,
    Pending,
    Delayed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Job {
    state: State,
    places: BTreeSet<Place>,
    lease: Option<usize>,
    failures: u32,
    losses: u32,
    cancel_asked: bool,
    /// How many results were ever written.
    results: u32,
    /// One for each claim, so the job's epoch is how many there are.
    attempts: Vec<Attempt>,
}

/// What is booked of an attempt: that it ended, that it was fenced, and the costs of both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Attempt {
    ended: u32,
    fenced: u32,
    costs: u32,
    /// Its verdict was kept.
    kept: bool,
    /// A finish has reached the queue, so its cost must be booked.
    told: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Worker {
    crashed: bool,
    paused: bool,
    run: Option<Run>,
}

/// An attempt in a worker's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Run {
    job: usize,
    epoch: usize,
    failures: u32,
}

/// A finish on its way to the queue. Its worker repeats it until it is answered. That it never arrives is not told
/// apart from a worker that is lost before it calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Call {
    worker: usize,
    run: Run,
    to: State,
    failed: bool,
}

/// All there is at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Mill {
    jobs: [Job; 2],
    workers: [Worker; 2],
    calls: BTreeSet<Call>,
    mishaps_left: u32,
    /// A state changed in a way that the table does not know.
    illegal: bool,
}

/// What may happen, to which job or worker.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Feed(usize),
    Promote(usize),
    Reclaim(usize),
    Cancel(usize),
    Claim(usize, usize),
    End(usize, Box<Outcome>),
    Finish(Call),
    /// The answer gets lost.
    FinishUnheard(Call),
    /// A worker loses an attempt: the claim's answer never came, or finish was repeated for too long.
    Forget(usize),
    Crash(usize),
    /// Leases may run out meanwhile. Right after a claim, it is the answer that comes late.
    Pause(usize),
    Resume(usize),
}

impl Step {
    /// What it may be to a job.
    const fn events(&self) -> &'static [Event] {
        match self {
            Self::Claim(..) => &[Event::Claim],
            Self::Promote(_) => &[Event::Promote],
            Self::Cancel(_) => &[Event::Cancel],
            Self::Reclaim(_) => &[Event::Reclaim, Event::Poison, Event::Cancel],
            Self::Finish(_) | Self::FinishUnheard(_) => {
                &[Event::Succeed, Event::Fail, Event::Retry, Event::HandBack, Event::Cancel]
            }
            _ => &[],
        }
    }
}

impl Worker {
    const fn is_up(&self) -> bool {
        !self.crashed && !self.paused
    }
}

impl Job {
    /// `claim.lua`, for one entry of the stream. True when it is leased.
    fn claim(&mut self, worker: usize) -> bool {
        self.places.remove(&Place::Undelivered);
        if self.state != State::Queued {
            return false;
        }
        self.state = transition(self.state, Event::Claim).unwrap();
        self.places.insert(Place::Pending);
        self.lease = Some(worker);
        self.attempts.push(Attempt::default());
        true
    }

    fn is_held(&self, worker: usize, epoch: usize) -> bool {
        self.state == State::Running && self.lease == Some(worker) && self.attempts.len() == epoch
    }

    /// `finish.lua`.
    fn finish(&mut self, call: &Call, protocol: Protocol) {
        let epoch = if protocol == Protocol::NoEpoch { self.attempts.len() } else { call.run.epoch };
        let is_held = self.is_held(call.worker, epoch) || protocol == Protocol::NoFence;
        let attempt = &mut self.attempts[call.run.epoch - 1];
        attempt.told = true;
        if is_held {
            attempt.kept = true;
            attempt.ended += 1;
            attempt.costs += 1;
            self.failures += u32::from(call.failed);
            self.results += u32::from(call.to == State::Succeeded);
            self.release(call.to, protocol);
        } else if !attempt.kept && (attempt.fenced == 0 || protocol == Protocol::BooksFencedAgain) {
            attempt.fenced += 1;
            attempt.costs += 1;
        }
    }

    /// `reclaim.lua`.
    fn reclaim(&mut self, protocol: Protocol) {
        self.attempts.last_mut().unwrap().ended += 1;
        let (to, _) = judge_loss(self.losses, &POLICY);
        self.losses += 1;
        self.release(to, protocol);
    }

    fn release(&mut self, to: State, protocol: Protocol) {
        self.lease = None;
        if protocol != Protocol::NoAcknowledgement {
            self.places.remove(&Place::Pending);
        }
        let cancelled = self.cancel_asked && !to.is_final() && protocol != Protocol::ForgetsCancel;
        self.state = if cancelled { State::Cancelled } else { to };
        match self.state {
            State::Queued => drop(self.places.insert(Place::Backlog)),
            State::Delayed => drop(self.places.insert(Place::Delayed)),
            _ => self.cancel_asked = false,
        }
    }

    /// `cancel.lua`. An entry in the stream stays: claim skips it.
    fn cancel(&mut self) {
        self.cancel_asked = self.state == State::Running;
        if !self.cancel_asked {
            self.state = transition(self.state, Event::Cancel).unwrap();
            self.places.retain(|place| *place == Place::Undelivered);
        }
    }

    fn is_in_its_place(&self) -> bool {
        let places: Vec<Place> = self.places.iter().copied().collect();
        self.lease.is_some() == (self.state == State::Running)
            && match self.state {
                State::Queued => matches!(places[..], [Place::Backlog | Place::Undelivered]),
                State::Running => places == [Place::Pending],
                State::Delayed => places == [Place::Delayed],
                _ => matches!(places[..], [] | [Place::Undelivered]),
            }
    }

    /// Once when it ended, and once more when its worker came back after it had been lost.
    fn is_booked(&self) -> bool {
        let running = usize::from(self.state == State::Running);
        let (ended, open) = self.attempts.split_at(self.attempts.len() - running);
        ended.iter().all(|attempt| attempt.ended == 1 && attempt.fenced <= u32::from(!attempt.kept))
            && open.iter().all(|attempt| attempt.ended + attempt.fenced == 0)
    }
}

impl Mill {
    /// What goes on by itself. Each step uses something up that only a claim brings back, so every run ends.
    fn steps(&self, protocol: Protocol) -> Vec<Step> {
        let mut steps: Vec<Step> = self.calls.iter().copied().map(Step::Finish).collect();
        for (number, job) in self.jobs.iter().enumerate() {
            steps.extend(job.places.contains(&Place::Backlog).then_some(Step::Feed(number)));
            steps.extend(job.places.contains(&Place::Delayed).then_some(Step::Promote(number)));
            let runs_out = job.lease.is_some_and(|worker| !self.renews(worker, number));
            steps.extend((runs_out && protocol != Protocol::NoReclaim).then_some(Step::Reclaim(number)));
        }
        for (number, worker) in self.workers.iter().enumerate().filter(|(_, worker)| !worker.crashed) {
            match worker.run {
                _ if worker.paused => steps.push(Step::Resume(number)),
                None => steps.extend(self.delivered().map(|job| Step::Claim(number, job))),
                Some(run) if self.finishes(number, run) => {}
                Some(run) => {
                    steps.push(Step::End(number, Box::new(generated())));
                    steps.extend(self.told_to_stop(number, run).map(|outcome| Step::End(number, Box::new(outcome))));
                }
            }
        }
        steps
    }

    /// What goes wrong, or comes from outside.
    fn mishaps(&self) -> Vec<Step> {
        let open = |job: &usize| !self.jobs[*job].state.is_final() && !self.jobs[*job].cancel_asked;
        let mut mishaps: Vec<Step> = (0..2).filter(open).map(Step::Cancel).collect();
        for (number, worker) in self.workers.iter().enumerate().filter(|(_, worker)| worker.is_up()) {
            mishaps.extend([Step::Crash(number), Step::Pause(number)]);
            let Some(run) = worker.run else { continue };
            mishaps.push(Step::Forget(number));
            if !self.finishes(number, run) {
                let failed = Outcome::Failed(Failure::new(FailureClass::Transient, ""));
                mishaps.extend([failed, Outcome::HandedBack].map(|outcome| Step::End(number, Box::new(outcome))));
            }
        }
        mishaps.extend(self.calls.iter().copied().map(Step::FinishUnheard));
        mishaps
    }

    /// What a claim may bring. Which is next is up to the flows; here, any may be.
    fn delivered(&self) -> impl Iterator<Item = usize> {
        (0..2).filter(|job| self.jobs[*job].places.contains(&Place::Undelivered))
    }

    fn finishes(&self, worker: usize, run: Run) -> bool {
        self.calls.iter().any(|call| (call.worker, call.run) == (worker, run))
    }

    /// Whether the worker's heartbeats keep the job's lease.
    fn renews(&self, worker: usize, job: usize) -> bool {
        let its_lease = |run: Run| (run.job, run.epoch) == (job, self.jobs[job].attempts.len());
        self.workers[worker].is_up() && self.workers[worker].run.is_some_and(its_lease)
    }

    /// `heartbeat.lua`, and what the worker makes of it.
    fn told_to_stop(&self, worker: usize, run: Run) -> Option<Outcome> {
        match &self.jobs[run.job] {
            job if !job.is_held(worker, run.epoch) => Some(Outcome::HandedBack),
            job => job.cancel_asked.then_some(Outcome::Cancelled),
        }
    }

    fn take(&mut self, step: Step, protocol: Protocol) {
        match step {
            Step::Feed(job) => {
                self.jobs[job].places.remove(&Place::Backlog);
                self.jobs[job].places.insert(Place::Undelivered);
            }
            Step::Promote(job) => {
                self.jobs[job].places.remove(&Place::Delayed);
                self.jobs[job].release(transition(State::Delayed, Event::Promote).unwrap(), protocol);
            }
            Step::Reclaim(job) => self.jobs[job].reclaim(protocol),
            Step::Cancel(job) => self.jobs[job].cancel(),
            Step::Claim(worker, job) => {
                let failures = self.jobs[job].failures;
                let leased = self.jobs[job].claim(worker);
                let run = Run { job, epoch: self.jobs[job].attempts.len(), failures };
                self.workers[worker].run = leased.then_some(run);
            }
            Step::End(worker, outcome) => {
                let run = self.workers[worker].run.unwrap();
                let verdict = judge(*outcome, run.failures, &POLICY, Throttle::Delay, 0);
                let to = transition(State::Running, verdict.event()).unwrap();
                self.calls.insert(Call { worker, run, to, failed: verdict.counts() });
            }
            Step::Finish(call) => {
                self.jobs[call.run.job].finish(&call, protocol);
                self.workers[call.worker].run.take_if(|run| *run == call.run);
                self.calls.remove(&call);
            }
            Step::FinishUnheard(call) => self.jobs[call.run.job].finish(&call, protocol),
            Step::Forget(worker) => self.workers[worker].run = None,
            Step::Crash(worker) => self.workers[worker] = Worker { crashed: true, ..Worker::default() },
            Step::Pause(worker) => self.workers[worker].paused = true,
            Step::Resume(worker) => self.workers[worker].paused = false,
        }
    }

    fn all(&self, holds: fn(&Job) -> bool) -> bool {
        self.jobs.iter().all(holds)
    }

    fn attempts(&self) -> impl Iterator<Item = &Attempt> {
        self.jobs.iter().flat_map(|job| &job.attempts)
    }
}

fn generated() -> Outcome {
    let text = String::new();
    Outcome::Generated(Generation::new(text, FinishReason::Stop))
}

const STATES: &str = "states change as the table says, final ones never";
const RESULT: &str = "a job has a result when it succeeded, and never gets another";
const PLACE: &str = "a job is in one place";
const BOOKS: &str = "every attempt is booked once";
const COSTS: &str = "every cost is booked once";
const CANCEL: &str = "a cancelled job does not wait again";
const LOST: &str = "while a worker lives, something goes on until every job has ended";

impl Model for Protocol {
    type State = Mill;
    /// A step, and how many mishaps it is.
    type Action = (u32, Step);

    fn init_states(&self) -> Vec<Mill> {
        let job = Job {
            state: State::Queued,
            places: BTreeSet::from([Place::Backlog]),
            lease: None,
            failures: 0,
            losses: 0,
            cancel_asked: false,
            results: 0,
            attempts: Vec::new(),
        };
        let (jobs, workers) = ([job.clone(), job], [Worker::default(), Worker::default()]);
        vec![Mill { jobs, workers, calls: BTreeSet::new(), mishaps_left: MISHAPS_MAX, illegal: false }]
    }

    fn actions(&self, mill: &Mill, actions: &mut Vec<(u32, Step)>) {
        actions.extend(mill.steps(*self).into_iter().map(|step| (0, step)));
        if mill.mishaps_left > 0 {
            actions.extend(mill.mishaps().into_iter().map(|step| (1, step)));
        }
    }

    fn next_state(&self, before: &Mill, (mishaps, step): (u32, Step)) -> Option<Mill> {
        let mut mill = before.clone();
        let events = step.events();
        mill.mishaps_left -= mishaps;
        mill.take(step, *self);
        let known = |from, to| {
            from == to || TRANSITIONS.iter().any(|row| (row.0, row.2) == (from, to) && events.contains(&row.1))
        };
        mill.illegal |= !before.jobs.iter().zip(&mill.jobs).all(|(from, to)| known(from.state, to.state));
        Some(mill)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let (always, sometimes) = (Property::<Self>::always, Property::<Self>::sometimes);
        vec![
            always(STATES, |_, mill| !mill.illegal),
            always(RESULT, |_, mill| mill.all(|job| job.results == u32::from(job.state == State::Succeeded))),
            always(PLACE, |_, mill| mill.all(Job::is_in_its_place)),
            always(BOOKS, |_, mill| mill.all(Job::is_booked)),
            always(COSTS, |_, mill| mill.attempts().all(|attempt| attempt.costs == u32::from(attempt.told))),
            always(CANCEL, |_, mill| mill.all(|job| !job.cancel_asked || job.state == State::Running)),
            always(LOST, |protocol, mill| {
                let nobody_lives = mill.workers.iter().all(|worker| worker.crashed);
                mill.all(|job| job.state.is_final()) || nobody_lives || !mill.steps(*protocol).is_empty()
            }),
            // What the bounds must leave room for.
            sometimes("a job fails as poison", |_, mill| !mill.all(|job| job.losses < POLICY.losses_max)),
            sometimes("a job's retries are spent", |_, mill| !mill.all(|job| job.failures <= POLICY.retries_max)),
            sometimes("both succeed after a verdict was fenced", |_, mill| {
                mill.all(|job| job.state == State::Succeeded) && mill.attempts().any(|attempt| attempt.fenced > 0)
            }),
        ]
    }
}

#[test]
fn the_whole_protocol_keeps_its_promises() {
    let checker = Protocol::Whole.checker().spawn_dfs().join();
    checker.assert_properties();
}

#[test]
fn without_one_of_its_parts_it_breaks_one() {
    let rows = [
        (Protocol::NoFence, RESULT),
        (Protocol::NoFence, STATES),
        (Protocol::NoEpoch, BOOKS),
        (Protocol::NoReclaim, LOST),
        (Protocol::NoAcknowledgement, PLACE),
        (Protocol::BooksFencedAgain, COSTS),
        (Protocol::ForgetsCancel, CANCEL),
    ];
    for (protocol, promise) in rows {
        let found = HasDiscoveries::AnyOf(BTreeSet::from([promise]));
        // Breadth first: broken protocols may go on for ever.
        let checker = protocol.checker().finish_when(found).spawn_bfs().join();
        assert!(checker.discovery(promise).is_some(), "{protocol:?} keeps it: {promise}");
    }
}
