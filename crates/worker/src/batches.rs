//! What a worker daemon adds to the batches of a provider: how one is submitted, found, looked at and read.
//!
//! Never here: which jobs a batch has and what has become of it (`genmill-queue`), nor what to do next.

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

/// Why a batch was not submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsubmitted {
    /// It surely was not.
    Refused(Failure),
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
    Refused(Failure),
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

    /// Submits a batch: its provider's name of it.
    fn submit(&self, batch: &Batch) -> impl Future<Output = Result<String, Unsubmitted>> + Send;

    /// Looks whether a batch was submitted by a worker that could not say so.
    fn find(&self, batch: &Batch) -> impl Future<Output = Result<Found, Failure>> + Send;

    /// How far the provider is with the batch that it names `remote`. Needs no items.
    fn look(&self, batch: &Batch, remote: &str) -> impl Future<Output = Result<Stage, Failure>> + Send;

    /// Reads what came of a batch that has ended, and sends each result on. Jobs of which nothing came, because the batch
    /// ended before their turn, are not sent; neither are results of jobs that are no items.
    fn collect(
        &self,
        batch: &Batch,
        remote: &str,
        results: mpsc::Sender<Arrived>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Asks the provider to end a batch early. What is done by then can be read. Needs no items.
    fn cancel(&self, batch: &Batch, remote: &str) -> impl Future<Output = Result<(), Failure>> + Send;
}
