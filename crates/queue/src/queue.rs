//! The queue: its connection, and the checks before it is used.

use crate::connection::Connection;
use crate::error::QueueError;
use crate::keys::{Keys, LAYOUT};
use crate::lanes::Lanes;
use crate::scripts::Scripts;
use redis::AsyncCommands as _;
use std::sync::Arc;

/// How to reach Redis.
#[derive(Clone, Debug)]
pub struct Options {
    /// `redis://…`, or `redis+cluster://HOST:PORT[,HOST:PORT…]` for a cluster, of which some nodes are named; with `rediss`
    /// in place of `redis` over TLS.
    pub url: String,
    /// The first part of every key.
    pub namespace: String,
}

/// The queue. Clones share one connection, on which commands do not wait for each other.
#[derive(Clone)]
pub struct Queue {
    pub(crate) connection: Connection,
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
    /// [`QueueError::Unreachable`] when Redis, or a master of the cluster, does not answer; [`QueueError::Unsuitable`]
    /// when one may evict jobs or is too old, when the url does not fit what it leads to, or when what is stored was laid
    /// out by another version.
    pub async fn connect(options: &Options) -> Result<Self, QueueError> {
        let mut connection = Connection::open(&options.url).await?;
        for info in connection.info().await.map_err(|source| QueueError::from_redis("connecting", source))? {
            check_suitable(&info, &connection)?;
        }
        let keys = Keys::new(&options.namespace);
        check_layout(&keys, &mut connection).await?;
        Ok(Self { connection, keys, scripts: Arc::new(Scripts::new()), lanes: Arc::new(Lanes::default()) })
    }
}

/// Whether what is stored can be read; where nothing is, it is written down how it will be laid out.
async fn check_layout(keys: &Keys, connection: &mut Connection) -> Result<(), QueueError> {
    let fail = |source| QueueError::from_redis("connecting", source);
    let stored: Option<String> = connection.get(keys.layout()).await.map_err(fail)?;
    let stored = match stored {
        Some(stored) => stored,
        None if connection.exists(keys.lanes()).await.map_err(fail)? => "1".to_owned(),
        None => return connection.set_nx(keys.layout(), LAYOUT).await.map_err(fail),
    };
    if stored == LAYOUT.to_string() {
        return Ok(());
    }
    Err(QueueError::Unsuitable {
        problem: format!(
            "its jobs are laid out as number {stored}, this program reads number {LAYOUT}: let the version that wrote \
             them finish and use another `redis.namespace`, or empty this Redis"
        ),
    })
}

fn check_suitable(info: &redis::InfoDict, connection: &Connection) -> Result<(), QueueError> {
    if let Some(url) = connection.as_cluster_url().filter(|_| info.get("cluster_enabled") == Some(1)) {
        return Err(QueueError::Unsuitable { problem: format!("it is a node of a cluster: write {url} in its url") });
    }
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
