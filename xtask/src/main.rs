//! Developer commands: `cargo xtask demo | test | chaos | bench | ci`. Runs on a machine that has a Rust toolchain, a C
//! compiler and a package manager, and installs what else is needed.
//!
//! Never here: anything that the product itself needs at run time.

mod bench;
mod chaos;
mod cuda;
mod demo;
mod gateways;
mod peers;
mod redis;
mod tests;
mod tool;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Developer commands of Genmill.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build in release, start a mill, compare two tiny local models at tic-tac-toe, stop everything
    Demo,
    /// Run all tests, with real redis-server processes
    Test {
        /// Passed on to the test runner, such as a test's name
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Run a mill while processes are killed and connections break, and check that its promises hold
    Chaos {
        /// How long things go wrong
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=600))]
        minutes: u32,
        /// What goes wrong when; a failed run tells its own. Drawn when not given
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Measure the queue, the API worker or the engine on this machine, with peers in the same run, and print a table
    Bench {
        /// What is measured
        what: bench::What,
        /// Passed on to the benchmark, such as --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Watch the API worker's memory while providers stall, drip, never end or send far too much; fail when it grows
    Soak {
        /// For how long
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
        minutes: u32,
    },
    /// Fetch the pinned CUDA compiler into target/ and print the environment of a build, see docs/cuda.md
    CudaToolchain,
    /// Build genmill-worker-gpu with CUDA; needs no GPU
    BuildCuda {
        /// The compute capability that it is built for: 80 (A100), 90 (H100, H200), 100 (B200)
        #[arg(long, default_value = "90")]
        capability: String,
    },
    /// Compare every kernel and the tests' models on a GPU with the CPU's
    GpuCheck {
        /// As of build-cuda
        #[arg(long, default_value = "90")]
        capability: String,
        /// Do not run it: put all that it needs into this folder, for a machine that has a GPU
        #[arg(long)]
        pack: Option<std::path::PathBuf>,
    },
    /// Measure decode on a GPU, with made-up weights of known models
    GpuBench {
        /// As of build-cuda
        #[arg(long, default_value = "90")]
        capability: String,
        /// As of gpu-check
        #[arg(long)]
        pack: Option<std::path::PathBuf>,
    },
    /// What CI runs: formatting, lints with warnings as errors, all tests
    Ci,
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Demo => demo::run_demo(),
        Command::Test { rest } => tests::test(&rest),
        Command::Chaos { minutes, seed } => chaos::run_chaos(minutes, seed),
        Command::Bench { what, rest } => bench::run_bench(what, &rest),
        Command::Soak { minutes } => bench::run_soak(minutes),
        Command::CudaToolchain => cuda::print_toolchain(),
        Command::BuildCuda { capability } => cuda::build_worker(&capability),
        Command::GpuCheck { capability, pack } => cuda::gpu("gpu_check", &capability, pack.as_deref()),
        Command::GpuBench { capability, pack } => cuda::gpu("gpu_bench", &capability, pack.as_deref()),
        Command::Ci => tests::ci(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tool::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
