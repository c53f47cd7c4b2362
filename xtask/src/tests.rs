//! All tests, and what CI runs.

use crate::redis;
use crate::tool::{cargo, is_there, root, run, say};
use std::process::Command;

/// Runs every test: with nextest where it is installed, else with cargo test.
pub(crate) fn test(rest: &[String]) -> anyhow::Result<()> {
    redis::install_if_missing()?;
    // The scenarios start the daemons as processes, so these are built first.
    run(cargo().args(["build", "--workspace", "--bins"]))?;
    if is_there("cargo-nextest", &["nextest", "--version"]) {
        // Examples in doc comments are tests that nextest does not run. They come first, so that the summary of all the
        // others is the last thing to be seen.
        if rest.is_empty() {
            run(cargo().args(["test", "--workspace", "--doc", "--quiet"]))?;
        }
        return run(cargo().args(["nextest", "run", "--workspace", "--no-tests=fail"]).args(rest));
    }
    say("cargo-nextest is not installed: using cargo test");
    run(cargo().args(["test", "--workspace"]).args(rest))
}

/// `cargo xtask ci`: the script that CI runs.
pub(crate) fn ci() -> anyhow::Result<()> {
    run(Command::new("bash").arg(".ci/run").current_dir(root()))
}
