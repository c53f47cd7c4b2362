//! Permits for calls beside the one for which a job was fed: to another model, or the same again.
//!
//! Never here: when a gate opens (the queue's scripts decide), and what is called.

use genmill_core::gate::{KeyId, Observation};
use genmill_core::ids::LaneNumber;
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_queue::{Held, Passage, Permit, Queue, SideCall};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::timeout;

/// How long an answer of the queue is waited for. A call without a permit is not made, so this may be short.
const PATIENCE: Duration = Duration::from_secs(2);

/// A permit outlives the bound of its job's attempt by so long, in milliseconds: its worker may be late.
const LATE_MS: u64 = 60_000;

/// How long a permit of a job without a bound lasts, in milliseconds.
const UNBOUND_MS: u64 = 60 * 60 * 1_000;

/// The lanes of a worker, in whose gates its jobs may ask.
#[derive(Debug)]
pub(crate) struct Gated {
    queue: Queue,
    lanes: BTreeMap<Lane, LaneNumber>,
}

impl Gated {
    pub(crate) const fn new(queue: Queue, lanes: BTreeMap<Lane, LaneNumber>) -> Self {
        Self { queue, lanes }
    }

    pub(crate) const fn queue(&self) -> &Queue {
        &self.queue
    }
}

/// Where an attempt asks for permits. The default is that of a performer without a queue: nothing bounds its calls.
#[derive(Debug, Default)]
pub struct Permits {
    asked: Option<(Arc<Gated>, Held)>,
    /// How often it has asked, which names its calls.
    count: AtomicU32,
}

/// Leave to make a call. One that is dropped unsettled ends by itself, some time after the job's bound.
#[derive(Debug)]
pub struct Leave {
    /// The key with which it is to be made; `None`: any.
    pub key: Option<KeyId>,
    permit: Option<(Arc<Gated>, Permit)>,
}

impl Permits {
    pub(crate) const fn new(gated: Arc<Gated>, held: Held) -> Self {
        Self { asked: Some((gated, held)), count: AtomicU32::new(0) }
    }

    /// Asks for leave to call the model of `spec` with one of `keys`. `None`: not now, because no key has room, because the
    /// queue does not answer, or because this worker does not serve the model's lane.
    pub async fn ask(&self, spec: &JobSpec, keys: &[KeyId]) -> Option<Leave> {
        let Some((gated, held)) = &self.asked else { return Some(Leave { key: None, permit: None }) };
        let lane = *gated.lanes.get(&spec.model.lane())?;
        let name = format!("{}/{}/{}", held.id, held.epoch.0, self.count.fetch_add(1, Ordering::Relaxed));
        let ttl_ms = spec.timeout_ms.map_or(UNBOUND_MS, |ms| ms.saturating_add(LATE_MS));
        let call = SideCall { name: &name, model: &spec.model, tokens: spec.estimated_tokens(), keys, ttl_ms };
        match timeout(PATIENCE, gated.queue.permit(lane, &call)).await {
            Ok(Ok(Passage::Permitted(permit))) => {
                Some(Leave { key: Some(permit.key.clone()), permit: Some((gated.clone(), permit)) })
            }
            Ok(Ok(Passage::Free)) => Some(Leave { key: None, permit: None }),
            Ok(Ok(Passage::Held { until, held_by })) => {
                tracing::debug!(job = %held.id, model = %spec.model, ?until, ?held_by, "may not be called now");
                None
            }
            Ok(Err(error)) => {
                tracing::warn!(job = %held.id, model = %spec.model, error = error.in_full(), "no permit for a call");
                None
            }
            Err(_) => {
                tracing::warn!(job = %held.id, model = %spec.model, "no permit for a call: the queue does not answer");
                None
            }
        }
    }
}

impl Leave {
    /// Ends it, with what the call tells; `None` when it was not made.
    pub async fn settle(self, observation: Option<&Observation>) {
        let Some((gated, permit)) = self.permit else { return };
        match timeout(PATIENCE, gated.queue.settle(&permit, observation)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = error.in_full(), "a permit is not settled: it ends by itself"),
            Err(_) => tracing::warn!("a permit is not settled, since the queue does not answer: it ends by itself"),
        }
    }
}
