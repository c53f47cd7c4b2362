//! What can go wrong with the queue.

use genmill_core::ids::JobId;

/// An error of the queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Redis does not answer, or not in time, or says that it cannot work now. What was asked may or may not have been
    /// done; every operation may be repeated.
    #[error("redis is not available while {doing}")]
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
        // What was sent together may be refused with a code of its own; the reasons then stand with its commands.
        let of_commands = source.clone().into_server_errors().unwrap_or_default();
        let away = source.code().into_iter().chain(of_commands.iter().map(|(_, error)| error.code())).any(is_away);
        if passing || no_node || away { Self::Unreachable { doing, source } } else { Self::Refused { doing, source } }
    }

    /// True when the same call may succeed later.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    /// What went wrong, with what Redis said of it: where no list of sources is shown.
    #[must_use]
    pub fn in_full(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

/// Whether a Redis that answers with this code will serve later.
fn is_away(code: &str) -> bool {
    let loading = matches!(code, "LOADING" | "MASTERDOWN" | "CLUSTERDOWN" | "TRYAGAIN" | "READONLY");
    // What a client gets that has not yet learned where a slot is now, or whose node has just lost its scripts.
    let behind = matches!(code, "MOVED" | "ASK" | "NOSCRIPT");
    // Until somebody gives it memory, disk or replicas, or ends the script that holds it up.
    let short = matches!(code, "OOM" | "MISCONF" | "NOREPLICAS" | "BUSY");
    loading || behind || short
}
