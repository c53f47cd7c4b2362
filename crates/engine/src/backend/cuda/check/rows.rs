//! Kernels that work on rows: norms, activations, tables, rotation.

use crate::ask::CHOSEN_BEFORE;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::check::{Bench, Dice, Wrong, same};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::launch::{Norm, Rope, RowArrays};
use crate::backend::cuda::work;
use crate::backend::{Angles, Backend as _, Batch, Heads, Write};
use crate::config::Activation;
use crate::kv::BLOCK_TOKENS;

/// Absolute error that rounding of intermediate values may leave.
const SLACK: f32 = 1e-5;

fn cpu() -> Result<Cpu, Wrong> {
    Cpu::new(1).map_err(|error| Wrong::Differs(error.to_string()))
}

pub(super) fn norm<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (rows, width) = (dice.of(1..6), dice.one(&[8, 31, 64, 257, 300, 1030]));
    let x = bench.values(dice, rows * width);
    let before = bench.values(dice, rows * width);
    let (weight, bias) = (bench.values(dice, width), bench.values(dice, width));
    let (write, epsilon, cpu) = (dice.one(&[Write::Set, Write::Add]), 1e-5, cpu()?);
    let [held_x, held_weight, held_bias] = [bench.halves(&x)?, bench.floats(&weight)?, bench.floats(&bias)?];
    for is_layer in [false, true] {
        let out = if write == Write::Add { bench.halves(&before)? } else { bench.poisoned(2 * rows * width)? };
        let bias_at = if is_layer { held_bias.at() } else { 0 };
        let (x_at, weight_at, out_at) = (held_x.at(), held_weight.at(), out.at());
        let norm =
            Norm { x: x_at, residual: 0, weight: weight_at, bias: bias_at, out: out_at, rows, width, epsilon, write };
        bench.kernels.norm(&norm)?;
        let mut expected = before.clone();
        if is_layer {
            cpu.layer_norm((&x, rows), (&weight, &bias, epsilon), &mut expected, write);
        } else {
            cpu.rms_norm((&x, rows), (&weight, epsilon), &mut expected, write);
        }
        same("norm", &bench.read_halves(&out)?, &expected, (bench.step(), SLACK))?;
    }
    Ok(())
}

/// With a residual the bits are those of an addition, then a norm.
pub(super) fn fused_norm<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (rows, width) = (dice.of(1..5), dice.one(&[8, 33, 256, 700]));
    let (x, residual) = (bench.values(dice, rows * width), bench.values(dice, rows * width));
    let weight = bench.floats(&bench.values(dice, width))?;
    let held_x = bench.halves(&x)?;
    let bias = if dice.chance() { Some(bench.floats(&bench.values(dice, width))?) } else { None };
    let bias_at = bias.as_ref().map_or(0, super::Held::at);
    let base = Norm {
        x: held_x.at(),
        residual: 0,
        weight: weight.at(),
        bias: bias_at,
        out: 0,
        rows,
        width,
        epsilon: 1e-6,
        write: Write::Set,
    };
    let [fused_residual, apart_residual] = [bench.halves(&residual)?, bench.halves(&residual)?];
    let [fused, apart] = [bench.poisoned(2 * rows * width)?, bench.poisoned(2 * rows * width)?];
    bench.kernels.norm(&Norm { residual: fused_residual.at(), out: fused.at(), ..base })?;
    let (numbers, ones) = ((0..).take(rows).collect::<Vec<u32>>(), vec![1.0; rows]);
    let [held_numbers, held_ones] = [bench.words(&numbers)?, bench.floats(&ones)?];
    let addresses = [held_x.at(), held_numbers.at(), held_ones.at(), apart_residual.at()];
    bench.kernels.add_rows(addresses, (rows, width))?;
    bench.kernels.norm(&Norm { x: apart_residual.at(), out: apart.at(), ..base })?;
    for (what, one, other) in [("residual", &fused_residual, &apart_residual), ("norm", &fused, &apart)] {
        same(what, &bench.read_halves(one)?, &bench.read_halves(other)?, (0.0, 0.0))?;
    }
    Ok(())
}

pub(super) fn activation<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (rows, width, cpu) = (dice.of(1..5), dice.of(1..300), cpu()?);
    let x = bench.values(dice, rows * width * 2);
    let held = bench.halves(&x)?;
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf, Activation::Relu] {
        let mut expected = vec![0.0; rows * width];
        let out = bench.poisoned(2 * rows * width)?;
        bench.kernels.activate_gated(activation, [held.at(), out.at()], (rows * width, width))?;
        cpu.activate_gated(activation, (&x, rows), width, &mut expected);
        same("gated", &bench.read_halves(&out)?, &expected, (bench.step(), SLACK))?;
        let out = bench.poisoned(2 * rows * width)?;
        bench.kernels.activate(activation, [held.at(), out.at()], rows * width)?;
        cpu.activate(activation, (&x, rows), width, &mut expected);
        same("plain", &bench.read_halves(&out)?, &expected, (bench.step(), SLACK))?;
    }
    Ok(())
}

