//! The loop of one lane: it owns what runs there, and everything else sends it messages. A lane whose part of Redis does
//! not answer holds up no other.

use crate::attempt::{Bench, Stop, attempt, finish};
use crate::finisher::Finisher;
use crate::perform::{Offer, Perform, Places, Started};
use crate::permits::Gated;
use crate::run::Options;
use crate::text::{PIECES_MAX, pass_on};
use genmill_core::attempt::{Failure, FailureClass, Outcome, Performed};
use genmill_core::gate::{Declaration, KeyId, Observation};
use genmill_core::ids::LaneNumber;
use genmill_queue::{Beat, Demand, Holding, Lease, Queue, Room, Slots};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

/// A claim is made this often even without a hint, in case one was lost.
const CLAIM_EVERY: Duration = Duration::from_secs(1);

/// After a heartbeat, cancelled jobs wait this long for the next: one tells of all of them.
const CANCELS_EVERY: Duration = Duration::from_millis(20);

/// How long a drain tries to say what it hands back, when Redis does not answer.
const GIVE_UP_AFTER: Duration = Duration::from_secs(8);

/// How long leaving may take.
pub(crate) const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// What a lane is told from outside. However often it is told, it is told once.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    /// It has work.
    pub(crate) work: Notify,
    /// A running job was cancelled.
    pub(crate) cancel: Notify,
}

/// What the loop does about claiming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    /// It claims where work may wait.
    Takes,
    /// It has handed jobs back to others, and leaves them there until the next beat.
    Rests,
    /// It is about to stop.
    Drains,
}

/// A job that runs.
struct Running {
    lease: Arc<Lease>,
    started: Started,
    tell: watch::Sender<Option<Stop>>,
}

/// A lane that a worker serves.
pub(crate) struct LaneLoop<P> {
    queue: Queue,
    options: Arc<Options>,
    number: LaneNumber,
    offer: Offer,
    declared: Option<Declaration>,
    /// With which keys it claims.
    keys: Vec<KeyId>,
    bell: Arc<Bell>,
    bench: Bench<P>,
    /// Write for the attempts.
    writers: JoinSet<()>,
    attempts: JoinSet<()>,
    running: HashMap<Id, Running>,
    /// Estimated tokens of what runs.
    tokens: u64,
    /// Work may wait there.
    hungry: bool,
    mood: Mood,
    last_beat: Instant,
}

impl<P: Perform> LaneLoop<P> {
    pub(crate) fn new(
        queue: Queue,
        gated: Arc<Gated>,
        performer: Arc<P>,
        options: Arc<Options>,
        (number, offer): (LaneNumber, Offer),
    ) -> Self {
        let (finisher, finishing) = Finisher::new(queue.clone(), number, options.worker.clone());
        let (reported, receiver) = mpsc::channel(PIECES_MAX);
        let mut writers = JoinSet::new();
        writers.spawn(finishing);
        writers.spawn(pass_on(queue.clone(), number, options.worker.clone(), receiver));
        Self {
            keys: performer.declares(&offer.lane).map_or_else(Vec::new, |declared| declared.claims_with()),
            declared: performer.declares(&offer.lane),
            bench: Bench { performer, policy: options.policy, reported, finisher, gated },
            queue,
            options,
            number,
            offer,
            bell: Arc::default(),
            writers,
            attempts: JoinSet::new(),
            running: HashMap::new(),
            tokens: 0,
            hungry: true,
            mood: Mood::Takes,
            last_beat: Instant::now(),
        }
    }

    /// Its lane, and what tells it of hints.
    pub(crate) fn bell(&self) -> (LaneNumber, Arc<Bell>) {
        (self.number, self.bell.clone())
    }

    /// Takes jobs until `stop`, then waits for those that run, and leaves the lane.
    pub(crate) async fn run(mut self, stop: &CancellationToken) {
        self.serve(stop).await;
        self.drain().await;
        self.leave().await;
        // Nothing runs any more, so they have nothing left to write.
        self.writers.shutdown().await;
    }

