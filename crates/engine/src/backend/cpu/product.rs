//! `y = x W^T + bias` in float32, bit for bit the same for a row alone and among others.
//!
//! Never here: a sum over inputs in more than one order. Each output element is one chain of
//! fused multiply-adds over the inputs from first to last, in one vector lane, then the bias. A
//! tile of rows and columns runs many chains side by side and never splits or joins them, so the
//! tile's size, the number of threads and the instruction set are free.
//!
//! Weights are packed in panels of [`PANEL`] outputs: all their values for input 0, then for
//! input 1, and so on, so that a tile streams through memory once in order.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::backend::cpu::quantized::{CHUNK, Chunk, PANELS, QuantPanels};
use crate::backend::cpu::{LINE, threads};
use crate::backend::{Dense, Write};
use crate::quantized::Quantized;

/// Outputs per panel: two AVX-512 vectors or four of AVX2.
pub(super) const PANEL: usize = 32;

/// Most rows per tile: 12 rows by 2 vectors fill 24 of AVX-512's 32 registers with sums. Other
/// instruction sets have half as many.
const ROWS_MAX: usize = 12;

/// The chains of a tile over one strip, two vectors wide: for each input, every row's value times
/// the weights, added to what the sums have already. Each row's two sums are variables of their
/// own, for the compiler keeps an array of them in memory.
macro_rules! chains {
    ($simd:ident, $weights:ident, $x:ident, $strip:ident, $sums:ident;
     $rows:literal: $($row:literal $a:ident $b:ident),+) => {{
        $(let [mut $a, mut $b] = S::as_simd_f32s(&$sums[$row]).0.as_chunks::<2>().0[$strip];)+
        let (lines, _) = $weights.as_chunks::<PANEL>();
        let (columns, _) = $x.as_chunks::<$rows>();
        for (line, x) in lines.iter().zip(columns) {
            let (pairs, _) = S::as_simd_f32s(line).0.as_chunks::<2>();
            let [left, right] = pairs[$strip];
            $(
                let value = $simd.splat_f32s(x[$row]);
                $a = $simd.mul_add_f32s(value, left, $a);
                $b = $simd.mul_add_f32s(value, right, $b);
            )+
        }
        $(S::as_mut_simd_f32s(&mut $sums[$row]).0.as_chunks_mut::<2>().0[$strip] = [$a, $b];)+
    }};
}

/// A weight matrix in panels.
#[derive(Debug)]
pub struct Packed {
    inputs: usize,
    outputs: usize,
    panels: Panels,
}

/// The panels; the last one is filled up with zeros.
#[derive(Debug)]
enum Panels {
    /// They begin at `start`.
    Dense {
        values: Vec<f32>,
        start: usize,
    },
    Quantized(QuantPanels),
}

impl Packed {
    /// Packs row-major weights.
    #[must_use]
    pub fn new(dense: &Dense) -> Self {
        let (inputs, outputs) = (dense.inputs, dense.outputs);
        let length = outputs.div_ceil(PANEL) * PANEL * inputs;
        let mut values = vec![0.0; length + LINE];
        let start = values.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let panels = values[start..][..length].par_chunks_mut(PANEL * inputs.max(1));
        panels.enumerate().for_each(|(panel, values)| {
            let rows = dense.values[panel * PANEL * inputs..].chunks(inputs.max(1)).take(PANEL);
            for (column, row) in rows.enumerate() {
                for (input, value) in row.iter().enumerate() {
                    values[input * PANEL + column] = *value;
                }
            }
        });
        Self { inputs, outputs, panels: Panels::Dense { values, start } }
    }

    /// Packs quantised weights.
    #[must_use]
    pub fn quantized(quantized: &Quantized) -> Self {
        let Quantized { inputs, outputs, .. } = *quantized;
        Self { inputs, outputs, panels: Panels::Quantized(QuantPanels::new(quantized)) }
    }

