//! Causal attention over paged keys and values, one query row at a time.
//!
//! Never here: a product whose shape depends on the chunk or on other sequences. A row walks over
//! its own blocks from first to last: all scores, their maximum, all exponentials and their sum,
//! then the weighted values, each in a fixed order. With a window it begins at the block of the
//! first token that it sees; where that is depends on its position alone. Rows and heads are independent, so they may be
//! computed on any thread; the query heads that share a key head take a block while it is near.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::backend::cpu::{LINE, threads};
use crate::backend::{Batch, Heads};
use crate::kv::BLOCK_TOKENS;
use crate::math;

/// The keys and values of all layers. A block gets its memory with its first token.
#[derive(Debug)]
pub struct Cache {
    blocks: Vec<Block>,
    layers: usize,
    /// Values of one layer's keys in a block, and as many of its values.
    half: usize,
}

/// For each layer, the keys of a block's tokens, `[key head][width][token]`: tokens are innermost,
/// so the scores of a block's tokens fill a vector without any sum across lanes. Then their values,
/// `[key head][token][width]`.
#[derive(Debug, Default)]
struct Block {
    values: Vec<f32>,
    /// Where they start: on a cache line.
    start: usize,
}

impl Block {
    fn new(length: usize) -> Self {
        let values = vec![0.0; length + LINE];
        let start = values.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Self { values, start }
    }
}

impl Cache {
    pub(super) fn new(layers: usize, blocks: usize, heads: &Heads) -> Self {
        let half = heads.keys * heads.width * BLOCK_TOKENS;
        Self { blocks: (0..blocks).map(|_| Block::default()).collect(), layers, half }
    }

    /// Overwrites everything, to show that nothing stale is read.
    #[cfg(test)]
    pub(crate) fn fill(&mut self, value: f32) {
        for block in &mut self.blocks {
            *block = Block::new(self.layers * 2 * self.half);
            block.values.fill(value);
        }
    }

    pub(super) fn take_blocks(&mut self, from: &mut Self, batch: &Batch) {
        let length = self.layers * 2 * self.half;
        for (index, block) in batch.tables.iter().enumerate() {
            let (mine, theirs) = (&mut self.blocks[*block as usize], &mut from.blocks[*block as usize]);
            if !mine.values.is_empty() || theirs.values.is_empty() {
                continue;
            }
            if batch.shared.get(index).is_some_and(|shared| *shared) {
                *mine = Block::new(length);
                let (to, from) = (mine.start, theirs.start);
                mine.values[to..][..length].copy_from_slice(&theirs.values[from..][..length]);
            } else {
                std::mem::swap(mine, theirs);
            }
        }
    }

    pub(super) fn drop_blocks(&mut self, blocks: &[u32]) {
        for block in blocks {
            self.blocks[*block as usize] = Block::default();
        }
    }

    /// A block's keys and values in one layer.
    #[inline(always)]
    fn block(&self, block: u32, layer: usize) -> (&[f32], &[f32]) {
        let block = &self.blocks[block as usize];
        block.values[block.start + layer * 2 * self.half..][..2 * self.half].split_at(self.half)
    }

    fn block_mut(&mut self, block: u32, layer: usize) -> (&mut [f32], &mut [f32]) {
        let (layers, half) = (self.layers, self.half);
        let block = &mut self.blocks[block as usize];
        if block.values.is_empty() {
            *block = Block::new(layers * 2 * half);
        }
        block.values[block.start + layer * 2 * half..][..2 * half].split_at_mut(half)
    }

