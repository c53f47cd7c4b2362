//! The connection to Redis: to one server, or to a cluster. Whoever sends a command need not know which.
//!
//! Never here: keys, and what is asked.

use crate::cluster::{self, Cluster};
use crate::error::QueueError;
use futures_util::FutureExt as _;
use redis::aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig, PubSub};
use redis::{Cmd, InfoDict, Pipeline, RedisFuture, RedisResult, Value};
use std::sync::Arc;
use std::time::Duration;

/// A script over many jobs may take a while on a loaded machine; the library's 500 ms would make it look lost.
pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that reconnects by itself. Clones share it, and commands on it do not wait for each other.
#[derive(Clone)]
pub(crate) enum Connection {
    Server { client: Arc<redis::Client>, commands: ConnectionManager },
    Cluster(Cluster),
}

impl Connection {
    /// Connects to what `url` names.
    pub(crate) async fn open(url: &str) -> Result<Self, QueueError> {
        if let Some(nodes) = cluster::nodes(url) {
            return Ok(Self::Cluster(Cluster::connect(&nodes).await?));
        }
        let client = redis::Client::open(url).map_err(|source| bad_url(&source))?;
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_connection_timeout(Some(Duration::from_secs(3)))
            .set_number_of_retries(3)
            .set_max_delay(Duration::from_secs(1));
        let connecting = ConnectionManager::new_with_config(client.clone(), config).await;
        let commands = connecting.map_err(|source| QueueError::from_redis("connecting", source))?;
        Ok(Self::Server { client: Arc::new(client), commands })
    }

    /// What every server that takes writes says about itself.
    pub(crate) async fn info(&mut self) -> RedisResult<Vec<InfoDict>> {
        match self {
            Self::Server { commands, .. } => Ok(vec![redis::cmd("INFO").query_async(commands).await?]),
            Self::Cluster(cluster) => cluster.info().await,
        }
    }

    /// What to write for this server in its url when it turns out to be part of a cluster; `None` for a cluster.
    pub(crate) fn as_cluster_url(&self) -> Option<String> {
        match self {
            Self::Server { client, .. } => Some(cluster::url_of(client.get_connection_info().addr())),
            Self::Cluster(_) => None,
        }
    }

    /// A connection of its own for messages, to a server that is alive and reaches every publisher. `channel` tells
    /// where in a cluster they will come from; `failures` counts the tries that came to nothing, one after another.
    pub(crate) async fn pubsub(&mut self, channel: &str, failures: u32) -> RedisResult<PubSub> {
        match self {
            Self::Server { client, .. } => client.get_async_pubsub().await,
            Self::Cluster(cluster) => cluster.any_node(channel, failures).await?.get_async_pubsub().await,
        }
    }
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Server { commands, .. } => commands.req_packed_command(cmd),
            Self::Cluster(cluster) => cluster.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        // Of no lane or no job: the library takes that for a mistake.
        if pipeline.is_empty() {
            return std::future::ready(Ok(Vec::new())).boxed();
        }
        match self {
            Self::Server { commands, .. } => commands.req_packed_commands(pipeline, offset, count),
            Self::Cluster(cluster) => cluster.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Server { commands, .. } => commands.get_db(),
            Self::Cluster(cluster) => cluster.get_db(),
        }
    }
}

/// The url cannot be read.
pub(crate) fn bad_url(source: &redis::RedisError) -> QueueError {
    let forms = "redis://HOST:PORT, or redis+cluster://HOST:PORT,HOST:PORT for a cluster";
    QueueError::Unsuitable { problem: format!("its url is not of the form {forms} ({source})") }
}
