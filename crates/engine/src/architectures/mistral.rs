//! Mistral and Mixtral.

use super::llama::{LLAMA, ROTATION};
use super::{
    Architecture, Bias, Experts, Inner, Key, Keys, KvHeads, Normalised, Part, Position, Rotation, SparseLayers,
    Windowed, Windows,
};

const INNER: Key = Key { names: &["intermediate_size"], default: 14_336 };

/// Mistral: Llama with a window.
pub(super) const MISTRAL: Architecture = Architecture {
    name: "MistralForCausalLM",
    model_type: "mistral",
    qkv: Part { bias: Bias::No, ..LLAMA.qkv },
    attention_out: Part { bias: Bias::No, ..LLAMA.attention_out },
    mlp_in: Part { bias: Bias::No, ..LLAMA.mlp_in },
    mlp_out: Part { bias: Bias::No, ..LLAMA.mlp_out },
    windows: Windows { switch: None, tokens: Some(4096), layers: Windowed::All },
    keys: Keys {
        kv_heads: KvHeads::Field(Some(8)),
        inner: Inner::Of(INNER),
        context: Key { names: &["max_position_embeddings"], default: 131_072 },
        ..LLAMA.keys
    },
    ..LLAMA
};

/// Mixtral: Mistral with experts.
pub(super) const MIXTRAL: Architecture = Architecture {
    name: "MixtralForCausalLM",
    model_type: "mixtral",
    experts: Some(Experts {
        router: Part { names: &["block_sparse_moe.gate"], bias: Bias::No },
        list: "block_sparse_moe.experts",
        mlp_in: Part { names: &["w1", "w3"], bias: Bias::No },
        mlp_out: Part { names: &["w2"], bias: Bias::No },
        count: Key { names: &["num_local_experts", "num_experts"], default: 8 },
        chosen: Key { names: &["num_experts_per_tok"], default: 2 },
        inner: Inner::Of(INNER),
        normalised: Normalised::Always,
        layers: SparseLayers::All,
    }),
    position: Position::Rope(Rotation { theta: 1_000_000.0, ..ROTATION }),
    windows: Windows { tokens: None, ..MISTRAL.windows },
    keys: Keys { norm_epsilon: ("rms_norm_eps", 1e-5), ..MISTRAL.keys },
    ..MISTRAL
};