    async fn serve(&mut self, stop: &CancellationToken) {
        let bell = self.bell.clone();
        let mut beat = interval(Duration::from_millis(self.options.heartbeat_ms));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut claim = interval(CLAIM_EVERY);
        claim.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !stop.is_cancelled() {
            if self.wants() {
                self.claim().await;
            }
            let rested = self.last_beat + CANCELS_EVERY;
            tokio::select! {
                () = stop.cancelled() => {}
                () = bell.work.notified() => {
                    self.hungry = true;
                    if self.offer.capacity == 0 {
                        self.look().await;
                    }
                }
                () = async { sleep_until(rested).await; bell.cancel.notified().await } => self.heartbeat().await,
                places = changed(&mut self.offer) => self.take_places(places).await,
                _ = claim.tick() => {
                    self.hungry = true;
                    self.look().await;
                }
                _ = beat.tick() => self.heartbeat().await,
                Some(ended) = self.attempts.join_next_with_id() => self.attempts_ended(ended),
            }
        }
    }

    /// Takes more or less from now on, and says so.
    async fn take_places(&mut self, places: Places) {
        (self.offer.capacity, self.offer.tokens) = (places.capacity, places.tokens);
        self.hungry = true;
        self.heartbeat().await;
    }

    /// Tells the performer what waits, where that decides what it takes.
    async fn look(&mut self) {
        if self.offer.changes.is_none() {
            return;
        }
        match self.queue.demand(self.number).await {
            Ok(Demand { waiting, capacity }) => {
                let elsewhere = capacity > u64::from(self.offer.capacity);
                self.bench.performer.waits(&self.offer.lane, waiting, elsewhere);
            }
            Err(error) => {
                let lane = self.number.0;
                tracing::warn!(error = error.in_full(), lane, "cannot look at what waits; trying again soon");
            }
        }
    }