    pub(super) fn store(&mut self, layer: usize, qkv: &[f32], (batch, heads): (&Batch, &Heads)) {
        let size = heads.width * BLOCK_TOKENS;
        for (row, qkv) in qkv.chunks_exact(heads.qkv_width()).take(batch.rows()).enumerate() {
            let position = batch.positions[row] as usize;
            let table = &batch.tables[batch.row_tables[row].clone()];
            let slot = position % BLOCK_TOKENS;
            let (block_keys, block_values) = self.block_mut(table[position / BLOCK_TOKENS], layer);
            let (keys, values) = qkv[heads.queries * heads.width..].split_at(heads.keys * heads.width);
            for (place, key) in block_keys.chunks_exact_mut(BLOCK_TOKENS).zip(keys) {
                place[slot] = *key;
            }
            for (block, value) in block_values.chunks_exact_mut(size).zip(values.chunks_exact(heads.width)) {
                block[slot * heads.width..][..heads.width].copy_from_slice(value);
            }
        }
    }

    pub(super) fn attend(
        &self,
        (arch, layer): (Arch, usize),
        qkv: &[f32],
        (batch, heads): (&Batch, &Heads),
        out: &mut [f32],
    ) {
        let group = heads.queries / heads.keys * heads.width;
        let out = &mut out[..batch.rows() * heads.queries * heads.width];
        let each = |scores: &mut Vec<f32>, index: usize, out: &mut [f32]| {
            let (row, head) = (index / heads.keys, index % heads.keys);
            let queries = &qkv[row * heads.qkv_width() + head * group..][..group];
            arch.dispatch(Attend {
                cache: (self, layer),
                table: &batch.tables[batch.row_tables[row].clone()],
                tokens: heads.seen(batch.positions[row]),
                head,
                heads: *heads,
                queries,
                scores,
                out,
            });
        };
        let tokens: usize = batch.positions.iter().map(|position| heads.seen(*position).len()).sum();
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
    cache: (&'a Cache, usize),
    table: &'a [u32],
    /// The positions that the row sees, its own at the end.
    tokens: Range<usize>,
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
        let first_block = self.tokens.start / BLOCK_TOKENS;
        let end_block = self.tokens.end.div_ceil(BLOCK_TOKENS);
        // From here on positions count from the first token of the first block.
        let tokens = self.tokens.start % BLOCK_TOKENS..self.tokens.end - first_block * BLOCK_TOKENS;
        let stride = (end_block - first_block) * BLOCK_TOKENS;
        let length = self.queries.len() / width * stride;
        if self.scores.len() < length {
            self.scores.resize(length, 0.0);
        }
        let (cache, layer) = self.cache;
        let blocks = || self.table[first_block..end_block].iter().enumerate();
        let scores = &mut self.scores[..length];
        for (index, block) in blocks() {
            let (keys, _) = cache.block(*block, layer).0[self.heads.range(self.head)].as_chunks();
            let rows = self.queries.chunks_exact(width).zip(scores.chunks_exact_mut(stride));
            for (query, scores) in rows {
                let scores = &mut scores[index * BLOCK_TOKENS..][..BLOCK_TOKENS];
                score(simd, query, keys, self.heads.scale, scores);
                if let Some(cap) = self.heads.cap {
                    scores.iter_mut().for_each(|score| *score = math::cap(*score, cap));
                }
            }
        }
        self.out.fill(0.0);
        for scores in scores.chunks_exact_mut(stride) {
            normalise(scores, &tokens);
        }
        for (index, block) in blocks() {
            let first = index * BLOCK_TOKENS;
            let end = (first + BLOCK_TOKENS).min(tokens.end);
            let values = &cache.block(*block, layer).1[self.heads.range(self.head)];
            let rows = self.out.chunks_exact_mut(width).zip(scores.chunks_exact(stride));
            for (out, weights) in rows {
                add_values(simd, &weights[first..end], values, out);
            }
        }
    }
}

impl Heads {
    /// Where one head's part stands in a block's keys or values of a layer.
    #[inline(always)]
    fn range(&self, head: usize) -> Range<usize> {
        let size = self.width * BLOCK_TOKENS;
        head * size..(head + 1) * size
    }

