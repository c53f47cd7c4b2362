//! `cargo xtask chaos`: the test `chaos` for as long as wanted, or with the seed of a run that failed.

use crate::redis;
use crate::tool::{cargo, run};
use std::hash::{BuildHasher as _, RandomState};

/// Builds the daemons as the tests do, and makes a run. Without a seed, one is drawn; the run says which.
pub(crate) fn run_chaos(minutes: u32, seed: Option<u64>) -> anyhow::Result<()> {
    redis::install_if_missing()?;
    // The standard library's hash keys are random; there is no other source of random numbers in it.
    let seed = seed.unwrap_or_else(|| RandomState::new().hash_one(0));
    run(cargo().args(["build", "--package", "genmill-scheduler", "--package", "genmill-worker-api", "--bins"]))?;
    let (minutes, seed) = (minutes.to_string(), seed.to_string());
    run(cargo().args(["run", "--quiet", "--package", "genmill-tests", "--bin", "chaos", "--"]).args([
        "--minutes",
        &minutes,
        "--seed",
        &seed,
    ]))
}
