//! The rotation of queries and keys: what config.json says of it, and its table of angles.
//!
//! Never here: the rotation itself (that is the backend's). Both spellings are read,
//! `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (4). As transformers
//! does, frequencies and angles are rounded to float32. The functions are libm's own, so that the
//! table is the same on every system.

use serde_json::Value;

use crate::architectures::Rotation;
use crate::config::Fields;
use crate::error::LoadError;

/// The rotation of queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    /// How many values of each head are rotated; even.
    pub width: usize,
    /// How frequencies are changed for longer texts.
    pub scaling: Scaling,
}

/// How frequencies are changed so that texts may be longer than those of the training.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// All are divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// As Llama 3.1 does: those below one bound are divided, those above another are not.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Waves that fit fewer times than this into the original context are divided.
        low: f64,
        /// Waves that fit more times than this are not.
        high: f64,
        /// The context of the training, in tokens.
        original: usize,
    },
    /// `YaRN` (Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// What cosines and sines are multiplied with.
        attention: f64,
        /// Between which pairs the division sets in.
        ramp: (f64, f64),
        /// The context of the training, in tokens.
        original: usize,
    },
    /// `LongRoPE` (Ding et al. 2024, arXiv:2402.13753): each pair has a divisor, and another one in
    /// texts longer than the original context.
    Long {
        /// The divisors up to it.
        short: Vec<f64>,
        /// The divisors beyond it.
        long: Vec<f64>,
        /// What cosines and sines are multiplied with.
        attention: f64,
        /// The context of the training, in tokens.
        original: usize,
    },
}

impl Rope {
    /// The longest sequence in tokens, where config.json states that one.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a context has few digits, the factor is positive, and what is too large saturates"
    )]
    pub fn context(&self, stated: usize) -> usize {
        match self.scaling {
            // Some checkpoints state the context of the training, some the longer one.
            Scaling::Yarn { factor, original, .. } => stated.max((original as f64 * factor) as usize).min(1 << 28),
            _ => stated,
        }
    }

    /// The longest text in tokens that has the first of two tables, where there are two.
    #[must_use]
    pub fn switches_after(&self) -> Option<usize> {
        match self.scaling {
            Scaling::Long { original, .. } => Some(original),
            _ => None,
        }
    }

    /// For each position the cosines, then the sines, of the angles by which pairs are rotated;
    /// with a switch, the same again for longer texts.
    #[must_use]
    pub fn table(&self, positions: usize) -> Vec<f32> {
        match &self.scaling {
            Scaling::Long { short, long, attention, original } => {
                let mut table = angles(&self.divided(short), *attention, positions);
                if positions > *original {
                    table.extend(angles(&self.divided(long), *attention, positions));
                }
                table
            }
            Scaling::Yarn { attention, .. } => angles(&self.frequencies(), *attention, positions),
            _ => angles(&self.frequencies(), 1.0, positions),
        }
    }

    fn divided(&self, divisors: &[f64]) -> Vec<f64> {
        self.frequencies().iter().zip(divisors).map(|(frequency, divisor)| frequency / divisor).collect()
    }

    /// The angles per token of the pairs.
    #[expect(clippy::cast_precision_loss, reason = "widths and contexts are exact in float64")]
    fn frequencies(&self) -> Vec<f64> {
        let pairs = self.width / 2;
        let scale = |(pair, frequency): (usize, f64)| match self.scaling {
            Scaling::None | Scaling::Long { .. } => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low, high, original } => {
                let waves = original as f64 * frequency / std::f64::consts::TAU;
                let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                frequency / factor * (1.0 - kept) + frequency * kept
            }
            Scaling::Yarn { factor, ramp: (first, last), .. } => {
                let divided = ((pair as f64 - first) / (last - first)).clamp(0.0, 1.0);
                frequency / factor * divided + frequency * (1.0 - divided)
            }
        };
        let plain = |pair: usize| libm::pow(self.theta, -2.0 * pair as f64 / self.width as f64);
        (0..pairs).map(|pair| scale((pair, plain(pair)))).collect()
    }
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "positions are exact in float32, and the table is float32"
)]
fn angles(frequencies: &[f64], attention: f64, positions: usize) -> Vec<f32> {
    let frequencies: Vec<f32> = frequencies.iter().map(|frequency| *frequency as f32).collect();
    let attention = attention as f32;
    let mut table = Vec::with_capacity(positions * 2 * frequencies.len());
    for position in 0..positions {
        let angles = frequencies.iter().map(|frequency| f64::from(position as f32 * frequency));
        table.extend(angles.clone().map(|angle| libm::cos(angle) as f32 * attention));
        table.extend(angles.map(|angle| libm::sin(angle) as f32 * attention));
    }
    table
}

