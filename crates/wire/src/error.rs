//! Errors of the API: google.rpc.Status with an ErrorInfo whose reason programs can branch on.

use genmill_core::admit::Refusal;
use genmill_core::model::BadModelName;
use std::collections::{BTreeMap, HashMap};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// The domain of every ErrorInfo.
pub const DOMAIN: &str = "genmill";

/// The reasons an ErrorInfo may carry. The proto lists them; this is where they are spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A field is wrong.
    InvalidRequest,
    /// The request is too large.
    TooLarge,
    /// The model name has no known prefix.
    UnknownPrefix,
    /// No configuration lists the model.
    ModelNotListed,
    /// The model is listed, but its worker cannot run it.
    ModelUnavailable,
    /// No worker has the provider's key.
    KeyMissing,
    /// No live worker serves the backend.
    NoLiveWorker,
    /// No job has the id.
    JobNotFound,
    /// The job has not failed.
    JobNotFailed,
    /// No lane has the name.
    LaneNotFound,
    /// The request_id was used for other content.
    RequestIdReused,
    /// Redis does not answer.
    QueueUnavailable,
    /// A defect of Genmill itself.
    Internal,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 13] = [
        Self::InvalidRequest,
        Self::TooLarge,
        Self::UnknownPrefix,
        Self::ModelNotListed,
        Self::ModelUnavailable,
        Self::KeyMissing,
        Self::NoLiveWorker,
        Self::JobNotFound,
        Self::JobNotFailed,
        Self::LaneNotFound,
        Self::RequestIdReused,
        Self::QueueUnavailable,
        Self::Internal,
    ];

    /// The reason as sent.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::TooLarge => "TOO_LARGE",
            Self::UnknownPrefix => "UNKNOWN_PREFIX",
            Self::ModelNotListed => "MODEL_NOT_LISTED",
            Self::ModelUnavailable => "MODEL_UNAVAILABLE",
            Self::KeyMissing => "KEY_MISSING",
            Self::NoLiveWorker => "NO_LIVE_WORKER",
            Self::JobNotFound => "JOB_NOT_FOUND",
            Self::JobNotFailed => "JOB_NOT_FAILED",
            Self::LaneNotFound => "LANE_NOT_FOUND",
            Self::RequestIdReused => "REQUEST_ID_REUSED",
            Self::QueueUnavailable => "QUEUE_UNAVAILABLE",
            Self::Internal => "INTERNAL",
        }
    }

    /// The reason of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// The status code it goes with.
    #[must_use]
    pub const fn code(self) -> Code {
        match self {
            Self::InvalidRequest | Self::TooLarge | Self::UnknownPrefix => Code::InvalidArgument,
            Self::ModelNotListed | Self::JobNotFound | Self::LaneNotFound => Code::NotFound,
            Self::ModelUnavailable | Self::KeyMissing | Self::NoLiveWorker | Self::JobNotFailed => {
                Code::FailedPrecondition
            }
            Self::RequestIdReused => Code::AlreadyExists,
            Self::QueueUnavailable => Code::Unavailable,
            Self::Internal => Code::Internal,
        }
    }
}

/// An error of the API before it becomes a `Status`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub reason: Reason,
    /// For a person: what was wrong, where, what to do.
    pub message: String,
    /// Details for programs, by name.
    pub metadata: BTreeMap<&'static str, String>,
}

impl ApiError {
    /// Makes an error.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), metadata: BTreeMap::new() }
    }

    /// The same error with a detail for programs.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.metadata.insert(name, value.into());
        self
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let metadata: HashMap<String, String> = error.metadata.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let details = ErrorDetails::with_error_info(error.reason.name(), DOMAIN, metadata);
        Self::with_error_details(error.reason.code(), error.message, details)
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let reason = match &refusal {
            Refusal::Invalid(_) | Refusal::Name(BadModelName::Malformed { .. }) => Reason::InvalidRequest,
            Refusal::TooLarge { .. } => Reason::TooLarge,
            Refusal::Name(BadModelName::UnknownPrefix { .. }) => Reason::UnknownPrefix,
            Refusal::NotListed { .. } => Reason::ModelNotListed,
            Refusal::NoLiveWorker { .. } => Reason::NoLiveWorker,
            Refusal::KeyMissing { .. } => Reason::KeyMissing,
            Refusal::Unavailable { .. } => Reason::ModelUnavailable,
            Refusal::NoBatches { .. } => Reason::InvalidRequest,
        };
        Self::new(reason, refusal.to_string())
    }
}

/// The reason that a received `status` carries, when it is one of ours.
#[must_use]
pub fn reason_of(status: &Status) -> Option<Reason> {
    let info = status.get_error_details().error_info()?.clone();
    if info.domain == DOMAIN { Reason::from_name(&info.reason) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_survives_the_way_through_a_status() {
        for reason in Reason::ALL {
            let status = Status::from(ApiError::new(reason, "x"));
            assert_eq!(reason_of(&status), Some(reason));
            assert_eq!(status.code(), reason.code());
        }
        assert_eq!(reason_of(&Status::internal("foreign")), None);
    }
}
