//! The kernels as functions: names, grids and structs of parameters, in the order in which the `.cu` files have them.
//!
//! Never here: what a model is made of (the decoder), or which rows a step has (`work.rs`).

use crate::backend::cuda::device::{Address, Adds, Device, DeviceError, Dtype, Launch, Params, Product, Written};
use crate::backend::{Heads, Write};
use crate::config::Activation;
use crate::gguf::Format;
use crate::kv::BLOCK_TOKENS;
use crate::raw::Order;

/// Widths of heads that attention is compiled for; those below 64 are of tests' models.
pub(crate) const HEAD_WIDTHS: [usize; 9] = [8, 16, 24, 32, 64, 80, 96, 128, 256];

/// Tokens whose attention is one sum on its way, see attention.cuh.
pub(crate) const CHUNK_TOKENS: usize = 256;

/// Tiles of a chunk, each computed by a warp of decode.
const CHUNK_TILES: usize = 4;

/// Pairs of a token and a query head that a warp of attention computes.
pub(crate) const WARP_PAIRS: usize = 16;

const WARP: u32 = 32;
const NORM_THREADS: u32 = 256;
const ELEMENT_THREADS: u32 = 256;
const ROPE_THREADS: u32 = 128;
const DECODE_THREADS: u32 = 128;
const SAMPLER_THREADS: u32 = 512;
const QUANTIZED_THREADS: u32 = 128;
const STORED_THREADS: u32 = 256;

/// Outputs and rows that a block of a product with quantised weights makes.
const QUANTIZED_TILE: [usize; 2] = [16, 64];

/// Values of a quantised row that a thread or a step takes at once.
pub(crate) const QUANTIZED_STEP: usize = 32;
const QUANTIZED_VALUES: usize = 8;

/// A device with the element type of a model.
#[derive(Debug)]
pub(crate) struct Kernels<D> {
    pub(crate) device: D,
    pub(crate) dtype: Dtype,
}

/// The rows of a norm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub(crate) x: Address,
    /// Added to before it is normed, or nothing.
    pub(crate) residual: Address,
    pub(crate) weight: Address,
    /// Of a layer norm, or nothing.
    pub(crate) bias: Address,
    pub(crate) out: Address,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) epsilon: f32,
    pub(crate) write: Write,
}

/// What is done with a fused row of queries, keys and values. Nothing stands for a part that is left out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rope {
    pub(crate) qkv: Address,
    pub(crate) query_norm: Address,
    pub(crate) key_norm: Address,
    pub(crate) epsilon: f32,
    pub(crate) angles: Address,
    /// Values of a head that are rotated.
    pub(crate) rotated: usize,
    /// Positions of a table of angles and the longest sequence with the first of two.
    pub(crate) switch: Option<(usize, usize)>,
    pub(crate) key_cache: Address,
    pub(crate) value_cache: Address,
}

/// Arrays with an entry for each row of a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowArrays {
    pub(crate) rows: usize,
    pub(crate) positions: Address,
    pub(crate) lengths: Address,
    pub(crate) slots: Address,
    pub(crate) table_starts: Address,
    pub(crate) tables: Address,
}

/// Attention of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    pub(crate) qkv: Address,
    pub(crate) key_cache: Address,
    pub(crate) value_cache: Address,
    pub(crate) out: Address,
    pub(crate) arrays: RowArrays,
}

/// Rows of decode that are computed together, see `work.rs`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecodeWork {
    /// For each row its number and its first partial result.
    pub(crate) work: Address,
    pub(crate) rows: usize,
    /// Chunks of the longest of them.
    pub(crate) chunks: usize,
    /// How many of them run side by side; the others take turns. It changes no bit.
    pub(crate) at_once: usize,
    pub(crate) partials: Address,
    pub(crate) stats: Address,
}

/// Quantised weights on a device, see quantized.cu.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quants {
    pub(crate) quants: Address,
    pub(crate) scales: Address,
    /// Or nothing.
    pub(crate) minimums: Address,
    pub(crate) block: usize,
    pub(crate) lowest: i8,
    /// Quants in a byte: 1 or 2.
    pub(crate) in_byte: usize,
}

/// What a sampler reads and writes; see sampler.cu.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) logits: Address,
    pub(crate) shaped: Address,
    pub(crate) rows: Address,
    pub(crate) entries: Address,
    pub(crate) masks: Address,
    /// Tokens of the step's rows.
    pub(crate) inputs: Address,
    pub(crate) ids: Address,
    pub(crate) logprobs: Address,
    pub(crate) top_ids: Address,
    pub(crate) top_logprobs: Address,
    pub(crate) count: usize,
    pub(crate) vocabulary: usize,
    pub(crate) top: usize,
}