/// The rotations of a model with heads of that width and that context: one for all layers, or one
/// for layers without and one for layers with a window.
pub(crate) fn read(
    fields: &Fields,
    rotation: &Rotation,
    (head_dim, context): (usize, usize),
) -> Result<Vec<Rope>, LoadError> {
    let reader = Reader { fields, rotation, head_dim, context };
    let Some((local_name, local_theta)) = rotation.local else {
        let theta = fields.number("rope_theta", rotation.theta)?;
        let name = ["rope_scaling", "rope_parameters"].into_iter().find(|name| is_filled(fields.get(name)));
        return Ok(vec![reader.rope(name.unwrap_or("rope_scaling"), fields, theta)?]);
    };
    let theta = fields.number("rope_theta", rotation.theta)?;
    let local = fields.number(local_name, local_theta)?;
    const PARAMETERS: &str = "rope_parameters";
    let Some(parameters) = fields.get(PARAMETERS) else {
        return Ok(vec![reader.rope("rope_scaling", fields, theta)?, reader.plain(local)]);
    };
    if parameters.get("full_attention").is_none() || is_filled(fields.get("rope_scaling")) {
        return Err(
            fields.wrong(PARAMETERS, "has no full_attention and sliding_attention, or stands beside rope_scaling")
        );
    }
    let each = fields.section(PARAMETERS)?;
    Ok(vec![reader.rope("full_attention", &each, theta)?, reader.rope("sliding_attention", &each, local)?])
}

/// Whether there is an object with anything in it: an empty one counts as absent, as in transformers.
fn is_filled(value: Option<&Value>) -> bool {
    value.is_some_and(|value| value.as_object().is_none_or(|map| !map.is_empty()))
}

struct Reader<'a> {
    fields: &'a Fields,
    rotation: &'a Rotation,
    head_dim: usize,
    context: usize,
}

/// What an object of `rope_parameters` or `rope_scaling` says.
struct Stated<'a> {
    /// Its own name, for complaints.
    name: &'a str,
    inside: Fields,
    /// Values of a head that are rotated.
    width: usize,
    theta: f64,
}

