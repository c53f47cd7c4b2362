//! Quantised weights in panels, unpacked to float32 just before they are used.
//!
//! Never here: another order of sums than that of dense panels. For a batch, a chunk of inputs is unpacked at a time, which
//! stays in the first-level cache while all rows are multiplied with it. For a single row that would cost more than the
//! products, so its weights go from words to sums without leaving the registers. Both do the same operations for an output.

use pulp::Simd;

use crate::backend::cpu::product::PANEL;
use crate::quantized::Quantized;

/// Inputs that are unpacked at a time; a multiple of every format's block. A chunk has 16 KiB.
pub(super) const CHUNK: usize = 128;

/// Panels that a single row goes through at a time.
pub(super) const PANELS: usize = 2;

/// Values of an unpacked chunk.
pub(super) type Chunk = [f32; CHUNK * PANEL];

/// The bits of a float32's fraction.
const FRACTION: u32 = 23;

/// The quants of a panel's outputs, and their scales for each block.
#[derive(Debug)]
pub(super) struct QuantPanels {
    inputs: usize,
    block: usize,
    bits: u8,
    /// What a word holds is larger than the quant by this much, negated.
    lowest: i8,
    /// For each panel and each [`Self::per_word`] inputs a word for each output, rotated so that the first input's bits are
    /// the upper ones of a float32's fraction; the others follow by rotations to the right.
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
                let all: u32 = above.rev().fold(0, |word, quant| word << bits | quant);
                *word = all.rotate_left(FRACTION - u32::from(bits));
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
        let unpack = Unpack::new(simd, self);
        let scales = S::as_simd_f32s(scales).0;
        let minimums = minimums.map(|minimums| S::as_simd_f32s(minimums).0);
        for (words, lines) in words.iter().zip(lines.chunks_exact_mut(self.per_word())) {
            for (vector, word) in S::as_simd_u32s(words).0.iter().enumerate() {
                let (mut word, scale) = (*word, unpack.scales(scales[vector]));
                let minimum = minimums.map(|minimums| minimums[vector]);
                for line in &mut *lines {
                    S::as_mut_simd_f32s(line).0[vector] = unpack.weights(word, scale, minimum);
                    word = unpack.next(word);
                }
            }
        }
    }

    /// The sums of a single row for [`PANELS`] panels from `panel` on.
    #[inline(always)]
    pub(super) fn row<S: Simd>(&self, simd: S, panel: usize, x: &[f32], sums: &mut [[f32; PANEL]; PANELS]) {
        match (self.bits, self.minimums.is_some()) {
            (4, false) => self.row_of::<S, 8, false>(simd, panel, x, sums),
            (4, true) => self.row_of::<S, 8, true>(simd, panel, x, sums),
            (_, false) => self.row_of::<S, 4, false>(simd, panel, x, sums),
            (_, true) => self.row_of::<S, 4, true>(simd, panel, x, sums),
        }
    }

    /// [`Self::row`] for so many quants in a word, so that the compiler lays out all that one word needs.
    #[inline(always)]
    fn row_of<S: Simd, const PER_WORD: usize, const MINIMUMS: bool>(
        &self,
        simd: S,
        panel: usize,
        x: &[f32],
        sums: &mut [[f32; PANEL]; PANELS],
    ) {
        let unpack = Unpack::new(simd, self);
        let (blocks, groups) = (self.inputs / self.block, self.block / PER_WORD);
        let words = |index: usize| {
            let words = &self.words.as_chunks::<PANEL>().0[(panel + index) * blocks * groups..][..blocks * groups];
            words.chunks_exact(groups)
        };
        let scales = |index: usize| &self.scales.as_chunks::<PANEL>().0[(panel + index) * blocks..][..blocks];
        let minimums = |index: usize| match &self.minimums {
            Some(all) if MINIMUMS => &all.as_chunks::<PANEL>().0[(panel + index) * blocks..][..blocks],
            _ => scales(index),
        };
        let (x, _) = x.as_chunks::<PER_WORD>();
        let [left, right] = sums;
        // Strips of two vectors in two panels: four chains of sums, which hide how long one addition takes.
        for strip in 0..PANEL / (2 * S::F32_LANES) {
            let [mut a, mut b] = S::as_simd_f32s(left.as_slice()).0.as_chunks::<2>().0[strip];
            let [mut c, mut d] = S::as_simd_f32s(right.as_slice()).0.as_chunks::<2>().0[strip];
            let floats = |line: &[f32; PANEL]| S::as_simd_f32s(line).0.as_chunks::<2>().0[strip];
            let whole = |line: &[u32; PANEL]| S::as_simd_u32s(line).0.as_chunks::<2>().0[strip];
            let of_left = words(0).zip(scales(0)).zip(minimums(0));
            let of_right = words(1).zip(scales(1)).zip(minimums(1));
            for ((((left, sa), ma), ((right, sc), mc)), x) in of_left.zip(of_right).zip(x.chunks_exact(groups)) {
                let ([sa, sb], [sc, sd]) = (floats(sa).map(|s| unpack.scales(s)), floats(sc).map(|s| unpack.scales(s)));
                let ([ma, mb], [mc, md]) = (floats(ma), floats(mc));
                for ((left, right), x) in left.iter().zip(right).zip(x) {
                    let ([mut wa, mut wb], [mut wc, mut wd]) = (whole(left), whole(right));
                    for x in x {
                        let x = simd.splat_f32s(*x);
                        let minimum = |minimum| MINIMUMS.then_some(minimum);
                        a = simd.mul_add_f32s(x, unpack.weights(wa, sa, minimum(ma)), a);
                        b = simd.mul_add_f32s(x, unpack.weights(wb, sb, minimum(mb)), b);
                        c = simd.mul_add_f32s(x, unpack.weights(wc, sc, minimum(mc)), c);
                        d = simd.mul_add_f32s(x, unpack.weights(wd, sd, minimum(md)), d);
                        (wa, wb, wc, wd) = (unpack.next(wa), unpack.next(wb), unpack.next(wc), unpack.next(wd));
                    }
                }
            }
            S::as_mut_simd_f32s(left.as_mut_slice()).0.as_chunks_mut::<2>().0[strip] = [a, b];
            S::as_mut_simd_f32s(right.as_mut_slice()).0.as_chunks_mut::<2>().0[strip] = [c, d];
        }
    }

    /// The weight of one output for one input, for embeddings.
    pub(super) fn weight(&self, output: usize, input: usize) -> f32 {
        let (panel, column) = (output / PANEL, output % PANEL);
        let at = panel * self.inputs + input;
        let word = self.words[at / self.per_word() * PANEL + column];
        let turned = word.rotate_right(u32::from(self.bits) * u32::try_from(input % self.per_word()).unwrap_or(0));
        let place = at / self.block * PANEL + column;
        let unpack = Unpack::new(pulp::Scalar, self);
        let minimum = self.minimums.as_ref().map(|all| all[place]);
        unpack.weights(turned, unpack.scales(self.scales[place]), minimum)
    }
}

