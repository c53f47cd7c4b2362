//! The families of decoders that GGUF files hold, one row each: what they are called in `transformers`, and in which
//! way their tensors were changed when the file was made.
//!
//! Never here: reading. Files are made by llama.cpp's `convert_hf_to_gguf.py`, whose changes are undone here.

use serde_json::{Map, Value as Json, json};

use crate::error::LoadError;
use crate::gguf::Metadata;
use crate::gguf::header::Value;
use crate::quantized::Rows;
use crate::raw::Order;

/// One family.
#[derive(Debug)]
pub(super) struct Family {
    /// The value of `general.architecture`, and what its keys begin with.
    name: &'static str,
    /// The class in `architectures` of config.json.
    class: &'static str,
    /// The parts of a layer whose names differ from those in [`TENSORS`].
    tensors: &'static [(&'static str, &'static str)],
    /// Whether the rows of queries and keys lie as pairs that are rotated together, not as two halves.
    interleaved: bool,
    /// Whether one was added to the weights of norms.
    adds_one: bool,
    /// Whether every so many layers one looks at all tokens, the others at a window only.
    full_every: Option<u32>,
    /// Whether a file that says nothing of a window means that of `transformers`, not that there is none.
    window_untold: bool,
    /// The number of layers of that size of the family whose scores are divided by the root of hidden width over heads
    /// instead of that of the head's width; the files do not say it.
    scaled_by_hidden: Option<u32>,
    /// What config.json says of all models of the family.
    config: &'static [(&'static str, &'static str)],
}

/// The table of families.
const FAMILIES: &[Family] = &[
    // Mistral too: its files say llama.
    Family { interleaved: true, ..family("llama", "LlamaForCausalLM") },
    family("qwen2", "Qwen2ForCausalLM"),
    family("qwen3", "Qwen3ForCausalLM"),
    Family { adds_one: true, config: GELU, ..family("gemma", "GemmaForCausalLM") },
    Family {
        tensors: FOUR_NORMS,
        adds_one: true,
        full_every: Some(2),
        window_untold: true,
        scaled_by_hidden: Some(46),
        config: GELU,
        ..family("gemma2", "Gemma2ForCausalLM")
    },
    Family {
        tensors: FOUR_NORMS,
        adds_one: true,
        full_every: Some(6),
        scaled_by_hidden: Some(62),
        config: GELU,
        ..family("gemma3", "Gemma3ForCausalLM")
    },
];

const fn family(name: &'static str, class: &'static str) -> Family {
    Family {
        name,
        class,
        tensors: &[],
        interleaved: false,
        adds_one: false,
        full_every: None,
        window_untold: false,
        scaled_by_hidden: None,
        config: &[],
    }
}

const GELU: &[(&str, &str)] = &[("hidden_act", "gelu_pytorch_tanh"), ("hidden_activation", "gelu_pytorch_tanh")];

/// The parts of a layer, as `transformers` and as llama.cpp calls them.
const TENSORS: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The norms of layers that have one before and one after each part.
const FOUR_NORMS: &[(&str, &str)] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// Whole numbers of config.json by the keys that files have for them, after the family's name.
const WHOLE: &[(&str, &str)] = &[
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.sliding_window", "sliding_window"),
    ("context_length", "max_position_embeddings"),
];

/// What a decoder cannot be without, for the defaults of config.json are those of one size of model.
const NEEDED: usize = 4;

