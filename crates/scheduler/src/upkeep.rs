//! What keeps every lane going: each task takes no input, may run twice, and may run in any scheduler.

use futures_util::future::{BoxFuture, join_all};
use genmill_core::ids::LaneNumber;
use genmill_core::judge::Policy;
use genmill_daemon::health::Readiness;
use genmill_queue::{Queue, QueueError, Settings};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// How often every lane is looked after.
const EVERY: Duration = Duration::from_millis(250);

/// How often a task is repeated at once for one lane while it finds a full batch.
const REPEATS_MAX: u32 = 50;

/// How long leases are left alone after Redis was found away: workers could not renew them meanwhile, and will at their next
/// heartbeat.
const RECLAIM_GRACE: Duration = Duration::from_millis(RECLAIM_GRACE_MS);
const RECLAIM_GRACE_MS: u64 = 10_000;

/// An upkeep task: does its work for one lane and says how many jobs it handled.
type Task = for<'a> fn(&'a Queue, LaneNumber, &'a Policy) -> BoxFuture<'a, Result<u32, QueueError>>;

/// Every upkeep task, and whether it judges workers by their leases.
const TASKS: &[(&str, Judges, Task)] = &[
    ("expire", Judges::Jobs, |queue, lane, _| Box::pin(queue.expire(lane))),
    ("reclaim", Judges::Workers, |queue, lane, policy| Box::pin(queue.reclaim(lane, policy, RECLAIM_GRACE_MS))),
    ("age", Judges::Jobs, |queue, lane, _| Box::pin(queue.age(lane))),
    ("promote", Judges::Jobs, |queue, lane, _| Box::pin(queue.promote(lane))),
];

/// What a task goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judges {
    /// Times of jobs.
    Jobs,
    /// Heartbeats of workers, which fail while Redis is away.
    Workers,
}

/// What is kept from one round to the next.
struct Upkeep {
    queue: Queue,
    policy: Policy,
    /// All lanes, as far as they could be listed.
    lanes: Vec<LaneNumber>,
    /// What is set, as far as it could be read.
    settings: Settings,
    /// What is known to be applied to each lane. Whoever changes a setting applies it; should that fail half way, it is
    /// made good here.
    applied: HashMap<LaneNumber, Settings>,
    /// Until when leases are left alone in lanes whose Redis was away.
    leases_wait_until: HashMap<LaneNumber, Instant>,
}

/// Looks after all lanes until `stop`; while Redis does not answer for all of them, the scheduler is not ready.
pub(crate) async fn run(queue: Queue, policy: Policy, readiness: Readiness, stop: CancellationToken) {
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut upkeep = Upkeep {
        queue,
        policy,
        lanes: Vec::new(),
        settings: Settings::default(),
        applied: HashMap::new(),
        leases_wait_until: HashMap::new(),
    };
    let mut failing = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        match upkeep.round().await {
            Ok(()) => {
                if failing {
                    tracing::info!("upkeep works again");
                    readiness.ready();
                }
                failing = false;
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "upkeep cannot work; trying again");
                    readiness.not_ready(error.to_string());
                    // Whatever it was, it may have kept any worker from its heartbeats.
                    upkeep.leave_leases_alone(upkeep.lanes.clone());
                }
                failing = true;
            }
        }
    }
}

impl Upkeep {
    /// Looks after every lane: of a cluster, the node of one may be away and those of others not.
    async fn round(&mut self) -> Result<(), QueueError> {
        let settings = self.queue.settings().await.map(|settings| self.settings = settings);
        let listed = self.queue.all_lanes().await;
        let mut worked =
            settings.and(listed).map(|lanes| self.lanes = lanes.into_iter().map(|(lane, _)| lane).collect());
        let looked_after = join_all(self.lanes.iter().map(async |lane| (*lane, self.look_after(*lane).await)));
        let looked_after = looked_after.await;
        for (lane, lane_worked) in looked_after {
            if lane_worked.is_err() {
                self.leave_leases_alone([lane]);
            } else {
                self.applied.insert(lane, self.settings.clone());
            }
            worked = worked.and(lane_worked);
        }
        worked
    }

    fn leave_leases_alone(&mut self, lanes: impl IntoIterator<Item = LaneNumber>) {
        let until = Instant::now() + RECLAIM_GRACE;
        self.leases_wait_until.extend(lanes.into_iter().map(|lane| (lane, until)));
    }

    async fn look_after(&self, lane: LaneNumber) -> Result<(), QueueError> {
        if self.applied.get(&lane) != Some(&self.settings) {
            self.queue.apply(lane, &self.settings).await?;
        }
        let leases_count = self.leases_wait_until.get(&lane).is_none_or(|until| Instant::now() >= *until);
        let counts = |judges: Judges| leases_count || judges == Judges::Jobs;
        for (name, _, task) in TASKS.iter().filter(|(_, judges, _)| counts(*judges)) {
            for _ in 0..REPEATS_MAX {
                let handled = match task(&self.queue, lane, &self.policy).await {
                    Err(error) if error.is_passing() => return Err(error),
                    // One damaged lane must not keep the others from being looked after.
                    Err(error) => {
                        tracing::error!(%error, lane = lane.0, task = name, "upkeep failed");
                        break;
                    }
                    Ok(0) => break,
                    Ok(handled) => handled,
                };
                tracing::debug!(lane = lane.0, task = name, jobs = handled, "upkeep");
            }
        }
        Ok(())
    }
}
