//! Llama 2, Llama 3 and CodeLlama; the row that most others are small changes of.

use super::{
    Architecture, Bias, Caps, HeadDim, Inner, Key, Keys, KvHeads, Mlp, Norm, Orientation, Part, Position, Rotation,
    Windowed, Windows,
};

/// Llama.
pub(super) const LLAMA: Architecture = Architecture {
    name: "LlamaForCausalLM",
    model_type: "llama",
    section: None,
    tokenizer_in_pairs: false,
    prefixes: &["model.", ""],
    embedding: "embed_tokens.weight",
    scaled_embedding: false,
    heads: &["lm_head.weight"],
    layer: "layers",
    norm: Norm::Rms,
    attention_norm: "input_layernorm",
    qkv: Part {
        names: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        bias: Bias::If("attention_bias"),
    },
    head_norms: None,
    attention_out: Part { names: &["self_attn.o_proj"], bias: Bias::If("attention_bias") },
    attention_post_norm: None,
    mlp_norm: "post_attention_layernorm",
    mlp_in: Part { names: &["mlp.gate_proj", "mlp.up_proj"], bias: Bias::If("mlp_bias") },
    mlp_out: Part { names: &["mlp.down_proj"], bias: Bias::If("mlp_bias") },
    mlp_post_norm: None,
    experts: None,
    final_norm: "norm",
    orientation: Orientation::OutIn,
    position: Position::Rope(ROTATION),
    windows: NO_WINDOWS,
    caps: Caps::None,
    mlp: Mlp::Gated,
    tied: false,
    end_token: Some(2),
    keys: Keys {
        vocabulary: Key { names: &["vocab_size"], default: 32_000 },
        hidden: Key { names: &["hidden_size"], default: 4096 },
        layers: Key { names: &["num_hidden_layers"], default: 32 },
        heads: Key { names: &["num_attention_heads"], default: 32 },
        kv_heads: KvHeads::Field(None),
        head_dim: HeadDim::Field(None),
        score_scale: None,
        inner: Inner::Of(Key { names: &["intermediate_size"], default: 11_008 }),
        context: Key { names: &["max_position_embeddings"], default: 2048 },
        norm_epsilon: ("rms_norm_eps", 1e-6),
        activation: ("hidden_act", "silu"),
        activation_means: &[],
    },
    refused: &[],
    refused_fields: &[],
};

/// A rotation of whole heads with one base.
pub(super) const ROTATION: Rotation =
    Rotation { theta: 10_000.0, local: None, partial: false, original_context: None, long_names: &[] };

/// Every layer sees everything.
pub(super) const NO_WINDOWS: Windows = Windows { switch: None, tokens: None, layers: Windowed::Never };
