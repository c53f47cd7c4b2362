//! The GPU worker daemon: load models, serve, drain.

use clap::Parser;
use genmill_core::model::PREFIXES;
use genmill_daemon::run::{CommonArgs, Context, Loaded, daemon};
use genmill_engine::bandwidth::read_bytes_per_s;
use genmill_worker::{Kind, serve};
use genmill_worker_gpu::hub::Hub;
use genmill_worker_gpu::load;
use genmill_worker_gpu::perform::Performer;
use genmill_worker_gpu::residents::{Residents, prepare, run_all};
use genmill_worker_gpu::watchdog::Watchdog;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

/// Runs local models (vllm_models.yaml, hf_models.yaml, llamacpp_models.yaml) with continuous batching, on the CPU
/// unless built for CUDA.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Everything is set in genmill.toml or by GENMILL__SECTION__KEY variables, such \
    as GENMILL__GPU__THREADS. --check-config shows what is in effect. MODEL_CONTEXT_SIZE, MODEL_N_THREADS, \
    MODEL_GPU_LAYERS, MODEL_PRELOAD, GPU_MAX_MEMORY and GPU_TORCH_DTYPE are understood as well.\n\nAll models together \
    take gpu.memory, or gpu.memory_utilization of what is available at the start. Models beyond that are loaded when \
    jobs wait for them, in place of the least lately used."
)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
}

fn main() -> ExitCode {
    daemon(&Args::parse().common, check, run)
}

fn check(loaded: &Loaded) -> anyhow::Result<Vec<String>> {
    let settings = load::Settings::new(&loaded.config.gpu)?;
    let (_, notes) = load::entries(&loaded.models, &settings)?;
    Ok(notes)
}

async fn run(context: Context) -> anyhow::Result<()> {
    let settings = load::Settings::new(&context.config.gpu)?;
    let (entries, notes) = load::entries(&context.models, &settings)?;
    notes.iter().for_each(|note| tracing::warn!("{note}"));
    let stop = context.shutdown.token();
    let hub = Hub::new(&context.config.hub, &context.environment, stop.clone())?;
    let mut residents = Residents::of_devices(entries, &hub, |available| settings.budget(available));
    tokio::select! {
        () = prepare(&mut residents) => {}
        // Nothing is leased yet, so nothing is left behind.
        () = stop.cancelled() => return Ok(()),
    }
    let prefixes = PREFIXES.iter().filter(|prefix| !prefix.is_remote()).map(|prefix| prefix.name.to_owned());
    let kind = Kind { name: "gpu", prefixes: prefixes.collect() };
    let performer = Arc::new(Performer::new(&residents));
    let gpu = &context.config.gpu;
    let watchdog = Watchdog::start(&performer, Duration::from_millis(gpu.step_timeout_ms), gpu.reports_dir.clone())?;
    measure_memory(&performer)?;
    let served = tokio::select! {
        served = serve(context, kind, performer.clone()) => served,
        () = run_all(residents) => Ok(()),
    };
    for line in performer.summary() {
        tracing::info!("{line}");
    }
    // Engines wait for their last step, over which the watchdog watches.
    drop(performer);
    drop(watchdog);
    served
}

/// How long memory is read to see how fast it is.
const MEASURE: Duration = Duration::from_millis(100);

/// Measures how fast this machine reads memory, on a thread of its own.
fn measure_memory(performer: &Arc<Performer>) -> anyhow::Result<()> {
    let performer = performer.clone();
    let cores = available_parallelism().map_or(1, std::num::NonZero::get);
    let measuring = std::thread::Builder::new().name("genmill-memory".to_owned());
    measuring.spawn(move || performer.set_memory_bytes_per_s(read_bytes_per_s(cores, MEASURE)))?;
    Ok(())
}
