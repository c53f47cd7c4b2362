//! Phi-3, Phi-3.5 and Phi-4-mini.

use super::llama::ROTATION;
use super::mistral::MISTRAL;
use super::{Architecture, Bias, HeadDim, Inner, Key, Keys, KvHeads, Part, Position, Rotation, Windows};

/// Phi-3: Mistral with joined projections and a rotation that changes for long texts.
pub(super) const PHI3: Architecture = Architecture {
    name: "Phi3ForCausalLM",
    model_type: "phi3",
    qkv: Part { names: &["self_attn.qkv_proj"], bias: Bias::No },
    mlp_in: Part { names: &["mlp.gate_up_proj"], bias: Bias::No },
    position: Position::Rope(Rotation {
        partial: true,
        original_context: Some(4096),
        long_names: &["su", "yarn"],
        ..ROTATION
    }),
    windows: Windows { tokens: None, ..MISTRAL.windows },
    end_token: Some(32_000),
    keys: Keys {
        vocabulary: Key { names: &["vocab_size"], default: 32_064 },
        hidden: Key { names: &["hidden_size"], default: 3072 },
        kv_heads: KvHeads::Field(None),
        head_dim: HeadDim::Field(None),
        inner: Inner::Of(Key { names: &["intermediate_size"], default: 8192 }),
        context: Key { names: &["max_position_embeddings"], default: 4096 },
        norm_epsilon: ("rms_norm_eps", 1e-5),
        ..MISTRAL.keys
    },
    refused: &[("attention_bias", true), ("mlp_bias", true), ("lm_head_bias", true)],
    ..MISTRAL
};
