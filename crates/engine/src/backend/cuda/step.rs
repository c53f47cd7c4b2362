//! What a step's rows look like on the device: small arrays that are copied there once, and memory for partial results.
//!
//! Never here: values of a model.

use crate::backend::cuda::device::{Address, Device, DeviceError};
use crate::backend::cuda::launch::{Attention, DecodeWork, Kernels, RowArrays};
use crate::backend::cuda::work::{self, DecodeGroup, Run};
use crate::backend::{Batch, Heads};

/// Words that are staged while a step runs, beside its rows: ids, picked rows, factors. The place of the oldest is
/// taken again after so many; the device has read them then, since it does all in order.
const RING_WORDS: usize = 1 << 18;

/// Bytes for partial results of decode. A step that needs more computes its rows in several goes.
const PARTIAL_BYTES: usize = 1 << 26;

/// Chunks of decode that run side by side at most.
const CHUNKS_AT_ONCE: usize = 64;

/// The arrays of the step on its way.
#[derive(Debug)]
pub(crate) struct StepArrays<D: Device> {
    /// Its rows.
    pub(crate) arrays: RowArrays,
    runs: Vec<Run>,
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
struct Room<D: Device> {
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
    /// So many bytes. What was there before is lost.
    fn of(&mut self, device: &D, bytes: usize) -> Result<Address, DeviceError> {
        if self.bytes < bytes || self.memory.is_none() {
            // Given back first, so that both need not fit at once.
            self.memory = None;
            self.bytes = bytes.next_power_of_two();
            self.memory = Some(device.allocate(self.bytes)?);
        }
        Ok(self.memory.as_ref().map_or(0, D::address))
    }
}

impl<D: Device> Default for StepArrays<D> {
    fn default() -> Self {
        Self {
            arrays: RowArrays::default(),
            runs: Vec::new(),
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

impl<D: Device> StepArrays<D> {
    /// Brings the rows of a step to the device.
    pub(crate) fn begin(&mut self, kernels: &Kernels<D>, batch: &Batch) -> Result<(), DeviceError> {
        let rows = batch.rows();
        self.runs = work::runs(batch);
        self.plan = None;
        let starts = batch.row_tables.iter().map(|table| u32::try_from(table.start).unwrap_or(u32::MAX));
        let words = batch.positions.iter().chain(&batch.lengths).copied();
        let words = words.chain(work::slots(batch)).chain(starts).chain(batch.tables.iter().copied());
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let at = self.rows.of(&kernels.device, bytes.len())?;
        kernels.device.write(at, &bytes)?;
        let array = |index: usize| at + (index * rows * size_of::<u32>()) as Address;
        self.arrays = RowArrays {
            rows,
            positions: array(0),
            lengths: array(1),
            slots: array(2),
            table_starts: array(3),
            tables: array(4),
        };
        Ok(())
    }

    /// Copies words for the kernel that comes next.
    pub(crate) fn stage(&mut self, device: &D, words: &[u32]) -> Result<Address, DeviceError> {
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
        let (sum_bytes, stat_bytes) =
            (heads.queries * heads.width * size_of::<f32>(), heads.queries * 2 * size_of::<f32>());
        let groups = work::decode_groups(batch, &self.runs, PARTIAL_BYTES / sum_bytes);
        let most = groups.iter().map(|group| group.partials).max().unwrap_or(0);
        let partials = self.partials.of(device, most * sum_bytes)?;
        let stats = self.stats.of(device, most * stat_bytes)?;
        let tiles = work::prefill_tiles(&self.runs, heads.queries / heads.keys, heads.width);
        let words = tiles.iter().chain(groups.iter().flat_map(|group| &group.work));
        let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        let at = self.attention.of(device, bytes.len())?;
        device.write(at, &bytes)?;
        let mut next = at + size_of_val(tiles.as_slice()) as Address;
        let decode = groups.iter().map(|DecodeGroup { work, chunks, .. }| {
            let at = next;
            next += size_of_val(work.as_slice()) as Address;
            DecodeWork { work: at, rows: work.len() / 2, chunks: *chunks, at_once: CHUNKS_AT_ONCE, partials, stats }
        });
        Ok(Plan { decode: decode.collect(), prefill: (at, tiles.len() / 3) })
    }
}
