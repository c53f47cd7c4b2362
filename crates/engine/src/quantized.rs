//! Quantised weights between a file and a backend: whole numbers with a scale, and perhaps a minimum, for each block.
//!
//! Never here: how a file packs them (that is `gguf::formats`), or how a backend does.
//!
//! A weight is `scale * quant - minimum`, each step rounded to float32. That is what the formats define, so a product
//! with quantised weights is, bit for bit, the product with the float32 weights that they stand for.

use half::f16;
use rayon::prelude::*;

use crate::backend::{Backend, Dense};

/// A format that float weights can be brought to while they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// That of GGUF files: whole numbers from -127 to 127 in blocks of 32 with a half-precision scale. A model has the
    /// weights that llama.cpp's own conversion gives it.
    Q8_0,
}

impl Format {
    const ALL: [Self; 1] = [Self::Q8_0];

    /// Its usual name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
        }
    }

    /// Values of a block.
    const fn block(self) -> usize {
        match self {
            Self::Q8_0 => 32,
        }
    }

    /// Whether it can have rows of so many values. Others stay as they are.
    pub(crate) const fn takes(self, inputs: usize) -> bool {
        inputs > 0 && inputs.is_multiple_of(self.block())
    }

    /// Bytes that so many values take in a file.
    pub(crate) const fn bytes(self, values: u64) -> u64 {
        match self {
            Self::Q8_0 => values / 32 * 34,
        }
    }
}

/// No such format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("weights cannot be quantised to {name:?} while they are loaded, only to {}", known())]
pub struct UnknownFormat {
    /// What was asked for.
    pub name: String,
}

fn known() -> String {
    Format::ALL.map(Format::name).join(", ")
}

impl std::str::FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        let known = Self::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| UnknownFormat { name: name.to_owned() })
    }
}

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
    /// One scale for each block, of at most 20 significant bits, so that its products with whole numbers below 16 are exact:
    /// formats have half-precision scales, or such ones times a whole number of 8 bits.
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
            // Zero has no sign here.
            values.extend(quants.iter().map(|quant| scale * f32::from(*quant) - minimum + 0.0));
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
    /// Float values in a format, where their rows have whole blocks.
    pub(crate) fn quantised(self, format: Format, outputs: usize, inputs: usize) -> Self {
        match self {
            Self::Dense(values) if format.takes(inputs) => Self::Quantized(q8_0(&values, outputs, inputs)),
            other => other,
        }
    }

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

/// Each block's largest value becomes 127 or -127. The inverse of the scale is that before it is rounded to half precision,
/// as ggml does it.
fn q8_0(values: &[f32], outputs: usize, inputs: usize) -> Quantized {
    let block = Format::Q8_0.block();
    let (mut quants, mut scales) = (vec![0; values.len()], vec![0.0; values.len() / block]);
    let blocks = values.par_chunks_exact(block).zip(quants.par_chunks_exact_mut(block)).zip(&mut scales);
    blocks.with_min_len(1 << 10).for_each(|((values, quants), scale)| {
        let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let exact = largest / 127.0;
        let inverse = if exact == 0.0 { 0.0 } else { 1.0 / exact };
        *scale = f16::from_f32(exact).to_f32();
        for (quant, value) in quants.iter_mut().zip(values) {
            #[expect(clippy::cast_possible_truncation, reason = "from -127 to 127")]
            let nearest = (value * inverse).round() as i8;
            *quant = nearest;
        }
    });
    Quantized { outputs, inputs, block, lowest: i8::MIN, bits: 8, quants, scales, minimums: None }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn quantised_weights_are_those_of_ggml() {
        let (outputs, inputs) = (5, 96);
        // Blocks of all sizes, one of zeros, and halves that are rounded away from zero.
        let value = |at: usize| match at / 32 {
            3 => 0.0,
            4 => [127.0, 2.5, -2.5, 0.5][at % 4],
            block => ((at * 7919) % 1000) as f32 / 500.0 - 1.0 + block as f32,
        };
        let values: Vec<f32> = (0..outputs * inputs).map(value).collect();
        let tensor = Tensor::from_vec(values.clone(), (outputs, inputs), &Device::Cpu).unwrap();
        let theirs = QTensor::quantize(&tensor, GgmlDType::Q8_0).unwrap().dequantize(&Device::Cpu).unwrap();
        let ours = Rows::Dense(values).quantised(Format::Q8_0, outputs, inputs);
        assert!(matches!(ours, Rows::Quantized(_)));
        assert_eq!(ours.into_values(), theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }

    #[test]
    fn rows_without_whole_blocks_stay_as_they_are() {
        let values = vec![0.1; 3 * 40];
        assert!(matches!(Rows::Dense(values).quantised(Format::Q8_0, 3, 40), Rows::Dense(_)));
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        assert_eq!("q8_0".parse(), Ok(Format::Q8_0));
        for other in ["q4_k", "Q8_0", "int8", ""] {
            let error = other.parse::<Format>().unwrap_err().to_string();
            assert_eq!(error, format!("weights cannot be quantised to {other:?} while they are loaded, only to q8_0"));
        }
    }
}
