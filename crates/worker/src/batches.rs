//! What a worker daemon adds to the batches of a provider: how one is submitted, found, looked at and read.
//!
//! Never here: which jobs a batch has and what has become of it (`genmill-queue`), nor what to do next.

use crate::hold::Hold;
use genmill_core::attempt::{Failure, Performed};
use genmill_core::gate::KeyId;
use genmill_core::ids::{Epoch, JobId};
use genmill_core::job::JobSpec;
use genmill_core::model::{Lane, ModelName};
use genmill_core::time::UnixMs;
use std::future::Future;
use tokio::sync::mpsc;

/// A lane whose jobs go out in batches.
#[derive(Clone, Debug)]
pub struct BatchOffer {
    /// The lane.
    pub lane: Lane,
    /// The key with which its batches are submitted, looked at and read; `None`: its provider needs none.
    pub key: Option<KeyId>,
    /// How many jobs a batch has at most.
    pub items_max: usize,
    /// How many bytes of text they have together at most.
    pub bytes_max: usize,
}

/// A batch, as its provider is told of it.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Unique: 40 hexadecimal digits. Goes with the batch, so that it can be found.
    pub tag: String,
    /// The model of all of its jobs.
    pub model: ModelName,
    /// As in [`BatchOffer`].
    pub key: Option<KeyId>,
    /// It was not submitted before.
    pub since: UnixMs,
    /// With how many items it was submitted, if it was.
    pub submitted: Option<u64>,
    /// Its jobs that are wanted still.
    pub items: Vec<Item>,
}

/// A job of a batch.
#[derive(Clone, Debug)]
pub struct Item {
    /// The job.
    pub id: JobId,
    /// Under which it went into the batch. Job and epoch together are never in a second one.
    pub epoch: Epoch,
    /// What is to be done.
    pub spec: JobSpec,
}

/// A batch whose items are ready to go, or are with the provider already; the batch itself is not made.
#[derive(Debug)]
pub struct Prepared<T> {
    /// What it is made with.
    pub ready: T,
    /// How many items it has.
    pub items: usize,
    /// The items that have no room in it.
    pub left: Vec<(JobId, Epoch)>,
}

/// A refusal of a whole batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub failure: Failure,
    /// The items that the provider named as its reason, each with what it said of it.
    pub named: Vec<((JobId, Epoch), Failure)>,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self { failure, named: Vec::new() }
    }
}

/// Why a batch was not made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsubmitted {
    /// It surely was not: its provider refused.
    Refused(Refusal),
    /// It surely was not: the hold on it ended before.
    Late,
    /// Nobody knows: it may have been.
    Unclear(Failure),
}

/// What a search for a batch found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It was submitted: its provider's name of it.
    Here(String),
    /// It was not.
    NotThere,
    /// It cannot be told yet: ask again later.
    NotYet,
    /// It can never be told, and why.
    Never(String),
}

/// How far a provider is with a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It works on it.
    Works,
    /// It has ended: by itself, by its time, or cancelled. What came of it can be read.
    Ended,
    /// It refused all of it, and nothing can be read.
    Refused(Refusal),
}

/// What came of a job of a batch.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// The job.
    pub id: JobId,
    /// As in [`Item`].
    pub epoch: Epoch,
    /// What came of it, and its cost at the price of batches.
    pub performed: Performed,
}

/// Something that has jobs done in batches.
pub trait PerformBatches: Send + Sync + 'static {
    /// The lanes whose jobs it submits in batches. Asked once, at the start.
    fn batch_offers(&self) -> Vec<BatchOffer>;

    /// What a batch is made with.
    type Ready: Send + Sync;

    /// Does all that comes before a batch is made, and may be done in vain.
    fn prepare(&self, batch: &Batch) -> impl Future<Output = Result<Prepared<Self::Ready>, Refusal>> + Send;

    /// Makes a batch: its provider's name of it. Nothing that could make it leaves when `hold` does not last any more.
    fn create(
        &self,
        batch: &Batch,
        ready: Self::Ready,
        hold: &Hold,
    ) -> impl Future<Output = Result<String, Unsubmitted>> + Send;

    /// Looks whether a batch was submitted by a worker that could not say so. It is none of those that its provider names
    /// `others`.
    fn find(&self, batch: &Batch, others: &[String]) -> impl Future<Output = Result<Found, Failure>> + Send;

    /// How far the provider is with the batch that it names `remote`. Needs no items.
    fn look(&self, batch: &Batch, remote: &str) -> impl Future<Output = Result<Stage, Failure>> + Send;

    /// Reads what came of a batch that has ended, and sends on what came of each item: handed back where the batch ended
    /// before its turn. Results of jobs that are no items are left out.
    fn collect(
        &self,
        batch: &Batch,
        remote: &str,
        results: mpsc::Sender<Arrived>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Deletes what a batch has left at its provider, when nobody will read it any more. Needs no items.
    fn clear(&self, batch: &Batch, remote: &str) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Asks the provider to end a batch early. What is done by then can be read. Needs no items.
    fn cancel(&self, batch: &Batch, remote: &str) -> impl Future<Output = Result<(), Failure>> + Send;
}
