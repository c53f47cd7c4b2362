//! The API worker as a process, with providers of several dialects, keys in files and a provider of the user's own.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, v1};
use genmill_tests::daemons::{Daemon, Start};
use genmill_tests::place::{self, Place, client};
use genmill_tests::redis_server::RedisServer;
use std::time::Duration;
use tokio::time::timeout;

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(60);

const MODELS: [&str; 4] =
    ["litellm_gpt-4o-mini", "litellm_claude-haiku-4-5", "litellm_gemini-2.5-flash", "litellm_mine/some-model"];

/// A model whose provider wants to be paid first; another answers in its place.
const POOR: &str = "litellm_mine/poor!status=402";

/// A scheduler and an API worker, without the rest of a mill.
struct Mill {
    // Processes end before the Redis and the folder they work with.
    scheduler: Daemon,
    _worker: Daemon,
    redis: RedisServer,
    place: Place,
}

impl Mill {
    async fn new() -> Self {
        let place = Place::new().await;
        let (configs, provider) = (place.path().join("configs"), &place.provider);
        let listed = "models: [gpt-4o-mini, claude-haiku-4-5, gemini-2.5-flash, mine/some-model, mine/poor!status=402, blind/model, xai/grok-4]";
        std::fs::write(configs.join("litellm_models.yaml"), listed).unwrap();
        let own = format!("[mine]\nbase_url = '{}'\nkeys = ['MINE_KEY']\ndialect = 'openai'\n", provider.base_url());
        let blind = own.replace("[mine]", "[blind]") + "drop = ['images']\n";
        let own = own + &blind;
        std::fs::write(configs.join("providers.toml"), own).unwrap();
        let fallbacks = format!("[[api.fallbacks]]\nmodel = '{}'\nto = ['{}']\non = ['quota']\n", POOR, MODELS[0]);
        std::fs::write(place.path().join("genmill.toml"), fallbacks).unwrap();
        std::fs::write(configs.join(".env"), "MINE_KEY=sk-mine\nANTHROPIC_API_KEY=sk-far\n").unwrap();
        std::fs::write(place.path().join(".env"), "ANTHROPIC_API_KEY=sk-near\nGOOGLE_API_KEY=sk-google\n").unwrap();
        let redis = RedisServer::start().unwrap();
        let scheduler = start(&place, &redis, "genmill-scheduler").until_ready().unwrap();
        let worker = start(&place, &redis, "genmill-worker-api").until_ready().unwrap();
        Self { scheduler, _worker: worker, redis, place }
    }

    /// A client, once all models can be asked for.
    async fn client(&self) -> Client {
        let client = client(&self.scheduler).await;
        for model in MODELS {
            let served = async { while !client.is_available(model).await.unwrap() {} };
            timeout(WITHIN, served).await.expect(model);
        }
        client
    }

    fn providers(&self, arguments: &[&str]) -> (Option<i32>, String) {
        self.told("providers", arguments)
    }

    /// What `genmill COMMAND` says.
    fn told(&self, command: &str, arguments: &[&str]) -> (Option<i32>, String) {
        let start = start(&self.place, &self.redis, "genmill").args(&[command]).args(arguments);
        let server = format!("http://{}", self.scheduler.place("grpc"));
        let output = start.env("GENMILL_SERVER", &server).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout) + &text(output.stderr))
    }
}

fn start(place: &Place, redis: &RedisServer, binary: &str) -> Start {
    let origin = place.provider.origin();
    place
        .start(binary)
        .env("GENMILL__REDIS__URL", &redis.url())
        .env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0")
        .env("ANTHROPIC_API_BASE", &origin)
        .env("GEMINI_API_BASE", &format!("{origin}/v1beta"))
}

