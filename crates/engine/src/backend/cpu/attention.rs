//! Causal attention over paged keys and values, one query row at a time.
//!
//! Never here: a product whose shape depends on the chunk or on other sequences. A row walks over
//! its own blocks from first to last: all scores, their maximum, all exponentials and their sum,
//! then the weighted values, each in a fixed order. Rows and heads are independent, so they may be
//! computed on any thread; the query heads that share a key head take a block while it is near.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::backend::cpu::threads;
use crate::backend::{Batch, Heads};
use crate::kv::BLOCK_TOKENS;
use crate::math;

/// The keys and values of one layer.
#[derive(Debug)]
pub(super) struct LayerCache {
    /// `[block][key head][width][token]`: tokens are innermost, so the scores of a block's tokens
    /// fill a vector without any sum across lanes.
    keys: Vec<f32>,
    /// `[block][key head][token][width]`.
    values: Vec<f32>,
}

impl LayerCache {
    pub(super) fn new(blocks: usize, heads: &Heads) -> Self {
        let length = blocks * heads.keys * heads.width * BLOCK_TOKENS;
        Self { keys: vec![0.0; length], values: vec![0.0; length] }
    }

    #[cfg(test)]
    pub(super) fn fill(&mut self, value: f32) {
        self.keys.fill(value);
        self.values.fill(value);
    }

    pub(super) fn store(&mut self, qkv: &[f32], batch: &Batch, heads: &Heads) {
        let size = heads.width * BLOCK_TOKENS;
        for (row, qkv) in qkv.chunks_exact(heads.qkv_width()).take(batch.rows()).enumerate() {
            let position = batch.positions[row] as usize;
            let table = &batch.tables[batch.row_tables[row].clone()];
            let first = table[position / BLOCK_TOKENS] as usize * heads.keys * size;
            let slot = position % BLOCK_TOKENS;
            let (keys, values) = qkv[heads.queries * heads.width..].split_at(heads.keys * heads.width);
            for (head, key) in keys.chunks_exact(heads.width).enumerate() {
                let block = &mut self.keys[first + head * size..][..size];
                for (place, key) in block.chunks_exact_mut(BLOCK_TOKENS).zip(key) {
                    place[slot] = *key;
                }
            }
            for (head, value) in values.chunks_exact(heads.width).enumerate() {
                let block = &mut self.values[first + head * size..][..size];
                block[slot * heads.width..][..heads.width].copy_from_slice(value);
            }
        }
    }

    pub(super) fn attend(&self, arch: Arch, qkv: &[f32], (batch, heads): (&Batch, &Heads), out: &mut [f32]) {
        let group = heads.queries / heads.keys * heads.width;
        let out = &mut out[..batch.rows() * heads.queries * heads.width];
        let each = |scores: &mut Vec<f32>, index: usize, out: &mut [f32]| {
            let (row, head) = (index / heads.keys, index % heads.keys);
            let queries = &qkv[row * heads.qkv_width() + head * group..][..group];
            arch.dispatch(Attend {
                layer: self,
                table: &batch.tables[batch.row_tables[row].clone()],
                tokens: batch.positions[row] as usize + 1,
                head,
                heads: *heads,
                queries,
                scores,
                out,
            });
        };
        let tokens: usize = batch.positions.iter().map(|position| *position as usize + 1).sum();
        if threads(2 * tokens * heads.queries * heads.width) == 1 {
            let mut scores = Vec::new();
            out.chunks_mut(group).enumerate().for_each(|(i, out)| each(&mut scores, i, out));
        } else {
            out.par_chunks_mut(group).enumerate().for_each_init(Vec::new, |scores, (i, out)| each(scores, i, out));
        }
    }
}

/// The kernel: the queries of one row that share a key head, on their way through its blocks.
struct Attend<'a> {
    layer: &'a LayerCache,
    table: &'a [u32],
    /// How many tokens the row sees, itself included.
    tokens: usize,
    head: usize,
    heads: Heads,
    queries: &'a [f32],
    scores: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.heads.width;
        let stride = self.tokens.next_multiple_of(BLOCK_TOKENS);
        let length = self.queries.len() / width * stride;
        if self.scores.len() < length {
            self.scores.resize(length, 0.0);
        }
        let blocks = || self.table.iter().take(stride / BLOCK_TOKENS).enumerate();
        let scores = &mut self.scores[..length];
        for (index, block) in blocks() {
            let (keys, _) = self.layer.keys[self.heads.range(*block, self.head)].as_chunks();
            let rows = self.queries.chunks_exact(width).zip(scores.chunks_exact_mut(stride));
            for (query, scores) in rows {
                let scores = &mut scores[index * BLOCK_TOKENS..][..BLOCK_TOKENS];
                score(simd, query, keys, self.heads.scale, scores);
            }
        }
        self.out.fill(0.0);
        for scores in scores.chunks_exact_mut(stride) {
            normalise(scores, self.tokens);
        }
        for (index, block) in blocks() {
            let first = index * BLOCK_TOKENS;
            let tokens = BLOCK_TOKENS.min(self.tokens - first);
            let values = &self.layer.values[self.heads.range(*block, self.head)];
            let rows = self.out.chunks_exact_mut(width).zip(scores.chunks_exact(stride));
            for (out, weights) in rows {
                add_values(simd, &weights[first..first + tokens], values, out);
            }
        }
    }
}

