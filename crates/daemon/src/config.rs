//! The configuration of all daemons: one file, `genmill.toml`, of which each daemon reads its sections.
//!
//! Later sources win: the defaults below, the file, the plain variables of [`ALIASES`], `GENMILL__SECTION__KEY`
//! variables, command-line flags. Unknown keys are refused. Never here: what the values are used for.

use crate::environment::{BadDotEnv, Environment};
use crate::secret::{Secret, mask_url};
use serde::{Deserialize, Serialize, Serializer};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// The file that is read when none is named and it exists.
pub const DEFAULT_FILE: &str = "genmill.toml";

/// The shortest bound of a step.
const STEP_TIMEOUT_MS_MIN: u64 = 100;

/// Variables that users of this field set already, and the keys they stand for.
pub const ALIASES: &[(&str, &str)] = &[
    ("MAX_TOKENS", "scheduler.max_tokens"),
    ("TEMPERATURE", "scheduler.temperature"),
    ("MODELS_DIR", "models.root"),
    ("MODEL_CONTEXT_SIZE", "gpu.context_tokens"),
    ("MODEL_N_THREADS", "gpu.threads"),
    ("MODEL_GPU_LAYERS", "gpu.gpu_layers"),
    ("MODEL_PRELOAD", "gpu.preload"),
    ("GPU_MAX_MEMORY", "gpu.memory"),
    ("GPU_TORCH_DTYPE", "gpu.dtype"),
    ("GGML_CUDA_FORCE_CUBLAS", "gpu.force_cublas"),
    ("HF_ENDPOINT", "hub.endpoint"),
    ("HF_TOKEN", "hub.token"),
    ("HF_HOME", "hub.home"),
    ("HF_HUB_CACHE", "hub.cache"),
    ("HF_HUB_OFFLINE", "hub.offline"),
];

/// Everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Logging.
    pub telemetry: Telemetry,
    /// Where the queue is kept.
    pub redis: Redis,
    /// The scheduler.
    pub scheduler: Scheduler,
    /// What all workers share.
    pub worker: Worker,
    /// The GPU worker's engine.
    pub gpu: Gpu,
    /// The API worker.
    pub api: Api,
    /// Where model configuration and models lie.
    pub models: Models,
    /// Where `hf_` models come from that are in no folder.
    pub hub: Hub,
    /// Settings of remote providers, by name.
    pub providers: BTreeMap<String, Provider>,
    /// Limits of remote providers.
    pub limits: Vec<Limit>,
}

/// Logging.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// What is logged, as a tracing filter: `info`, `debug`, `info,genmill_queue=debug`.
    pub log: String,
    /// `text` for people, `json` for machines.
    pub format: LogFormat,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines, one object a line.
    Json,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { log: "info".to_owned(), format: LogFormat::Text }
    }
}

/// Where the queue is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Redis {
    /// `redis://[user:password@]host:port[/database]`. A cluster: `redis+cluster://[user:password@]host:port[,host:port…]`
    /// with one or more of its nodes, which tell of the others. With `rediss` in place of `redis`: over TLS. Unset:
    /// `genmill up` starts a Redis of its own, daemons take `redis://127.0.0.1:6379`.
    #[serde(serialize_with = "masked_url")]
    pub url: Option<String>,
    /// The first part of every key, so that several mills can share a Redis.
    pub namespace: String,
}

#[expect(clippy::ref_option, reason = "serde passes fields by reference")]
fn masked_url<S: Serializer>(url: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    url.as_deref().map(mask_url).serialize(serializer)
}

impl Redis {
    /// The URL to connect to.
    #[must_use]
    pub fn url_or_default(&self) -> &str {
        self.url.as_deref().unwrap_or("redis://127.0.0.1:6379")
    }
}

impl Default for Redis {
    fn default() -> Self {
        Self { url: None, namespace: "genmill".to_owned() }
    }
}

/// The scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scheduler {
    /// Where gRPC is served. Port 0 picks a free one.
    pub listen: String,
    /// Where /healthz and /readyz are served. Port 0 picks a free one.
    pub http_listen: String,
    /// `max_tokens` of requests that set none.
    pub max_tokens: u32,
    /// `temperature` of requests that set none.
    pub temperature: f64,
    /// How long shutdown waits for open calls, in milliseconds.
    pub drain_timeout_ms: u64,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:50051".to_owned(),
            http_listen: "127.0.0.1:0".to_owned(),
            max_tokens: 250,
            temperature: 0.1,
            drain_timeout_ms: 5_000,
        }
    }
}

