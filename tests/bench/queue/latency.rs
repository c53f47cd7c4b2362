//! How long a job waits for an idle worker, and how long a running one goes on after it was cancelled.

use crate::bench::Bench;
use crate::figures::{Figures, Fsync, Goal, percentile};
use crate::noop::{MODEL, Manner, Worker};
use anyhow::Context as _;
use genmill_client::Request;
use genmill_core::ids::JobId;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

/// Jobs that come each second, and for how many seconds.
const PACE: u64 = 500;
const SECONDS: u64 = 10;

/// Running jobs that are cancelled.
const CANCELLED: usize = 400;

/// A worker's heartbeat and what may be added, in milliseconds.
const CANCEL_MS_MAX: f64 = 3_250.0;

pub(crate) async fn measure(figures: &mut Figures) -> anyhow::Result<()> {
    figures.heading("latency, fsync: everysec")?;
    pickup(figures).await?;
    cancel(figures).await
}

/// From the call that submits a job to its start at an idle worker.
async fn pickup(figures: &mut Figures) -> anyhow::Result<()> {
    let bench = Bench::start(Fsync::EverySecond).await?;
    let (tell, mut started) = unbounded_channel();
    let worker = Worker::start(&bench.queue, Manner::Telling(tell)).await?;
    let mut pace = interval(Duration::from_micros(1_000_000 / PACE));
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut submitting = JoinSet::new();
    for _ in 0..PACE * SECONDS {
        pace.tick().await;
        let client = bench.client.clone();
        submitting.spawn(async move {
            let called = Instant::now();
            let request = Request::new(MODEL).prompt("x".repeat(300)).max_tokens(4);
            client.submit(request).await.map(|submitted| (submitted.job.id, called))
        });
    }
    let mut called = HashMap::new();
    while let Some(submitted) = submitting.join_next().await {
        let (id, at) = submitted??;
        called.insert(JobId::parse(&id)?, at);
    }
    bench.until_open(0).await?;
    worker.stop().await?;
    let mut waits = Vec::new();
    while let Some((id, at)) = started.recv().await {
        let called = called.get(&id).context("only these jobs were submitted")?;
        waits.push(at.duration_since(*called).as_secs_f64() * 1e3);
    }
    let jobs = waits.len();
    figures.add(&format!("pickup p50, {jobs} jobs, {PACE}/s"), percentile(&mut waits, 50), "ms", Goal::Nothing)?;
    figures.add("pickup p99", percentile(&mut waits, 99), "ms", Goal::AtMost(10.0))
}

/// From the call that cancels a running job to its worker's being told.
async fn cancel(figures: &mut Figures) -> anyhow::Result<()> {
    let bench = Bench::start(Fsync::EverySecond).await?;
    let (tell, mut told) = unbounded_channel();
    let worker = Worker::start(&bench.queue, Manner::UntilStopped(tell)).await?;
    bench.submit("default", "cancel", u64::try_from(CANCELLED)?).await?;
    let mut running = Vec::new();
    while running.len() < CANCELLED {
        running.push(told.recv().await.context("the worker runs")?.0);
    }
    let mut called = HashMap::new();
    for id in running {
        called.insert(id, Instant::now());
        bench.client.cancel(&id.to_string()).await?;
    }
    let mut waits = Vec::new();
    while waits.len() < CANCELLED {
        let (id, at) = told.recv().await.context("the worker runs")?;
        let called = called.get(&id).context("only these jobs were cancelled")?;
        waits.push(at.saturating_duration_since(*called).as_secs_f64() * 1e3);
    }
    worker.stop().await?;
    figures.add("cancel of a running job, p50", percentile(&mut waits, 50), "ms", Goal::Nothing)?;
    figures.add("cancel of a running job, p99", percentile(&mut waits, 99), "ms", Goal::AtMost(CANCEL_MS_MAX))
}
