//! How the command ends: the exit codes, and the one place that prints an error.

use genmill_client::{Error, Reason};
use std::process::ExitCode;

/// How a command ended that could do what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All is well.
    Done,
    /// A job did not succeed.
    JobFailed,
}

/// What was asked for is written wrongly, in flags or in a file: asked the same way again, it fails again. For what clap
/// cannot see.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct WrongUsage(pub(crate) anyhow::Error);

/// The job failed or was refused, or something broke.
const FAILED: u8 = 1;
/// The command line, or a file that it names, is wrong; clap uses the same.
const WRONG_USAGE: u8 = 2;
/// Nobody answers at the server's address.
const UNREACHABLE: u8 = 3;

impl Ending {
    pub(crate) fn code(self) -> ExitCode {
        match self {
            Self::Done => ExitCode::SUCCESS,
            Self::JobFailed => ExitCode::from(FAILED),
        }
    }
}

/// Prints an error and picks the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if is_broken_pipe(error) {
        // Whoever read our output has seen enough, as in `genmill list | head`.
        return ExitCode::SUCCESS;
    }
    crate::output::note(&format!("error: {error:#}"));
    ExitCode::from(code(error))
}

fn code(error: &anyhow::Error) -> u8 {
    if error.chain().any(|cause| cause.is::<WrongUsage>()) {
        return WRONG_USAGE;
    }
    match error.chain().find_map(|cause| cause.downcast_ref::<Error>()) {
        Some(Error::Unreachable { .. }) => UNREACHABLE,
        // A field that the server does not take is a flag that was given wrongly.
        Some(Error::BadAddress { .. } | Error::Refused { reason: Reason::InvalidRequest, .. }) => WRONG_USAGE,
        _ => FAILED,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let from_io = error.downcast_ref::<std::io::Error>();
    from_io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    fn check(error: impl Into<anyhow::Error>, expect: u8) {
        let error = Err::<(), _>(error.into()).context("while testing").unwrap_err();
        assert_eq!(code(&error), expect, "{error:#}");
    }

    #[test]
    fn each_kind_of_error_has_its_code() {
        check(Error::Unreachable { server: "x".to_owned(), source: "refused".into() }, 3);
        check(Error::BadAddress { server: "x".to_owned(), problem: "empty" }, 2);
        check(Error::NotFound { message: "no such job".to_owned() }, 1);
        check(WrongUsage(anyhow::anyhow!("a malformed file")), 2);
        check(anyhow::anyhow!("anything else"), 1);
    }

    #[test]
    fn a_refusal_is_wrong_usage_only_when_the_request_is_wrong() {
        for reason in Reason::ALL {
            let expect = if reason == Reason::InvalidRequest { 2 } else { 1 };
            check(Error::Refused { reason, message: "why".to_owned() }, expect);
        }
    }

    #[test]
    fn wrong_usage_says_what_is_wrong_once() {
        let error = WrongUsage(anyhow::anyhow!("line 3").context("in chat.yaml"));
        assert_eq!(format!("{:#}", anyhow::Error::from(error)), "in chat.yaml: line 3");
    }
}
