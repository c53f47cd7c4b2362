//! Models with random weights in the shapes of real ones, as a folder or as a GGUF file. Made once, kept under `target`.
//!
//! Never here: a model that says anything. Each tensor's numbers follow from its place, so all files of a shape have the
//! same weights.

use anyhow::Context as _;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use serde_json::{Value as Json, json};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// The sizes of a model of the Qwen2 family, whose embedding is also its projection to logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
}

/// Those of Qwen2-0.5B, of which k-quants cannot have most matrices, and those of Qwen1.5-0.5B, of which they can.
pub(crate) const SHAPES: [Shape; 2] = [
    Shape { name: "hidden-896", hidden: 896, inner: 4864, layers: 24, heads: 14, kv_heads: 2 },
    Shape { name: "hidden-1024", hidden: 1024, inner: 2816, layers: 24, heads: 16, kv_heads: 16 },
];

const VOCABULARY: usize = 151_936;
const CONTEXT: u32 = 4096;
const EPSILON: f32 = 1e-6;
const THETA: f32 = 1e6;
const END: &str = "<|end|>";

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A folder with safetensors in float32.
    F32,
    /// A GGUF file.
    Q8,
    /// A GGUF file; matrices whose width is no multiple of 256 are q5_0, as llama.cpp has them.
    Q4K,
}

impl Kind {
    pub(crate) const ALL: &[Self] = &[Self::F32, Self::Q8, Self::Q4K];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Q8 => "q8_0",
            Self::Q4K => "q4_k",
        }
    }

    fn of(self, tensor: &Tensor) -> anyhow::Result<GgmlDType> {
        Ok(match (self, tensor.dims()) {
            (Self::F32, _) | (_, [_]) => GgmlDType::F32,
            (Self::Q8, _) => GgmlDType::Q8_0,
            (Self::Q4K, [.., width]) if width.is_multiple_of(256) => GgmlDType::Q4K,
            (Self::Q4K, _) => GgmlDType::Q5_0,
        })
    }
}

/// The parts of a layer: their names in a folder and in a GGUF file, outputs and inputs (0: a vector).
fn parts(shape: Shape) -> [(&'static str, &'static str, usize, usize); 12] {
    let Shape { hidden, inner, heads, kv_heads, .. } = shape;
    let keys = hidden / heads * kv_heads;
    [
        ("input_layernorm.weight", "attn_norm.weight", hidden, 0),
        ("self_attn.q_proj.weight", "attn_q.weight", hidden, hidden),
        ("self_attn.q_proj.bias", "attn_q.bias", hidden, 0),
        ("self_attn.k_proj.weight", "attn_k.weight", keys, hidden),
        ("self_attn.k_proj.bias", "attn_k.bias", keys, 0),
        ("self_attn.v_proj.weight", "attn_v.weight", keys, hidden),
        ("self_attn.v_proj.bias", "attn_v.bias", keys, 0),
        ("self_attn.o_proj.weight", "attn_output.weight", hidden, hidden),
        ("post_attention_layernorm.weight", "ffn_norm.weight", hidden, 0),
        ("mlp.gate_proj.weight", "ffn_gate.weight", inner, hidden),
        ("mlp.up_proj.weight", "ffn_up.weight", inner, hidden),
        ("mlp.down_proj.weight", "ffn_down.weight", hidden, inner),
    ]
}

/// All tensors: their names in a folder and in a GGUF file, outputs and inputs.
fn tensors(shape: Shape) -> Vec<(String, String, usize, usize)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), "token_embd.weight".to_owned(), VOCABULARY, shape.hidden),
        ("model.norm.weight".to_owned(), "output_norm.weight".to_owned(), shape.hidden, 0),
    ];
    for layer in 0..shape.layers {
        all.extend(parts(shape).map(|(folder, gguf, outputs, inputs)| {
            (format!("model.layers.{layer}.{folder}"), format!("blk.{layer}.{gguf}"), outputs, inputs)
        }));
    }
    all
}

/// The numbers of the tensor at that place: ones for norms, otherwise even between -0.05 and 0.05.
fn tensor(place: usize, name: &str, outputs: usize, inputs: usize) -> anyhow::Result<Tensor> {
    let count = outputs * inputs.max(1);
    let mut state = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(place as u64 + 1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f32::from((state >> 48) as u16) / 655_360.0 - 0.05
    };
    let values: Vec<f32> = match name.contains("norm") {
        true => vec![1.0; count],
        false => (0..count).map(|_| next()).collect(),
    };
    Ok(match inputs {
        0 => Tensor::from_vec(values, outputs, &Device::Cpu)?,
        _ => Tensor::from_vec(values, (outputs, inputs), &Device::Cpu)?,
    })
}