impl<D: Device> Kernels<D> {
    pub(crate) fn norm(&self, norm: &Norm) -> Result<(), DeviceError> {
        let kernel = if norm.bias == 0 { "rms_norm" } else { "layer_norm" };
        let pointers = [norm.x, norm.residual, norm.weight, norm.bias, norm.out];
        let params = Params::default().pointers(&pointers).numbers(&[norm.width]).float(norm.epsilon);
        self.launch(kernel, [norm.rows, 1, 1], (NORM_THREADS, 0), params.numbers(&[adds(norm.write)]))
    }

    /// `activation(x)` for `count` values.
    pub(crate) fn activate(
        &self,
        activation: Activation,
        [x, out]: [Address; 2],
        count: usize,
    ) -> Result<(), DeviceError> {
        let params = Params::default().pointers(&[x, out]).numbers(&[count, 1, activation_code(activation), 0]);
        self.elementwise("activate", count, params)
    }

    /// `activation(gate) * up` for rows of `width` gates and as many ups; `count` values come out.
    pub(crate) fn activate_gated(
        &self,
        activation: Activation,
        [x, out]: [Address; 2],
        (count, width): (usize, usize),
    ) -> Result<(), DeviceError> {
        let params = Params::default().pointers(&[x, out]).numbers(&[count, width, activation_code(activation), 1]);
        self.elementwise("activate", count, params)
    }

    /// `out` row `i` is row `rows[i]` of `x`, or has it added.
    pub(crate) fn gather_rows(
        &self,
        [x, rows, out]: [Address; 3],
        (count, width): (usize, usize),
        write: Write,
    ) -> Result<(), DeviceError> {
        let params = Params::default().pointers(&[x, rows, out]).numbers(&[count * width, width, adds(write)]);
        self.elementwise("gather_rows", count * width, params)
    }

    /// `out` row `rows[i]` has row `i` of `x` added, times `factors[i]`.
    pub(crate) fn add_rows(
        &self,
        [x, rows, factors, out]: [Address; 4],
        (count, width): (usize, usize),
    ) -> Result<(), DeviceError> {
        let params = Params::default().pointers(&[x, rows, factors, out]).numbers(&[count * width, width]);
        self.elementwise("add_rows", count * width, params)
    }

    pub(crate) fn scale(&self, x: Address, count: usize, factor: f32) -> Result<(), DeviceError> {
        self.elementwise("scale", count, Params::default().pointer(x).numbers(&[count]).float(factor))
    }

    /// Rounds float32 values to the element type.
    pub(crate) fn narrow(&self, [x, out]: [Address; 2], count: usize) -> Result<(), DeviceError> {
        self.elementwise("narrow", count, Params::default().pointers(&[x, out]).numbers(&[count]))
    }

    /// `cap * tanh(x / cap)` of float32 values.
    pub(crate) fn cap_logits(&self, x: Address, count: usize, cap: f32) -> Result<(), DeviceError> {
        let params = Params::default().pointer(x).numbers(&[count]).float(cap);
        let grid = [count.div_ceil(ELEMENT_THREADS as usize), 1, 1];
        self.start("cap_logits_f32".to_owned(), grid, (ELEMENT_THREADS, 0), params)
    }

    pub(crate) fn rope_store(&self, rope: &Rope, arrays: &RowArrays, heads: &Heads) -> Result<(), DeviceError> {
        let (positions, longest) = rope.switch.unwrap_or((0, usize::MAX));
        let params = Params::default()
            .pointers(&[rope.qkv, rope.query_norm, rope.key_norm, rope.angles])
            .pointers(&[arrays.positions, arrays.lengths, arrays.slots, rope.key_cache, rope.value_cache])
            .numbers(&[arrays.rows, heads.queries, heads.keys, heads.width, rope.rotated, positions, longest])
            .float(rope.epsilon);
        let warps = arrays.rows * (heads.queries + 2 * heads.keys);
        let grid = [warps.div_ceil((ROPE_THREADS / WARP) as usize), 1, 1];
        self.launch("rope_store", grid, (ROPE_THREADS, 0), params)
    }

    /// Attention of rows that are alone of their sequence.
    pub(crate) fn decode(&self, attention: &Attention, heads: &Heads, work: &DecodeWork) -> Result<(), DeviceError> {
        let group = heads.queries / heads.keys;
        let parts = heads.keys * group.div_ceil(WARP_PAIRS);
        let shared = CHUNK_TILES * group.min(WARP_PAIRS) * heads.width * size_of::<f32>();
        let params = || attention.params(heads, work.work, [work.partials, work.stats]);
        let grid = [work.rows, parts, work.chunks.min(work.at_once)];
        let threads = (DECODE_THREADS, shared);
        self.launch(&named("decode", heads), grid, threads, params())?;
        if work.chunks > 1 {
            let grid = [work.rows, heads.queries, 1];
            self.launch(&named("combine", heads), grid, (DECODE_THREADS, 0), params())?;
        }
        Ok(())
    }

