//! Where a mill of a scenario runs: a folder with a configuration and a provider to call; and what is asked of the mill.
//! Never here: what is expected of it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

use crate::daemons::{Daemon, Start};
use genmill_client::{Client, Outcome, Request, Until, v1};
use genmill_standin::{Options, Standin};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use tokio_stream::StreamExt as _;

/// A model that every place serves, in the lane `litellm:openai`.
pub const MODEL: &str = "litellm_gpt-4o-mini";

/// A model of another provider, in the lane `litellm:groq`. It is served where that provider has a key.
pub const OTHER_MODEL: &str = "litellm_groq/llama3-8b-8192";

/// A folder with a configuration, and a provider to call.
#[derive(Debug)]
pub struct Place {
    folder: TempDir,
    /// What is called.
    pub provider: Standin,
}

impl Place {
    /// A folder whose configuration lists both models, and a running provider.
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let provider = Standin::start(Options::default()).await.unwrap();
        let configs = folder.path().join("configs");
        std::fs::create_dir(&configs).unwrap();
        let listed = "models: [gpt-4o-mini, litellm_gpt-4, groq/llama3-8b-8192]";
        std::fs::write(configs.join("litellm_models.yaml"), listed).unwrap();
        std::fs::write(configs.join("vllm_models.yaml"), "models: [{name: gone, model_path: no/such/folder}]").unwrap();
        Self { folder, provider }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// How to start a binary here, with short leases and 16 places in each lane.
    #[must_use]
    pub fn start(&self, binary: &str) -> Start {
        Start::new(binary, self.path())
            .unwrap()
            .env("OPENAI_API_KEY", "sk-test")
            .env("OPENAI_BASE_URL", &self.provider.base_url())
            .env("GENMILL__WORKER__LEASE_MS", "5000")
            .env("GENMILL__WORKER__HEARTBEAT_MS", "400")
            .env("GENMILL__WORKER__RETRY_DELAY_MS", "50")
            .env("GENMILL__API__CALLS_MAX", "16")
    }

    /// Starts a whole mill.
    #[must_use]
    pub fn up(&self) -> Daemon {
        self.start("genmill").args(&["up", "--listen", "127.0.0.1:0"]).until_ready().unwrap()
    }

    /// Runs the command line against `mill`: exit code, standard output, standard error.
    #[must_use]
    pub fn genmill(&self, mill: &Daemon, args: &[&str]) -> (Option<i32>, String, String) {
        let server = format!("http://{}", mill.place("grpc"));
        let output = self.start("genmill").env("GENMILL_SERVER", &server).args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }
}

/// A client of a mill or a scheduler.
pub async fn client(mill: &Daemon) -> Client {
    Client::connect(&format!("http://{}", mill.place("grpc"))).await.unwrap()
}

/// Asks [`MODEL`].
pub fn request(prompt: &str) -> Request {
    Request::new(MODEL).prompt(prompt)
}

/// Submits requests, none of which may be refused, and returns the ids of the jobs.
pub async fn submit_all(client: &Client, requests: Vec<Request>) -> Vec<String> {
    let mut ids = Vec::new();
    let mut answers = Box::pin(client.submit_all(tokio_stream::iter(requests)));
    while let Some(answer) = answers.next().await {
        match answer.unwrap().outcome {
            Outcome::Accepted { job_id, .. } => ids.push(job_id),
            Outcome::Refused(refusal) => panic!("{refusal:?}"),
        }
    }
    ids
}

/// A job once it has finished, for which it gets a minute.
pub async fn finished(client: &Client, id: &str) -> v1::Job {
    let ending = async {
        loop {
            let job = client.get(id).await.unwrap();
            if job.finished_at.is_some() {
                return job;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), ending).await.expect("the job does not end")
}

/// All jobs of an experiment, as they finished.
///
/// # Errors
/// When the server cannot be asked.
pub async fn results(client: &Client, experiment: &str) -> anyhow::Result<Vec<v1::Job>> {
    let filter = v1::JobFilter { experiment: experiment.to_owned(), ..v1::JobFilter::default() };
    let mut finished = Box::pin(client.watch_jobs(filter, String::new(), Until::Idle));
    let mut jobs = Vec::new();
    while let Some(next) = finished.next().await {
        jobs.push(next?.job);
    }
    Ok(jobs)
}

/// Fails unless every one of `ids` is there once and succeeded.
pub fn check_all_succeeded_once(jobs: &[v1::Job], ids: &[String]) {
    let finished: BTreeSet<&String> = jobs.iter().map(|job| &job.id).collect();
    assert_eq!(jobs.len(), finished.len(), "no job finishes twice");
    assert_eq!(finished, ids.iter().collect());
    for job in jobs {
        assert_eq!(job.state(), v1::JobState::Succeeded, "{:?}", job.error);
        assert_eq!(
            job.attempt_history.iter().filter(|attempt| attempt.outcome() == v1::AttemptOutcome::Succeeded).count(),
            1
        );
    }
}
