//! Attention: prefill and decode against the CPU's, and against each other bit for bit.

use crate::backend::cpu::Cpu;
use crate::backend::cuda::check::rows::heads;
use crate::backend::cuda::check::{Bench, Dice, Held, Wrong, same};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::launch::{Attention, DecodeWork, HEAD_WIDTHS, Rope, RowArrays};
use crate::backend::cuda::work::{self, Run};
use crate::backend::{Backend as _, Batch, Heads};
use crate::kv::BLOCK_TOKENS;

/// Blocks of a sequence, in no order.
const TABLE: u32 = 45;

/// Sequences of odd lengths, whole.
fn batch(dice: &mut Dice) -> Batch {
    let mut batch = Batch::default();
    for sequence in 0..2 {
        let tokens = dice.one(&[1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 257, 300, 530]) + dice.of(0..7);
        let table: Vec<u32> = (0..TABLE).map(|index| (index * 7 + 3) % TABLE + TABLE * sequence).collect();
        batch.push(&vec![1; tokens], 0, tokens, &table);
    }
    batch
}

/// The last rows of each sequence only, which is what a step computes; those before are in the cache.
fn last_rows(batch: &Batch, dice: &mut Dice) -> Vec<Run> {
    let whole = work::runs(batch);
    let last = whole.iter().map(|run| {
        let rows = dice.of(1..run.rows.min(16) + 1);
        Run { row: run.row + run.rows - rows, rows }
    });
    last.collect()
}

/// What one layer's attention needs on a device.
struct Layer<D: Device> {
    attention: Attention,
    /// Kept for as long as their addresses are in use.
    _held: Vec<Held<D>>,
}

fn layer<D: Device>(bench: &Bench<D>, batch: &Batch, heads: &Heads, qkv: &[f32]) -> Result<Layer<D>, Wrong> {
    let starts: Vec<u32> = batch.row_tables.iter().map(|table| u32::try_from(table.start).unwrap_or(0)).collect();
    let slots: Vec<u32> = work::slots(batch).collect();
    let cache_bytes = 2 * 2 * TABLE as usize * heads.keys * heads.width * BLOCK_TOKENS;
    let held = vec![
        bench.halves(qkv)?,
        bench.words(&batch.positions)?,
        bench.words(&batch.lengths)?,
        bench.words(&slots)?,
        bench.words(&starts)?,
        bench.words(&batch.tables)?,
        bench.poisoned(cache_bytes)?,
        bench.poisoned(cache_bytes)?,
    ];
    let [qkv, positions, lengths, slots, table_starts, tables, key_cache, value_cache] =
        [0, 1, 2, 3, 4, 5, 6, 7].map(|i: usize| held[i].at());
    let arrays = RowArrays { rows: batch.rows(), positions, lengths, slots, table_starts, tables };
    let rope = Rope { qkv, key_cache, value_cache, ..Rope::default() };
    bench.kernels.rope_store(&rope, &arrays, heads)?;
    let attention = Attention { qkv, key_cache, value_cache, out: 0, arrays };
    Ok(Layer { attention, _held: held })
}

/// Rows of the result that were computed, and all others as they were: no numbers.
fn rows_of(out: &[f32], runs: &[Run], width: usize) -> Result<Vec<f32>, Wrong> {
    let is_computed = |row: usize| runs.iter().any(|run| (run.row..run.row + run.rows).contains(&row));
    let mut found = Vec::new();
    for (row, values) in out.chunks_exact(width).enumerate() {
        if is_computed(row) {
            found.extend_from_slice(values);
        } else if values.iter().any(|value| !value.is_nan()) {
            return Err(Wrong::Differs(format!("row {row} was written, which nobody asked for")));
        }
    }
    Ok(found)
}

