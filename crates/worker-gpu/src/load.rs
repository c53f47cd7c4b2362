//! From the models that a configuration lists to running engines. A model that cannot be loaded is listed with the
//! reason, so that a request for it is refused with that reason.

use crate::hub::Hub;
use anyhow::Context as _;
use genmill_core::controls::SAMPLES_MAX;
use genmill_core::model::{ModelName, Prefix};
use genmill_core::money::Picodollars;
use genmill_core::registration::{Availability, ServedModel};
use genmill_daemon::config::Gpu;
use genmill_daemon::models::{ListedModel, ModelPath};
use genmill_engine::sim::Device;
use genmill_engine::{Engine, EngineOptions, Event, LoadError, LoadOptions, Model, ModelPaths, Prompt, Request};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// How engines are set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Compute threads of each engine.
    pub load: LoadOptions,
    /// The size of each engine.
    pub engine: EngineOptions,
    /// What an hour of an engine costs; `None`: unknown.
    pub price_per_hour: Option<Picodollars>,
}

impl Settings {
    /// Reads the configuration.
    ///
    /// # Errors
    /// When `gpu.dollars_per_hour` is no amount of money.
    pub fn new(gpu: &Gpu) -> anyhow::Result<Self> {
        let sequences = usize::try_from(gpu.sequences_max).context("gpu.sequences_max is too large")?;
        let price = gpu.dollars_per_hour.as_deref().map(Picodollars::parse_dollars).transpose();
        Ok(Self {
            load: LoadOptions { threads: gpu.threads },
            engine: EngineOptions {
                kv_tokens: gpu.kv_tokens,
                max_sequences: sequences,
                step_tokens: gpu.step_tokens.max(sequences),
                // Each job that runs may have so many samples, which wait in the engine.
                max_waiting: sequences.saturating_mul(usize::try_from(SAMPLES_MAX)?),
                prefix_cache: true,
            },
            price_per_hour: price.context("gpu.dollars_per_hour")?,
        })
    }
}

/// A local model in the configuration.
#[derive(Debug)]
pub struct LocalModel {
    /// What is registered of it.
    pub served: ServedModel,
    /// Its engine, when it could be loaded.
    pub engine: Option<Arc<Engine>>,
    /// How many sequences it runs at once.
    pub sequences: u32,
    /// What an hour of its engine costs.
    pub price_per_hour: Option<Picodollars>,
}

/// Loads every local model that `listed` has. Blocks for as long as downloads and reading the weights take.
#[must_use]
pub fn all(listed: &[ListedModel], hub: &Hub, settings: &Settings) -> Vec<LocalModel> {
    let local = listed.iter().filter_map(|model| {
        let prefix = Prefix::find(model.prefix).filter(|prefix| !prefix.is_remote())?;
        match prefix.qualify(&model.name) {
            Ok(name) => Some((name, model)),
            Err(error) => {
                tracing::error!(file = %model.file.display(), %error, "listed, but cannot be served");
                None
            }
        }
    });
    local.map(|(name, model)| local_model(name, model, hub, settings)).collect()
}

fn local_model(name: ModelName, listed: &ListedModel, hub: &Hub, settings: &Settings) -> LocalModel {
    let begun = Instant::now();
    let (availability, engine) = match start(listed, hub, settings) {
        Ok(engine) => {
            tracing::info!(model = %name, fingerprint = %engine.card().fingerprint(), took = ?begun.elapsed(), "loaded");
            (Availability::Ready, Some(Arc::new(engine)))
        }
        Err(error) => {
            let reason = format!("{error:#}");
            tracing::warn!(model = %name, reason, "listed, but cannot be served");
            (Availability::Unavailable { reason }, None)
        }
    };
    let context = engine.as_ref().and_then(|engine| u64::try_from(engine.card().context_tokens()).ok());
    LocalModel {
        served: ServedModel {
            name,
            availability,
            description: listed.description.clone(),
            context_tokens: context.or(listed.context_tokens),
        },
        engine,
        sequences: u32::try_from(settings.engine.max_sequences).unwrap_or(u32::MAX),
        price_per_hour: settings.price_per_hour,
    }
}

