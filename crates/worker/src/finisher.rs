//! Finishes a lane's attempts, those that end together in one call: the queue's cost of a call is shared.

use genmill_core::ids::{LaneNumber, WorkerId};
use genmill_core::time::UnixMs;
use genmill_queue::{Ended, Finish, Held, Kept, Lease, Queue, QueueError};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// How many attempts one call ends at most: bounds the time one script takes.
const BATCH: usize = 100;

/// Why an attempt could not be finished.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Unfinished {
    message: String,
    /// Trying again may help.
    pub(crate) passing: bool,
}

impl From<&QueueError> for Unfinished {
    fn from(error: &QueueError) -> Self {
        Self { message: error.in_full(), passing: error.is_passing() }
    }
}

type Answer = Result<Kept, Unfinished>;

struct Asked {
    held: Held,
    started_at: UnixMs,
    finish: Arc<Finish>,
    answer: oneshot::Sender<Answer>,
}

impl Asked {
    fn ended(&self) -> Ended<'_> {
        Ended { held: self.held, started_at: self.started_at, finish: &self.finish }
    }
}

/// Takes attempts that have ended. Clones share one task.
#[derive(Clone, Debug)]
pub(crate) struct Finisher {
    asked: mpsc::Sender<Asked>,
}

impl Finisher {
    /// A finisher and its task, which ends when all clones are gone.
    pub(crate) fn new(queue: Queue, lane: LaneNumber, worker: WorkerId) -> (Self, impl Future<Output = ()> + Send) {
        let (asked, receiver) = mpsc::channel(BATCH);
        (Self { asked }, serve(queue, lane, worker, receiver))
    }

    /// Finishes an attempt.
    pub(crate) async fn finish(&self, lease: &Lease, finish: &Arc<Finish>) -> Answer {
        let gone = || Unfinished { message: "this worker has stopped".to_owned(), passing: false };
        let (answer, answered) = oneshot::channel();
        let (held, started_at) = (lease.held(), lease.started_at);
        let asked = Asked { held, started_at, finish: finish.clone(), answer };
        self.asked.send(asked).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

async fn serve(queue: Queue, lane: LaneNumber, worker: WorkerId, mut receiver: mpsc::Receiver<Asked>) {
    let mut batch = Vec::with_capacity(BATCH);
    while receiver.recv_many(&mut batch, BATCH).await > 0 {
        let ended: Vec<Ended<'_>> = batch.iter().map(Asked::ended).collect();
        let kept: Vec<Answer> = match queue.finish(lane, &worker, &ended).await {
            Ok(kept) => kept.into_iter().map(Ok).collect(),
            Err(error) => batch.iter().map(|_| Err(Unfinished::from(&error))).collect(),
        };
        for (asked, kept) in batch.drain(..).zip(kept) {
            // An attempt that was given up no longer listens.
            drop(asked.answer.send(kept));
        }
    }
}
