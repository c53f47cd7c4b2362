//! Which workers live, and what they say they serve.

use crate::error::QueueError;
use crate::payload::{decode, encode};
use crate::queue::Queue;
use genmill_core::ids::WorkerId;
use genmill_core::registration::Registration;

impl Queue {
    /// Registers a worker, or renews its registration, for `ttl_ms` milliseconds.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn register(&self, registration: &Registration, ttl_ms: u64) -> Result<(), QueueError> {
        let mut connection = self.connection.clone();
        let worker = &registration.worker;
        redis::pipe()
            .cmd("SET")
            .arg(self.keys.registration(worker))
            .arg(encode("registration", registration)?)
            .arg("PX")
            .arg(ttl_ms)
            .ignore()
            .sadd(self.keys.workers(), worker.as_str())
            .ignore()
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("registering a worker", source))
    }

    /// Whether the registry takes writes: one that is out of memory or disk answers, and forgets every worker.
    ///
    /// # Errors
    /// [`QueueError`] when it does not.
    pub async fn check_writes(&self) -> Result<(), QueueError> {
        let mut connection = self.connection.clone();
        let mut set = redis::cmd("SET");
        set.arg(self.keys.probe()).arg("").arg("PX").arg(1);
        set.query_async(&mut connection).await.map_err(|source| QueueError::from_redis("looking for workers", source))
    }

    /// Takes a worker that stops out of the registry.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn deregister(&self, worker: &WorkerId) -> Result<(), QueueError> {
        let mut connection = self.connection.clone();
        redis::pipe()
            .del(self.keys.registration(worker))
            .ignore()
            .srem(self.keys.workers(), worker.as_str())
            .ignore()
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("deregistering a worker", source))
    }

    /// The registrations of all live workers.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer or a registration cannot be read.
    pub async fn registrations(&self) -> Result<Vec<Registration>, QueueError> {
        let fail = |source| QueueError::from_redis("reading registrations", source);
        let mut connection = self.connection.clone();
        let names: Vec<String> =
            redis::cmd("SMEMBERS").arg(self.keys.workers()).query_async(&mut connection).await.map_err(fail)?;
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut get = redis::cmd("MGET");
        for name in &names {
            get.arg(self.keys.registration(&WorkerId::from_stored(name.clone())));
        }
        let stored: Vec<Option<Vec<u8>>> = get.query_async(&mut connection).await.map_err(fail)?;
        let (live, gone): (Vec<_>, Vec<_>) = names.iter().zip(stored).partition(|(_, record)| record.is_some());
        if !gone.is_empty() {
            let gone: Vec<&String> = gone.into_iter().map(|(name, _)| name).collect();
            redis::cmd("SREM")
                .arg(self.keys.workers())
                .arg(gone)
                .query_async::<()>(&mut connection)
                .await
                .map_err(fail)?;
        }
        live.into_iter().filter_map(|(_, record)| record).map(|record| decode("registration", &record)).collect()
    }
}
