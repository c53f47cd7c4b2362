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
}