/// What all workers share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Worker {
    /// Where /healthz and /readyz are served. Port 0 picks a free one.
    pub http_listen: String,
    /// How long a lease lasts without a heartbeat, in milliseconds.
    pub lease_ms: u64,
    /// Time between heartbeats, in milliseconds. At most a third of the lease.
    pub heartbeat_ms: u64,
    /// How long shutdown waits for running jobs before it hands them back, in milliseconds.
    pub drain_timeout_ms: u64,
    /// How many failed attempts of a job are followed by another one.
    pub retries_max: u32,
    /// The wait after a job's first failure, in milliseconds; doubled after each further one.
    pub retry_delay_ms: u64,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            http_listen: "127.0.0.1:0".to_owned(),
            lease_ms: 15_000,
            heartbeat_ms: 3_000,
            drain_timeout_ms: 20_000,
            retries_max: 3,
            retry_delay_ms: 1_000,
        }
    }
}

/// The GPU worker's engines. An entry of a model file may have numbers of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gpu {
    /// Threads of each engine on the CPU (also `MODEL_N_THREADS`); 0: one for every core.
    pub threads: usize,
    /// How many sequences of a model run at once (also `max_num_seqs`).
    #[serde(alias = "max_num_seqs")]
    pub sequences_max: u32,
    /// How many tokens one step of an engine computes at most.
    pub step_tokens: usize,
    /// Tokens that the KV cache of each model holds at most; fewer where memory is short.
    pub kv_tokens: usize,
    /// How long one step of an engine may take, in milliseconds. After that the worker writes down what the engine was
    /// at, and ends, so that its jobs go to others.
    pub step_timeout_ms: u64,
    /// The folder for what is written down then. Made when it is needed.
    pub reports_dir: PathBuf,
    /// Longest prompt plus output in tokens (also `max_model_len`, `MODEL_CONTEXT_SIZE`). Unset: what the model can.
    #[serde(alias = "max_model_len")]
    pub context_tokens: Option<u64>,
    /// The memory of all models together, such as `24GiB` (also `GPU_MAX_MEMORY`). Unset: `memory_utilization` of what
    /// is available when the worker starts.
    pub memory: Option<String>,
    /// The part of the available memory that the models may take together, above 0 and at most 1 (also
    /// `gpu_memory_utilization`). Without effect where `memory` is set.
    #[serde(alias = "gpu_memory_utilization")]
    pub memory_utilization: f64,
    /// Whether a GPU's steps of decode are recorded as CUDA graphs and repeated, which saves the time of starting kernels one
    /// by one and takes up to 256 MiB of its memory.
    pub cuda_graphs: bool,
    /// What llama.cpp's `GGML_CUDA_FORCE_CUBLAS` asks for. It has no effect: each product has the same kernel whatever its size.
    pub force_cublas: Option<String>,
    /// The models to load before the worker is ready (also `MODEL_PRELOAD`): names with commas between, `none`, or
    /// `all`, which loads as many as fit. The others are loaded when jobs come for them.
    pub preload: String,
    /// Layers to compute on a GPU (also `MODEL_GPU_LAYERS`); below 0: all. The CPU backend has none to give.
    pub gpu_layers: Option<i64>,
    /// The type to compute in (also `GPU_TORCH_DTYPE`): `auto`, `float32`, `bfloat16` or `float16`. The CPU backend
    /// computes in float32.
    pub dtype: String,
    /// What the float weights of checkpoints are brought to at load: `q8_0`, or `none`. A quarter of the memory and
    /// several times the speed, for slightly other weights.
    pub quantize: String,
    /// What an hour of an engine costs in dollars, as a decimal number. Unset: unknown, and so is the cost of its jobs.
    pub dollars_per_hour: Option<String>,
}

