//! The API worker's speed: CPU time of a call, memory of calls in flight, and what the worker adds to a call's time.
//!
//! Run by `cargo xtask bench api`. A stand-in provider answers at once, or holds its answers; the worker is a real one,
//! with a scheduler and a Redis of this run's own. The same calls go straight to the stand-in, which is the limit of this
//! machine, and through gateways that are installed. Never here: figures of other runs (see `docs/benchmarks.md`).

#[path = "../figures.rs"]
#[expect(dead_code, reason = "some goals are those of other benchmarks only")]
mod figures;
mod gateway;
mod load;
mod mill;
mod process;
mod sample;
mod soak;

use clap::Parser;
use figures::Figures;
use gateway::Kind;
use std::path::PathBuf;
use std::time::Duration;

/// Measures the API worker.
///
/// CPU is user and system time of the process alone, queue traffic included, for each call. "Added" is what a call takes
/// beyond the time for which the stand-in has it: for the worker from the hint that a job waits to its call's arrival,
/// and from the end of its answer to the message that the job has finished; "submit to finished" counts from the client's
/// call instead. For gateways it is the whole time of the HTTP call without the stand-in's.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    instead: Option<Instead>,
    /// Where the figures go as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench-api.json")]
    json: PathBuf,
    /// A tenth of everything: to see that it works
    #[arg(long)]
    quick: bool,
    /// Only this part; may be given more than once
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<Part>,
    /// The folder of a Python environment with litellm[proxy]; without it LiteLLM is left out
    #[arg(long, value_name = "FOLDER")]
    litellm: Option<PathBuf>,
    /// A folder in which node finds @portkey-ai/gateway; without it Portkey is left out
    #[arg(long, value_name = "FOLDER")]
    portkey: Option<PathBuf>,
}

/// What can be done instead of measuring.
#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Instead {
    /// Watch the worker's memory while providers stall, drip, never end or send far too much; fail when it grows
    Soak {
        /// For how long
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
        minutes: u32,
    },
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Straight to the stand-in
    Direct,
    /// Our worker's CPU, and what it adds
    Worker,
    /// Our worker's memory
    Memory,
    /// LiteLLM's proxy
    Litellm,
    /// Portkey's gateway
    Portkey,
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Jobs of a backlog.
    pub(crate) calls: u64,
    /// How long calls go out as fast as they are answered.
    pub(crate) saturated: Duration,
    /// Calls each second…
    pub(crate) pace: u64,
    /// …and for so many seconds, of which the first does not count.
    pub(crate) seconds: u64,
    /// Calls that are held at once.
    pub(crate) held: usize,
}

impl Sizes {
    const WHOLE: Self = Self { calls: 30_000, saturated: Duration::from_secs(15), pace: 500, seconds: 21, held: 2_000 };
    const QUICK: Self = Self { calls: 3_000, saturated: Duration::from_secs(2), pace: 500, seconds: 3, held: 2_000 };
}

/// What peers are compared by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    /// CPU of a call, in milliseconds: streamed, and answered whole.
    pub(crate) cpu_ms: [f64; 2],
    /// Resident memory with calls in flight, in MB.
    pub(crate) resident_mb: f64,
    /// What is added to a call's time, in milliseconds, p99.
    pub(crate) added_ms: f64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    genmill_daemon::tls::install();
    if let Some(Instead::Soak { minutes }) = args.instead {
        return soak::soak(minutes).await;
    }
    let sizes = if args.quick { Sizes::QUICK } else { Sizes::WHOLE };
    let mut figures = Figures::default();
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    if wanted(Part::Direct) {
        load::measure_direct(&mut figures, sizes).await?;
    }
    let speeds = if wanted(Part::Worker) { Some(mill::measure(&mut figures, sizes).await?) } else { None };
    let memory = if wanted(Part::Memory) { Some(mill::hold(&mut figures, sizes).await?) } else { None };
    let ours = speeds.zip(memory).map(|((cpu_ms, added_ms), resident_mb)| Sums { cpu_ms, resident_mb, added_ms });
    let gateways = [(Part::Litellm, Kind::LiteLlm, &args.litellm), (Part::Portkey, Kind::Portkey, &args.portkey)];
    for (part, kind, folder) in gateways {
        let Some(folder) = folder.as_ref().filter(|_| wanted(part)) else { continue };
        // One that does not run is told, and spoils no other's figures.
        match gateway::measure(&mut figures, sizes, kind, folder).await {
            Ok(theirs) => ratios(&mut figures, kind, ours, theirs)?,
            Err(error) => figures.heading(&format!("{} IS LEFT OUT: {error:#}", kind.name()))?,
        }
    }
    figures.write(&args.json)
}

/// How much of ours a gateway takes.
fn ratios(figures: &mut Figures, kind: Kind, ours: Option<Sums>, theirs: Sums) -> anyhow::Result<()> {
    let Some(ours) = ours else { return Ok(()) };
    figures.heading(&format!("{}, times ours", kind.name()))?;
    let manner = usize::from(!kind.streams());
    figures.add("CPU of a call", theirs.cpu_ms[manner] / ours.cpu_ms[manner], "times", figures::Goal::Nothing)?;
    figures.add("resident, calls in flight", theirs.resident_mb / ours.resident_mb, "times", figures::Goal::Nothing)?;
    figures.add("added to a call, p99", theirs.added_ms / ours.added_ms, "times", figures::Goal::Nothing)
}
