//! What a GPU is asked before it is trusted: `gpu-check` and `gpu-bench`.
//!
//! Never here: kernels, or a way to compute that the engine does not use.

mod workload;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ask::{Ask, CHOSEN_BEFORE};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::check::{self, Bench, Dice};
use crate::backend::cuda::device::{Device as _, DeviceError, Dtype};
use crate::backend::cuda::driver::Driver;
use crate::backend::{Backend as _, Batch};
use crate::config::Config;
use crate::decoder::{Decoder, Forward as _, Room};
use crate::error::LoadError;
use crate::kv::BLOCK_TOKENS;
use crate::made_up::Folder;
use crate::raw::read_all;
use crate::sampler::Sampling;
use crate::weights::Weights;

/// Seeds of each case.
const SEEDS: u32 = 60;

/// Random schedules of each model: over 10,000 of all together.
const SCHEDULES: usize = 700;

/// Weights of models whose products are compared for rows alone and among others: outputs and inputs.
const PRODUCTS: [[usize; 2]; 10] = [
    [2304, 768],
    [768, 3072],
    [50_257, 768],
    [1152, 896],
    [9728, 896],
    [896, 4864],
    [151_936, 896],
    [4608, 3584],
    [37_888, 3584],
    [3584, 18_944],
];

/// Bytes of a GPU's memory that nobody has.
///
/// # Errors
/// When there is no such GPU.
pub fn free_bytes(ordinal: usize) -> Result<u64, LoadError> {
    Driver::free_bytes_of(ordinal).map_err(|error| LoadError::Device { message: error.to_string() })
}

/// Compares every kernel with its twin on the CPU, and every model below `fixtures` with what transformers makes of it.
/// A line for each goes to `out`. How many went wrong.
///
/// # Errors
/// When there is no such GPU, or the fixtures or `out` cannot be had.
pub fn check(ordinal: usize, fixtures: &Path, out: &mut dyn Write) -> Result<usize, CheckError> {
    let driver = Arc::new(Driver::open(ordinal).map_err(|error| LoadError::Device { message: error.to_string() })?);
    let free = driver.free_bytes().unwrap_or(0);
    writeln!(out, "{}, {:.1} GB free", driver.name(), free as f64 / 1e9)?;
    let mut wrong = 0;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let bench = Bench::new(driver.clone(), dtype);
        for (name, run) in check::cases() {
            let failures: Vec<String> = (0..SEEDS)
                .filter_map(|seed| run(&bench, &mut Dice::new(seed)).err().map(|error| format!("seed {seed}: {error}")))
                .collect();
            wrong += failures.len();
            writeln!(out, "{:5} {name}: {} of {SEEDS} wrong", dtype.suffix(), failures.len())?;
            for failure in failures.iter().take(3) {
                writeln!(out, "      {failure}")?;
            }
        }
        for size in PRODUCTS {
            let compared = check::product::invariance_at_size(&bench, size);
            let found = compared.as_ref().map_or_else(ToString::to_string, |()| "the same bits".to_owned());
            wrong += usize::from(compared.is_err());
            writeln!(out, "{:5} product {size:?} of 1 to many rows: {found}", dtype.suffix())?;
        }
        for folder in folders(fixtures)? {
            if dtype == Dtype::Bf16
                && let Err(error) = check::schedules::schedules(&driver, &folder, SCHEDULES, &mut Dice::new(1))
            {
                wrong += 1;
                writeln!(out, "{error}")?;
            }
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match check::model::fixture(&driver, &folder, dtype) {
                Ok(Some(apart)) => writeln!(out, "{:5} {name}: logits {apart:.4} apart", dtype.suffix())?,
                Ok(None) => writeln!(out, "{:5} {name}: no kernel for its heads", dtype.suffix())?,
                Err(error) => {
                    wrong += 1;
                    writeln!(out, "{:5} {name}: {error}", dtype.suffix())?;
                }
            }
        }
    }
    Ok(wrong)
}

fn folders(of: &Path) -> Result<Vec<PathBuf>, std::io::Error> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(of)? {
        let path = entry?.path();
        if path.join("reference.json").exists() {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders)
}

/// A model to be measured: its config.json, and the tokens per second that an H200's memory and arithmetic allow at the
/// batches of [`BATCHES`] (2026-11, measured copy and product rates).
struct Measured {
    name: &'static str,
    config: &'static str,
    limits: [f64; 3],
}

/// Sequences at a time.
const BATCHES: [usize; 3] = [1, 32, 256];

/// Tokens that each sequence has when it is measured.
const CONTEXT: usize = 512;

/// Steps that are timed, after a few that are not.
const STEPS: u32 = 30;

