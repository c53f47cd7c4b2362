//! What keeps every lane going: each task takes no input, may run twice, and may run in any scheduler.

use futures_util::future::{BoxFuture, try_join};
use genmill_core::ids::LaneNumber;
use genmill_core::judge::Policy;
use genmill_daemon::health::Readiness;
use genmill_queue::{Queue, QueueError, Settings};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// How often every lane is looked after.
const EVERY: Duration = Duration::from_millis(250);

/// How often a task is repeated at once for one lane while it finds a full batch.
const REPEATS_MAX: u32 = 50;

/// How long leases are left alone after a time in which nobody could look: workers could not renew them either, and will at
/// their next heartbeat.
const RECLAIM_GRACE_MS: u64 = 10_000;

/// An upkeep task: does its work for one lane and says how many jobs it handled.
type Task = for<'a> fn(&'a Queue, LaneNumber, &'a Policy) -> BoxFuture<'a, Result<u32, QueueError>>;

/// Every upkeep task.
const TASKS: &[(&str, Task)] = &[
    ("expire", |queue, lane, _| Box::pin(queue.expire(lane))),
    ("reclaim", |queue, lane, policy| Box::pin(queue.reclaim(lane, policy, RECLAIM_GRACE_MS))),
    ("age", |queue, lane, _| Box::pin(queue.age(lane))),
    ("promote", |queue, lane, _| Box::pin(queue.promote(lane))),
];

/// Looks after all lanes until `stop`, each by itself: of a cluster, the node of one may be away and those of others not.
/// While the registry does not answer, the scheduler is not ready.
pub(crate) async fn run(queue: Queue, policy: Policy, readiness: Readiness, stop: CancellationToken) {
    let settings = watch::Sender::new(Settings::default());
    let mut known = BTreeSet::new();
    let mut lanes = JoinSet::new();
    let mut tick = ticks();
    let mut failing = false;
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        let Some(read) = stop.run_until_cancelled(read_registry(&queue)).await else { break };
        match read {
            Ok((now_set, listed)) => {
                settings.send_if_modified(|settings| {
                    *settings != now_set && {
                        *settings = now_set;
                        true
                    }
                });
                for lane in listed.into_iter().filter(|lane| known.insert(*lane)) {
                    let upkeep = Upkeep::new(queue.clone(), policy, lane, settings.subscribe());
                    lanes.spawn(stop.clone().run_until_cancelled_owned(upkeep.run()));
                }
                if failing {
                    tracing::info!("the registry answers again");
                    readiness.ready();
                }
                failing = false;
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(error = error.in_full(), "cannot read the registry; trying again");
                    readiness.not_ready(error.in_full());
                }
                failing = true;
            }
        }
    }
    lanes.join_all().await;
}

/// What is set, and all lanes.
async fn read_registry(queue: &Queue) -> Result<(Settings, Vec<LaneNumber>), QueueError> {
    let (settings, lanes) = try_join(queue.settings(), queue.all_lanes()).await?;
    Ok((settings, lanes.into_iter().map(|(lane, _)| lane).collect()))
}

fn ticks() -> Interval {
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}

/// The upkeep of one lane.
struct Upkeep {
    queue: Queue,
    policy: Policy,
    lane: LaneNumber,
    settings: watch::Receiver<Settings>,
    /// What is known to be applied to the lane. Whoever changes a setting applies it; should that fail half way, it is
    /// made good here.
    applied: Option<Settings>,
}

impl Upkeep {
    const fn new(queue: Queue, policy: Policy, lane: LaneNumber, settings: watch::Receiver<Settings>) -> Self {
        Self { queue, policy, lane, settings, applied: None }
    }

    /// Never ends.
    async fn run(mut self) {
        let lane = self.lane.0;
        let mut tick = ticks();
        let mut failing = false;
        loop {
            tick.tick().await;
            let worked = self.look_after().await;
            match &worked {
                Ok(()) if failing => tracing::info!(lane, "upkeep works again"),
                Err(error) if !failing => tracing::warn!(error = error.in_full(), lane, "no upkeep; trying again"),
                Ok(()) | Err(_) => {}
            }
            failing = worked.is_err();
        }
    }

    async fn look_after(&mut self) -> Result<(), QueueError> {
        let is_new = |settings: &&Settings| self.applied.as_ref() != Some(*settings);
        let new = Some(&*self.settings.borrow()).filter(is_new).cloned();
        if let Some(settings) = new {
            self.queue.apply(self.lane, &settings).await?;
            self.applied = Some(settings);
        }
        for (name, task) in TASKS {
            for _ in 0..REPEATS_MAX {
                let handled = match task(&self.queue, self.lane, &self.policy).await {
                    Err(error) if error.is_passing() => return Err(error),
                    // One damaged job must not keep the lane from the other tasks.
                    Err(error) => {
                        tracing::error!(error = error.in_full(), lane = self.lane.0, task = name, "upkeep failed");
                        break;
                    }
                    Ok(0) => break,
                    Ok(handled) => handled,
                };
                tracing::debug!(lane = self.lane.0, task = name, jobs = handled, "upkeep");
            }
        }
        Ok(())
    }
}
