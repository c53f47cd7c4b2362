//! What a GPU is asked before it is trusted: `gpu-check` and `gpu-bench`.
//!
//! Never here: kernels, or a way to compute that the engine does not use.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::cuda::Cuda;
use crate::backend::cuda::check::{self, Bench, Dice};
use crate::backend::cuda::device::{Device as _, Dtype};
use crate::backend::cuda::driver::Driver;
use crate::backend::{Backend as _, Batch};
use crate::config::{Config, Fields};
use crate::decoder::{Decoder, Forward as _, Room};
use crate::error::LoadError;
use crate::kv::BLOCK_TOKENS;
use crate::weights::Weights;

/// Seeds of each case.
const SEEDS: u32 = 60;

/// Random schedules of each model.
const SCHEDULES: usize = 500;

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

/// Measures decode with made-up weights: a line for each model and batch to `out`, and all of it as JSON. Logits are
/// computed; the first figure has their way to the host, the second stops before the last products.
///
/// # Errors
/// When there is no such GPU, it fails, or `out` cannot be had.
pub fn bench(ordinal: usize, out: &mut dyn Write) -> Result<serde_json::Value, CheckError> {
    let driver = Arc::new(Driver::open(ordinal).map_err(|error| LoadError::Device { message: error.to_string() })?);
    writeln!(out, "{}, decode at {CONTEXT} tokens, tokens/s (share of an H200's limit)", driver.name())?;
    let mut rows = Vec::new();
    for model in MEASURED {
        for (batch, limit) in BATCHES.into_iter().zip(model.limits) {
            let [with_logits, without] = [true, false].map(|logits| tokens_per_s(&driver, &model, batch, logits));
            let (with_logits, without) = (with_logits?, without?);
            writeln!(
                out,
                "{:14} {batch:4}: {with_logits:9.0} ({:4.1} %), without logits {without:9.0}",
                model.name,
                100.0 * with_logits / limit
            )?;
            rows.push(serde_json::json!({
                "model": model.name, "batch": batch, "tokens_per_s": with_logits,
                "tokens_per_s_without_logits": without, "h200_limit_tokens_per_s": limit,
            }));
        }
    }
    Ok(serde_json::json!({"device": driver.name(), "context_tokens": CONTEXT, "decode": rows}))
}

fn tokens_per_s(driver: &Arc<Driver>, model: &Measured, count: usize, logits: bool) -> Result<f64, CheckError> {
    let value = serde_json::from_str(model.config).map_err(std::io::Error::from)?;
    let config = Config::of(&Fields::of(Path::new(model.name), &value), None)?;
    let backend = Cuda::new(driver.clone(), Dtype::Bf16);
    let mut decoder = Decoder::load(backend, config, &mut Weights::made_up(model.without))?;
    let blocks = CONTEXT.div_ceil(BLOCK_TOKENS);
    decoder.reserve(Room { rows: count, outputs: count, blocks: count * blocks });
    let mut batch = Batch::default();
    for table in (0..).take(count * blocks).collect::<Vec<u32>>().chunks(blocks) {
        batch.push(&[17], CONTEXT - 1, CONTEXT, table);
        if logits {
            batch.want_logits();
        }
    }
    let mut run = |steps: u32| -> Result<Duration, CheckError> {
        let begun = Instant::now();
        for _ in 0..steps {
            decoder.forward(&batch);
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
