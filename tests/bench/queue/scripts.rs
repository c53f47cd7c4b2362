//! The scripts' own limit: the same lives without gRPC, scheduler and worker, in batches of 100.

use crate::bench::spent;
use crate::figures::{Figures, Fsync, Goal, rate};
use crate::noop::{generation, served};
use genmill_core::ids::{JobId, WorkerId};
use genmill_core::judge::Verdict;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::names::Experiment;
use genmill_core::request::Input;
use genmill_core::time::UnixMs;
use genmill_queue::{Ended, Finish, NewJob, Options, Queue, Reservation, Room};
use genmill_tests::redis_server::RedisServer;
use genmill_tests::specs::plain;
use std::time::Instant;

/// Jobs of one call.
const BATCH: u64 = 100;

/// Measures them, and tells what share of their rate of whole lives `ours` is.
pub(crate) async fn measure(figures: &mut Figures, fsync: Fsync, jobs: u64, ours: f64) -> anyhow::Result<()> {
    let redis = RedisServer::start_with(fsync.settings())?;
    let queue = Queue::connect(&Options { url: redis.url(), namespace: "genmill".to_owned() }).await?;
    let before = spent(&redis.url()).await?;
    let begun = Instant::now();
    // Two at a time, so that Redis need not wait for us.
    let halves = tokio::join!(live(&queue, 0, jobs / 2), live(&queue, 1, jobs / 2));
    halves.0?;
    halves.1?;
    let took = begun.elapsed();
    let after = spent(&redis.url()).await?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let life_us = (after.cpu_us - before.cpu_us) / jobs as f64;
    figures.heading(&format!("the scripts alone, {jobs} jobs in batches of {BATCH}, fsync: {}", fsync.name()))?;
    figures.add("whole life", rate(jobs, took), "jobs/s", Goal::Nothing)?;
    figures.add("redis time, whole life", life_us, "us/job", Goal::Nothing)?;
    figures.add("whole life, of what the scripts alone give", ours / rate(jobs, took), "of it", Goal::AtLeast(0.5))
}

/// Lets jobs live from request id to result.
async fn live(queue: &Queue, which: u64, jobs: u64) -> anyhow::Result<()> {
    let model = served()?.name;
    let lane = queue.open_lane(&model.lane()).await?;
    let worker = WorkerId::new("scripts", "host", which);
    let mut spec = plain(model.clone());
    spec.input = Input::Prompt("x".repeat(300));
    spec.experiment = Some(Experiment::parse("scripts")?);
    for batch in 0..jobs / BATCH {
        let new: Vec<NewJob> = (0..BATCH)
            .map(|n| {
                let number = (which << 40) + batch * BATCH + n;
                let mut spec = spec.clone();
                spec.request_id = Some(format!("scripts-{number}"));
                NewJob { id: JobId::new(UnixMs(1), lane, number), spec }
            })
            .collect();
        let reservations: Vec<Reservation<'_>> = new
            .iter()
            .map(|job| Reservation {
                tenant: &job.spec.tenant,
                request_id: job.spec.request_id.as_deref().unwrap_or_default(),
                id: job.id,
                content: &[0; 16],
            })
            .collect();
        queue.reserve_request_ids(&reservations).await?;
        queue.enqueue(&model.lane(), &new).await?;
        let room = Room { free: u32::try_from(BATCH)?, tokens: None, keys: &[] };
        let leases = queue.claim(lane, &worker, room, 15_000).await?;
        let finish = Finish {
            verdict: Verdict::Succeed(generation()),
            cost: Some(Cost::exact(Picodollars(1))),
            observation: None,
        };
        let ended: Vec<Ended<'_>> = leases
            .iter()
            .map(|lease| Ended { held: lease.held(), started_at: lease.started_at, finish: &finish })
            .collect();
        queue.finish(lane, &worker, &ended).await?;
    }
    Ok(())
}