/// The other numbers.
const REAL: &[(&str, &str)] = &[
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
    ("rope.freq_base_swa", "rope_local_base_freq"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
];

impl Family {
    /// The row of the family that a file says it is of.
    pub(super) fn of(metadata: &Metadata) -> Result<&'static Self, LoadError> {
        let key = "general.architecture";
        let name = metadata.text(key)?.ok_or_else(|| metadata.wrong(key, "is missing"))?;
        let row = FAMILIES.iter().find(|row| row.name == name).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|row| row.name).collect();
            LoadError::UnknownArchitecture {
                path: metadata.path.clone(),
                found: name.to_owned(),
                known: known.join(", "),
            }
        })?;
        match metadata.whole(&format!("{name}.expert_count"))? {
            Some(count) if count > 0 => Err(metadata
                .wrong(&format!("{name}.expert_count"), format!("is {count}; GGUF files with experts are not read"))),
            _ => Ok(row),
        }
    }

    /// The name that the file has for a tensor.
    pub(super) fn tensor(&self, name: &str) -> Option<String> {
        match name {
            "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
            "model.norm.weight" => return Some("output_norm.weight".to_owned()),
            "lm_head.weight" => return Some("output.weight".to_owned()),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let mut parts = self.tensors.iter().chain(TENSORS);
        let (_, part) = parts.find(|(known, _)| *known == part)?;
        Some(format!("blk.{layer}.{part}.{kind}"))
    }

    /// How many heads a projection has, where its rows lie as pairs.
    pub(super) fn interleaved_heads(&self, name: &str, config: &Json) -> Option<usize> {
        let field = match name.rsplit('.').nth(1)? {
            "q_proj" => "num_attention_heads",
            "k_proj" => "num_key_value_heads",
            _ => return None,
        };
        let heads = config.get(field).or_else(|| config.get("num_attention_heads"))?;
        heads.as_u64().and_then(|heads| usize::try_from(heads).ok()).filter(|_| self.interleaved)
    }

    /// Whether the weights of that name are one larger in the file.
    pub(super) fn adds_one_to(&self, name: &str) -> bool {
        self.adds_one && name.ends_with("norm.weight")
    }
}

/// The rows of each of so many heads, where they have pairs.
pub(super) fn pairs_width(outputs: usize, heads: usize) -> Option<usize> {
    let width = outputs / heads.max(1);
    (width >= 2 && width * heads == outputs && width.is_multiple_of(2)).then_some(width)
}

/// Rows that lie as the pairs that are rotated together, brought to the order of two halves for each head.
pub(super) fn halves_apart(rows: Rows, outputs: usize, heads: usize) -> Rows {
    let Some(width) = pairs_width(outputs, heads) else { return rows };
    let source = |row| Order::Pairs(width).stored_at(row);
    match rows {
        Rows::Quantized(quantized) => Rows::Quantized(quantized.reordered(source)),
        Rows::Dense(values) => {
            let inputs = values.len() / outputs;
            Rows::Dense((0..outputs).flat_map(|row| values[source(row) * inputs..][..inputs].to_vec()).collect())
        }
    }
}

/// What the tensors of a file tell of its model.
pub(super) struct Facts {
    /// Rows of the embedding.
    pub(super) vocabulary: Option<usize>,
    /// Whether the logits use the embedding.
    pub(super) tied: bool,
    /// What the frequencies of the rotation are divided by.
    pub(super) divisors: Option<Vec<f32>>,
}

/// What config.json and generation_config.json would say of the model.
pub(super) fn config(metadata: &Metadata, family: &Family, facts: &Facts) -> Result<Json, LoadError> {
    let mut config = Map::new();
    let mut put = |field: &str, value: Json| config.insert(field.to_owned(), value);
    put("architectures", json!([family.class]));
    put("tie_word_embeddings", facts.tied.into());
    for (field, value) in family.config {
        put(field, (*value).into());
    }
    if let Some(vocabulary) = facts.vocabulary {
        put("vocab_size", vocabulary.into());
    }
    let key = |end: &str| format!("{}.{end}", family.name);
    for (index, (end, field)) in WHOLE.iter().enumerate() {
        match metadata.whole(&key(end))? {
            Some(number) => drop(put(field, number.into())),
            None if index < NEEDED => return Err(metadata.wrong(&key(end), "is missing")),
            None => {}
        }
    }
    for (end, field) in REAL {
        if let Some(number) = metadata.number(&key(end))? {
            put(field, json!(number));
        }
    }
    let whole = |end: &str| metadata.whole(&key(end)).map(Option::unwrap_or_default);
    let (hidden, heads, layers) = (whole("embedding_length")?, whole("attention.head_count")?, whole("block_count")?);
    let width = metadata.whole(&key("attention.key_length"))?.unwrap_or(hidden / heads.max(1));
    if let Some(every) = family.full_every {
        let windows = windows(metadata, family, (every, layers.min(LAYERS_MAX)))?;
        let name = |window: &bool| if *window { "sliding_attention" } else { "full_attention" };
        put("layer_types", windows.iter().map(name).collect());
    }
    if let Some(large) = family.scaled_by_hidden {
        let scalar = if layers == large { f64::from(hidden) / f64::from(heads.max(1)) } else { f64::from(width) };
        put("query_pre_attn_scalar", json!(scalar));
    }
    match metadata.whole(&key("rope.dimension_count"))? {
        Some(rotated) if rotated != width => {
            let reason = format!("is {rotated} of {width}; heads of which only a part is rotated are not supported");
            return Err(metadata.wrong(&key("rope.dimension_count"), reason));
        }
        _ => {}
    }
    if let Some(scaling) = scaling(metadata, family, facts)? {
        put("rope_scaling", scaling);
    }
    if let Some(id) = metadata.whole("tokenizer.ggml.bos_token_id")? {
        put("bos_token_id", id.into());
    }
    put("eos_token_id", end_tokens(metadata)?.into());
    Ok(Json::Object(config))
}

