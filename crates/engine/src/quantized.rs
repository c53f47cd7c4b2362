//! Quantised weights between a file and a backend: whole numbers with a scale, and perhaps a minimum, for each block.
//!
//! Never here: how a file packs them (that is `gguf::formats`), or how a backend does.
//!
//! A weight is `scale * quant - minimum`, each step rounded to float32. That is what the formats define, so a product
//! with quantised weights is, bit for bit, the product with the float32 weights that they stand for.

use crate::backend::{Backend, Dense};

/// Row-major quantised weights on their way to a backend.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// Rows of the matrix, that is outputs of a projection or tokens of an embedding.
    pub outputs: usize,
    /// Values per row; a multiple of `block`.
    pub inputs: usize,
    /// Consecutive values of a row with one scale.
    pub block: usize,
    /// The smallest quant that may stand here; all are below it plus 2 to the power of `bits`.
    pub lowest: i8,
    /// Bits that a quant needs: 4 or 8.
    pub bits: u8,
    /// `outputs * inputs` whole numbers.
    pub quants: Vec<i8>,
    /// One scale for each block.
    pub scales: Vec<f32>,
    /// One minimum for each block, where the format has them.
    pub minimums: Option<Vec<f32>>,
}

impl Quantized {
    /// The float32 values that these weights stand for.
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.quants.len());
        for (block, quants) in self.quants.chunks_exact(self.block).enumerate() {
            let (scale, minimum) = (self.scales[block], self.minimums.as_ref().map_or(0.0, |all| all[block]));
            values.extend(quants.iter().map(|quant| scale * f32::from(*quant) - minimum));
        }
        values
    }

    /// Rows in another order: row `i` becomes the one that was at `source(i)`.
    #[must_use]
    pub fn reordered(&self, source: impl Fn(usize) -> usize) -> Self {
        let blocks = self.inputs / self.block;
        let rows = || (0..self.outputs).map(&source);
        let blocks_of = |all: &Vec<f32>| rows().flat_map(|row| all[row * blocks..][..blocks].to_vec()).collect();
        Self {
            quants: rows().flat_map(|row| self.quants[row * self.inputs..][..self.inputs].to_vec()).collect(),
            scales: blocks_of(&self.scales),
            minimums: self.minimums.as_ref().map(blocks_of),
            ..*self
        }
    }

    /// Adds the rows of another matrix of the same width below these. What the two hold in different ways is brought
    /// to the wider one, which changes no value.
    pub fn append(&mut self, mut below: Self) {
        let block = self.block.min(below.block);
        for part in [&mut *self, &mut below] {
            part.split_blocks(block);
        }
        if (self.lowest, self.bits) != (below.lowest, below.bits) {
            (self.lowest, self.bits) = (i8::MIN, 8);
        }
        if self.minimums.is_some() || below.minimums.is_some() {
            let minimums = below.minimums.take().unwrap_or_else(|| vec![0.0; below.scales.len()]);
            self.minimums.get_or_insert_with(|| vec![0.0; self.scales.len()]).extend(minimums);
        }
        self.outputs += below.outputs;
        self.quants.extend(below.quants);
        self.scales.extend(below.scales);
    }

    /// Makes blocks smaller, by repeating what they have.
    fn split_blocks(&mut self, block: usize) {
        let times = self.block / block;
        let repeat = |all: &[f32]| all.iter().flat_map(|value| std::iter::repeat_n(*value, times)).collect();
        if times > 1 {
            self.scales = repeat(&self.scales);
            self.minimums = self.minimums.as_deref().map(repeat);
            self.block = block;
        }
    }
}

/// The rows of a projection or an embedding as a checkpoint has them.
#[derive(Debug)]
pub(crate) enum Rows {
    Dense(Vec<f32>),
    Quantized(Quantized),
}

impl Rows {
    /// The rows of another part below these; parts of both kinds become float32 values.
    pub(crate) fn append(self, below: Self) -> Self {
        match (self, below) {
            (Self::Quantized(mut above), Self::Quantized(below)) => {
                above.append(below);
                Self::Quantized(above)
            }
            (above, below) => {
                let mut values = above.into_values();
                values.extend(below.into_values());
                Self::Dense(values)
            }
        }
    }

    /// The weights on a backend.
    pub(crate) fn into_matrix<B: Backend>(self, backend: &B, outputs: usize, inputs: usize) -> B::Matrix {
        match self {
            Self::Dense(values) => backend.matrix(Dense { outputs, inputs, values }),
            Self::Quantized(quantized) => backend.quantized(quantized),
        }
    }

    pub(crate) fn into_values(self) -> Vec<f32> {
        match self {
            Self::Dense(values) => values,
            Self::Quantized(quantized) => quantized.values(),
        }
    }
}
