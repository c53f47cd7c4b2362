//! What the API worker makes of one job's calls: in whose gates they pass, which model answers, and what they cost.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, v1};
use genmill_core::attempt::{FinishReason, Generation};
use genmill_core::names::Tenant;
use genmill_queue::{Keep, Options, Queue};
use genmill_tests::daemons::Daemon;
use genmill_tests::place::{self, MODEL, Place, client};
use genmill_tests::redis_server::RedisServer;
use std::time::Duration;
use tokio::time::timeout;

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(60);

struct Mill {
    // Processes end before the Redis and the folder they work with.
    scheduler: Daemon,
    _worker: Daemon,
    _redis: RedisServer,
    place: Place,
}

impl Mill {
    /// A scheduler and a worker with these models and settings.
    async fn new(models: &[&str], settings: &str) -> Self {
        let place = Place::new().await;
        let listed = format!("models: [{}]", models.join(", ").replace("litellm_", ""));
        std::fs::write(place.path().join("configs/litellm_models.yaml"), listed).unwrap();
        std::fs::write(place.path().join("genmill.toml"), settings).unwrap();
        let redis = RedisServer::start().unwrap();
        let start = |daemon: &str| {
            let start = place.start(daemon).env("GENMILL__REDIS__URL", &redis.url());
            let start = start.env("HOSTED_VLLM_API_BASE", &place.provider.base_url()).env("GROQ_API_KEY", "sk-groq");
            let start = start.env("GROQ_API_BASE", &place.provider.base_url());
            start.env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0").until_ready().unwrap()
        };
        let scheduler = start("genmill-scheduler");
        let worker = start("genmill-worker-api");
        Self { scheduler, _worker: worker, _redis: redis, place }
    }

    async fn client(&self, model: &str) -> Client {
        let client = client(&self.scheduler).await;
        let served = async { while !client.is_available(model).await.unwrap() {} };
        timeout(WITHIN, served).await.unwrap();
        client
    }

    /// The contents of all calls, in the order in which they came.
    fn called(&self) -> Vec<String> {
        self.place.provider.calls().into_iter().map(|call| call.content).collect()
    }
}

async fn finished(client: &Client, request: Request) -> v1::Job {
    let id = client.submit(request).await.unwrap().job.id;
    place::finished(client, &id).await
}

/// Why a model is held back, once it is, as `genmill lanes` tells.
async fn held_back(client: &Client, model: &str) -> v1::HeldBackReason {
    let looking = async {
        loop {
            let lanes = client.list_lanes().await.unwrap();
            let mut held = lanes.into_iter().flat_map(|lane| lane.held_back);
            if let Some(held) = held.find(|held| held.model == model) {
                return held.reason();
            }
        }
    };
    timeout(WITHIN, looking).await.expect("it is never held back")
}

const BROKEN: &str = "litellm_openai/broken!status=402";
const SLOWED: &str = "litellm_groq/slowed!status=429,retry-after=60";

