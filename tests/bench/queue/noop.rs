//! A worker whose jobs cost nothing, so that what is measured is the queue.

use genmill_core::attempt::{FinishReason, Generation, Outcome, Performed, Usage};
use genmill_core::ids::{JobId, WorkerId};
use genmill_core::judge::Policy;
use genmill_core::model::ModelName;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::registration::{Availability, ServedModel};
use genmill_core::time::UnixMs;
use genmill_queue::{Queue, QueueError};
use genmill_worker::perform::{Offer, Perform, Progress, Task};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The model that it serves.
pub(crate) const MODEL: &str = "vllm_noop";

/// Jobs that run at once.
pub(crate) const CAPACITY: u32 = 500;

/// How it deals with a job.
#[derive(Clone, Debug)]
pub(crate) enum Manner {
    /// Answers at once.
    AtOnce,
    /// Tells when it was asked, and answers at once.
    Telling(UnboundedSender<(JobId, Instant)>),
    /// Tells when it was asked, waits to be told to stop, and tells when that was.
    UntilStopped(UnboundedSender<(JobId, Instant)>),
}

/// The worker's part that performs.
#[derive(Debug)]
pub(crate) struct Noop(Manner);

pub(crate) fn served() -> anyhow::Result<ServedModel> {
    Ok(ServedModel {
        name: ModelName::parse(MODEL)?,
        availability: Availability::Ready,
        description: String::new(),
        context_tokens: None,
        batches: false,
    })
}

/// What it answers.
pub(crate) fn generation() -> Generation {
    Generation {
        usage: Some(Usage { prompt_tokens: 75, cached_prompt_tokens: 0, completion_tokens: 4 }),
        first_token_ms: Some(0),
        ..Generation::new("a move".to_owned(), FinishReason::Stop)
    }
}

impl Perform for Noop {
    fn offers(&self) -> Vec<Offer> {
        let lane = served().map(|served| served.name.lane());
        lane.map(|lane| Offer { lane, capacity: CAPACITY, tokens: None, changes: None }).into_iter().collect()
    }

    fn models(&self) -> Vec<ServedModel> {
        served().into_iter().collect()
    }

    async fn perform(&self, task: Task, progress: Progress, stop: CancellationToken) -> Performed {
        progress.started.set();
        match &self.0 {
            Manner::AtOnce => {}
            Manner::Telling(tell) => tell_now(tell, task.id),
            Manner::UntilStopped(tell) => {
                tell_now(tell, task.id);
                stop.cancelled().await;
                tell_now(tell, task.id);
                return Performed {
                    outcome: Outcome::HandedBack,
                    cost: Some(Cost::exact(Picodollars(1))),
                    observation: None,
                };
            }
        }
        Performed {
            outcome: Outcome::Generated(generation()),
            cost: Some(Cost::exact(Picodollars(1))),
            observation: None,
        }
    }
}

fn tell_now(tell: &UnboundedSender<(JobId, Instant)>, id: JobId) {
    // Whoever measured has gone when it has measured enough.
    tell.send((id, Instant::now())).unwrap_or_default();
}

/// A worker that runs until it is stopped.
pub(crate) struct Worker {
    stop: CancellationToken,
    running: JoinSet<Result<(), QueueError>>,
}

impl Worker {
    /// Starts one, and waits until it takes jobs.
    pub(crate) async fn start(queue: &Queue, manner: Manner) -> anyhow::Result<Self> {
        let options = genmill_worker::Options {
            worker: WorkerId::new("noop", "host", 1),
            started_at: UnixMs(0),
            prefixes: vec!["vllm".to_owned()],
            lease_ms: 15_000,
            heartbeat_ms: 3_000,
            drain_timeout_ms: 1_000,
            policy: Policy::default(),
        };
        let stop = CancellationToken::new();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let mut running = JoinSet::new();
        let performer = Arc::new(Noop(manner));
        running.spawn(genmill_worker::run(queue.clone(), performer, options, stop.clone(), || {
            ready.send(()).unwrap_or_default();
        }));
        is_ready.await?;
        Ok(Self { stop, running })
    }

    /// Stops it.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        while let Some(ended) = self.running.join_next().await {
            ended??;
        }
        Ok(())
    }
}
