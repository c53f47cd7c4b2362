//! From a model that a configuration lists to a running engine: where it lies, what it needs, how it is started. All of
//! it blocks, so it runs beside the runtime.
//!
//! Never here: which model is loaded when (that is `residents`).

use crate::budget::{Needs, Plan, parse_bytes, part, shown};
use crate::device::Device;
use crate::hub::Hub;
use anyhow::Context as _;
use genmill_core::controls::SAMPLES_MAX;
use genmill_core::model::{ModelName, Prefix};
use genmill_core::money::Picodollars;
use genmill_daemon::config::Gpu;
use genmill_daemon::models::{ListedModel, ModelPath};
use genmill_engine::quantized::Format;
use genmill_engine::{
    Engine, EngineOptions, Event, Footprint, LoadError, LoadOptions, Model, ModelPaths, Prompt, Request,
};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};

/// How engines are set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Compute threads of each engine.
    load: LoadOptions,
    /// The size of each engine.
    engine: EngineOptions,
    /// Longest sequence of each, where that is limited.
    context_tokens: Option<u64>,
    /// What an hour of an engine costs; `None`: unknown.
    price_per_hour: Option<Picodollars>,
    /// Bytes of all models together; `None`: a part of what is available.
    memory: Option<u64>,
    memory_utilization: f64,
    preload: String,
    gpu_layers: Option<i64>,
    cuda_graphs: bool,
    /// Settings that have no effect here.
    notes: Vec<String>,
}

impl Settings {
    /// Reads the configuration.
    ///
    /// # Errors
    /// When an amount of money or memory, or a type, is none.
    pub fn new(gpu: &Gpu) -> anyhow::Result<Self> {
        let sequences = usize::try_from(gpu.sequences_max).context("gpu.sequences_max is too large")?;
        let price = gpu.dollars_per_hour.as_deref().map(Picodollars::parse_dollars).transpose();
        let memory = gpu.memory.as_deref().map(parse_bytes).transpose();
        Ok(Self {
            load: LoadOptions { threads: gpu.threads, quantize: format(&gpu.quantize).context("gpu.quantize")? },
            engine: sized(
                EngineOptions { kv_tokens: gpu.kv_tokens, step_tokens: gpu.step_tokens, ..EngineOptions::default() },
                sequences,
            ),
            context_tokens: gpu.context_tokens,
            price_per_hour: price.context("gpu.dollars_per_hour")?,
            memory: memory.context("gpu.memory (GPU_MAX_MEMORY)")?,
            memory_utilization: gpu.memory_utilization,
            preload: gpu.preload.clone(),
            gpu_layers: gpu.gpu_layers,
            cuda_graphs: gpu.cuda_graphs,
            notes: dtype_note(&gpu.dtype)?.into_iter().chain(gpu.force_cublas.as_deref().map(cublas_note)).collect(),
        })
    }

    /// Bytes for all models together, of `available` ones.
    #[must_use]
    pub fn budget(&self, available: Option<u64>) -> u64 {
        let of_available = || available.map_or(u64::MAX, |bytes| part(bytes, self.memory_utilization));
        self.memory.unwrap_or_else(of_available)
    }
}

/// An engine of so many sequences.
fn sized(engine: EngineOptions, sequences: usize) -> EngineOptions {
    EngineOptions {
        max_sequences: sequences,
        step_tokens: engine.step_tokens.max(sequences),
        // Each job that runs may have so many samples, which wait in the engine.
        max_waiting: sequences.saturating_mul(usize::try_from(SAMPLES_MAX).unwrap_or(1)),
        prefix_cache: true,
        ..engine
    }
}

/// What weights are brought to; `None`: they stay as they are.
fn format(name: &str) -> anyhow::Result<Option<Format>> {
    if name == "none" { Ok(None) } else { Ok(Some(name.parse()?)) }
}

