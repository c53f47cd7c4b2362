//! The CUDA backend: the kernels in `kernels/`, and what starts them.
//!
//! Never here: a second way to compute a model. The decoder, the schedule and the block tables are those of the CPU.
//!
//! Weights, activations, keys and values are bfloat16 or float16; norms' weights, angles and what the host reads are
//! float32, as are all sums. Everything runs on one stream, in the order in which the decoder asks for it. The first
//! fault of the device is kept, nothing is started after it, and whatever is read then is no number, so that every
//! request ends with an error and none with a wrong token.

pub(crate) mod check;
pub(crate) mod device;
#[cfg(feature = "cuda")]
pub(crate) mod driver;
#[cfg(test)]
pub(crate) mod emulator;
pub(crate) mod launch;
pub(crate) mod sampling;
mod step;
#[cfg(test)]
mod tests;
pub(crate) mod twin;
pub(crate) mod work;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::prelude::*;

use crate::backend::cuda::device::{Address, Adds, Device, DeviceError, Dtype, Product, Written};
use crate::backend::cuda::launch::{Attention, HEAD_WIDTHS, Kernels, Norm, Rope, RowArrays, block_values};
use crate::backend::cuda::step::StepArrays;
use crate::backend::{Angles, Backend, Batch, Dense, Heads, Write};
use crate::config::Activation;
use crate::measure::Widths;

/// A CUDA device as a backend.
#[derive(Debug)]
pub(crate) struct Cuda<D: Device> {
    kernels: Kernels<D>,
    step: Mutex<StepArrays<D>>,
    fault: OnceLock<DeviceError>,
}

/// Values on the device.
#[derive(Debug)]
pub(crate) struct Buffer<D: Device> {
    /// None where the device had no room.
    memory: Option<D::Memory>,
    written: Written,
    /// The same values in the element type, made when a product first wants them.
    narrow: OnceLock<D::Memory>,
    length: usize,
    /// What was read last.
    read: Vec<f32>,
}

/// Weights on the device, `[outputs, inputs]`.
#[derive(Debug)]
pub(crate) struct Matrix<D: Device> {
    memory: Option<D::Memory>,
    outputs: usize,
    inputs: usize,
}

/// The keys of all layers, each `[block][key head][16 tokens][width]`, then their values,
/// `[block][key head][width][16 tokens]`.
#[derive(Debug)]
pub(crate) struct Cache<D: Device> {
    memory: Option<D::Memory>,
    /// Bytes of a layer's keys, and of its values.
    half_bytes: usize,
    layers: usize,
}

impl<D: Device> Cuda<D> {
    /// A backend on a device, for weights of this type.
    pub(crate) fn new(device: D, dtype: Dtype) -> Self {
        let kernels = Kernels { device, dtype };
        Self { kernels, step: Mutex::new(StepArrays::default()), fault: OnceLock::new() }
    }

    /// Does something, unless the device has failed, and keeps what goes wrong.
    fn heed<V>(&self, doing: impl FnOnce() -> Result<V, DeviceError>) -> Option<V> {
        if self.fault.get().is_some() {
            return None;
        }
        match doing() {
            Ok(value) => Some(value),
            Err(error) => {
                tracing::error!(%error, "the device failed");
                // Steps come from one thread, and an earlier fault says more.
                drop(self.fault.set(error));
                None
            }
        }
    }

    fn device(&self) -> &D {
        &self.kernels.device
    }