    /// Values per row.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Rows.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// One row, for embeddings.
    pub(super) fn row(&self, row: usize, out: &mut [f32], write: Write) {
        let put = |(out, value): (&mut f32, f32)| match write {
            Write::Set => *out = value,
            Write::Add => *out += value,
        };
        match &self.panels {
            Panels::Dense { values, start } => {
                let panel = self.panel(&values[*start..], row / PANEL);
                out.iter_mut().zip(panel.chunks_exact(PANEL).map(|values| values[row % PANEL])).for_each(put);
            }
            Panels::Quantized(panels) => {
                let values = (0..self.inputs).map(|input| panels.weight(row, input));
                out.iter_mut().zip(values).for_each(put);
            }
        }
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    fn panel<'a>(&self, values: &'a [f32], index: usize) -> &'a [f32] {
        &values[index * PANEL * self.inputs..][..PANEL * self.inputs]
    }
}

/// One product, apart from its rows.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) arch: Arch,
    pub(super) matrix: &'a Packed,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) write: Write,
}

impl Task<'_> {
    /// Computes `rows` rows of `x` into `out`; `packed` is memory to work in.
    pub(super) fn run(self, x: &[f32], rows: usize, packed: &mut Vec<f32>, out: &mut [f32]) {
        let (inputs, outputs) = (self.matrix.inputs, self.matrix.outputs);
        let tiles = Tiles::of(rows, self.arch);
        let x = match rows {
            0 => return,
            1 => x,
            _ => {
                pack_rows(x, inputs, tiles, packed);
                packed.as_slice()
            }
        };
        let work = rows * inputs * outputs;
        // Four shares a thread: a thread that starts late leaves work to the others.
        let shares = match threads(work) {
            1 => 1,
            threads => (4 * threads).min(self.matrix.panels()),
        };
        let rows_of_out = out.chunks_exact_mut(outputs).take(rows);
        if shares == 1 {
            let out: Vec<&mut [f32]> = rows_of_out.collect();
            let share = Share { task: self, x, tiles, first_panel: 0, out };
            return self.arch.dispatch(share);
        }
        self.shares(rows_of_out, shares, x, tiles)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|share| self.arch.dispatch(share));
    }

    /// Splits the columns of `out` into shares of whole panels.
    fn shares<'a>(
        self,
        out: impl Iterator<Item = &'a mut [f32]>,
        count: usize,
        x: &'a [f32],
        tiles: Tiles,
    ) -> Vec<Share<'a>>
    where
        Self: 'a,
    {
        let first = |share: usize| share * self.matrix.panels() / count;
        let mut shares: Vec<Share<'a>> = (0..count)
            .map(|share| Share { task: self, x, tiles, first_panel: first(share), out: Vec::new() })
            .collect();
        for mut row in out {
            for (index, share) in shares.iter_mut().enumerate() {
                let columns = (first(index + 1) - first(index)) * PANEL;
                let (mine, rest) = row.split_at_mut(columns.min(row.len()));
                share.out.push(mine);
                row = rest;
            }
        }
        shares
    }
}

/// How rows are divided into tiles: `count` tiles whose heights differ by at most one.
#[derive(Clone, Copy)]
struct Tiles {
    rows: usize,
    count: usize,
}

impl Tiles {
    fn of(rows: usize, arch: Arch) -> Self {
        let highest = match arch {
            #[cfg(target_arch = "x86_64")]
            Arch::V4(_) => ROWS_MAX,
            _ => ROWS_MAX / 2,
        };
        Self { rows, count: rows.div_ceil(highest) }
    }

    fn first_row(self, tile: usize) -> usize {
        tile * self.rows / self.count
    }

    fn iter(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.count).map(move |tile| {
            let first = self.first_row(tile);
            (first, self.first_row(tile + 1) - first)
        })
    }
}

/// Packs the rows of each tile input by input, as a tile reads them.
fn pack_rows(x: &[f32], inputs: usize, tiles: Tiles, packed: &mut Vec<f32>) {
    if packed.len() < x.len() {
        packed.resize(x.len(), 0.0);
    }
    for (first, height) in tiles.iter() {
        let tile = &mut packed[first * inputs..][..height * inputs];
        for (row, x) in x[first * inputs..].chunks_exact(inputs).take(height).enumerate() {
            for (values, x) in tile.chunks_exact_mut(height).zip(x) {
                values[row] = *x;
            }
        }
    }
}

