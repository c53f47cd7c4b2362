//! `cargo xtask bench`: figures for docs/benchmarks.md, in release, on this machine.

use crate::redis;
use crate::tool::{cargo, run};

/// What can be measured.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum What {
    /// Submission, claim to finish, and what each costs Redis
    Queue,
}

/// Builds and runs a benchmark.
pub(crate) fn run_bench(what: What) -> anyhow::Result<()> {
    redis::install_if_missing()?;
    let What::Queue = what;
    // The benchmark starts a real scheduler, which lies beside it.
    run(cargo().args(["build", "--release", "--package", "genmill-scheduler", "--bins"]))?;
    run(cargo().args(["run", "--release", "--package", "genmill-tests", "--bin", "bench-queue"]))
}