async fn finished(client: &Client, model: &str, prompt: &str) -> v1::Job {
    let id = client.submit(Request::new(model).prompt(prompt)).await.unwrap().job.id;
    place::finished(client, &id).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_provider_answers_through_the_queue_each_in_its_dialect() {
    let mill = Mill::new().await;
    let client = mill.client().await;
    for model in MODELS {
        // The first call fails, so that the job is tried again.
        let job = finished(&client, model, "!status=529 times=1 !split-utf8 !echo=grüße 世界 🦀").await;
        assert_eq!(job.state(), v1::JobState::Succeeded, "{model}: {:?}", job.error);
        assert_eq!(job.attempt_history.len(), 2, "{model}");
        let result = job.result.unwrap();
        assert_eq!(result.text, "grüße 世界 🦀", "{model}");
        assert_eq!(result.usage.unwrap().completion_tokens, 3, "{model}");
        assert_eq!(job.cost.is_some(), model != "litellm_mine/some-model", "{model}: what has a price is priced");
        let left_out: &[&str] = if model.contains("claude") { &["seed"] } else { &[] };
        assert_eq!(result.left_out_parameters, left_out, "{model}");
    }
    let mut keys: Vec<String> = mill.place.provider.calls().into_iter().map(|call| call.key).collect();
    keys.dedup();
    assert_eq!(keys, ["sk-test", "sk-near", "sk-google", "sk-mine"]);
    let replaced = finished(&client, POOR, "hi").await;
    assert_eq!(replaced.attempt_history.len(), 1, "another model answers within the attempt: {replaced:?}");
    let result = replaced.result.unwrap();
    assert_eq!((result.text.as_str(), result.answered_by.as_str()), ("hi", MODELS[0]));
    let refused = finished(&client, MODELS[1], "!status=400").await;
    assert_eq!(refused.error.unwrap().error_class(), v1::ErrorClass::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_go_to_models_that_see_and_are_never_left_out() {
    let mill = Mill::new().await;
    let client = mill.client().await;
    let picture = mill.place.path().join("picture.png");
    std::fs::write(&picture, b"\x89PNG\r\n\x1a\n").unwrap();
    let submit = |model: &str, more: &[&str]| {
        let line = ["--prompt", "Which animal?", "--image", picture.to_str().unwrap(), "--request-id", "once"];
        mill.told("submit", &[&["--model", model], &line[..], more].concat())
    };
    for model in MODELS {
        assert_eq!(
            submit(model, &["--tenant", &model.replace(['/', '_'], "-")]),
            (Some(0), "Which animal?\n".to_owned())
        );
        let received = mill.place.provider.requests().pop().unwrap().body.to_string();
        assert!(received.contains("iVBORw0KGgo=") && received.contains("image/png"), "{model}: {received}");
    }
    let again = submit(MODELS[0], &["--tenant", "litellm-gpt-4o-mini"]);
    assert_eq!((again.0, mill.place.provider.calls().len()), (Some(0), MODELS.len()), "the same image is the same job");
    std::fs::write(&picture, b"GIF89a").unwrap();
    let (code, told) = submit(MODELS[0], &["--tenant", "litellm-gpt-4o-mini"]);
    assert!(code == Some(1) && told.contains("differs in: input"), "{told}");
    let (code, told) = submit("litellm_blind/model", &[]);
    assert!(code == Some(1) && told.contains("blind does not take images for model"), "{told}");
    assert_eq!(mill.place.provider.calls().len(), MODELS.len(), "nothing is asked without its image");
    let at = "https://example.com/cat.jpg";
    let parts = [v1::ContentPart::image_url(at), v1::ContentPart::text("Which animal?")];
    let job = client.submit(Request::new(MODELS[1]).user_parts(parts.clone())).await.unwrap().job;
    let Some(v1::generation_request::Input::Messages(told)) = job.request.unwrap().input else { panic!() };
    assert_eq!((told.messages[0].content.as_str(), &told.messages[0].parts[1]), ("", &parts[1]));
    for (bad, says) in [
        (v1::ContentPart::image_url("file:///etc/passwd"), "http:// or https://"),
        (v1::ContentPart::image(*b"%PDF"), "PNG, JPEG, GIF or WebP"),
        (v1::ContentPart::default(), "text or an image"),
    ] {
        let refused = client.submit(Request::new(MODELS[1]).user_parts([bad])).await.unwrap_err().to_string();
        assert!(refused.contains(says), "{refused}");
    }
    let large = [b"\x89PNG\r\n\x1a\n", &[0; 2 << 20][..]].concat();
    let refused = client.submit(Request::new(MODELS[1]).user_parts([v1::ContentPart::image(large)])).await.unwrap_err();
    assert!(refused.to_string().contains("bytes of text and images"), "{refused}");
    // Texts alone are a text, which also models can have that do not see.
    let words = ["Which ", "animal?"].map(v1::ContentPart::text);
    let job = client.submit(Request::new(MODELS[1]).user_parts(words)).await.unwrap().job;
    let Some(v1::generation_request::Input::Messages(told)) = job.request.unwrap().input else { panic!() };
    assert_eq!((told.messages[0].content.as_str(), told.messages[0].parts.len()), ("Which animal?", 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_wait_while_their_provider_asks_to_be_spared() {
    let mill = Mill::new().await;
    let client = mill.client().await;
    let model = MODELS[0];
    let throttled =
        "!status=429 times=1 header=x-ratelimit-remaining-requests:0 header=x-ratelimit-reset-requests:2s a";
    let first = client.submit(Request::new(model).prompt(throttled)).await.unwrap().job.id;
    let told = async { while client.get(&first).await.unwrap().attempt_history.is_empty() {} };
    timeout(WITHIN, told).await.expect("the first call is refused, and the queue knows");
    // These find the gate shut; they wait without a failure, and without a call before the time.
    let waiting = futures_util::future::join_all((0..5).map(|n| {
        let client = &client;
        async move { finished(client, model, &format!("wait {n}")).await }
    }));
    for job in waiting.await {
        assert_eq!((job.state(), job.failures), (v1::JobState::Succeeded, 0), "{:?}", job.attempt_history);
    }
    let calls = mill.place.provider.calls();
    let refused_at = calls[0].ended.unwrap();
    assert!(calls[1..].iter().all(|call| call.begun >= refused_at + Duration::from_millis(1_900)), "{calls:?}");
    let ending = async { while client.get(&first).await.unwrap().finished_at.is_none() {} };
    timeout(WITHIN, ending).await.expect("the first job does not end");
    let first = client.get(&first).await.unwrap();
    assert_eq!((first.state(), first.failures), (v1::JobState::Succeeded, 0), "to be asked to wait is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn published_prices_are_compared_taken_over_and_charged() {
    let mill = Mill::new().await;
    let client = mill.client().await;
    // 1 and 2 dollars per million tokens, where nothing was known before.
    let published = mill.place.path().join("published.json");
    let json = r#"{"mine/some-model": {"litellm_provider": "mine", "mode": "chat", "input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06}}"#;
    std::fs::write(&published, json).unwrap();
    let from = published.to_str().unwrap();
    let (code, out) = mill.told("prices", &["show", "litellm_mine/some-model"]);
    assert!(code == Some(1) && out.contains("no price is known"), "{out}");
    let (code, out) = mill.told("prices", &["diff", "--from", from]);
    assert!(code == Some(0) && out.contains("+ mine some-model") && out.contains("input 1, output 2"), "{out}");
    let (code, out) = mill.told("prices", &["update", "--from", from, "--day", "2026-01-02"]);
    assert!(code == Some(0) && out.contains("1 prices are new, 0 are others from 2026-01-02 on"), "{out}");
    let (code, out) = mill.told("prices", &["show", "litellm_mine/some-model"]);
    assert!(code == Some(0) && out.contains("mine some-model, from 2026-01-02: input 1, output 2"), "{out}");
    let (code, out) = mill.told("prices", &["diff", "--from", "genmill.toml"]);
    assert!(code == Some(2) && out.contains("is neither LiteLLM's JSON file of prices nor CSV"), "{out}");
    let before = finished(&client, MODELS[3], "one two").await;
    assert_eq!(before.cost, None, "a worker takes prices over when it starts");
    let Mill { scheduler: _scheduler, _worker, redis, place } = mill;
    drop(_worker);
    let _worker = start(&place, &redis, "genmill-worker-api").until_ready().unwrap();
    let after = finished(&client, MODELS[3], "one two three").await;
    assert_eq!(after.cost.unwrap().nanodollars, 3 * 1_000 + 3 * 2_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn providers_are_listed_shown_and_tested() {
    let mill = Mill::new().await;
    let (code, out) = mill.providers(&["list", "--ready"]);
    assert_eq!(code, Some(0), "{out}");
    for name in ["anthropic", "gemini", "mine", "openai"] {
        assert!(
            out.lines().any(|line| line.starts_with(&format!("{name} ")) && line.ends_with("ready")),
            "{name}: {out}"
        );
    }
    assert!(!out.contains("\nxai "), "{out}");
    let (code, out) = mill.providers(&["list"]);
    assert!(code == Some(0) && out.lines().any(|line| line.starts_with("xai ") && line.ends_with("set XAI_API_KEY")));
    let (code, out) = mill.providers(&["show", "mine"]);
    assert!(code == Some(0) && out.contains("from MINE_KEY") && !out.contains("sk-mine"), "{out}");
    let (code, out) = mill.providers(&["show", "perplexity"]);
    assert!(
        code == Some(0) && out.contains("address        https://api.perplexity.ai"),
        "without a key as well: {out}"
    );
    let (code, out) = mill.providers(&["show", "antropic"]);
    assert!(code == Some(2) && out.contains("did you mean `anthropic`?"), "{out}");
    for name in ["anthropic", "gemini", "mine"] {
        let (code, out) = mill.providers(&["test", name]);
        assert!(code == Some(0) && out.starts_with(&format!("{name}: ok, 2 models, ")), "{out}");
    }
    let (code, out) = mill.providers(&["test", "mine", "--model", "nope"]);
    assert!(code == Some(1) && out.contains("lists 2 models, but not nope"), "{out}");
    let openrouter = |key: &str| {
        let start = start(&mill.place, &mill.redis, "genmill").env("OPENROUTER_API_KEY", key);
        let start = start.env("OPENROUTER_BASE_URL", &mill.place.provider.base_url());
        let output = start.args(&["providers", "test", "openrouter"]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    for (key, code, says) in [
        ("sk-management-left-74.75", 0, "openrouter: credit of $74.75"),
        ("sk-management-left-4.5", 0, "openrouter: WARNING: credit of $4.50"),
        ("sk-left-0.25", 0, "openrouter: LOW: credit of $0.25"),
        ("sk-plain", 0, "openrouter: WARNING: its credit is not known"),
        ("sk-management-left--3", 1, "openrouter: FAILED: its credit is used up (-$3.00)"),
        ("bad-key", 1, "openrouter: FAILED: openrouter refused the key (HTTP 401"),
    ] {
        let (exited, out) = openrouter(key);
        assert!(exited == Some(code) && out.contains(says) && !out.contains("bad-key"), "{key}: {out}");
    }
    let (code, out) = mill.providers(&["test", "xai"]);
    assert!(code == Some(1) && out.contains("set XAI_API_KEY"), "{out}");
}