const MEASURED: [Measured; 4] = [
    Measured {
        name: "GPT-2 124M",
        config: r#"{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": true}"#,
        limits: [16e3, 160e3, 212e3],
    },
    Measured {
        name: "Qwen2.5-0.5B",
        config: r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
            "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24,
            "vocab_size": 151936, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "tie_word_embeddings": true}"#,
        limits: [4.3e3, 114e3, 385e3],
    },
    Measured {
        name: "Qwen2.5-1.5B",
        config: r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536,
            "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 28,
            "vocab_size": 151936, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "tie_word_embeddings": true}"#,
        limits: [1.39e3, 38.5e3, 146e3],
    },
    Measured {
        name: "Qwen2.5-7B",
        config: r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
            "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28,
            "vocab_size": 152064, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "tie_word_embeddings": false}"#,
        limits: [303.0, 9.1e3, 45e3],
    },
];

/// Measures models with made-up weights: how fast they are loaded; decode at some batches; requests of mixed lengths, requests
/// that begin alike, and the same requests with this engine and with transformers. A line for each to `out`, and all of it as
/// JSON. `tokenizer` is the folder of a model whose tokenizer serves. Steps are those of an engine: tokens are chosen on the
/// device, and a step is started before the tokens of the one before are known. Only models whose names have `part` in them are
/// measured.
///
/// # Errors
/// When there is no such GPU, it fails, or `out` cannot be had.
pub fn bench(
    (ordinal, part): (usize, &str),
    tokenizer: &Path,
    out: &mut dyn Write,
) -> Result<serde_json::Value, CheckError> {
    let driver = Arc::new(Driver::open(ordinal).map_err(failed)?);
    let link = link_rate(&driver)?;
    writeln!(out, "{}, copies from the host at {link:.1} GB/s", driver.name())?;
    let mut models = serde_json::Map::new();
    for model in MEASURED.iter().filter(|model| model.name.contains(part)) {
        let folder = Folder::write(&std::env::temp_dir(), &model.name.replace(' ', "-"), model.config)?;
        let (path, context) = (folder.path(), Config::read(folder.path())?.context);
        let loading = loading(&driver, (model, path), link, out)?;
        let decode = decode((&driver, ordinal), (model, path), out)?;
        // The requests are longer than what some models can do.
        let workloads = match context < workload::CONTEXT {
            true => serde_json::Value::Null,
            false => workload::workloads((&driver, ordinal), (model, path), tokenizer, out)?,
        };
        let found = serde_json::json!({"loading": loading, "decode": decode, "workloads": workloads});
        models.insert(model.name.to_owned(), found);
    }
    let device = driver.name();
    Ok(serde_json::json!({"device": device, "link_gb_per_s": link, "context_tokens": CONTEXT, "models": models}))
}

fn failed(error: DeviceError) -> CheckError {
    LoadError::Device { message: error.to_string() }.into()
}

/// GB that go from the ring to the device in a second when the ring is never waited for.
fn link_rate(driver: &Driver) -> Result<f64, CheckError> {
    let (bytes, copies) = (driver.fill_bytes_max(), 128);
    let room = driver.allocate(bytes).map_err(failed)?;
    let mut rate = 0.0;
    // The first time warms up.
    for _ in 0..2 {
        let begun = Instant::now();
        for _ in 0..copies {
            driver.fill(Driver::address(&room), bytes, &mut |_| ()).map_err(failed)?;
        }
        driver.wait().map_err(failed)?;
        rate = (copies * bytes) as f64 / begun.elapsed().as_secs_f64() / 1e9;
    }
    Ok(rate)
}

/// Loads a model that the system has in its memory: what the host does of it, and all of it.
fn loading(
    driver: &Arc<Driver>,
    (model, folder): (&Measured, &Path),
    link: f64,
    out: &mut dyn Write,
) -> Result<serde_json::Value, CheckError> {
    let begun = Instant::now();
    let bytes = read_all(folder, (driver.fill_bytes_max(), 4), &mut |_| ())? as f64;
    let read = bytes / begun.elapsed().as_secs_f64() / 1e9;
    let begun = Instant::now();
    let decoder = load(driver, folder, Graphs::No)?;
    driver.wait().map_err(failed)?;
    let seconds = begun.elapsed().as_secs_f64();
    drop(decoder);
    let rate = bytes / seconds / 1e9;
    writeln!(
        out,
        "{:14} loaded: {:.2} GB in {seconds:.2} s, {rate:.1} GB/s ({:.0} % of the link); the host alone {read:.1} GB/s",
        model.name,
        bytes / 1e9,
        100.0 * rate / link
    )?;
    Ok(serde_json::json!({"bytes": bytes, "seconds": seconds, "share_of_link": rate / link, "host_gb_per_s": read}))
}