impl Default for Gpu {
    fn default() -> Self {
        Self {
            threads: 0,
            sequences_max: 32,
            step_tokens: 512,
            kv_tokens: 65_536,
            step_timeout_ms: 120_000,
            reports_dir: PathBuf::from("reports"),
            context_tokens: None,
            memory: None,
            memory_utilization: 0.9,
            cuda_graphs: true,
            force_cublas: None,
            preload: "all".to_owned(),
            gpu_layers: None,
            dtype: "auto".to_owned(),
            quantize: "none".to_owned(),
            dollars_per_hour: None,
        }
    }
}

/// The API worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Api {
    /// How many calls to each provider are in flight at once.
    pub calls_max: u32,
    /// How long connecting to a provider may take, in milliseconds.
    pub connect_timeout_ms: u64,
    /// The proxy through which providers on other machines are called, such as `http://proxy:3128`. Unset: what
    /// `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` say.
    #[serde(serialize_with = "masked_url")]
    pub proxy: Option<String>,
    /// A file of certificates (PEM) of authorities that are trusted beside those of the system.
    pub ca_file: Option<PathBuf>,
    /// How long the first byte of an answer may take, in milliseconds; 0: as long as the whole attempt, whose bound is the
    /// job's `timeout_ms`.
    pub first_byte_timeout_ms: u64,
    /// How long a provider may be silent in the middle of an answer, in milliseconds; 0: as long as the whole attempt.
    pub idle_timeout_ms: u64,
    /// How many calls with a key for a model are made at once before anything is known of its limits. Answers make it
    /// more, throttled calls less.
    pub calls_start: u32,
    /// Whether a parameter that a provider does not take is left out and noted in the result, instead of failing the job.
    pub drop_params: bool,
    /// Whether jobs with slack go out in batches where their providers take those.
    pub batches: bool,
    /// How long a batch is filled, unless it is full before.
    pub batch_fill_ms: u64,
    /// How long between two looks at a batch that a provider works on.
    pub batch_poll_ms: u64,
    /// How long is searched for a batch that may have been submitted by a worker that died, before it is submitted again. Longer
    /// than a provider may take to list what it has accepted.
    pub batch_settle_ms: u64,
    /// Which models answer in place of others that fail.
    pub fallbacks: Vec<Fallback>,
    /// When a model that does not begin to answer is called once more.
    pub hedging: Vec<Hedge>,
    /// For how long an answer is kept for jobs of the same tenant with the very same request, in milliseconds; 0: not at
    /// all. Only those with temperature 0, or with a seed of their own.
    pub cache_ttl_ms: u64,
    /// The most bytes of all kept answers of a tenant: the oldest go first.
    pub cache_bytes_max: u64,
}

/// Which models answer in place of one that fails.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fallback {
    /// The model, with its prefix.
    pub model: String,
    /// The models that are asked in its place, one after the other, with their prefixes.
    pub to: Vec<String>,
    /// On which kinds of failure. Unset: on all that another model may not have (auth, quota, not_found, throttled,
    /// overloaded, transient, timeout, cut). Others: invalid, content_filter, context_overflow, repeated, too_large, too_long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on: Option<Vec<String>>,
}

/// When a second call goes out beside one that does not begin to answer. The first that does counts; both are paid.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hedge {
    /// The model, with its prefix; with a `*` at its end: all whose names begin so.
    pub model: String,
    /// How long after the first call, in milliseconds.
    pub after_ms: u64,
    /// A percentile such as `p95`: as long after the first call as that part of the model's newest answers took to begin.
    /// `after_ms` holds until enough of them are known; without it no second call goes out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The model that is called then, with its prefix. Unset: the same, with another key where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            calls_max: 64,
            connect_timeout_ms: 10_000,
            proxy: None,
            ca_file: None,
            first_byte_timeout_ms: 300_000,
            idle_timeout_ms: 60_000,
            calls_start: 20,
            drop_params: false,
            batches: true,
            batch_fill_ms: 60_000,
            batch_poll_ms: 30_000,
            batch_settle_ms: 60_000,
            fallbacks: Vec::new(),
            hedging: Vec::new(),
            cache_ttl_ms: 0,
            cache_bytes_max: 64 * 1024 * 1024,
        }
    }
}