    /// Attention of tiles of consecutive rows, each told by its sequence's first row, that run's rows, and the first of
    /// its pairs.
    pub(crate) fn prefill(
        &self,
        attention: &Attention,
        heads: &Heads,
        (work, tiles): (Address, usize),
    ) -> Result<(), DeviceError> {
        let warps = prefill_warps(heads.width);
        let shared = warps * WARP_PAIRS * heads.width * size_of::<f32>();
        let threads = u32::try_from(warps).unwrap_or(1) * WARP;
        let params = attention.params(heads, work, [0; 2]);
        self.launch(&named("prefill", heads), [tiles, heads.keys, 1], (threads, shared), params)
    }

    pub(crate) fn sample(&self, sample: &Sample) -> Result<(), DeviceError> {
        let params = Params::default()
            .pointers(&[sample.logits, sample.shaped, sample.rows, sample.entries, sample.masks])
            .pointers(&[sample.inputs, sample.ids, sample.logprobs, sample.top_ids, sample.top_logprobs])
            .numbers(&[sample.vocabulary, sample.top]);
        self.start("sample_f32".to_owned(), [sample.count, 1, 1], (SAMPLER_THREADS, 0), params)
    }

    /// A product whose weights are quantised; those of `product` are not looked at.
    pub(crate) fn quantized_product(&self, quants: &Quants, product: &Product) -> Result<(), DeviceError> {
        let Product { x, bias, out, rows, outputs, inputs, written, adds, .. } = *product;
        let flags = [usize::from(written == Written::Single), usize::from(adds == Adds::Yes)];
        let params = Params::default()
            .pointers(&[quants.quants, quants.scales, quants.minimums, x, bias, out])
            .numbers(&[rows, outputs, inputs, quants.block, quants.lowest_word(), quants.in_byte - 1])
            .numbers(&flags);
        let grid = [outputs.div_ceil(QUANTIZED_TILE[0]), rows.div_ceil(QUANTIZED_TILE[1]), 1];
        self.launch("quantized", grid, (QUANTIZED_THREADS, 0), params)
    }

    /// Rows of a quantised table, as `gather_rows`.
    pub(crate) fn quantized_rows(
        &self,
        quants: &Quants,
        [rows, out]: [Address; 2],
        (count, width): (usize, usize),
        write: Write,
    ) -> Result<(), DeviceError> {
        let params = Params::default()
            .pointers(&[quants.quants, quants.scales, quants.minimums, rows, out])
            .numbers(&[count * width, width, quants.block, quants.lowest_word(), quants.in_byte - 1, adds(write)]);
        let threads = (count * width).div_ceil(QUANTIZED_VALUES);
        let grid = [threads.div_ceil(QUANTIZED_THREADS as usize), 1, 1];
        self.launch("quantized_rows", grid, (QUANTIZED_THREADS, 0), params)
    }

    /// Values of a piece of a file in the element type, at their places in `[outputs, inputs]`.
    pub(crate) fn convert(&self, piece: &Piece, out: Address) -> Result<(), DeviceError> {
        let Piece { at, size: [outputs, inputs], first, count, .. } = *piece;
        let columns = usize::from(piece.order == Order::Columns);
        let params = Params::default().pointers(&[at, out]).numbers(&[first, count, outputs, inputs]);
        let params = params.numbers(&[piece.kind(), columns, piece.pairs()]);
        self.launch("convert", stored_grid(count), (STORED_THREADS, 0), params)
    }

    /// Blocks of a piece of a file, unpacked to their places in quantised weights.
    pub(crate) fn unpack(&self, piece: &Piece, to: &Quants) -> Result<(), DeviceError> {
        let Piece { at, format, size: [_, inputs], first, count, .. } = *piece;
        let params = Params::default()
            .pointers(&[at, to.quants, to.scales, to.minimums])
            .numbers(&[first, count, inputs, piece.kind(), format.values, format.bytes])
            .numbers(&[to.block, to.lowest_word(), to.in_byte - 1, piece.pairs()]);
        self.start("unpack_u8".to_owned(), stored_grid(count / QUANTIZED_VALUES), (STORED_THREADS, 0), params)
    }

    /// Values of a piece of a file as q8_0, at their places in quantised weights.
    pub(crate) fn quantize(&self, piece: &Piece, to: &Quants) -> Result<(), DeviceError> {
        let Piece { at, size: [_, inputs], first, count, .. } = *piece;
        let params = Params::default().pointers(&[at, to.quants, to.scales]);
        let params = params.numbers(&[first, count, inputs, piece.kind(), piece.pairs()]);
        self.start("quantize_u8".to_owned(), stored_grid(count / to.block), (STORED_THREADS, 0), params)
    }

