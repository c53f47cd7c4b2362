//! Redis and a scheduler of this run's own, and what Redis has spent.

use crate::figures::Fsync;
use crate::noop::{CAPACITY, MODEL, served};
use anyhow::{Context as _, ensure};
use genmill_client::{Client, Request, v1};
use genmill_core::ids::{LaneNumber, WorkerId};
use genmill_core::registration::Registration;
use genmill_core::time::UnixMs;
use genmill_queue::Queue;
use genmill_tests::daemons::{Daemon, Start};
use genmill_tests::redis_server::RedisServer;
use std::time::{Duration, Instant};
use tokio_stream::StreamExt as _;

/// Redis and a scheduler, without a worker.
pub(crate) struct Bench {
    redis: RedisServer,
    _scheduler: Daemon,
    pub(crate) client: Client,
    pub(crate) queue: Queue,
    pub(crate) lane: LaneNumber,
}

/// What Redis has spent.
#[derive(Clone, Copy)]
pub(crate) struct Spent {
    /// Time of its process.
    pub(crate) cpu_us: f64,
    /// Commands, those within scripts included.
    pub(crate) commands: f64,
    /// Memory.
    pub(crate) bytes: f64,
}

/// What a Redis has spent so far.
pub(crate) async fn spent(url: &str) -> anyhow::Result<Spent> {
    let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
    let info: redis::InfoDict = redis::cmd("INFO").query_async(&mut connection).await?;
    let number = |name: &str| info.get::<f64>(name).with_context(|| format!("INFO has no {name}"));
    Ok(Spent {
        cpu_us: (number("used_cpu_user")? + number("used_cpu_sys")?) * 1e6,
        commands: number("total_commands_processed")?,
        bytes: number("used_memory")?,
    })
}

impl Bench {
    pub(crate) async fn start(fsync: Fsync) -> anyhow::Result<Self> {
        let redis = RedisServer::start_with(fsync.settings())?;
        let scheduler = Start::new("genmill-scheduler", &std::env::temp_dir())?
            .env("GENMILL__REDIS__URL", &redis.url())
            .env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0")
            .env("GENMILL__TELEMETRY__LOG", "error")
            .until_ready()?;
        let client = Client::connect(&format!("http://{}", scheduler.place("grpc"))).await?;
        let options = genmill_queue::Options { url: redis.url(), namespace: "genmill".to_owned() };
        let queue = Queue::connect(&options).await?;
        let lane = queue.open_lane(&served()?.name.lane()).await?;
        // Somebody serves the model, so that jobs are admitted before the worker starts.
        let registration = Registration {
            worker: WorkerId::new("bench", "host", 0),
            started_at: UnixMs(0),
            capacity: CAPACITY,
            prefixes: vec!["vllm".to_owned()],
            models: vec![served()?],
        };
        queue.register(&registration, 3_600_000).await?;
        Ok(Self { redis, _scheduler: scheduler, client, queue, lane })
    }

    pub(crate) async fn spent(&self) -> anyhow::Result<Spent> {
        spent(&self.redis.url()).await
    }

    /// Submits jobs with prompts of 300 bytes, a request id and an experiment each.
    pub(crate) async fn submit(&self, tenant: &str, experiment: &str, jobs: u64) -> anyhow::Result<Duration> {
        let (prompt, tenant, experiment) = ("x".repeat(300), tenant.to_owned(), experiment.to_owned());
        let requests = (0..jobs).map(move |n| {
            let request = Request::new(MODEL).prompt(&prompt).max_tokens(4).tenant(&tenant).experiment(&experiment);
            v1::GenerationRequest::from(request.request_id(format!("{experiment}-{n}")))
        });
        let begun = Instant::now();
        let mut answers = Box::pin(self.client.submit_all(tokio_stream::iter(requests)));
        let mut acknowledged = 0;
        while let Some(answer) = answers.next().await {
            answer?;
            acknowledged += 1;
        }
        ensure!(acknowledged == jobs, "{acknowledged} of {jobs} acknowledged");
        Ok(begun.elapsed())
    }

    /// Waits until at most `open` jobs are unfinished.
    pub(crate) async fn until_open(&self, open: u64) -> anyhow::Result<()> {
        while self.queue.open_jobs(&[self.lane], None).await? > open {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}
