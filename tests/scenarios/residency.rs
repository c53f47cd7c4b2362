//! Several local models in one worker: loaded when jobs wait for them, within a memory for fewer than all of them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, Until, v1};
use genmill_tests::daemons::{Daemon, Start};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio_stream::StreamExt as _;

const NAMES: [&str; 3] = ["vllm_a", "vllm_b", "vllm_c"];

/// Each of the models takes about 850 KiB with these settings.
const SIZES: [(&str, &str); 3] =
    [("GENMILL__GPU__SEQUENCES_MAX", "4"), ("GENMILL__GPU__STEP_TOKENS", "32"), ("GENMILL__GPU__KV_TOKENS", "512")];

/// Room for two of them, not for three.
const MEMORY_FOR_TWO: &str = "2000KiB";

/// Weights and buffers, and not all the keys and values that one could use.
const MEMORY_FOR_LESS_THAN_ONE: &str = "780KiB";

/// How long something may take to come about. Generous: test machines are shared.
const PATIENCE: Duration = Duration::from_secs(60);

struct Mill {
    // Dropped after the processes that use it.
    daemon: Daemon,
    folder: TempDir,
    client: Client,
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/engine/tests/fixtures/qwen2")
}

fn copy_model(to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(fixture()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

impl Mill {
    /// A mill with three models of one shape, after `prepare` has had its way with its folder.
    async fn up(variables: &[(&str, &str)], prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let configs = folder.path().join("configs");
        std::fs::create_dir(&configs).unwrap();
        let mut listed = "models:\n".to_owned();
        for name in ["a", "b", "c"] {
            copy_model(&folder.path().join(name));
            writeln!(listed, "  - {{name: {name}, model_path: ../{name}, threads: 1}}").unwrap();
        }
        std::fs::write(configs.join("vllm_models.yaml"), listed).unwrap();
        prepare(folder.path());
        let log = File::create(folder.path().join("log")).unwrap();
        let start = Start::new("genmill", folder.path()).unwrap().args(&["up", "--listen", "127.0.0.1:0"]).logs_to(log);
        let start = SIZES.iter().chain(variables).fold(start, |start, (name, value)| start.env(name, value));
        let daemon = start.until_ready().unwrap();
        let client = Client::connect(&format!("http://{}", daemon.place("grpc"))).await.unwrap();
        Self { daemon, folder, client }
    }

    async fn run(&self, request: Request) -> v1::Job {
        let id = self.client.submit(request).await.unwrap().job.id;
        self.client.watch(&id).map(Result::unwrap).collect::<Vec<_>>().await;
        self.client.get(&id).await.unwrap()
    }

    /// Waits until a model is as it should be.
    async fn until(&self, name: &str, what: impl Fn(&v1::Model) -> bool) -> v1::Model {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let model = self.client.model(name).await.unwrap();
            if what(&model) {
                return model;
            }
            assert!(Instant::now() < deadline, "{model:?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn ready(&self) -> BTreeSet<String> {
        let models = self.client.list_models().await.unwrap();
        models.into_iter().filter(|model| !model.ready_workers.is_empty()).map(|model| model.name).collect()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn times(&self, what: &str) -> usize {
        self.log().matches(what).count()
    }
}

fn text(job: &v1::Job) -> &str {
    match &job.result {
        Some(result) => &result.text,
        None => panic!("{:?}", job.error),
    }
}

fn request(n: usize) -> Request {
    let request = Request::new(NAMES[n % NAMES.len()]).prompt(format!("Job {n} is")).temperature(0.9);
    request.seed(n as u64).max_tokens(24).label("n", n.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn three_models_share_a_memory_for_two() {
    let mill = Mill::up(&[("GPU_MAX_MEMORY", MEMORY_FOR_TWO)], |_| ()).await;
    assert_eq!(mill.ready().await, BTreeSet::from(["vllm_a".to_owned(), "vllm_b".to_owned()]));
    let third = mill.client.model("vllm_c").await.unwrap();
    assert!(third.available && third.loading_workers.is_empty(), "{third:?}");
    assert_eq!((third.workers.len(), third.context_tokens), (1, Some(512)), "known before it is loaded");

    let mut alone = BTreeMap::new();
    for n in 0..6 {
        alone.insert(n.to_string(), text(&mill.run(request(n)).await).to_owned());
    }
    assert!(mill.ready().await.len() <= 2, "no more than two at a time");
    assert!(mill.times("gives its memory to others") >= 2, "one after the other: each makes way for the next");

    let requests: Vec<Request> = (0..90).map(|n| request(n).experiment("together")).collect();
    let submitted: Vec<_> = mill.client.submit_all(tokio_stream::iter(requests)).collect().await;
    assert!(submitted.iter().all(Result::is_ok));
    let filter = v1::JobFilter { experiment: "together".to_owned(), ..v1::JobFilter::default() };
    let finished: Vec<v1::Job> =
        mill.client.watch_jobs(filter, String::new(), Until::Idle).map(|next| next.unwrap().job).collect().await;
    assert_eq!(finished.len(), 90);
    for job in &finished {
        let n = &job.request.as_ref().unwrap().labels["n"];
        assert!(alone.get(n).is_none_or(|alone| alone == text(job)), "job {n} says {}", text(job));
        assert_eq!((job.losses, job.failures, job.error.as_ref()), (0, 0, None), "nothing is given up under its jobs");
    }
    let loads = mill.times("took=");
    assert!(loads <= 30, "{loads} loads for 96 jobs:\n{}", mill.log());
    // Claimed while their model was being given up, and handed back untouched.
    let again: u32 = finished.iter().map(|job| job.attempts - 1).sum();
    assert!(again as usize <= loads, "{again} more attempts with {loads} loads");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_can_never_fit_is_listed_with_the_numbers() {
    let mill = Mill::up(&[("GPU_MAX_MEMORY", "300KiB")], |_| ()).await;
    let model = mill.client.model("vllm_a").await.unwrap();
    assert!(!model.available);
    for part in ["it needs ", "of weights", "may take 300.0 KiB", "GPU_MAX_MEMORY"] {
        assert!(model.unavailable_reason.contains(part), "{}", model.unavailable_reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_memory_is_short_there_are_fewer_blocks_and_a_warning() {
    let mill = Mill::up(&[("GPU_MAX_MEMORY", MEMORY_FOR_LESS_THAN_ONE), ("MODEL_PRELOAD", "vllm_a")], |_| ()).await;
    assert!(!text(&mill.run(request(0)).await).is_empty());
    let log = mill.log();
    assert!(log.contains("memory is short") && log.contains("weights=") && log.contains("activations="), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_model_takes_nobody_down_and_is_tried_again_when_its_files_change() {
    let weights = |folder: &Path| folder.join("b/model.safetensors");
    let whole = std::fs::read(fixture().join("model.safetensors")).unwrap();
    let cut = whole[..whole.len() / 2].to_owned();
    let mill = Mill::up(&[], |folder| std::fs::write(weights(folder), cut).unwrap()).await;
    let broken = mill.client.model("vllm_b").await.unwrap();
    assert!(!broken.available && broken.unavailable_reason.contains("truncated"), "{broken:?}");
    assert!(!text(&mill.run(request(0)).await).is_empty(), "the others are served");
    std::fs::write(weights(mill.folder.path()), whole).unwrap();
    mill.until("vllm_b", |model| !model.ready_workers.is_empty()).await;
    assert!(!text(&mill.run(request(1)).await).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_named_is_preloaded_and_settings_without_effect_are_told() {
    let variables = [("MODEL_PRELOAD", "vllm_b"), ("MODEL_GPU_LAYERS", "-1"), ("GPU_TORCH_DTYPE", "float16")];
    let mill = Mill::up(&[&variables[..], &[("MODEL_CONTEXT_SIZE", "64")]].concat(), |_| ()).await;
    assert_eq!(mill.ready().await, BTreeSet::from(["vllm_b".to_owned()]));
    assert_eq!((mill.times("GPU_TORCH_DTYPE"), mill.times("MODEL_GPU_LAYERS")), (1, 1), "{}", mill.log());
    let job = mill.run(request(0).max_tokens(500)).await;
    let usage = job.result.unwrap().usage.unwrap();
    assert!(usage.prompt_tokens + usage.completion_tokens <= 64, "MODEL_CONTEXT_SIZE bounds it");
    mill.until("vllm_a", |model| !model.ready_workers.is_empty() && model.context_tokens == Some(64)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_holds_the_model_gets_the_job_before_one_that_would_have_to_load_it() {
    let mill = Mill::up(&[("MODEL_PRELOAD", "vllm_a")], |_| ()).await;
    let warm = mill.client.model("vllm_a").await.unwrap().ready_workers;
    // The same models in a second worker, at the same Redis, which holds none.
    let redis = mill.daemon.place("redis").to_owned();
    let log = File::create(mill.folder.path().join("cold.log")).unwrap();
    let start = Start::new("genmill-worker-gpu", mill.folder.path()).unwrap().logs_to(log);
    let start = start.env("GENMILL__REDIS__URL", &redis).env("MODEL_PRELOAD", "none");
    let _cold = SIZES.iter().fold(start, |start, (name, value)| start.env(name, value)).until_ready().unwrap();
    mill.until("vllm_a", |model| model.workers.len() == 2).await;
    for n in 0..40 {
        let job = mill.run(request(3 * n)).await;
        assert_eq!(job.worker, warm[0], "job {n}");
    }
    let model = mill.client.model("vllm_a").await.unwrap();
    assert_eq!(model.ready_workers, warm);
}
