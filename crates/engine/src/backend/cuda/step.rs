//! What a step's rows look like on the device: small arrays that are copied there once, and memory for partial results.
//!
//! Never here: values of a model.

use crate::ask::CHOSEN_BEFORE;
use crate::backend::cuda::device::{Address, Device, DeviceError};
use crate::backend::cuda::graphs::Shape;
use crate::backend::cuda::launch::{Attention, CHUNK_TOKENS, DecodeWork, Kernels, RowArrays, WARP_PAIRS};
use crate::backend::cuda::work::{self, DecodeGroup, Run};
use crate::backend::{Batch, Heads, Largest};
use crate::kv::BLOCK_TOKENS;

/// Words that are staged while a step runs, beside its rows: ids, picked rows, factors. The place of the oldest is
/// taken again after so many; the device has read them then, since it does all in order.
const RING_WORDS: usize = 1 << 18;

/// Bytes for partial results of decode. A step that needs more computes its rows in several goes.
const PARTIAL_BYTES: usize = 1 << 26;

/// Arrays with a word for each row.
const ROW_ARRAYS: usize = 6;

/// Chunks of decode that run side by side at most.
const CHUNKS_AT_ONCE: usize = 64;

/// The arrays of the step on its way.
#[derive(Debug)]
pub(crate) struct StepArrays<D: Device> {
    /// Its rows.
    pub(crate) arrays: RowArrays,
    /// What is wanted of the device for all steps, once that is known.
    largest: Option<Largest>,
    runs: Vec<Run>,
    /// Words of the batch that are on the device: where they are on the host, how many, and where there.
    placed: Vec<(usize, usize, Address)>,
    rows: Room<D>,
    ring: Room<D>,
    /// Where the next words of the ring go.
    next: usize,
    partials: Room<D>,
    stats: Room<D>,
    attention: Room<D>,
    /// What attention does in this step, once it is known.
    plan: Option<Plan>,
}

/// Memory that grows.
#[derive(Debug)]
pub(crate) struct Room<D: Device> {
    memory: Option<D::Memory>,
    bytes: usize,
}

/// The work of attention, on the device.
#[derive(Debug)]
struct Plan {
    decode: Vec<DecodeWork>,
    prefill: (Address, usize),
}

impl<D: Device> Default for Room<D> {
    fn default() -> Self {
        Self { memory: None, bytes: 0 }
    }
}

impl<D: Device> Room<D> {
    /// Where it is, once it was asked for.
    pub(crate) fn at(&self) -> Address {
        self.memory.as_ref().map_or(0, D::address)
    }

    /// What was there is lost, and this is there.
    pub(crate) fn with(&mut self, device: &D, bytes: &[u8]) -> Result<Address, DeviceError> {
        let at = self.of(device, bytes.len())?;
        device.write(at, bytes)?;
        Ok(at)
    }

    /// So many bytes. What was there before is lost when they are more than ever before.
    pub(crate) fn of(&mut self, device: &D, bytes: usize) -> Result<Address, DeviceError> {
        if self.bytes < bytes || self.memory.is_none() {
            // Given back first, so that both need not fit at once.
            self.memory = None;
            self.bytes = bytes.next_power_of_two();
            self.memory = Some(device.allocate(self.bytes)?);
        }
        Ok(self.at())
    }
}

impl<D: Device> Default for StepArrays<D> {
    fn default() -> Self {
        Self {
            arrays: RowArrays::default(),
            largest: None,
            runs: Vec::new(),
            placed: Vec::new(),
            rows: Room::default(),
            ring: Room::default(),
            next: 0,
            partials: Room::default(),
            stats: Room::default(),
            attention: Room::default(),
            plan: None,
        }
    }
}

/// Bytes of a partial result of decode: its weighted values, and its largest score and sum.
const fn partial_bytes(heads: &Heads) -> (usize, usize) {
    (heads.queries * heads.width * size_of::<f32>(), heads.queries * 2 * size_of::<f32>())
}

impl<D: Device> StepArrays<D> {
    /// Takes the memory that steps up to this size need.
    pub(crate) fn reserve(&mut self, device: &D, largest: &Largest) -> Result<(), DeviceError> {
        let Largest { rows, outputs, context, heads, .. } = *largest;
        self.largest = Some(*largest);
        let tables = outputs * context.div_ceil(BLOCK_TOKENS);
        self.rows.of(device, size_of::<u32>() * (ROW_ARRAYS * rows + tables))?;
        self.ring.of(device, size_of::<u32>() * RING_WORDS.max(rows))?;
        let (sum_bytes, stat_bytes) = partial_bytes(&heads);
        // Two goes share memory; a single row may need more than there is for a step.
        let chunks = context.div_ceil(CHUNK_TOKENS);
        let partials = (outputs * chunks).min((PARTIAL_BYTES / sum_bytes).max(chunks));
        self.partials.of(device, partials * sum_bytes)?;
        self.stats.of(device, partials * stat_bytes)?;
        // Each row is decoded, or is in a tile with others.
        let pairs = rows * (heads.queries / heads.keys);
        let tiles = pairs / WARP_PAIRS + outputs;
        self.attention.of(device, size_of::<u32>() * (3 * tiles + 2 * outputs))?;
        Ok(())
    }

