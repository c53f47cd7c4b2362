//! What a worker looks at before it makes itself ready for a lane's jobs.

use crate::error::QueueError;
use crate::queue::Queue;
use genmill_core::ids::LaneNumber;

/// What waits in a lane, and who could run it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Jobs that wait and could start now. 0 while the lane, or all that waits there, is paused.
    pub waiting: u64,
    /// Jobs that the lane's live workers can run at once.
    pub capacity: u64,
}

impl Queue {
    /// What waits in `lane`: a look at one moment, for a decision that is made again.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn demand(&self, lane: LaneNumber) -> Result<Demand, QueueError> {
        let mut connection = self.connection.clone();
        let key = |what| self.keys.of_lane(lane, what);
        type Answer = (Option<u64>, u64, u64, (Option<u64>, Option<u64>), bool, Option<String>);
        let (open, delayed, running, (undelivered, capacity), flows, paused): Answer = redis::pipe()
            .hget(key("open"), "")
            .zcard(key("delayed"))
            .zcard(key("leases"))
            .hmget(key("meta"), &["un", "ca"])
            // What may not start is in none of them, once a worker has tried to take it.
            .exists(key("flows"))
            .hget(key("settings"), "pause/lane")
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("looking at what waits in a lane", source))?;
        // A setting is stored behind its version; one that was taken back has nothing there.
        let paused = paused.is_some_and(|setting| setting.split_once(':').is_some_and(|(_, value)| !value.is_empty()));
        let startable = !paused && (flows || undelivered.unwrap_or(0) > 0);
        let waiting = if startable { open.unwrap_or(0).saturating_sub(delayed + running) } else { 0 };
        Ok(Demand { waiting, capacity: capacity.unwrap_or(0) })
    }
}
