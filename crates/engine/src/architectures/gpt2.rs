//! GPT-2, DialoGPT and distilgpt2.

use super::llama::{LLAMA, NO_WINDOWS};
use super::{Architecture, Bias, HeadDim, Inner, Key, Keys, KvHeads, Mlp, Norm, Orientation, Part, Position};

/// GPT-2.
pub(super) const GPT2: Architecture = Architecture {
    name: "GPT2LMHeadModel",
    model_type: "gpt2",
    tokenizer_in_pairs: true,
    prefixes: &["transformer.", ""],
    embedding: "wte.weight",
    layer: "h",
    norm: Norm::Layer,
    attention_norm: "ln_1",
    qkv: Part { names: &["attn.c_attn"], bias: Bias::Yes },
    attention_out: Part { names: &["attn.c_proj"], bias: Bias::Yes },
    mlp_norm: "ln_2",
    mlp_in: Part { names: &["mlp.c_fc"], bias: Bias::Yes },
    mlp_out: Part { names: &["mlp.c_proj"], bias: Bias::Yes },
    final_norm: "ln_f",
    orientation: Orientation::InOut,
    position: Position::Learned("wpe.weight"),
    windows: NO_WINDOWS,
    mlp: Mlp::Plain,
    tied: true,
    end_token: Some(50_256),
    keys: Keys {
        vocabulary: Key { names: &["vocab_size"], default: 50_257 },
        hidden: Key { names: &["n_embd", "hidden_size"], default: 768 },
        layers: Key { names: &["n_layer", "num_hidden_layers"], default: 12 },
        heads: Key { names: &["n_head", "num_attention_heads"], default: 12 },
        kv_heads: KvHeads::All,
        head_dim: HeadDim::Share,
        inner: Inner::OrTimesHidden("n_inner", 4),
        context: Key { names: &["n_positions", "max_position_embeddings"], default: 1024 },
        norm_epsilon: ("layer_norm_epsilon", 1e-5),
        activation: ("activation_function", "gelu_new"),
        ..LLAMA.keys
    },
    // `reorder_and_upcast_attn` only moves a scale factor and matters below float32.
    refused: &[("add_cross_attention", true)],
    ..LLAMA
};
