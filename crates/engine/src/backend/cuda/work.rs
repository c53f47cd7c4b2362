//! Which rows of a step are computed by which kernel of attention: pure arithmetic on a batch.
//!
//! Never here: memory of a device. Decode and prefill give the same bits, so any division would do.

use crate::backend::Batch;
use crate::backend::cuda::launch::{CHUNK_TOKENS, WARP_PAIRS, prefill_warps};
use crate::kv::BLOCK_TOKENS;

/// Consecutive rows of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) row: usize,
    pub(crate) rows: usize,
}

/// The runs of a batch, in order.
pub(crate) fn runs(batch: &Batch) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for row in 0..batch.rows() {
        match runs.last_mut() {
            Some(run) if continues(batch, row) => run.rows += 1,
            _ => runs.push(Run { row, rows: 1 }),
        }
    }
    runs
}

/// Whether a row is the next token of the sequence of the row before it.
fn continues(batch: &Batch, row: usize) -> bool {
    let Some(before) = row.checked_sub(1) else { return false };
    batch.row_tables[before] == batch.row_tables[row] && batch.positions[before] + 1 == batch.positions[row]
}

/// Where each row's key and value go: its block times the tokens of a block, and its place there.
pub(crate) fn slots(batch: &Batch) -> impl Iterator<Item = u32> {
    let tokens = u32::try_from(BLOCK_TOKENS).unwrap_or(1);
    (0..batch.rows()).map(move |row| {
        let (position, table) = (batch.positions[row], &batch.tables[batch.row_tables[row].clone()]);
        table[(position / tokens) as usize] * tokens + position % tokens
    })
}

/// Rows of decode that share the memory of partial results.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct DecodeGroup {
    /// For each row its number and its first partial result.
    pub(crate) work: Vec<u32>,
    /// Chunks of the longest.
    pub(crate) chunks: usize,
    /// Partial results of all.
    pub(crate) partials: usize,
}

/// Groups of so many partial results at most, but for a single row that needs more.
pub(crate) fn decode_groups(batch: &Batch, runs: &[Run], partials_max: usize) -> Vec<DecodeGroup> {
    let mut groups: Vec<DecodeGroup> = Vec::new();
    for run in runs.iter().filter(|run| run.rows == 1) {
        let chunks = batch.positions[run.row] as usize / CHUNK_TOKENS + 1;
        if groups.last().is_none_or(|group| group.partials + chunks > partials_max) {
            groups.push(DecodeGroup::default());
        }
        if let Some(group) = groups.last_mut() {
            group.work.extend([run.row, group.partials].map(|number| u32::try_from(number).unwrap_or(u32::MAX)));
            group.partials += chunks;
            group.chunks = group.chunks.max(chunks);
        }
    }
    groups
}

/// The tiles of prefill for heads of such a group and width: first row and rows of a run, and a first pair.
pub(crate) fn prefill_tiles(runs: &[Run], group: usize, width: usize) -> Vec<u32> {
    let step = WARP_PAIRS * prefill_warps(width);
    let longer = runs.iter().filter(|run| run.rows > 1);
    let tiles = longer.flat_map(|run| (0..run.rows * group).step_by(step).map(|pair| [run.row, run.rows, pair]));
    tiles.flatten().map(|number| u32::try_from(number).unwrap_or(u32::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> Batch {
        let mut batch = Batch::default();
        batch.push(&[1, 2, 3], 14, 17, &[7, 9]);
        batch.push(&[4], 300, 301, &(0..20).collect::<Vec<_>>());
        batch.push(&[5], 3, 4, &[5]);
        batch
    }

    #[test]
    fn rows_of_a_sequence_are_a_run() {
        let expected = [(0, 3), (3, 1), (4, 1)].map(|(row, rows)| Run { row, rows });
        assert_eq!(runs(&batch()), expected);
    }

    #[test]
    fn slots_are_places_in_blocks() {
        assert_eq!(slots(&batch()).collect::<Vec<_>>(), [126, 127, 144, 18 * 16 + 12, 83]);
    }

    #[test]
    fn groups_of_decode_keep_within_the_memory_of_partial_results() {
        let batch = batch();
        let groups = |most| decode_groups(&batch, &runs(&batch), most);
        assert_eq!(groups(3), [DecodeGroup { work: vec![3, 0, 4, 2], chunks: 2, partials: 3 }]);
        let [first, second] = [(vec![3, 0], 2), (vec![4, 0], 1)];
        let group = |(work, chunks)| DecodeGroup { work, chunks, partials: chunks };
        assert_eq!(groups(1), [group(first), group(second)]);
    }

    #[test]
    fn tiles_of_prefill_hold_all_pairs() {
        assert_eq!(prefill_tiles(&[Run { row: 2, rows: 10 }, Run { row: 12, rows: 1 }], 7, 64), [2, 10, 0, 2, 10, 64]);
        assert_eq!(prefill_tiles(&[Run { row: 0, rows: 5 }], 8, 256), [0, 5, 0, 0, 5, 32]);
    }
}
