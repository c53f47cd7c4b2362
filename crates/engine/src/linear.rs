//! The one projection: weights and bias of one or several joined parts.
//!
//! Never here: arithmetic (that is the backend's) or names (those are the architecture's).

use crate::architectures::Orientation;
use crate::backend::{Backend, Write};
use crate::error::LoadError;
use crate::quantized::Rows;
use crate::weights::Weights;

/// `y = x W^T + b`.
pub(crate) struct Linear<B: Backend> {
    matrix: B::Matrix,
    bias: Option<B::Buffer>,
}

/// Where a projection lies in a checkpoint, whole or in parts that are joined along the outputs.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a> {
    /// What stands before every name.
    pub(crate) prefix: &'a str,
    /// The parts in order, without `.weight` and `.bias`.
    pub(crate) names: &'a [&'a str],
    /// Whether each part has a bias.
    pub(crate) bias: bool,
    /// How the weights lie.
    pub(crate) orientation: Orientation,
}

impl<B: Backend> Linear<B> {
    /// Loads a projection from `inputs` to the joined `outputs`. A part stored whole has all of
    /// them, a split one has one name for each.
    pub(crate) fn load(
        backend: &B,
        weights: &mut Weights,
        stored: Stored<'_>,
        inputs: usize,
        outputs: &[usize],
    ) -> Result<Self, LoadError> {
        let whole = [outputs.iter().sum()];
        let sizes = if stored.names.len() == 1 { &whole } else { outputs };
        let names = || stored.names.iter().map(|name| format!("{}{name}", stored.prefix)).zip(sizes.iter().copied());
        let parts = names().map(|(name, size)| (format!("{name}.weight"), size)).collect::<Vec<_>>();
        let matrix = matrix(backend, weights, &parts, (inputs, stored.orientation))?;
        let mut bias = Vec::new();
        for (name, size) in names().filter(|_| stored.bias) {
            bias.extend(weights.vector(&format!("{name}.bias"), &[size])?);
        }
        Ok(Self { matrix, bias: stored.bias.then(|| backend.upload(bias)) })
    }

    /// Loads a table without bias: an embedding, or the projection to logits.
    pub(crate) fn table(
        backend: &B,
        weights: &mut Weights,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Self, LoadError> {
        let matrix = matrix(backend, weights, &[(name.to_owned(), outputs)], (inputs, Orientation::OutIn))?;
        Ok(Self { matrix, bias: None })
    }

    /// `out = x W^T + b`, or `out += x W^T + b`.
    pub(crate) fn forward(&self, backend: &B, x: (&B::Buffer, usize), out: &mut B::Buffer, write: Write) {
        backend.product(&self.matrix, self.bias.as_ref(), x, out, write);
    }

    /// Rows of the weights themselves.
    pub(crate) fn embed(&self, backend: &B, ids: &[u32], out: &mut B::Buffer, write: Write) {
        backend.embed(&self.matrix, ids, out, write);
    }
}

/// The rows of all parts below each other: as they lie where the backend takes them so, else by way of the host's memory.
fn matrix<B: Backend>(
    backend: &B,
    weights: &mut Weights,
    parts: &[(String, usize)],
    (inputs, orientation): (usize, Orientation),
) -> Result<B::Matrix, LoadError> {
    let raw = parts.iter().map(|(name, outputs)| weights.raw(name, *outputs, inputs, orientation));
    if let Some(mut raw) = raw.collect::<Option<Vec<_>>>()
        && backend.takes(&raw, weights.format())
    {
        let matrix = backend.stored(&mut raw, weights.format())?;
        raw.into_iter().for_each(|part| weights.took(part));
        return Ok(matrix);
    }
    let mut joined: Option<Rows> = None;
    for (name, outputs) in parts {
        let rows = weights.rows(name, *outputs, inputs, orientation)?;
        // The first part moves in without a copy.
        joined = Some(match joined {
            None => rows,
            Some(above) => above.append(rows),
        });
    }
    let rows = joined.unwrap_or_else(|| Rows::Dense(Vec::new()));
    Ok(rows.into_matrix(backend, parts.iter().map(|(_, outputs)| outputs).sum(), inputs))
}
