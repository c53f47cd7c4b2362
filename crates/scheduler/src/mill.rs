//! What every RPC works with.

use crate::facts::Registrations;
use crate::forms::Forms;
use crate::hub::Hub;
use genmill_core::admit::Defaults;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_daemon::random::random_u64;
use genmill_daemon::shutdown::Shutdown;
use genmill_queue::{Queue, QueueError};
use genmill_wire::error::{ApiError, Reason};
use std::sync::Arc;

/// The scheduler's parts. Clones share them.
#[derive(Clone)]
pub(crate) struct Mill {
    pub(crate) queue: Queue,
    pub(crate) hub: Hub,
    pub(crate) registrations: Arc<Registrations>,
    pub(crate) forms: Forms,
    pub(crate) defaults: Defaults,
    pub(crate) shutdown: Shutdown,
}

impl Mill {
    pub(crate) fn new(queue: Queue, hub: Hub, defaults: Defaults, shutdown: Shutdown) -> Self {
        let registrations = Arc::new(Registrations::new(queue.clone()));
        Self { queue, hub, registrations, forms: Forms::default(), defaults, shutdown }
    }

    #[expect(clippy::unused_self, reason = "the clock is a part like the others")]
    pub(crate) fn now(&self) -> UnixMs {
        UnixMs(now_unix_ms())
    }

    #[expect(clippy::unused_self, reason = "the source of random numbers is a part like the others")]
    pub(crate) fn random(&self) -> Result<u64, ApiError> {
        random_u64().map_err(|error| ApiError::new(Reason::Internal, format!("no random numbers: {error}")))
    }
}

/// What a caller is told of an error of the queue.
pub(crate) fn api_error(error: QueueError) -> ApiError {
    let reason = match &error {
        QueueError::Unreachable { .. } => Reason::QueueUnavailable,
        QueueError::NoSuchJob { .. } => Reason::JobNotFound,
        QueueError::Refused { .. }
        | QueueError::Unsuitable { .. }
        | QueueError::Corrupt { .. }
        | QueueError::LanesFull => Reason::Internal,
    };
    let message = error.in_full();
    if reason == Reason::Internal {
        tracing::error!(message, "internal error");
    }
    ApiError::new(reason, message)
}
