//! Batches while workers are killed, stopped and drained and their connections cut, held and refused, with providers that
//! lose answers, refuse, expire and break results: no job is lost, none is asked twice under one epoch, what is billed is booked.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, v1};
use genmill_standin::script::Script;
use genmill_tests::chaos::check::prompt;
use genmill_tests::chaos::proxy::{Handle, Proxy};
use genmill_tests::daemons::Daemon;
use genmill_tests::dice::Dice;
use genmill_tests::place::{Place, client, results, submit_all};
use genmill_tests::redis_server::RedisServer;
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// A model of each provider with batches, as requests and as providers name it.
const MODELS: [(&str, &str); 4] = [
    ("litellm_gpt-4o-mini", "gpt-4o-mini"),
    ("litellm_claude-haiku-4-5", "claude-haiku-4-5"),
    ("litellm_gemini-2.5-flash", "gemini-2.5-flash"),
    ("litellm_mistral/mistral-small-latest", "mistral-small-latest"),
];

/// What providers do to batches with such a job. Those that begin with the first words fail it.
const SCRIPTS: [&str; 14] = [
    "!batch-bad=named",
    "!batch-bad",
    "!batch-ms=1500",
    "!batch-ms=4000",
    "!batch-looks=2",
    "!batch-lost times=1",
    "!batch-lost=cut times=1",
    "!batch-end=expired !batch-partial=2 times=1",
    "!batch-end=token_limit_exceeded times=1",
    "!batch-status=429 retry-after=1 times=1",
    "!batch-upload=500 times=1",
    "!batch-poll=500 times=1",
    "!batch-cut=1",
    "!batch-garbled",
];

/// For how long things go wrong.
const SUFFERING: Duration = Duration::from_secs(35);

/// How long all jobs may take to end then.
const SETTLES_WITHIN: Duration = Duration::from_secs(90);

/// Longer than anything is held up, so that a search is right when it finds nothing.
const SETTINGS: &str = "[api]\nbatch_fill_ms = 200\nbatch_poll_ms = 100\nbatch_settle_ms = 6000\n";

/// A worker with its connections to Redis and to providers.
struct Worker {
    number: usize,
    generation: u32,
    daemon: Option<Daemon>,
    redis: Proxy,
    provider: Proxy,
}

impl Worker {
    async fn new(number: usize, place: &Place, redis: &RedisServer) -> Self {
        let link = async |to| Proxy::start(Some(to)).await.unwrap();
        let (redis, provider) = (link(redis.address()).await, link(place.provider.address()).await);
        Self { number, generation: 0, daemon: None, redis, provider }
    }

    fn start(&mut self, place: &Place) {
        self.generation += 1;
        let log = place.path().join(format!("worker-{}-{}.log", self.number, self.generation));
        let origin = format!("http://{}", self.provider.address());
        let start = place.start("genmill-worker-api").logs_to(File::create(log).unwrap());
        let start = start.env("GENMILL__REDIS__URL", &format!("redis://{}", self.redis.address()));
        let start = start.env("GENMILL__WORKER__LEASE_MS", "2500").env("GENMILL__WORKER__RETRIES_MAX", "9");
        let start = start.env("GENMILL__WORKER__DRAIN_TIMEOUT_MS", "500");
        let paths = [("OPENAI", "/v1"), ("ANTHROPIC", ""), ("GEMINI", "/v1beta"), ("MISTRAL", "/v1")];
        let start = paths.into_iter().fold(start, |start, (name, path)| {
            start
                .env(&format!("{name}_API_KEY"), "sk-test")
                .env(&format!("{name}_BASE_URL"), &format!("{origin}{path}"))
        });
        // One whose connections are at fault does not get ready; it is started again with the next fault.
        self.daemon = start.until_ready().ok();
    }

    /// Lets something befall it.
    async fn suffer(&mut self, dice: &mut Dice, place: &Place) {
        let while_ms = Duration::from_millis(dice.between(200, 4_500));
        let link = |worker: &Self, dice: &mut Dice| -> Handle {
            if dice.roll(3) == 0 { worker.redis.handle() } else { worker.provider.handle() }
        };
        let Some(daemon) = &mut self.daemon else { return self.start(place) };
        match dice.roll(8) {
            0 | 1 => {
                self.daemon = None;
                self.start(place);
            }
            2 | 3 => {
                daemon.signal(Signal::STOP).unwrap();
                sleep(while_ms).await;
                daemon.signal(Signal::CONT).unwrap();
            }
            4 => {
                daemon.signal(Signal::TERM).unwrap();
                assert!(daemon.wait(Duration::from_secs(60)).unwrap().success());
                self.start(place);
            }
            5 => link(self, dice).cut(dice.roll(3_000)),
            6 => {
                let link = link(self, dice);
                link.hold(true);
                sleep(while_ms).await;
                link.hold(false);
            }
            _ => {
                let link = link(self, dice);
                link.refuse(true);
                link.cut(0);
                sleep(while_ms).await;
                link.refuse(false);
            }
        }
    }
}

