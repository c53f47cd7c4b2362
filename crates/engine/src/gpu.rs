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
use crate::backend::cuda::device::{Device as _, Dtype};
use crate::backend::cuda::driver::Driver;
use crate::backend::{Backend as _, Batch};
use crate::config::{Config, Fields};
use crate::decoder::{Decoder, Forward as _, Room};
use crate::error::LoadError;
use crate::kv::BLOCK_TOKENS;
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

/// A model to be measured: its config.json, the name of a tensor that it lacks, and the tokens per second that an H200's
/// memory and arithmetic allow at the batches of [`BATCHES`] (2026-11, measured copy and product rates).
struct Measured {
    name: &'static str,
    config: &'static str,
    without: &'static str,
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
        without: "lm_head.weight",
        limits: [16e3, 160e3, 212e3],
    },
    Measured {
        name: "Qwen2.5-0.5B",
        config: r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
            "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24,
            "vocab_size": 151936, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "tie_word_embeddings": true}"#,
        without: "lm_head.weight",
        limits: [4.3e3, 114e3, 385e3],
    },
    Measured {
        name: "Qwen2.5-1.5B",
        config: r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536,
            "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 28,
            "vocab_size": 151936, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "tie_word_embeddings": true}"#,
        without: "lm_head.weight",
        limits: [1.39e3, 38.5e3, 146e3],
    },
    Measured {
        name: "Qwen2.5-7B",
        config: r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
            "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28,
            "vocab_size": 152064, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "tie_word_embeddings": false}"#,
        without: "",
        limits: [303.0, 9.1e3, 45e3],
    },
];

/// Measures models with made-up weights: decode at some batches, requests of mixed lengths, and requests that begin alike. A
/// line for each to `out`, and all of it as JSON. `tokenizer` is the folder of a model whose tokenizer serves. Steps are those of an
/// engine: tokens are chosen on the device, and a step is started before the tokens of the one before are known.
///
/// # Errors
/// When there is no such GPU, it fails, or `out` cannot be had.
pub fn bench(ordinal: usize, tokenizer: &Path, out: &mut dyn Write) -> Result<serde_json::Value, CheckError> {
    let driver = Arc::new(Driver::open(ordinal).map_err(|error| LoadError::Device { message: error.to_string() })?);
    writeln!(out, "{}, decode at {CONTEXT} tokens, tokens/s (share of an H200's limit)", driver.name())?;
    let mut rows = Vec::new();
    for model in MEASURED {
        for (batch, limit) in BATCHES.into_iter().zip(model.limits) {
            let [recorded, eager] =
                [Graphs::Yes, Graphs::No].map(|graphs| tokens_per_s(&driver, &model, batch, graphs));
            let (recorded, eager) = (recorded?, eager?);
            writeln!(
                out,
                "{:14} {batch:4}: {recorded:9.0} ({:4.1} %), without graphs {eager:9.0}",
                model.name,
                100.0 * recorded / limit
            )?;
            rows.push(serde_json::json!({
                "model": model.name, "batch": batch, "tokens_per_s": recorded,
                "tokens_per_s_without_graphs": eager, "h200_limit_tokens_per_s": limit,
                "share_of_limit": recorded / limit,
            }));
        }
    }
    let mut workloads = serde_json::Map::new();
    for model in &MEASURED {
        // The requests are longer than what some models can do.
        if config(model)?.context < workload::CONTEXT {
            continue;
        }
        workloads.insert(model.name.to_owned(), workload::workloads(&driver, model, tokenizer, out)?);
    }
    let device = driver.name();
    Ok(serde_json::json!({"device": device, "context_tokens": CONTEXT, "decode": rows, "workloads": workloads}))
}

/// Whether steps are recorded and repeated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Graphs {
    Yes,
    No,
}

fn config(model: &Measured) -> Result<Config, CheckError> {
    let value = serde_json::from_str(model.config).map_err(std::io::Error::from)?;
    Ok(Config::of(&Fields::of(Path::new(model.name), &value), None)?)
}

fn tokens_per_s(driver: &Arc<Driver>, model: &Measured, count: usize, graphs: Graphs) -> Result<f64, CheckError> {
    let config = config(model)?;
    let backend = Cuda::new(driver.clone(), Dtype::Bf16);
    let backend = if graphs == Graphs::Yes { backend.with_graphs() } else { backend };
    let mut decoder = Decoder::load(backend, config, &mut Weights::made_up(model.without))?;
    let blocks = CONTEXT.div_ceil(BLOCK_TOKENS);
    decoder.reserve(Room { rows: count, outputs: count, blocks: count * blocks, tokens: CONTEXT });
    let (tables, mut batch): (Vec<u32>, _) = ((0..).take(count * blocks).collect(), Batch::default());
    let sampling = Sampling { temperature: 0.6, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, sample: 0 };
    let ask = Ask { sampling, known: None, ..Ask::nothing() };
    let asks = vec![ask; count];
    let mut underway = 0;
    let mut run = |steps: u32| -> Result<Duration, CheckError> {
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
        driver.wait().map_err(|error| LoadError::Device { message: error.to_string() })?;
        Ok(begun.elapsed())
    };
    run(5)?;
    let time = run(STEPS)?;
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