/// What to say about a type that the CPU does not compute in.
fn dtype_note(dtype: &str) -> anyhow::Result<Option<String>> {
    let name = dtype.trim().trim_start_matches("torch.").to_ascii_lowercase();
    match name.as_str() {
        "" | "auto" | "float32" | "float" | "fp32" => Ok(None),
        "bfloat16" | "bf16" | "float16" | "half" | "fp16" => Ok(Some(format!(
            "gpu.dtype (GPU_TORCH_DTYPE) = {dtype} has no effect: this worker computes on the CPU, in float32; quantised \
             GGUF files take less memory"
        ))),
        _ => anyhow::bail!("gpu.dtype (GPU_TORCH_DTYPE): `{dtype}` is none of auto, float32, bfloat16 and float16"),
    }
}

/// What to say about a choice that llama.cpp leaves to its users.
fn cublas_note(value: &str) -> String {
    format!(
        "gpu.force_cublas (GGML_CUDA_FORCE_CUBLAS) = {value} has no effect: cuBLASLt multiplies all but quantised weights, whose \
         kernel is the same for any number of rows"
    )
}

/// A local model of the configuration, with what holds for it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: ModelName,
    /// What the configuration says about it.
    pub description: String,
    /// Whether it shall be loaded before the worker is ready.
    pub preload: bool,
    /// What an hour of its engine costs.
    pub price_per_hour: Option<Picodollars>,
    /// Where it runs.
    pub(crate) device: Device,
    /// The part of the budget that it may take.
    pub(crate) memory_part: f64,
    pub(crate) engine: EngineOptions,
    pub(crate) context_tokens: Option<u64>,
    load: LoadOptions,
    /// Whether steps on a GPU are recorded.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only a worker built with CUDA records steps"))]
    cuda_graphs: bool,
    prefix: &'static str,
    path: Option<ModelPath>,
    tokenizer: Option<ModelPath>,
}

/// Every local model that `listed` has, and lines about settings that have no effect.
///
/// # Errors
/// When the models to preload are not among them, or a device is none.
pub fn entries(listed: &[ListedModel], settings: &Settings) -> anyhow::Result<(Vec<Entry>, Vec<String>)> {
    let (mut entries, mut notes) = (Vec::new(), settings.notes.clone());
    for model in listed {
        let Some(prefix) = Prefix::find(model.prefix).filter(|prefix| !prefix.is_remote()) else { continue };
        match prefix.qualify(&model.name) {
            Ok(name) => entries.push(entry(name, model, settings)?),
            Err(error) => tracing::error!(file = %model.file.display(), %error, "listed, but cannot be served"),
        }
    }
    let layers = listed.iter().filter_map(|model| Some((model.name.as_str(), model.local.gpu_layers?)));
    let layers =
        settings.gpu_layers.map(|layers| ("gpu.gpu_layers (MODEL_GPU_LAYERS)", layers)).into_iter().chain(layers);
    let layers: Vec<String> =
        layers.filter(|(_, layers)| *layers != 0).map(|(place, layers)| format!("{place}: {layers}")).collect();
    if !layers.is_empty() {
        let layers = layers.join(", ");
        notes.push(format!("layers on a GPU ({layers}) have no effect: this worker computes on the CPU, all layers"));
    }
    choose_preloaded(&mut entries, &settings.preload)?;
    Ok((entries, notes))
}

fn entry(name: ModelName, model: &ListedModel, settings: &Settings) -> anyhow::Result<Entry> {
    let device = Device::parse(model.device.as_deref());
    let quantize = match &model.local.quantize {
        Some(name) => format(name).with_context(|| format!("{}, model {}", model.file.display(), model.name))?,
        None => settings.load.quantize,
    };
    let sequences = model.local.sequences_max.and_then(|sequences| usize::try_from(sequences).ok());
    Ok(Entry {
        name,
        device: device.with_context(|| format!("{}, model {}", model.file.display(), model.name))?,
        description: model.description.clone(),
        preload: false,
        price_per_hour: settings.price_per_hour,
        memory_part: model.local.memory_utilization.unwrap_or(1.0),
        engine: sized(settings.engine, sequences.unwrap_or(settings.engine.max_sequences)),
        context_tokens: model.context_tokens.or(settings.context_tokens),
        load: LoadOptions { threads: model.threads.unwrap_or(settings.load.threads), quantize },
        cuda_graphs: settings.cuda_graphs,
        prefix: model.prefix,
        path: model.path.clone(),
        tokenizer: model.tokenizer.clone(),
    })
}

