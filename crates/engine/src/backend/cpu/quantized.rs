//! Quantised weights in panels, unpacked to float32 a chunk of inputs at a time, just before they are used.
//!
//! Never here: sums. A chunk stays in the first-level cache while all rows are multiplied with it, so a batch pays for
//! unpacking once, and a single row reads a quarter of what float32 weights would be or less.

use crate::backend::cpu::product::PANEL;
use crate::quantized::Quantized;

/// Inputs that are unpacked at a time; a multiple of every format's block. A chunk has 16 KiB.
pub(super) const CHUNK: usize = 128;

/// Values of an unpacked chunk.
pub(super) type Chunk = [f32; CHUNK * PANEL];

/// Quants of a panel's outputs for one input, and the scales of its outputs for one block.
#[derive(Debug)]
pub(super) struct QuantPanels {
    inputs: usize,
    block: usize,
    /// Bytes that hold the quants of one input: one for each output, or one for two (output `i` in the lower half of a
    /// byte, `i + PANEL / 2` in the upper one).
    line: usize,
    /// What is added to the halves of a byte.
    lowest: i8,
    quants: Vec<u8>,
    scales: Vec<f32>,
    minimums: Option<Vec<f32>>,
}

impl QuantPanels {
    pub(super) fn new(quantized: &Quantized) -> Self {
        let Quantized { outputs, inputs, block, lowest, bits, .. } = *quantized;
        let panels = outputs.div_ceil(PANEL);
        let line = if bits == 4 { PANEL / 2 } else { PANEL };
        let mut quants = vec![0; panels * inputs * line];
        for (row, values) in quantized.quants.chunks_exact(inputs).enumerate() {
            let (panel, column) = (row / PANEL, row % PANEL);
            let place = panel * inputs * line + column % line;
            let lines = quants[place..].iter_mut().step_by(line);
            for (byte, quant) in lines.zip(values) {
                *byte |= match bits {
                    4 => (quant.wrapping_sub(lowest).cast_unsigned() & 15) << (4 * (column / line)),
                    _ => quant.cast_unsigned(),
                };
            }
        }
        let per_block = |values: &[f32]| {
            let blocks = inputs / block;
            let mut all = vec![0.0; panels * blocks * PANEL];
            for (row, values) in values.chunks_exact(blocks).enumerate() {
                let (panel, column) = (row / PANEL, row % PANEL);
                let places = all[panel * blocks * PANEL + column..].iter_mut().step_by(PANEL);
                places.zip(values).for_each(|(place, value)| *place = *value);
            }
            all
        };
        let (scales, minimums) = (per_block(&quantized.scales), quantized.minimums.as_deref().map(per_block));
        Self { inputs, block, line, lowest, quants, scales, minimums }
    }

    /// The float32 weights of a panel for the inputs from `first` on, at most [`CHUNK`] of them: all outputs for one
    /// input, then for the next.
    #[inline(always)]
    pub(super) fn unpack<'a>(&self, panel: usize, first: usize, chunk: &'a mut Chunk) -> &'a [f32] {
        let count = CHUNK.min(self.inputs - first);
        let (lines, _) = chunk[..count * PANEL].as_chunks_mut::<PANEL>();
        let from = (panel * self.inputs + first) * self.line;
        let quants = &self.quants[from..][..count * self.line];
        for (index, lines) in lines.chunks_mut(self.block).enumerate() {
            let block = panel * (self.inputs / self.block) + first / self.block + index;
            let quants = &quants[index * self.block * self.line..];
            let scales = at(&self.scales, block);
            match &self.minimums {
                None => self.unpack_block(quants, lines, |column, quant| scales[column] * quant),
                Some(all) => {
                    let minimums = at(all, block);
                    self.unpack_block(quants, lines, |column, quant| scales[column] * quant - minimums[column]);
                }
            }
        }
        lines.as_flattened()
    }

    #[inline(always)]
    fn unpack_block(&self, quants: &[u8], lines: &mut [[f32; PANEL]], weight: impl Fn(usize, f32) -> f32) {
        if self.line == PANEL {
            for (line, quants) in lines.iter_mut().zip(quants.as_chunks::<PANEL>().0) {
                for (column, (value, quant)) in line.iter_mut().zip(quants).enumerate() {
                    *value = weight(column, f32::from(quant.cast_signed()));
                }
            }
            return;
        }
        let lowest = f32::from(self.lowest);
        for (line, quants) in lines.iter_mut().zip(quants.as_chunks::<{ PANEL / 2 }>().0) {
            let (low, high) = line.split_at_mut(PANEL / 2);
            for (column, (value, quant)) in low.iter_mut().zip(quants).enumerate() {
                *value = weight(column, f32::from(quant & 15) + lowest);
            }
            for (column, (value, quant)) in high.iter_mut().zip(quants).enumerate() {
                *value = weight(column + PANEL / 2, f32::from(quant >> 4) + lowest);
            }
        }
    }

    /// The weight of one output for one input, for embeddings.
    pub(super) fn weight(&self, output: usize, input: usize) -> f32 {
        let (panel, column) = (output / PANEL, output % PANEL);
        let byte = self.quants[(panel * self.inputs + input) * self.line + column % self.line];
        let quant = match self.line {
            PANEL => f32::from(byte.cast_signed()),
            line => f32::from(byte >> (4 * (column / line)) & 15) + f32::from(self.lowest),
        };
        let place = (panel * (self.inputs / self.block) + input / self.block) * PANEL + column;
        self.scales[place] * quant - self.minimums.as_ref().map_or(0.0, |all| all[place])
    }
}

/// The values of a panel's outputs for one block.
#[inline(always)]
fn at(all: &[f32], block: usize) -> &[f32; PANEL] {
    &all.as_chunks::<PANEL>().0[block]
}
