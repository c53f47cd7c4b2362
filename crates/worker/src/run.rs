//! The loop: it owns what runs, and everything else sends it messages.

use crate::attempt::{Bench, Stop, attempt, finish};
use crate::finisher::Finisher;
use crate::perform::{Offer, Perform, Started};
use crate::text::{PIECES_MAX, pass_on};
use futures_util::future::join_all;
use genmill_core::attempt::{Failure, FailureClass, Outcome, Performed};
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_core::judge::Policy;
use genmill_core::registration::Registration;
use genmill_core::time::UnixMs;
use genmill_queue::{Beat, Hint, Hints, Holding, Lease, Queue, QueueError, Room, Slots};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// A claim is made this often even without a hint, in case one was lost.
const CLAIM_EVERY: Duration = Duration::from_secs(1);

/// How long a drain tries to say what it hands back, when Redis does not answer.
const GIVE_UP_AFTER: Duration = Duration::from_secs(8);

/// How long leaving may take.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// How a worker behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// The worker's id, fresh for every process.
    pub worker: WorkerId,
    /// When it started.
    pub started_at: UnixMs,
    /// The backend prefixes whose configuration it reads.
    pub prefixes: Vec<String>,
    /// How long a lease lasts without a heartbeat, in milliseconds.
    pub lease_ms: u64,
    /// Time between heartbeats, in milliseconds.
    pub heartbeat_ms: u64,
    /// How long a drain waits for running jobs before it hands them back, in milliseconds.
    pub drain_timeout_ms: u64,
    /// How failures are dealt with.
    pub policy: Policy,
}

/// A lane that this worker serves.
struct ServedLane {
    offer: Offer,
    running: u32,
    /// Estimated tokens of what runs.
    tokens: u64,
    /// Work may wait there.
    hungry: bool,
    /// It has handed jobs back to others, and leaves them there until the next beat.
    rests: bool,
}

impl ServedLane {
    const fn new(offer: Offer) -> Self {
        Self { offer, running: 0, tokens: 0, hungry: true, rests: false }
    }

    /// What it can take now.
    fn room(&self) -> Room {
        Room {
            free: self.offer.capacity.saturating_sub(self.running),
            tokens: self.offer.tokens.map(|tokens| tokens.saturating_sub(self.tokens)),
        }
    }

    fn wants(&self) -> bool {
        let room = self.room();
        self.hungry && !self.rests && room.free > 0 && room.tokens != Some(0)
    }

    fn slots(&self) -> Slots {
        let room = self.room();
        let free = if room.tokens == Some(0) { 0 } else { room.free };
        Slots { capacity: self.offer.capacity, free, tokens: room.tokens }
    }
}

/// A job that runs.
struct Running {
    lease: Lease,
    started: Started,
    tell: watch::Sender<Option<Stop>>,
}

struct Loop<P> {
    queue: Queue,
    bench: Bench<P>,
    options: Options,
    lanes: BTreeMap<LaneNumber, ServedLane>,
    attempts: JoinSet<()>,
    running: HashMap<Id, Running>,
}

/// Serves the lanes that `performer` offers until `stop` is cancelled, then drains: running jobs may finish for a
/// while, the rest is handed back. Calls `ready` once jobs can be taken.
///
/// # Errors
/// [`QueueError`] when Redis does not answer at the start. Later on, the loop waits for it to come back.
pub async fn run<P: Perform>(
    queue: Queue,
    performer: Arc<P>,
    options: Options,
    stop: CancellationToken,
    ready: impl FnOnce() + Send,
) -> Result<(), QueueError> {
    let mut lanes = BTreeMap::new();
    for offer in performer.offers() {
        let number = queue.open_lane(&offer.lane).await?;
        lanes.insert(number, ServedLane::new(offer));
    }
    let numbers: Vec<LaneNumber> = lanes.keys().copied().collect();
    // The subscription comes before the first claim, so that no hint falls between.
    let hints = if numbers.is_empty() { None } else { Some(queue.hints(&numbers).await?) };
    let (finisher, finishing) = Finisher::new(queue.clone(), options.worker.clone());
    let (pieces, receiver) = mpsc::channel(PIECES_MAX);
    let mut writers = JoinSet::new();
    writers.spawn(finishing);
    writers.spawn(pass_on(queue.clone(), options.worker.clone(), receiver));
    let bench = Bench { performer, policy: options.policy, pieces, finisher };
    let mut this = Loop { queue, bench, options, lanes, attempts: JoinSet::new(), running: HashMap::new() };
    this.register().await?;
    this.heartbeat().await;
    ready();
    this.serve(hints, stop).await;
    this.drain().await;
    this.leave().await;
    // Nothing runs any more, so they have nothing left to write.
    writers.shutdown().await;
    Ok(())
}

