//! A worker in this process, real but for its work: a scenario performs the jobs. Never here: what is expected of it.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::attempt::{FinishReason, Generation, Outcome, Performed};
use genmill_core::ids::WorkerId;
use genmill_core::judge::Policy;
use genmill_core::model::ModelName;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::registration::{Availability, ServedModel};
use genmill_core::time::UnixMs;
use genmill_queue::{Queue, QueueError};
use genmill_worker::Options;
use genmill_worker::perform::{Offer, Perform, Progress, Task};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(60);

/// Places in each lane.
const CAPACITY: u32 = 8;

/// A job that the worker wants performed.
#[derive(Debug)]
pub struct Asked {
    /// The job.
    pub task: Task,
    /// Takes its text.
    pub progress: Progress,
    answer: oneshot::Sender<Performed>,
}

impl Asked {
    /// Ends the work with a generation that cost 7 picodollars.
    pub fn succeed(self, text: &str) {
        let text = text.to_owned();
        let generation = Generation::new(text, FinishReason::Stop);
        let performed = Performed {
            outcome: Outcome::Generated(generation),
            cost: Some(Cost::exact(Picodollars(7))),
            observation: None,
        };
        // Whoever was told to stop no longer listens.
        drop(self.answer.send(performed));
    }
}

struct Performer {
    models: Vec<ModelName>,
    asks: mpsc::UnboundedSender<Asked>,
}

impl Perform for Performer {
    fn offers(&self) -> Vec<Offer> {
        self.models
            .iter()
            .map(|model| Offer { lane: model.lane(), capacity: CAPACITY, tokens: None, changes: None })
            .collect()
    }

    fn models(&self) -> Vec<ServedModel> {
        let served = |name: &ModelName| ServedModel {
            name: name.clone(),
            availability: Availability::Ready,
            description: String::new(),
            context_tokens: None,
            batches: false,
        };
        self.models.iter().map(served).collect()
    }

    async fn perform(&self, task: Task, progress: Progress, stop: CancellationToken) -> Performed {
        progress.started.set();
        let (answer, answered) = oneshot::channel();
        self.asks.send(Asked { task, progress, answer }).unwrap();
        tokio::select! {
            Ok(performed) = answered => performed,
            () = stop.cancelled() => Performed { outcome: Outcome::HandedBack, cost: None, observation: None },
        }
    }
}

/// A running worker. It ends when it is dropped, as if it were killed.
#[derive(Debug)]
pub struct Puppet {
    asked: mpsc::UnboundedReceiver<Asked>,
    stop: CancellationToken,
    running: JoinSet<Result<(), QueueError>>,
}

/// The name of a puppet.
#[must_use]
pub fn worker() -> WorkerId {
    WorkerId::from_stored("puppet".to_owned())
}

impl Puppet {
    /// Starts a worker that serves `models`, beats six times in a lease and waits for its jobs when it is stopped.
    pub async fn start(queue: &Queue, models: &[ModelName], lease_ms: u64) -> Self {
        let options = Options {
            worker: worker(),
            started_at: UnixMs(0),
            prefixes: vec!["vllm".to_owned()],
            lease_ms,
            heartbeat_ms: lease_ms / 6,
            drain_timeout_ms: 60_000,
            policy: Policy::default(),
        };
        let (asks, asked) = mpsc::unbounded_channel();
        let performer = Arc::new(Performer { models: models.to_vec(), asks });
        let stop = CancellationToken::new();
        let (ready, is_ready) = oneshot::channel();
        let mut running = JoinSet::new();
        running.spawn(genmill_worker::run(queue.clone(), performer, options, stop.clone(), || ready.send(()).unwrap()));
        is_ready.await.unwrap();
        Self { asked, stop, running }
    }

    /// The next job that it wants performed.
    pub async fn asked(&mut self) -> Asked {
        timeout(WITHIN, self.asked.recv()).await.unwrap().unwrap()
    }

    /// The same, if there is one.
    pub fn asked_already(&mut self) -> Option<Asked> {
        self.asked.try_recv().ok()
    }

    /// Tells it to stop.
    pub fn begin_to_stop(&self) {
        self.stop.cancel();
    }

    /// Stops it.
    pub async fn stop(mut self) {
        self.stop.cancel();
        timeout(WITHIN, self.running.join_next()).await.unwrap().unwrap().unwrap().unwrap();
    }
}
