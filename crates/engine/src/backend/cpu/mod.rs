//! The reference backend: float32 on the processor, with vector instructions chosen at run time.
//!
//! Never here: unsafe code (pulp wraps the instructions), or a sum whose order depends on the
//! instruction set. Every chain uses fused multiply-adds in one order, so AVX2, AVX-512 and plain
//! code give the same bits.

mod attention;
mod elementwise;
mod product;
mod quantized;

use std::cell::Cell;
use std::sync::Arc;

use pulp::Arch;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::backend::{Angles, Backend, Batch, Dense, Heads, Write};
use crate::config::Activation;
use crate::error::LoadError;
use crate::quantized::Quantized;
pub use attention::Cache;
use elementwise::{Activate, ActivateGated, AddScaled, Cap, LayerNorm, NormHeads, RmsNorm, Rotate};
pub use product::Packed;

/// Below so many multiply-adds a second thread costs more than it gives: waking one takes some
/// ten microseconds, in which a core does about this much.
const PARALLEL_WORK: usize = 1 << 20;

/// A cache line in values; weights and blocks start on one.
const LINE: usize = 16;

/// A model of at most so many weights is computed in lanes: each core reads all weights from its
/// own cache, and meets the others once per step. Larger ones are better read once by all.
const LANE_WEIGHTS_MAX: usize = 1 << 20;

/// The CPU as a backend.
#[derive(Debug)]
pub struct Cpu {
    arch: Arch,
    pool: Option<Arc<ThreadPool>>,
}

thread_local! {
    /// Packed rows of a product's input, kept between calls. Taken while in use, so that a product
    /// that a thread comes upon while it waits inside another one finds it empty, not taken.
    static PACKED_ROWS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl Cpu {
    /// A backend on so many threads (0: as many as the machine has).
    ///
    /// # Errors
    /// When the system refuses the threads.
    pub fn new(threads: usize) -> Result<Self, LoadError> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            _ => threads,
        };
        let pool = match threads {
            1 => None,
            _ => Some(Arc::new(
                ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("genmill-cpu-{index}"))
                    .build()
                    .map_err(|source| LoadError::Threads { threads, source })?,
            )),
        };
        Ok(Self { arch: Arch::new(), pool })
    }
}

#[cfg(test)]
impl Cpu {
    /// One thread with these instructions.
    pub(crate) fn with_arch(arch: Arch) -> Self {
        Self { arch, pool: None }
    }
}

/// How many threads a kernel of so many multiply-adds may use here. Outside of the pool's threads
/// (see [`Backend::pool`]) it is one.
fn threads(work: usize) -> usize {
    if work < PARALLEL_WORK || rayon::current_thread_index().is_none() { 1 } else { rayon::current_num_threads() }
}

