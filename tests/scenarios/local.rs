//! Local models through a whole mill: real checkpoints, chats, seeds, and results that do not depend on the batch.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

#[path = "local/forms.rs"]
mod forms;
#[path = "local/sampling.rs"]
mod sampling;

use genmill_client::{Client, Outcome, Request, Until, v1};
use genmill_tests::daemons::{Daemon, Start};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;
use tokio_stream::StreamExt as _;

const QWEN2: &str = "vllm_qwen2";
const GPT2: &str = "hf_gpt2";

struct Mill {
    // Dropped after the processes that use it.
    daemon: Daemon,
    _folder: TempDir,
    client: Client,
}

impl Mill {
    /// A mill that serves the engine's two reference checkpoints.
    async fn up() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/engine/tests/fixtures");
        let configs = folder.path().join("configs");
        std::fs::create_dir(&configs).unwrap();
        let qwen2 = fixtures.join("qwen2");
        let listed = format!("models:\n  - name: qwen2\n    model_path: {}\n    description: tiny\n", qwen2.display());
        std::fs::write(configs.join("vllm_models.yaml"), listed).unwrap();
        std::fs::write(configs.join("hf_models.yaml"), "models: [gpt2, missing]").unwrap();
        let daemon = Start::new("genmill", folder.path())
            .unwrap()
            .args(&["up", "--listen", "127.0.0.1:0"])
            .env("MODELS_DIR", fixtures.to_str().unwrap())
            .env("GENMILL__GPU__DOLLARS_PER_HOUR", "3.6")
            .env("HF_HUB_OFFLINE", "1")
            .until_ready()
            .unwrap();
        let client = Client::connect(&format!("http://{}", daemon.place("grpc"))).await.unwrap();
        Self { daemon, _folder: folder, client }
    }

    async fn run(&self, request: Request) -> v1::Job {
        let id = self.client.submit(request).await.unwrap().job.id;
        self.client.watch(&id).map(Result::unwrap).collect::<Vec<_>>().await;
        self.client.get(&id).await.unwrap()
    }
}

fn text(job: &v1::Job) -> &str {
    match &job.result {
        Some(result) => &result.text,
        None => panic!("{:?}", job.error),
    }
}

fn reference(family: &str) -> serde_json::Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/engine/tests/fixtures").join(family);
    serde_json::from_str(&std::fs::read_to_string(file.join("reference.json")).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_texts_are_those_of_transformers() {
    let mill = Mill::up().await;
    for (model, family) in [(QWEN2, "qwen2"), (GPT2, "gpt2")] {
        for case in reference(family)["cases"].as_array().unwrap() {
            let prompt = case["prompt"].as_str().unwrap();
            let tokens = case["greedy_ids"].as_array().unwrap().len();
            let request =
                Request::new(model).prompt(prompt).temperature(0.0).max_tokens(u32::try_from(tokens).unwrap());
            let job = mill.run(request).await;
            assert_eq!(text(&job), case["greedy_text"].as_str().unwrap(), "{model}: {prompt}");
            let usage = job.result.as_ref().unwrap().usage.unwrap();
            assert_eq!(usage.prompt_tokens, u64::try_from(case["input_ids"].as_array().unwrap().len()).unwrap());
            assert_eq!(usage.completion_tokens, u64::try_from(tokens).unwrap());
            assert!(job.cost.is_some_and(|cost| cost.nanodollars > 0), "the engine's hour has a price");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn seeded_jobs_give_the_same_text_together_as_one_at_a_time() {
    let mill = Mill::up().await;
    let request = |n: u32| {
        let model = if n.is_multiple_of(2) { QWEN2 } else { GPT2 };
        let request = Request::new(model).prompt(format!("Job {n} is")).temperature(0.9).top_p(0.95).top_k(50);
        request.seed(u64::from(n)).max_tokens(40 + n).experiment("together").label("n", n.to_string())
    };
    let mut alone = BTreeMap::new();
    for n in 0..24 {
        alone.insert(n.to_string(), text(&mill.run(request(n)).await).to_owned());
    }
    let requests: Vec<Request> = (0..24).map(|n| request(n).experiment("again")).collect();
    let acknowledged: Vec<_> = mill.client.submit_all(tokio_stream::iter(requests)).collect().await;
    assert!(acknowledged.iter().all(|answer| matches!(answer.as_ref().unwrap().outcome, Outcome::Accepted { .. })));
    let filter = v1::JobFilter { experiment: "again".to_owned(), ..v1::JobFilter::default() };
    let finished: Vec<v1::Job> =
        mill.client.watch_jobs(filter, String::new(), Until::Idle).map(|next| next.unwrap().job).collect().await;
    let together: BTreeMap<String, String> =
        finished.iter().map(|job| (job.request.as_ref().unwrap().labels["n"].clone(), text(job).to_owned())).collect();
    assert_eq!(together, alone);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_rendered_by_the_models_template_and_refused_without_one() {
    let mill = Mill::up().await;
    let chat = reference("qwen2")["chat"].clone();
    let mut ask = Request::new(QWEN2).temperature(0.0).max_tokens(8);
    for message in chat["messages"].as_array().unwrap() {
        let content = message["content"].as_str().unwrap();
        ask = if message["role"] == "user" { ask.user(content) } else { ask.assistant(content) };
    }
    let answered = mill.run(ask).await;
    let rendered = Request::new(QWEN2).prompt(chat["rendered"].as_str().unwrap()).temperature(0.0).max_tokens(8);
    assert_eq!(text(&answered), text(&mill.run(rendered).await));

    let job = mill.run(Request::new(GPT2).user("Hello")).await;
    let error = job.error.unwrap();
    assert_eq!((job.attempts, error.error_class()), (1, v1::ErrorClass::Invalid));
    assert!(error.message.contains("chat_template.jinja"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_text_and_the_context_ends_it_too() {
    let mill = Mill::up().await;
    let whole = mill.run(Request::new(QWEN2).prompt("The scheduler").temperature(0.0).max_tokens(60)).await;
    let stop: String = text(&whole).chars().skip(20).take(4).collect();
    let expected = text(&whole).split(&stop).next().unwrap();
    let stopped =
        mill.run(Request::new(QWEN2).prompt("The scheduler").temperature(0.0).max_tokens(60).stop(&stop)).await;
    assert_eq!(text(&stopped), expected);
    assert_eq!(stopped.result.unwrap().finish_reason(), v1::FinishReason::Stop);

    let long = mill.run(Request::new(GPT2).prompt("Go on").temperature(1.0).seed(3).max_tokens(100_000)).await;
    let usage = long.result.as_ref().unwrap().usage.unwrap();
    assert!(usage.prompt_tokens + usage.completion_tokens <= 256, "the context of this model is 256");
    let full = mill.run(Request::new(GPT2).prompt("again and ".repeat(400))).await;
    let error = full.error.unwrap();
    assert_eq!(error.error_class(), v1::ErrorClass::Invalid);
    assert!(error.message.contains("256"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_whose_path_is_missing_is_listed_with_the_reason() {
    let mill = Mill::up().await;
    let missing = mill.client.model("hf_missing").await.unwrap();
    assert!(!missing.available);
    assert!(missing.unavailable_reason.contains("MODELS_DIR"), "{}", missing.unavailable_reason);
    let served = mill.client.model(QWEN2).await.unwrap();
    assert!(served.available, "{}", served.unavailable_reason);
    assert_eq!((served.description.as_str(), served.context_tokens, served.workers.len()), ("tiny", Some(512), 1));
    assert!(!mill.daemon.place("http").is_empty());
}
