//! What can go wrong with the queue.

use genmill_core::ids::JobId;

/// An error of the queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Redis does not answer, or not in time. What was asked may or may not have been done; every operation may be
    /// repeated.
    #[error("redis does not answer while {doing}")]
    Unreachable {
        /// What was being done.
        doing: &'static str,
        /// What the connection said.
        #[source]
        source: redis::RedisError,
    },
    /// Redis refused a command.
    #[error("redis refused while {doing}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// What Redis said.
        #[source]
        source: redis::RedisError,
    },
    /// This Redis must not be used.
    #[error("this redis cannot hold a queue: {problem}")]
    Unsuitable {
        /// What is wrong, and what to set.
        problem: String,
    },
    /// A stored record cannot be read.
    #[error("the stored {what} cannot be read: {problem}")]
    Corrupt {
        /// Which record.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No job has the id.
    #[error("no job has the id {id}")]
    NoSuchJob {
        /// The id.
        id: JobId,
    },
    /// More lanes than a lane number can count.
    #[error("all 65,535 lane numbers are taken: the registry is full")]
    LanesFull,
}

impl QueueError {
    /// Tells errors of the connection from refusals.
    pub(crate) fn from_redis(doing: &'static str, source: redis::RedisError) -> Self {
        let passing = source.is_io_error() || source.is_timeout() || source.is_connection_dropped();
        let no_node = source.kind() == redis::ErrorKind::ClusterConnectionNotFound;
        let loading = matches!(source.code(), Some("LOADING" | "MASTERDOWN" | "CLUSTERDOWN" | "TRYAGAIN" | "READONLY"));
        // What a client gets that has not yet learned where a slot is now, or whose node has just lost its scripts.
        let behind = matches!(source.code(), Some("MOVED" | "ASK" | "NOSCRIPT"));
        if passing || no_node || loading || behind {
            Self::Unreachable { doing, source }
        } else {
            Self::Refused { doing, source }
        }
    }

    /// True when the same call may succeed later.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}
