//! config.json and its companions, read once into plain numbers; both spellings, old and new.
//!
//! Never here: weights. A field that would change the arithmetic and is not supported is an error
//! that names it, never a silent difference.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::architectures::{self, ARCHITECTURES, Architecture, Inner, Key, Mlp, Position};
use crate::error::LoadError;

/// The activations by the names that checkpoints use.
pub const ACTIVATIONS: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu", Activation::GeluErf),
    ("relu", Activation::Relu),
];

/// What stands between the two projections of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    GeluTanh,
    /// GELU with the error function.
    GeluErf,
    /// `max(x, 0)`.
    Relu,
}

/// The shape of a decoder and its constants.
#[derive(Clone, Debug)]
pub struct Config {
    /// The family's row.
    pub architecture: &'static Architecture,
    /// Tokens with a logit.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width inside the feed-forward part.
    pub inner: usize,
    /// Longest sequence in tokens.
    pub context: usize,
    /// The small number in norms.
    pub norm_epsilon: f32,
    /// The activation of the feed-forward part.
    pub activation: Activation,
    /// Whether the logits use the embedding's weights.
    pub tied: bool,
    /// The rotation, where positions are rotated in.
    pub rope: Option<Rope>,
    /// Whether attention scores are divided by the square root of the head's width.
    pub scale_by_width: bool,
    /// Whether layer `i` divides its scores by `i + 1` as well.
    pub scale_by_layer: bool,
    /// Tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// The token that may stand for an empty prompt.
    pub begin_token: Option<u32>,
    /// The type of the weights as config.json states it, for the reader only.
    pub dtype: Option<String>,
}

/// The rotation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    /// Positions are divided by this (1 without scaling).
    pub factor: f64,
}

impl Config {
    /// Reads config.json and, where it exists, generation_config.json of a model folder.
    ///
    /// # Errors
    /// A missing or malformed file, an unknown architecture, or a field whose value is wrong or
    /// not supported, each named.
    pub fn read(folder: &Path) -> Result<Self, LoadError> {
        let fields = Fields::read(folder.join("config.json"))?;
        let generation = match folder.join("generation_config.json") {
            path if path.exists() => Some(Fields::read(path)?),
            _ => None,
        };
        let architecture = architecture(&fields)?;
        refuse(&fields, architecture)?;
        let mut config = shape(&fields, architecture)?;
        config.end_tokens = end_tokens(&fields, generation.as_ref(), architecture)?;
        config.begin_token = begin_token(&fields, generation.as_ref());
        Ok(config)
    }

    /// What the attention scores of a layer are multiplied with.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "head widths and layer numbers are small")]
    pub fn score_scale(&self, layer: usize) -> f32 {
        let width = if self.scale_by_width { (self.head_dim as f32).sqrt() } else { 1.0 };
        let depth = if self.scale_by_layer { (layer + 1) as f32 } else { 1.0 };
        1.0 / (width * depth)
    }

    /// Width of the fused queries, keys and values.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Width of what goes into the activation.
    #[must_use]
    pub fn mlp_in_width(&self) -> usize {
        match self.architecture.mlp {
            Mlp::Gated => 2 * self.inner,
            Mlp::Plain => self.inner,
        }
    }
}

/// A JSON object with the file it came from, so that every complaint names both.
pub(crate) struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    pub(crate) fn read(path: PathBuf) -> Result<Self, LoadError> {
        let bytes = std::fs::read(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
        match serde_json::from_slice(&bytes) {
            Ok(map) => Ok(Self { path, map }),
            Err(source) => Err(LoadError::Json { path, source }),
        }
    }

    /// The value of a field; null counts as absent, as in transformers.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn wrong(&self, field: &str, reason: impl Into<String>) -> LoadError {
        LoadError::Field { path: self.path.clone(), field: field.to_owned(), reason: reason.into() }
    }

    fn size(&self, key: &Key) -> Result<usize, LoadError> {
        for name in key.names {
            if let Some(value) = self.get(name) {
                return self.positive(name, value);
            }
        }
        Ok(key.default)
    }

    fn positive(&self, name: &str, value: &Value) -> Result<usize, LoadError> {
        /// Larger numbers of anything are a broken file, and their products would overflow.
        const LARGEST: usize = 1 << 28;
        value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| (1..=LARGEST).contains(number))
            .ok_or_else(|| self.wrong(name, format!("is {value}, not a whole number of at least 1")))
    }

    fn number(&self, name: &str, default: f64) -> Result<f64, LoadError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number > 0.0)
            .ok_or_else(|| self.wrong(name, format!("is {value}, not a positive number")))
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, LoadError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(name, format!("is {value}, not true or false")))
    }

    fn text<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str, LoadError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_str().ok_or_else(|| self.wrong(name, format!("is {value}, not a string")))
    }
}

