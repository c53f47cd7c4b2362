//! Quantised weights in panels, unpacked to float32 a chunk of inputs at a time, just before they are used.
//!
//! Never here: sums. A chunk stays in the first-level cache while all rows are multiplied with it, so a batch pays for
//! unpacking once, and a single row reads a quarter of what float32 weights would be or less.

use pulp::Simd;

use crate::backend::cpu::product::PANEL;
use crate::quantized::Quantized;

/// Inputs that are unpacked at a time; a multiple of every format's block. A chunk has 16 KiB.
pub(super) const CHUNK: usize = 128;

/// Values of an unpacked chunk.
pub(super) type Chunk = [f32; CHUNK * PANEL];

/// 2^23 as float32: its lowest bits count whole numbers, so a small one is put there and becomes a float by a subtraction,
/// exactly.
const WHOLE: f32 = 8_388_608.0;

/// The quants of a panel's outputs, and their scales for each block.
#[derive(Debug)]
pub(super) struct QuantPanels {
    inputs: usize,
    block: usize,
    bits: u8,
    /// What a word holds is larger than the quant by this much, negated.
    lowest: i8,
    /// For each panel and each [`Self::per_word`] inputs a word for each output, the first input in the lowest bits.
    words: Vec<u32>,
    scales: Vec<f32>,
    minimums: Option<Vec<f32>>,
}

impl QuantPanels {
    pub(super) fn new(quantized: &Quantized) -> Self {
        let Quantized { outputs, inputs, block, lowest, bits, .. } = *quantized;
        let (panels, per_word) = (outputs.div_ceil(PANEL), 32 / usize::from(bits));
        let groups = inputs / per_word;
        let mut words = vec![0; panels * groups * PANEL];
        for (row, quants) in quantized.quants.chunks_exact(inputs).enumerate() {
            let column = words[row / PANEL * groups * PANEL + row % PANEL..].iter_mut().step_by(PANEL);
            for (word, quants) in column.zip(quants.chunks_exact(per_word)) {
                let above = quants.iter().map(|quant| u32::from(quant.wrapping_sub(lowest).cast_unsigned()));
                *word = above.rev().fold(0, |word, quant| word << bits | quant);
            }
        }
        let per_block = |values: &[f32]| {
            let blocks = inputs / block;
            let mut all = vec![0.0; panels * blocks * PANEL];
            for (row, values) in values.chunks_exact(blocks).enumerate() {
                let column = all[row / PANEL * blocks * PANEL + row % PANEL..].iter_mut().step_by(PANEL);
                column.zip(values).for_each(|(place, value)| *place = *value);
            }
            all
        };
        let (scales, minimums) = (per_block(&quantized.scales), quantized.minimums.as_deref().map(per_block));
        Self { inputs, block, bits, lowest, words, scales, minimums }
    }

    /// Inputs in a word.
    #[inline(always)]
    fn per_word(&self) -> usize {
        32 / usize::from(self.bits)
    }

    /// The float32 weights of a panel for the inputs from `first` on, at most [`CHUNK`] of them: all outputs for one
    /// input, then for the next.
    #[inline(always)]
    pub(super) fn unpack<'a, S: Simd>(&self, simd: S, panel: usize, first: usize, chunk: &'a mut Chunk) -> &'a [f32] {
        let count = CHUNK.min(self.inputs - first);
        let (lines, _) = chunk[..count * PANEL].as_chunks_mut::<PANEL>();
        let (scales, _) = self.scales.as_chunks::<PANEL>();
        let (words, _) = self.words.as_chunks::<PANEL>();
        let (first_block, first_group) =
            ((panel * self.inputs + first) / self.block, (panel * self.inputs + first) / self.per_word());
        let groups = self.block / self.per_word();
        for (index, lines) in lines.chunks_exact_mut(self.block).enumerate() {
            let words = &words[first_group + index * groups..][..groups];
            let scales = &scales[first_block + index];
            let minimums = self.minimums.as_ref().map(|all| &all.as_chunks::<PANEL>().0[first_block + index]);
            self.unpack_block(simd, words, (scales, minimums), lines);
        }
        lines.as_flattened()
    }

    #[inline(always)]
    fn unpack_block<S: Simd>(
        &self,
        simd: S,
        words: &[[u32; PANEL]],
        (scales, minimums): (&[f32; PANEL], Option<&[f32; PANEL]>),
        lines: &mut [[f32; PANEL]],
    ) {
        let bits = simd.splat_u32s(u32::from(self.bits));
        let mask = simd.splat_u32s((1 << self.bits) - 1);
        let whole = simd.splat_u32s(WHOLE.to_bits());
        let zero = simd.splat_f32s(WHOLE - f32::from(self.lowest));
        let scales = S::as_simd_f32s(scales).0;
        let minimums = minimums.map(|minimums| S::as_simd_f32s(minimums).0);
        for (words, lines) in words.iter().zip(lines.chunks_exact_mut(self.per_word())) {
            for (vector, word) in S::as_simd_u32s(words).0.iter().enumerate() {
                let (mut word, scale, minimum) = (*word, scales[vector], minimums.map(|minimums| minimums[vector]));
                for line in &mut *lines {
                    let above = simd.or_u32s(simd.and_u32s(word, mask), whole);
                    let quant = simd.sub_f32s(simd.transmute_f32s_u32s(above), zero);
                    let product = simd.mul_f32s(scale, quant);
                    S::as_mut_simd_f32s(line).0[vector] = match minimum {
                        None => product,
                        Some(minimum) => simd.sub_f32s(product, minimum),
                    };
                    word = simd.wrapping_dyn_shr_u32s(word, bits);
                }
            }
        }
    }

    /// The weight of one output for one input, for embeddings.
    pub(super) fn weight(&self, output: usize, input: usize) -> f32 {
        let (panel, column) = (output / PANEL, output % PANEL);
        let at = panel * self.inputs + input;
        let word = self.words[at / self.per_word() * PANEL + column];
        let shifted = word >> (usize::from(self.bits) * (input % self.per_word()));
        let above = shifted & ((1 << self.bits) - 1);
        let quant = f32::from_bits(WHOLE.to_bits() | above) - (WHOLE - f32::from(self.lowest));
        let place = at / self.block * PANEL + column;
        self.scales[place] * quant - self.minimums.as_ref().map_or(0.0, |all| all[place])
    }
}
