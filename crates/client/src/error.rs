//! What can go wrong, as callers branch on it. The one place that tells a broken connection from an answer.

use genmill_wire::error::{Reason, reason_of};
use genmill_wire::v1;
use std::error::Error as StdError;
use tonic::{Code, Status};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server's address cannot be used.
    #[error("`{server}` is not a server's address: {problem}")]
    BadAddress {
        /// What was given.
        server: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Nobody answers at the address, or the connection broke. Trying again later may help.
    #[error("cannot reach the server at {server}")]
    Unreachable {
        /// Where.
        server: String,
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// No job has the id, or no lane the name.
    #[error("{message}")]
    NotFound {
        /// What the server said.
        message: String,
    },
    /// The server understood and refused.
    #[error("{message}")]
    Refused {
        /// For programs.
        reason: Reason,
        /// For people: what was wrong and what to do.
        message: String,
    },
    /// The job ended without a result: it failed, was cancelled or expired.
    #[error("{}", why_no_result(job))]
    JobFailed {
        /// The job, with its state and error.
        job: Box<v1::Job>,
    },
    /// The server answered with an error that is none of Genmill's own, such as a message over the size limit.
    #[error("the server answered {:?}: {}", .0.code(), .0.message())]
    Status(Box<Status>),
    /// The server answered something that the API does not allow: it is of another version, or not Genmill.
    #[error("the server broke the protocol: {problem}")]
    Protocol {
        /// What it did.
        problem: &'static str,
    },
}

impl Error {
    /// Sorts what a call to `server` came back with.
    pub(crate) fn from_status(server: &str, status: Status) -> Self {
        let message = status.message().to_owned();
        match reason_of(&status) {
            Some(Reason::JobNotFound | Reason::LaneNotFound) => Self::NotFound { message },
            Some(reason) => Self::Refused { reason, message },
            None if is_broken_connection(&status) => {
                let why = status.source().map_or(message, root_cause);
                Self::Unreachable { server: server.to_owned(), source: why.into() }
            }
            None => Self::Status(Box::new(status)),
        }
    }

    /// True when the same call may succeed later although nobody changes it: the server or its queue is away.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Refused { reason: Reason::QueueUnavailable, .. })
    }
}

/// True when no server sent this status: the transport made it up because the connection failed.
fn is_broken_connection(status: &Status) -> bool {
    // A status made from a transport error has that as its source; one that was received has none. A stream that the
    // server reset in good order (HTTP/2 NO_ERROR or CANCEL) shows only by its missing trailer.
    let cut = status.code() == Code::Unknown && status.message().contains("missing grpc-status");
    status.code() == Code::Unavailable || status.source().is_some() || cut
}

/// The innermost reason, such as "Connection refused": the layers above it only say "transport error".
pub(crate) fn root_cause(error: &(dyn StdError + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

fn why_no_result(job: &v1::Job) -> String {
    let id = &job.id;
    match (job.state(), &job.error) {
        (v1::JobState::Cancelled, _) => format!("job {id} was cancelled"),
        (v1::JobState::Expired, _) => format!("job {id} expired: its deadline passed"),
        (_, Some(error)) => {
            let class = error.error_class().as_str_name().trim_start_matches("ERROR_CLASS_").to_lowercase();
            format!("job {id} failed ({class}): {}", error.message)
        }
        _ => format!("job {id} ended without a result"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_wire::error::ApiError;

    fn from(status: Status) -> Error {
        Error::from_status("http://x", status)
    }

    #[test]
    fn reasons_of_ours_are_told_apart() {
        let api = |reason| from(ApiError::new(reason, "why").into());
        assert!(matches!(api(Reason::JobNotFound), Error::NotFound { message } if message == "why"));
        assert!(matches!(api(Reason::KeyMissing), Error::Refused { reason: Reason::KeyMissing, .. }));
        assert!(api(Reason::QueueUnavailable).is_passing());
        assert!(!api(Reason::InvalidRequest).is_passing());
    }

    #[test]
    fn a_failure_of_the_transport_is_not_an_answer() {
        assert!(matches!(from(Status::unavailable("gone")), Error::Unreachable { .. }));
        assert!(matches!(from(Status::from_error("reset".into())), Error::Unreachable { .. }));
        assert!(matches!(
            from(Status::unknown("protocol error: missing grpc-status trailer")),
            Error::Unreachable { .. }
        ));
        assert!(matches!(from(Status::unknown("a defect")), Error::Status(_)));
        assert!(matches!(from(Status::out_of_range("too large")), Error::Status(_)));
    }

    #[test]
    fn a_failed_job_says_why() {
        let error = Some(v1::JobError { error_class: v1::ErrorClass::Auth.into(), message: "bad key".to_owned() });
        let job = v1::Job { id: "j".to_owned(), state: v1::JobState::Failed.into(), error, ..v1::Job::default() };
        assert_eq!(Error::JobFailed { job: Box::new(job) }.to_string(), "job j failed (auth): bad key");
        let job = v1::Job { id: "j".to_owned(), state: v1::JobState::Cancelled.into(), ..v1::Job::default() };
        assert_eq!(Error::JobFailed { job: Box::new(job) }.to_string(), "job j was cancelled");
    }
}