fn choose_preloaded(entries: &mut [Entry], preload: &str) -> anyhow::Result<()> {
    let names: Vec<&str> = preload.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    match names.as_slice() {
        ["all"] => entries.iter_mut().for_each(|entry| entry.preload = true),
        [] | ["none"] => {}
        names => {
            for name in names {
                let found = entries.iter_mut().find(|entry| entry.name.as_str() == *name);
                found
                    .with_context(|| format!("gpu.preload (MODEL_PRELOAD): no local model `{name}` is listed"))?
                    .preload = true;
            }
        }
    }
    Ok(())
}

/// A model that was found, and what it needs.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) needs: Needs,
    paths: ModelPaths,
}

/// What its files look like from outside; another look tells whether they have changed.
pub(crate) type Files = Vec<(PathBuf, u64, Option<SystemTime>)>;

impl Entry {
    /// Whether it may have to be downloaded before anything is known of it.
    pub(crate) fn may_be_downloaded(&self) -> bool {
        self.prefix == "hf" && self.path.as_ref().is_some_and(|path| !path.resolved.exists())
    }

    /// Finds it, downloads it where it comes from the hub, and reads its headers.
    pub(crate) fn measure(&self, hub: &Hub) -> anyhow::Result<Measured> {
        let path = self.path.as_ref().context("it has no model_path")?;
        let present = |path: &ModelPath| path.resolved.exists().then(|| path.resolved.clone());
        let model_path = match self.prefix {
            "hf" => hub.folder(path)?,
            _ => present(path).with_context(|| path.missing())?,
        };
        let tokenizer_path = self.tokenizer.as_ref().map(|path| present(path).with_context(|| path.missing()));
        let paths = ModelPaths { model_path, tokenizer_path: tokenizer_path.transpose()? };
        let footprint = match &self.device {
            Device::Cpu => Footprint::read(&paths.model_path, &self.load),
            Device::Cuda(_) => Footprint::on_gpu(&paths.model_path, &self.load),
            Device::Simulated(device) => Footprint::simulated(&paths.model_path, device),
        };
        let footprint = footprint.with_context(|| format!("cannot load {}", paths.model_path.display()))?;
        Ok(Measured { needs: Needs::new(footprint, &self.engine, self.context_limit()), paths })
    }