/// Some panels of a product for all of its rows.
struct Share<'a> {
    task: Task<'a>,
    x: &'a [f32],
    tiles: Tiles,
    first_panel: usize,
    /// For each row, the columns of these panels.
    out: Vec<&'a mut [f32]>,
}

impl WithSimd for Share<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let inputs = self.task.matrix.inputs;
        let columns = self.out.first().map_or(0, |row| row.len());
        let panels = 0..columns.div_ceil(PANEL);
        let matrix = self.task.matrix;
        match &matrix.panels {
            Panels::Dense { values, start } => {
                for panel in panels {
                    let weights = matrix.panel(&values[*start..], self.first_panel + panel);
                    for (first, height) in self.tiles.iter() {
                        let mut sums = [[0.0; PANEL]; ROWS_MAX];
                        let x = &self.x[first * inputs..][..height * inputs];
                        tile(simd, weights, x, height, &mut sums);
                        self.put(panel, first, &sums[..height]);
                    }
                }
            }
            Panels::Quantized(quantized) if self.tiles.rows == 1 => {
                let whole = panels.end / PANELS * PANELS;
                for panel in (0..whole).step_by(PANELS) {
                    let mut sums = [[0.0; PANEL]; PANELS];
                    quantized.row(simd, self.first_panel + panel, self.x, &mut sums);
                    for (index, sums) in sums.iter().enumerate() {
                        self.put(panel + index, 0, std::slice::from_ref(sums));
                    }
                }
                self.unpacked(simd, quantized, whole..panels.end);
            }
            Panels::Quantized(quantized) => self.unpacked(simd, quantized, panels),
        }
    }
}

impl Share<'_> {
    /// The products with weights that are unpacked a chunk at a time.
    #[inline(always)]
    fn unpacked<S: Simd>(&mut self, simd: S, quantized: &QuantPanels, panels: Range<usize>) {
        let inputs = self.task.matrix.inputs;
        let mut chunk: Chunk = [0.0; CHUNK * PANEL];
        let mut sums = vec![[[0.0; PANEL]; ROWS_MAX]; self.tiles.count];
        for panel in panels {
            sums.fill([[0.0; PANEL]; ROWS_MAX]);
            for start in (0..inputs).step_by(CHUNK) {
                let weights = quantized.unpack(simd, self.first_panel + panel, start, &mut chunk);
                let count = weights.len() / PANEL;
                for ((first, height), sums) in self.tiles.iter().zip(&mut sums) {
                    let x = &self.x[first * inputs + start * height..][..count * height];
                    tile(simd, weights, x, height, sums);
                }
            }
            for ((first, height), sums) in self.tiles.iter().zip(&sums) {
                self.put(panel, first, &sums[..height]);
            }
        }
    }

    /// Adds the bias and writes a tile's sums to their place.
    #[inline(always)]
    fn put(&mut self, panel: usize, first_row: usize, sums: &[[f32; PANEL]]) {
        let mut bias = [0.0; PANEL];
        if let Some(values) = self.task.bias {
            let values = &values[(self.first_panel + panel) * PANEL..];
            bias.iter_mut().zip(values).for_each(|(bias, value)| *bias = *value);
        }
        for (sums, out) in sums.iter().zip(&mut self.out[first_row..]) {
            let out = &mut out[panel * PANEL..];
            match out.first_chunk_mut::<PANEL>() {
                // The length is known here, so this becomes a few vector instructions.
                Some(out) => put_row(sums, &bias, self.task.write, out),
                None => put_row(sums, &bias, self.task.write, out),
            }
        }
    }
}

#[inline(always)]
fn put_row(sums: &[f32; PANEL], bias: &[f32; PANEL], write: Write, out: &mut [f32]) {
    let sums = sums.iter().zip(bias).map(|(sum, bias)| sum + bias);
    match write {
        Write::Set => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum),
        Write::Add => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
    }
}

type Sums = [[f32; PANEL]; ROWS_MAX];