    fn step(&self) -> MutexGuard<'_, StepArrays<D>> {
        // What a panic left behind is written anew at the next step's beginning.
        self.step.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, bytes: &[u8]) -> Option<D::Memory> {
        self.heed(|| {
            let memory = self.device().allocate(bytes.len())?;
            self.device().write(D::address(&memory), bytes)?;
            Ok(memory)
        })
    }

    fn blank(&self, written: Written, length: usize) -> Buffer<D> {
        let bytes = length * width_bytes(written);
        let memory = self.heed(|| {
            let memory = self.device().allocate(bytes)?;
            self.device().clear(D::address(&memory), bytes)?;
            Ok(memory)
        });
        Buffer { memory, written, narrow: OnceLock::new(), length, read: Vec::new() }
    }

    /// Where the values of a buffer are in the element type.
    fn narrowed(&self, buffer: &Buffer<D>) -> Result<Address, DeviceError> {
        if buffer.written == Written::Half {
            return Ok(buffer.at());
        }
        if let Some(memory) = buffer.narrow.get() {
            return Ok(D::address(memory));
        }
        let memory = self.device().allocate(2 * buffer.length)?;
        self.kernels.narrow([buffer.at(), D::address(&memory)], buffer.length)?;
        Ok(D::address(buffer.narrow.get_or_init(|| memory)))
    }

    fn fetch(&self, buffer: &mut Buffer<D>, length: usize) -> Option<()> {
        let mut bytes = vec![0; length * width_bytes(buffer.written)];
        self.heed(|| self.device().read(buffer.at(), &mut bytes))?;
        buffer.read.clear();
        match buffer.written {
            Written::Single => {
                buffer.read.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
            Written::Half => {
                let dtype = self.kernels.dtype;
                let halves = bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
                buffer.read.extend(halves.map(|bits| dtype.widen(bits)));
            }
        }
        Some(())
    }

    fn norm(&self, norm: &Norm) {
        self.heed(|| self.kernels.norm(norm));
    }

    fn rope(&self, rope: &Rope, heads: &Heads, arrays: RowArrays) {
        self.heed(|| self.kernels.rope_store(rope, &arrays, heads));
    }
}

const fn width_bytes(written: Written) -> usize {
    match written {
        Written::Half => 2,
        Written::Single => 4,
    }
}

impl<D: Device> Buffer<D> {
    fn at(&self) -> Address {
        self.memory.as_ref().map_or(0, D::address)
    }
}

impl<D: Device> Matrix<D> {
    fn at(&self) -> Address {
        self.memory.as_ref().map_or(0, D::address)
    }
}

impl<D: Device> Cache<D> {
    /// Where a layer's keys and values are.
    fn layer(&self, layer: usize) -> [Address; 2] {
        let start = self.memory.as_ref().map_or(0, D::address);
        [layer, self.layers + layer].map(|part| start + (part * self.half_bytes) as Address)
    }
}

/// The rotation of a buffer by these angles.
fn rotation<D: Device>(qkv: &Buffer<D>, angles: Option<&Angles<Buffer<D>>>) -> Rope {
    let rope = Rope { qkv: qkv.at(), ..Rope::default() };
    match angles {
        None => rope,
        Some(angles) => Rope { angles: angles.table.at(), rotated: angles.width, switch: angles.switch, ..rope },
    }
}

impl<D: Device> Backend for Cuda<D> {
    type Buffer = Buffer<D>;
    type Matrix = Matrix<D>;
    type Cache = Cache<D>;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn level(&self) -> String {
        self.device().name()
    }

    fn instructions(&self) -> String {
        self.device().name()
    }

    fn widths(&self, _: u64) -> Widths {
        Widths { weights: None, kv_value: 2 }
    }

    fn free_bytes(&self) -> Option<u64> {
        self.heed(|| self.device().free_bytes())
    }

    fn fault(&self) -> Option<String> {
        self.fault.get().map(ToString::to_string)
    }

    fn matrix(&self, dense: Dense) -> Matrix<D> {
        let dtype = self.kernels.dtype;
        let mut bytes = vec![0; 2 * dense.values.len()];
        let pairs = bytes.as_chunks_mut().0.par_iter_mut().zip(&dense.values);
        pairs.with_min_len(1 << 14).for_each(|(bytes, value)| *bytes = dtype.round(*value).to_le_bytes());
        Matrix { memory: self.hold(&bytes), outputs: dense.outputs, inputs: dense.inputs }
    }

