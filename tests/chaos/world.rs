//! The mill under test: Redis, two schedulers, three API workers and a provider, each connection through a proxy. Lets
//! the faults of a schedule befall it, and heals it. Never here: which faults (see `schedule`), nor who uses the mill (see
//! `load`).

use super::history::{Clock, Event, History};
use super::member::{Kept, Member};
use super::proxy::{Handle, Proxy};
use super::schedule::{Fault, Link, Planned, Process, SCHEDULERS, Target, WORKERS};
use crate::daemons::{Daemon, Start};
use crate::redis_server::RedisServer;
use anyhow::{Context as _, ensure};
use futures_util::future::{join_all, try_join_all};
use genmill_client::Client;
use genmill_core::money::{Picodollars, Rates};
use genmill_standin::bill::Call;
use genmill_standin::{Options, Standin};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

/// How many calls a worker has in flight at once, to each provider.
pub const CALLS_MAX: usize = 8;

/// How long a lease lasts without a heartbeat, in milliseconds. Short, so that a minute sees many run out.
pub const LEASE_MS: u64 = 2_500;

/// Time between heartbeats, in milliseconds.
const HEARTBEAT_MS: u64 = 500;

/// How many failed attempts of a job are followed by another one. More than in production: here failures are the rule.
pub const RETRIES_MAX: u32 = 6;

/// How often a job may lose its worker before it is poison: the product's own bound.
pub const LOSSES_MAX: u32 = 3;

/// How long a drain may take: the time the worker is given, what it adds when Redis is away, and room for a busy machine.
const DRAIN_WITHIN: Duration = Duration::from_secs(60);

/// How long a client waits for a server that is away: longer than any fault, and than a run's end waits.
const PATIENCE: Duration = Duration::from_secs(600);

/// A model with the prices that the API worker's table has for it. The models are of two providers, so of two lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// As requests name it.
    pub name: &'static str,
    /// As its provider knows it.
    pub backend_name: &'static str,
    /// What a token costs.
    pub rates: Rates,
}

const fn rates(input: u128, output: u128) -> Rates {
    let (input, output) = (Picodollars(input), Picodollars(output));
    Rates { input, output, cached_input: None, cache_write: None, reasoning: None }
}

/// A tenant whose jobs may not all run, and how many may at once in each lane.
pub const TENANT_CAP: (&str, usize) = ("bulk", 3);

/// A model whose lane may not use all workers, and how many jobs may run there at once.
pub const LANE_CAP: (&str, usize) = (MODELS[1].name, 10);

/// The models that are asked for.
pub const MODELS: [Model; 2] = [
    Model { name: "litellm_gpt-4o-mini", backend_name: "gpt-4o-mini", rates: rates(150_000, 600_000) },
    Model {
        name: "litellm_groq/openai/gpt-oss-20b",
        backend_name: "openai/gpt-oss-20b",
        rates: rates(75_000, 300_000),
    },
];

/// Redis with its data on disk. `appendfsync always`: a process that is killed does not lose what it has written to its
/// file, synced or not; but under `everysec` Redis puts a write off for up to two seconds while the disk is busy with a
/// sync, answers all the same, and loses that write when it is killed. The promise "acknowledged is never lost" holds as
/// far as Redis holds its own.
struct KeptRedis(RedisServer);

impl Kept for KeptRedis {
    fn name(&self) -> String {
        "redis".to_owned()
    }

    fn start(&mut self) -> anyhow::Result<()> {
        if self.0.has_ended()? { self.0.restart() } else { Ok(()) }
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.0.signal(signal)
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        self.0.kill()
    }

    fn drain(&mut self) -> anyhow::Result<()> {
        self.0.signal(Signal::TERM)?;
        self.0.wait(DRAIN_WITHIN)
    }

    fn has_ended(&mut self) -> anyhow::Result<bool> {
        self.0.has_ended()
    }
}

/// Where daemons find configuration, and where their logs go.
#[derive(Clone)]
struct Place {
    folder: PathBuf,
    history: History,
}

impl Place {
    fn start(&self, binary: &str, log: &Path, redis: SocketAddr) -> anyhow::Result<Start> {
        let start = Start::new(binary, &self.folder)?
            .logs_to(File::create(log)?)
            .env("GENMILL__REDIS__URL", &format!("redis://{redis}"))
            .env("GENMILL__TELEMETRY__FORMAT", "json")
            .env("GENMILL__WORKER__LEASE_MS", &LEASE_MS.to_string())
            .env("GENMILL__WORKER__HEARTBEAT_MS", &HEARTBEAT_MS.to_string())
            .env("GENMILL__WORKER__RETRIES_MAX", &RETRIES_MAX.to_string())
            .env("GENMILL__WORKER__RETRY_DELAY_MS", "50")
            .env("GENMILL__WORKER__DRAIN_TIMEOUT_MS", "500");
        Ok(start)
    }

    /// A log file for the next process of a name.
    fn log(&self, name: &str, generation: u32) -> PathBuf {
        self.folder.join(format!("{name}-{generation}.log"))
    }
}