    fn context_limit(&self) -> Option<usize> {
        self.context_tokens.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX))
    }

    /// Loads it and runs its largest step once. `None` when memory went to others meanwhile.
    pub(crate) fn start(&self, measured: &Measured, plan: &Plan) -> anyhow::Result<Option<Engine>> {
        let begun = Instant::now();
        let paths = &measured.paths;
        let loaded = match &self.device {
            Device::Cpu => Model::load(paths, &self.load),
            Device::Cuda(number) => on_gpu(paths, self, *number)?,
            Device::Simulated(device) => Model::simulated(paths, device),
        };
        let mut model = loaded.with_context(|| format!("cannot load {}", paths.model_path.display()))?;
        if let Some(tokens) = self.context_limit() {
            model = model.with_context_limit(tokens);
        }
        // What is free now decides, not what was when the plan was made.
        let left = self.device.available_bytes();
        let Some(plan) = measured.needs.after_load(*plan, left.unwrap_or(u64::MAX)) else { return Ok(None) };
        let options = EngineOptions { kv_tokens: plan.kv_tokens, ..self.engine };
        let engine = match &self.device {
            Device::Cpu | Device::Cuda(_) => {
                let engine = Engine::start_after_dry_run(model, options)?;
                warm_up(&engine, options.max_sequences);
                engine
            }
            Device::Simulated(device) => {
                pass(device.load_time(plan.weights_bytes));
                Engine::start(model, options)?
            }
        };
        let Plan { weights_bytes, activation_bytes, kv_bytes, short_of, .. } = plan;
        let (weights, activations, kv) = (shown(weights_bytes), shown(activation_bytes), shown(kv_bytes));
        let (model, fingerprint) = (&self.name, engine.card().fingerprint());
        // A GPU's may be fewer than planned: its largest step has shown what is left.
        let kv_tokens = engine.options().kv_tokens;
        tracing::info!(%model, %fingerprint, took = ?begun.elapsed(), weights, activations, kv, kv_tokens, "loaded");
        if let Some(wanted) = short_of {
            tracing::warn!(%model, kv_tokens, wanted, "memory is short: fewer sequences run at once");
        }
        Ok(Some(engine))
    }

    /// What its files look like now.
    pub(crate) fn files(&self) -> Files {
        let paths = self.path.iter().chain(&self.tokenizer).map(|path| path.resolved.as_path());
        let mut files: Files = paths.flat_map(files_at).collect();
        files.sort();
        files
    }
}

fn files_at(path: &Path) -> Files {
    let Ok(metadata) = path.metadata() else { return Vec::new() };
    let mut files = vec![(path.to_owned(), metadata.len(), metadata.modified().ok())];
    let entries = path.read_dir().into_iter().flatten().filter_map(Result::ok);
    let stated = entries.filter_map(|entry| {
        let metadata = entry.path().metadata().ok()?;
        Some((entry.path(), metadata.len(), metadata.modified().ok()))
    });
    files.extend(stated);
    files
}

/// Lets the time pass that loading would take.
fn pass(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "models are loaded beside the runtime, on threads for that")]
    std::thread::sleep(time);
}

