//! The engine's speed on the CPU: decoding alone and together, prefill, shared prefixes.
//!
//! Run by `cargo xtask bench engine`. Prints a table and writes JSON; every figure is of this run on this machine, and
//! those of peers on the same files, taken in turns with ours, stand beside them. Never here: a queue, a worker, figures
//! of other runs (see `docs/benchmarks.md`).

#[path = "../figures.rs"]
#[expect(dead_code, reason = "some goals are those of the benchmark of the queue only")]
mod figures;
mod model;
mod ours;
mod peers;

use clap::Parser;
use figures::{Figures, Goal};
use model::{Kind, SHAPES};
use ours::Ours;
use peers::{Peer, Theirs};
use std::path::{Path, PathBuf};

/// Measures the engine.
#[derive(Debug, Parser)]
struct Args {
    /// Where the figures go as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench-engine.json")]
    json: PathBuf,
    /// Where the models with random weights are made and kept; about 8 GB
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-engine")]
    models: PathBuf,
    /// Pythons that have llama-cpp-python or transformers, separated by commas
    #[arg(long, env = "GENMILL_BENCH_PYTHON", value_name = "FILES", value_delimiter = ',', default_value = "python3")]
    python: Vec<PathBuf>,
    /// Compute threads, ours and those of peers
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: usize,
    /// Only models whose name has this in it, such as 896 or q8_0
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// How often everything is measured, ours and theirs in turns; the medians count. With 0 only prefixes are
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Leave out shared prefixes
    #[arg(long)]
    no_prefixes: bool,
}

/// What is measured, in tokens a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// 48 tokens of one sequence, after a prompt of 8.
    Decode,
    /// 16 tokens each of 16 sequences, after prompts of 8.
    Decode16,
    /// A prompt of 512 tokens up to its first token.
    Prefill,
}

impl What {
    const ALL: [Self; 3] = [Self::Decode, Self::Decode16, Self::Prefill];

    const fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode, batch 1",
            Self::Decode16 => "decode, batch 16",
            Self::Prefill => "prefill of 512",
        }
    }

    /// Sequences, tokens of each prompt, and tokens decoded after the first that follows a prompt.
    const fn sizes(self) -> [usize; 3] {
        match self {
            Self::Decode => [1, 8, 48],
            Self::Decode16 => [16, 8, 16],
            Self::Prefill => [1, 512, 0],
        }
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut figures = Figures::default();
    for shape in SHAPES {
        for kind in Kind::ALL {
            let name = format!("{}-{}", shape.name, kind.name());
            if !name.contains(&args.only) {
                continue;
            }
            let path = model::make(&args.models, shape, *kind)?;
            figures.heading(&format!("{name}, {} threads", args.threads))?;
            if args.rounds > 0 {
                speeds(&args, &path, *kind, &mut figures)?;
            }
            if *kind == Kind::Q8 && !args.no_prefixes {
                let [without, with] = ours::shared_prefix(&path, args.threads)?;
                figures.add("64 jobs, shared 512, without cache", without, "s", Goal::Nothing)?;
                figures.add("64 jobs, shared 512, with cache", with, "s", Goal::Nothing)?;
                figures.add("faster with cache", without / with, "times", Goal::AtLeast(5.0))?;
            }
        }
    }
    figures.write(&args.json)
}

/// Our speeds and those of the peer that reads such files.
fn speeds(args: &Args, path: &Path, kind: Kind, figures: &mut Figures) -> anyhow::Result<()> {
    let peer = Peer::of(kind);
    let ours = Ours::start(path, args.threads, false)?;
    let mut theirs = Theirs::start(peer, &args.python, (path, args.threads))?;
    let (mut of_ours, mut of_theirs) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
    // The first round warms up.
    for round in 0..=args.rounds {
        for (index, what) in What::ALL.into_iter().enumerate() {
            let our_speed = ours.speed(what)?;
            let their_speed = theirs.as_mut().map(|theirs| theirs.speed(what)).transpose()?;
            if round > 0 {
                of_ours[index].push(our_speed);
                of_theirs[index].extend(their_speed);
            }
        }
    }
    let (of_ours, of_theirs) = (of_ours.map(median), of_theirs.map(median));
    for (what, speed) in What::ALL.into_iter().zip(of_ours) {
        figures.add(what.name(), speed, "tokens/s", Goal::Nothing)?;
    }
    let Some(theirs) = theirs else { return Ok(()) };
    for (what, speed) in What::ALL.into_iter().zip(of_theirs) {
        let name = format!("{} {}: {}", peer.name(), theirs.version(), what.name());
        figures.add(&name, speed, "tokens/s", Goal::Nothing)?;
    }
    let goals = peer.goals(kind);
    figures.add("batch 1, of theirs", of_ours[0] / of_theirs[0], "of it", goals[0])?;
    figures.add("batch 16, of their batch 1", of_ours[1] / of_theirs[0], "of it", goals[1])?;
    figures.add("prefill, of theirs", of_ours[2] / of_theirs[2], "of it", goals[2])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