/// Submits jobs that do all that is in [`SCRIPTS`], and cancels some: all, and those that were cancelled.
async fn load(client: &Client, mut dice: Dice, until: Instant) -> (Vec<String>, BTreeSet<String>) {
    let (mut all, mut cancelled, mut drawn) = (Vec::new(), BTreeSet::new(), 0);
    while Instant::now() < until {
        let mut wave = Vec::new();
        for (model, _) in MODELS {
            for _ in 0..dice.between(3, 9) {
                drawn += 1;
                // Most do nothing.
                let script = if dice.roll(3) == 0 { dice.pick(&SCRIPTS).unwrap() } else { "" };
                let request = Request::new(model).prompt(format!("{script} job {drawn}")).max_tokens(9);
                wave.push(request.mode(v1::Mode::Batch).experiment("e"));
            }
        }
        let ids = submit_all(client, wave).await;
        sleep(Duration::from_millis(dice.between(200, 1_800))).await;
        for id in ids.iter().filter(|_| dice.roll(12) == 0) {
            client.cancel(id).await.unwrap();
            cancelled.insert(id.clone());
        }
        all.extend(ids);
    }
    (all, cancelled)
}

/// What is wrong with a job that has ended. `answered` tells how often its provider answered each content.
fn wrong(job: &v1::Job, was_cancelled: bool, answered: &BTreeMap<String, u64>) -> Option<String> {
    let prompt = prompt(job);
    let is_bad = prompt.starts_with("!batch-bad");
    let ended_well = match job.state() {
        v1::JobState::Succeeded => job.result.as_ref().is_some_and(|result| result.text == Script::strip(prompt)),
        v1::JobState::Cancelled => was_cancelled,
        v1::JobState::Failed => is_bad,
        _ => false,
    };
    let name = MODELS.iter().find(|(name, _)| job.request.as_ref().is_some_and(|request| request.model == *name));
    let billed = name.and_then(|(_, name)| answered.get(&format!("{name}: {prompt}"))).copied().unwrap_or(0);
    // Prices of batches are not known of all providers: a success and what came too late stand for themselves.
    let paid = job.attempt_history.iter().filter(|attempt| match (&attempt.cost, attempt.outcome()) {
        (Some(cost), _) => cost.nanodollars > 0,
        (None, outcome) => matches!(outcome, v1::AttemptOutcome::Succeeded | v1::AttemptOutcome::Fenced),
    });
    let paid = u64::try_from(paid.count()).unwrap();
    let what = format!(
        "{:?} {prompt}: billed {billed}, booked {paid}, {:?}, {:?}",
        job.state(),
        job.error,
        job.attempt_history
    );
    (!ended_well || billed != paid).then_some(what)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_befalls_workers_every_job_of_a_batch_is_asked_once_and_ends_once() {
    let seed = RandomState::new().hash_one(0);
    eprintln!("seed {seed}");
    let place = Place::new().await;
    let listed: Vec<&str> = MODELS.iter().map(|(name, _)| *name).collect();
    std::fs::write(place.path().join("configs/litellm_models.yaml"), format!("models: [{}]", listed.join(", ")))
        .unwrap();
    std::fs::write(place.path().join("genmill.toml"), SETTINGS).unwrap();
    let redis = RedisServer::start().unwrap();
    let scheduler = place.start("genmill-scheduler").env("GENMILL__REDIS__URL", &redis.url());
    let scheduler = scheduler.env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0").until_ready().unwrap();
    // One that nothing befalls keeps models available.
    let mut spare = Worker::new(0, &place, &redis).await;
    spare.start(&place);
    let client = client(&scheduler).await;
    for (model, _) in MODELS {
        while !client.is_available(model).await.unwrap() {
            sleep(Duration::from_millis(20)).await;
        }
    }
    let (place, until) = (&place, Instant::now() + SUFFERING);
    let suffer = async |number: usize| {
        let mut dice = Dice::new(seed ^ number as u64);
        let mut worker = Worker::new(number, place, &redis).await;
        while Instant::now() < until {
            sleep(Duration::from_millis(dice.between(100, 1_500))).await;
            worker.suffer(&mut dice, place).await;
        }
        // Dropped, it is killed.
    };
    let suffering = async { tokio::join!(suffer(1), suffer(2), suffer(3)) };
    let ((ids, cancelled), _) = tokio::join!(load(&client, Dice::new(seed), until), suffering);
    let settle = async {
        let mut jobs = results(&client, "e").await.unwrap();
        // What was cancelled comes later.
        while client.list_lanes().await.unwrap().iter().any(|lane| !lane.batches.is_empty()) {
            sleep(Duration::from_millis(50)).await;
        }
        for job in &mut jobs {
            *job = client.get(&job.id).await.unwrap();
        }
        jobs
    };
    let Ok(jobs) = timeout(SETTLES_WITHIN, settle).await else {
        let (_, lanes, _) = place.genmill(&scheduler, &["lanes"]);
        panic!("not all jobs end: {lanes}");
    };
    let answered = place.provider.bill().contents.into_iter().map(|(name, content)| (name, content.answered)).collect();
    assert_eq!(jobs.iter().map(|job| &job.id).collect::<BTreeSet<_>>(), ids.iter().collect());
    let wrong: Vec<String> = jobs.iter().filter_map(|job| wrong(job, cancelled.contains(&job.id), &answered)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    // A refused batch is none; its items may go again under the same name.
    let made: Vec<_> = place.provider.batches().into_iter().filter(|batch| batch.state != "failed").collect();
    let items: Vec<&String> = made.iter().flat_map(|batch| &batch.items).collect();
    assert_eq!(items.len(), items.iter().collect::<BTreeSet<_>>().len(), "an item is in two batches");
    let left = place.provider.files();
    eprintln!(
        "{} jobs, {} cancelled, {} batches, {} items, files left: {left:?}",
        jobs.len(),
        cancelled.len(),
        made.len(),
        items.len()
    );
    assert!(!left.iter().any(|file| !file.starts_with("file-")), "results stay at their provider: {left:?}");
}