impl Heads {
    /// Where one head's part of a block stands in a layer's keys or values.
    #[inline(always)]
    fn range(&self, block: u32, head: usize) -> Range<usize> {
        let size = self.width * BLOCK_TOKENS;
        let first = (block as usize * self.keys + head) * size;
        first..first + size
    }
}

/// The scores of a block's tokens: a sum over the head's width, in four chains whose places take
/// turns.
#[inline(always)]
fn score<S: Simd>(simd: S, query: &[f32], keys: &[[f32; BLOCK_TOKENS]], scale: f32, scores: &mut [f32]) {
    let zero = simd.splat_f32s(0.0);
    let scale = simd.splat_f32s(scale);
    for (index, scores) in S::as_mut_simd_f32s(scores).0.iter_mut().enumerate() {
        let (mut a, mut b, mut c, mut d) = (zero, zero, zero, zero);
        let step = |q: f32, keys: &[f32; BLOCK_TOKENS], sum| {
            simd.mul_add_f32s(simd.splat_f32s(q), S::as_simd_f32s(keys).0[index], sum)
        };
        let (turns, rest) = keys.as_chunks::<4>();
        let (queries, queries_rest) = query.as_chunks::<4>();
        for (keys, q) in turns.iter().zip(queries) {
            a = step(q[0], &keys[0], a);
            b = step(q[1], &keys[1], b);
            c = step(q[2], &keys[2], c);
            d = step(q[3], &keys[3], d);
        }
        for (keys, q) in rest.iter().zip(queries_rest) {
            a = step(*q, keys, a);
        }
        let sum = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        *scores = simd.mul_f32s(sum, scale);
    }
}

/// Turns the scores of the first `tokens` tokens into weights that sum to 1; those behind them
/// (left over from the last block) become 0.
#[inline(always)]
fn normalise(scores: &mut [f32], tokens: usize) {
    scores[tokens..].fill(f32::NEG_INFINITY);
    // A NaN may be passed over here; it shows up in the exponentials.
    let largest = math::largest(scores);
    for score in &mut *scores {
        *score = math::exp(*score - largest);
    }
    scores[tokens..].fill(0.0);
    let share = 1.0 / math::sum(scores, |x, sum| x + sum);
    for score in scores {
        *score *= share;
    }
}

/// Adds a block's weighted values: a sum over its tokens, in four chains whose tokens take turns.
#[inline(always)]
fn add_values<S: Simd>(simd: S, weights: &[f32], values: &[f32], out: &mut [f32]) {
    let width = out.len();
    let (vectors, rest) = S::as_mut_simd_f32s(out);
    let done = width - rest.len();
    for (index, out) in vectors.iter_mut().enumerate() {
        let first = index * S::F32_LANES;
        let value = |values: &[f32]| S::as_simd_f32s(&values[first..first + S::F32_LANES]).0[0];
        let step = |sum, weight: f32, values: &[f32]| simd.mul_add_f32s(simd.splat_f32s(weight), value(values), sum);
        let add = |a, b| simd.add_f32s(a, b);
        let sum = turns(simd.splat_f32s(0.0), weights, (values, width), step, add);
        *out = simd.add_f32s(*out, sum);
    }
    for (index, out) in rest.iter_mut().enumerate() {
        let step = |sum, weight: f32, values: &[f32]| weight.mul_add(values[done + index], sum);
        *out += turns(0.0, weights, (values, width), step, |a, b| a + b);
    }
}

/// Four chains over a block's tokens, joined at the end.
#[inline(always)]
fn turns<T: Copy>(
    zero: T,
    weights: &[f32],
    (values, width): (&[f32], usize),
    step: impl Fn(T, f32, &[f32]) -> T,
    add: impl Fn(T, T) -> T,
) -> T {
    let (mut a, mut b, mut c, mut d) = (zero, zero, zero, zero);
    let (four, rest) = weights.as_chunks::<4>();
    let mut values = values;
    for weights in four {
        let (now, later) = values.split_at(4 * width);
        a = step(a, weights[0], now);
        b = step(b, weights[1], &now[width..]);
        c = step(c, weights[2], &now[2 * width..]);
        d = step(d, weights[3], &now[3 * width..]);
        values = later;
    }
    for (weight, values) in rest.iter().zip(values.chunks_exact(width)) {
        a = step(a, *weight, values);
    }
    add(add(a, b), add(c, d))
}
