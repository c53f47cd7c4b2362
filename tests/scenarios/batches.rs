//! Jobs that go out in batches, from submission to result, with real workers and a provider that keeps books.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, v1};
use genmill_tests::daemons::Daemon;
use genmill_tests::place::{MODEL, Place, check_all_succeeded_once, client, results, submit_all};
use genmill_tests::redis_server::RedisServer;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;

const LANE: &str = "litellm:openai+batch";

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(120);

struct Mill {
    // Processes end before the Redis and the folder they work with.
    scheduler: Daemon,
    redis: RedisServer,
    place: Place,
}

impl Mill {
    async fn new() -> Self {
        let place = Place::new().await;
        let settings = "[api]\nbatch_fill_ms = 300\nbatch_poll_ms = 100\nbatch_settle_ms = 600\n";
        std::fs::write(place.path().join("genmill.toml"), settings).unwrap();
        let redis = RedisServer::start().unwrap();
        let scheduler = place.start("genmill-scheduler").env("GENMILL__REDIS__URL", &redis.url());
        let scheduler = scheduler.env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0").until_ready().unwrap();
        Self { scheduler, redis, place }
    }

    fn worker(&self) -> Daemon {
        self.place.start("genmill-worker-api").env("GENMILL__REDIS__URL", &self.redis.url()).until_ready().unwrap()
    }

    async fn client(&self) -> Client {
        let client = client(&self.scheduler).await;
        until(async || client.is_available(MODEL).await.unwrap()).await;
        client
    }

    /// How many batches and items the provider was given.
    fn made(&self) -> (usize, usize) {
        let made = self.place.provider.batches();
        (made.len(), made.iter().map(|batch| batch.items.len()).sum())
    }
}

async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WITHIN, waiting).await.unwrap();
}

fn requests(count: usize, words: &str) -> Vec<Request> {
    let prompt = |n| format!("{words} {n}");
    (0..count).map(|n| Request::new(MODEL).prompt(prompt(n)).experiment("e").mode(v1::Mode::Batch)).collect()
}

async fn all(client: &Client) -> Vec<v1::Job> {
    timeout(WITHIN, results(client, "e")).await.unwrap().unwrap()
}