pub(super) fn gather<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (table_rows, rows, width) = (dice.of(1..20), dice.of(1..9), dice.of(1..200));
    let table = bench.values(dice, table_rows * width);
    let ids: Vec<u32> = (0..rows).map(|_| u32::try_from(dice.of(0..table_rows)).unwrap_or(0)).collect();
    let [held, held_ids] = [bench.halves(&table)?, bench.words(&ids)?];
    let row = |id: &u32| table[*id as usize * width..][..width].to_vec();
    let expected: Vec<f32> = ids.iter().flat_map(row).collect();
    let out = bench.poisoned(2 * rows * width)?;
    bench.kernels.gather_rows([held.at(), held_ids.at(), out.at()], (rows, width), Write::Set)?;
    same("rows", &bench.read_halves(&out)?, &expected, (0.0, 0.0))?;
    bench.kernels.gather_rows([held.at(), held_ids.at(), out.at()], (rows, width), Write::Add)?;
    let twice: Vec<f32> = expected.iter().map(|x| x + x).collect();
    same("added rows", &bench.read_halves(&out)?, &twice, (0.0, 0.0))
}

/// Ids that stand for tokens chosen before become these; what is no token becomes one.
pub(super) fn resolve<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (count, chosen_count, vocabulary) = (dice.of(1..700), dice.of(1..9), 50);
    let mut chosen: Vec<u32> = (0..chosen_count).map(|_| dice.word() % vocabulary).collect();
    chosen[0] = u32::MAX;
    let before = |dice: &mut Dice| CHOSEN_BEFORE | (dice.word() % u32::try_from(chosen_count).unwrap_or(1));
    let ids: Vec<u32> =
        (0..count).map(|_| if dice.chance() { before(dice) } else { dice.word() % vocabulary }).collect();
    let expected = ids.iter().map(|id| match id & CHOSEN_BEFORE {
        0 => *id,
        _ => Some(chosen[(id & !CHOSEN_BEFORE) as usize]).filter(|token| *token < vocabulary).unwrap_or(0),
    });
    let [held, held_chosen] = [bench.words(&ids)?, bench.words(&chosen)?];
    bench.kernels.resolve([held.at(), held_chosen.at()], count, vocabulary as usize)?;
    let found = bench.read_words(&held)?;
    match found.iter().copied().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(index) => Err(Wrong::Differs(format!("id {index} became {}, of {ids:?} and {chosen:?}", found[index]))),
    }
}

pub(super) fn add_rows<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (count, width, cpu) = (dice.of(1..6), dice.of(1..200), cpu()?);
    let (x, before) = (bench.values(dice, count * width), bench.values(dice, 2 * count * width));
    // Distinct rows, in no order.
    let first = u32::from(dice.chance());
    let rows: Vec<(u32, f32)> = (0..).take(count).map(|row| (2 * row + first, dice.float())).collect();
    let rows: Vec<(u32, f32)> = rows.into_iter().rev().collect();
    let (numbers, factors): (Vec<u32>, Vec<f32>) = rows.iter().copied().unzip();
    let out = bench.halves(&before)?;
    let [x_held, numbers, factors] = [bench.halves(&x)?, bench.words(&numbers)?, bench.floats(&factors)?];
    bench.kernels.add_rows([x_held.at(), numbers.at(), factors.at(), out.at()], (count, width))?;
    let mut expected = before;
    cpu.add_rows(&x, &rows, width, &mut expected);
    same("added rows", &bench.read_halves(&out)?, &expected, (bench.step(), SLACK))
}

pub(super) fn scale_and_cap<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (count, factor) = (dice.of(1..700), 0.1 + dice.float() * 20.0);
    let x = bench.values(dice, count);
    let held = bench.halves(&x)?;
    bench.kernels.scale(held.at(), count, factor)?;
    let expected: Vec<f32> = x.iter().map(|x| x * factor).collect();
    same("scaled", &bench.read_halves(&held)?, &expected, (bench.step(), 0.0))?;
    let (wide, narrow) = (bench.floats(&expected)?, bench.poisoned(2 * count)?);
    bench.kernels.narrow([wide.at(), narrow.at()], count)?;
    same("rounded", &bench.read_halves(&narrow)?, &bench.read_halves(&held)?, (0.0, 0.0))?;
    bench.kernels.cap_logits(wide.at(), count, 3.0)?;
    let mut capped = expected;
    cpu()?.cap(&mut capped, count, 3.0);
    // The same exactly rounded operations, so the same bits.
    same("capped", &bench.read_floats(&wide)?, &capped, (0.0, 0.0))
}