/// The sums of a tile's packed rows for all outputs of a panel, strip by strip.
#[inline(always)]
fn tile<S: Simd>(simd: S, weights: &[f32], x: &[f32], height: usize, sums: &mut Sums) {
    for strip in 0..PANEL / (2 * S::F32_LANES) {
        match height {
            1 => chains!(simd, weights, x, strip, sums; 1: 0 a0 b0),
            2 => chains!(simd, weights, x, strip, sums; 2: 0 a0 b0, 1 a1 b1),
            3 => chains!(simd, weights, x, strip, sums; 3: 0 a0 b0, 1 a1 b1, 2 a2 b2),
            4 => chains!(simd, weights, x, strip, sums; 4: 0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3),
            5 => chains!(simd, weights, x, strip, sums; 5:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4),
            6 => chains!(simd, weights, x, strip, sums; 6:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5),
            7 => chains!(simd, weights, x, strip, sums; 7:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6),
            8 => chains!(simd, weights, x, strip, sums; 8:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7),
            9 => chains!(simd, weights, x, strip, sums; 9:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7,
                8 a8 b8),
            10 => chains!(simd, weights, x, strip, sums; 10:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7,
                8 a8 b8, 9 a9 b9),
            11 => chains!(simd, weights, x, strip, sums; 11:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7,
                8 a8 b8, 9 a9 b9, 10 a10 b10),
            _ => chains!(simd, weights, x, strip, sums; 12:
                0 a0 b0, 1 a1 b1, 2 a2 b2, 3 a3 b3, 4 a4 b4, 5 a5 b5, 6 a6 b6, 7 a7 b7,
                8 a8 b8, 9 a9 b9, 10 a10 b10, 11 a11 b11),
        }
    }
}

#[cfg(test)]
mod tests {
    use rayon::ThreadPoolBuilder;

    use super::*;

