//! Jobs that go out in batches, from submission to result, with real workers and a provider that keeps books.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, v1};
use genmill_tests::daemons::{Daemon, Start};
use genmill_tests::place::{MODEL, Place, check_all_succeeded_once, client, results, submit_all};
use genmill_tests::redis_server::RedisServer;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::fs::File;
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

    /// How a worker is started that also calls Anthropic, whose batches have their items in the call that makes them.
    fn anthropic(&self, log: &str) -> Start {
        let start = self.place.start("genmill-worker-api").env("GENMILL__REDIS__URL", &self.redis.url());
        let start = start.env("ANTHROPIC_API_KEY", "sk-test").env("ANTHROPIC_BASE_URL", &self.place.provider.origin());
        start.logs_to(File::create(self.place.path().join(log)).unwrap())
    }

    fn said(&self, log: &str, words: &str) -> bool {
        std::fs::read_to_string(self.place.path().join(log)).unwrap().contains(words)
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

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_was_stopped_in_the_middle_of_a_call_does_not_make_a_second_batch() {
    const CLAUDE: &str = "litellm_claude-haiku-4-5";
    let mill = Mill::new().await;
    std::fs::write(mill.place.path().join("configs/litellm_models.yaml"), "models: [claude-haiku-4-5]").unwrap();
    let mut first = mill.anthropic("first.log").until_ready().unwrap();
    let client = client(&mill.scheduler).await;
    until(async || client.is_available(CLAUDE).await.unwrap()).await;
    // More than what lies between a worker and its provider can hold.
    let long = "word ".repeat(200_000);
    let request =
        |n| Request::new(CLAUDE).prompt(format!("!batch-ms=3600000 {n} {long}")).experiment("e").max_tokens(9);
    mill.place.provider.hold_creation();
    let ids = submit_all(&client, (0..16).map(|n| request(n).mode(v1::Mode::Batch)).collect()).await;
    until(async || mill.place.provider.holds_creation()).await;
    first.signal(Signal::STOP).unwrap();
    let second = mill.anthropic("second.log").until_ready().unwrap();
    until(async || mill.made() == (1, 16)).await;
    assert!(mill.said("second.log", "took over a batch"));
    // Now the call of the first one can go on, and nobody tells it that it must not.
    mill.redis.signal(Signal::STOP).unwrap();
    mill.place.provider.release_creation();
    first.signal(Signal::CONT).unwrap();
    until(async || mill.made().0 > 1 || mill.said("first.log", "the hold on it did not last")).await;
    mill.redis.signal(Signal::CONT).unwrap();
    first.signal(Signal::TERM).unwrap();
    assert!(first.wait(WITHIN).unwrap().success());
    mill.place.provider.end_batches();
    check_all_succeeded_once(&all(&client).await, &ids);
    assert_eq!((mill.made(), mill.place.provider.bill().calls), ((1, 16), 16));
    drop(second);
}

/// Ten jobs, one of which has this prompt, once all have ended: those that failed; what the provider was given.
async fn one_bad_of_ten(prompt: &str) -> (Mill, Vec<v1::Job>, Vec<usize>) {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    let mut mixed = requests(9, "x");
    mixed.insert(6, requests(1, prompt).remove(0));
    submit_all(&client, mixed).await;
    let jobs = all(&client).await;
    assert_eq!(jobs.len(), 10);
    until(async || lane(&client).await.batches.is_empty()).await;
    assert_eq!(mill.place.provider.files(), [""; 0], "what a batch leaves behind is deleted");
    let (failed, rest): (Vec<v1::Job>, Vec<v1::Job>) =
        jobs.into_iter().partition(|job| job.state() == v1::JobState::Failed);
    assert!(rest.iter().all(|job| job.state() == v1::JobState::Succeeded && job.failures == 0 && job.attempts == 1));
    let made = mill.place.provider.batches().iter().map(|batch| batch.items.len()).collect();
    (mill, failed, made)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_a_refusal_names_fails_alone() {
    let (_mill, failed, made) = one_bad_of_ten("!batch-bad=named").await;
    assert_eq!((failed.len(), failed[0].failures, made), (1, 1, vec![10, 9]));
    assert!(failed[0].error.as_ref().unwrap().message.contains("refused the request"), "{:?}", failed[0].error);
    assert_eq!(failed[0].cost.as_ref().unwrap().nanodollars, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_refusal_names_no_job_the_batch_is_halved_until_one_is_left() {
    let (_mill, failed, mut made) = one_bad_of_ten("!batch-bad").await;
    assert_eq!(failed.len(), 1);
    made.sort_unstable();
    // The bad one is among two of five, or alone or among two of the other three.
    assert!(
        matches!(made[..], [1, 1, 2, 3, 5, 5, 10] | [1, 2, 2, 3, 5, 5, 10] | [1, 1, 1, 2, 2, 3, 5, 5, 10]),
        "{made:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_a_provider_has_no_room_for_waits() {
    let (_mill, failed, made) = one_bad_of_ten("!batch-end=token_limit_exceeded times=1").await;
    assert_eq!((failed.len(), made), (0, vec![10, 10]));
}

#[tokio::test(flavor = "multi_thread")]
async fn looks_that_fail_do_not_end_a_batch() {
    let (_mill, failed, made) = one_bad_of_ten("!batch-poll=500 times=2").await;
    assert_eq!((failed.len(), made), (0, vec![10]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_gone_is_not_paid_for_twice() {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    submit_all(&client, requests(3, "!batch-looks=9 !batch-vanish=2")).await;
    let jobs = all(&client).await;
    for job in jobs {
        let error = job.error.unwrap().message;
        assert!(error.contains("cannot be read") && error.contains("genmill redrive"), "{error}");
        assert_eq!(job.cost, None, "nobody knows");
    }
    assert_eq!(mill.made(), (1, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_result_is_broken_is_done_again_and_the_others_are_not() {
    let mill = Mill::new().await;
    let _worker = mill.worker();
    let client = mill.client().await;
    submit_all(&client, requests(3, "!batch-truncate x")).await;
    let jobs = all(&client).await;
    assert!(jobs.iter().all(|job| job.state() == v1::JobState::Succeeded));
    assert_eq!(jobs.iter().map(|job| job.failures).sum::<u32>(), 1);
    assert_eq!(mill.made(), (2, 4));
}