    /// Brings the rows of a step to the device. `chosen` is where the tokens are that the step before chose.
    pub(crate) fn begin(&mut self, kernels: &Kernels<D>, batch: &Batch, chosen: Address) -> Result<(), DeviceError> {
        let rows = batch.rows();
        self.runs = work::runs(batch);
        self.plan = None;
        let starts = batch.row_tables.iter().map(|table| u32::try_from(table.start).unwrap_or(u32::MAX));
        let words = batch.positions.iter().chain(&batch.lengths).copied();
        let words = words.chain(work::slots(batch)).chain(starts).chain(batch.ids.iter().copied());
        // There are no more outputs than rows.
        let outputs = batch.outputs.iter().copied().chain(std::iter::repeat(0)).take(rows);
        let words = words.chain(outputs).chain(batch.tables.iter().copied());
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let at = self.rows.with(&kernels.device, &bytes)?;
        let array = |index: usize| at + (index * rows * size_of::<u32>()) as Address;
        self.arrays = RowArrays {
            rows,
            positions: array(0),
            lengths: array(1),
            slots: array(2),
            table_starts: array(3),
            tables: array(ROW_ARRAYS),
        };
        let place = |words: &[u32], index| (words.as_ptr().addr(), words.len(), array(index));
        self.placed = vec![place(&batch.positions, 0), place(&batch.ids, 4), place(&batch.outputs, 5)];
        if let Some(Largest { vocabulary, .. }) = self.largest
            && batch.ids.iter().any(|id| id & CHOSEN_BEFORE != 0)
        {
            kernels.resolve([array(4), chosen], rows, vocabulary)?;
        }
        Ok(())
    }

    /// Where the tokens of the rows are.
    pub(crate) fn ids(&self) -> Address {
        self.arrays.positions + (4 * self.arrays.rows * size_of::<u32>()) as Address
    }

    /// What a step of decode has in common with others that are started alike, and where the arrays are that it reads; its
    /// attention is planned then. None when it is no such step.
    pub(crate) fn shape(&mut self, kernels: &Kernels<D>, batch: &Batch) -> Result<Option<Shape>, DeviceError> {
        let Some(Largest { heads, .. }) = self.largest else { return Ok(None) };
        if self.runs.len() < batch.rows() || batch.outputs.len() < batch.rows() {
            return Ok(None);
        }
        let mut plan = self.make_plan(&kernels.device, (batch, &heads))?;
        let [work] = plan.decode.as_mut_slice() else { return Ok(None) };
        work.chunks = work.chunks.next_power_of_two();
        let places = [self.arrays.positions, work.work, work.partials, work.stats];
        let shape = Shape { rows: batch.rows(), chunks: work.chunks, places };
        self.plan = Some(plan);
        Ok(Some(shape))
    }

    /// Words for the kernel that comes next: copied, unless they are the batch's own, which are there.
    pub(crate) fn stage(&mut self, device: &D, words: &[u32]) -> Result<Address, DeviceError> {
        let place = self.placed.iter().find(|place| (place.0, place.1) == (words.as_ptr().addr(), words.len()));
        if let Some((_, _, at)) = place {
            return Ok(*at);
        }
        let ring = self.ring.of(device, (size_of::<u32>() * RING_WORDS).max(size_of_val(words)))?;
        if self.next + words.len() > RING_WORDS {
            self.next = 0;
        }
        let at = ring + (self.next * size_of::<u32>()) as Address;
        self.next += words.len();
        device.write(at, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())?;
        Ok(at)
    }

    /// Attention of a layer. What is computed where is the same in all layers of a step.
    pub(crate) fn attend(
        &mut self,
        kernels: &Kernels<D>,
        attention: &Attention,
        (batch, heads): (&Batch, &Heads),
    ) -> Result<(), DeviceError> {
        if self.plan.is_none() {
            self.plan = Some(self.make_plan(&kernels.device, (batch, heads))?);
        }
        let Some(plan) = &self.plan else { return Ok(()) };
        if plan.prefill.1 > 0 {
            kernels.prefill(attention, heads, plan.prefill)?;
        }
        plan.decode.iter().try_for_each(|work| kernels.decode(attention, heads, work))
    }

    fn make_plan(&mut self, device: &D, (batch, heads): (&Batch, &Heads)) -> Result<Plan, DeviceError> {
        let (sum_bytes, stat_bytes) = partial_bytes(heads);
        let groups = work::decode_groups(batch, &self.runs, PARTIAL_BYTES / sum_bytes);
        let most = groups.iter().map(|group| group.partials).max().unwrap_or(0);
        let partials = self.partials.of(device, most * sum_bytes)?;
        let stats = self.stats.of(device, most * stat_bytes)?;
        let tiles = work::prefill_tiles(&self.runs, heads.queries / heads.keys, heads.width);
        let words = tiles.iter().chain(groups.iter().flat_map(|group| &group.work));
        let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        let at = self.attention.with(device, &bytes)?;
        let mut next = at + size_of_val(tiles.as_slice()) as Address;
        let decode = groups.iter().map(|DecodeGroup { work, chunks, .. }| {
            let at = next;
            next += size_of_val(work.as_slice()) as Address;
            DecodeWork { work: at, rows: work.len() / 2, chunks: *chunks, at_once: CHUNKS_AT_ONCE, partials, stats }
        });
        Ok(Plan { decode: decode.collect(), prefill: (at, tiles.len() / 3) })
    }
}