    /// Puts tokens that were chosen before in place of ids that stand for them.
    pub(crate) fn resolve(
        &self,
        [ids, chosen]: [Address; 2],
        count: usize,
        vocabulary: usize,
    ) -> Result<(), DeviceError> {
        let params = Params::default().pointers(&[ids, chosen]).numbers(&[count, vocabulary]);
        let grid = [count.div_ceil(ELEMENT_THREADS as usize), 1, 1];
        self.start("resolve_u32".to_owned(), grid, (ELEMENT_THREADS, 0), params)
    }

    fn elementwise(&self, kernel: &str, count: usize, params: Params) -> Result<(), DeviceError> {
        if u32::try_from(count).is_err() {
            // The kernels count in 32 bits, and would leave out the rest.
            let (doing, message) = (format!("starting {kernel}"), format!("{count} values are too many"));
            return Err(DeviceError { doing, message });
        }
        let grid = [count.div_ceil(ELEMENT_THREADS as usize), 1, 1];
        self.launch(kernel, grid, (ELEMENT_THREADS, 0), params)
    }

    /// Starts the variant of a kernel for the element type, which stands before the first width in its name.
    fn launch(&self, kernel: &str, grid: [usize; 3], block: (u32, usize), params: Params) -> Result<(), DeviceError> {
        let name = match kernel.split_once(':') {
            Some((kernel, width)) => format!("{kernel}_{}_{width}", self.dtype.suffix()),
            None => format!("{kernel}_{}", self.dtype.suffix()),
        };
        self.start(name, grid, block, params)
    }

    fn start(
        &self,
        kernel: String,
        grid: [usize; 3],
        (threads, shared): (u32, usize),
        params: Params,
    ) -> Result<(), DeviceError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let limit =
            |_| DeviceError { doing: format!("starting {kernel}"), message: "the grid is too large".to_owned() };
        let grid = grid.map(u32::try_from);
        let [x, y, z] = grid;
        let grid = [x.map_err(limit)?, y.map_err(limit)?, z.map_err(limit)?];
        let shared_bytes = u32::try_from(shared).unwrap_or(u32::MAX);
        self.device.launch(&Launch { kernel, grid, threads, shared_bytes, params })
    }
}

/// A piece of a file's weights on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) at: Address,
    pub(crate) format: &'static Format,
    pub(crate) order: Order,
    /// Outputs and inputs of the whole.
    pub(crate) size: [usize; 2],
    /// The number of its first value in the file, and how many it has.
    pub(crate) first: usize,
    pub(crate) count: usize,
}

impl Piece {
    /// The number that GGUF files have for its type.
    fn kind(&self) -> usize {
        self.format.id as usize
    }

    /// Rows of a head, where they lie as pairs.
    fn pairs(&self) -> usize {
        match self.order {
            Order::Pairs(width) => width,
            Order::Rows | Order::Columns => 0,
        }
    }
}

impl Quants {
    /// The bits of the smallest quant as a number of 32.
    fn lowest_word(&self) -> usize {
        i32::from(self.lowest).cast_unsigned() as usize
    }
}

impl Attention {
    fn params(&self, heads: &Heads, work: Address, [partials, stats]: [Address; 2]) -> Params {
        let RowArrays { positions, table_starts, tables, .. } = self.arrays;
        Params::default()
            .pointers(&[self.qkv, self.key_cache, self.value_cache, self.out, positions, table_starts, tables])
            .pointers(&[work, partials, stats])
            .numbers(&[heads.queries, heads.keys, heads.window.unwrap_or(usize::MAX)])
            .float(heads.scale)
            .float(heads.cap.unwrap_or(0.0))
    }
}

/// Blocks for so many threads that work on a piece of a file.
const fn stored_grid(threads: usize) -> [usize; 3] {
    [threads.div_ceil(STORED_THREADS as usize), 1, 1]
}

/// The name of a kernel of attention, with the width apart.
fn named(kernel: &str, heads: &Heads) -> String {
    format!("{kernel}:{}", heads.width)
}

/// Warps of a block of prefill, as prefill.cu has them.
pub(crate) const fn prefill_warps(width: usize) -> usize {
    if width > 128 { 2 } else { 4 }
}

/// Values of a layer's keys in a block of the cache, and as many of its values.
pub(crate) const fn block_values(heads: &Heads) -> usize {
    heads.keys * heads.width * BLOCK_TOKENS
}

const fn adds(write: Write) -> usize {
    match write {
        Write::Set => 0,
        Write::Add => 1,
    }
}

/// As elementwise.cu has them.
const fn activation_code(activation: Activation) -> usize {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::GeluErf => 2,
        Activation::Relu => 3,
    }
}