/// Which of so many layers look at a window only: those that the file tells, else all but every so many.
fn windows(metadata: &Metadata, family: &Family, (every, layers): (u32, u32)) -> Result<Vec<bool>, LoadError> {
    let key = |end: &str| format!("{}.attention.sliding_window{end}", family.name);
    if !family.window_untold && metadata.whole(&key(""))?.is_none() {
        return Ok(vec![false; layers as usize]);
    }
    let pattern = key("_pattern");
    if let Some(Value::Numbers(each)) = metadata.values.get(&pattern) {
        let windows = each.iter().map(|window| *window != 0.0).collect::<Vec<_>>();
        return match windows.len() == layers as usize {
            true => Ok(windows),
            false => Err(metadata.wrong(&pattern, format!("has {} entries for {layers} layers", windows.len()))),
        };
    }
    let every = metadata.whole(&pattern)?.unwrap_or(every);
    Ok((1..=layers).map(|layer| !layer.is_multiple_of(every)).collect())
}

/// More layers are a broken file, and would be a list of that length.
const LAYERS_MAX: u32 = 1 << 12;

/// The tokens that end a text, a turn or a message.
fn end_tokens(metadata: &Metadata) -> Result<Vec<u32>, LoadError> {
    let mut ends = Vec::new();
    for name in ["eos", "eot", "eom"] {
        let id = metadata.whole(&format!("tokenizer.ggml.{name}_token_id"))?;
        ends.extend(id.filter(|id| !ends.contains(id)));
    }
    Ok(ends)
}

/// How the rotation is stretched, in the words of config.json.
fn scaling(metadata: &Metadata, family: &Family, facts: &Facts) -> Result<Option<Json>, LoadError> {
    let key = |end: &str| format!("{}.rope.scaling.{end}", family.name);
    if let Some(divisors) = &facts.divisors {
        return match fit_llama3(divisors, facts_theta(metadata, family)?) {
            Some(scaling) => Ok(Some(scaling)),
            None if divisors.iter().all(|divisor| *divisor == 1.0) => Ok(None),
            None => Err(metadata.wrong("rope_freqs.weight", "divides frequencies in another way than Llama 3 does")),
        };
    }
    let kind = metadata.text(&key("type"))?.unwrap_or("none");
    let factor = metadata.number(&key("factor"))?.unwrap_or(1.0);
    match kind {
        "none" => Ok(None),
        "linear" => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
        "yarn" => {
            let mut scaling = json!({"rope_type": "yarn", "factor": factor});
            if let Some(context) = metadata.whole(&key("original_context_length"))? {
                scaling["original_max_position_embeddings"] = context.into();
            }
            Ok(Some(scaling))
        }
        _ => Err(metadata.wrong(&key("type"), format!("is {kind}; supported are: none, linear, yarn"))),
    }
}

fn facts_theta(metadata: &Metadata, family: &Family) -> Result<f64, LoadError> {
    Ok(metadata.number(&format!("{}.rope.freq_base", family.name))?.unwrap_or(10_000.0))
}