fn prefill<D: Device>(bench: &Bench<D>, layer: &Layer<D>, heads: &Heads, runs: &[Run]) -> Result<Vec<f32>, Wrong> {
    let width = heads.queries * heads.width;
    let out = bench.poisoned(2 * layer.attention.arrays.rows * width)?;
    // Runs of one row are decode's otherwise; two runs of the same rows change nothing.
    let longer: Vec<Run> = runs.iter().map(|run| Run { rows: run.rows.max(2), ..*run }).collect();
    let mut tiles = work::prefill_tiles(&longer, heads.queries / heads.keys, heads.width);
    for (tile, run) in tiles.as_chunks_mut::<3>().0.iter_mut().flat_map(|tile| {
        let run = runs.iter().find(|run| run.row == tile[0] as usize).copied();
        run.map(|run| (tile, run))
    }) {
        tile[1] = u32::try_from(run.rows).unwrap_or(0);
    }
    let held = bench.words(&tiles)?;
    let attention = Attention { out: out.at(), ..layer.attention };
    bench.kernels.prefill(&attention, heads, (held.at(), tiles.len() / 3))?;
    rows_of(&bench.read_halves(&out)?, runs, width)
}

fn decode<D: Device>(
    bench: &Bench<D>,
    (layer, batch): (&Layer<D>, &Batch),
    heads: &Heads,
    runs: &[Run],
    (partials_max, at_once): (usize, usize),
) -> Result<Vec<f32>, Wrong> {
    let width = heads.queries * heads.width;
    let out = bench.poisoned(2 * layer.attention.arrays.rows * width)?;
    let single: Vec<Run> =
        runs.iter().flat_map(|run| (0..run.rows).map(|i| Run { row: run.row + i, rows: 1 })).collect();
    for group in work::decode_groups(batch, &single, partials_max) {
        let work = bench.words(&group.work)?;
        let partials = bench.poisoned(4 * group.partials * width)?;
        let stats = bench.poisoned(8 * group.partials * heads.queries)?;
        let attention = Attention { out: out.at(), ..layer.attention };
        let (rows, chunks) = (group.work.len() / 2, group.chunks);
        let work = DecodeWork { work: work.at(), rows, chunks, at_once, partials: partials.at(), stats: stats.at() };
        bench.kernels.decode(&attention, heads, &work)?;
    }
    rows_of(&bench.read_halves(&out)?, runs, width)
}

pub(super) fn attention<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let width = dice.turn(&HEAD_WIDTHS);
    let heads = heads(dice, &[width]);
    let batch = batch(dice);
    let qkv = bench.values(dice, batch.rows() * heads.qkv_width());
    let cpu = Cpu::new(1).map_err(|error| Wrong::Differs(error.to_string()))?;
    let mut cache = cpu.cache(1, 2 * TABLE as usize, &heads);
    cpu.store(&mut cache, 0, &qkv, (&batch, &heads));
    let width = heads.queries * heads.width;
    let mut expected = vec![0.0; batch.rows() * width];
    cpu.attend((&cache, 0), &qkv, (&batch, &heads), &mut expected);

    let layer = layer(bench, &batch, &heads, &qkv)?;
    let runs = last_rows(&batch, dice);
    let wanted: Vec<f32> =
        runs.iter().flat_map(|run| expected[run.row * width..(run.row + run.rows) * width].to_vec()).collect();
    let together = prefill(bench, &layer, &heads, &runs)?;
    // Weights and values are rounded before they are multiplied; values are up to 2.
    same("prefill", &together, &wanted, (bench.step(), 2.0 * bench.step()))?;
    let room = (dice.of(1..9), dice.one(&[1, 2, 64]));
    let apart = decode(bench, (&layer, &batch), &heads, &runs, room)?;
    same("decode beside prefill", &apart, &together, (0.0, 0.0))?;
    // Other neighbours in the tile.
    let shorter: Vec<Run> =
        runs.iter().map(|run| Run { row: run.row + run.rows / 2, rows: run.rows - run.rows / 2 }).collect();
    let kept: Vec<f32> = {
        let mut from = 0;
        let mut kept = Vec::new();
        for run in &runs {
            kept.extend_from_slice(&together[(from + run.rows / 2) * width..(from + run.rows) * width]);
            from += run.rows;
        }
        kept
    };
    same("fewer rows", &prefill(bench, &layer, &heads, &shorter)?, &kept, (0.0, 0.0))
}
