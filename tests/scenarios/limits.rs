//! Limits of providers, kept together by several API workers against a provider of their own.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, v1};
use genmill_standin::bill::{Call, CallEnd};
use genmill_tests::daemons::Daemon;
use genmill_tests::place::{MODEL, Place, check_all_succeeded_once, client, finished, results, submit_all};
use genmill_tests::redis_server::RedisServer;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::timeout;

/// A model of the same provider.
const SECOND: &str = "litellm_gpt-4";

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(120);

struct Mill {
    // Processes end before the Redis and the folder they work with.
    scheduler: Daemon,
    _workers: Vec<Daemon>,
    _redis: RedisServer,
    place: Place,
}

impl Mill {
    /// Three workers with these settings.
    async fn new(settings: &str) -> Self {
        Self::of(Place::new().await, settings)
    }

    /// The same for these models.
    async fn serving(models: &[String], settings: &str) -> Self {
        let place = Place::new().await;
        let listed: Vec<String> = models.iter().map(|model| format!("'{model}'")).collect();
        let listed = format!("models: [{}]", listed.join(", ").replace("litellm_", ""));
        std::fs::write(place.path().join("configs/litellm_models.yaml"), listed).unwrap();
        Self::of(place, settings)
    }

    fn of(place: Place, settings: &str) -> Self {
        std::fs::write(place.path().join("genmill.toml"), settings).unwrap();
        let redis = RedisServer::start().unwrap();
        let start = |daemon: &str| {
            let start = place.start(daemon).env("GENMILL__REDIS__URL", &redis.url());
            start.env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0").until_ready().unwrap()
        };
        let scheduler = start("genmill-scheduler");
        let workers = (0..3).map(|_| start("genmill-worker-api")).collect();
        Self { scheduler, _workers: workers, _redis: redis, place }
    }

    async fn client(&self, model: &str) -> Client {
        let client = client(&self.scheduler).await;
        let served = async { while !client.is_available(model).await.unwrap() {} };
        timeout(WITHIN, served).await.unwrap();
        client
    }

    /// The calls of a model, in the order in which they came.
    fn calls(&self, model: &str) -> Vec<Call> {
        let name = model.trim_start_matches("litellm_");
        let mut calls = self.place.provider.calls();
        calls.retain(|call| call.content.starts_with(&format!("{name}: ")));
        calls.sort_by_key(|call| call.begun);
        calls
    }
}

fn requests(model: &str, count: usize, words: &str, experiment: &str) -> Vec<Request> {
    (0..count).map(|n| Request::new(model).prompt(format!("{words}{n}")).experiment(experiment)).collect()
}

