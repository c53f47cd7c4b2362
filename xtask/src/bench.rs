//! `cargo xtask bench`: figures for docs/benchmarks.md, in release, on this machine.

use crate::gateways;
use crate::peers;
use crate::redis;
use crate::tool::{cargo, is_there, root, run, say};
use std::path::PathBuf;
use std::process::Command;

/// The peer that is measured in the same run, and the client that it needs.
const BULLMQ: [&str; 2] = ["bullmq@6.7.0", "ioredis@5"];

/// What can be measured.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum What {
    /// Submission, claim to finish, latencies, a deep backlog, and what each costs Redis
    Queue,
    /// The API worker's CPU, memory and what it adds to calls, against LiteLLM's proxy and Portkey's gateway
    Api,
    /// Decoding, prefill and shared prefixes on the CPU, against llama.cpp and transformers on the same weights
    Engine,
}

/// Builds and runs a benchmark; `rest` goes on to it.
pub(crate) fn run_bench(what: What, rest: &[String]) -> anyhow::Result<()> {
    match what {
        What::Queue => queue(rest),
        What::Api => api(rest),
        What::Engine => engine(rest),
    }
}

fn engine(rest: &[String]) -> anyhow::Result<()> {
    let mut bench = cargo();
    bench.args(["run", "--release", "--package", "genmill-bench-engine", "--"]);
    // Whoever names pythons has what they want there.
    let named = std::env::var_os(peers::VARIABLE).is_some() || rest.iter().any(|word| word.starts_with("--python"));
    if !named {
        bench.arg("--python").arg(peers::python());
    }
    run(bench.args(rest))
}

fn api(rest: &[String]) -> anyhow::Result<()> {
    let mut bench = bench_api()?;
    // Whoever asks for help has nothing to install.
    if !rest.iter().any(|word| word == "--help" || word == "-h") {
        for (option, folder) in gateways::folders() {
            bench.arg(option).arg(folder);
        }
    }
    run(bench.args(rest))
}

/// Builds and runs the soak test of the API worker.
pub(crate) fn run_soak(minutes: u32) -> anyhow::Result<()> {
    run(bench_api()?.args(["soak", "--minutes", &minutes.to_string()]))
}

/// The benchmark of the API worker, with the real daemons that it starts beside it.
fn bench_api() -> anyhow::Result<Command> {
    redis::install_if_missing()?;
    let daemons = ["--package", "genmill-scheduler", "--package", "genmill-worker-api"];
    run(cargo().args(["build", "--release", "--bins"]).args(daemons))?;
    let mut bench = cargo();
    bench.args(["run", "--release", "--package", "genmill-bench-api", "--bin", "bench-api", "--"]);
    Ok(bench)
}

fn queue(rest: &[String]) -> anyhow::Result<()> {
    redis::install_if_missing()?;
    // The benchmark starts a real scheduler, which lies beside it.
    run(cargo().args(["build", "--release", "--package", "genmill-scheduler", "--bins"]))?;
    let mut bench = cargo();
    bench.args(["run", "--release", "--package", "genmill-tests", "--bin", "bench-queue", "--"]);
    if let Some(folder) = bullmq() {
        bench.arg("--bullmq").arg(folder);
    }
    run(bench.args(rest))
}

/// A folder with BullMQ, where node and npm are there to install it.
fn bullmq() -> Option<PathBuf> {
    if !is_there("node", &["--version"]) || !is_there("npm", &["--version"]) {
        say("BullMQ is not measured: node and npm are not there");
        return None;
    }
    let folder = root().join("target/bullmq");
    let made = std::fs::create_dir_all(&folder).map_err(anyhow::Error::from).and_then(|()| {
        run(Command::new("npm")
            .args(["install", "--no-audit", "--no-fund", "--silent"])
            .args(BULLMQ)
            .current_dir(&folder))
    });
    match made {
        Ok(()) => Some(folder),
        Err(error) => {
            say(&format!("BullMQ is not measured: {error:#}"));
            None
        }
    }
}