    fn upload(&self, values: Vec<f32>) -> Buffer<D> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let memory = self.hold(&bytes);
        Buffer { memory, written: Written::Single, narrow: OnceLock::new(), length: values.len(), read: Vec::new() }
    }

    fn zeros(&self, length: usize) -> Buffer<D> {
        self.blank(Written::Half, length)
    }

    fn readable(&self, length: usize) -> Buffer<D> {
        self.blank(Written::Single, length)
    }

    fn read<'a>(&'a self, buffer: &'a mut Buffer<D>, length: usize) -> &'a [f32] {
        if self.fetch(buffer, length).is_none() {
            // No request must take a token from what a failed device left.
            buffer.read.clear();
            buffer.read.resize(length, f32::NAN);
        }
        &buffer.read
    }

    fn begin(&self, batch: &Batch) {
        self.heed(|| self.step().begin(&self.kernels, batch));
    }

    fn cache(&self, layers: usize, blocks: usize, heads: &Heads) -> Cache<D> {
        let half_bytes = 2 * blocks * block_values(heads);
        let memory = self.heed(|| {
            if !HEAD_WIDTHS.contains(&heads.width) {
                let message = format!("heads of {} values are not among {HEAD_WIDTHS:?}", heads.width);
                return Err(DeviceError { doing: "making the cache".to_owned(), message });
            }
            let memory = self.device().allocate(2 * layers * half_bytes)?;
            self.device().clear(D::address(&memory), 2 * layers * half_bytes)?;
            Ok(memory)
        });
        Cache { memory, half_bytes, layers }
    }

    fn move_blocks(&self, _: &mut Cache<D>, _: &mut Cache<D>, _: &Batch) {
        // There is one lane, and so one cache.
    }

    fn drop_blocks(&self, _: &mut Cache<D>, _: &[u32]) {
        // A block's memory is its own for good, and is written before it is read.
    }

    fn embed(&self, table: &Matrix<D>, ids: &[u32], out: &mut Buffer<D>, write: Write) {
        self.heed(|| {
            let rows = self.step().stage(self.device(), ids)?;
            self.kernels.gather_rows([table.at(), rows, out.at()], (ids.len(), table.inputs), write)
        });
    }

    fn product(
        &self,
        matrix: &Matrix<D>,
        bias: Option<&Buffer<D>>,
        (x, rows): (&Buffer<D>, usize),
        out: &mut Buffer<D>,
        write: Write,
    ) {
        self.heed(|| {
            self.device().product(&Product {
                dtype: self.kernels.dtype,
                weights: matrix.at(),
                x: x.at(),
                bias: bias.map(|bias| self.narrowed(bias)).transpose()?.unwrap_or(0),
                out: out.at(),
                rows,
                outputs: matrix.outputs,
                inputs: matrix.inputs,
                written: out.written,
                adds: if write == Write::Add { Adds::Yes } else { Adds::No },
            })
        });
    }

    fn rms_norm(
        &self,
        (x, rows): (&Buffer<D>, usize),
        (weight, epsilon): (&Buffer<D>, f32),
        out: &mut Buffer<D>,
        write: Write,
    ) {
        let (x, out, width) = (x.at(), out.at(), weight.length);
        self.norm(&Norm { x, residual: 0, weight: weight.at(), bias: 0, out, rows, width, epsilon, write });
    }

    fn norm_heads(
        &self,
        (qkv, rows): (&mut Buffer<D>, usize),
        heads: &Heads,
        (queries, keys): (&Buffer<D>, &Buffer<D>),
        epsilon: f32,
    ) {
        let rope = Rope { query_norm: queries.at(), key_norm: keys.at(), epsilon, ..rotation(qkv, None) };
        self.rope(&rope, heads, RowArrays { rows, ..RowArrays::default() });
    }

    fn layer_norm(
        &self,
        (x, rows): (&Buffer<D>, usize),
        (weight, bias, epsilon): (&Buffer<D>, &Buffer<D>, f32),
        out: &mut Buffer<D>,
        write: Write,
    ) {
        let (x, out, width) = (x.at(), out.at(), weight.length);
        self.norm(&Norm { x, residual: 0, weight: weight.at(), bias: bias.at(), out, rows, width, epsilon, write });
    }

    fn rotate(&self, qkv: &mut Buffer<D>, _: &Batch, heads: &Heads, angles: &Angles<Buffer<D>>) {
        self.rope(&rotation(qkv, Some(angles)), heads, self.step().arrays);
    }

    fn store(&self, cache: &mut Cache<D>, layer: usize, qkv: &Buffer<D>, (_, heads): (&Batch, &Heads)) {
        let [key_cache, value_cache] = cache.layer(layer);
        self.rope(&Rope { key_cache, value_cache, ..rotation(qkv, None) }, heads, self.step().arrays);
    }

    fn norm_rotate_store(
        &self,
        (cache, layer): (&mut Cache<D>, usize),
        qkv: &mut Buffer<D>,
        (_, heads): (&Batch, &Heads),
        norms: Option<(&Buffer<D>, &Buffer<D>, f32)>,
        angles: Option<&Angles<Buffer<D>>>,
    ) {
        let [key_cache, value_cache] = cache.layer(layer);
        let mut rope = Rope { key_cache, value_cache, ..rotation(qkv, angles) };
        if let Some((queries, keys, epsilon)) = norms {
            rope = Rope { query_norm: queries.at(), key_norm: keys.at(), epsilon, ..rope };
        }
        self.rope(&rope, heads, self.step().arrays);
    }

    fn attend(
        &self,
        (cache, layer): (&Cache<D>, usize),
        qkv: &Buffer<D>,
        (batch, heads): (&Batch, &Heads),
        out: &mut Buffer<D>,
    ) {
        let [key_cache, value_cache] = cache.layer(layer);
        self.heed(|| {
            let mut step = self.step();
            let attention = Attention { qkv: qkv.at(), key_cache, value_cache, out: out.at(), arrays: step.arrays };
            step.attend(&self.kernels, &attention, (batch, heads))
        });
    }

    fn activate(&self, activation: Activation, (x, rows): (&Buffer<D>, usize), width: usize, out: &mut Buffer<D>) {
        self.heed(|| self.kernels.activate(activation, [x.at(), out.at()], rows * width));
    }

    fn activate_gated(
        &self,
        activation: Activation,
        (x, rows): (&Buffer<D>, usize),
        width: usize,
        out: &mut Buffer<D>,
    ) {
        self.heed(|| self.kernels.activate_gated(activation, [x.at(), out.at()], (rows * width, width)));
    }

    fn pick(&self, x: &Buffer<D>, rows: &[u32], width: usize, out: &mut Buffer<D>) {
        self.heed(|| {
            let numbers = self.step().stage(self.device(), rows)?;
            self.kernels.gather_rows([x.at(), numbers, out.at()], (rows.len(), width), Write::Set)
        });
    }

    fn add_rows(&self, x: &Buffer<D>, rows: &[(u32, f32)], width: usize, out: &mut Buffer<D>) {
        let (numbers, factors): (Vec<u32>, Vec<u32>) =
            rows.iter().map(|(row, factor)| (*row, factor.to_bits())).unzip();
        self.heed(|| {
            let numbers = self.step().stage(self.device(), &numbers)?;
            let factors = self.step().stage(self.device(), &factors)?;
            self.kernels.add_rows([x.at(), numbers, factors, out.at()], (rows.len(), width))
        });
    }

    fn scale(&self, x: &mut Buffer<D>, length: usize, factor: f32) {
        self.heed(|| self.kernels.scale(x.at(), length, factor));
    }

    fn cap(&self, x: &mut Buffer<D>, length: usize, cap: f32) {
        self.heed(|| self.kernels.cap_logits(x.at(), length, cap));
    }
}