/// From words to weights. A quant's bits, put below the exponent of 2^`bits`, make that number plus the quant above the
/// lowest one; times the scale, less what that is too much, it is the weight. What is subtracted is exact, for scales have
/// few bits (see [`Quantized::scales`]), so the one rounding is that of `scale * quant`.
#[derive(Clone, Copy)]
struct Unpack<S: Simd> {
    simd: S,
    right: S::u32s,
    left: S::u32s,
    mask: S::u32s,
    exponent: S::u32s,
    too_much: S::f32s,
}

/// The scales of a block, and what is added after them.
#[derive(Clone, Copy)]
struct Scales<S: Simd>(S::f32s, S::f32s);

impl<S: Simd> Unpack<S> {
    #[inline(always)]
    fn new(simd: S, panels: &QuantPanels) -> Self {
        let bits = u32::from(panels.bits);
        let base = f32::from(1_u16 << bits);
        Self {
            simd,
            right: simd.splat_u32s(bits),
            left: simd.splat_u32s(u32::BITS - bits),
            mask: simd.splat_u32s(((1 << bits) - 1) << (FRACTION - bits)),
            exponent: simd.splat_u32s(base.to_bits()),
            too_much: simd.splat_f32s(f32::from(panels.lowest) - base),
        }
    }

    #[inline(always)]
    fn scales(self, scales: S::f32s) -> Scales<S> {
        Scales(scales, self.simd.mul_f32s(scales, self.too_much))
    }

    /// What the first quants of these words stand for.
    #[inline(always)]
    fn weights(self, words: S::u32s, Scales(scales, added): Scales<S>, minimums: Option<S::f32s>) -> S::f32s {
        let simd = self.simd;
        let above = simd.or_u32s(simd.and_u32s(words, self.mask), self.exponent);
        let product = simd.mul_add_f32s(simd.transmute_f32s_u32s(above), scales, added);
        match minimums {
            None => product,
            Some(minimums) => simd.sub_f32s(product, minimums),
        }
    }

    /// The words whose first quants are the next ones.
    #[inline(always)]
    fn next(self, words: S::u32s) -> S::u32s {
        let simd = self.simd;
        simd.or_u32s(simd.wrapping_dyn_shr_u32s(words, self.right), simd.wrapping_dyn_shl_u32s(words, self.left))
    }
}
