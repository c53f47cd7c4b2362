//! Gemma 1, 2 and 3, the text part of the last also where it lies among the parts for images.

use super::llama::{LLAMA, ROTATION};
use super::{
    Architecture, Bias, Caps, HeadDim, Inner, Key, Keys, KvHeads, Norm, Part, Position, Rotation, Windowed, Windows,
};

/// Gemma: Llama with scaled embeddings and norms stored less 1.
pub(super) const GEMMA: Architecture = Architecture {
    name: "GemmaForCausalLM",
    model_type: "gemma",
    scaled_embedding: true,
    norm: Norm::RmsPlusOne,
    mlp_in: Part { bias: Bias::No, ..LLAMA.mlp_in },
    mlp_out: Part { bias: Bias::No, ..LLAMA.mlp_out },
    tied: true,
    end_token: Some(1),
    keys: Keys {
        vocabulary: Key { names: &["vocab_size"], default: 256_000 },
        hidden: Key { names: &["hidden_size"], default: 3072 },
        layers: Key { names: &["num_hidden_layers"], default: 28 },
        heads: Key { names: &["num_attention_heads"], default: 16 },
        kv_heads: KvHeads::Field(Some(16)),
        head_dim: HeadDim::Field(Some(256)),
        inner: Inner::Of(Key { names: &["intermediate_size"], default: 24_576 }),
        context: Key { names: &["max_position_embeddings"], default: 8192 },
        activation: ("hidden_act", "gelu_pytorch_tanh"),
        // The first releases say "gelu" and mean its approximation.
        activation_means: &[("gelu", "gelu_pytorch_tanh")],
        ..LLAMA.keys
    },
    refused: &[("use_bidirectional_attention", true)],
    ..LLAMA
};

/// Gemma 2: norms also after each part, caps, and a window in every other layer.
pub(super) const GEMMA2: Architecture = Architecture {
    name: "Gemma2ForCausalLM",
    model_type: "gemma2",
    attention_post_norm: Some("post_attention_layernorm"),
    mlp_norm: "pre_feedforward_layernorm",
    mlp_post_norm: Some("post_feedforward_layernorm"),
    windows: Windows { switch: None, tokens: Some(4096), layers: Windowed::AllButEvery(None, 2) },
    caps: Caps::Both(50.0, 30.0),
    keys: Keys {
        hidden: Key { names: &["hidden_size"], default: 2304 },
        layers: Key { names: &["num_hidden_layers"], default: 26 },
        heads: Key { names: &["num_attention_heads"], default: 8 },
        kv_heads: KvHeads::Field(Some(4)),
        score_scale: Some(("query_pre_attn_scalar", 256.0)),
        inner: Inner::Of(Key { names: &["intermediate_size"], default: 9216 }),
        activation: ("hidden_activation", "gelu_pytorch_tanh"),
        activation_means: &[],
        ..GEMMA.keys
    },
    ..GEMMA
};

/// Gemma 3: norms of queries and keys, and another rotation where there is a window.
pub(super) const GEMMA3: Architecture = Architecture {
    name: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    head_norms: Some(["self_attn.q_norm", "self_attn.k_norm"]),
    position: Position::Rope(Rotation {
        theta: 1_000_000.0,
        local: Some(("rope_local_base_freq", 10_000.0)),
        ..ROTATION
    }),
    windows: Windows { layers: Windowed::AllButEvery(Some("sliding_window_pattern"), 6), ..GEMMA2.windows },
    caps: Caps::Logits,
    keys: Keys {
        vocabulary: Key { names: &["vocab_size"], default: 262_208 },
        context: Key { names: &["max_position_embeddings"], default: 131_072 },
        ..GEMMA2.keys
    },
    // transformers reads it and never applies it.
    refused_fields: &["attn_logit_softcapping"],
    ..GEMMA2
};

/// Gemma 3 with parts for images, which are left out.
pub(super) const GEMMA3_NESTED: Architecture = Architecture {
    name: "Gemma3ForConditionalGeneration",
    model_type: "gemma3",
    section: Some("text_config"),
    prefixes: &["model.language_model.", "language_model.model.", "model.", ""],
    heads: &["lm_head.weight", "language_model.lm_head.weight"],
    ..GEMMA3
};
