//! A worker's loops: one for each lane, its registration, and the hints that it is sent.

use crate::lane::{Bell, LEAVE_WITHIN, LaneLoop};
use crate::perform::Perform;
use crate::permits::Gated;
use futures_util::future::join_all;
use genmill_core::ids::{LaneNumber, WorkerId};
use genmill_core::judge::Policy;
use genmill_core::registration::Registration;
use genmill_core::time::UnixMs;
use genmill_queue::{Hint, Hints, Queue, QueueError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

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

/// Serves the lanes that `performer` offers until `stop` is cancelled, then drains: running jobs may finish for a
/// while, the rest is handed back. Calls `ready` once jobs can be taken.
///
/// # Errors
/// [`QueueError`] when Redis does not answer at the start. Later on, each loop waits for it to come back.
pub async fn run<P: Perform>(
    queue: Queue,
    performer: Arc<P>,
    options: Options,
    stop: CancellationToken,
    ready: impl FnOnce() + Send,
) -> Result<(), QueueError> {
    let options = Arc::new(options);
    let offers = performer.offers();
    let capacity = offers.iter().map(|offer| offer.capacity).sum();
    let mut opened = Vec::with_capacity(offers.len());
    for offer in offers {
        opened.push((queue.open_lane(&offer.lane).await?, offer));
    }
    let numbers = opened.iter().map(|(number, offer)| (offer.lane.clone(), *number)).collect();
    let gated = Arc::new(Gated::new(queue.clone(), numbers));
    let lane_loop = |lane| LaneLoop::new(queue.clone(), gated.clone(), performer.clone(), options.clone(), lane);
    let mut lanes: Vec<_> = opened.into_iter().map(lane_loop).collect();
    let bells: BTreeMap<LaneNumber, Arc<Bell>> = lanes.iter().map(LaneLoop::bell).collect();
    let numbers: Vec<LaneNumber> = bells.keys().copied().collect();
    // The subscription comes before the first claim, so that no hint falls between.
    let hints = if numbers.is_empty() { None } else { Some(queue.hints(&numbers).await?) };
    let registrar = Registrar { queue: queue.clone(), performer, options: options.clone(), capacity };
    registrar.register().await?;
    join_all(lanes.iter_mut().map(LaneLoop::heartbeat)).await;
    ready();
    let serving = async {
        join_all(lanes.into_iter().map(|lane| lane.run(&stop))).await;
        // Without lanes there is nothing else to wait for.
        stop.cancelled().await;
    };
    tokio::select! {
        () = serving => {}
        () = pass_hints_on(hints, &bells) => {}
        () = registrar.keep_registered() => {}
    }
    if !matches!(tokio::time::timeout(LEAVE_WITHIN, queue.deregister(&options.worker)).await, Ok(Ok(()))) {
        tracing::warn!("left without saying so; the registration runs out by itself");
    }
    Ok(())
}

/// Says that the worker lives, and what it serves.
struct Registrar<P> {
    queue: Queue,
    performer: Arc<P>,
    options: Arc<Options>,
    capacity: u32,
}

impl<P: Perform> Registrar<P> {
    async fn register(&self) -> Result<(), QueueError> {
        let registration = Registration {
            worker: self.options.worker.clone(),
            started_at: self.options.started_at,
            capacity: self.capacity,
            prefixes: self.options.prefixes.clone(),
            models: self.performer.models(),
        };
        self.queue.register(&registration, self.options.lease_ms).await
    }

    /// Registers at every beat and whenever what it serves has changed. Never ends.
    async fn keep_registered(&self) {
        let mut beat = interval(Duration::from_millis(self.options.heartbeat_ms));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = beat.tick() => {}
                () = self.performer.changed() => {}
            }
            if let Err(error) = self.register().await {
                tracing::warn!(error = error.in_full(), "cannot register; trying again at the next beat");
            }
        }
    }
}

/// Tells lanes of their hints. Never ends.
async fn pass_hints_on(hints: Option<Hints>, bells: &BTreeMap<LaneNumber, Arc<Bell>>) {
    let Some(mut hints) = hints else { return std::future::pending().await };
    loop {
        match hints.next().await {
            Hint::Work(lane) => bells.get(&lane).into_iter().for_each(|bell| bell.work.notify_one()),
            Hint::Cancel(lane) => bells.get(&lane).into_iter().for_each(|bell| bell.cancel.notify_one()),
            Hint::Missed => bells.values().for_each(|bell| {
                bell.work.notify_one();
                bell.cancel.notify_one();
            }),
        }
    }
}
