//! The GPU worker daemon: load models, serve, drain.

use anyhow::Context as _;
use clap::Parser;
use genmill_core::model::PREFIXES;
use genmill_daemon::run::{CommonArgs, Context, Loaded, daemon};
use genmill_worker::{Kind, serve};
use genmill_worker_gpu::hub::Hub;
use genmill_worker_gpu::load;
use genmill_worker_gpu::perform::Performer;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs local models (vllm_models.yaml, hf_models.yaml, llamacpp_models.yaml) with continuous batching, on the CPU
/// unless built for CUDA.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Everything is set in genmill.toml or by GENMILL__SECTION__KEY variables, such \
    as GENMILL__GPU__THREADS. --check-config shows what is in effect."
)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
}

fn main() -> ExitCode {
    daemon(&Args::parse().common, check, run)
}

fn check(loaded: &Loaded) -> anyhow::Result<Vec<String>> {
    load::Settings::new(&loaded.config.gpu)?;
    Ok(Vec::new())
}

async fn run(context: Context) -> anyhow::Result<()> {
    let settings = load::Settings::new(&context.config.gpu)?;
    let listed = context.models.clone();
    let stop = context.shutdown.token();
    let hub = Hub::new(&context.config.hub, &context.environment, stop.clone())?;
    let loading = tokio::task::spawn_blocking(move || load::all(&listed, &hub, &settings));
    let models = tokio::select! {
        loaded = loading => loaded.context("loading models broke off")?,
        // Nothing is leased yet, so nothing is left behind.
        () = stop.cancelled() => return Ok(()),
    };
    let prefixes = PREFIXES.iter().filter(|prefix| !prefix.is_remote()).map(|prefix| prefix.name.to_owned());
    let kind = Kind { name: "gpu", prefixes: prefixes.collect() };
    serve(context, kind, Arc::new(Performer::new(models))).await
}