/// Heads as they come: few widths, groups that are no power of two.
pub(super) fn heads(dice: &mut Dice, widths: &[usize]) -> Heads {
    let keys = dice.of(1..4);
    Heads {
        queries: keys * dice.one(&[1, 2, 3, 7, 20]),
        keys,
        width: dice.one(widths),
        scale: 0.2,
        cap: dice.one(&[None, Some(5.0)]),
        window: dice.one(&[None, Some(1), Some(40), Some(300)]),
    }
}

pub(super) fn rope_store<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let heads = heads(dice, &[8, 64, 80, 96, 128]);
    let rotated = dice.one(&[heads.width, heads.width / 2]);
    let (positions, longest) = (70, 30);
    let mut batch = Batch::default();
    let blocks: u32 = 16;
    let (lengths, starts) = ([dice.of(1..20), dice.of(1..4)], [dice.of(0..40), dice.of(0..30)]);
    for (sequence, (rows, start)) in (0..).zip(lengths.into_iter().zip(starts)) {
        let table: Vec<u32> = (0..8).map(|index| (index * 5 + 3) % 8 + 8 * sequence).collect();
        batch.push(&vec![1; rows], start, start + rows + dice.of(0..3), &table);
    }
    let (rows, stride) = (batch.rows(), heads.qkv_width());
    let x = bench.values(dice, rows * stride);
    let weights = [bench.values(dice, heads.width), bench.values(dice, heads.width)];
    let turns: Vec<f32> = (0..2 * positions * rotated).map(|_| dice.float() * 2.0 - 1.0).collect();
    let (norms, rotates, epsilon) = (dice.chance(), dice.chance(), 1e-6);
    let switch = Some((positions, longest));

    let mut expected = x.clone();
    let cpu = cpu()?;
    if norms {
        cpu.norm_heads((&mut expected, rows), &heads, (&weights[0], &weights[1]), epsilon);
    }
    if rotates {
        cpu.rotate(&mut expected, &batch, &heads, &Angles { table: turns.clone(), width: rotated, switch });
    }

    let [query_norm, key_norm] = [bench.floats(&weights[0])?, bench.floats(&weights[1])?];
    let (qkv, angles) = (bench.halves(&x)?, bench.floats(&turns)?);
    let [place, length] = [bench.words(&batch.positions)?, bench.words(&batch.lengths)?];
    let slots: Vec<u32> = work::slots(&batch).collect();
    let held_slots = bench.words(&slots)?;
    let block = heads.keys * heads.width * BLOCK_TOKENS;
    let [keys, values] = [(); 2].map(|()| bench.poisoned(2 * block * blocks as usize));
    let (keys, values) = (keys?, values?);
    let rope = Rope {
        qkv: qkv.at(),
        query_norm: if norms { query_norm.at() } else { 0 },
        key_norm: if norms { key_norm.at() } else { 0 },
        epsilon,
        angles: if rotates { angles.at() } else { 0 },
        rotated,
        switch,
        key_cache: keys.at(),
        value_cache: values.at(),
    };
    let arrays =
        RowArrays { rows, positions: place.at(), lengths: length.at(), slots: held_slots.at(), ..RowArrays::default() };
    bench.kernels.rope_store(&rope, &arrays, &heads)?;

    let found = bench.read_halves(&qkv)?;
    let (found_keys, found_values) = (bench.read_halves(&keys)?, bench.read_halves(&values)?);
    let tolerance = (bench.step(), 1e-3);
    let mut written = 0;
    for (row, slot) in slots.iter().map(|slot| *slot as usize).enumerate() {
        let (found, expected) = (&found[row * stride..][..stride], &expected[row * stride..][..stride]);
        let queries = heads.queries * heads.width;
        same("queries", &found[..queries], &expected[..queries], tolerance)?;
        for head in 0..heads.keys {
            let at = slot / BLOCK_TOKENS * block + head * heads.width * BLOCK_TOKENS;
            let (token, wanted) = (slot % BLOCK_TOKENS, &expected[queries + head * heads.width..][..heads.width]);
            same("key", &found_keys[at + token * heads.width..][..heads.width], wanted, tolerance)?;
            let wanted = &x[row * stride + queries + (heads.keys + head) * heads.width..][..heads.width];
            let value: Vec<f32> = (0..heads.width).map(|i| found_values[at + i * BLOCK_TOKENS + token]).collect();
            same("value", &value, wanted, (0.0, 0.0))?;
            written += heads.width;
        }
    }
    for (what, cache) in [("keys", &found_keys), ("values", &found_values)] {
        if cache.iter().filter(|value| !value.is_nan()).count() != written {
            return Err(Wrong::Differs(format!("{what} were written to places of others")));
        }
    }
    Ok(())
}
