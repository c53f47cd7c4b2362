//! The kernels a decoder is made of, as a trait; buffers are opaque, so a device may hold them.
//!
//! Never here: which kernels make a model (that is the decoder), scheduling, sampling.
//!
//! Every backend keeps this promise: a row's result depends on that row's input alone, never on
//! how many rows are computed with it, on their order, or on how the work is split. The CPU does
//! it by giving each output element one fixed chain of operations, and by tiling around chains,
//! never through them.

pub mod cpu;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod cuda;

use std::ops::Range;
use std::sync::Arc;

use rayon::ThreadPool;

use crate::ask::{Ask, Chosen};
use crate::config::Activation;
use crate::error::LoadError;
use crate::measure::Widths;
use crate::quantized::{Format, Quantized};
use crate::raw::Raw;

/// Row-major values on their way to a backend.
#[derive(Debug)]
pub struct Dense {
    /// Rows of the matrix, that is outputs of a projection or tokens of an embedding.
    pub outputs: usize,
    /// Values per row.
    pub inputs: usize,
    /// `outputs * inputs` values.
    pub values: Vec<f32>,
}

/// What happens with a kernel's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// It replaces what was there.
    Set,
    /// It is added to what was there.
    Add,
}

/// The heads of one layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key and value heads.
    pub keys: usize,
    /// Width of a head.
    pub width: usize,
    /// What scores are multiplied with.
    pub scale: f32,
    /// Scores then become `cap * tanh(score / cap)`, where there is a cap.
    pub cap: Option<f32>,
    /// How many tokens a row sees, itself included, where that is limited.
    pub window: Option<usize>,
}

impl Heads {
    /// Width of a row of fused queries, keys and values, in this order.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.queries + 2 * self.keys) * self.width
    }
}

/// The angles by which queries and keys are rotated.
#[derive(Debug)]
pub struct Angles<B> {
    /// For each position `width / 2` cosines, then as many sines; the same again for the rows of
    /// longer sequences.
    pub table: B,
    /// How many values of a head are rotated, the first half of them with the second.
    pub width: usize,
    /// The positions of one table and the longest sequence, in tokens, whose rows have the first
    /// of two tables.
    pub switch: Option<(usize, usize)>,
}

impl<B> Angles<B> {
    /// Where the angles of a row begin.
    #[must_use]
    pub fn start(&self, batch: &Batch, row: usize) -> usize {
        let second = match self.switch {
            Some((positions, longest)) if batch.lengths[row] as usize > longest => positions,
            _ => 0,
        };
        (second + batch.positions[row] as usize) * self.width
    }
}

/// The rows of one step: consecutive tokens of some sequences, one row per token.
#[derive(Debug, Default)]
pub struct Batch {
    /// The token of each row.
    pub ids: Vec<u32>,
    /// The position of each row in its sequence.
    pub positions: Vec<u32>,
    /// The known tokens of each row's sequence, also those that come in later steps.
    pub lengths: Vec<u32>,
    /// For each row, the part of `tables` that is its sequence's block table.
    pub row_tables: Vec<Range<usize>>,
    /// The block tables of all sequences: entry `i` of one holds its tokens
    /// `i * BLOCK_TOKENS ..`.
    pub tables: Vec<u32>,
    /// For each entry of `tables`, whether other sequences read this block too.
    pub shared: Vec<bool>,
    /// The rows whose logits are wanted, ascending.
    pub outputs: Vec<u32>,
}

impl Batch {
    /// Forgets all rows and keeps the memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.lengths.clear();
        self.row_tables.clear();
        self.tables.clear();
        self.shared.clear();
        self.outputs.clear();
    }

    /// Adds the next tokens of a sequence of which `known` tokens are known by now, the first at
    /// position `start`; `blocks` is its table.
    pub fn push(&mut self, ids: &[u32], start: usize, known: usize, blocks: &[u32]) {
        let table = self.tables.len()..self.tables.len() + blocks.len();
        self.tables.extend_from_slice(blocks);
        for (offset, id) in ids.iter().enumerate() {
            self.ids.push(*id);
            // Positions are below the context length, which config.json keeps below 2^28.
            self.positions.push(u32::try_from(start + offset).unwrap_or(u32::MAX));
            self.lengths.push(u32::try_from(known).unwrap_or(u32::MAX));
            self.row_tables.push(table.clone());
        }
    }

    /// Marks the blocks of the sequence added last that others read too.
    pub fn share(&mut self, is_shared: impl Fn(u32) -> bool) {
        let known = self.shared.len();
        self.shared.extend(self.tables[known..].iter().map(|block| is_shared(*block)));
    }

    /// Asks for the logits of the row added last.
    pub fn want_logits(&mut self) {
        self.want_logits_of(1);
    }

    /// Asks for the logits of so many rows added last.
    pub fn want_logits_of(&mut self, rows: usize) {
        let rows = self.ids.len().saturating_sub(rows)..self.ids.len();
        self.outputs.extend(rows.map(|row| u32::try_from(row).unwrap_or(u32::MAX)));
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.ids.len()
    }
}