#[tokio::test(flavor = "multi_thread")]
async fn a_fallback_passes_the_gates_of_its_own_model() {
    let settings = format!("[[api.fallbacks]]\nmodel = '{BROKEN}'\nto = ['{SLOWED}', '{MODEL}']\n");
    let mill = Mill::new(&[BROKEN, SLOWED, MODEL], &settings).await;
    let client = mill.client(BROKEN).await;
    for word in ["one", "two", "three"] {
        let job = finished(&client, Request::new(BROKEN).prompt(word)).await;
        let result = job.result.unwrap();
        assert_eq!((result.text.as_str(), result.answered_by.as_str()), (word, MODEL));
        assert_eq!(job.attempt_history.len(), 1);
    }
    // The second model was asked once: its gate is shut for a minute, for whatever job, and everybody sees it.
    let slowed = mill.called().into_iter().filter(|content| content.starts_with("slowed")).count();
    assert_eq!((slowed, mill.called().len()), (1, 7), "{:?}", mill.called());
    assert_eq!(held_back(&client, SLOWED).await, v1::HeldBackReason::Throttled);
    let (_, said, _) = mill.place.genmill(&mill.scheduler, &["lanes"]);
    assert!(said.contains(&format!("{SLOWED} is held back until 20")), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_own_failure_lasts_does_not_come_back_because_its_fallback_is_throttled() {
    let settings = format!("[[api.fallbacks]]\nmodel = '{BROKEN}'\nto = ['{SLOWED}']\n");
    let mill = Mill::new(&[BROKEN, SLOWED], &settings).await;
    let client = mill.client(BROKEN).await;
    let job = finished(&client, Request::new(BROKEN).prompt("one")).await;
    assert_eq!(job.error.unwrap().error_class(), v1::ErrorClass::Quota);
    assert_eq!((job.attempt_history.len(), mill.called().len()), (1, 2), "{:?}", mill.called());
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_a_model_that_is_held_back_do_not_wait_where_another_one_answers() {
    let settings = format!("[[api.fallbacks]]\nmodel = '{SLOWED}'\nto = ['{MODEL}']\n");
    // Its name has a comma.
    let mill = Mill::new(&[&format!("'{SLOWED}'"), MODEL], &settings).await;
    let client = mill.client(SLOWED).await;
    for word in ["one", "two", "three"] {
        let job = finished(&client, Request::new(SLOWED).prompt(word)).await;
        let result = job.result.unwrap();
        assert_eq!((result.text.as_str(), result.answered_by.as_str()), (word, MODEL));
    }
    let slowed = mill.called().into_iter().filter(|content| content.starts_with("slowed")).count();
    assert_eq!((slowed, mill.called().len()), (1, 4), "it is left alone for its minute: {:?}", mill.called());
    assert_eq!(held_back(&client, SLOWED).await, v1::HeldBackReason::Throttled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_keys_has_gates_as_well() {
    let (dead, asks) = ("litellm_hosted_vllm/dead!keyless!status=502", "litellm_openai/asks!status=402");
    let settings = format!("[worker]\nretries_max = 9\n[[api.fallbacks]]\nmodel = '{asks}'\nto = ['{dead}']\n");
    let mill = Mill::new(&[dead, asks], &settings).await;
    let client = mill.client(dead).await;
    client.submit(Request::new(dead).prompt("hi")).await.unwrap();
    // Five failures in a row open its circuit, whoever called.
    assert_eq!(held_back(&client, dead).await, v1::HeldBackReason::Failing);
    assert_eq!(mill.called().len(), 5);
    let job = finished(&client, Request::new(asks).prompt("hi")).await;
    assert_eq!(job.error.unwrap().error_class(), v1::ErrorClass::Quota, "its fallback is not asked while it is spared");
    let called = mill.called();
    assert!(
        called.len() <= 7 && called.iter().filter(|content| content.starts_with("asks")).count() == 1,
        "{called:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_call_is_booked_as_estimated_and_so_is_its_job() {
    let mill = Mill::new(&[MODEL], "").await;
    let client = mill.client(MODEL).await;
    let prompt = "!cut-after=2 times=1 one two three";
    let job = finished(&client, Request::new(MODEL).prompt(prompt)).await;
    let costs: Vec<(u64, bool)> = (job.attempt_history.iter())
        .map(|line| line.cost.as_ref().map(|cost| (cost.nanodollars, cost.estimated)).unwrap())
        .collect();
    // At $0.15 and $0.60 per million: 9 and 2 tokens of 4 bytes are estimated, 5 and 3 were told.
    assert_eq!(costs, [(9 * 150 + 2 * 600, true), (5 * 150 + 3 * 600, false)]);
    let cost = job.cost.unwrap();
    assert_eq!((cost.nanodollars, cost.estimated), (costs[0].0 + costs[1].0, true));
    let (_, said, _) = mill.place.genmill(&mill.scheduler, &["get", &job.id]);
    assert!(said.contains("~$0.0000051"), "{said}");
    // A job that was cancelled in the middle of its answer is billed in part as well.
    let id = client.submit(Request::new(MODEL).prompt("!stall-after=2 a b c")).await.unwrap().job.id;
    let written = async { while mill.place.provider.bill().completion_tokens < 7 {} };
    timeout(WITHIN, written).await.unwrap();
    client.cancel(&id).await.unwrap();
    let cancelled = place::finished(&client, &id).await;
    assert!(
        cancelled.cost.is_some_and(|cost| cost.estimated && cost.nanodollars > 0),
        "{:?}",
        cancelled.attempt_history
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_call_has_a_permit_of_its_own_and_goes_out_only_with_one() {
    let alone = "litellm_groq/alone";
    let settings = format!(
        "[[api.hedging]]\nmodel = 'litellm_*'\nafter_ms = 100\n\
         [[limits]]\nprovider = 'groq'\nmodel = '{alone}'\nconcurrency = 1\n"
    );
    let mill = Mill::new(&[MODEL, alone], &settings).await;
    let client = mill.client(MODEL).await;
    let prompt = "!sleep=3000 times=1 one two";
    let job = finished(&client, Request::new(MODEL).prompt(prompt)).await;
    assert_eq!(job.result.unwrap().text, "one two");
    assert_eq!(
        (job.attempt_history.len(), mill.called().len()),
        (1, 2),
        "two calls in one attempt: {:?}",
        mill.called()
    );
    assert!(job.cost.unwrap().estimated, "what the slow call cost is not told");
    // Where only one call may be in flight, there is no second.
    let job = finished(&client, Request::new(alone).prompt(prompt)).await;
    assert_eq!((job.result.unwrap().text.as_str(), mill.called().len()), ("one two", 3));
    // The permits came back: as many calls as before go out at once, with as many more beside them.
    let ids = futures_util::future::join_all((0..16).map(|n| {
        let request = Request::new(MODEL).prompt(format!("!sleep=400 times=1 more{n}"));
        async { finished(&client, request).await }
    }));
    for job in ids.await {
        assert_eq!((job.state(), job.attempt_history.len()), (v1::JobState::Succeeded, 1));
    }
    let most = mill.place.provider.bill().most_at_once["gpt-4o-mini"];
    assert!((17..=32).contains(&most), "{most}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_of_a_tenant_is_answered_from_what_is_kept() {
    let mill = Mill::new(&[MODEL], "[api]\ncache_ttl_ms = 600000\n").await;
    let client = mill.client(MODEL).await;
    let greedy = |prompt: &str| Request::new(MODEL).prompt(prompt).temperature(0.0);
    let check = async |request: Request, cached: bool, what: &str| {
        let before = mill.called().len();
        let job = finished(&client, request).await;
        let result = job.result.unwrap();
        let (cost, calls) = (job.cost.unwrap(), mill.called().len() - before);
        assert_eq!((result.cached, calls, cost.nanodollars == 0), (cached, usize::from(!cached), cached), "{what}");
        assert_eq!(result.usage.unwrap().completion_tokens, 2, "{what}");
        result.text
    };
    assert_eq!(check(greedy("one two"), false, "the first").await, "one two");
    assert_eq!(check(greedy("one two"), true, "the same, for which another seed is drawn").await, "one two");
    check(greedy("one two").tenant("other"), false, "of another tenant").await;
    check(greedy("one three"), false, "another prompt").await;
    check(greedy("one two").max_tokens(9), false, "with another bound").await;
    let warm = |prompt: &str| Request::new(MODEL).prompt(prompt).temperature(0.7);
    check(warm("one four"), false, "warm").await;
    check(warm("one four"), false, "warm again: each is another sample").await;
    check(warm("one four").seed(7), false, "warm with a seed").await;
    check(warm("one four").seed(7), true, "the same seed").await;
    check(warm("one four").seed(8), false, "another seed").await;
    // What failed is not kept, and what a watcher sees of a kept answer is its text.
    let failed = greedy("!status=400 times=1 one five");
    assert_eq!(finished(&client, failed).await.state(), v1::JobState::Failed);
    check(greedy("!status=400 times=1 one five"), false, "after a failure").await;
    let (_, said, _) =
        mill.place.genmill(&mill.scheduler, &["submit", "--model", MODEL, "--temperature", "0", "--prompt", "one two"]);
    assert_eq!(said.trim(), "one two");
    assert_eq!(mill.called().len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_answers_take_no_more_than_they_may() {
    let redis = RedisServer::start().unwrap();
    let queue = Queue::connect(&Options { url: redis.url(), namespace: "kept".to_owned() }).await.unwrap();
    let tenant = Tenant::parse("t").unwrap();
    let answer = |bytes: usize| Generation::new("x".repeat(bytes), FinishReason::Stop);
    let keep = Keep { ttl_ms: 600_000, bytes_max: 3_000 };
    let kept = async || {
        let mut kept = Vec::new();
        for name in 0..8_u8 {
            kept.extend(queue.answer(&tenant, &[name; 32]).await.unwrap().map(|_| name));
        }
        kept
    };
    for name in 0..4 {
        queue.keep_answer(&tenant, &[name; 32], &answer(800), keep).await.unwrap();
    }
    assert_eq!(kept().await, [1, 2, 3], "the oldest has gone");
    for _ in 0..9 {
        queue.keep_answer(&tenant, &[1; 32], &answer(700), keep).await.unwrap();
    }
    assert_eq!(kept().await, [1, 2, 3], "one that is kept again counts once");
    queue.keep_answer(&tenant, &[4; 32], &answer(1_200), keep).await.unwrap();
    assert_eq!(kept().await, [1, 3, 4], "as many have gone as had to");
    queue.keep_answer(&tenant, &[5; 32], &answer(3_100), keep).await.unwrap();
    assert_eq!(kept().await, [1, 3, 4], "what is larger than all may be drives nothing out");
    assert_eq!(queue.answer(&tenant, &[4; 32]).await.unwrap(), Some(answer(1_200)));
    assert_eq!(queue.answer(&Tenant::parse("u").unwrap(), &[4; 32]).await.unwrap(), None);
    // Those that have expired make room.
    let short = Keep { ttl_ms: 1, ..keep };
    queue.keep_answer(&tenant, &[6; 32], &answer(100), short).await.unwrap();
    let gone = async { while kept().await.contains(&6) {} };
    timeout(WITHIN, gone).await.unwrap();
    queue.keep_answer(&tenant, &[7; 32], &answer(50), keep).await.unwrap();
    assert_eq!(kept().await, [1, 4, 7], "the short one took the place of the oldest, and left it");
}