/// Where model configuration and models lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Models {
    /// The folder of `litellm_models.yaml` and the like.
    pub dir: PathBuf,
    /// The folder that relative model paths start from (also `MODELS_DIR`). Unset: the folder of the file that names
    /// the path.
    pub root: Option<PathBuf>,
}

impl Default for Models {
    fn default() -> Self {
        Self { dir: PathBuf::from("configs"), root: None }
    }
}

/// Where `hf_` models come from that are in no folder: the cache that all Hugging Face tools share, filled by downloads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hub {
    /// The hub (also `HF_ENDPOINT`).
    pub endpoint: String,
    /// Who asks, for gated and private models (also `HF_TOKEN`). Unset: what `hf auth login` wrote to `token` in `home`.
    pub token: Option<Secret>,
    /// The folder of all Hugging Face tools (also `HF_HOME`). Unset: `huggingface` in `XDG_CACHE_HOME` or `~/.cache`.
    pub home: Option<PathBuf>,
    /// The folder of downloaded models (also `HF_HUB_CACHE`). Unset: `hub` in `home`.
    pub cache: Option<PathBuf>,
    /// Whether nothing is downloaded (also `HF_HUB_OFFLINE`).
    pub offline: bool,
}

impl Default for Hub {
    fn default() -> Self {
        Self { endpoint: "https://huggingface.co".to_owned(), token: None, home: None, cache: None, offline: false }
    }
}

/// Settings of a remote provider.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Provider {
    /// Where its API is, instead of the address in the provider table (also `NAME_BASE_URL`).
    pub base_url: Option<String>,
    /// Its key, instead of the variable that the provider table names.
    pub api_key: Option<Secret>,
    /// More keys of the same account or of others: each job is called with the one that has most room left.
    pub api_keys: Vec<Secret>,
}

/// What a provider allows for each key, as far as it does not tell by itself. All workers together keep it. Whatever the
/// provider tells may only lower it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// The provider's name.
    pub provider: String,
    /// The model, as the provider calls it or with its prefix. Unset: all of its models together.
    #[serde(default)]
    pub model: Option<String>,
    /// Calls in a minute.
    #[serde(default)]
    pub requests_per_minute: Option<u64>,
    /// Tokens in a minute, of prompts and answers.
    #[serde(default)]
    pub tokens_per_minute: Option<u64>,
    /// Calls at once.
    #[serde(default)]
    pub concurrency: Option<u32>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// `.env` is malformed.
    #[error(transparent)]
    DotEnv(#[from] BadDotEnv),
    /// The named file does not exist.
    #[error("the configuration file {path} does not exist")]
    Missing {
        /// The file.
        path: String,
    },
    /// A source is malformed, or a key or value is wrong.
    #[error("{place}: {problem}")]
    Wrong {
        /// The file, variable or key.
        place: String,
        /// What is wrong.
        problem: String,
    },
}

/// Reads the configuration: `file` when named, else [`DEFAULT_FILE`] when it exists; then `environment`.
///
/// # Errors
/// [`ConfigError`] that names the key and, for a misspelled one, the nearest known.
pub fn load(file: Option<&Path>, environment: &Environment) -> Result<Config, ConfigError> {
    let file = match file {
        Some(file) if !file.is_file() => return Err(ConfigError::Missing { path: file.display().to_string() }),
        Some(file) => Some(file.to_owned()),
        None => Some(PathBuf::from(DEFAULT_FILE)).filter(|file| file.is_file()),
    };
    let place = file.as_ref().map_or_else(|| "the environment".to_owned(), |file| file.display().to_string());
    let wrong = |problem: String| ConfigError::Wrong { place: place.clone(), problem };
    let mut builder = config::Config::builder();
    if let Some(file) = &file {
        builder = builder.add_source(config::File::from(file.as_path()).format(config::FileFormat::Toml));
    }
    builder = builder.add_source(aliases(environment).map_err(|error| wrong(error.to_string()))?);
    let merged = builder.add_source(prefixed(environment)).build().map_err(|error| wrong(error.to_string()))?;
    let loaded: Config = serde_path_to_error::deserialize(merged).map_err(|error| {
        let path = error.path().to_string();
        let problem = with_nearest(&error.into_inner().to_string());
        ConfigError::Wrong { place: format!("{place} (or a GENMILL__ variable), section `{path}`"), problem }
    })?;
    check(&loaded)?;
    Ok(loaded)
}

