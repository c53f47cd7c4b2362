//! Folders of models with made-up weights, as large as real ones: for measurements, beside other engines too.
//!
//! Never here: sense. Matrices are small random numbers in bfloat16, norms are ones.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, json};

use crate::config::{Config, Fields};
use crate::error::LoadError;

/// Bytes that a thread writes at a time.
const PIECE_BYTES: usize = 1 << 22;

/// The largest weight.
const LARGEST: f32 = 0.035;

/// A folder that is removed with all that is in it.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // Left behind, it is in the way of nobody.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

impl Folder {
    /// Writes config.json and weights for it, of the families of GPT-2 and Qwen2, into a new folder below `parent`.
    pub(crate) fn write(parent: &Path, name: &str, config: &str) -> Result<Self, LoadError> {
        let folder = Self(parent.join(format!("genmill-{}-{name}", std::process::id())));
        let failed = |source| LoadError::Read { path: folder.0.clone(), source };
        std::fs::create_dir_all(&folder.0).map_err(failed)?;
        std::fs::write(folder.0.join("config.json"), config).map_err(failed)?;
        let value = serde_json::from_str(config).map_err(|error| failed(error.into()))?;
        let read = Config::of(&Fields::of(&folder.0.join("config.json"), &value), None)?;
        write(&folder.0.join("model.safetensors"), &tensors(&read)).map_err(failed)?;
        Ok(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

/// A tensor's name and sizes.
type Shaped<N> = (N, Vec<usize>);

fn tensors(config: &Config) -> Vec<Shaped<String>> {
    let Config { vocabulary, hidden, inner, context, .. } = *config;
    let keys = config.kv_heads * config.head_dim;
    let (parts, ends): (Vec<Shaped<&str>>, Vec<Shaped<&str>>) = match config.architecture.layer {
        "h" => (
            vec![
                ("ln_1.weight", vec![hidden]),
                ("ln_1.bias", vec![hidden]),
                ("attn.c_attn.weight", vec![hidden, 3 * hidden]),
                ("attn.c_attn.bias", vec![3 * hidden]),
                ("attn.c_proj.weight", vec![hidden, hidden]),
                ("attn.c_proj.bias", vec![hidden]),
                ("ln_2.weight", vec![hidden]),
                ("ln_2.bias", vec![hidden]),
                ("mlp.c_fc.weight", vec![hidden, inner]),
                ("mlp.c_fc.bias", vec![inner]),
                ("mlp.c_proj.weight", vec![inner, hidden]),
                ("mlp.c_proj.bias", vec![hidden]),
            ],
            vec![
                ("wte.weight", vec![vocabulary, hidden]),
                ("wpe.weight", vec![context, hidden]),
                ("ln_f.weight", vec![hidden]),
                ("ln_f.bias", vec![hidden]),
            ],
        ),
        _ => (
            vec![
                ("input_layernorm.weight", vec![hidden]),
                ("self_attn.q_proj.weight", vec![hidden, hidden]),
                ("self_attn.q_proj.bias", vec![hidden]),
                ("self_attn.k_proj.weight", vec![keys, hidden]),
                ("self_attn.k_proj.bias", vec![keys]),
                ("self_attn.v_proj.weight", vec![keys, hidden]),
                ("self_attn.v_proj.bias", vec![keys]),
                ("self_attn.o_proj.weight", vec![hidden, hidden]),
                ("post_attention_layernorm.weight", vec![hidden]),
                ("mlp.gate_proj.weight", vec![inner, hidden]),
                ("mlp.up_proj.weight", vec![inner, hidden]),
                ("mlp.down_proj.weight", vec![hidden, inner]),
            ],
            vec![
                ("model.embed_tokens.weight", vec![vocabulary, hidden]),
                ("model.norm.weight", vec![hidden]),
                ("lm_head.weight", vec![vocabulary, hidden]),
            ],
        ),
    };
    let stem = if config.architecture.layer == "h" { "h" } else { "model.layers" };
    let layers = (0..config.layers)
        .flat_map(|layer| parts.iter().map(move |(name, shape)| (format!("{stem}.{layer}.{name}"), shape.clone())));
    let ends = ends.iter().filter(|(name, _)| !(config.tied && *name == "lm_head.weight"));
    ends.map(|(name, shape)| ((*name).to_owned(), shape.clone())).chain(layers).collect()
}

fn write(path: &Path, tensors: &[Shaped<String>]) -> io::Result<()> {
    let mut header = Map::new();
    // Without this transformers reads no file.
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let (mut end, mut places) = (0, Vec::new());
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
        // What is added to the random numbers.
        places.push((start..end, if name.contains("norm.weight") || is_norm_of_gpt2(name) { 1.0 } else { 0.0 }));
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let file = File::create(path)?;
    file.write_all_at(&(text.len() as u64).to_le_bytes(), 0)?;
    file.write_all_at(&text, 8)?;
    let first = 8 + text.len();
    let pieces: Vec<_> = places
        .into_iter()
        .flat_map(|(place, middle)| {
            place.clone().step_by(PIECE_BYTES).map(move |start| (start..place.end.min(start + PIECE_BYTES), middle))
        })
        .collect();
    pieces.into_par_iter().try_for_each(|(piece, middle)| {
        let numbers = piece.clone().step_by(2).flat_map(|at| number(at as u64, middle).to_le_bytes());
        file.write_all_at(&numbers.collect::<Vec<_>>(), (first + piece.start) as u64)
    })
}

fn is_norm_of_gpt2(name: &str) -> bool {
    name.contains("ln_") && name.ends_with(".weight")
}

/// A number near the middle.
fn number(place: u64, middle: f32) -> u16 {
    // SplitMix64 (Steele, Lea and Flood 2014).
    let mut word = place.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    let [low, high, ..] = (word ^ word >> 31).to_le_bytes();
    let share = f32::from(i16::from_le_bytes([low, high])) / 32768.0;
    half::bf16::from_f32(middle + share * LARGEST).to_bits()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::decoder::{Decoder, Forward as _, Room};
    use crate::weights::Weights;

    pub(crate) const QWEN2: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "vocab_size": 512, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": false}"#;

    pub(crate) const GPT2: &str = r#"{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_head": 4,
        "n_layer": 2, "n_positions": 512, "vocab_size": 512, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": true}"#;

    #[test]
    fn a_folder_is_a_model_and_goes_away() {
        let parent = tempfile::tempdir().unwrap();
        for (name, config) in [("qwen2", QWEN2), ("gpt2", GPT2)] {
            let folder = Folder::write(parent.path(), name, config).unwrap();
            let config = Config::read(folder.path()).unwrap();
            let decoder = Decoder::load(Cpu::new(1).unwrap(), config, &mut Weights::open(folder.path()).unwrap());
            let mut decoder = decoder.unwrap();
            decoder.reserve(Room { rows: 8, outputs: 1, blocks: 4, tokens: 64 });
            let mut batch = crate::backend::Batch::default();
            batch.push(&[1, 2, 3], 0, 3, &[0]);
            batch.want_logits();
            let logits = decoder.forward(&batch);
            let [least, most] = [f32::min, f32::max].map(|of| logits.iter().copied().reduce(of).unwrap());
            assert!(least < -0.05 && most > 0.05 && most < 10.0, "{name}: {least} {most}");
            let path = folder.path().to_owned();
            drop(folder);
            assert!(!path.exists());
        }
    }
}