impl<P: Perform> Loop<P> {
    async fn serve(&mut self, mut hints: Option<Hints>, stop: CancellationToken) {
        let mut beat = interval(Duration::from_millis(self.options.heartbeat_ms));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut claim = interval(CLAIM_EVERY);
        claim.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if stop.is_cancelled() {
                return;
            }
            self.claim_where_hungry().await;
            tokio::select! {
                () = stop.cancelled() => return,
                hint = next_hint(&mut hints) => match hint {
                    Hint::Work(lane) => self.make_hungry(|number| number == lane),
                    Hint::Cancel(_) => self.heartbeat().await,
                    Hint::Missed => { self.heartbeat().await; self.make_hungry(|_| true); }
                },
                _ = claim.tick() => self.make_hungry(|_| true),
                _ = beat.tick() => self.beat().await,
                Some(ended) = self.attempts.join_next_with_id() => self.attempts_ended(ended),
            }
        }
    }

    /// Attempts that were finished together end together: their places are filled by one claim.
    fn attempts_ended(&mut self, first: Result<(Id, ()), JoinError>) {
        self.attempt_ended(first);
        while let Some(next) = self.attempts.try_join_next_with_id() {
            self.attempt_ended(next);
        }
    }

    fn make_hungry(&mut self, which: impl Fn(LaneNumber) -> bool) {
        for (number, lane) in &mut self.lanes {
            lane.hungry |= which(*number);
        }
    }

    async fn claim_where_hungry(&mut self) {
        let hungry = self.lanes.iter().filter(|(_, lane)| lane.wants());
        let claims: Vec<(LaneNumber, Room)> = hungry.map(|(number, lane)| (*number, lane.room())).collect();
        let (queue, worker, lease_ms) = (&self.queue, &self.options.worker, self.options.lease_ms);
        let claimed = join_all(
            claims.into_iter().map(async |(number, room)| (number, queue.claim(number, worker, room, lease_ms).await)),
        );
        for (number, leases) in claimed.await {
            if let Some(lane) = self.lanes.get_mut(&number) {
                // Whatever is left there is asked for again when a place gets free.
                lane.hungry = false;
            }
            match leases {
                Ok(leases) => leases.into_iter().for_each(|lease| self.start(lease)),
                Err(error) => tracing::warn!(%error, lane = number.0, "cannot claim; trying again soon"),
            }
        }
    }

    fn start(&mut self, lease: Lease) {
        tracing::debug!(job = %lease.id, epoch = lease.epoch.0, "claimed");
        if let Some(lane) = self.lanes.get_mut(&lease.id.lane()) {
            lane.running += 1;
            lane.tokens += lease.spec.estimated_tokens();
        }
        let (tell, told) = watch::channel(None);
        let started = Started::default();
        let task = self.attempts.spawn(attempt(self.bench.clone(), lease.clone(), started.clone(), told));
        self.running.insert(task.id(), Running { lease, started, tell });
    }

    fn attempt_ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let (task, panicked) = match &ended {
            Ok((task, ())) => (*task, false),
            Err(error) => (error.id(), error.is_panic()),
        };
        let Some(Running { lease, started, tell }) = self.running.remove(&task) else { return };
        if panicked {
            // The job must not hang for a defect of ours: the same place finishes it as failed.
            let failure = Failure::new(FailureClass::Internal, "the worker's own code failed; its log tells more");
            let bench = self.bench.clone();
            let performed = Performed { outcome: Outcome::Failed(failure), cost: None };
            let again = lease.clone();
            let task = self.attempts.spawn(async move { finish(&bench, &again, performed).await });
            self.running.insert(task.id(), Running { lease, started, tell });
            return;
        }
        if let Some(lane) = self.lanes.get_mut(&lease.id.lane()) {
            lane.running -= 1;
            lane.tokens = lane.tokens.saturating_sub(lease.spec.estimated_tokens());
            lane.hungry = true;
        }
    }

    /// A regular beat: leases and registration.
    async fn beat(&mut self) {
        if let Err(error) = self.register().await {
            tracing::warn!(%error, "cannot register; trying again at the next beat");
        }
        self.heartbeat().await;
    }

    async fn register(&self) -> Result<(), QueueError> {
        let registration = Registration {
            worker: self.options.worker.clone(),
            started_at: self.options.started_at,
            capacity: self.lanes.values().map(|lane| lane.offer.capacity).sum(),
            prefixes: self.options.prefixes.clone(),
            models: self.bench.performer.models(),
        };
        self.queue.register(&registration, self.options.lease_ms).await
    }

    /// One call for each lane renews all its leases; attempts that must stop are told.
    async fn heartbeat(&mut self) {
        let (queue, worker, lease_ms) = (&self.queue, &self.options.worker, self.options.lease_ms);
        let beats = join_all(self.lanes.iter().map(async |(number, lane)| {
            let running = self.running.values().filter(|running| running.lease.id.lane() == *number);
            let held: Vec<Holding> =
                running.map(|running| Holding { held: running.lease.held(), started: running.started.get() }).collect();
            let beats = queue.heartbeat(*number, worker, lane.slots(), lease_ms, &held).await;
            (*number, held, beats)
        }));
        // By lease, not by job: after an outage one worker may hold two leases of a job, of which only one is lost.
        let by_lease: HashMap<(JobId, Epoch), &Running> =
            self.running.values().map(|running| ((running.lease.id, running.lease.epoch), running)).collect();
        let mut handing_back = BTreeSet::new();
        for (number, held, beats) in beats.await {
            match beats {
                Ok(beats) => {
                    for (Holding { held, .. }, beat) in held.iter().zip(beats) {
                        if beat == Beat::HandBack {
                            handing_back.insert(number);
                        }
                        if let (Some(running), Some(stop)) = (by_lease.get(&(held.id, held.epoch)), stop_for(beat)) {
                            running.tell.send_replace(Some(stop));
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot renew leases; trying again at the next beat"),
            }
        }
        for (number, lane) in &mut self.lanes {
            lane.rests = handing_back.contains(number);
        }
    }

    /// Waits for running jobs, beating on; hands back what is not done in time.
    async fn drain(&mut self) {
        if self.running.is_empty() {
            return;
        }
        tracing::info!(jobs = self.running.len(), "draining: waiting for running jobs");
        let deadline = Instant::now() + Duration::from_millis(self.options.drain_timeout_ms);
        let mut beat = interval(Duration::from_millis(self.options.heartbeat_ms));
        let given_up = deadline + GIVE_UP_AFTER;
        let mut told = false;
        while !self.running.is_empty() {
            tokio::select! {
                () = tokio::time::sleep_until(given_up) => {
                    tracing::error!(jobs = self.running.len(), "redis does not answer: the leases must run out");
                    self.attempts.abort_all();
                    return;
                }
                () = tokio::time::sleep_until(deadline), if !told => {
                    told = true;
                    tracing::info!(jobs = self.running.len(), "draining: handing back what is not done");
                    for running in self.running.values() {
                        running.tell.send_replace(Some(Stop::Draining));
                    }
                }
                _ = beat.tick() => self.heartbeat().await,
                Some(ended) = self.attempts.join_next_with_id() => self.attempt_ended(ended),
            }
        }
    }

    async fn leave(&self) {
        let (queue, worker) = (&self.queue, &self.options.worker);
        let leaving = async {
            for left in join_all(self.lanes.keys().map(|number| queue.leave(*number, worker))).await {
                left?;
            }
            queue.deregister(worker).await
        };
        match tokio::time::timeout(LEAVE_WITHIN, leaving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "left without saying so; the registration runs out by itself"),
            Err(_) => tracing::warn!("left without saying so; the registration runs out by itself"),
        }
    }
}

const fn stop_for(beat: Beat) -> Option<Stop> {
    match beat {
        Beat::Ok => None,
        Beat::Lost => Some(Stop::LeaseLost),
        Beat::Cancel => Some(Stop::Cancelled),
        Beat::DeadlinePassed => Some(Stop::DeadlinePassed),
        Beat::HandBack => Some(Stop::HandBack),
    }
}

async fn next_hint(hints: &mut Option<Hints>) -> Hint {
    match hints {
        Some(hints) => hints.next().await,
        None => std::future::pending().await,
    }
}