/// The variables of [`ALIASES`] as a source.
fn aliases(environment: &Environment) -> Result<config::Config, config::ConfigError> {
    let mut builder = config::Config::builder();
    for (variable, key) in ALIASES {
        builder = builder.set_override_option(*key, environment.get(variable).map(str::to_owned))?;
    }
    builder.build()
}

/// `GENMILL__SECTION__KEY` variables as a source. Empty ones count as unset.
fn prefixed(environment: &Environment) -> config::Environment {
    let ours = environment.iter().filter(|(name, value)| name.starts_with("GENMILL__") && !value.is_empty());
    let ours: HashMap<String, String> = ours.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    config::Environment::with_prefix("GENMILL").prefix_separator("__").separator("__").source(Some(ours))
}

fn check(config: &Config) -> Result<(), ConfigError> {
    let wrong =
        |place: &str, problem: &str| Err(ConfigError::Wrong { place: place.to_owned(), problem: problem.to_owned() });
    if config.worker.heartbeat_ms == 0 || config.worker.heartbeat_ms > config.worker.lease_ms / 3 {
        return wrong("worker.heartbeat_ms", "must be above 0 and at most a third of worker.lease_ms");
    }
    if !(1..=1_000_000).contains(&config.scheduler.max_tokens) {
        return wrong("scheduler.max_tokens (MAX_TOKENS)", "must be 1 to 1,000,000");
    }
    let listens = [
        ("scheduler.listen", &config.scheduler.listen),
        ("scheduler.http_listen", &config.scheduler.http_listen),
        ("worker.http_listen", &config.worker.http_listen),
    ];
    for (place, listen) in listens {
        let port = listen.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(_))) {
            return wrong(place, &format!("`{listen}` is not of the form HOST:PORT"));
        }
    }
    let schemes = ["redis://", "rediss://", "redis+cluster://", "rediss+cluster://", "unix://"];
    if let Some(url) = config.redis.url.as_deref().filter(|url| !schemes.iter().any(|scheme| url.starts_with(scheme))) {
        let forms = "redis://HOST:PORT or redis+cluster://HOST:PORT,HOST:PORT, with rediss for TLS";
        let problem = format!("`{}` is not of the form {forms}", mask_url(url));
        return wrong("redis.url", &problem);
    }
    let is_http = |url: &&String| url.starts_with("http://") || url.starts_with("https://");
    if !is_http(&&config.hub.endpoint) {
        return wrong("hub.endpoint (HF_ENDPOINT)", "must begin with http:// or https://");
    }
    for (name, provider) in &config.providers {
        if provider.base_url.as_ref().is_some_and(|url| !is_http(&url)) {
            return wrong(&format!("providers.{name}.base_url"), "must begin with http:// or https://");
        }
    }
    let is_nothing = |limit: &&Limit| {
        let bounds = [limit.requests_per_minute, limit.tokens_per_minute, limit.concurrency.map(u64::from)];
        bounds.contains(&Some(0)) || bounds == [None; 3]
    };
    if let Some(limit) = config.limits.iter().find(is_nothing) {
        let problem =
            format!("that of `{}` must set a bound of at least 1; to stop a provider, pause its lane", limit.provider);
        return wrong("limits", &problem);
    }
    if let Err(error) = crate::telemetry::filter(&config.telemetry) {
        return wrong("telemetry.log", &error.to_string());
    }
    if !(0.0..=2.0).contains(&config.scheduler.temperature) {
        return wrong("scheduler.temperature (TEMPERATURE)", "must be 0 to 2");
    }
    if config.api.calls_max == 0
        || config.api.calls_start == 0
        || config.gpu.sequences_max == 0
        || config.gpu.step_tokens == 0
    {
        return wrong("api.calls_max, api.calls_start, gpu.sequences_max, gpu.step_tokens", "must be at least 1");
    }
    if config.api.batch_poll_ms == 0 {
        return wrong("api.batch_poll_ms", "must be at least 1: providers are asked so often");
    }
    if config.gpu.step_timeout_ms < STEP_TIMEOUT_MS_MIN {
        return wrong(
            "gpu.step_timeout_ms",
            "must be at least 100: steps that are well take as long on a busy machine",
        );
    }
    if !(config.gpu.memory_utilization > 0.0 && config.gpu.memory_utilization <= 1.0) {
        return wrong("gpu.memory_utilization", "must be above 0 and at most 1");
    }
    if config.gpu.context_tokens == Some(0) {
        return wrong("gpu.context_tokens (MODEL_CONTEXT_SIZE)", "must be at least 1");
    }
    if config.redis.namespace.is_empty() || config.redis.namespace.contains(['{', '}', '*', '?', '[']) {
        return wrong("redis.namespace", "must not be empty nor contain any of {}*?[");
    }
    Ok(())
}