async fn all_of(client: &Client, experiment: &str) -> Vec<v1::Job> {
    timeout(WITHIN, results(client, experiment)).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_keep_a_limit_together_and_another_model_is_not_held_up() {
    const A_MINUTE: u32 = 30;
    let settings =
        format!("[[limits]]\nprovider = 'openai'\nmodel = 'gpt-4o-mini'\nrequests_per_minute = {A_MINUTE}\n");
    let mill = Mill::new(&settings).await;
    let client = mill.client(MODEL).await;
    let count = usize::try_from(A_MINUTE).unwrap() + 4;
    let first = submit_all(&client, requests(MODEL, count, "a", "first")).await;
    let second = submit_all(&client, requests(SECOND, 60, "b", "second")).await;
    check_all_succeeded_once(&all_of(&client, "second").await, &second);
    // The limit is used up, and whoever asks is told.
    let lanes = client.list_lanes().await.unwrap();
    let held = &lanes.iter().find(|lane| lane.name == "litellm:openai").unwrap().held_back;
    assert_eq!(held.len(), 1, "{lanes:?}");
    assert_eq!((held[0].model.as_str(), held[0].reason()), (MODEL, v1::HeldBackReason::Requests));
    assert!(held[0].until.is_some());
    let (_, said, _) = mill.place.genmill(&mill.scheduler, &["lanes"]);
    assert!(said.contains("litellm_gpt-4o-mini is held back until 20"), "{said}");
    check_all_succeeded_once(&all_of(&client, "first").await, &first);
    // A full bucket, then what flows into it: the n-th call behind it waits for n parts of a minute.
    let calls = mill.calls(MODEL);
    assert_eq!(calls.len(), count);
    let full = usize::try_from(A_MINUTE).unwrap();
    for (behind, call) in (1_u32..).zip(&calls[full..]) {
        let waited = call.begun - calls[0].begun;
        let least = Duration::from_secs(60) / A_MINUTE * behind;
        // The first call takes a while from its permit to the provider, others may take less.
        assert!(waited + Duration::from_millis(700) >= least, "{waited:?} instead of {least:?}");
    }
    assert!(mill.calls(SECOND).last().unwrap().begun < calls[full].begun, "the second model did not wait");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_throttled_calls_ends_with_every_job_done_and_none_failed() {
    let mill = Mill::new("[api]\ncalls_start = 16\n").await;
    let client = mill.client(MODEL).await;
    let ids = submit_all(&client, requests(MODEL, 60, "!status=429 times=2 retry-after-ms=30 a", "storm")).await;
    let jobs = all_of(&client, "storm").await;
    check_all_succeeded_once(&jobs, &ids);
    for job in &jobs {
        assert_eq!((job.failures, job.losses), (0, 0), "{:?}", job.attempt_history);
        let throttled = job.attempt_history.iter().filter(|line| line.outcome() == v1::AttemptOutcome::Failed);
        assert_eq!(throttled.count(), 2);
    }
    assert_eq!(mill.place.provider.bill().calls, 180, "no call more than the provider asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_shrinks_what_all_workers_have_in_flight() {
    let mill = Mill::new("[api]\ncalls_start = 12\n").await;
    let client = mill.client(MODEL).await;
    // As long as a call takes, none ends: the first twelve come together, whoever makes them.
    let ids = submit_all(&client, requests(MODEL, 40, "!sleep=300 !status=429 times=1 a", "storm")).await;
    check_all_succeeded_once(&all_of(&client, "storm").await, &ids);
    assert!(mill.place.provider.bill().most_at_once["gpt-4o-mini"] <= 12, "{:?}", mill.place.provider.bill());
}

#[tokio::test(flavor = "multi_thread")]
async fn all_keys_are_used_alike() {
    let settings = "[providers.openai]\napi_keys = ['sk-second']\n[[limits]]\nprovider = 'openai'\nconcurrency = 2\n";
    let mill = Mill::new(settings).await;
    let client = mill.client(MODEL).await;
    let ids = submit_all(&client, requests(MODEL, 40, "!sleep=20 a", "keys")).await;
    check_all_succeeded_once(&all_of(&client, "keys").await, &ids);
    let mut by_key: BTreeMap<String, Vec<Call>> = BTreeMap::new();
    for call in mill.calls(MODEL) {
        by_key.entry(call.key.clone()).or_default().push(call);
    }
    assert_eq!(by_key.keys().collect::<Vec<_>>(), ["sk-second", "sk-test"]);
    for calls in by_key.values() {
        assert!(calls.len() >= 12, "{}", calls.len());
        let open_at =
            |at: Duration| calls.iter().filter(|c| c.begun <= at && c.ended.is_none_or(|end| at < end)).count();
        assert!(calls.iter().all(|call| open_at(call.begun) <= 2), "more than two at once with one key");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_provider_tells_in_any_spelling_is_kept_without_configuration() {
    // 12 calls in 2 s with each key for each of them, told in three ways.
    let models = ["openai", "anthropic", "plain"].map(|style| format!("litellm_openai/m!rate={style}:12:100000:2000"));
    let mill = Mill::serving(&models, "[api]\ncalls_start = 4\n").await;
    let client = mill.client(&models[0]).await;
    let ids = futures_util::future::join_all(
        models.iter().map(|model| submit_all(&client, requests(model, 60, "a", "told"))),
    );
    let ids = ids.await.concat();
    let jobs = all_of(&client, "told").await;
    check_all_succeeded_once(&jobs, &ids);
    assert!(jobs.iter().all(|job| job.failures == 0));
    for model in &models {
        let calls = mill.calls(&model.replace("openai/m", "m"));
        let refused = calls.iter().filter(|call| call.end == CallEnd::Refused(429)).count();
        assert_eq!(calls.len() - refused, 60, "{model}");
        // Nothing was known at first, and what is told comes a call's time late.
        assert!(refused <= 8, "{model}: {refused} of {} calls were refused", calls.len());
        let (first, last) = (calls[0].begun, calls[calls.len() - 1].begun);
        assert!(last - first <= Duration::from_secs(30), "{model}: what may be called is called: {:?}", last - first);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_larger_than_its_limit_ends_and_holds_up_nobody() {
    for (style, calls, says) in [
        ("openai", 1, "Request too large for this model"),
        // Nobody says so: it is seen after a few tries by what is told of the limit.
        ("anthropic", 3, "needs, 1003 (estimated) and not 200: shorten the prompt, lower max_tokens"),
    ] {
        let model = format!("litellm_openai/m!rate={style}:1000:200:1000");
        let mill = Mill::serving(std::slice::from_ref(&model), "").await;
        let client = mill.client(&model).await;
        let large = Request::new(&model).prompt("too large a job").max_tokens(1_000);
        let large = client.submit(large).await.unwrap().job.id;
        let small = (0..10).map(|n| Request::new(&model).prompt(format!("b{n}")).max_tokens(10).experiment("small"));
        let ids = submit_all(&client, small.collect()).await;
        check_all_succeeded_once(&all_of(&client, "small").await, &ids);
        let job = finished(&client, &large).await;
        let error = job.error.unwrap();
        assert_eq!((job.state, error.error_class()), (v1::JobState::Failed.into(), v1::ErrorClass::Invalid), "{style}");
        assert!(error.message.contains(says), "{style}: {}", error.message);
        let own = mill.place.provider.calls().into_iter().filter(|call| call.content.ends_with("too large a job"));
        assert!(own.count() <= calls * 3, "{style}: each of three workers sees it for itself");
    }
}
