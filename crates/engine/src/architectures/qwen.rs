//! Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE.

use super::llama::LLAMA;
use super::{
    Architecture, Bias, Experts, HeadDim, Inner, Key, Keys, KvHeads, Normalised, Part, SparseLayers, Windowed, Windows,
};

/// Qwen2 and Qwen2.5: Llama with biases at queries, keys and values.
pub(super) const QWEN2: Architecture = Architecture {
    name: "Qwen2ForCausalLM",
    model_type: "qwen2",
    qkv: Part { bias: Bias::Yes, ..LLAMA.qkv },
    attention_out: Part { bias: Bias::No, ..LLAMA.attention_out },
    mlp_in: Part { bias: Bias::No, ..LLAMA.mlp_in },
    mlp_out: Part { bias: Bias::No, ..LLAMA.mlp_out },
    windows: Windows {
        switch: Some("use_sliding_window"),
        tokens: Some(4096),
        layers: Windowed::From("max_window_layers", 28),
    },
    end_token: None,
    keys: Keys {
        vocabulary: Key { names: &["vocab_size"], default: 151_936 },
        kv_heads: KvHeads::Field(Some(32)),
        inner: Inner::Of(Key { names: &["intermediate_size"], default: 22_016 }),
        context: Key { names: &["max_position_embeddings"], default: 32_768 },
        ..LLAMA.keys
    },
    ..LLAMA
};

/// Qwen3: the biases are optional, and queries and keys have norms.
pub(super) const QWEN3: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    model_type: "qwen3",
    qkv: LLAMA.qkv,
    attention_out: LLAMA.attention_out,
    head_norms: Some(["self_attn.q_norm", "self_attn.k_norm"]),
    keys: Keys { head_dim: HeadDim::Field(Some(128)), ..QWEN2.keys },
    ..QWEN2
};

/// Qwen3-MoE: Qwen3 with experts in some layers.
pub(super) const QWEN3_MOE: Architecture = Architecture {
    name: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    experts: Some(Experts {
        router: Part { names: &["mlp.gate"], bias: Bias::No },
        list: "mlp.experts",
        mlp_in: Part { names: &["gate_proj", "up_proj"], bias: Bias::No },
        mlp_out: Part { names: &["down_proj"], bias: Bias::No },
        count: Key { names: &["num_experts", "num_local_experts"], default: 128 },
        chosen: Key { names: &["num_experts_per_tok"], default: 8 },
        inner: Inner::Of(Key { names: &["moe_intermediate_size"], default: 768 }),
        normalised: Normalised::If("norm_topk_prob"),
        layers: SparseLayers::EveryBut("decoder_sparse_step", "mlp_only_layers"),
    }),
    windows: Windows { layers: Windowed::All, ..QWEN2.windows },
    keys: Keys {
        hidden: Key { names: &["hidden_size"], default: 2048 },
        layers: Key { names: &["num_hidden_layers"], default: 24 },
        kv_heads: KvHeads::Field(Some(4)),
        head_dim: HeadDim::Field(None),
        inner: Inner::Of(Key { names: &["intermediate_size"], default: 6144 }),
        ..QWEN3.keys
    },
    ..QWEN3
};