fn architecture(fields: &Fields) -> Result<&'static Architecture, LoadError> {
    let class = fields.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let Some(found) = class.or_else(|| fields.get("model_type").and_then(Value::as_str)) else {
        let known = architectures::names();
        return Err(fields.wrong("architectures", format!("names no class; known are: {known}")));
    };
    let unknown = || LoadError::UnknownArchitecture {
        path: fields.path.clone(),
        found: found.to_owned(),
        known: architectures::names(),
    };
    let by_type = || ARCHITECTURES.iter().find(|row| class.is_none() && row.model_type == found);
    architectures::find(found).or_else(by_type).ok_or_else(unknown)
}

fn refuse(fields: &Fields, architecture: &Architecture) -> Result<(), LoadError> {
    for (field, value) in architecture.refused {
        if fields.flag(field, !value)? == *value {
            return Err(fields.wrong(field, format!("is {value}, which is not supported")));
        }
    }
    if fields.get("quantization_config").is_some() {
        return Err(fields.wrong(
            "quantization_config",
            "is set; quantised safetensors are not \
            supported, use the float16, bfloat16 or float32 checkpoint",
        ));
    }
    let windowed = fields
        .get("layer_types")
        .and_then(Value::as_array)
        .and_then(|kinds| kinds.iter().find(|kind| kind.as_str() != Some("full_attention")));
    match windowed {
        Some(kind) => Err(fields.wrong("layer_types", format!("has {kind}, which is not supported"))),
        None => Ok(()),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "norm constants are kept in float32")]
fn shape(fields: &Fields, architecture: &'static Architecture) -> Result<Config, LoadError> {
    let keys = &architecture.keys;
    let hidden = fields.size(&keys.hidden)?;
    let heads = fields.size(&keys.heads)?;
    Ok(Config {
        architecture,
        vocabulary: fields.size(&keys.vocabulary)?,
        hidden,
        layers: fields.size(&keys.layers)?,
        heads,
        kv_heads: kv_heads(fields, keys.kv_heads.as_ref(), heads)?,
        head_dim: head_dim(fields, architecture, hidden, heads)?,
        inner: inner(fields, &keys.inner, hidden)?,
        context: fields.size(&keys.context)?,
        norm_epsilon: fields.number(keys.norm_epsilon.0, keys.norm_epsilon.1)? as f32,
        activation: activation(fields, keys.activation)?,
        tied: fields.flag("tie_word_embeddings", architecture.tied)?,
        rope: rope(fields, architecture)?,
        scale_by_width: fields.flag("scale_attn_weights", true)?,
        scale_by_layer: fields.flag("scale_attn_by_inverse_layer_idx", false)?,
        end_tokens: Vec::new(),
        begin_token: None,
        dtype: ["dtype", "torch_dtype"]
            .iter()
            .find_map(|name| fields.get(name))
            .and_then(Value::as_str)
            .map(str::to_owned),
    })
}

fn kv_heads(fields: &Fields, key: Option<&Key>, heads: usize) -> Result<usize, LoadError> {
    let Some(key) = key else { return Ok(heads) };
    let name = key.names[0];
    // Null means "as many as query heads", absent means the default of transformers.
    let kv_heads = match fields.map.get(name) {
        Some(Value::Null) => heads,
        _ => fields.size(key)?,
    };
    if heads.is_multiple_of(kv_heads) {
        Ok(kv_heads)
    } else {
        Err(fields.wrong(name, format!("is {kv_heads}, which does not divide {heads} heads")))
    }
}

