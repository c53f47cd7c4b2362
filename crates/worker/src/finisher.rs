//! Finishes attempts, those that end together in one call: the queue's cost of a call is shared.

use genmill_core::ids::{LaneNumber, WorkerId};
use genmill_queue::{Ended, Finish, Kept, Lease, Queue, QueueError};
use std::collections::BTreeMap;
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
        Self { message: error.to_string(), passing: error.is_passing() }
    }
}

type Answer = Result<Kept, Unfinished>;

struct Asked {
    lease: Lease,
    finish: Finish,
    answer: oneshot::Sender<Answer>,
}

impl Asked {
    const fn ended(&self) -> Ended<'_> {
        Ended { held: self.lease.held(), started_at: self.lease.started_at, finish: &self.finish }
    }
}

/// Takes attempts that have ended. Clones share one task.
#[derive(Clone, Debug)]
pub(crate) struct Finisher {
    asked: mpsc::Sender<Asked>,
}

impl Finisher {
    /// A finisher and its task, which ends when all clones are gone.
    pub(crate) fn new(queue: Queue, worker: WorkerId) -> (Self, impl Future<Output = ()> + Send) {
        let (asked, receiver) = mpsc::channel(BATCH);
        (Self { asked }, serve(queue, worker, receiver))
    }

    /// Finishes an attempt.
    pub(crate) async fn finish(&self, lease: &Lease, finish: &Finish) -> Answer {
        let gone = || Unfinished { message: "this worker has stopped".to_owned(), passing: false };
        let (answer, answered) = oneshot::channel();
        let asked = Asked { lease: lease.clone(), finish: finish.clone(), answer };
        self.asked.send(asked).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

async fn serve(queue: Queue, worker: WorkerId, mut receiver: mpsc::Receiver<Asked>) {
    let mut batch = Vec::with_capacity(BATCH);
    while receiver.recv_many(&mut batch, BATCH).await > 0 {
        let mut by_lane: BTreeMap<LaneNumber, Vec<Asked>> = BTreeMap::new();
        for asked in batch.drain(..) {
            by_lane.entry(asked.lease.id.lane()).or_default().push(asked);
        }
        for (lane, asked) in by_lane {
            let ended: Vec<Ended<'_>> = asked.iter().map(Asked::ended).collect();
            let kept = queue.finish(lane, &worker, &ended).await;
            let kept: Vec<Answer> = match &kept {
                Ok(kept) => kept.iter().copied().map(Ok).collect(),
                Err(error) => asked.iter().map(|_| Err(Unfinished::from(error))).collect(),
            };
            for (asked, kept) in asked.into_iter().zip(kept) {
                // An attempt that was given up no longer listens.
                drop(asked.answer.send(kept));
            }
        }
    }
}