    /// Numbers without a pattern, from a linear congruence.
    fn noise(length: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..length).map(|_| next()).collect()
    }

    fn run(arch: Arch, matrix: &Packed, bias: &[f32], x: &[f32], rows: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows * matrix.outputs()];
        let task = Task { arch, matrix, bias: Some(bias), write: Write::Set };
        task.run(x, rows, &mut Vec::new(), &mut out);
        out
    }

    /// Sizes of real models and odd ones.
    const SHAPES: [(usize, usize); 7] = [(1, 1), (7, 5), (64, 33), (45, 135), (896, 70), (4864, 40), (12, 643)];

    fn same(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
    }

    /// For every shape: the matrix, a bias, 33 rows and the result of each row alone.
    fn for_shapes(check: impl Fn(&Packed, &[f32], &[f32], &[f32])) {
        for (inputs, outputs) in SHAPES {
            let values = noise(inputs * outputs, 1);
            let matrix = Packed::new(&Dense { outputs, inputs, values });
            let (bias, x) = (noise(outputs, 2), noise(33 * inputs, 3));
            let rows = x.chunks(inputs).map(|x| run(Arch::new(), &matrix, &bias, x, 1));
            let alone: Vec<f32> = rows.flatten().collect();
            check(&matrix, &bias, &x, &alone);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_batch() {
        for_shapes(|matrix, bias, x, alone| {
            for rows in 1..=33 {
                let x = &x[..rows * matrix.inputs()];
                let batch = run(Arch::new(), matrix, bias, x, rows);
                assert!(same(&batch, &alone[..rows * matrix.outputs()]), "{rows} rows");
            }
        });
    }

    fn archs() -> Vec<Arch> {
        let mut all = vec![Arch::new(), Arch::Scalar];
        #[cfg(target_arch = "x86_64")]
        all.extend(pulp::x86::V3::try_new().map(Arch::V3));
        all
    }

    #[test]
    fn a_row_has_the_same_bits_on_every_instruction_set() {
        let others = archs();
        for_shapes(|matrix, bias, x, alone| {
            for arch in &others {
                assert!(same(&run(*arch, matrix, bias, x, 33), alone), "{arch:?}");
            }
        });
    }

    #[test]
    fn a_row_has_the_same_bits_on_any_number_of_threads() {
        let (inputs, outputs) = (896, 1300);
        let matrix = Packed::new(&Dense { outputs, inputs, values: noise(inputs * outputs, 1) });
        let (bias, x) = (noise(outputs, 2), noise(33 * inputs, 3));
        let alone = run(Arch::new(), &matrix, &bias, &x, 33);
        for threads in [2, 3, 5] {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(same(&alone, &pool.install(|| run(Arch::new(), &matrix, &bias, &x, 33))));
        }
    }

    #[test]
    fn the_sums_are_right() {
        for_shapes(|matrix, bias, x, alone| {
            let inputs = matrix.inputs();
            for (row, out) in alone.chunks(matrix.outputs()).enumerate() {
                for (column, out) in out.iter().enumerate() {
                    let mut weights = vec![0.0; inputs];
                    matrix.row(column, &mut weights, Write::Set);
                    let pairs = x[row * inputs..].iter().zip(&weights);
                    let exact: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    assert!((f64::from(*out - bias[column]) - exact).abs() < 1e-3);
                }
            }
        });
    }

    /// Quants without a pattern; `bits` and minimums as the formats have them.
    fn quants(outputs: usize, inputs: usize, (block, bits, minimums): (usize, u8, bool)) -> Quantized {
        #[expect(clippy::cast_possible_truncation, reason = "values below one")]
        let whole = noise(inputs * outputs, 5).into_iter().map(|value| (value * 127.0) as i8);
        let (lowest, quants) = match bits {
            4 => (-8, whole.map(|quant| quant >> 4).collect()),
            _ => (i8::MIN, whole.collect()),
        };
        let blocks = inputs / block * outputs;
        let minimums = minimums.then(|| noise(blocks, 7));
        // As few bits as those of the formats.
        let scales = noise(blocks, 6).into_iter().map(|scale| half::f16::from_f32(scale).to_f32() * 61.0).collect();
        Quantized { outputs, inputs, block, lowest, bits, quants, scales, minimums }
    }

    #[test]
    fn a_quantised_product_is_that_of_the_weights_it_stands_for_bit_for_bit() {
        for (inputs, outputs) in [(32, 7), (64, 33), (896, 70), (4864, 40), (160, 643)] {
            for kind in [(32, 4, false), (32, 4, true), (32, 8, false), (32, 8, true), (16, 8, false)] {
                let quantized = quants(outputs, inputs, kind);
                let dense = Packed::new(&Dense { outputs, inputs, values: quantized.values() });
                let matrix = Packed::quantized(&quantized);
                let (bias, x) = (noise(outputs, 2), noise(33 * inputs, 3));
                for rows in [1, 2, 8, 12, 13, 33] {
                    let x = &x[..rows * inputs];
                    for arch in archs() {
                        let alone = run(arch, &dense, &bias, x, rows);
                        assert!(
                            same(&run(arch, &matrix, &bias, x, rows), &alone),
                            "{inputs} {outputs} {kind:?} {rows}"
                        );
                    }
                }
                for row in [0, outputs / 2, outputs - 1] {
                    let (mut one, mut other) = (vec![0.0; inputs], vec![0.0; inputs]);
                    matrix.row(row, &mut one, Write::Set);
                    dense.row(row, &mut other, Write::Set);
                    assert!(same(&one, &other));
                }
            }
        }
    }

    #[test]
    fn joined_parts_keep_their_values() {
        let kinds = [(32, 4, false), (32, 4, true), (32, 8, true), (16, 8, false)];
        for above in kinds {
            for below in kinds {
                let (mut joined, below) = (quants(3, 64, above), quants(2, 64, below));
                let values = [joined.values(), below.values()].concat();
                joined.append(below);
                assert!(same(&joined.values(), &values));
                assert!(same(&joined.reordered(|row| 4 - row).values()[..64], &values[256..]));
            }
        }
    }

    #[test]
    fn results_can_be_added() {
        let matrix = Packed::new(&Dense { outputs: 40, inputs: 3, values: noise(120, 1) });
        let x = noise(6, 2);
        let set = run(Arch::new(), &matrix, &[0.0; 40], &x, 2);
        let mut out = vec![1.0; 80];
        let task = Task { arch: Arch::new(), matrix: &matrix, bias: None, write: Write::Add };
        task.run(&x, 2, &mut Vec::new(), &mut out);
        assert!(out.iter().zip(set).all(|(out, set)| *out == 1.0 + set));
    }
}