/// Makes a model at a path.
type Make = fn(&Path, Shape, Kind) -> anyhow::Result<()>;

/// The path of a model, which is made when it is not there yet.
pub(crate) fn make(folder: &Path, shape: Shape, kind: Kind) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let (end, make): (_, Make) = match kind {
        Kind::F32 => ("", make_folder),
        Kind::Q8 | Kind::Q4K => (".gguf", make_gguf),
    };
    let path = folder.join(format!("{}-{}{end}", shape.name, kind.name()));
    if !path.exists() {
        // One that was cut off is not taken for whole.
        let unfinished = folder.join("unfinished");
        drop(fs::remove_dir_all(&unfinished).or_else(|_| fs::remove_file(&unfinished)));
        make(&unfinished, shape, kind).with_context(|| format!("cannot make {}", path.display()))?;
        fs::rename(unfinished, &path)?;
    }
    Ok(path)
}

fn make_folder(path: &Path, shape: Shape, _: Kind) -> anyhow::Result<()> {
    fs::create_dir_all(path)?;
    let mut all = HashMap::new();
    for (place, (name, _, outputs, inputs)) in tensors(shape).into_iter().enumerate() {
        let tensor = tensor(place, &name, outputs, inputs)?;
        all.insert(name, tensor);
    }
    candle_core::safetensors::save(&all, path.join("model.safetensors"))?;
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": EPSILON, "rope_theta": THETA, "tie_word_embeddings": true,
        "torch_dtype": "float32", "eos_token_id": VOCABULARY - 1, "use_sliding_window": false,
    });
    fs::write(path.join("config.json"), config.to_string())?;
    let ids: serde_json::Map<String, Json> =
        words().into_iter().enumerate().map(|(id, word)| (word, id.into())).collect();
    let split = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{
            "id": VOCABULARY - 1, "content": END, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "pre_tokenizer": split, "decoder": split,
        "model": { "type": "BPE", "vocab": ids, "merges": [["a", "b"]] },
    });
    Ok(fs::write(path.join("tokenizer.json"), tokenizer.to_string())?)
}

fn make_gguf(path: &Path, shape: Shape, kind: Kind) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for (place, (_, name, outputs, inputs)) in tensors(shape).into_iter().enumerate() {
        let tensor = tensor(place, &name, outputs, inputs)?;
        let tensor = QTensor::quantize(&tensor, kind.of(&tensor)?)?;
        all.push((name, tensor));
    }
    let number = |number: usize| -> anyhow::Result<Value> { Ok(Value::U32(u32::try_from(number)?)) };
    let text = |text: &str| Value::String(text.to_owned());
    let types = (0..VOCABULARY).map(|id| Value::I32(if id == VOCABULARY - 1 { 3 } else { 1 }));
    let metadata = [
        ("general.architecture", text("qwen2")),
        ("qwen2.context_length", Value::U32(CONTEXT)),
        ("qwen2.embedding_length", number(shape.hidden)?),
        ("qwen2.block_count", number(shape.layers)?),
        ("qwen2.feed_forward_length", number(shape.inner)?),
        ("qwen2.attention.head_count", number(shape.heads)?),
        ("qwen2.attention.head_count_kv", number(shape.kv_heads)?),
        ("qwen2.attention.layer_norm_rms_epsilon", Value::F32(EPSILON)),
        ("qwen2.rope.freq_base", Value::F32(THETA)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.tokens", Value::Array(words().into_iter().map(Value::String).collect())),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        ("tokenizer.ggml.merges", Value::Array(vec![text("a b")])),
        ("tokenizer.ggml.eos_token_id", number(VOCABULARY - 1)?),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = all.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Ok(gguf_file::write(&mut BufWriter::new(File::create(path)?), &metadata, &tensors)?)
}

/// The words of the tokenizer: every byte as byte-level tokenizers spell it, one merge, and numbered ones.
fn words() -> Vec<String> {
    let spells_itself = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut words: Vec<String> =
        (0..=255).filter(|byte| spells_itself(*byte)).filter_map(char::from_u32).map(String::from).collect();
    let others = u32::try_from(256 - words.len()).unwrap_or(0);
    words.extend((0..others).filter_map(|index| char::from_u32(256 + index)).map(String::from));
    words.push("ab".to_owned());
    words.extend((words.len()..VOCABULARY - 1).map(|id| format!("w{id}")));
    words.push(END.to_owned());
    words
}
