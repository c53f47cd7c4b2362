//! `genmill providers`: what is known of remote providers. The API worker's program answers: only it has the table.

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

/// Becomes the program; returns only when it cannot.
pub(crate) fn run(args: Args) -> anyhow::Result<Ending> {
    let own = std::env::current_exe().context("cannot find this program")?;
    let beside = own.with_file_name(PROGRAM);
    let mut command = Command::new(if beside.is_file() { beside } else { PathBuf::from(PROGRAM) });
    if let Some(file) = args.config {
        command.arg("--config").arg(file);
    }
    let error = command.arg("providers").args(args.command).exec();
    Err(error).with_context(|| format!("cannot run {PROGRAM}, which lies neither beside {} nor in PATH", own.display()))
}
