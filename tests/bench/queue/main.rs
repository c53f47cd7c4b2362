//! The queue's speed, through gRPC with a worker that does nothing: what everything but the models costs.
//!
//! Run by `cargo xtask bench queue`. Prints a table and writes JSON; every figure is of this run on this machine, and
//! those of peers and of the scripts alone stand beside ours. Never here: figures of other runs (see
//! `docs/benchmarks.md`).

mod bench;
mod figures;
mod latency;
mod life;
mod million;
mod noop;
mod peer;
mod scripts;

use clap::Parser;
use figures::Figures;
use std::path::PathBuf;

/// Measures the queue.
#[derive(Debug, Parser)]
struct Args {
    /// Where the figures go as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench-queue.json")]
    json: PathBuf,
    /// Jobs of the run with the deep backlog
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    deep: u64,
    /// Only this part; may be given more than once
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<Part>,
    /// A folder in which node finds BullMQ; without it there is no peer
    #[arg(long, value_name = "FOLDER")]
    bullmq: Option<PathBuf>,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Whole lives, ours and those of peers
    Life,
    /// Pickup and cancelling
    Latency,
    /// A deep backlog
    Deep,
}

/// Jobs of a run.
const JOBS: u64 = 50_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut figures = Figures::default();
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    for fsync in [figures::Fsync::None, figures::Fsync::EverySecond].into_iter().filter(|_| wanted(Part::Life)) {
        let ours = life::measure(&mut figures, fsync, JOBS).await?;
        scripts::measure(&mut figures, fsync, JOBS, ours).await?;
        if let Some(folder) = &args.bullmq {
            peer::measure(&mut figures, fsync, folder, JOBS, ours)?;
        }
    }
    if wanted(Part::Latency) {
        latency::measure(&mut figures).await?;
    }
    if wanted(Part::Deep) {
        million::measure(&mut figures, args.deep).await?;
    }
    figures.write(&args.json)
}