fn head_dim(fields: &Fields, architecture: &Architecture, hidden: usize, heads: usize) -> Result<usize, LoadError> {
    let rotates = architecture.position == Position::Rope;
    let width = match fields.get("head_dim").filter(|_| rotates) {
        Some(value) => fields.positive("head_dim", value)?,
        None if hidden.is_multiple_of(heads) || rotates => hidden / heads,
        None => 0,
    };
    if width == 0 {
        let name = architecture.keys.heads.names[0];
        return Err(fields.wrong(name, format!("is {heads}, which does not divide {hidden}")));
    }
    if rotates && !width.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", format!("is {width}; a rotation needs an even width")));
    }
    Ok(width)
}

fn inner(fields: &Fields, inner: &Inner, hidden: usize) -> Result<usize, LoadError> {
    match inner {
        Inner::Of(key) => fields.size(key),
        Inner::OrTimesHidden(name, times) => match fields.get(name) {
            Some(value) => fields.positive(name, value),
            None => Ok(times * hidden),
        },
    }
}

fn activation(fields: &Fields, (field, default): (&'static str, &'static str)) -> Result<Activation, LoadError> {
    let name = fields.text(field, default)?;
    ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation).ok_or_else(|| {
        let known: Vec<_> = ACTIVATIONS.iter().map(|(known, _)| *known).collect();
        fields.wrong(field, format!("is {name}; supported are: {}", known.join(", ")))
    })
}

/// The rotation: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4).
fn rope(fields: &Fields, architecture: &Architecture) -> Result<Option<Rope>, LoadError> {
    if architecture.position != Position::Rope {
        return Ok(None);
    }
    let theta = fields.number("rope_theta", 10_000.0)?;
    let Some(field) = ["rope_parameters", "rope_scaling"].into_iter().find(|f| fields.get(f).is_some()) else {
        return Ok(Some(Rope { theta, factor: 1.0 }));
    };
    let Some(Value::Object(map)) = fields.get(field) else {
        return Err(fields.wrong(field, "is not an object"));
    };
    let inside = Fields { path: fields.path.clone(), map: map.clone() };
    if map.values().any(Value::is_object) {
        return Err(fields.wrong(field, "differs between layer types, which is not supported"));
    }
    if inside.number("partial_rotary_factor", 1.0)? < 1.0 {
        return Err(fields.wrong(field, "has a partial_rotary_factor, which is not supported"));
    }
    let kind = inside.text("rope_type", inside.text("type", "default")?)?;
    let theta = inside.number("rope_theta", theta)?;
    match kind {
        "default" => Ok(Some(Rope { theta, factor: 1.0 })),
        "linear" => Ok(Some(Rope { theta, factor: inside.number("factor", 1.0)? })),
        _ => Err(fields.wrong(field, format!("has type {kind}; supported are: default, linear"))),
    }
}

/// The end tokens as transformers finds them: generation_config.json, then config.json, then the
/// family's default.
fn end_tokens(
    fields: &Fields,
    generation: Option<&Fields>,
    architecture: &Architecture,
) -> Result<Vec<u32>, LoadError> {
    for source in generation.into_iter().chain([fields]) {
        if let Some(value) = source.get("eos_token_id") {
            return tokens(value)
                .ok_or_else(|| source.wrong("eos_token_id", format!("is {value}, not a token id or a list of them")));
        }
    }
    Ok(architecture.end_token.filter(|_| !fields.map.contains_key("eos_token_id")).into_iter().collect())
}

fn begin_token(fields: &Fields, generation: Option<&Fields>) -> Option<u32> {
    let sources = generation.into_iter().chain([fields]);
    sources.filter_map(|source| source.get("bos_token_id")).find_map(token)
}

fn tokens(value: &Value) -> Option<Vec<u32>> {
    match value.as_array() {
        Some(list) => list.iter().map(token).collect(),
        None => token(value).map(|id| vec![id]),
    }
}

fn token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
