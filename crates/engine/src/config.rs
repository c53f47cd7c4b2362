//! config.json and its companions, read once into plain numbers; both spellings, old and new.
//!
//! Never here: weights. A field that would change the arithmetic and is not supported is an error
//! that names it, never a silent difference.

pub mod layers;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::architectures::{
    self, ARCHITECTURES, Architecture, Bias, Caps, HeadDim, Inner, Key, KvHeads, Mlp, Part, Position,
};
use crate::config::layers::{Experts, Windows};
use crate::error::LoadError;
use crate::rope::{self, Rope};

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
    /// What embeddings are multiplied with, where they are.
    pub embedding_scale: Option<f32>,
    /// The switches for biases that are on.
    pub biases: Vec<&'static str>,
    /// The rotations, where positions are rotated in: that of all layers, or that of layers without
    /// and that of layers with a window.
    pub ropes: Vec<Rope>,
    /// Which layers see only so many tokens back.
    pub windows: Windows,
    /// The experts, where some layers have them.
    pub experts: Option<Experts>,
    /// What attention scores go through, where they do.
    pub score_cap: Option<f32>,
    /// What logits go through, where they do.
    pub logit_cap: Option<f32>,
    /// What attention scores are divided by the square root of, where they are.
    pub score_divisor: Option<f64>,
    /// Whether layer `i` divides its scores by `i + 1` as well.
    pub scale_by_layer: bool,
    /// Tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// The token that may stand for an empty prompt.
    pub begin_token: Option<u32>,
    /// The type of the weights as config.json states it, in which GPUs compute where that is float16.
    pub dtype: Option<String>,
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
        Self::of(&fields, generation.as_ref())
    }

    /// Reads what stands in these files.
    pub(crate) fn of(fields: &Fields, generation: Option<&Fields>) -> Result<Self, LoadError> {
        let architecture = architecture(fields)?;
        refuse_quantised(fields)?;
        let section = architecture.section.map(|name| fields.section(name)).transpose()?;
        let numbers = section.as_ref().unwrap_or(fields);
        refuse(numbers, architecture)?;
        let mut config = shape(numbers, architecture)?;
        // This one belongs to the whole, as transformers has it.
        config.tied = fields.flag("tie_word_embeddings", architecture.tied)?;
        let sources: Vec<&Fields> = generation.into_iter().chain([fields]).chain(&section).collect();
        config.end_tokens = end_tokens(&sources, architecture)?;
        config.begin_token = sources.iter().filter_map(|source| source.get("bos_token_id")).find_map(token);
        Ok(config)
    }

    /// What the attention scores of a layer are multiplied with.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "such numbers are small")]
    pub fn score_scale(&self, layer: usize) -> f32 {
        let width = self.score_divisor.map_or(1.0, |divisor| (divisor as f32).sqrt());
        let depth = if self.scale_by_layer { (layer + 1) as f32 } else { 1.0 };
        1.0 / (width * depth)
    }

    /// Width of the fused queries, keys and values.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// The parts of what goes into an activation of that width.
    #[must_use]
    pub fn mlp_in(&self, inner: usize) -> Vec<usize> {
        match self.architecture.mlp {
            Mlp::Gated => vec![inner; 2],
            Mlp::Plain => vec![inner],
        }
    }

    /// The experts of a layer, where it has them.
    #[must_use]
    pub fn experts(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.are_in(layer))
    }

    /// Width inside the widest feed-forward part that there is: a width that no layer has may be any number.
    #[must_use]
    pub fn widest_inner(&self) -> usize {
        let inner = |layer| self.experts(layer).map_or(self.inner, |experts| experts.inner);
        (0..self.layers).map(inner).max().unwrap_or_default()
    }

    /// Whether a projection has a bias.
    #[must_use]
    pub fn has_bias(&self, part: &Part) -> bool {
        match part.bias {
            Bias::No => false,
            Bias::Yes => true,
            Bias::If(field) => self.biases.contains(&field),
        }
    }

    /// Which of the rotations a layer has.
    #[must_use]
    pub fn rope(&self, layer: usize) -> usize {
        usize::from(self.ropes.len() > 1 && self.windows.are_in(layer))
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

    /// The object that stands in a field, for complaints of the same file; an absent one is empty.
    pub(crate) fn section(&self, field: &str) -> Result<Self, LoadError> {
        let map = match self.get(field) {
            None => Map::new(),
            Some(Value::Object(map)) => map.clone(),
            Some(_) => return Err(self.wrong(field, "is not an object")),
        };
        Ok(Self { path: self.path.clone(), map })
    }

    /// Whether any field holds an object.
    pub(crate) fn has_object(&self) -> bool {
        self.map.values().any(Value::is_object)
    }

    /// Whether a field stands there, be it null.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// What a file would say that was read in another form.
    pub(crate) fn of(path: &Path, value: &Value) -> Self {
        Self { path: path.to_owned(), map: value.as_object().cloned().unwrap_or_default() }
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

    pub(crate) fn size(&self, key: &Key) -> Result<usize, LoadError> {
        for name in key.names {
            if let Some(value) = self.get(name) {
                return self.positive(name, value);
            }
        }
        Ok(key.default)
    }

    /// A number that null switches off; absent, it has that default.
    pub(crate) fn optional_size(&self, name: &str, default: Option<usize>) -> Result<Option<usize>, LoadError> {
        match self.map.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => self.positive(name, value).map(Some),
        }
    }

    pub(crate) fn optional_number(&self, name: &str, default: Option<f64>) -> Result<Option<f64>, LoadError> {
        match self.map.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.number(name, 0.0).map(Some),
        }
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

    pub(crate) fn number(&self, name: &str, default: f64) -> Result<f64, LoadError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number > 0.0)
            .ok_or_else(|| self.wrong(name, format!("is {value}, not a positive number")))
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, LoadError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(name, format!("is {value}, not true or false")))
    }

    pub(crate) fn text<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str, LoadError> {
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

fn refuse_quantised(fields: &Fields) -> Result<(), LoadError> {
    if fields.get("quantization_config").is_none() {
        return Ok(());
    }
    Err(fields.wrong(
        "quantization_config",
        "is set; quantised safetensors are not supported, use the float16, bfloat16 or float32 checkpoint",
    ))
}

fn refuse(fields: &Fields, architecture: &Architecture) -> Result<(), LoadError> {
    for (field, value) in architecture.refused {
        if fields.flag(field, !value)? == *value {
            return Err(fields.wrong(field, format!("is {value}, which is not supported")));
        }
    }
    match architecture.refused_fields.iter().find_map(|field| Some((field, fields.get(field)?))) {
        Some((field, value)) => Err(fields.wrong(field, format!("is {value}, which is not supported"))),
        None => Ok(()),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "constants are kept in float32")]
fn shape(fields: &Fields, architecture: &'static Architecture) -> Result<Config, LoadError> {
    let keys = &architecture.keys;
    let hidden = fields.size(&keys.hidden)?;
    let layers = fields.size(&keys.layers)?;
    let heads = fields.size(&keys.heads)?;
    let head_dim = head_dim(fields, architecture, hidden, heads)?;
    let inner = inner(fields, &keys.inner, hidden)?;
    let context = fields.size(&keys.context)?;
    let ropes = match architecture.position {
        Position::Rope(rotation) => rope::read(fields, &rotation, (head_dim, context))?,
        Position::Learned(_) => Vec::new(),
    };
    let (score_cap, logit_cap) = caps(fields, architecture.caps)?;
    Ok(Config {
        architecture,
        vocabulary: fields.size(&keys.vocabulary)?,
        hidden,
        layers,
        heads,
        kv_heads: kv_heads(fields, keys.kv_heads, heads)?,
        head_dim,
        inner,
        context: ropes.iter().map(|rope| rope.context(context)).max().unwrap_or(context),
        norm_epsilon: fields.number(keys.norm_epsilon.0, keys.norm_epsilon.1)? as f32,
        activation: activation(fields, architecture)?,
        tied: architecture.tied,
        embedding_scale: architecture.scaled_embedding.then(|| (hidden as f64).sqrt() as f32),
        biases: biases(fields, architecture)?,
        ropes,
        windows: Windows::read(fields, &architecture.windows, layers)?,
        experts: architecture.experts.as_ref().map(|experts| Experts::read(fields, experts, hidden)).transpose()?,
        score_cap,
        logit_cap,
        score_divisor: score_divisor(fields, architecture, head_dim)?,
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

fn kv_heads(fields: &Fields, kv_heads: KvHeads, heads: usize) -> Result<usize, LoadError> {
    const NAME: &str = "num_key_value_heads";
    let KvHeads::Field(default) = kv_heads else { return Ok(heads) };
    let kv_heads = fields.optional_size(NAME, default)?.unwrap_or(heads);
    if heads.is_multiple_of(kv_heads) {
        Ok(kv_heads)
    } else {
        Err(fields.wrong(NAME, format!("is {kv_heads}, which does not divide {heads} heads")))
    }
}

fn head_dim(fields: &Fields, architecture: &Architecture, hidden: usize, heads: usize) -> Result<usize, LoadError> {
    let stated = match architecture.keys.head_dim {
        HeadDim::Share => None,
        HeadDim::Field(default) => fields.optional_size("head_dim", default)?,
    };
    let rotates = matches!(architecture.position, Position::Rope(_));
    let width = match stated {
        Some(width) => width,
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

/// The number whose square root divides the scores.
#[expect(clippy::cast_precision_loss, reason = "head widths are small")]
fn score_divisor(fields: &Fields, architecture: &Architecture, head_dim: usize) -> Result<Option<f64>, LoadError> {
    match architecture.keys.score_scale {
        Some((name, default)) => fields.number(name, default).map(Some),
        None => Ok(fields.flag("scale_attn_weights", true)?.then_some(head_dim as f64)),
    }
}

/// The caps of scores and of logits.
#[expect(clippy::cast_possible_truncation, reason = "caps are kept in float32")]
fn caps(fields: &Fields, caps: Caps) -> Result<(Option<f32>, Option<f32>), LoadError> {
    let number = |name, default| Ok(fields.optional_number(name, default)?.map(|cap| cap as f32));
    match caps {
        Caps::None => Ok((None, None)),
        Caps::Logits => Ok((None, number("final_logit_softcapping", None)?)),
        Caps::Both(scores, logits) => {
            let scores = number("attn_logit_softcapping", Some(scores))?;
            Ok((scores, number("final_logit_softcapping", Some(logits))?))
        }
    }
}

/// The switches for biases that are on.
fn biases(fields: &Fields, row: &Architecture) -> Result<Vec<&'static str>, LoadError> {
    let mut on = Vec::new();
    for part in [row.qkv, row.attention_out, row.mlp_in, row.mlp_out] {
        if let Bias::If(field) = part.bias
            && fields.flag(field, false)?
        {
            on.push(field);
        }
    }
    Ok(on)
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

fn activation(fields: &Fields, architecture: &Architecture) -> Result<Activation, LoadError> {
    let (field, default) = architecture.keys.activation;
    let name = fields.text(field, default)?;
    let means = architecture.keys.activation_means.iter().find(|(from, _)| *from == name).map_or(name, |(_, to)| to);
    ACTIVATIONS.iter().find(|(known, _)| *known == means).map(|(_, activation)| *activation).ok_or_else(|| {
        let known: Vec<_> = ACTIVATIONS.iter().map(|(known, _)| *known).collect();
        fields.wrong(field, format!("is {name}; supported are: {}", known.join(", ")))
    })
}

/// The end tokens as transformers finds them: generation_config.json, then config.json, then the
/// family's default.
fn end_tokens(sources: &[&Fields], architecture: &Architecture) -> Result<Vec<u32>, LoadError> {
    for source in sources {
        if let Some(value) = source.get("eos_token_id") {
            return tokens(value)
                .ok_or_else(|| source.wrong("eos_token_id", format!("is {value}, not a token id or a list of them")));
        }
    }
    // A null is no default, except in generation_config.json.
    let stated =
        sources.iter().any(|source| !source.path.ends_with("generation_config.json") && source.has("eos_token_id"));
    Ok(architecture.end_token.filter(|_| !stated).into_iter().collect())
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