/// Calls `each` for every row of `width` values in `out`, on several threads when it pays off.
fn for_rows(out: &mut [f32], width: usize, work: usize, each: impl Fn(usize, &mut [f32]) + Send + Sync) {
    if threads(work) == 1 {
        out.chunks_mut(width).enumerate().for_each(|(row, out)| each(row, out));
    } else {
        out.par_chunks_mut(width).enumerate().for_each(|(row, out)| each(row, out));
    }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Matrix = Packed;
    type Cache = Cache;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn level(&self) -> String {
        // Every instruction set gives the same bits (a test compares them), so that a worker on
        // another machine can repeat an answer.
        "fma".to_owned()
    }

    fn instructions(&self) -> String {
        match self.arch {
            Arch::Scalar => "portable".to_owned(),
            #[cfg(target_arch = "x86_64")]
            Arch::V3(_) => "x86-64-v3".to_owned(),
            #[cfg(target_arch = "x86_64")]
            Arch::V4(_) => "x86-64-v4".to_owned(),
            other => format!("{other:?}").to_lowercase(),
        }
    }

    fn matrix(&self, dense: Dense) -> Packed {
        Packed::new(&dense)
    }

    fn quantized(&self, quantized: Quantized) -> Packed {
        Packed::quantized(&quantized)
    }

    fn upload(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn zeros(&self, length: usize) -> Vec<f32> {
        vec![0.0; length]
    }

    fn read<'a>(&'a self, buffer: &'a mut Vec<f32>, length: usize) -> &'a [f32] {
        &buffer[..length]
    }

    fn cache(&self, layers: usize, blocks: usize, heads: &Heads) -> Cache {
        Cache::new(layers, blocks, heads)
    }

    fn move_blocks(&self, from: &mut Cache, to: &mut Cache, batch: &Batch) {
        to.take_blocks(from, batch);
    }

    fn drop_blocks(&self, cache: &mut Cache, blocks: &[u32]) {
        cache.drop_blocks(blocks);
    }

    fn pool(&self) -> Option<Arc<ThreadPool>> {
        self.pool.clone()
    }

    fn lanes(&self, weights: usize) -> usize {
        match &self.pool {
            Some(pool) if weights <= LANE_WEIGHTS_MAX => pool.current_num_threads(),
            _ => 1,
        }
    }

    fn side_by_side<T: Send>(&self, parts: Vec<T>, each: impl Fn(T) + Send + Sync) {
        match rayon::current_thread_index() {
            Some(_) => parts.into_par_iter().with_max_len(1).for_each(each),
            None => parts.into_iter().for_each(each),
        }
    }

    fn embed(&self, table: &Packed, ids: &[u32], out: &mut Vec<f32>, write: Write) {
        for (id, out) in ids.iter().zip(out.chunks_mut(table.inputs())) {
            table.row(*id as usize, out, write);
        }
    }

    fn product(
        &self,
        matrix: &Packed,
        bias: Option<&Vec<f32>>,
        (x, rows): (&Vec<f32>, usize),
        out: &mut Vec<f32>,
        write: Write,
    ) {
        let task = product::Task { arch: self.arch, matrix, bias: bias.map(Vec::as_slice), write };
        let mut packed = PACKED_ROWS.take();
        task.run(&x[..rows * matrix.inputs()], rows, &mut packed, out);
        PACKED_ROWS.set(packed);
    }

    fn rms_norm(
        &self,
        (x, rows): (&Vec<f32>, usize),
        (weight, epsilon): (&Vec<f32>, f32),
        out: &mut Vec<f32>,
        write: Write,
    ) {
        let (arch, width) = (self.arch, weight.len());
        for_rows(&mut out[..rows * width], width, 4 * rows * width, |row, out| {
            let x = &x[row * width..][..width];
            arch.dispatch(RmsNorm { x, weight, epsilon, out, write });
        });
    }

    fn norm_heads(
        &self,
        (qkv, rows): (&mut Vec<f32>, usize),
        heads: &Heads,
        (queries, keys): (&Vec<f32>, &Vec<f32>),
        epsilon: f32,
    ) {
        let (arch, stride) = (self.arch, heads.qkv_width());
        for_rows(&mut qkv[..rows * stride], stride, 4 * rows * stride, |_, qkv| {
            let (query_part, rest) = qkv.split_at_mut(heads.queries * heads.width);
            arch.dispatch(NormHeads { heads: query_part, weight: queries, epsilon });
            let key_part = &mut rest[..heads.keys * heads.width];
            arch.dispatch(NormHeads { heads: key_part, weight: keys, epsilon });
        });
    }

    fn layer_norm(
        &self,
        (x, rows): (&Vec<f32>, usize),
        (weight, bias, epsilon): (&Vec<f32>, &Vec<f32>, f32),
        out: &mut Vec<f32>,
        write: Write,
    ) {
        let (arch, width) = (self.arch, weight.len());
        for_rows(&mut out[..rows * width], width, 4 * rows * width, |row, out| {
            let x = &x[row * width..][..width];
            arch.dispatch(LayerNorm { x, weight, bias, epsilon, out, write });
        });
    }

    fn rotate(&self, qkv: &mut Vec<f32>, batch: &Batch, heads: &Heads, angles: &Angles<Vec<f32>>) {
        let (arch, width, stride) = (self.arch, heads.width, heads.qkv_width());
        let rotated = (heads.queries + heads.keys) * width;
        let rows = batch.rows();
        for_rows(&mut qkv[..rows * stride], stride, 4 * rows * stride, |row, qkv| {
            let angles = &angles.table[angles.start(batch, row)..][..angles.width];
            arch.dispatch(Rotate { heads: &mut qkv[..rotated], width, angles });
        });
    }

    fn store(&self, cache: &mut Cache, layer: usize, qkv: &Vec<f32>, (batch, heads): (&Batch, &Heads)) {
        cache.store(layer, qkv, (batch, heads));
    }

    fn attend(
        &self,
        (cache, layer): (&Cache, usize),
        qkv: &Vec<f32>,
        (batch, heads): (&Batch, &Heads),
        out: &mut Vec<f32>,
    ) {
        cache.attend((self.arch, layer), qkv, (batch, heads), out);
    }

    fn activate(&self, activation: Activation, (x, rows): (&Vec<f32>, usize), width: usize, out: &mut Vec<f32>) {
        let arch = self.arch;
        for_rows(&mut out[..rows * width], width, 16 * rows * width, |row, out| {
            let x = &x[row * width..][..width];
            arch.dispatch(Activate { activation, x, out });
        });
    }

    fn activate_gated(&self, activation: Activation, (x, rows): (&Vec<f32>, usize), width: usize, out: &mut Vec<f32>) {
        let arch = self.arch;
        for_rows(&mut out[..rows * width], width, 16 * rows * width, |row, out| {
            let (gate, up) = x[2 * row * width..][..2 * width].split_at(width);
            arch.dispatch(ActivateGated { gates: Activate { activation, x: gate, out }, up });
        });
    }

    fn pick(&self, x: &Vec<f32>, rows: &[u32], width: usize, out: &mut Vec<f32>) {
        for (row, out) in rows.iter().zip(out.chunks_mut(width)) {
            out.copy_from_slice(&x[*row as usize * width..][..width]);
        }
    }

    fn add_rows(&self, x: &Vec<f32>, rows: &[(u32, f32)], width: usize, out: &mut Vec<f32>) {
        for ((row, factor), x) in rows.iter().zip(x.chunks_exact(width)) {
            let out = &mut out[*row as usize * width..][..width];
            self.arch.dispatch(AddScaled { x, factor: *factor, out });
        }
    }

    fn scale(&self, x: &mut Vec<f32>, length: usize, factor: f32) {
        x[..length].iter_mut().for_each(|x| *x *= factor);
    }

    fn cap(&self, x: &mut Vec<f32>, length: usize, cap: f32) {
        const PART: usize = 4096;
        let arch = self.arch;
        for_rows(&mut x[..length], PART, 16 * length, |_, x| arch.dispatch(Cap { x, cap }));
    }
}
