//! Workers on simulated GPUs through a whole mill: many of them at once, and one that hangs.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Request, v1};
use genmill_tests::daemons::{Daemon, Start};
use genmill_tests::place::{check_all_succeeded_once, results, submit_all};
use genmill_tests::redis_server::RedisServer;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(60);

/// A scheduler and a Redis; workers come and go.
struct Mill {
    // Dropped after the processes that use it.
    client: Client,
    _scheduler: Daemon,
    redis: RedisServer,
    folder: TempDir,
}

impl Mill {
    async fn up() -> Self {
        let (redis, folder) = (RedisServer::start().unwrap(), tempfile::tempdir().unwrap());
        write_model(&folder.path().join("model"));
        let start = Start::new("genmill-scheduler", folder.path()).unwrap();
        let start = start.env("GENMILL__REDIS__URL", &redis.url()).env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0");
        let scheduler = start.until_ready().unwrap();
        let client = Client::connect(&format!("http://{}", scheduler.place("grpc"))).await.unwrap();
        Self { client, _scheduler: scheduler, redis, folder }
    }

    /// Where a worker of that name runs.
    fn place(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A worker with so many models, `m0` and so on, each on a device of its own.
    fn worker(&self, name: &str, models: usize, device: &str) -> Start {
        let place = self.place(name);
        std::fs::create_dir_all(place.join("configs")).unwrap();
        let row = |n| format!("  - {{name: m{n}, model_path: ../../model, device: \"{device}\"}}\n");
        let listed: String = (0..models).map(row).collect();
        std::fs::write(place.join("configs/vllm_models.yaml"), format!("models:\n{listed}")).unwrap();
        Start::new("genmill-worker-gpu", &place)
            .unwrap()
            .env("GENMILL__REDIS__URL", &self.redis.url())
            .env("GENMILL__WORKER__LEASE_MS", "3000")
            .env("GENMILL__WORKER__HEARTBEAT_MS", "500")
            .env("GENMILL__GPU__DOLLARS_PER_HOUR", "3.6")
            .logs_to(File::create(place.join("log")).unwrap())
    }
}

/// Llama 3.1 70B's shape with the words of a tiny model. A step takes 29 ms on an H200 at least.
fn write_model(folder: &Path) {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/engine/tests/fixtures/llama3");
    std::fs::create_dir(folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(file), folder.join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(fixture.join("config.json")).unwrap()).unwrap();
    let shape = [("hidden_size", 8_192), ("num_hidden_layers", 80), ("num_attention_heads", 64)];
    let rest = [("num_key_value_heads", 8), ("head_dim", 128), ("intermediate_size", 28_672)];
    for (field, value) in shape.into_iter().chain(rest) {
        config[field] = value.into();
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// The value of a metric, added up over all models.
fn metric(worker: &Daemon, name: &str) -> f64 {
    let mut connection = TcpStream::connect(worker.place("http")).unwrap();
    connection.write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    connection.read_to_string(&mut text).unwrap();
    let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_simulated_gpus_share_thousands_of_jobs_and_give_the_same_texts() {
    const WORKERS: usize = 5;
    const JOBS: u64 = 3_000;
    let mill = Mill::up().await;
    let start = |n: usize| mill.worker(&format!("w{n}"), 10, "simulated:h200").until_ready().unwrap();
    let mut workers: Vec<Daemon> = (0..WORKERS).map(start).collect();
    // Each model gets each of thirty requests ten times.
    let request = |n: u64| {
        let request = Request::new(format!("vllm_m{}", n % 10)).prompt(format!("Question {} is", n / 10 % 30));
        request.seed(n / 10 % 30).temperature(1.0).max_tokens(20).experiment("all").label("of", (n % 300).to_string())
    };
    let ids = submit_all(&mill.client, (0..JOBS).map(request).collect()).await;
    let jobs = results(&mill.client, "all").await.unwrap();
    check_all_succeeded_once(&jobs, &ids);

    let mut texts: BTreeMap<&str, &str> = BTreeMap::new();
    let mut by_worker: BTreeMap<&str, usize> = BTreeMap::new();
    for job in &jobs {
        let result = job.result.as_ref().unwrap();
        let first = texts.entry(&job.request.as_ref().unwrap().labels["of"]).or_insert(&result.text);
        assert_eq!(*first, result.text, "another worker, another batch, the same text");
        assert_eq!(result.determinism(), v1::Determinism::Bitwise);
        assert!(result.fingerprint.contains("/bfloat16/simulated/h200/"), "{}", result.fingerprint);
        *by_worker.entry(&job.worker).or_default() += 1;
    }
    assert_eq!((texts.len(), by_worker.len()), (300, WORKERS));
    let least = by_worker.values().min().unwrap();
    assert!(*least > jobs.len() / WORKERS / 4, "none stays behind: {by_worker:?}");

    let decoded: f64 = workers.iter().map(|worker| metric(worker, "genmill_engine_decode_tokens_total")).sum();
    let told: u64 = jobs.iter().map(|job| job.result.as_ref().unwrap().usage.unwrap().completion_tokens).sum();
    // The first token of each job comes from its prompt.
    assert!((decoded - (told - JOBS) as f64).abs() < 0.5, "{decoded} of {told}");
    workers[0].signal(Signal::TERM).unwrap();
    assert!(workers[0].wait(WITHIN).unwrap().success());
    let log = std::fs::read_to_string(mill.place("w0").join("log")).unwrap();
    let summary = log.lines().find(|line| line.contains("vllm_m0: ")).unwrap();
    assert!(summary.contains("sequences a step") && summary.contains("of the memory bandwidth"), "{summary}");
    println!("{summary}");
}

/// Each of the two takes nearly all of the memory, so they take turns, which the times of loading decide.
#[tokio::test(flavor = "multi_thread")]
async fn models_on_one_simulated_gpu_take_turns_in_its_memory() {
    let mill = Mill::up().await;
    let worker = mill.worker("w", 2, "simulated:h200,pace=0.01,index=0").until_ready().unwrap();
    let held = || metric(&worker, "genmill_engine_resident");
    assert!((held() - 1.0).abs() < 0.5, "one is preloaded");
    let request = |n: u64| Request::new(format!("vllm_m{}", n % 2)).prompt("Go on").seed(n).max_tokens(10);
    let requests = (0..200).map(|n| request(n).experiment("all")).collect();
    let ids = submit_all(&mill.client, requests).await;
    check_all_succeeded_once(&results(&mill.client, "all").await.unwrap(), &ids);
    assert!((held() - 1.0).abs() < 0.5, "never both");
    let log = std::fs::read_to_string(mill.place("w").join("log")).unwrap();
    let loads = log.matches("took=").count();
    assert!((2..=20).contains(&loads), "{loads} loads:\n{log}");
    let decoded = metric(&worker, "genmill_engine_decode_tokens_total");
    assert!(decoded > 0.0 && log.contains("gives its memory to others"), "{decoded}\n{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_device_hangs_writes_down_its_jobs_and_ends_and_others_do_them() {
    let mill = Mill::up().await;
    let hanging = mill.worker("hanging", 1, "simulated:h200,hang=5").env("GENMILL__GPU__STEP_TIMEOUT_MS", "1000");
    let mut hanging = hanging.until_ready().unwrap();
    let request = |n: u64| Request::new("vllm_m0").prompt("Go on").seed(n).max_tokens(10).experiment("all");
    let ids = submit_all(&mill.client, (0..8).map(request).collect()).await;
    let status = hanging.wait(WITHIN).unwrap();
    assert_eq!(status.code(), Some(75));
    let reports: Vec<PathBuf> =
        std::fs::read_dir(mill.place("hanging").join("reports")).unwrap().map(|file| file.unwrap().path()).collect();
    let report = std::fs::read_to_string(&reports[0]).unwrap();
    assert!(report.starts_with("the engine of vllm_m0 hangs: step 5 goes on for"), "{report}");
    assert!(ids.iter().any(|id| report.contains(&format!("job {id}: "))), "{report}");
    assert!(report.contains("\n  genmill-engine "), "{report}");
    assert!(std::fs::read_to_string(mill.place("hanging").join("log")).unwrap().contains("hangs: step 5"));

    let _other = mill.worker("other", 1, "simulated:h200").until_ready().unwrap();
    let jobs = results(&mill.client, "all").await.unwrap();
    check_all_succeeded_once(&jobs, &ids);
    assert!(jobs.iter().any(|job| job.losses == 1 && job.failures == 0), "what hung was lost, and is no job's fault");
}