    /// The positions that the row at a position sees.
    fn seen(&self, position: u32) -> Range<usize> {
        let end = position as usize + 1;
        end.saturating_sub(self.window.unwrap_or(end))..end
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

/// Turns the scores of these tokens into weights that sum to 1; those before and behind them (of
/// the first and the last block) become 0.
#[inline(always)]
fn normalise(scores: &mut [f32], tokens: &Range<usize>) {
    scores[..tokens.start].fill(f32::NEG_INFINITY);
    scores[tokens.end..].fill(f32::NEG_INFINITY);
    // A NaN may be passed over here; it shows up in the exponentials.
    let largest = math::largest(scores);
    for score in &mut *scores {
        *score = math::exp(*score - largest);
    }
    scores[..tokens.start].fill(0.0);
    scores[tokens.end..].fill(0.0);
    let share = 1.0 / math::sum(scores, |x, sum| x + sum);
    for score in scores {
        *score *= share;
    }
}

/// Adds a block's weighted values: a sum over its tokens, in four chains whose tokens take turns.
#[inline(always)]
fn add_values<S: Simd>(simd: S, weights: &[f32], values: &[f32], out: &mut [f32]) {
    let width = out.len();
    // The usual widths, so that all places are known when this is compiled.
    match (width % S::F32_LANES, width / S::F32_LANES) {
        (0, 1) => add_vectors::<S, 1>(simd, weights, values, out),
        (0, 2) => add_vectors::<S, 2>(simd, weights, values, out),
        (0, 4) => add_vectors::<S, 4>(simd, weights, values, out),
        (0, 8) => add_vectors::<S, 8>(simd, weights, values, out),
        (0, 16) => add_vectors::<S, 16>(simd, weights, values, out),
        _ => add_any(simd, weights, values, out),
    }
}

/// [`add_values`] for a width of so many vectors.
#[inline(always)]
fn add_vectors<S: Simd, const VECTORS: usize>(simd: S, weights: &[f32], values: &[f32], out: &mut [f32]) {
    let (tokens, _) = S::as_simd_f32s(values).0.as_chunks::<VECTORS>();
    let Some(out) = S::as_mut_simd_f32s(out).0.first_chunk_mut::<VECTORS>() else { return };
    match (weights.first_chunk::<BLOCK_TOKENS>(), tokens.first_chunk::<BLOCK_TOKENS>()) {
        (Some(weights), Some(tokens)) => add_tokens::<S, VECTORS>(simd, weights, tokens, out),
        _ => add_tokens::<S, VECTORS>(simd, weights, tokens, out),
    }
}

#[inline(always)]
fn add_tokens<S: Simd, const VECTORS: usize>(
    simd: S,
    weights: &[f32],
    tokens: &[[S::f32s; VECTORS]],
    out: &mut [S::f32s; VECTORS],
) {
    let zero = simd.splat_f32s(0.0);
    let step = |sum, weight: f32, value| simd.mul_add_f32s(simd.splat_f32s(weight), value, sum);
    let (four, rest) = weights.as_chunks::<4>();
    let (turns, _) = tokens.as_chunks::<4>();
    for index in 0..VECTORS {
        let (mut a, mut b, mut c, mut d) = (zero, zero, zero, zero);
        for (weights, tokens) in four.iter().zip(turns) {
            a = step(a, weights[0], tokens[0][index]);
            b = step(b, weights[1], tokens[1][index]);
            c = step(c, weights[2], tokens[2][index]);
            d = step(d, weights[3], tokens[3][index]);
        }
        for (weight, token) in rest.iter().zip(&tokens[4 * four.len()..]) {
            a = step(a, *weight, token[index]);
        }
        let sum = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        out[index] = simd.add_f32s(out[index], sum);
    }
}

/// [`add_values`] for any width.
#[inline(always)]
fn add_any<S: Simd>(simd: S, weights: &[f32], values: &[f32], out: &mut [f32]) {
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