/// Whether steps are recorded and repeated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Graphs {
    Yes,
    No,
}

fn load(driver: &Arc<Driver>, folder: &Path, graphs: Graphs) -> Result<Decoder<Cuda<Arc<Driver>>>, CheckError> {
    let backend = Cuda::new(driver.clone(), Dtype::Bf16);
    let backend = if graphs == Graphs::Yes { backend.with_graphs() } else { backend };
    Ok(Decoder::load(backend, Config::read(folder)?, &mut Weights::open(folder)?)?)
}

/// Decode at each batch: recorded; step by step; and recorded with whatever algorithm cuBLASLt thinks best for the number of
/// rows, which tells what it costs that a row's bits do not depend on others.
fn decode(
    (driver, ordinal): (&Arc<Driver>, usize),
    (model, folder): (&Measured, &Path),
    out: &mut dyn Write,
) -> Result<Vec<serde_json::Value>, CheckError> {
    let free = Arc::new(Driver::open(ordinal).map_err(failed)?.with_any_algorithm().map_err(failed)?);
    let mut found = Vec::new();
    for (driver, graphs) in [(driver, Graphs::Yes), (driver, Graphs::No), (&free, Graphs::Yes)] {
        let mut decoder = load(driver, folder, graphs)?;
        let rates = BATCHES.map(|batch| tokens_per_s(driver, &mut decoder, batch));
        found.push(rates.into_iter().collect::<Result<Vec<_>, _>>()?);
    }
    let mut rows = Vec::new();
    for (index, (batch, limit)) in BATCHES.into_iter().zip(model.limits).enumerate() {
        let [recorded, eager, free] = [0, 1, 2].map(|way: usize| found[way][index]);
        writeln!(
            out,
            "{:14} {batch:4}: {recorded:9.0} tokens/s at {CONTEXT} tokens ({:4.1} % of an H200's limit), without graphs \
             {eager:9.0}, with any algorithm {free:9.0}",
            model.name,
            100.0 * recorded / limit
        )?;
        rows.push(serde_json::json!({
            "batch": batch, "tokens_per_s": recorded, "tokens_per_s_without_graphs": eager,
            "tokens_per_s_with_any_algorithm": free, "h200_limit_tokens_per_s": limit,
            "share_of_limit": recorded / limit, "cost_of_invariance": 1.0 - recorded / free,
        }));
    }
    Ok(rows)
}

fn tokens_per_s(
    driver: &Arc<Driver>,
    decoder: &mut Decoder<Cuda<Arc<Driver>>>,
    count: usize,
) -> Result<f64, CheckError> {
    let blocks = CONTEXT.div_ceil(BLOCK_TOKENS);
    decoder.reserve(Room { rows: count, outputs: count, blocks: count * blocks, tokens: CONTEXT });
    let (tables, mut batch): (Vec<u32>, _) = ((0..).take(count * blocks).collect(), Batch::default());
    let sampling = Sampling { temperature: 0.6, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, sample: 0 };
    let ask = Ask { sampling, known: None, ..Ask::nothing() };
    let asks = vec![ask; count];
    let mut underway = 0;
    let mut run = |decoder: &mut Decoder<_>, steps: u32| -> Result<Duration, CheckError> {
        let begun = Instant::now();
        for _ in 0..steps {
            batch.clear();
            for (number, table) in (0..).zip(tables.chunks(blocks)) {
                let id = if underway == 0 { 17 } else { CHOSEN_BEFORE | number };
                batch.push(&[id], CONTEXT - 1, CONTEXT, table);
                batch.want_logits();
            }
            decoder.start(&mut batch);
            decoder.choose(&asks);
            // As many answers are on their way as in an engine: one.
            if underway > 0 {
                decoder.chosen();
            }
            underway = 1;
        }
        driver.wait().map_err(failed)?;
        Ok(begun.elapsed())
    };
    run(decoder, 5)?;
    let time = run(decoder, STEPS)?;
    // What is still on its way.
    decoder.chosen();
    if let Some(message) = decoder.backend().fault() {
        return Err(LoadError::Device { message }.into());
    }
    Ok(f64::from(STEPS) * count as f64 / time.as_secs_f64())
}

/// Why a check could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The GPU is not there.
    #[error("the GPU cannot be opened")]
    Device(#[from] LoadError),
    /// A file or the output failed.
    #[error("cannot read fixtures, or write what was found")]
    Io(#[from] std::io::Error),
}