async fn lane(client: &Client) -> v1::Lane {
    client.list_lanes().await.unwrap().into_iter().find(|lane| lane.name == LANE).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_with_slack_go_out_together_at_the_price_of_batches() {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    #[expect(clippy::disallowed_methods, reason = "a test has no daemon")]
    let day = SystemTime::now() + Duration::from_secs(24 * 3_600);
    let slack = |n: usize| {
        let request = Request::new(MODEL).prompt(format!("slack {n}")).experiment("e");
        request.priority(v1::Priority::Bulk).deadline(day)
    };
    let mut ids = submit_all(&client, (0..700).map(slack).collect()).await;
    ids.extend(submit_all(&client, requests(300, "asked")).await);
    let direct = Request::new(MODEL).prompt("direct").experiment("other");
    let direct = submit_all(&client, vec![direct]).await;
    let jobs = all(&client).await;
    check_all_succeeded_once(&jobs, &ids);
    assert!(mill.made().0 <= 6 && mill.made().1 == 1_000, "{:?}", mill.made());
    let single = timeout(WITHIN, results(&client, "other")).await.unwrap().unwrap();
    check_all_succeeded_once(&single, &direct);
    let cost = |job: &v1::Job| job.cost.as_ref().unwrap().nanodollars;
    let usage = |job: &v1::Job| job.result.as_ref().unwrap().usage.unwrap();
    for job in &jobs {
        assert!(job.worker.starts_with("batch-"), "{}", job.worker);
        let usage = usage(job);
        // 0.075 and 0.3 dollars for a million tokens, each rounded up together.
        let picodollars = usage.prompt_tokens * 75_000 + usage.completion_tokens * 300_000;
        assert_eq!(cost(job), picodollars.div_ceil(1_000), "{usage:?}");
    }
    let usage = usage(&single[0]);
    assert_eq!(cost(&single[0]), (usage.prompt_tokens * 150_000 + usage.completion_tokens * 600_000).div_ceil(1_000));
    assert_eq!(lane(&client).await.batches, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_outlives_every_worker_and_is_submitted_once() {
    let mill = Mill::new().await;
    let first = mill.worker();
    let client = mill.client().await;
    let ids = submit_all(&client, requests(40, "!batch-ms=3600000 x")).await;
    until(async || mill.made() == (1, 40)).await;
    until(async || lane(&client).await.batches.iter().any(|batch| !batch.provider_batch.is_empty())).await;
    let shown = lane(&client).await;
    assert_eq!((shown.running, shown.queued, shown.batches.len()), (40, 0, 1));
    let (_, said, _) = mill.place.genmill(&mill.scheduler, &["lanes"]);
    assert!(said.contains("of litellm_gpt-4o-mini since") && said.contains("is at the provider as batch"), "{said}");
    // Killed, it says nothing; the next one finds what it left.
    first.signal(Signal::KILL).unwrap();
    let mut second = mill.worker();
    tokio::time::sleep(Duration::from_millis(300)).await;
    second.signal(Signal::TERM).unwrap();
    assert!(second.wait(WITHIN).unwrap().success());
    mill.place.provider.end_batches();
    let _third = mill.worker();
    check_all_succeeded_once(&all(&client).await, &ids);
    assert_eq!(mill.made(), (1, 40));
    assert!(client.get(&ids[0]).await.unwrap().attempts == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_that_nobody_heard_of_is_found_again() {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    let mut ids = submit_all(&client, requests(10, "!batch-lost times=1 x")).await;
    until(async || mill.made() == (1, 10)).await;
    ids.extend(submit_all(&client, requests(10, "!batch-lost=cut times=1 x")).await);
    check_all_succeeded_once(&all(&client).await, &ids);
    assert_eq!(mill.made(), (2, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_expired_batch_did_not_do_goes_into_the_next_one() {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    let mut odd = requests(1, "!batch-end=expired !batch-partial=3");
    odd.extend(requests(9, "x"));
    let ids = submit_all(&client, odd).await;
    let jobs = all(&client).await;
    check_all_succeeded_once(&jobs, &ids);
    let made: Vec<usize> = mill.place.provider.batches().iter().map(|batch| batch.items.len()).collect();
    // For as long as the odd one is not among the first three of a batch, that expires too.
    assert!(made.len() >= 2 && made.windows(2).all(|pair| pair[1] == pair[0] - 3) && made[0] == 10, "{made:?}");
    assert_eq!(jobs.iter().filter(|job| job.attempts == 1).count(), 3);
    assert!(jobs.iter().all(|job| job.failures == 0 && job.losses == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_ends_at_once_and_what_it_cost_is_booked_when_it_comes() {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    let ids = submit_all(&client, requests(5, "!batch-ms=3600000 x")).await;
    until(async || lane(&client).await.batches.iter().any(|batch| !batch.provider_batch.is_empty())).await;
    let cancelled = client.cancel(&ids[0]).await.unwrap();
    assert_eq!(cancelled.state(), v1::JobState::Cancelled);
    mill.place.provider.end_batches();
    until(async || lane(&client).await.batches.is_empty()).await;
    let job = client.get(&ids[0]).await.unwrap();
    assert_eq!((job.state(), job.result), (v1::JobState::Cancelled, None));
    assert!(job.cost.unwrap().nanodollars > 0);
    assert_eq!(job.attempt_history.len(), 1);
    let rest: BTreeSet<v1::JobState> = all(&client).await.iter().map(v1::Job::state).collect();
    assert_eq!(rest, BTreeSet::from([v1::JobState::Succeeded, v1::JobState::Cancelled]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_nobody_wants_is_cancelled_at_the_provider() {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    submit_all(&client, requests(5, "!batch-ms=3600000 x")).await;
    until(async || lane(&client).await.batches.iter().any(|batch| !batch.provider_batch.is_empty())).await;
    let filter = v1::JobFilter { experiment: "e".to_owned(), ..v1::JobFilter::default() };
    assert_eq!(client.cancel_all(filter).await.unwrap().cancelled, 5);
    until(async || lane(&client).await.batches.is_empty()).await;
    assert_eq!(mill.made(), (1, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_refused_where_there_are_none() {
    let mill = Mill::new().await;
    let _worker = mill.place.start("genmill-worker-api").env("GENMILL__REDIS__URL", &mill.redis.url());
    let _worker = _worker.env("GENMILL__API__BATCHES", "false").until_ready().unwrap();
    let client = mill.client().await;
    let refused = client.submit(requests(1, "x").remove(0)).await.unwrap_err().to_string();
    assert!(refused.contains("cannot be asked in batches"), "{refused}");
}