struct KeptScheduler {
    place: Place,
    number: usize,
    generation: u32,
    redis: SocketAddr,
    /// The proxy through which clients find it.
    clients: Handle,
    daemon: Option<Daemon>,
}

impl Kept for KeptScheduler {
    fn name(&self) -> String {
        format!("scheduler-{}", self.number)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.generation += 1;
        let log = self.place.log(&self.name(), self.generation);
        let start = self.place.start("genmill-scheduler", &log, self.redis)?;
        let daemon = start.env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0").until_ready()?;
        self.clients.lead_to(Some(daemon.place("grpc").parse()?));
        self.daemon = Some(daemon);
        Ok(())
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.daemon.as_ref().context("it does not run")?.signal(signal)
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        self.clients.lead_to(None);
        // Dropping a daemon kills it.
        self.daemon = None;
        Ok(())
    }

    fn drain(&mut self) -> anyhow::Result<()> {
        self.clients.lead_to(None);
        drain(self.daemon.take())
    }

    fn has_ended(&mut self) -> anyhow::Result<bool> {
        self.daemon.as_mut().map_or(Ok(true), Daemon::has_ended)
    }
}

struct KeptWorker {
    place: Place,
    number: usize,
    generation: u32,
    redis: SocketAddr,
    provider: SocketAddr,
    daemon: Option<Daemon>,
}

impl KeptWorker {
    /// The key with which this process calls its providers.
    fn key(&self) -> String {
        format!("sk-{}-{}", self.name(), self.generation)
    }

    fn went_down(&self, killed: bool) {
        self.place.history.note(Event::WorkerDown { key: self.key(), killed });
    }
}

impl Kept for KeptWorker {
    fn name(&self) -> String {
        format!("worker-{}", self.number)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.generation += 1;
        let log = self.place.log(&self.name(), self.generation);
        let base_url = format!("http://{}/v1", self.provider);
        let daemon = self
            .place
            .start("genmill-worker-api", &log, self.redis)?
            .env("GENMILL__API__CALLS_MAX", &CALLS_MAX.to_string())
            .env("OPENAI_API_KEY", &self.key())
            .env("OPENAI_BASE_URL", &base_url)
            .env("GROQ_API_KEY", &self.key())
            .env("GROQ_BASE_URL", &base_url)
            .until_ready()?;
        let worker = name_in(&log)?;
        self.place.history.note(Event::WorkerUp { slot: self.number, key: self.key(), worker });
        self.daemon = Some(daemon);
        Ok(())
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.daemon.as_ref().context("it does not run")?.signal(signal)
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        if self.daemon.take().is_some() {
            self.went_down(true);
        }
        Ok(())
    }

    fn drain(&mut self) -> anyhow::Result<()> {
        let drained = drain(self.daemon.take());
        self.went_down(false);
        drained
    }

    fn has_ended(&mut self) -> anyhow::Result<bool> {
        self.daemon.as_mut().map_or(Ok(true), Daemon::has_ended)
    }
}

fn drain(daemon: Option<Daemon>) -> anyhow::Result<()> {
    let mut daemon = daemon.context("it does not run")?;
    daemon.signal(Signal::TERM)?;
    let status = daemon.wait(DRAIN_WITHIN)?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}

/// The name under which a worker holds leases, as its log tells.
fn name_in(log: &Path) -> anyhow::Result<String> {
    let log = std::fs::read_to_string(log)?;
    let mut lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let name = lines.find_map(|line| Some(line["fields"]["worker"].as_str()?.to_owned()));
    name.context("a worker's log does not tell its name")
}

/// A running mill.
#[derive(Debug)]
pub struct World {
    history: History,
    members: BTreeMap<Process, Member>,
    links: BTreeMap<Link, Proxy>,
    provider: Standin,
}

impl World {
    /// Starts everything; logs and history go to `folder`.
    ///
    /// # Errors
    /// When something does not start.
    pub async fn start(folder: &Path) -> anyhow::Result<Self> {
        let configs = folder.join("configs");
        std::fs::create_dir_all(&configs)?;
        let listed = MODELS.map(|model| model.name).join(", ");
        std::fs::write(configs.join("litellm_models.yaml"), format!("models: [{listed}]"))?;
        let redis = RedisServer::start_with(&["--appendfsync", "always"])?;
        let clock = clock_of(&redis).await?;
        let history = History::new(clock, &folder.join("history.jsonl"))?;
        let place = Place { folder: folder.to_owned(), history: history.clone() };
        let provider = Standin::start(Options::default()).await?;
        let mut links = BTreeMap::new();
        for number in 0..SCHEDULERS {
            links.insert(Link::ClientScheduler(number), Proxy::start(None).await?);
            links.insert(Link::SchedulerRedis(number), Proxy::start(Some(redis.address())).await?);
        }
        for number in 0..WORKERS {
            links.insert(Link::WorkerRedis(number), Proxy::start(Some(redis.address())).await?);
            links.insert(Link::WorkerProvider(number), Proxy::start(Some(provider.address())).await?);
        }
        let mut world = Self { history, members: BTreeMap::new(), links, provider };
        world.add(Process::Redis, KeptRedis(redis));
        for number in 0..SCHEDULERS {
            let (redis, clients) =
                (world.at(Link::SchedulerRedis(number))?, world.link(Link::ClientScheduler(number))?.handle());
            let place = place.clone();
            let scheduler = KeptScheduler { place, number, generation: 0, redis, clients, daemon: None };
            world.add(Process::Scheduler(number), scheduler);
        }
        for number in 0..WORKERS {
            let (redis, provider) = (world.at(Link::WorkerRedis(number))?, world.at(Link::WorkerProvider(number))?);
            let place = place.clone();
            let worker = KeptWorker { place, number, generation: 0, redis, provider, daemon: None };
            world.add(Process::Worker(number), worker);
        }
        world.until_all_run().await?;
        Ok(world)
    }

