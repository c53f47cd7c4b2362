//! Answers of earlier jobs that may serve again. Never here: which may (a performer decides), and where they lie (the queue).

use genmill_core::attempt::Generation;
use genmill_core::names::Tenant;
use genmill_queue::Queue;
use std::time::Duration;
use tokio::time::timeout;

pub use genmill_queue::Keep as Bounds;

/// How long the queue is waited for. Without an answer the work is done as if there were none.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where answers are kept. The default keeps none.
#[derive(Clone, Debug, Default)]
pub struct Answers(Option<Queue>);

impl Answers {
    pub(crate) const fn new(queue: Queue) -> Self {
        Self(Some(queue))
    }

    /// The answer that `tenant` has to the request of this hash, if the queue tells one in time.
    pub async fn find(&self, tenant: &Tenant, request: &[u8; 32]) -> Option<Generation> {
        match timeout(PATIENCE, self.0.as_ref()?.answer(tenant, request)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::warn!(error = error.in_full(), "cannot look for a kept answer");
                None
            }
            Err(_) => None,
        }
    }

    /// Keeps an answer. Nothing depends on it.
    pub async fn keep(&self, tenant: &Tenant, request: &[u8; 32], answer: &Generation, keep: Bounds) {
        let Some(queue) = &self.0 else { return };
        if let Ok(Err(error)) = timeout(PATIENCE, queue.keep_answer(tenant, request, answer, keep)).await {
            tracing::warn!(error = error.in_full(), "cannot keep an answer");
        }
    }
}
