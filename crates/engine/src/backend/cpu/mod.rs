//! The reference backend: float32 on the processor, with vector instructions chosen at run time.
//!
//! Never here: unsafe code (pulp wraps the instructions), or a sum whose order depends on the
//! instruction set. Every chain uses fused multiply-adds in one order, so AVX2, AVX-512 and plain
//! code give the same bits.

mod attention;
mod elementwise;
mod product;

use std::sync::{Mutex, PoisonError};

use pulp::Arch;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::backend::{Backend, Batch, Dense, Heads, Write};
use crate::config::Activation;
use crate::error::LoadError;
use elementwise::{Activate, ActivateGated, LayerNorm, RmsNorm, Rotate};
pub use product::Packed;

/// Below so many multiply-adds a second thread costs more than it gives: waking one takes some
/// ten microseconds, in which a core does about this much.
const PARALLEL_WORK: usize = 1 << 20;

/// The CPU as a backend.
#[derive(Debug)]
pub struct Cpu {
    arch: Arch,
    pool: Option<ThreadPool>,
    /// Packed rows of a product's input, kept between calls.
    packed_rows: Mutex<Vec<f32>>,
}

/// Keys and values of all layers.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<attention::LayerCache>,
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
            _ => Some(
                ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("genmill-cpu-{index}"))
                    .build()
                    .map_err(|source| LoadError::Threads { threads, source })?,
            ),
        };
        Ok(Self { arch: Arch::new(), pool, packed_rows: Mutex::default() })
    }
}

#[cfg(test)]
impl Cpu {
    /// One thread with these instructions.
    pub(crate) fn with_arch(arch: Arch) -> Self {
        Self { arch, pool: None, packed_rows: Mutex::default() }
    }
}

#[cfg(test)]
impl Cache {
    /// Overwrites everything, to show that nothing stale is read.
    pub(crate) fn fill(&mut self, value: f32) {
        self.layers.iter_mut().for_each(|layer| layer.fill(value));
    }
}

/// How many threads a kernel of so many multiply-adds may use here. Outside of the pool's threads
/// (see [`Backend::enter`]) it is one.
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

    fn upload(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn zeros(&self, length: usize) -> Vec<f32> {
        vec![0.0; length]
    }

    fn read<'a>(&'a self, buffer: &'a Vec<f32>, length: usize) -> &'a [f32] {
        &buffer[..length]
    }

    fn cache(&self, layers: usize, blocks: usize, heads: &Heads) -> Cache {
        Cache { layers: (0..layers).map(|_| attention::LayerCache::new(blocks, heads)).collect() }
    }

    fn enter<R: Send>(&self, work: usize, step: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            // Handing a step to the pool and back costs two wake-ups, so a small one stays here.
            Some(pool) if work >= 4 * PARALLEL_WORK => pool.install(step),
            _ => step(),
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
        let mut packed = self.packed_rows.lock().unwrap_or_else(PoisonError::into_inner);
        task.run(&x[..rows * matrix.inputs()], rows, &mut packed, out);
    }

    fn rms_norm(&self, (x, rows): (&Vec<f32>, usize), weight: &Vec<f32>, epsilon: f32, out: &mut Vec<f32>) {
        let (arch, width) = (self.arch, weight.len());
        for_rows(&mut out[..rows * width], width, 4 * rows * width, |row, out| {
            let x = &x[row * width..][..width];
            arch.dispatch(RmsNorm { x, weight, epsilon, out });
        });
    }

    fn layer_norm(
        &self,
        (x, rows): (&Vec<f32>, usize),
        (weight, bias): (&Vec<f32>, &Vec<f32>),
        epsilon: f32,
        out: &mut Vec<f32>,
    ) {
        let (arch, width) = (self.arch, weight.len());
        for_rows(&mut out[..rows * width], width, 4 * rows * width, |row, out| {
            let x = &x[row * width..][..width];
            arch.dispatch(LayerNorm { x, weight, bias, epsilon, out });
        });
    }

    fn rotate(&self, qkv: &mut Vec<f32>, batch: &Batch, heads: &Heads, table: &Vec<f32>) {
        let (arch, width, stride) = (self.arch, heads.width, heads.qkv_width());
        let rotated = (heads.queries + heads.keys) * width;
        let rows = batch.rows();
        for_rows(&mut qkv[..rows * stride], stride, 4 * rows * stride, |row, qkv| {
            let angles = &table[batch.positions[row] as usize * width..][..width];
            arch.dispatch(Rotate { heads: &mut qkv[..rotated], angles });
        });
    }

    fn store(&self, cache: &mut Cache, layer: usize, qkv: &Vec<f32>, (batch, heads): (&Batch, &Heads)) {
        cache.layers[layer].store(qkv, batch, heads);
    }

    fn attend(
        &self,
        (cache, layer): (&Cache, usize),
        qkv: &Vec<f32>,
        (batch, heads): (&Batch, &Heads),
        out: &mut Vec<f32>,
    ) {
        cache.layers[layer].attend(self.arch, qkv, (batch, heads), out);
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
}