/// The largest step that will come.
#[derive(Clone, Copy, Debug)]
pub struct Largest {
    /// Its rows.
    pub rows: usize,
    /// Rows whose logits are wanted, and as many sequences.
    pub outputs: usize,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    /// Heads of any layer.
    pub heads: Heads,
}

/// The kernels. An input `x` is a buffer and how many of its rows are in use; buffers may be
/// longer.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Activations, norm weights, biases: float32 values.
    type Buffer: Send + Sync;
    /// The weights of a projection or an embedding.
    type Matrix: Send + Sync;
    /// Keys and values of all layers, in blocks of [`crate::kv::BLOCK_TOKENS`] tokens.
    type Cache: Send + Sync;

    /// The backend's name, for the fingerprint.
    fn name(&self) -> &'static str;

    /// What else decides the bits, such as the device's type, for the fingerprint.
    fn level(&self) -> String;

    /// The instruction set or device in use, for people.
    fn instructions(&self) -> String;

    /// The width of numbers in memory, for weights that have so many bytes as they were loaded.
    fn widths(&self, loaded_bytes: u64) -> Widths {
        Widths { weights: Some(loaded_bytes), kv_value: 4 }
    }

    /// Bytes that are free for a cache, where the backend has a memory of its own.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// Takes the memory that steps up to this size need beside buffers.
    fn reserve(&self, largest: &Largest) {
        let _ = largest;
    }

    /// Whether tokens are chosen where the logits are, with [`Self::choose`].
    fn chooses(&self) -> bool {
        false
    }

    /// Begins to choose from rows of logits of `width`, one for each of `asks`. The tokens are known where they are when
    /// the next step begins, see [`crate::ask::CHOSEN_BEFORE`].
    fn choose(&self, logits: (&Self::Buffer, usize), asks: &[Ask]) {
        let (_, _) = (logits, asks);
    }

    /// Waits for what was chosen first and not asked for yet. None when the device has failed, or nothing was.
    fn chosen(&self) -> Option<Vec<Chosen>> {
        None
    }

    /// What the device could not do, once it could not do something.
    fn fault(&self) -> Option<String> {
        None
    }

    /// Takes weights over.
    fn matrix(&self, dense: Dense) -> Self::Matrix;

    /// Takes quantised weights over. A backend without kernels for them keeps the values that they stand for.
    fn quantized(&self, quantized: Quantized) -> Self::Matrix {
        let values = quantized.values();
        self.matrix(Dense { outputs: quantized.outputs, inputs: quantized.inputs, values })
    }

    /// Whether [`Self::stored`] takes these, to be brought to a format where there is one.
    fn takes(&self, parts: &[Raw], format: Option<Format>) -> bool {
        let (_, _) = (parts, format);
        false
    }

    /// Takes weights over where they lie, the rows of all parts below each other, and tells each its hash. They become what
    /// they would have become by way of [`Self::matrix`] or [`Self::quantized`].
    ///
    /// # Errors
    /// When a file cannot be read.
    fn stored(&self, parts: &mut [Raw], format: Option<Format>) -> Result<Self::Matrix, LoadError> {
        let _ = format;
        let message = format!("the backend takes no weights as they are stored, such as {parts:?}");
        Err(LoadError::Device { message })
    }

    /// Takes values over.
    fn upload(&self, values: Vec<f32>) -> Self::Buffer;

    /// A buffer of zeros.
    fn zeros(&self, length: usize) -> Self::Buffer;

    /// A buffer of zeros for what a product makes and the host reads: float32, whatever other buffers hold.
    fn readable(&self, length: usize) -> Self::Buffer {
        self.zeros(length)
    }

    /// The first `length` values of a buffer.
    fn read<'a>(&'a self, buffer: &'a mut Self::Buffer, length: usize) -> &'a [f32];

    /// Called with the rows of each step before its kernels.
    fn begin(&self, batch: &Batch) {
        let _ = batch;
    }

    /// How many rows a step of decode is filled up to that has so many sequences, of which `most` may run; None where it
    /// stays as it is.
    fn rows_of(&self, sequences: usize, most: usize) -> Option<usize> {
        let (_, _) = (sequences, most);
        None
    }

    /// Does the kernels of a step, or repeats them as they were recorded of a step of that shape.
    fn repeat(&self, batch: &Batch, work: &mut dyn FnMut()) {
        let _ = batch;
        work();
    }

    /// An empty cache of so many blocks.
    fn cache(&self, layers: usize, blocks: usize, heads: &Heads) -> Self::Cache;

    /// Moves the blocks of a batch from one cache to another of the same shape, where they are in the first and not in
    /// the second; copies those that others read too. A lane's cache holds the blocks of its sequences; a block that can
    /// be written is in one of all caches.
    fn move_blocks(&self, from: &mut Self::Cache, to: &mut Self::Cache, batch: &Batch);

    /// Forgets what a cache holds of these blocks.
    fn drop_blocks(&self, cache: &mut Self::Cache, blocks: &[u32]);

    /// The threads that steps should run on, where there are some.
    fn pool(&self) -> Option<Arc<ThreadPool>> {
        None
    }

    /// How many lanes a model of so many weights pays off to have: parts of a step that run side by
    /// side from the first kernel to the last.
    fn lanes(&self, weights: usize) -> usize {
        let _ = weights;
        1
    }

    /// Calls `each` for every part, side by side where there are threads.
    fn side_by_side<T: Send>(&self, parts: Vec<T>, each: impl Fn(T) + Send + Sync) {
        parts.into_iter().for_each(each);
    }

    /// Rows `ids` of a table; an id may stand for a token that was chosen before, where the backend chooses.
    fn embed(&self, table: &Self::Matrix, ids: &[u32], out: &mut Self::Buffer, write: Write);

    /// `out = x W^T + bias`.
    fn product(
        &self,
        matrix: &Self::Matrix,
        bias: Option<&Self::Buffer>,
        x: (&Self::Buffer, usize),
        out: &mut Self::Buffer,
        write: Write,
    );

    /// `x / sqrt(mean(x^2) + epsilon) * weight` for each row.
    fn rms_norm(&self, x: (&Self::Buffer, usize), norm: (&Self::Buffer, f32), out: &mut Self::Buffer, write: Write);

    /// The same for each query and each key of a fused buffer, in place; their weights.
    fn norm_heads(
        &self,
        qkv: (&mut Self::Buffer, usize),
        heads: &Heads,
        weights: (&Self::Buffer, &Self::Buffer),
        epsilon: f32,
    );

    /// `(x - mean) / sqrt(variance + epsilon) * weight + bias` for each row.
    fn layer_norm(
        &self,
        x: (&Self::Buffer, usize),
        norm: (&Self::Buffer, &Self::Buffer, f32),
        out: &mut Self::Buffer,
        write: Write,
    );

    /// Rotates queries and keys of a fused buffer in place.
    fn rotate(&self, qkv: &mut Self::Buffer, batch: &Batch, heads: &Heads, angles: &Angles<Self::Buffer>);

    /// Writes the keys and values of a fused buffer to their places in the cache.
    fn store(&self, cache: &mut Self::Cache, layer: usize, qkv: &Self::Buffer, rows: (&Batch, &Heads));

    /// The norms of queries and keys, their rotation, and the write to the cache, in this order. What is none is left out.
    fn norm_rotate_store(
        &self,
        (cache, layer): (&mut Self::Cache, usize),
        qkv: &mut Self::Buffer,
        (batch, heads): (&Batch, &Heads),
        norms: Option<(&Self::Buffer, &Self::Buffer, f32)>,
        angles: Option<&Angles<Self::Buffer>>,
    ) {
        if let Some((queries, keys, epsilon)) = norms {
            self.norm_heads((qkv, batch.rows()), heads, (queries, keys), epsilon);
        }
        if let Some(angles) = angles {
            self.rotate(qkv, batch, heads, angles);
        }
        self.store(cache, layer, qkv, (batch, heads));
    }

    /// Causal attention of each row's queries over its sequence's keys and values, as far back as
    /// the heads' window.
    fn attend(&self, layer: (&Self::Cache, usize), qkv: &Self::Buffer, rows: (&Batch, &Heads), out: &mut Self::Buffer);

    /// `activation(x)` for rows of `width`.
    fn activate(&self, activation: Activation, x: (&Self::Buffer, usize), width: usize, out: &mut Self::Buffer);

    /// `activation(gate) * up` for rows that hold `width` gates, then `width` ups.
    fn activate_gated(&self, activation: Activation, x: (&Self::Buffer, usize), width: usize, out: &mut Self::Buffer);

    /// Copies the chosen rows of `width` to the front of `out`.
    fn pick(&self, x: &Self::Buffer, rows: &[u32], width: usize, out: &mut Self::Buffer);

    /// Adds row `i` of `x` times `rows[i].1` to row `rows[i].0` of `out`, for rows of `width`.
    fn add_rows(&self, x: &Self::Buffer, rows: &[(u32, f32)], width: usize, out: &mut Self::Buffer);

    /// Multiplies the first `length` values.
    fn scale(&self, x: &mut Self::Buffer, length: usize, factor: f32);

    /// `cap * tanh(x / cap)` of the first `length` values.
    fn cap(&self, x: &mut Self::Buffer, length: usize, cap: f32);
}
