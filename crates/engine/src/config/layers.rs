//! How layers differ from each other: windows and experts, as config.json states them.
//!
//! Never here: anything that holds for all layers. Nothing is kept for each layer, so that a file
//! which states a billion of them costs nothing.

use serde_json::Value;

use crate::architectures::{self, Normalised, SparseLayers, Windowed};
use crate::config::{Fields, inner};
use crate::error::LoadError;

/// Which layers see only so many tokens back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens that a row sees, itself included.
    tokens: Option<usize>,
    layers: Layers,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Layers {
    From(usize),
    AllButEvery(usize),
    /// As `layer_types` lists them.
    Listed(Vec<bool>),
}

impl Windows {
    pub(super) fn read(fields: &Fields, row: &architectures::Windows, layers: usize) -> Result<Self, LoadError> {
        let on = row.layers != Windowed::Never
            && row.switch.map(|switch| fields.flag(switch, false)).transpose()?.unwrap_or(true);
        let tokens = if on { fields.optional_size("sliding_window", row.tokens)? } else { None };
        let listed = listed(fields, layers)?;
        let layers = match (row.layers, listed) {
            (Windowed::Never, listed) => {
                refuse(fields, listed.as_deref(), false)?;
                Layers::From(usize::MAX)
            }
            (Windowed::All, listed) => {
                refuse(fields, listed.as_deref(), tokens.is_some())?;
                Layers::From(0)
            }
            (_, Some(listed)) => Layers::Listed(listed),
            (Windowed::From(name, default), None) => {
                Layers::From(if tokens.is_some() { first(fields, name, default)? } else { usize::MAX })
            }
            (Windowed::AllButEvery(name, default), None) => {
                let every = name.map(|name| fields.optional_size(name, Some(default))).transpose()?.flatten();
                Layers::AllButEvery(every.unwrap_or(default))
            }
        };
        let windows = Self { tokens, layers };
        match &windows.layers {
            Layers::Listed(list) if tokens.is_none() && list.contains(&true) => {
                Err(fields.wrong("layer_types", "has \"sliding_attention\", but no window is set"))
            }
            _ => Ok(windows),
        }
    }

    /// Whether a layer is one of those with a window.
    #[must_use]
    pub fn are_in(&self, layer: usize) -> bool {
        match &self.layers {
            Layers::From(first) => layer >= *first,
            Layers::AllButEvery(every) => !(layer + 1).is_multiple_of(*every),
            Layers::Listed(list) => list.get(layer).copied().unwrap_or(false),
        }
    }

    /// How many tokens a row of a layer sees, itself included, where that is limited.
    #[must_use]
    pub fn tokens(&self, layer: usize) -> Option<usize> {
        self.tokens.filter(|_| self.are_in(layer))
    }
}

/// A whole number that may be 0.
fn first(fields: &Fields, name: &str, default: usize) -> Result<usize, LoadError> {
    let Some(value) = fields.get(name) else { return Ok(default) };
    index(value).ok_or_else(|| fields.wrong(name, format!("is {value}, not a whole number")))
}

fn index(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

/// For each layer, whether `layer_types` gives it a window.
fn listed(fields: &Fields, layers: usize) -> Result<Option<Vec<bool>>, LoadError> {
    const NAME: &str = "layer_types";
    let Some(value) = fields.get(NAME) else { return Ok(None) };
    let Some(list) = value.as_array() else { return Err(fields.wrong(NAME, format!("is {value}, not a list"))) };
    if list.len() != layers {
        return Err(fields.wrong(NAME, format!("has {} entries for {layers} layers", list.len())));
    }
    let kinds = list.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(fields.wrong(NAME, format!("has {kind}, which is not supported"))),
    });
    kinds.collect::<Result<_, _>>().map(Some)
}

/// A family whose layers are all alike cannot do what a list of different ones asks for.
fn refuse(fields: &Fields, listed: Option<&[bool]>, windowed: bool) -> Result<(), LoadError> {
    match listed.is_some_and(|listed| listed.contains(&!windowed)) {
        false => Ok(()),
        true if windowed => Err(fields.wrong("layer_types", "has \"full_attention\" where all layers have a window")),
        true => Err(fields.wrong("layer_types", "has \"sliding_attention\", which is not supported here")),
    }
}

/// The experts of the sparse layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token uses; at most `count`.
    pub chosen: usize,
    /// Width inside each.
    pub inner: usize,
    /// Whether the weights of the chosen are made to sum to 1.
    pub normalised: bool,
    every: usize,
    dense: Vec<usize>,
}

impl Experts {
    pub(super) fn read(fields: &Fields, row: &architectures::Experts, hidden: usize) -> Result<Self, LoadError> {
        let (count, chosen) = (fields.size(&row.count)?, fields.size(&row.chosen)?);
        if chosen > count {
            return Err(fields.wrong(row.chosen.names[0], format!("is {chosen}, but there are {count} experts")));
        }
        let normalised = match row.normalised {
            Normalised::Always => true,
            Normalised::If(field) => fields.flag(field, false)?,
        };
        let (every, dense) = match row.layers {
            SparseLayers::All => (1, Vec::new()),
            SparseLayers::EveryBut(every, dense) => {
                (fields.optional_size(every, Some(1))?.unwrap_or(1), dense_layers(fields, dense)?)
            }
        };
        Ok(Self { count, chosen, inner: inner(fields, &row.inner, hidden)?, normalised, every, dense })
    }

    /// Whether a layer has them.
    #[must_use]
    pub fn are_in(&self, layer: usize) -> bool {
        (layer + 1).is_multiple_of(self.every) && !self.dense.contains(&layer)
    }
}

fn dense_layers(fields: &Fields, name: &str) -> Result<Vec<usize>, LoadError> {
    let Some(value) = fields.get(name) else { return Ok(Vec::new()) };
    let list = value.as_array().and_then(|list| list.iter().map(index).collect());
    list.ok_or_else(|| fields.wrong(name, format!("is {value}, not a list of layers")))
}
