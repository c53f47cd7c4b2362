//! Logs, to standard error: standard output belongs to what a command was asked for.

use crate::config::{LogFormat, Telemetry};
use tracing_subscriber::EnvFilter;

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
#[error("`{filter}` is not a log filter (write info, debug, or info,genmill_queue=debug): {problem}")]
pub struct BadFilter {
    filter: String,
    problem: String,
}

/// Reads the filter.
///
/// # Errors
/// [`BadFilter`] when it is none.
pub fn filter(telemetry: &Telemetry) -> Result<EnvFilter, BadFilter> {
    let fail = |problem: String| BadFilter { filter: telemetry.log.clone(), problem };
    EnvFilter::builder().parse(&telemetry.log).map_err(|error| fail(error.to_string()))
}

/// Starts logging for the rest of the process. A second call changes nothing.
///
/// # Errors
/// [`BadFilter`] when the filter cannot be read.
pub fn start(telemetry: &Telemetry) -> Result<(), BadFilter> {
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter(telemetry)?).with_writer(std::io::stderr);
    let started = match telemetry.format {
        LogFormat::Text => {
            let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
            subscriber.with_ansi(terminal).with_target(true).try_init()
        }
        LogFormat::Json => subscriber.json().try_init(),
    };
    // Only a test starts twice in one process.
    drop(started);
    Ok(())
}
