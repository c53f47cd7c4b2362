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
        let mut joined: Option<Rows> = None;
        let mut bias = Vec::new();
        for (name, size) in stored.names.iter().zip(sizes) {
            let name = format!("{}{name}", stored.prefix);
            let rows = weights.rows(&format!("{name}.weight"), *size, inputs, stored.orientation)?;
            // The first part moves in without a copy.
            joined = Some(match joined {
                None => rows,
                Some(above) => above.append(rows),
            });
            if stored.bias {
                bias.extend(weights.vector(&format!("{name}.bias"), &[*size])?);
            }
        }
        let rows = joined.unwrap_or_else(|| Rows::Dense(Vec::new()));
        let matrix = rows.into_matrix(backend, whole[0], inputs);
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
        let rows = weights.rows(name, outputs, inputs, Orientation::OutIn)?;
        Ok(Self { matrix: rows.into_matrix(backend, outputs, inputs), bias: None })
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
