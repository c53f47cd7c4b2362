//! The CUDA backend: the kernels in `kernels/`, and what starts them.
//!
//! Never here: a second way to compute a model. The decoder, the schedule and the block tables are those of the CPU.
//!
//! Weights, activations, keys and values are bfloat16 or float16; norms' weights, angles and what the host reads are
//! float32, as are all sums. Everything runs on one stream, in the order in which the decoder asks for it. The first
//! fault of the device is kept, nothing is started after it, and whatever is read then is no number, so that every
//! request ends with an error and none with a wrong token.

pub(crate) mod check;
mod choices;
pub(crate) mod device;
#[cfg(feature = "cuda")]
pub(crate) mod driver;
#[cfg(test)]
pub(crate) mod emulator;
mod graphs;
pub(crate) mod launch;
mod loading;
pub(crate) mod ring;
pub(crate) mod sampling;
mod step;
#[cfg(test)]
mod tests;
pub(crate) mod twin;
pub(crate) mod work;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::prelude::*;

use crate::ask::{Ask, Chosen};
use crate::backend::cuda::choices::Choices;
use crate::backend::cuda::device::{Address, Adds, Device, DeviceError, Dtype, Product, Written};
use crate::backend::cuda::graphs::Graphs;
use crate::backend::cuda::launch::{
    Attention, HEAD_WIDTHS, Kernels, Norm, QUANTIZED_STEP, Quants, Rope, RowArrays, block_values,
};
use crate::backend::cuda::loading::{Becomes, Scratch};
use crate::backend::cuda::step::StepArrays;
use crate::backend::{Angles, Backend, Batch, Dense, Heads, Largest, Write};
use crate::config::Activation;
use crate::error::LoadError;
use crate::measure::Widths;
use crate::quantized::{Format, Quantized};
use crate::raw::Raw;

/// A CUDA device as a backend.
#[derive(Debug)]
pub(crate) struct Cuda<D: Device> {
    kernels: Kernels<D>,
    step: Mutex<StepArrays<D>>,
    choices: Mutex<Choices<D>>,
    /// Recorded steps, where steps are recorded.
    graphs: Option<Mutex<Graphs<D>>>,
    fault: OnceLock<DeviceError>,
    /// While a model is loaded.
    scratch: Mutex<Scratch<D>>,
    /// Bytes of all weights.
    weight_bytes: AtomicU64,
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
    /// Where the weights are quantised.
    quantized: Option<Blocks<D>>,
}