/// The numbers of config.json that give these divisors. Short waves keep their frequency, long ones have it divided by
/// `factor`; between `original / high` and `original / low` tokens of wavelength `1 / divisor` is a straight line over
/// `1 / wavelength`, from which the two ends are read. A file does not have the numbers themselves.
#[expect(clippy::cast_precision_loss, reason = "heads are narrow")]
fn fit_llama3(divisors: &[f32], theta: f64) -> Option<Json> {
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let width = 2.0 * divisors.len() as f64;
    let turns = |pair: usize| theta.powf(-2.0 * pair as f64 / width) / std::f64::consts::TAU;
    let share = |divisor: f64| (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor);
    let divisors: Vec<f64> = divisors.iter().copied().map(f64::from).collect();
    let between: Vec<(f64, f64)> = (0..divisors.len())
        .map(|pair| (turns(pair), share(divisors[pair])))
        .filter(|(_, share)| (0.001..0.999).contains(share))
        .collect();
    let (first, last) = (between.first()?, between.last()?);
    let slope = (first.1 - last.1) / (first.0 - last.0);
    // All known models have a low factor of 1; with one wave on the way nothing else can be told.
    let (low, high, original) = match between.len() {
        1 => (1.0, 4.0, (first.1 * 3.0 + 1.0) / first.0),
        _ => {
            let rise = slope * first.0 - first.1;
            let spread = 1.0 / rise;
            (1.0, 1.0 + spread, slope * spread)
        }
    };
    let (low, high, original) = (low, (high * 1000.0_f64).round() / 1000.0, original.round());
    let fits = divisors.iter().enumerate().all(|(pair, divisor)| {
        let share = ((original * turns(pair) - low) / (high - low)).clamp(0.0, 1.0);
        let expected = 1.0 / ((1.0 - share) / factor + share);
        (divisor / expected - 1.0).abs() < 1e-4
    });
    let scaling = json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original_whole(original)?,
    });
    fits.then_some(scaling)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "just checked")]
fn original_whole(original: f64) -> Option<u64> {
    (1.0..1e9).contains(&original).then_some(original as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The divisors as `transformers` computes them (`_compute_llama3_parameters`).
    fn divisors(theta: f64, width: u32, factor: f64, (low, high, original): (f64, f64, f64)) -> Vec<f32> {
        let divisor = |pair: u32| {
            let wave = std::f64::consts::TAU * theta.powf(f64::from(2 * pair) / f64::from(width));
            let smooth = (original / wave - low) / (high - low);
            match () {
                () if wave < original / high => 1.0,
                () if wave > original / low => factor,
                () => 1.0 / ((1.0 - smooth) / factor + smooth),
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "as the files have them")]
        (0..width / 2).map(|pair| divisor(pair) as f32).collect()
    }

    #[test]
    fn the_numbers_of_llama_3_are_found_from_its_divisors() {
        for (width, factor) in [(128, 8.0), (64, 32.0)] {
            let scaling = fit_llama3(&divisors(500_000.0, width, factor, (1.0, 4.0, 8192.0)), 500_000.0).unwrap();
            assert_eq!(scaling["factor"], factor);
            assert_eq!(scaling["high_freq_factor"], 4.0);
            assert_eq!(scaling["original_max_position_embeddings"], 8192);
        }
        let mut other = divisors(500_000.0, 128, 8.0, (1.0, 4.0, 8192.0));
        other[3] = 2.0;
        assert_eq!(fit_llama3(&other, 500_000.0), None);
        assert_eq!(fit_llama3(&[1.0; 32], 10_000.0), None);
    }

    #[test]
    fn interleaved_rows_become_halves() {
        let rows = |all: &[f32]| Rows::Dense(all.to_vec());
        // Two heads of width 4, one value a row.
        let stored = rows(&[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(halves_apart(stored, 8, 2).into_values(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn norms_of_gemma_are_told_apart() {
        let row = |name| FAMILIES.iter().find(|row| row.name == name).unwrap();
        let name = "model.layers.3.post_attention_layernorm.weight";
        assert_eq!(row("llama").tensor(name).unwrap(), "blk.3.ffn_norm.weight");
        assert_eq!(row("gemma2").tensor(name).unwrap(), "blk.3.post_attention_norm.weight");
        assert!(row("gemma2").adds_one_to(name) && !row("qwen2").adds_one_to(name));
        assert_eq!(row("qwen2").tensor("model.layers.0.self_attn.q_proj.bias").unwrap(), "blk.0.attn_q.bias");
        assert_eq!(row("qwen2").tensor("model.layers.0.other.weight"), None);
    }
}
