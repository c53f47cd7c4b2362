//! A deep backlog: what it costs, whether it slows claims down, and whether a small tenant waits behind it.

use crate::bench::Bench;
use crate::figures::{Figures, Fsync, Goal, rate};
use crate::noop::{MODEL, Manner, Worker};
use anyhow::Context as _;
use genmill_client::Request;
use std::time::{Duration, Instant, SystemTime};
use tokio::task::JoinSet;

/// Jobs of which the rate of claim to finish is taken.
const SAMPLE: u64 = 50_000;

/// How often it is taken: once is too noisy to be compared.
const STRETCHES: u64 = 3;

/// Jobs of the small tenant.
const SMALL: usize = 10;

pub(crate) async fn measure(figures: &mut Figures, deep: u64) -> anyhow::Result<()> {
    let bench = Bench::start(Fsync::None).await?;
    let empty = bench.spent().await?;
    let mut shallow = Vec::new();
    for stretch in 0..STRETCHES {
        bench.submit("large", &format!("shallow-{stretch}"), SAMPLE).await?;
        shallow.push(drain(&bench, 0).await?);
    }
    let before = bench.spent().await?;
    let took = bench.submit("large", "deep", deep).await?;
    let after = bench.spent().await?;
    // In the first stretch Redis is still busy with what the load left behind: its table of keys doubles as they grow.
    let first = drain(&bench, deep - SAMPLE).await?;
    let mut loaded = Vec::new();
    for stretch in 1..=STRETCHES {
        loaded.push(drain(&bench, deep - SAMPLE * (stretch + 1)).await?);
    }
    let (shallow, loaded) = (median(shallow), median(loaded));
    let small = small_tenant(&bench).await?;
    figures.heading(&format!("{deep} queued jobs of one tenant, fsync: {}", Fsync::None.name()))?;
    figures.add("bulk submit", rate(deep, took), "jobs/s", Goal::Nothing)?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let bytes = (after.bytes - before.bytes) / deep as f64;
    figures.add("memory, queued", bytes, "bytes/job", Goal::AtMost(1_200.0))?;
    figures.add("memory, all", (after.bytes - empty.bytes) / 1e6, "MB", Goal::Nothing)?;
    figures.add("claim to finish, 50,000 queued", shallow, "jobs/s", Goal::Nothing)?;
    figures.add("claim to finish, right after the load", first, "jobs/s", Goal::Nothing)?;
    figures.add("claim to finish, all queued", loaded, "jobs/s", Goal::AtLeast((shallow * 0.9).round()))?;
    figures.add("small tenant, all 10 started after", small.as_secs_f64() * 1e3, "ms", Goal::AtMost(1_000.0))
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs a worker until `open` jobs are left, and tells its rate over `SAMPLE` jobs.
async fn drain(bench: &Bench, open: u64) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let worker = Worker::start(&bench.queue, Manner::AtOnce).await?;
    bench.until_open(open).await?;
    let took = begun.elapsed();
    worker.stop().await?;
    Ok(rate(SAMPLE, took))
}

/// How long the jobs of a tenant that comes last wait until all have started, while the worker is busy with the rest.
async fn small_tenant(bench: &Bench) -> anyhow::Result<Duration> {
    let worker = Worker::start(&bench.queue, Manner::AtOnce).await?;
    // Until it is at full speed.
    let open = bench.queue.open_jobs(&[bench.lane], None).await?;
    bench.until_open(open.saturating_sub(5_000)).await?;
    let mut generating = JoinSet::new();
    for _ in 0..SMALL {
        let client = bench.client.clone();
        let request = Request::new(MODEL).prompt("x".repeat(300)).max_tokens(4).tenant("small");
        generating.spawn(async move { client.generate(request).await });
    }
    let mut waits = Vec::new();
    while let Some(generated) = generating.join_next().await {
        let job = generated??.job;
        let (created, started) = (job.created_at.context("every job has")?, job.started_at.context("it has run")?);
        // Both by the clock of Redis.
        waits.push(SystemTime::try_from(started)?.duration_since(SystemTime::try_from(created)?)?);
    }
    worker.stop().await?;
    waits.into_iter().max().context("there were some")
}