/// What belongs to quants, by blocks.
#[derive(Debug)]
struct Blocks<D: Device> {
    scales: Option<D::Memory>,
    minimums: Option<D::Memory>,
    block: usize,
    lowest: i8,
    in_byte: usize,
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
        let (step, choices) = (Mutex::new(StepArrays::default()), Mutex::new(Choices::default()));
        let (scratch, weight_bytes) = (Mutex::default(), AtomicU64::new(0));
        Self { kernels, step, choices, graphs: None, fault: OnceLock::new(), scratch, weight_bytes }
    }

    /// The same with steps of decode that are recorded and repeated.
    pub(crate) fn with_graphs(self) -> Self {
        Self { graphs: Some(Mutex::default()), ..self }
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

    fn choices(&self) -> MutexGuard<'_, Choices<D>> {
        self.choices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn scratch(&self) -> MutexGuard<'_, Scratch<D>> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for weights, with anything in it.
    fn weight_room(&self, bytes: usize) -> Option<D::Memory> {
        self.weight_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.heed(|| self.device().allocate(bytes))
    }

    /// Weights.
    fn weights(&self, bytes: &[u8]) -> Option<D::Memory> {
        let memory = self.weight_room(bytes.len())?;
        self.heed(|| self.device().write(D::address(&memory), bytes))?;
        Some(memory)
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

    /// Where the weights are quantised: where they are.
    fn quants(&self) -> Option<Quants> {
        let Blocks { scales, minimums, block, lowest, in_byte } = self.quantized.as_ref()?;
        let [scales, minimums] = [scales, minimums].map(|memory| memory.as_ref().map_or(0, D::address));
        Some(Quants { quants: self.at(), scales, minimums, block: *block, lowest: *lowest, in_byte: *in_byte })
    }
}

/// Quants less the smallest that may be, one or two to a byte.
pub(crate) fn packed(quants: &[i8], lowest: i8, in_byte: usize) -> Vec<u8> {
    let above = |quant: i8| quant.wrapping_sub(lowest).cast_unsigned();
    let mut bytes = vec![0; quants.len() / in_byte];
    let parts = bytes.par_iter_mut().zip(quants.par_chunks_exact(in_byte)).with_min_len(1 << 14);
    parts.for_each(|(byte, quants)| {
        *byte = quants.iter().rev().fold(0, |byte, quant| byte << 4 | above(*quant));
    });
    bytes
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
        Widths { weights: Some(self.weight_bytes.load(Ordering::Relaxed)), kv_value: 2 }
    }

    fn free_bytes(&self) -> Option<u64> {
        self.heed(|| self.device().free_bytes())
    }

    fn reserve(&self, largest: &Largest) {
        if let Some(graphs) = &self.graphs {
            // They have the addresses of buffers that go now.
            *graphs.lock().unwrap_or_else(PoisonError::into_inner) = Graphs::default();
        }
        // All weights are there.
        *self.scratch() = Scratch::default();
        self.heed(|| {
            self.step().reserve(self.device(), largest)?;
            self.choices().reserve(self.device(), largest)
        });
    }

    fn chooses(&self) -> bool {
        true
    }

    fn choose(&self, (logits, width): (&Buffer<D>, usize), asks: &[Ask]) {
        self.heed(|| {
            let inputs = self.step().ids();
            self.choices().choose(&self.kernels, (inputs, logits.at(), width), asks)
        });
    }

    fn chosen(&self) -> Option<Vec<Chosen>> {
        self.heed(|| self.choices().take(self.device()))
    }

    fn fault(&self) -> Option<String> {
        self.fault.get().map(ToString::to_string)
    }

    fn matrix(&self, dense: Dense) -> Matrix<D> {
        let dtype = self.kernels.dtype;
        let mut bytes = vec![0; 2 * dense.values.len()];
        let pairs = bytes.as_chunks_mut().0.par_iter_mut().zip(&dense.values);
        pairs.with_min_len(1 << 14).for_each(|(bytes, value)| *bytes = dtype.round(*value).to_le_bytes());
        Matrix { memory: self.weights(&bytes), outputs: dense.outputs, inputs: dense.inputs, quantized: None }
    }

    fn quantized(&self, quantized: Quantized) -> Matrix<D> {
        let Quantized { outputs, inputs, block, lowest, bits, quants, scales, minimums } = quantized;
        if !inputs.is_multiple_of(QUANTIZED_STEP) || !block.is_multiple_of(8) {
            let quantized = Quantized { outputs, inputs, block, lowest, bits, quants, scales, minimums };
            let values = quantized.values();
            return self.matrix(Dense { outputs, inputs, values });
        }
        let in_byte = if bits == 4 { 2 } else { 1 };
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        let minimums = minimums.and_then(|minimums| self.weights(&floats(&minimums)));
        let blocks = Blocks { scales: self.weights(&floats(&scales)), minimums, block, lowest, in_byte };
        let memory = self.weights(&packed(&quants, lowest, in_byte));
        Matrix { memory, outputs, inputs, quantized: Some(blocks) }
    }

    fn takes(&self, parts: &[Raw], format: Option<Format>) -> bool {
        loading::becomes(parts, format).is_some()
    }

    fn stored(&self, parts: &mut [Raw], format: Option<Format>) -> Result<Matrix<D>, LoadError> {
        self.load(parts, loading::becomes(parts, format).unwrap_or(Becomes::Values))
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
        self.heed(|| {
            let chosen = self.choices().ids();
            self.step().begin(&self.kernels, batch, chosen)
        });
    }

    fn rows_of(&self, sequences: usize, most: usize) -> Option<usize> {
        self.graphs.as_ref().and_then(|_| graphs::rows_of(sequences, most))
    }

    fn repeat(&self, batch: &Batch, work: &mut dyn FnMut()) {
        let shape = self.graphs.as_ref().and_then(|_| self.heed(|| self.step().shape(&self.kernels, batch))?);
        match (&self.graphs, shape) {
            (Some(graphs), Some(shape)) => {
                let mut graphs = graphs.lock().unwrap_or_else(PoisonError::into_inner);
                self.heed(|| graphs.run(self.device(), shape, work));
            }
            _ => work(),
        }
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
            let size = (ids.len(), table.inputs);
            match table.quants() {
                Some(quants) => self.kernels.quantized_rows(&quants, [rows, out.at()], size, write),
                None => self.kernels.gather_rows([table.at(), rows, out.at()], size, write),
            }
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
            let product = Product {
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
            };
            match matrix.quants() {
                Some(quants) => self.kernels.quantized_product(&quants, &product),
                None => self.device().product(&product),
            }
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
