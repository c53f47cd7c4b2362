//! What a worker daemon adds to the loop: the work itself. Never here: leases, retries, Redis.

use crate::answers::Answers;
use crate::permits::Permits;
use genmill_core::attempt::Performed;
use genmill_core::gate::{Declaration, KeyId};
use genmill_core::ids::{Epoch, JobId};
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_core::registration::ServedModel;
use genmill_core::samples;
use genmill_queue::Held;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// A job in this worker's hands.
#[derive(Clone, Debug)]
pub struct Task {
    /// The job.
    pub id: JobId,
    /// The lease under which it runs.
    pub epoch: Epoch,
    /// What is to be done.
    pub spec: Arc<JobSpec>,
    /// The key with which its model is to be called, where the job passed a gate of it.
    pub key: Option<KeyId>,
}

/// A lane that a worker serves.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The lane.
    pub lane: Lane,
    /// How many of its jobs run at once.
    pub capacity: u32,
    /// How many tokens, of prompts and bounds of output, it can hold at once; `None`: no bound.
    pub tokens: Option<u64>,
    /// Where both change while the worker runs: what holds from now on.
    pub changes: Option<watch::Receiver<Places>>,
}

/// What a worker can take from a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// How many of its jobs run at once; 0: it takes none now.
    pub capacity: u32,
    /// As in [`Offer`].
    pub tokens: Option<u64>,
}

/// Something that performs jobs: a GPU engine, a caller of remote providers.
pub trait Perform: Send + Sync + 'static {
    /// The lanes it takes jobs from. Asked once, when the loop starts.
    fn offers(&self) -> Vec<Offer>;

    /// With which keys it calls the models of a lane, and within which limits. `None`: nothing bounds what it runs but its
    /// places. Asked once, when the loop starts.
    fn declares(&self, lane: &Lane) -> Option<Declaration> {
        let _ = lane;
        None
    }

    /// Every model in its configuration, and whether it can run it now. Asked at every registration.
    fn models(&self) -> Vec<ServedModel>;

    /// What it has measured of itself, in the text format of Prometheus. Asked whenever somebody reads /metrics.
    fn metrics(&self) -> String {
        String::new()
    }

    /// Completes when what [`Perform::models`] answers has changed, so that it is registered at once.
    fn changed(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Told about every second what waits in a lane whose offer changes. The worker's own places are no part of what
    /// others can run.
    fn waits(&self, lane: &Lane, waiting: u64, elsewhere: bool) {
        let _ = (lane, waiting, elsewhere);
    }

    /// Performs one job. Reports text as it comes. When `stop` is cancelled (the job was cancelled, timed out, lost its
    /// lease, or the worker drains) it ends its work at once and returns with what was spent; the outcome is then
    /// ignored unless it is a finished generation. When the future is dropped, the work ends as well.
    fn perform(
        &self,
        task: Task,
        progress: Progress,
        stop: CancellationToken,
    ) -> impl Future<Output = Performed> + Send;
}

/// Whether work on a job has begun. Until then it may be handed to a worker that is idle.
#[derive(Clone, Debug, Default)]
pub struct Started(Arc<AtomicBool>);

impl Started {
    /// Work has begun.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// True once it has.
    #[must_use]
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A piece of an attempt's text, as its performer reported it.
#[derive(Debug)]
pub struct Reported {
    /// Whose it is.
    pub held: Held,
    /// Whole characters, behind those of the piece before.
    pub text: String,
    /// Held by whoever may report more, and by what is on its way.
    pub(crate) open: Arc<()>,
}

/// Takes the text of a running job, piece by piece.
#[derive(Debug)]
pub struct Progress {
    held: Held,
    /// To be set as soon as work on the job begins.
    pub started: Started,
    /// Where calls are permitted beside the one for which the job was fed.
    pub permits: Permits,
    /// Where answers are kept that may serve again.
    pub answers: Answers,
    /// The job has several samples, whose texts follow each other in parts that name them.
    several: bool,
    open: Arc<()>,
    reported: mpsc::Sender<Reported>,
}

impl Progress {
    /// The progress of `task`, told to whoever receives what is `reported`.
    #[must_use]
    pub fn new(task: &Task, started: Started, reported: mpsc::Sender<Reported>) -> Self {
        let several = task.spec.sampling.controls.samples() > 1;
        let held = Held { id: task.id, epoch: task.epoch };
        Self {
            held,
            started,
            permits: Permits::default(),
            answers: Answers::default(),
            several,
            open: Arc::default(),
            reported,
        }
    }

    /// The same progress with permits and answers of the queue.
    #[must_use]
    pub fn with_queue(self, permits: Permits, answers: Answers) -> Self {
        Self { permits, answers, ..self }
    }

    /// Reports more text of the first sample, see [`Progress::text_of`].
    pub async fn text(&self, text: String) {
        self.text_of(0, text).await;
    }

    /// Reports more text of a sample; whole characters only. Waits while the queue is slow, so that memory stays bounded. Text is
    /// dropped once nobody listens any more: the final result has it all.
    pub async fn text_of(&self, sample: u32, text: String) {
        if text.is_empty() {
            return;
        }
        let text = if self.several { samples::part(sample, &text) } else { text };
        // The receiver is gone only when the worker has stopped.
        drop(self.reported.send(Reported { held: self.held, text, open: self.open.clone() }).await);
    }
}
