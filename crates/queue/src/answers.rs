//! Answers that are kept for a while, by tenant and request. Never here: what of a request decides its answer.

use crate::error::QueueError;
use crate::payload::{decode, encode};
use crate::queue::Queue;
use genmill_core::attempt::Generation;
use genmill_core::names::Tenant;
use redis::AsyncCommands as _;

/// For how long an answer is kept, and how much a tenant may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// In milliseconds.
    pub ttl_ms: u64,
    /// The most bytes of all answers of the tenant together, as they are stored: the oldest go first.
    pub bytes_max: u64,
}

impl Queue {
    /// The answer that `tenant` has to the request of this hash.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer, or what it has cannot be read.
    pub async fn answer(&self, tenant: &Tenant, request: &[u8; 32]) -> Result<Option<Generation>, QueueError> {
        let stored: Option<Vec<u8>> = (self.connection.clone())
            .get(self.keys.answer(tenant, request))
            .await
            .map_err(|source| QueueError::from_redis("looking for an answer", source))?;
        stored.map(|stored| decode("answer", &stored)).transpose()
    }

    /// Keeps an answer of `tenant` to the request of this hash. One that is larger than all may be is not kept.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn keep_answer(
        &self,
        tenant: &Tenant,
        request: &[u8; 32],
        answer: &Generation,
        keep: Keep,
    ) -> Result<(), QueueError> {
        let stored = encode("answer", answer)?;
        let mut call = self.scripts.keep_answer.key(self.keys.tenant(tenant));
        call.arg(&request[..])
            .arg(stored)
            .arg(keep.ttl_ms)
            .arg(keep.bytes_max)
            .invoke_async(&mut self.connection.clone())
            .await
            .map_err(|source| QueueError::from_redis("keeping an answer", source))
    }
}
