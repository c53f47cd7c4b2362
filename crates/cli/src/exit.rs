//! How the command ends: the exit codes, and the one place that prints an error.

use genmill_client::Error;
use std::process::ExitCode;

/// How a command ended that could do what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All is well.
    Done,
    /// A job did not succeed.
    JobFailed,
}

/// The request was refused or something broke.
const FAILED: u8 = 1;
/// The command line is wrong; clap uses the same.
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
    let from_client = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
    match from_client {
        Some(Error::Unreachable { .. }) => UNREACHABLE,
        Some(Error::BadAddress { .. }) => WRONG_USAGE,
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

    fn check(error: Error, expect: u8) {
        let error = Err::<(), _>(error).context("while testing").unwrap_err();
        assert_eq!(code(&error), expect, "{error:#}");
    }

    #[test]
    fn each_kind_of_error_has_its_code() {
        check(Error::Unreachable { server: "x".to_owned(), source: "refused".into() }, 3);
        check(Error::BadAddress { server: "x".to_owned(), problem: "empty" }, 2);
        check(Error::NotFound { message: "no such job".to_owned() }, 1);
        assert_eq!(code(&anyhow::anyhow!("anything else")), 1);
    }
}
