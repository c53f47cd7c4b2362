//! Steps of decode that are recorded as a whole and then repeated: which of them, and how much memory that may take.
//!
//! Never here: what a step does. A recorded step reads all that differs between two of its shape from memory whose place
//! is the same, see `step.rs`; rows that fill a step up to its shape write to a block that nobody reads.

use std::collections::{HashMap, HashSet};

use crate::backend::cuda::device::{Address, Device, DeviceError};

/// Bytes of the device that all recorded steps may take.
const BYTES_MAX: u64 = 256 << 20;

/// Bytes that must be free for another one to be recorded.
const BYTES_FREE_MIN: u64 = 64 << 20;

/// What two steps have in common that are started alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Rows, each of another sequence.
    pub(crate) rows: usize,
    /// Chunks of attention for which there are blocks.
    pub(crate) chunks: usize,
    /// Where the arrays are that it reads.
    pub(crate) places: [Address; 4],
}

/// How many rows a step of so many sequences is filled up to, where `most` may run; None where that is not worth it.
pub(crate) fn rows_of(sequences: usize, most: usize) -> Option<usize> {
    let rows = match sequences {
        1 | 2 => sequences,
        3..=4 => 4,
        5..=64 => sequences.next_multiple_of(8),
        65..=256 => sequences.next_multiple_of(16),
        257..=512 => sequences.next_multiple_of(32),
        _ => return None,
    };
    (sequences <= most).then_some(rows.min(most))
}

/// The steps that were recorded.
#[derive(Debug)]
pub(crate) struct Graphs<D: Device> {
    /// Shapes that were computed once, by which kernels were loaded and algorithms chosen.
    seen: HashSet<Shape>,
    recorded: HashMap<Shape, D::Graph>,
    bytes: u64,
    /// The device could not record a step.
    has_given_up: bool,
}

impl<D: Device> Default for Graphs<D> {
    fn default() -> Self {
        Self { seen: HashSet::new(), recorded: HashMap::new(), bytes: 0, has_given_up: false }
    }
}

impl<D: Device> Graphs<D> {
    /// Computes a step of that shape: by `work` at first, then by what was recorded of it.
    pub(crate) fn run(&mut self, device: &D, shape: Shape, work: &mut dyn FnMut()) -> Result<(), DeviceError> {
        if !self.recorded.contains_key(&shape) {
            let is_new = self.seen.insert(shape);
            let before = if is_new || self.has_given_up { 0 } else { device.free_bytes()? };
            if before < BYTES_FREE_MIN || self.bytes >= BYTES_MAX {
                work();
                return Ok(());
            }
            let graph = match device.record(work) {
                Ok(graph) => graph,
                Err(error) => {
                    // Nothing was done yet. A device that has failed as a whole says so again.
                    tracing::warn!(%error, "steps are not recorded, and so take longer");
                    self.has_given_up = true;
                    work();
                    return Ok(());
                }
            };
            self.bytes += before.saturating_sub(device.free_bytes()?);
            self.recorded.insert(shape, graph);
        }
        self.recorded.get(&shape).map_or(Ok(()), |graph| device.repeat(graph))
    }

    /// How many were recorded.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.recorded.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_filled_up_to_few_sizes() {
        let rows: Vec<_> =
            [1, 2, 3, 5, 8, 9, 64, 65, 250, 257, 500, 513, 0].map(|sequences| rows_of(sequences, 600)).into();
        let expected = [1, 2, 4, 8, 8, 16, 64, 80, 256, 288, 512].map(Some).into_iter().chain([None, None]);
        assert_eq!(rows, expected.collect::<Vec<_>>());
        assert_eq!((rows_of(5, 6), rows_of(6, 6), rows_of(7, 6)), (Some(6), Some(6), None));
    }
}
