//! `genmill providers` and `genmill prices`: what is known of remote providers, and what their models cost. The API
//! worker's program answers: only it has the tables.

use crate::exit::Ending;
use anyhow::Context as _;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

/// The program that knows providers.
const PROGRAM: &str = "genmill-worker-api";

/// List remote providers, show one, or test whether it answers: list | show NAME | test NAME
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true, override_usage = "genmill providers [--config FILE] <list|show|test> [NAME]")]
pub(crate) struct Args {
    /// Configuration file [default: genmill.toml, when there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What to tell, and of which provider; `genmill providers help` tells more
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Show what remote models cost, or compare with a published table: show MODEL | diff --from FILE | update --from FILE
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true, override_usage = "genmill prices [--config FILE] <show|diff|update> …")]
pub(crate) struct PricesArgs {
    /// Configuration file [default: genmill.toml, when there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What to tell or to do; `genmill prices help` tells more
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Becomes the program; returns only when it cannot.
pub(crate) fn run(Args { config, command }: Args) -> anyhow::Result<Ending> {
    answer("providers", config, command)
}

/// Becomes the program; returns only when it cannot.
pub(crate) fn run_prices(PricesArgs { config, command }: PricesArgs) -> anyhow::Result<Ending> {
    answer("prices", config, command)
}

fn answer(what: &str, config: Option<PathBuf>, words: Vec<OsString>) -> anyhow::Result<Ending> {
    let own = std::env::current_exe().context("cannot find this program")?;
    let beside = own.with_file_name(PROGRAM);
    let mut command = Command::new(if beside.is_file() { beside } else { PathBuf::from(PROGRAM) });
    if let Some(file) = config {
        command.arg("--config").arg(file);
    }
    let error = command.arg(what).args(words).exec();
    Err(error).with_context(|| format!("cannot run {PROGRAM}, which lies neither beside {} nor in PATH", own.display()))
}
