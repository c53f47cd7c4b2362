//! What keeps a lane going without anybody asking: each takes no input, may run twice, and may run anywhere.

use crate::error::QueueError;
use crate::queue::Queue;
use crate::work::name_of;
use genmill_core::attempt::AttemptEnd;
use genmill_core::ids::LaneNumber;
use genmill_core::judge::{Policy, judge_loss};

/// How many jobs one script handles at most, so that Redis is never held up for long.
const BATCH: u32 = 200;

impl Queue {
    /// Queues delayed jobs whose time has come. Returns how many.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn promote(&self, lane: LaneNumber) -> Result<u32, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.promote.key(self.keys.lane(lane));
        call.arg(BATCH)
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("promoting jobs", source))
    }

    /// Takes back running jobs whose leases have run out. Returns how many. When nobody has asked for some seconds, none
    /// is taken back for `grace_ms`: what kept schedulers from asking may have kept workers from renewing.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn reclaim(&self, lane: LaneNumber, policy: &Policy, grace_ms: u64) -> Result<u32, QueueError> {
        // What the last allowed loss would mean tells class and message of poison.
        let (_, poison) = judge_loss(policy.losses_max.saturating_sub(1), policy);
        let class = poison.as_ref().map(|poison| name_of(&poison.class)).transpose()?.unwrap_or_default();
        let mut connection = self.connection.clone();
        let mut call = self.scripts.reclaim.key(self.keys.lane(lane));
        call.arg(BATCH)
            .arg(policy.losses_max)
            .arg(name_of(&AttemptEnd::Lost)?)
            .arg(class)
            .arg(poison.map(|poison| poison.message).unwrap_or_default())
            .arg(grace_ms)
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("reclaiming leases", source))
    }

    /// Ends waiting jobs whose deadline has passed. Returns how many deadlines had.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn expire(&self, lane: LaneNumber) -> Result<u32, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.expire.key(self.keys.lane(lane));
        call.arg(BATCH)
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("expiring jobs", source))
    }

    /// Brings flows nearer to their turn whose next job has waited long; does so once in a while, however often it is
    /// called. Returns how many.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn age(&self, lane: LaneNumber) -> Result<u32, QueueError> {
        let mut connection = self.connection.clone();
        let call = self.scripts.age.key(self.keys.lane(lane));
        call.invoke_async(&mut connection).await.map_err(|source| QueueError::from_redis("ageing flows", source))
    }
}