impl Reader<'_> {
    fn plain(&self, theta: f64) -> Rope {
        Rope { theta, width: self.head_dim, scaling: Scaling::None }
    }

    /// The rotation that the object `name` among `fields` describes, if any; `theta` is the base
    /// that holds where it does not state one.
    fn rope(&self, name: &str, fields: &Fields, theta: f64) -> Result<Rope, LoadError> {
        let inside = fields.section(name)?;
        if inside.has_object() {
            return Err(fields.wrong(name, "differs between layer types, which is not supported here"));
        }
        let theta = inside.number("rope_theta", theta)?;
        let kind = inside.text("rope_type", inside.text("type", "default")?)?.to_owned();
        let width = self.width(&inside)?;
        let stated = Stated { name, inside, width, theta };
        let kind = if self.rotation.long_names.contains(&kind.as_str()) { "longrope" } else { kind.as_str() };
        let scaling = match kind {
            // Dynamic NTK scaling changes only what is beyond the stated context, and no sequence is.
            "default" | "dynamic" => Scaling::None,
            "linear" => Scaling::Linear { factor: self.needed(&stated, "factor")? },
            "llama3" => self.llama3(&stated)?,
            "yarn" => self.yarn(&stated)?,
            "longrope" => self.long(&stated)?,
            _ => {
                let known = "default, dynamic, linear, llama3, yarn, longrope";
                return Err(self.fields.wrong(name, format!("has type {kind}; supported are: {known}")));
            }
        };
        Ok(Rope { theta, width, scaling })
    }

    /// How many values of a head are rotated.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a small number"
    )]
    fn width(&self, inside: &Fields) -> Result<usize, LoadError> {
        const NAME: &str = "partial_rotary_factor";
        let share = inside.number(NAME, self.fields.number(NAME, 1.0)?)?;
        if share == 1.0 {
            return Ok(self.head_dim);
        }
        let width = (self.head_dim as f64 * share) as usize;
        let fits = self.rotation.partial && share < 1.0 && width >= 2 && width.is_multiple_of(2);
        if fits { Ok(width) } else { Err(self.fields.wrong(NAME, format!("is {share}, which is not supported here"))) }
    }

    fn needed(&self, stated: &Stated<'_>, field: &str) -> Result<f64, LoadError> {
        match stated.inside.get(field) {
            Some(_) => stated.inside.number(field, 1.0),
            None => Err(self.fields.wrong(stated.name, format!("has no {field}"))),
        }
    }

    /// The context of the training.
    fn original(&self, stated: &Stated<'_>) -> Result<usize, LoadError> {
        const NAME: &str = "original_max_position_embeddings";
        let outside = self.fields.optional_size(NAME, self.rotation.original_context)?;
        match outside {
            Some(tokens) => Ok(tokens),
            None => Ok(stated.inside.optional_size(NAME, None)?.unwrap_or(self.context)),
        }
    }

    /// The stated factor, or by how much the context is longer than that of the training.
    #[expect(clippy::cast_precision_loss, reason = "contexts are exact in float64")]
    fn factor(&self, stated: &Stated<'_>, original: usize) -> Result<f64, LoadError> {
        let factor = stated.inside.optional_number("factor", None)?;
        Ok(factor.unwrap_or(self.context as f64 / original as f64))
    }

    fn llama3(&self, stated: &Stated<'_>) -> Result<Scaling, LoadError> {
        let needed = |field| self.needed(stated, field);
        let (factor, low, high) = (needed("factor")?, needed("low_freq_factor")?, needed("high_freq_factor")?);
        if high <= low {
            return Err(self.fields.wrong(stated.name, "has a high_freq_factor that is not above low_freq_factor"));
        }
        Ok(Scaling::Llama3 { factor, low, high, original: self.original(stated)? })
    }

    #[expect(clippy::cast_precision_loss, reason = "widths and contexts are exact in float64")]
    fn yarn(&self, stated: &Stated<'_>) -> Result<Scaling, LoadError> {
        let inside = &stated.inside;
        let original = self.original(stated)?;
        let factor = self.factor(stated, original)?;
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * libm::log(factor) + 1.0 };
        let scales = (zero_is_none(inside, "mscale")?, zero_is_none(inside, "mscale_all_dim")?);
        let attention = match (inside.optional_number("attention_factor", None)?, scales) {
            (Some(attention), _) => attention,
            (None, (Some(some), Some(all))) => magnitude(some) / magnitude(all),
            _ => magnitude(1.0),
        };
        let pair = |turns: f64| {
            let width = stated.width as f64;
            width * libm::log(original as f64 / (turns * std::f64::consts::TAU)) / (2.0 * libm::log(stated.theta))
        };
        let first = pair(inside.optional_number("beta_fast", None)?.unwrap_or(32.0));
        let last = pair(inside.optional_number("beta_slow", None)?.unwrap_or(1.0));
        let (first, last) = if inside.flag("truncate", true)? { (first.floor(), last.ceil()) } else { (first, last) };
        let (first, last) = (first.max(0.0), last.min(stated.width as f64 - 1.0));
        let last = if last == first { first + 0.001 } else { last };
        Ok(Scaling::Yarn { factor, attention, ramp: (first, last), original })
    }

    #[expect(clippy::cast_precision_loss, reason = "contexts are exact in float64")]
    fn long(&self, stated: &Stated<'_>) -> Result<Scaling, LoadError> {
        let original = self.original(stated)?;
        let factor = self.factor(stated, original)?;
        let attention = match stated.inside.optional_number("attention_factor", None)? {
            Some(attention) => attention,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + libm::log(factor) / libm::log(original as f64)).sqrt(),
        };
        let divisors = |field| self.divisors(stated, field);
        Ok(Scaling::Long { short: divisors("short_factor")?, long: divisors("long_factor")?, attention, original })
    }

    fn divisors(&self, stated: &Stated<'_>, field: &str) -> Result<Vec<f64>, LoadError> {
        let list = stated.inside.get(field).and_then(Value::as_array);
        let numbers = list.and_then(|list| {
            list.iter().map(|value| value.as_f64().filter(|number| *number > 0.0)).collect::<Option<Vec<f64>>>()
        });
        let pairs = stated.width / 2;
        numbers
            .filter(|numbers| numbers.len() == pairs)
            .ok_or_else(|| self.fields.wrong(stated.name, format!("has no {field} of {pairs} positive numbers")))
    }
}

/// A number that 0 switches off, as in Python.
fn zero_is_none(fields: &Fields, name: &str) -> Result<Option<f64>, LoadError> {
    match fields.get(name).and_then(Value::as_f64) {
        Some(0.0) => Ok(None),
        _ => fields.optional_number(name, None),
    }
}
