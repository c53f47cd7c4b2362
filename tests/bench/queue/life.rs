//! Whole lives: bulk submission, then claim to finish, one after the other.

use crate::bench::Bench;
use crate::figures::{Figures, Fsync, Goal, rate};
use crate::noop::{Manner, Worker};
use std::time::Instant;

/// Returns the rate of whole lives, for comparison.
pub(crate) async fn measure(figures: &mut Figures, fsync: Fsync, jobs: u64) -> anyhow::Result<f64> {
    let bench = Bench::start(fsync).await?;
    let empty = bench.spent().await?;
    let submitted = bench.submit("default", "life", jobs).await?;
    let queued = bench.spent().await?;
    let begun = Instant::now();
    let worker = Worker::start(&bench.queue, Manner::AtOnce).await?;
    bench.until_open(0).await?;
    let drained = begun.elapsed();
    worker.stop().await?;
    let done = bench.spent().await?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let per_job = |after: f64, before: f64| (after - before) / jobs as f64;
    let (life, life_us) = match fsync {
        Fsync::None => (Goal::AtLeast(10_000.0), Goal::AtMost(45.0)),
        Fsync::EverySecond => (Goal::AtLeast(7_000.0), Goal::Nothing),
    };
    figures.heading(&format!("{jobs} jobs through gRPC, fsync: {}", fsync.name()))?;
    figures.add("bulk submit", rate(jobs, submitted), "jobs/s", Goal::AtLeast(25_000.0))?;
    figures.add("claim to finish", rate(jobs, drained), "jobs/s", Goal::Nothing)?;
    let lives = rate(jobs, submitted + drained);
    figures.add("whole life", lives, "jobs/s", life)?;
    figures.add("redis time, submit", per_job(queued.cpu_us, empty.cpu_us), "us/job", Goal::Nothing)?;
    figures.add("redis time, whole life", per_job(done.cpu_us, empty.cpu_us), "us/job", life_us)?;
    figures.add("redis commands", per_job(done.commands, empty.commands), "/job", Goal::Nothing)?;
    figures.add("memory, queued", per_job(queued.bytes, empty.bytes), "bytes/job", Goal::AtMost(1_200.0))?;
    figures.add("memory, finished", per_job(done.bytes, empty.bytes), "bytes/job", Goal::Nothing)?;
    Ok(lives)
}
