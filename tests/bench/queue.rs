//! The queue's speed, through gRPC with a worker that does nothing: what everything but the models costs.
//!
//! Run by `cargo xtask bench queue`. Prints a table; every figure is of this run on this machine.

use anyhow::{Context as _, ensure};
use genmill_client::{Client, Request, v1};
use genmill_core::attempt::{FinishReason, Generation, Outcome, Performed, Usage};
use genmill_core::ids::WorkerId;
use genmill_core::judge::Policy;
use genmill_core::model::ModelName;
use genmill_core::money::Picodollars;
use genmill_core::registration::{Availability, Registration, ServedModel};
use genmill_core::time::UnixMs;
use genmill_queue::Queue;
use genmill_tests::daemons::{Daemon, Start};
use genmill_tests::redis_server::RedisServer;
use genmill_worker::perform::{Offer, Perform, Progress, Task};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

const MODEL: &str = "vllm_noop";

/// Jobs that run at once.
const CAPACITY: u32 = 500;

/// A worker that answers at once.
struct Noop;

impl Noop {
    fn served() -> anyhow::Result<ServedModel> {
        Ok(ServedModel {
            name: ModelName::parse(MODEL)?,
            availability: Availability::Ready,
            description: String::new(),
            context_tokens: None,
        })
    }
}

impl Perform for Noop {
    fn offers(&self) -> Vec<Offer> {
        let lane = Self::served().map(|served| served.name.lane());
        lane.map(|lane| Offer { lane, capacity: CAPACITY, tokens: None }).into_iter().collect()
    }

    fn models(&self) -> Vec<ServedModel> {
        Self::served().into_iter().collect()
    }

    async fn perform(&self, _: Task, _: Progress, _: CancellationToken) -> Performed {
        let usage = Usage { prompt_tokens: 75, cached_prompt_tokens: 0, completion_tokens: 4 };
        let generation = Generation {
            text: "a move".to_owned(),
            finish_reason: FinishReason::Stop,
            usage: Some(usage),
            first_token_ms: Some(0),
        };
        std::future::ready(Performed { outcome: Outcome::Generated(generation), cost: Some(Picodollars(1)) }).await
    }
}

/// Redis and a scheduler, with the worker not yet started.
struct Bench {
    redis: RedisServer,
    _scheduler: Daemon,
    client: Client,
    queue: Queue,
    jobs: u64,
}

/// What Redis has spent.
#[derive(Clone, Copy)]
struct Spent {
    cpu_us: f64,
    commands: f64,
    bytes: f64,
}

impl Bench {
    async fn start(appendonly: &str, jobs: u64) -> anyhow::Result<Self> {
        let redis = RedisServer::start_with(&["--appendonly", appendonly, "--appendfsync", "everysec"])?;
        let folder = std::env::temp_dir();
        let scheduler = Start::new("genmill-scheduler", &folder)?
            .env("GENMILL__REDIS__URL", &redis.url())
            .env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0")
            .env("GENMILL__TELEMETRY__LOG", "warn")
            .until_ready()?;
        let client = Client::connect(&format!("http://{}", scheduler.place("grpc"))).await?;
        let options = genmill_queue::Options { url: redis.url(), namespace: "genmill".to_owned() };
        let queue = Queue::connect(&options).await?;
        Ok(Self { redis, _scheduler: scheduler, client, queue, jobs })
    }

    /// Says that somebody serves the model, so that jobs are admitted before the worker starts.
    async fn register(&self) -> anyhow::Result<()> {
        let registration = Registration {
            worker: WorkerId::new("bench", "host", 0),
            started_at: UnixMs(0),
            capacity: CAPACITY,
            prefixes: vec!["vllm".to_owned()],
            models: vec![Noop::served()?],
        };
        Ok(self.queue.register(&registration, 3_600_000).await?)
    }

