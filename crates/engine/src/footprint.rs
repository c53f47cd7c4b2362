//! What a model takes of memory, told by its headers before anything is loaded.
//!
//! Never here: how much there is, or who gets it.

use std::path::Path;

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::config::Config;
use crate::engine::EngineOptions;
use crate::error::LoadError;
use crate::kv::BLOCK_TOKENS;
use crate::model::{LoadOptions, open, shape};
use crate::sim::Device;

/// Bytes of a float32 value, which all that is computed is on the CPU.
const FLOAT32: u64 = 4;

/// Bytes of partial results of attention, of a step's arrays, of logits on their way to tokens, and of what cuBLAS keeps. An
/// engine on a GPU finds out at its start what it really takes; this is for plans.
const GPU_SCRATCH_BYTES: u64 = 256 << 20;

/// The sizes that decide what a model takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of the weights once they are loaded.
    pub weights_bytes: u64,
    /// Bytes of the keys and values of a block of 16 tokens.
    pub kv_block_bytes: u64,
    /// Longest sequence, prompt and output together, in tokens.
    pub context_tokens: usize,
    /// Bytes that each row of a step takes in buffers.
    row_bytes: u64,
    /// Bytes of the logits of a row.
    logits_bytes: u64,
    /// Bytes that each position takes in tables.
    position_bytes: u64,
    /// Parts of a step that run side by side, each with buffers of its own.
    lanes: u64,
    /// What a device takes beside buffers.
    scratch_bytes: u64,
}

impl Footprint {
    /// Reads the headers of a model.
    ///
    /// # Errors
    /// Whatever is missing, malformed or unsupported in them.
    pub fn read(path: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        let (config, mut weights) = open(path)?;
        weights.quantise(options.quantize);
        let (values, weights_bytes) = weights.size();
        let lanes = Cpu::new(options.threads)?.lanes(usize::try_from(values).unwrap_or(usize::MAX));
        Ok(Self::of(&config, weights_bytes, lanes, FLOAT32))
    }

    /// Reads the headers of a model that a GPU shall hold, in values of 16 bits where they are not quantised.
    ///
    /// # Errors
    /// Whatever is missing, malformed or unsupported in them.
    pub fn on_gpu(path: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        let (config, mut weights) = open(path)?;
        weights.quantise(options.quantize);
        // As many as the processor needs at most, where they are quantised, since it has them in the same way.
        let (values, bytes) = weights.size();
        let weights_bytes = bytes.min(values.saturating_mul(2));
        Ok(Self { scratch_bytes: GPU_SCRATCH_BYTES, ..Self::of(&config, weights_bytes, 1, 2) })
    }

    /// Reads the shape of a model that a simulated device shall hold.
    ///
    /// # Errors
    /// Whatever is missing, malformed or unsupported in it, and weights that the device has no room for.
    pub fn simulated(path: &Path, device: &Device) -> Result<Self, LoadError> {
        let (config, _) = shape(path)?;
        let (needed_bytes, memory_bytes) = (device.cost(&config).model_bytes(), device.gpu.memory_bytes);
        if needed_bytes > memory_bytes {
            let (path, device) = (path.to_owned(), device.gpu.name);
            return Err(LoadError::TooLarge { path, device, needed_bytes, memory_bytes });
        }
        Ok(Self::of(&config, needed_bytes, 1, device.dtype.bytes()))
    }

    fn of(config: &Config, weights_bytes: u64, lanes: usize, value_bytes: u64) -> Self {
        let bytes = |values: usize| value_bytes.saturating_mul(values as u64);
        let experts = config.experts.as_ref();
        let inner = config.inner.max(experts.map_or(0, |experts| experts.inner));
        let heads = config.heads * config.head_dim;
        // The buffers of `decoder::Buffers`.
        let row = 3 * config.hidden
            + config.qkv_width()
            + config.hidden.max(heads)
            + config.mlp_in(inner).iter().sum::<usize>()
            + inner
            + config.hidden
            + experts.map_or(0, |experts| experts.count);
        let rotated: usize = config.ropes.iter().map(|rope| rope.width).sum();
        let kept = 2 * config.layers * config.kv_heads * config.head_dim * BLOCK_TOKENS;
        Self {
            weights_bytes,
            kv_block_bytes: bytes(kept),
            context_tokens: config.context,
            row_bytes: bytes(row),
            logits_bytes: bytes(config.vocabulary),
            position_bytes: bytes(rotated),
            lanes: lanes as u64,
            scratch_bytes: 0,
        }
    }

    /// Bytes of the buffers and tables of an engine of that size.
    #[must_use]
    pub fn activation_bytes(&self, options: &EngineOptions) -> u64 {
        let (rows, outputs) = (options.step_tokens as u64, options.max_sequences as u64);
        let buffers = rows.saturating_mul(self.row_bytes) + outputs.saturating_mul(self.logits_bytes);
        let lanes = self.lanes.min(outputs.max(1));
        let tables = self.position_bytes.saturating_mul(self.context_tokens as u64);
        buffers.saturating_mul(lanes).saturating_add(tables).saturating_add(self.scratch_bytes)
    }

    /// Bytes of the keys and values of so many tokens.
    #[must_use]
    pub fn kv_bytes(&self, tokens: usize) -> u64 {
        (tokens.div_ceil(BLOCK_TOKENS) as u64).saturating_mul(self.kv_block_bytes)
    }

    /// How many tokens' keys and values fit into so many bytes.
    #[must_use]
    pub fn kv_tokens(&self, bytes: u64) -> usize {
        let blocks = bytes.checked_div(self.kv_block_bytes).unwrap_or(0);
        usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(BLOCK_TOKENS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_tell_what_a_model_takes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen2");
        let footprint = Footprint::read(&folder, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap();
        let config = Config::read(&folder).unwrap();
        // The file holds bfloat16 or float32 values and a header; in memory all are float32.
        let file = std::fs::metadata(folder.join("model.safetensors")).unwrap().len();
        assert!((file / 2..=2 * file).contains(&footprint.weights_bytes), "{footprint:?} of a file of {file}");
        let per_token = 2 * 4 * config.layers * config.kv_heads * config.head_dim;
        assert_eq!(footprint.kv_bytes(1), 16 * per_token as u64, "whole blocks");
        assert_eq!(footprint.kv_tokens(footprint.kv_bytes(100)), 112);
        assert_eq!(footprint.context_tokens, config.context);
        let options = EngineOptions::default();
        let twice = EngineOptions { step_tokens: 2 * options.step_tokens, ..options };
        assert!(footprint.activation_bytes(&twice) > footprint.activation_bytes(&options));
    }

    #[test]
    fn a_gpu_holds_half_of_what_the_processor_does() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen2");
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let (cpu, gpu) = (Footprint::read(&folder, &options).unwrap(), Footprint::on_gpu(&folder, &options).unwrap());
        assert_eq!((2 * gpu.weights_bytes, 2 * gpu.kv_block_bytes), (cpu.weights_bytes, cpu.kv_block_bytes));
        assert!(gpu.activation_bytes(&EngineOptions::default()) >= GPU_SCRATCH_BYTES);
        let quantised = LoadOptions { quantize: Some(crate::quantized::Format::Q8_0), ..options };
        assert!(Footprint::on_gpu(&folder, &quantised).unwrap().weights_bytes < gpu.weights_bytes);
    }

    #[test]
    fn a_model_that_is_not_there_is_named() {
        let error = Footprint::read(Path::new("/nowhere"), &LoadOptions::default()).unwrap_err();
        assert!(error.to_string().contains("/nowhere"), "{error}");
    }
}