/// Adds the nearest known name to serde's message about an unknown one.
pub(crate) fn with_nearest(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let (Some(unknown), true) = (quoted.next(), message.contains("unknown field")) else {
        return message.to_owned();
    };
    let known: Vec<&str> = quoted.collect();
    match nearest(unknown, &known) {
        Some(near) => format!("unknown key `{unknown}`: did you mean `{near}`?"),
        None => format!("unknown key `{unknown}`: known are {}", known.join(", ")),
    }
}

pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let rated = known.iter().map(|candidate| (strsim::jaro_winkler(name, candidate), *candidate));
    rated.filter(|(likeness, _)| *likeness > 0.7).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, near)| near)
}

/// The effective configuration as TOML, secrets masked.
///
/// # Errors
/// When it cannot be written as TOML, which is a defect.
pub fn show(config: &Config) -> Result<String, toml::ser::Error> {
    toml::to_string(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_with(file: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("genmill.toml");
        std::fs::write(&path, file).unwrap();
        let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        load(Some(&path), &environment).map_err(|error| error.to_string())
    }

    fn refused(file: &str, variables: &[(&str, &str)], says: &str) {
        let error = load_with(file, variables).unwrap_err();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn the_variables_of_hugging_face_tools_are_understood() {
        let variables = [("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", "hf_secret"), ("HF_ENDPOINT", "http://127.0.0.1:9")];
        let config = load_with("", &variables).unwrap();
        assert!(config.hub.offline && config.hub.endpoint == "http://127.0.0.1:9");
        assert!(!show(&config).unwrap().contains("hf_secret"));
        refused("", &[("HF_ENDPOINT", "huggingface.co")], "hub.endpoint (HF_ENDPOINT)");
    }

    #[test]
    fn the_variables_and_names_of_other_engines_are_understood() {
        let variables = [
            ("MODEL_CONTEXT_SIZE", "2048"),
            ("MODEL_N_THREADS", "3"),
            ("MODEL_GPU_LAYERS", "-1"),
            ("MODEL_PRELOAD", "vllm_a,hf_b"),
            ("GPU_MAX_MEMORY", "8GiB"),
            ("GPU_TORCH_DTYPE", "bfloat16"),
            ("GGML_CUDA_FORCE_CUBLAS", "1"),
        ];
        let gpu = load_with("[gpu]\nmax_num_seqs = 5\ngpu_memory_utilization = 0.5", &variables).unwrap().gpu;
        assert_eq!((gpu.context_tokens, gpu.threads, gpu.gpu_layers, gpu.sequences_max), (Some(2048), 3, Some(-1), 5));
        assert_eq!(
            (gpu.memory.as_deref(), gpu.preload.as_str(), gpu.dtype.as_str()),
            (Some("8GiB"), "vllm_a,hf_b", "bfloat16")
        );
        assert!((gpu.memory_utilization - 0.5).abs() < 1e-9);
        assert!(gpu.cuda_graphs && gpu.force_cublas.as_deref() == Some("1"));
        assert_eq!(load_with("[gpu]\nmax_model_len = 7", &[]).unwrap().gpu.context_tokens, Some(7));
        refused("[gpu]\nmemory_utilization = 1.5", &[], "gpu.memory_utilization");
        refused("", &[("MODEL_CONTEXT_SIZE", "0")], "MODEL_CONTEXT_SIZE");
    }

    #[test]
    fn later_sources_win() {
        let file = "[scheduler]\nmax_tokens = 5\ntemperature = 0.5\nlisten = \"a:1\"";
        let variables = [("MAX_TOKENS", "6"), ("TEMPERATURE", "0.7"), ("GENMILL__SCHEDULER__LISTEN", "b:2")];
        let config = load_with(file, &variables).unwrap();
        assert_eq!(config.scheduler.max_tokens, 6);
        assert!((config.scheduler.temperature - 0.7).abs() < 1e-9);
        assert_eq!(config.scheduler.listen, "b:2");
        assert_eq!(config.redis, Redis::default());
    }

    #[test]
    fn the_prefixed_variable_wins_over_the_plain_one() {
        let variables = [("MAX_TOKENS", "6"), ("GENMILL__SCHEDULER__MAX_TOKENS", "7")];
        assert_eq!(load_with("", &variables).unwrap().scheduler.max_tokens, 7);
    }

    #[test]
    fn a_provider_is_set_by_file_or_variable() {
        let config =
            load_with("[providers.openai]\nbase_url = \"http://x\"", &[("GENMILL__PROVIDERS__GROQ__API_KEY", "0123")])
                .unwrap();
        assert_eq!(config.providers["openai"].base_url.as_deref(), Some("http://x"));
        assert_eq!(config.providers["groq"].api_key.as_ref().map(Secret::reveal), Some("0123"));
    }

    #[test]
    fn limits_of_providers_bound_something() {
        let rows = "[[limits]]\nprovider = 'openai'\nmodel = 'gpt-4o'\nrequests_per_minute = 60\n[[limits]]\nprovider = 'groq'\nconcurrency = 2";
        let config = load_with(rows, &[]).unwrap();
        assert_eq!((config.limits[0].requests_per_minute, config.limits[0].tokens_per_minute), (Some(60), None));
        assert_eq!((config.limits[1].model.as_deref(), config.limits[1].concurrency), (None, Some(2)));
        assert!(show(&config).unwrap().contains("requests_per_minute = 60"));
        refused("[[limits]]\nprovider = 'openai'", &[], "`openai` must set a bound");
        refused("[[limits]]\nprovider = 'openai'\nconcurrency = 0", &[], "at least 1");
        refused("[[limits]]\nprovider = 'openai'\nrequest_per_minute = 1", &[], "did you mean `requests_per_minute`?");
        refused("[api]\ncalls_start = 0", &[], "api.calls_start");
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest() {
        refused("[scheduler]\nlissten = \"x\"", &[], "did you mean `listen`?");
        refused("[shceduler]\nlisten = \"x\"", &[], "did you mean `scheduler`?");
        refused("[providers.openai]\nbase_uri = \"x\"", &[], "did you mean `base_url`?");
        refused("", &[("GENMILL__REDIS__URI", "x")], "did you mean `url`?");
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_place() {
        refused("[scheduler]\nmax_tokens = \"many\"", &[], "scheduler");
        refused("[scheduler", &[], "genmill.toml");
        refused("", &[("TEMPERATURE", "9")], "TEMPERATURE");
        refused("[worker]\nheartbeat_ms = 10000", &[], "worker.heartbeat_ms");
        refused("[gpu]\nstep_timeout_ms = 0", &[], "gpu.step_timeout_ms");
        refused("[scheduler]\nlisten = \"nonsense\"", &[], "HOST:PORT");
        refused("[scheduler]\nlisten = \"a:99999\"", &[], "HOST:PORT");
        refused("[redis]\nurl = \"nonsense\"", &[], "redis.url");
        refused("[redis]\nurl = \"redis-cluster://a:1\"", &[], "redis+cluster://HOST:PORT");
        refused("[telemetry]\nlog = \"[[\"", &[], "telemetry.log");
        refused("", &[("MAX_TOKENS", "5000000")], "MAX_TOKENS");
        refused("[providers.x]\nbase_url = \"nonsense\"", &[], "providers.x.base_url");
    }

    #[test]
    fn what_is_shown_has_no_secret() {
        let config =
            load_with("[redis]\nurl = \"redis://u:hunter2@h:1\"\n[providers.openai]\napi_key = \"hunter2\"", &[])
                .unwrap();
        let shown = show(&config).unwrap();
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(!format!("{config:?}").contains("api_key: Some(\"hunter2"));
    }
}
