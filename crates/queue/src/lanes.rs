//! Lanes and their numbers: a registry in Redis, remembered here because a number never changes.

use crate::error::QueueError;
use crate::keys::GROUP;
use crate::payload::corrupt;
use crate::queue::Queue;
use genmill_core::ids::LaneNumber;
use genmill_core::model::Lane;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

/// The lanes that this process has met.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    numbers: RwLock<HashMap<Lane, LaneNumber>>,
}

impl Lanes {
    fn get(&self, lane: &Lane) -> Option<LaneNumber> {
        self.numbers.read().unwrap_or_else(PoisonError::into_inner).get(lane).copied()
    }

    fn remember(&self, lane: &Lane, number: LaneNumber) {
        self.numbers.write().unwrap_or_else(PoisonError::into_inner).insert(lane.clone(), number);
    }
}

/// How a lane stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneState {
    /// Jobs that wait: in backlogs or delivered to no worker yet.
    pub queued: u64,
    /// Jobs that wait for a time.
    pub delayed: u64,
    /// Jobs that run, those in batches included.
    pub running: u64,
    /// Of those that wait, what lies in the stream already.
    pub look_ahead: u64,
    /// Failed jobs that are kept.
    pub failed: u64,
    /// Jobs that its live workers can run at once.
    pub capacity: u64,
}

impl Queue {
    /// The number of `lane`, which is made ready for jobs if it is new.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer or has no numbers left.
    pub async fn open_lane(&self, lane: &Lane) -> Result<LaneNumber, QueueError> {
        if let Some(number) = self.lanes.get(lane) {
            return Ok(number);
        }
        let fail = |source| QueueError::from_redis("opening a lane", source);
        let mut connection = self.connection.clone();
        let mut call = self.scripts.open_lane.key(self.keys.lanes());
        let number: u64 = call.arg(lane.to_string()).invoke_async(&mut connection).await.map_err(fail)?;
        let number = LaneNumber(u16::try_from(number).map_err(|_| QueueError::LanesFull)?);
        let created: Result<(), redis::RedisError> = redis::cmd("XGROUP")
            .arg("CREATE")
            .arg(self.keys.stream(number))
            .arg(GROUP)
            .arg("0")
            .arg("MKSTREAM")
            .query_async(&mut connection)
            .await;
        match created {
            // BUSYGROUP: somebody else was first.
            Err(error) if error.code() != Some("BUSYGROUP") => return Err(fail(error)),
            Ok(()) | Err(_) => {}
        }
        // Whoever sets something while this happens finds the lane in the registry, or is found here.
        self.apply(number, &self.settings().await?).await?;
        self.lanes.remember(lane, number);
        Ok(number)
    }

    /// Every lane that was ever opened, by number.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer or the registry is damaged.
    pub async fn all_lanes(&self) -> Result<Vec<(LaneNumber, Lane)>, QueueError> {
        let mut connection = self.connection.clone();
        let stored: HashMap<String, u16> = redis::cmd("HGETALL")
            .arg(self.keys.lanes())
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("listing lanes", source))?;
        let mut lanes = Vec::with_capacity(stored.len());
        for (name, number) in stored {
            if name == "#" {
                continue;
            }
            let (prefix, route) =
                name.split_once(':').ok_or_else(|| corrupt("lane registry", format!("`{name}` is no lane")))?;
            lanes.push((LaneNumber(number), Lane { prefix: prefix.to_owned(), route: route.to_owned() }));
        }
        lanes.sort_unstable_by_key(|(number, _)| *number);
        Ok(lanes)
    }

    /// How `lane` stands: a look at one moment.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn lane_state(&self, lane: LaneNumber) -> Result<LaneState, QueueError> {
        let mut connection = self.connection.clone();
        let key = |what| self.keys.of_lane(lane, what);
        type Answer = (Option<u64>, u64, u64, (Option<u64>, Option<u64>, Option<u64>), u64);
        let (open, delayed, leased, (undelivered, capacity, batched), failed): Answer = redis::pipe()
            .hget(key("open"), "")
            .zcard(key("delayed"))
            .zcard(key("leases"))
            .hmget(key("meta"), &["un", "ca", "bt"])
            .xlen(key("dead"))
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("looking at a lane", source))?;
        let running = leased + batched.unwrap_or(0);
        let queued = open.unwrap_or(0).saturating_sub(delayed + running);
        Ok(LaneState {
            queued,
            delayed,
            running,
            look_ahead: undelivered.unwrap_or(0),
            failed,
            capacity: capacity.unwrap_or(0),
        })
    }
}