    async fn submit(&self, experiment: &str) -> anyhow::Result<Duration> {
        let prompt = "x".repeat(300);
        let requests: Vec<v1::GenerationRequest> = (0..self.jobs)
            .map(|n| {
                let request = Request::new(MODEL).prompt(&prompt).max_tokens(4).experiment(experiment);
                request.request_id(format!("{experiment}-{n}")).into()
            })
            .collect();
        let begun = Instant::now();
        let mut answers = Box::pin(self.client.submit_all(tokio_stream::iter(requests)));
        let mut acknowledged = 0;
        while let Some(answer) = answers.next().await {
            answer?;
            acknowledged += 1;
        }
        ensure!(acknowledged == self.jobs, "{acknowledged} of {} acknowledged", self.jobs);
        Ok(begun.elapsed())
    }

    /// Runs the worker until no job is unfinished.
    async fn drain(&self) -> anyhow::Result<Duration> {
        let options = genmill_worker::Options {
            worker: WorkerId::new("noop", "host", 1),
            started_at: UnixMs(0),
            prefixes: vec!["vllm".to_owned()],
            lease_ms: 15_000,
            heartbeat_ms: 3_000,
            drain_timeout_ms: 1_000,
            policy: Policy::default(),
        };
        let stop = CancellationToken::new();
        let begun = Instant::now();
        let mut worker = JoinSet::new();
        worker.spawn(genmill_worker::run(self.queue.clone(), Arc::new(Noop), options, stop.clone(), || ()));
        let lane = self.queue.open_lane(&Noop::served()?.name.lane()).await?;
        while self.queue.open_jobs(&[lane], None).await? > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let took = begun.elapsed();
        stop.cancel();
        worker.join_next().await.context("the worker was started")???;
        Ok(took)
    }

    async fn spent(&self) -> anyhow::Result<Spent> {
        let client = redis::Client::open(self.redis.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let info: redis::InfoDict = redis::cmd("INFO").query_async(&mut connection).await?;
        let number = |name: &str| info.get::<f64>(name).with_context(|| format!("INFO has no {name}"));
        Ok(Spent {
            cpu_us: (number("used_cpu_user")? + number("used_cpu_sys")?) * 1e6,
            commands: number("total_commands_processed")?,
            bytes: number("used_memory")?,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn rate(jobs: u64, took: Duration) -> f64 {
    jobs as f64 / took.as_secs_f64()
}

async fn measure(out: &mut impl std::io::Write, appendonly: &str, jobs: u64) -> anyhow::Result<()> {
    let bench = Bench::start(appendonly, jobs).await?;
    bench.register().await?;
    let empty = bench.spent().await?;
    let submitted = bench.submit("submit").await?;
    let queued = bench.spent().await?;
    let drained = bench.drain().await?;
    let done = bench.spent().await?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let per_job = |after: f64, before: f64| (after - before) / jobs as f64;
    let fsync = if appendonly == "yes" { "everysec" } else { "no append-only file" };
    writeln!(out, "{jobs} jobs, fsync: {fsync}")?;
    writeln!(out, "  bulk submit          {:>9.0} jobs/s", rate(jobs, submitted))?;
    writeln!(out, "  claim to finish      {:>9.0} jobs/s", rate(jobs, drained))?;
    writeln!(out, "  whole life           {:>9.0} jobs/s", rate(jobs, submitted + drained))?;
    writeln!(out, "  redis, submit        {:>9.1} us/job", per_job(queued.cpu_us, empty.cpu_us))?;
    writeln!(out, "  redis, whole life    {:>9.1} us/job", per_job(done.cpu_us, empty.cpu_us))?;
    writeln!(out, "  redis commands       {:>9.1} /job", per_job(done.commands, empty.commands))?;
    writeln!(out, "  memory, queued       {:>9.0} bytes/job", per_job(queued.bytes, empty.bytes))?;
    writeln!(out, "  memory, finished     {:>9.0} bytes/job", per_job(done.bytes, empty.bytes))?;
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for appendonly in ["no", "yes"] {
        measure(&mut out, appendonly, 50_000).await?;
    }
    Ok(())
}