    fn add(&mut self, process: Process, kept: impl Kept) {
        self.members.insert(process, Member::new(kept, self.history.clone()));
    }

    fn link(&self, link: Link) -> anyhow::Result<&Proxy> {
        self.links.get(&link).with_context(|| format!("there is no link {link:?}"))
    }

    fn at(&self, link: Link) -> anyhow::Result<SocketAddr> {
        Ok(self.link(link)?.address())
    }

    /// What has happened so far.
    #[must_use]
    pub const fn history(&self) -> &History {
        &self.history
    }

    /// Every call that the provider got.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.provider.calls()
    }

    /// A client of each scheduler.
    ///
    /// # Errors
    /// When a scheduler cannot be reached.
    pub async fn clients(&self) -> anyhow::Result<Vec<Client>> {
        try_join_all((0..SCHEDULERS).map(async |number| {
            let server = format!("http://{}", self.at(Link::ClientScheduler(number))?);
            Ok(Client::connect(&server).await?.with_patience(PATIENCE))
        }))
        .await
    }

    /// Lets every fault befall its target at its time. Returns when so much time has passed, all faults have ended and
    /// everything runs again.
    ///
    /// # Errors
    /// When a process does not come back.
    pub async fn suffer(&self, schedule: &[Planned], length: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut weather = JoinSet::new();
        for planned in schedule {
            sleep_until(begun + Duration::from_millis(planned.at_ms)).await;
            match planned.fault.target() {
                Target::Process(process) => {
                    self.members.get(&process).into_iter().for_each(|member| member.suffer(*planned));
                }
                Target::Link(link) => {
                    weather.spawn(befall(self.link(link)?.handle(), *planned, self.history.clone()));
                }
            }
        }
        weather.join_all().await;
        sleep_until(begun + length).await;
        self.until_all_run().await
    }

    async fn until_all_run(&self) -> anyhow::Result<()> {
        for ran in join_all(self.members.values().map(Member::until_it_runs)).await {
            ran?;
        }
        Ok(())
    }

    /// Drains all workers for good.
    ///
    /// # Errors
    /// When one does not end in good order.
    pub async fn end_workers(&self) -> anyhow::Result<()> {
        let workers = self.members.iter().filter(|(process, _)| matches!(process, Process::Worker(_)));
        for (ended, process) in join_all(workers.map(async |(process, member)| (member.end().await, process))).await {
            ended.with_context(|| format!("{process:?} did not drain"))?;
        }
        Ok(())
    }

    /// Kills Redis and starts it again at once.
    ///
    /// # Errors
    /// When it does not come back.
    pub async fn restart_redis(&self) -> anyhow::Result<()> {
        let redis = self.members.get(&Process::Redis).context("there is a redis")?;
        redis.suffer(Planned { at_ms: 0, for_ms: 0, fault: Fault::Kill(Process::Redis) });
        redis.until_it_runs().await
    }
}

/// Lets a fault befall a connection, and heals it.
async fn befall(link: Handle, planned: Planned, history: History) {
    let lasts = Duration::from_millis(planned.for_ms);
    history.note(Event::FaultBegan { planned });
    match planned.fault {
        Fault::Cut(_, after_bytes) => link.cut(after_bytes),
        Fault::Refuse(_) => link.refuse(true),
        Fault::Delay(_, ms) => link.delay(Duration::from_millis(ms)),
        Fault::HalfClose(_, way) => link.half_close(way, lasts),
        Fault::Hold(_) => link.hold(true),
        // Processes have threads of their own.
        Fault::Kill(_) | Fault::Stop(_) | Fault::Drain(_) => {}
    }
    sleep(lasts).await;
    link.refuse(false);
    link.delay(Duration::ZERO);
    link.hold(false);
    history.note(Event::FaultEnded { planned });
}

/// A clock that goes as that of a Redis does: never behind it, ahead by no more than it took to ask.
async fn clock_of(server: &RedisServer) -> anyhow::Result<Clock> {
    let client = redis::Client::open(server.url())?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let asked = std::time::Instant::now();
    let (seconds, micros): (u64, u64) = redis::cmd("TIME").query_async(&mut connection).await?;
    Ok(Clock::new(asked, seconds * 1_000 + micros.div_ceil(1_000)))
}
