//! Our worker: a real one, with a scheduler and a Redis of this run's own. Never here: peers.

use crate::Sizes;
use crate::figures::{Figures, Goal};
use crate::load::{orders_to_hold, until_held};
use crate::process::Process;
use crate::sample::{Seen, add_times, at_provider, message, ms};
use anyhow::ensure;
use futures_util::StreamExt as _;
use genmill_client::{Client, Request, v1};
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::model::ModelName;
use genmill_queue::{Event, Hint, Queue, Setting};
use genmill_tests::daemons::Daemon;
use genmill_tests::place::{MODEL, Place};
use genmill_tests::redis_server::RedisServer;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

/// A model of a provider whose answers come whole.
pub(crate) const WHOLE: &str = "litellm_whole/gpt-4o-mini";

/// Jobs before anything is measured.
const WARM_UP: u64 = 2_000;

/// A mill with an API worker.
pub(crate) struct Mill {
    // Processes end before the Redis and the folder they work with.
    worker: Daemon,
    _scheduler: Daemon,
    _redis: RedisServer,
    pub(crate) place: Place,
    client: Client,
    queue: Queue,
    submitted: u64,
}

impl Mill {
    /// One whose worker has these settings beside its defaults.
    pub(crate) async fn start(settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let place = Place::new().await;
        let configs = place.path().join("configs");
        std::fs::write(configs.join("litellm_models.yaml"), "models: [gpt-4o-mini, whole/gpt-4o-mini]")?;
        let base = place.provider.base_url();
        let row = format!("base_url = '{base}'\nkeys = ['OPENAI_API_KEY']\ndialect = 'openai'\nstreaming = false\n");
        std::fs::write(configs.join("providers.toml"), format!("[whole]\n{row}"))?;
        // What a disk that others use too costs is the queue's matter, see its benchmark.
        let redis = RedisServer::start_with(&["--appendonly", "no"])?;
        let start = |binary| {
            let start = place.start(binary).env("GENMILL__REDIS__URL", &redis.url());
            let start = start.env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0").env("GENMILL__TELEMETRY__LOG", "error");
            // In place of those of the tests, the defaults.
            let start = start.env("GENMILL__WORKER__LEASE_MS", "15000").env("GENMILL__WORKER__HEARTBEAT_MS", "3000");
            let start = start.env("GENMILL__API__CALLS_MAX", "64");
            settings.iter().fold(start, |start, (name, value)| start.env(name, value)).until_ready()
        };
        let (scheduler, worker) = (start("genmill-scheduler")?, start("genmill-worker-api")?);
        let client = Client::connect(&format!("http://{}", scheduler.place("grpc"))).await?;
        let options = genmill_queue::Options { url: redis.url(), namespace: "genmill".to_owned() };
        let queue = Queue::connect(&options).await?;
        for model in [MODEL, WHOLE] {
            while !client.is_available(model).await? {
                sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(Self { worker, _scheduler: scheduler, _redis: redis, place, client, queue, submitted: 0 })
    }

    pub(crate) fn process(&self) -> Process {
        Process(self.worker.id())
    }

    /// The lane of a model.
    pub(crate) async fn lane(&self, model: &str) -> anyhow::Result<LaneNumber> {
        Ok(self.queue.open_lane(&ModelName::parse(model)?.lane()).await?)
    }

    /// Submits jobs together.
    async fn submit(&mut self, model: &str, jobs: u64, orders: &str) -> anyhow::Result<()> {
        let (model, orders) = (model.to_owned(), orders.to_owned());
        self.submit_as(jobs, move |number| request(&model, number, &orders)).await
    }

    /// Submits as many jobs together as are wanted, made of their numbers.
    pub(crate) async fn submit_as<R>(&mut self, jobs: u64, request: R) -> anyhow::Result<()>
    where
        R: Fn(u64) -> v1::GenerationRequest + Send + 'static,
    {
        let first = self.submitted + 1;
        self.submitted += jobs;
        let requests = (first..first + jobs).map(request);
        let mut answers = Box::pin(self.client.submit_all(tokio_stream::iter(requests)));
        while let Some(answer) = answers.next().await {
            answer?;
        }
        Ok(())
    }

    /// Jobs that have not ended.
    pub(crate) async fn open(&self, lane: LaneNumber) -> anyhow::Result<u64> {
        Ok(self.queue.open_jobs(&[lane], None).await?)
    }

    async fn until_done(&self, lane: LaneNumber) -> anyhow::Result<()> {
        while self.open(lane).await? > 0 {
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Calls as fast as they are answered: CPU of each in milliseconds, and how many there were in a second.
    async fn drain(&mut self, model: &str, jobs: u64) -> anyhow::Result<(f64, f64)> {
        let lane = self.lane(model).await?;
        self.submit(model, WARM_UP.min(jobs), "").await?;
        self.until_done(lane).await?;
        self.queue.set(&Setting::PauseLane(lane), Some(1)).await?;
        self.submit(model, jobs, "").await?;
        let answered = self.place.provider.bill().statuses.get(&200).copied().unwrap_or_default();
        let (before, begun) = (self.process().cpu_ms()?, Instant::now());
        self.queue.set(&Setting::PauseLane(lane), None).await?;
        self.until_done(lane).await?;
        let (took, spent) = (begun.elapsed(), self.process().cpu_ms()? - before);
        let now = self.place.provider.bill().statuses.get(&200).copied().unwrap_or_default();
        ensure!(now - answered == jobs, "{} calls were answered, of {jobs} jobs", now - answered);
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        let count = jobs as f64;
        Ok((spent / count, count / took.as_secs_f64()))
    }
}

fn request(model: &str, number: u64, orders: &str) -> v1::GenerationRequest {
    Request::new(model).prompt(message(number, orders)).max_tokens(16).experiment("bench").into()
}

/// Measures the worker with its defaults. Returns the CPU of a call and what is added to one, p99, in milliseconds.
pub(crate) async fn measure(figures: &mut Figures, sizes: Sizes) -> anyhow::Result<([f64; 2], f64)> {
    let mut mill = Mill::start(&[]).await?;
    figures.heading(&format!("genmill-worker-api, a backlog of {} jobs, 64 calls at once", sizes.calls))?;
    let (cpu_ms, rate) = mill.drain(MODEL, sizes.calls).await?;
    figures.add("CPU of a call, streamed", cpu_ms, "ms", Goal::AtMost(0.15))?;
    figures.add("calls, streamed", rate, "calls/s", Goal::Nothing)?;
    let (whole_ms, rate) = mill.drain(WHOLE, sizes.calls).await?;
    figures.add("CPU of a call, answered whole", whole_ms, "ms", Goal::AtMost(0.15))?;
    figures.add("calls, answered whole", rate, "calls/s", Goal::Nothing)?;
    Ok(([cpu_ms, whole_ms], pace(figures, &mut mill, sizes).await?))
}

/// What was seen of jobs that come one by one.
#[derive(Debug, Default)]
struct Watched {
    seen: Seen,
    /// Whenever workers were told that something waits.
    hints: Vec<Instant>,
}

/// Measures what the worker adds to calls that come one by one.
async fn pace(figures: &mut Figures, mill: &mut Mill, sizes: Sizes) -> anyhow::Result<f64> {
    figures.heading(&format!("genmill-worker-api, {} calls/s one by one", sizes.pace))?;
    let first = mill.submitted + 1;
    let jobs = sizes.pace * sizes.seconds;
    mill.submitted += jobs;
    let before = mill.process().cpu_ms()?;
    let watched = watch_paced(mill, sizes.pace, first..first + jobs).await?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let cpu_ms = (mill.process().cpu_ms()? - before) / jobs as f64;
    let counted = first + sizes.pace;
    let whole = add_times(
        figures,
        "submit to finished, without the stand-in",
        watched.seen.added(&mill.place.provider, counted),
        Goal::Nothing,
    );
    whole?;
    let (before, after) = watched.halves(&mill.place.provider, counted);
    let added = before.iter().zip(&after).map(|(before, after)| before + after).collect();
    add_times(figures, "hint to the call's arrival", before, Goal::Nothing)?;
    add_times(figures, "end of answer to finished", after, Goal::Nothing)?;
    let p99 = add_times(figures, "added to a call", added, Goal::AtMost(3.0))?;
    figures.add("CPU of a call", cpu_ms, "ms", Goal::Nothing)?;
    Ok(p99)
}

/// Submits jobs one by one, and watches until all have finished.
async fn watch_paced(mill: &Mill, pace: u64, numbers: std::ops::Range<u64>) -> anyhow::Result<Watched> {
    let lane = mill.lane(MODEL).await?;
    let (mut events, mut hints) = (mill.queue.events().await?, mill.queue.hints(&[lane]).await?);
    let mut ticks = interval(Duration::from_secs(1) / u32::try_from(pace)?);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let jobs = usize::try_from(numbers.end - numbers.start)?;
    let (mut to_submit, mut submitting) = (numbers, JoinSet::new());
    let (mut watched, mut ids, mut finished) = (Watched::default(), HashMap::new(), Vec::with_capacity(jobs));
    while finished.len() < jobs || ids.len() < jobs {
        tokio::select! {
            biased;
            hint = hints.next() => if matches!(hint, Hint::Work(_)) { watched.hints.push(Instant::now()) },
            event = events.next() => match event {
                Event::Finished(id) => finished.push((id, Instant::now())),
                Event::Text(_) => {}
                Event::Missed => anyhow::bail!("the connection to Redis was lost"),
            },
            _ = ticks.tick(), if !to_submit.is_empty() => {
                let (client, number) = (mill.client.clone(), to_submit.next().unwrap_or_default());
                submitting.spawn(async move {
                    let called = Instant::now();
                    let submitted = client.submit(request(MODEL, number, "")).await?;
                    anyhow::Ok((submitted.job.id, number, called))
                });
            }
            Some(submitted) = submitting.join_next() => {
                let (id, number, called) = submitted??;
                watched.seen.called.insert(number, called);
                ids.insert(JobId::parse(&id)?, number);
            }
        }
    }
    watched.seen.ended = finished.into_iter().filter_map(|(id, at)| Some((*ids.get(&id)?, at))).collect();
    Ok(watched)
}

impl Watched {
    /// For each call from number `first` on: milliseconds from the hint that it waits to its arrival at the stand-in, and
    /// from the end of its answer to the message that its job has finished. Hints name no job: the first after a job was
    /// submitted may be that of one before, which makes the time longer, never shorter.
    fn halves(&self, standin: &genmill_standin::Standin, first: u64) -> (Vec<f64>, Vec<f64>) {
        let at = at_provider(standin);
        let counted = self.seen.ended.iter().filter(|(number, _)| **number >= first);
        let halves = counted.filter_map(|(number, finished)| {
            let (begun, answered) = at.get(number)?;
            let called = self.seen.called.get(number)?;
            let hint = self.hints.get(self.hints.partition_point(|hint| hint < called))?;
            Some((ms(*hint, *begun), ms(*answered, *finished)))
        });
        halves.unzip()
    }
}

/// Measures the memory of a worker that has places for all calls that are held, in MB.
pub(crate) async fn hold(figures: &mut Figures, sizes: Sizes) -> anyhow::Result<f64> {
    figures.heading(&format!("genmill-worker-api, {} calls in flight", sizes.held))?;
    let places = sizes.held.to_string();
    let settings = [("GENMILL__API__CALLS_MAX", &*places), ("GENMILL__API__CALLS_START", &*places)];
    let mut mill = Mill::start(&settings).await?;
    figures.add("resident before", mill.process().resident_mb()?, "MB", Goal::Nothing)?;
    mill.submit(MODEL, u64::try_from(sizes.held)?, &orders_to_hold()).await?;
    let held = until_held(&mill.place.provider, sizes.held).await;
    ensure!(held == sizes.held, "only {held} calls are in flight");
    // A heartbeat renews all of their leases meanwhile.
    sleep(Duration::from_secs(4)).await;
    let resident_mb = mill.process().resident_mb()?;
    figures.add("resident, calls in flight", resident_mb, "MB", Goal::AtMost(60.0))?;
    let lane = mill.lane(MODEL).await?;
    mill.until_done(lane).await?;
    figures.add("the most resident, until all are finished", mill.process().peak_mb()?, "MB", Goal::Nothing)?;
    Ok(resident_mb)
}