/// Loads a model onto a GPU.
#[cfg(feature = "cuda")]
#[expect(clippy::unnecessary_wraps, reason = "without CUDA there is nothing to load it onto")]
fn on_gpu(paths: &ModelPaths, entry: &Entry, ordinal: usize) -> anyhow::Result<Result<Model, LoadError>> {
    let (graphs, quantize) = (entry.cuda_graphs, entry.load.quantize);
    Ok(Model::on_gpu(paths, &genmill_engine::GpuOptions { ordinal, graphs, quantize }))
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_: &ModelPaths, _: &Entry, number: usize) -> anyhow::Result<Result<Model, LoadError>> {
    anyhow::bail!("device cuda:{number}: this worker was built without CUDA, see docs/cuda.md")
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

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_daemon::models::LocalSettings;

    fn listed(prefix: &'static str, name: &str, local: LocalSettings) -> ListedModel {
        ListedModel {
            prefix,
            name: name.to_owned(),
            path: None,
            tokenizer: None,
            description: String::new(),
            context_tokens: None,
            threads: None,
            device: None,
            local,
            file: PathBuf::new(),
        }
    }

    fn settings(change: impl FnOnce(&mut Gpu)) -> Settings {
        let mut gpu = Gpu::default();
        change(&mut gpu);
        Settings::new(&gpu).unwrap()
    }

    #[test]
    fn an_entry_goes_before_the_section() {
        let settings = settings(|gpu| (gpu.threads, gpu.context_tokens, gpu.sequences_max) = (2, Some(100), 8));
        let own = LocalSettings {
            sequences_max: Some(3),
            memory_utilization: Some(0.5),
            gpu_layers: Some(0),
            quantize: None,
        };
        let own = ListedModel { threads: Some(1), context_tokens: Some(50), ..listed("vllm", "own", own) };
        let plain = listed("hf", "plain", LocalSettings::default());
        let (entries, notes) = entries(&[own, plain], &settings).unwrap();
        let numbers = |entry: &Entry| (entry.engine.max_sequences, entry.load.threads, entry.context_tokens);
        assert_eq!(numbers(&entries[0]), (3, 1, Some(50)));
        assert_eq!(numbers(&entries[1]), (8, 2, Some(100)));
        assert!((entries[0].memory_part - 0.5).abs() < 1e-9 && notes.is_empty());
    }

    #[test]
    fn weights_are_quantised_by_the_entry_then_by_the_section() {
        let quantize = |name: &str| LocalSettings { quantize: Some(name.to_owned()), ..LocalSettings::default() };
        let listed = [listed("hf", "a", LocalSettings::default()), listed("hf", "b", quantize("none"))];
        let (entries_of_q8_0, _) = entries(&listed, &settings(|gpu| gpu.quantize = "q8_0".to_owned())).unwrap();
        let formats: Vec<_> = entries_of_q8_0.iter().map(|entry| entry.load.quantize).collect();
        assert_eq!(formats, [Some(Format::Q8_0), None]);

        let section = Settings::new(&Gpu { quantize: "q3".to_owned(), ..Gpu::default() }).unwrap_err();
        assert_eq!(
            format!("{section:#}"),
            "gpu.quantize: weights cannot be quantised to \"q3\" while they are loaded, only to q8_0"
        );
        let entry = entries(&[ListedModel { local: quantize("q3"), ..listed[0].clone() }], &settings(|_| {}));
        let entry = format!("{:#}", entry.unwrap_err());
        assert!(entry.contains("model a: weights cannot be quantised to \"q3\""), "{entry}");
    }

    #[test]
    fn what_has_no_effect_on_this_backend_is_told_in_one_line() {
        let settings = settings(|gpu| {
            (gpu.dtype, gpu.gpu_layers) = ("torch.bfloat16".to_owned(), Some(-1));
            gpu.force_cublas = Some("1".to_owned());
        });
        let layers = LocalSettings { gpu_layers: Some(35), ..LocalSettings::default() };
        let (_, notes) = entries(&[listed("llamacpp", "q", layers)], &settings).unwrap();
        assert_eq!(notes.len(), 3);
        assert!(notes[0].contains("GPU_TORCH_DTYPE") && notes[0].contains("float32"), "{notes:?}");
        assert!(notes[1].contains("GGML_CUDA_FORCE_CUBLAS"), "{notes:?}");
        assert!(notes[2].contains("MODEL_GPU_LAYERS") && notes[2].contains("q: 35"), "{notes:?}");
        assert!(Settings::new(&Gpu { dtype: "int7".to_owned(), ..Gpu::default() }).is_err());
        assert!(Settings::new(&Gpu { memory: Some("much".to_owned()), ..Gpu::default() }).is_err());
    }

    #[test]
    fn the_models_to_preload_are_named_or_all() {
        let models = ["a", "b"].map(|name| listed("vllm", name, LocalSettings::default()));
        let preloaded = |preload: &str| {
            let settings = settings(|gpu| gpu.preload = preload.to_owned());
            Ok::<_, anyhow::Error>(entries(&models, &settings)?.0.iter().map(|entry| entry.preload).collect::<Vec<_>>())
        };
        assert_eq!(preloaded("all").unwrap(), [true, true]);
        assert_eq!(preloaded("none").unwrap(), [false, false]);
        assert_eq!(preloaded(" vllm_b ,").unwrap(), [false, true]);
        assert!(preloaded("vllm_c").unwrap_err().to_string().contains("vllm_c"));
    }

    #[test]
    fn the_budget_is_what_is_set_or_a_part_of_what_is_there() {
        assert_eq!(settings(|gpu| gpu.memory = Some("2KiB".to_owned())).budget(Some(9)), 2048);
        assert_eq!(settings(|gpu| gpu.memory_utilization = 0.5).budget(Some(1000)), 500);
        assert_eq!(settings(|_| ()).budget(None), u64::MAX);
    }
}
