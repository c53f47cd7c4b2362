//! The families of decoders, one row each: everything in which they differ is data here.
//!
//! Never here: arithmetic. A new family of the same general decoder is a new row; if a family
//! needs more than a row, the decoder lacks a general feature.

use Orientation::{InOut, OutIn};

/// The table of families, looked up by the first name in `architectures` of config.json.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "Qwen2ForCausalLM",
        model_type: "qwen2",
        prefixes: &["model.", ""],
        embedding: "embed_tokens.weight",
        layer: "layers",
        norm: Norm::Rms,
        attention_norm: "input_layernorm",
        qkv: Part { names: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], bias: true },
        attention_out: Part { names: &["self_attn.o_proj"], bias: false },
        mlp_norm: "post_attention_layernorm",
        mlp_in: Part { names: &["mlp.gate_proj", "mlp.up_proj"], bias: false },
        mlp_out: Part { names: &["mlp.down_proj"], bias: false },
        final_norm: "norm",
        orientation: OutIn,
        position: Position::Rope,
        mlp: Mlp::Gated,
        tied: false,
        end_token: None,
        keys: Keys {
            vocabulary: Key { names: &["vocab_size"], default: 151_936 },
            hidden: Key { names: &["hidden_size"], default: 4096 },
            layers: Key { names: &["num_hidden_layers"], default: 32 },
            heads: Key { names: &["num_attention_heads"], default: 32 },
            kv_heads: Some(Key { names: &["num_key_value_heads"], default: 32 }),
            inner: Inner::Of(Key { names: &["intermediate_size"], default: 22_016 }),
            context: Key { names: &["max_position_embeddings"], default: 32_768 },
            norm_epsilon: ("rms_norm_eps", 1e-6),
            activation: ("hidden_act", "silu"),
        },
        refused: &[("use_sliding_window", true)],
    },
    Architecture {
        name: "GPT2LMHeadModel",
        model_type: "gpt2",
        prefixes: &["transformer.", ""],
        embedding: "wte.weight",
        layer: "h",
        norm: Norm::Layer,
        attention_norm: "ln_1",
        qkv: Part { names: &["attn.c_attn"], bias: true },
        attention_out: Part { names: &["attn.c_proj"], bias: true },
        mlp_norm: "ln_2",
        mlp_in: Part { names: &["mlp.c_fc"], bias: true },
        mlp_out: Part { names: &["mlp.c_proj"], bias: true },
        final_norm: "ln_f",
        orientation: InOut,
        position: Position::Learned("wpe.weight"),
        mlp: Mlp::Plain,
        tied: true,
        end_token: Some(50_256),
        keys: Keys {
            vocabulary: Key { names: &["vocab_size"], default: 50_257 },
            hidden: Key { names: &["n_embd", "hidden_size"], default: 768 },
            layers: Key { names: &["n_layer", "num_hidden_layers"], default: 12 },
            heads: Key { names: &["n_head", "num_attention_heads"], default: 12 },
            kv_heads: None,
            inner: Inner::OrTimesHidden("n_inner", 4),
            context: Key { names: &["n_positions", "max_position_embeddings"], default: 1024 },
            norm_epsilon: ("layer_norm_epsilon", 1e-5),
            activation: ("activation_function", "gelu_new"),
        },
        // `reorder_and_upcast_attn` only moves a scale factor and matters below float32.
        refused: &[("add_cross_attention", true)],
    },
];

/// One family of decoders.
#[derive(Debug)]
pub struct Architecture {
    /// The class name in `architectures` of config.json.
    pub name: &'static str,
    /// The `model_type` of config.json, which decides where `architectures` is absent.
    pub model_type: &'static str,
    /// What may stand before every weight name; the first under which the embedding is found holds.
    pub prefixes: &'static [&'static str],
    /// The token embedding.
    pub embedding: &'static str,
    /// The list of layers: weights are called `{prefix}{layer}.{index}.{part}`.
    pub layer: &'static str,
    /// The kind of all norms.
    pub norm: Norm,
    /// The norm before attention.
    pub attention_norm: &'static str,
    /// Queries, keys and values, fused in this order.
    pub qkv: Part,
    /// The projection of the attended values.
    pub attention_out: Part,
    /// The norm before the feed-forward part.
    pub mlp_norm: &'static str,
    /// Gate and up, fused in this order, or the one inner projection.
    pub mlp_in: Part,
    /// The projection back to the hidden width.
    pub mlp_out: Part,
    /// The norm after the last layer.
    pub final_norm: &'static str,
    /// How the projections are stored.
    pub orientation: Orientation,
    /// How positions get in.
    pub position: Position,
    /// The form of the feed-forward part.
    pub mlp: Mlp,
    /// What `tie_word_embeddings` means when it is absent.
    pub tied: bool,
    /// The end token when no file names one.
    pub end_token: Option<u32>,
    /// The names of the numbers in config.json.
    pub keys: Keys,
    /// Switches of config.json that change the arithmetic in a way not built: refused when so set.
    pub refused: &'static [(&'static str, bool)],
}

/// One projection, stored whole or in parts that are joined along the outputs.
#[derive(Debug)]
pub struct Part {
    /// The parts in order, without `.weight` and `.bias`.
    pub names: &'static [&'static str],
    /// Whether each part has a bias.
    pub bias: bool,
}

/// The kind of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Root mean square, weight only (Zhang and Sennrich 2019, arXiv:1910.07467).
    Rms,
    /// Mean and variance, weight and bias (Ba et al. 2016, arXiv:1607.06450).
    Layer,
}

/// How a projection lies in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// Rows are outputs, as `torch.nn.Linear` has it.
    OutIn,
    /// Rows are inputs, as GPT-2's `Conv1D` has it.
    InOut,
}

/// How positions get into the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Queries and keys are rotated (Su et al. 2021, arXiv:2104.09864), first half with second.
    Rope,
    /// A learned row is added to the embedding; the name of the table.
    Learned(&'static str),
}

/// The form of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// `out(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202).
    Gated,
    /// `out(act(in(x)))`.
    Plain,
}

/// The names of the numbers in config.json, with the defaults of transformers.
#[derive(Debug)]
pub struct Keys {
    /// Tokens with a logit.
    pub vocabulary: Key,
    /// Width of the residual stream.
    pub hidden: Key,
    /// Number of layers.
    pub layers: Key,
    /// Query heads.
    pub heads: Key,
    /// Key and value heads, where they may be fewer.
    pub kv_heads: Option<Key>,
    /// Width inside the feed-forward part.
    pub inner: Inner,
    /// Longest sequence in tokens.
    pub context: Key,
    /// The small number in norms.
    pub norm_epsilon: (&'static str, f64),
    /// The activation's name.
    pub activation: (&'static str, &'static str),
}

/// A whole number of config.json.
#[derive(Debug)]
pub struct Key {
    /// The spellings, the first found holds.
    pub names: &'static [&'static str],
    /// The value when it is absent.
    pub default: usize,
}

/// Where the inner width stands.
#[derive(Debug)]
pub enum Inner {
    /// A number of its own.
    Of(Key),
    /// A number that may be null or absent, which means so many times the hidden width.
    OrTimesHidden(&'static str, usize),
}

/// The row of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|row| row.name == name)
}

/// All names, for messages.
#[must_use]
pub fn names() -> String {
    ARCHITECTURES.iter().map(|row| row.name).collect::<Vec<_>>().join(", ")
}
