//! `genmill exec-with-parent`: becomes another program that ends when the process that started it dies.
//!
//! For programs that cannot ask for this themselves. Other systems than Linux have no such request.

use crate::exit::Ending;
use anyhow::Context as _;
use genmill_daemon::parent;
use rustix::process::Signal;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Run a program that ends with the process that started it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The process that starts this one
    #[arg(long, value_name = "PID")]
    parent: i32,
    /// The program and its arguments
    #[arg(required = true, last = true)]
    program: Vec<OsString>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<Ending> {
    parent::end_with(args.parent, Signal::TERM)?;
    let (program, arguments) = args.program.split_first().context("no program is named")?;
    // Returns only when it fails.
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