    /// What it can take now.
    fn room(&self) -> Room<'_> {
        let running = u32::try_from(self.running.len()).unwrap_or(u32::MAX);
        Room {
            free: self.offer.capacity.saturating_sub(running),
            tokens: self.offer.tokens.map(|tokens| tokens.saturating_sub(self.tokens)),
            keys: &self.keys,
        }
    }

    /// Whether it could take anything now.
    fn takes(&self) -> bool {
        let room = self.room();
        self.mood == Mood::Takes && room.free > 0 && room.tokens != Some(0)
    }

    fn wants(&self) -> bool {
        self.hungry && self.takes()
    }

    fn slots(&self) -> Slots<'_> {
        let room = self.room();
        let free = if self.takes() { room.free } else { 0 };
        Slots { capacity: self.offer.capacity, free, tokens: room.tokens, declared: self.declared.as_ref() }
    }

    async fn claim(&mut self) {
        // Whatever is left there is asked for again when a place gets free.
        self.hungry = false;
        let (worker, lease_ms) = (&self.options.worker, self.options.lease_ms);
        match self.queue.claim(self.number, worker, self.room(), lease_ms).await {
            Ok(leases) => leases.into_iter().for_each(|lease| self.start(lease)),
            Err(error) => {
                tracing::warn!(error = error.in_full(), lane = self.number.0, "cannot claim; trying again soon");
            }
        }
    }

    fn start(&mut self, lease: Lease) {
        tracing::debug!(job = %lease.id, epoch = lease.epoch.0, "claimed");
        self.tokens += lease.spec.estimated_tokens();
        let lease = Arc::new(lease);
        let (tell, told) = watch::channel(None);
        let started = Started::default();
        let task = self.attempts.spawn(attempt(self.bench.clone(), lease.clone(), started.clone(), told));
        self.running.insert(task.id(), Running { lease, started, tell });
    }

    /// Attempts that were finished together end together: their places are filled by one claim.
    fn attempts_ended(&mut self, first: Result<(Id, ()), JoinError>) {
        self.attempt_ended(first);
        while let Some(next) = self.attempts.try_join_next_with_id() {
            self.attempt_ended(next);
        }
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
            let performed =
                Performed { outcome: Outcome::Failed(failure), cost: None, observation: Some(Observation::default()) };
            let again = lease.clone();
            let task = self.attempts.spawn(async move { finish(&bench, &again, performed).await });
            self.running.insert(task.id(), Running { lease, started, tell });
            return;
        }
        self.tokens = self.tokens.saturating_sub(lease.spec.estimated_tokens());
        self.hungry = true;
    }

    /// One call renews all leases; attempts that must stop are told.
    pub(crate) async fn heartbeat(&mut self) {
        self.last_beat = Instant::now();
        let running: Vec<&Running> = self.running.values().collect();
        let held = |running: &&Running| Holding { held: running.lease.held(), started: running.started.get() };
        let held: Vec<Holding> = running.iter().map(held).collect();
        let (worker, lease_ms) = (&self.options.worker, self.options.lease_ms);
        let beats = self.queue.heartbeat(self.number, worker, self.slots(), lease_ms, &held).await;
        let beats = beats.unwrap_or_else(|error| {
            let lane = self.number.0;
            tracing::warn!(error = error.in_full(), lane, "cannot renew leases; trying again at the next beat");
            Vec::new()
        });
        let mut handed_back = false;
        for (running, beat) in running.into_iter().zip(beats) {
            if let Some(stop) = stop_for(beat, running.started.get()) {
                handed_back |= stop == Stop::HandBack;
                running.tell.send_replace(Some(stop));
            }
        }
        if self.mood != Mood::Drains {
            self.mood = if handed_back { Mood::Rests } else { Mood::Takes };
        }
    }

    /// Waits for running jobs, beating on; hands back what is not done in time.
    async fn drain(&mut self) {
        self.mood = Mood::Drains;
        if self.running.is_empty() {
            return;
        }
        let lane = self.number.0;
        tracing::info!(lane, jobs = self.running.len(), "draining: waiting for running jobs");
        let deadline = Instant::now() + Duration::from_millis(self.options.drain_timeout_ms);
        let mut beat = interval(Duration::from_millis(self.options.heartbeat_ms));
        let given_up = deadline + GIVE_UP_AFTER;
        let mut told = false;
        while !self.running.is_empty() {
            tokio::select! {
                () = sleep_until(given_up) => {
                    tracing::error!(lane, jobs = self.running.len(), "redis does not answer: the leases must run out");
                    self.attempts.abort_all();
                    return;
                }
                () = sleep_until(deadline), if !told => {
                    told = true;
                    tracing::info!(lane, jobs = self.running.len(), "draining: handing back what is not done");
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
        let leaving = self.queue.leave(self.number, &self.options.worker);
        if !matches!(tokio::time::timeout(LEAVE_WITHIN, leaving).await, Ok(Ok(_))) {
            tracing::warn!(lane = self.number.0, "left without saying so; what it could run is forgotten by itself");
        }
    }
}

/// Completes when an offer has changed, with what it is now.
async fn changed(offer: &mut Offer) -> Places {
    if let Some(changes) = &mut offer.changes
        && changes.changed().await.is_ok()
    {
        return *changes.borrow_and_update();
    }
    std::future::pending().await
}

/// What an attempt is told; nothing of handing back when its work began while the beat was on its way.
const fn stop_for(beat: Beat, started: bool) -> Option<Stop> {
    match beat {
        Beat::Lost => Some(Stop::LeaseLost),
        Beat::Cancel => Some(Stop::Cancelled),
        Beat::DeadlinePassed => Some(Stop::DeadlinePassed),
        Beat::HandBack if !started => Some(Stop::HandBack),
        Beat::Ok | Beat::HandBack => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_has_begun_is_not_handed_back() {
        for (beat, started, expect) in [
            (Beat::HandBack, false, Some(Stop::HandBack)),
            (Beat::HandBack, true, None),
            (Beat::Cancel, true, Some(Stop::Cancelled)),
            (Beat::Lost, false, Some(Stop::LeaseLost)),
            (Beat::Ok, false, None),
        ] {
            assert_eq!(stop_for(beat, started), expect, "{beat:?}");
        }
    }
}
