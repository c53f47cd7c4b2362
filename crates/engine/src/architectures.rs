//! The families of decoders, one row each: everything in which they differ is data here.
//!
//! Never here: arithmetic. A new family of the same general decoder is a new row; if a family
//! needs more than a row, the decoder lacks a general feature. Defaults are those of transformers.

mod gemma;
mod gpt2;
mod llama;
mod mistral;
mod phi;
mod qwen;

/// The table of families, looked up by the first name in `architectures` of config.json.
pub const ARCHITECTURES: &[Architecture] = &[
    qwen::QWEN2,
    gpt2::GPT2,
    llama::LLAMA,
    mistral::MISTRAL,
    mistral::MIXTRAL,
    qwen::QWEN3,
    qwen::QWEN3_MOE,
    gemma::GEMMA,
    gemma::GEMMA2,
    gemma::GEMMA3,
    gemma::GEMMA3_NESTED,
    phi::PHI3,
];

/// One family of decoders.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// The class name in `architectures` of config.json.
    pub name: &'static str,
    /// The `model_type` of config.json, which decides where `architectures` is absent.
    pub model_type: &'static str,
    /// Where the numbers stand in config.json when they are an object inside of it.
    pub section: Option<&'static str>,
    /// Whether the tokenizer may lie as vocab.json and merges.txt.
    pub tokenizer_in_pairs: bool,
    /// What may stand before every weight name; the first under which the embedding is found holds.
    pub prefixes: &'static [&'static str],
    /// The token embedding.
    pub embedding: &'static str,
    /// Whether embeddings are multiplied with the square root of their width.
    pub scaled_embedding: bool,
    /// The projection to logits, where it is not the embedding; the first that is found holds.
    pub heads: &'static [&'static str],
    /// The list of layers: weights are called `{prefix}{layer}.{index}.{part}`.
    pub layer: &'static str,
    /// The kind of all norms.
    pub norm: Norm,
    /// The norm before attention.
    pub attention_norm: &'static str,
    /// Queries, keys and values, fused in this order.
    pub qkv: Part,
    /// The norms of each query head and each key head, where there are some.
    pub head_norms: Option<[&'static str; 2]>,
    /// The projection of the attended values.
    pub attention_out: Part,
    /// The norm of what attention adds, where there is one.
    pub attention_post_norm: Option<&'static str>,
    /// The norm before the feed-forward part.
    pub mlp_norm: &'static str,
    /// Gate and up, fused in this order, or the one inner projection.
    pub mlp_in: Part,
    /// The projection back to the hidden width.
    pub mlp_out: Part,
    /// The norm of what the feed-forward part adds, where there is one.
    pub mlp_post_norm: Option<&'static str>,
    /// What stands in its place in sparse layers.
    pub experts: Option<Experts>,
    /// The norm after the last layer.
    pub final_norm: &'static str,
    /// How the projections are stored.
    pub orientation: Orientation,
    /// How positions get in.
    pub position: Position,
    /// Which layers see only so many tokens back.
    pub windows: Windows,
    /// What scores and logits pass through.
    pub caps: Caps,
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
    /// Fields of config.json that change the arithmetic in a way not built: refused when they stand there.
    pub refused_fields: &'static [&'static str],
}

/// One projection, stored whole or in parts that are joined along the outputs.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The parts in order, without `.weight` and `.bias`.
    pub names: &'static [&'static str],
    /// Whether each part has a bias.
    pub bias: Bias,
}

/// Whether a projection has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// Never.
    No,
    /// Always.
    Yes,
    /// When this switch of config.json is true.
    If(&'static str),
}

/// A feed-forward part of which each token uses a few of many (Shazeer et al. 2017,
/// arXiv:1701.06538). Weights are called `{list}.{index}.{part}`.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    /// The projection to one score for each expert, without `.weight`.
    pub router: Part,
    /// The list of experts.
    pub list: &'static str,
    /// As in [`Architecture::mlp_in`].
    pub mlp_in: Part,
    /// As in [`Architecture::mlp_out`].
    pub mlp_out: Part,
    /// How many there are.
    pub count: Key,
    /// How many a token uses.
    pub chosen: Key,
    /// Width inside each.
    pub inner: Inner,
    /// Whether the weights of the chosen are made to sum to 1.
    pub normalised: Normalised,
    /// Which layers are sparse.
    pub layers: SparseLayers,
}

