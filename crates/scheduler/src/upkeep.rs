//! What keeps every lane going: each task takes no input, may run twice, and may run in any scheduler.

use futures_util::future::BoxFuture;
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

/// How long leases are left alone after Redis was away: workers could not renew them meanwhile, and will at their next
/// heartbeat.
const RECLAIM_GRACE: Duration = Duration::from_secs(10);

/// An upkeep task: does its work for one lane and says how many jobs it handled.
type Task = for<'a> fn(&'a Queue, LaneNumber, &'a Policy) -> BoxFuture<'a, Result<u32, QueueError>>;

/// Every upkeep task, and whether it judges workers by their leases.
const TASKS: &[(&str, Judges, Task)] = &[
    ("expire", Judges::Jobs, |queue, lane, _| Box::pin(queue.expire(lane))),
    ("reclaim", Judges::Workers, |queue, lane, policy| Box::pin(queue.reclaim(lane, policy))),
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

/// Looks after all lanes until `stop`; while Redis does not answer, the scheduler is not ready.
pub(crate) async fn run(queue: Queue, policy: Policy, readiness: Readiness, stop: CancellationToken) {
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    let mut applied = Applied::new();
    let mut leases_wait_until = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let leases_count = !failing && Instant::now() >= leases_wait_until;
        match round(&queue, &policy, &mut applied, |judges| leases_count || judges == Judges::Jobs).await {
            Ok(()) => {
                if failing {
                    leases_wait_until = Instant::now() + RECLAIM_GRACE;
                    tracing::info!("upkeep works again");
                    readiness.ready();
                }
                failing = false;
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "upkeep cannot work; trying again");
                    readiness.not_ready(error.to_string());
                }
                failing = true;
            }
        }
    }
}

/// What this scheduler has seen applied to each lane. Whoever changes a setting applies it; should that fail half way,
/// it is made good here.
type Applied = HashMap<LaneNumber, Settings>;

async fn round(
    queue: &Queue,
    policy: &Policy,
    applied: &mut Applied,
    wanted: impl Fn(Judges) -> bool,
) -> Result<(), QueueError> {
    let settings = queue.settings().await?;
    for (lane, _) in queue.all_lanes().await? {
        if applied.get(&lane) != Some(&settings) {
            queue.apply(lane, &settings).await?;
            applied.insert(lane, settings.clone());
        }
        for (name, _, task) in TASKS.iter().filter(|(_, judges, _)| wanted(*judges)) {
            for _ in 0..REPEATS_MAX {
                let handled = match task(queue, lane, policy).await {
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
    }
    Ok(())
}