fn start(listed: &ListedModel, hub: &Hub, settings: &Settings) -> anyhow::Result<Engine> {
    let path = listed.path.as_ref().context("it has no model_path")?;
    let present = |path: &ModelPath| path.resolved.exists().then(|| path.resolved.clone());
    let model_path = match listed.prefix {
        "hf" => hub.folder(path)?,
        _ => present(path).with_context(|| path.missing())?,
    };
    let tokenizer_path = listed.tokenizer.as_ref().map(|path| present(path).with_context(|| path.missing()));
    let paths = ModelPaths { model_path, tokenizer_path: tokenizer_path.transpose()? };
    let options = LoadOptions { threads: listed.threads.unwrap_or(settings.load.threads) };
    let loaded = match &listed.device {
        None => Model::load(&paths, &options),
        Some(device) if device.starts_with("cuda") => on_gpu(&paths, device)?,
        Some(device) => Model::simulated(&paths, &Device::parse(device)?),
    };
    let mut model = loaded.with_context(|| format!("cannot load {}", paths.model_path.display()))?;
    if let Some(tokens) = listed.context_tokens {
        model = model.with_context_limit(usize::try_from(tokens).unwrap_or(usize::MAX));
    }
    let mut size = settings.engine;
    if let Some(most) = model.kv_tokens_max().filter(|most| *most < size.kv_tokens) {
        tracing::warn!(model = listed.name, kv_tokens = most, "the device has no room for gpu.kv_tokens: taking fewer");
        size.kv_tokens = most;
    }
    let engine = Engine::start(model, size)?;
    let is_simulated = listed.device.as_ref().is_some_and(|device| !device.starts_with("cuda"));
    if !is_simulated {
        warm_up(&engine, size.max_sequences);
    }
    Ok(engine)
}

/// Loads a model onto `cuda`, the first GPU, or `cuda:1` and so on. GPUs are counted as `CUDA_VISIBLE_DEVICES` has them.
#[cfg(feature = "cuda")]
fn on_gpu(paths: &ModelPaths, device: &str) -> anyhow::Result<Result<Model, LoadError>> {
    let number = device.strip_prefix("cuda").and_then(|rest| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(':')?.parse().ok(),
    });
    let number = number.with_context(|| format!("device {device} is neither `cuda` nor `cuda:NUMBER`"))?;
    Ok(Model::on_gpu(paths, number))
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_: &ModelPaths, device: &str) -> anyhow::Result<Result<Model, LoadError>> {
    anyhow::bail!("device {device}: this worker was built without CUDA, see docs/cuda.md")
}

/// How long an engine is warmed up at most.
const WARM_UP: Duration = Duration::from_millis(300);

/// Runs a full batch for a moment, so that memory is laid out and cores are awake before the first job comes. Whatever
/// goes wrong here will go wrong, and be told, with a job as well.
fn warm_up(engine: &Engine, sequences: usize) {
    let (ended, wait) = mpsc::channel();
    for seed in (0..).take(sequences) {
        let ended = ended.clone();
        let request = Request {
            temperature: 1.0,
            seed,
            deadline: Some(Instant::now() + WARM_UP),
            ..Request::greedy(Prompt::Text("warm up".to_owned()), (engine.card().context_tokens() / 2).clamp(1, 256))
        };
        let sink = move |event| {
            if matches!(event, Event::Finished(_) | Event::Failed(_)) {
                // Nobody listens any more once the time is up.
                drop(ended.send(event));
            }
        };
        if engine.submit(request, Box::new(sink)).is_err() {
            break;
        }
    }
    drop(ended);
    // Ends when every request has, since then all senders are gone.
    while wait.recv_timeout(2 * WARM_UP).is_ok() {}
}