/// Whether the weights of the chosen experts are made to sum to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalised {
    /// Always.
    Always,
    /// When this switch of config.json is true; absent means false.
    If(&'static str),
}

/// Which layers have experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SparseLayers {
    /// All.
    All,
    /// Every so-many-th, the first name (absent: 1), but for those in the list of the second name.
    EveryBut(&'static str, &'static str),
}

/// Which layers see only the last tokens.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// The switch that must be true for any window, where there is one; absent means false.
    pub switch: Option<&'static str>,
    /// What `sliding_window` means when it is absent; null always means none.
    pub tokens: Option<usize>,
    /// Which layers.
    pub layers: Windowed,
}

/// Which layers have the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windowed {
    /// None, and the field is not read.
    Never,
    /// All of them.
    All,
    /// Those that `layer_types` calls so; without it all from the layer of this name and default.
    From(&'static str, usize),
    /// Those that `layer_types` calls so; without it all but every so-many-th, a number that may
    /// stand under the name.
    AllButEvery(Option<&'static str>, usize),
}

/// Whether scores and logits pass through `cap * tanh(x / cap)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Caps {
    /// No.
    None,
    /// The logits, by `final_logit_softcapping`, which has no default.
    Logits,
    /// Both, by `attn_logit_softcapping` and `final_logit_softcapping` with these defaults.
    Both(f64, f64),
}

/// The kind of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Root mean square, weight only (Zhang and Sennrich 2019, arXiv:1910.07467).
    Rms,
    /// The same with weights that are stored less 1.
    RmsPlusOne,
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Position {
    /// Queries and keys are rotated (Su et al. 2021, arXiv:2104.09864), first half with second.
    Rope(Rotation),
    /// A learned row is added to the embedding; the name of the table.
    Learned(&'static str),
}

/// What a family's config.json says of its rotation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotation {
    /// The base of the wavelengths when it is absent.
    pub theta: f64,
    /// The name and default of another base for layers with a window; only the others are scaled.
    pub local: Option<(&'static str, f64)>,
    /// Whether a part of each head may be left as it is (`partial_rotary_factor`).
    pub partial: bool,
    /// What `original_max_position_embeddings` means when it is absent outside of the scaling's own
    /// object.
    pub original_context: Option<usize>,
    /// Other names that the long scaling goes by.
    pub long_names: &'static [&'static str],
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
#[derive(Clone, Copy, Debug)]
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
    pub kv_heads: KvHeads,
    /// Width of a head.
    pub head_dim: HeadDim,
    /// The number whose square root divides the scores, where it is not the width of a head.
    pub score_scale: Option<(&'static str, f64)>,
    /// Width inside the feed-forward part.
    pub inner: Inner,
    /// Longest sequence in tokens.
    pub context: Key,
    /// The small number in norms.
    pub norm_epsilon: (&'static str, f64),
    /// The activation's name.
    pub activation: (&'static str, &'static str),
    /// Names of activations that mean another one in this family.
    pub activation_means: &'static [(&'static str, &'static str)],
}

/// How many key and value heads there are.
#[derive(Clone, Copy, Debug)]
pub enum KvHeads {
    /// As many as query heads.
    All,
    /// `num_key_value_heads`; null means all, absent so many or (without a number) all.
    Field(Option<usize>),
}

/// How wide a head is.
#[derive(Clone, Copy, Debug)]
pub enum HeadDim {
    /// The hidden width divided by the heads.
    Share,
    /// `head_dim`; null means the share, absent so many or (without a number) the share.
    Field(Option<usize>),
}

/// A whole number of config.json.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The spellings, the first found holds.
    pub names: &'static [&'static str],
    /// The value when it is absent.
    pub default: usize,
}

/// Where the inner width stands.
#[derive(Clone, Copy, Debug)]
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
