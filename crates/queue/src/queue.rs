//! The queue: its connection, and the checks before it is used.

use crate::error::QueueError;
use crate::keys::Keys;
use crate::lanes::Lanes;
use crate::scripts::Scripts;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use std::sync::Arc;
use std::time::Duration;

/// How to reach Redis.
#[derive(Clone, Debug)]
pub struct Options {
    /// `redis://…` or `rediss://…`.
    pub url: String,
    /// The first part of every key.
    pub namespace: String,
}

/// The queue. Clones share one connection, on which commands do not wait for each other.
#[derive(Clone)]
pub struct Queue {
    pub(crate) client: redis::Client,
    pub(crate) connection: ConnectionManager,
    pub(crate) keys: Keys,
    pub(crate) scripts: Arc<Scripts>,
    pub(crate) lanes: Arc<Lanes>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl Queue {
    /// Connects, and checks that this Redis may hold a queue. Reconnects by itself later on.
    ///
    /// # Errors
    /// [`QueueError::Unreachable`] when Redis does not answer, [`QueueError::Unsuitable`] when it may evict jobs or is
    /// too old.
    pub async fn connect(options: &Options) -> Result<Self, QueueError> {
        let doing = "connecting";
        let client = redis::Client::open(options.url.as_str()).map_err(|source| QueueError::Unsuitable {
            problem: format!("its url is not of the form redis://host:port ({source})"),
        })?;
        // A script over many jobs may take a while on a loaded machine; the library's 500 ms would make it look lost.
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(Duration::from_secs(10)))
            .set_connection_timeout(Some(Duration::from_secs(3)))
            .set_number_of_retries(3)
            .set_max_delay(Duration::from_secs(1));
        let mut connection = ConnectionManager::new_with_config(client.clone(), config)
            .await
            .map_err(|source| QueueError::from_redis(doing, source))?;
        let info: redis::InfoDict = redis::cmd("INFO")
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis(doing, source))?;
        check_suitable(&info)?;
        Ok(Self {
            client,
            connection,
            keys: Keys::new(&options.namespace),
            scripts: Arc::new(Scripts::new()),
            lanes: Arc::new(Lanes::default()),
        })
    }

    /// Whether Redis answers.
    ///
    /// # Errors
    /// [`QueueError::Unreachable`] when it does not.
    pub async fn ping(&self) -> Result<(), QueueError> {
        let mut connection = self.connection.clone();
        redis::cmd("PING")
            .query_async::<()>(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("pinging", source))
    }
}

fn check_suitable(info: &redis::InfoDict) -> Result<(), QueueError> {
    let policy: Option<String> = info.get("maxmemory_policy");
    if let Some(policy) = policy.filter(|policy| policy != "noeviction") {
        let problem = format!(
            "its maxmemory-policy is `{policy}`, which deletes jobs when memory is short; set `maxmemory-policy noeviction`"
        );
        return Err(QueueError::Unsuitable { problem });
    }
    let version: Option<String> = info.get("redis_version");
    let major = version.as_deref().and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    match (version, major) {
        (Some(version), Some(major)) if major < 7 => {
            Err(QueueError::Unsuitable { problem: format!("it is version {version}; 7.0 or later is needed") })
        }
        _ => Ok(()),
    }
}
