//! The sampler: tokens against its twin, changed logits and log probabilities against the CPU's.

use std::collections::BTreeMap;

use crate::backend::cuda::check::{Bench, Dice, Wrong, same};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::launch::Sample;
use crate::backend::cuda::sampling::{NONE, SamplerRow, entry_bytes};
use crate::backend::cuda::twin;
use crate::sampler::{FORBIDDEN, Workspace, score};
use crate::shape::{Change, Shaper, Shaping};

/// Best tokens that are told at most.
const TOP: usize = 5;

/// What the kernel says of each row.
struct Found {
    ids: Vec<u32>,
    shaped: Vec<f32>,
    logprobs: Vec<f32>,
    top_ids: Vec<u32>,
    top_logprobs: Vec<f32>,
}

fn row(dice: &mut Dice) -> SamplerRow {
    SamplerRow {
        seed: u64::from(dice.word()) << 32 | u64::from(dice.word()),
        sample: dice.word() % 3,
        position: dice.word() % 4096,
        temperature: 0.2 + dice.float() * 1.5,
        top_p: dice.one(&[1.0, 1.0, 0.95, 0.6, 0.1]),
        min_p: dice.one(&[0.0, 0.0, 0.05, 0.5]),
        top_k: dice.one(&[0, 0, 1, 2, 40, 5000]),
        repetition: 1.0,
        frequency: 0.0,
        presence: 0.0,
        entries: [0, 0],
        mask: NONE,
        logprobs: NONE,
        known: NONE,
        shaped: NONE,
        counted: NONE,
    }
}

/// Tokens of the rows of a step; those that count are below all vocabularies of [`shaped`].
const INPUTS: [u32; 6] = [7, u32::MAX, 39, 3, 11, 0];

/// Logits with ties: halves of whole numbers now and then. None is a negative zero, which is not another number and has
/// other bits.
fn logits(dice: &mut Dice, count: usize) -> Vec<f32> {
    let coarse = dice.chance();
    let logit = |x: f32| if coarse { (x * 2.0).round() / 2.0 } else { x };
    (0..count).map(|_| logit(dice.float() * 16.0 - 8.0) + 0.0).collect()
}

fn sample<D: Device>(
    bench: &Bench<D>,
    logits: &[f32],
    rows: &[SamplerRow],
    (entries, masks): (&[Change], &[u32]),
) -> Result<Found, Wrong> {
    let (count, bytes) = (rows.len(), |rows: usize| 4 * rows);
    let held_logits = bench.floats(logits)?;
    let shaped = bench.poisoned(bytes(logits.len()))?;
    let held_rows = bench.hold(&rows.iter().flat_map(SamplerRow::bytes).collect::<Vec<_>>())?;
    let held_entries = bench.hold(&entries.iter().flat_map(entry_bytes).collect::<Vec<_>>())?;
    let (held_masks, inputs) = (bench.words(masks)?, bench.words(&INPUTS)?);
    let [ids, logprobs] = [bench.poisoned(bytes(count))?, bench.poisoned(bytes(count))?];
    let [top_ids, top_logprobs] = [bench.poisoned(bytes(count * TOP))?, bench.poisoned(bytes(count * TOP))?];
    bench.kernels.sample(&Sample {
        logits: held_logits.at(),
        shaped: shaped.at(),
        rows: held_rows.at(),
        entries: held_entries.at(),
        masks: held_masks.at(),
        inputs: inputs.at(),
        ids: ids.at(),
        logprobs: logprobs.at(),
        top_ids: top_ids.at(),
        top_logprobs: top_logprobs.at(),
        count,
        vocabulary: logits.len() / count,
        top: TOP,
    })?;
    Ok(Found {
        ids: bench.read_words(&ids)?,
        shaped: bench.read_floats(&shaped)?,
        logprobs: bench.read_floats(&logprobs)?,
        top_ids: bench.read_words(&top_ids)?,
        top_logprobs: bench.read_floats(&top_logprobs)?,
    })
}

fn same_token(found: u32, expected: u32, row: &SamplerRow) -> Result<(), Wrong> {
    if found == expected {
        return Ok(());
    }
    Err(Wrong::Differs(format!("token {found}, its twin is {expected}, of {row:?}")))
}

pub(super) fn greedy<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (count, vocabulary) = (dice.of(1..4), dice.of(1..3000));
    let logits = logits(dice, count * vocabulary);
    let rows: Vec<_> = (0..count).map(|_| SamplerRow { temperature: 0.0, ..row(dice) }).collect();
    let found = sample(bench, &logits, &rows, (&[], &[]))?;
    for ((row, logits), token) in rows.iter().zip(logits.chunks(vocabulary)).zip(found.ids) {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let best = (0..).zip(logits).find(|(_, logit)| **logit == largest).map_or(NONE, |(token, _)| token);
        same_token(token, best, row)?;
    }
    Ok(())
}

pub(super) fn drawn<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (count, vocabulary) = (8, dice.one(&[1, 2, 33, 700, 2049]));
    let logits = logits(dice, count * vocabulary);
    let rows: Vec<_> = (0..count).map(|_| row(dice)).collect();
    let found = sample(bench, &logits, &rows, (&[], &[]))?;
    for ((row, logits), token) in rows.iter().zip(logits.chunks(vocabulary)).zip(found.ids) {
        same_token(token, twin::choose(row, logits), row)?;
    }
    Ok(())
}

pub(super) fn shaped<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let vocabulary = dice.of(40..400);
    let logits = logits(dice, vocabulary);
    let token = |dice: &mut Dice| u32::try_from(dice.of(0..vocabulary)).unwrap_or(0);
    let tokens = |dice: &mut Dice, count: usize| (0..count).map(|_| token(dice)).collect::<Vec<u32>>();
    let (prompt, mut generated, ends) = (tokens(dice, 9), tokens(dice, 12), tokens(dice, 2));
    // The last token may be known to the device alone, in a row of its step, and be one that came before or not.
    let on_its_way = dice.chance().then(|| dice.one(&[0, 2, 3, 4, 5]));
    if dice.chance() {
        generated[4] = INPUTS[3];
    }
    generated.extend(on_its_way.map(|row| INPUTS[row as usize]));
    let logit_bias: BTreeMap<u32, f32> =
        (0..5).map(|_| (token(dice), dice.one(&[-100.0, -1.5, 0.25, 3.0, 3e38]))).collect();
    let usual = dice.float() * 2.0 - 0.5;
    let shaping = Shaping {
        logit_bias,
        frequency_penalty: dice.one(&[usual, 3e38]),
        presence_penalty: dice.one(&[usual, 3e38]),
        repetition_penalty: dice.one(&[1.0, 1.3, 0.7, 1e-38]),
        min_tokens: dice.one(&[0, 12, 13, 100]),
    };
    let shaper = |tokens: &[u32]| {
        let mut shaper = Shaper::new(shaping.clone(), ends.clone(), &prompt);
        tokens.iter().for_each(|token| shaper.count(*token));
        shaper
    };
    let mut expected = logits.clone();
    shaper(&generated).apply(&mut expected);
    let mask: Vec<u32> = (0..vocabulary.div_ceil(32)).map(|_| dice.word() | 1).collect();
    for (token, logit) in expected.iter_mut().enumerate() {
        if mask[token / 32] >> (token % 32) & 1 == 0 {
            *logit = FORBIDDEN;
        }
    }
    let known = &generated[..generated.len() - usize::from(on_its_way.is_some())];
    let changes = shaper(known).changes(on_its_way);
    let entries = changes.tokens;
    let row = SamplerRow {
        repetition: shaping.repetition_penalty,
        frequency: shaping.frequency_penalty,
        presence: shaping.presence_penalty,
        // A mask of something else stands before.
        mask: 1,
        entries: [0, u32::try_from(entries.len()).unwrap_or(0)],
        shaped: 0,
        counted: changes.counted.unwrap_or(NONE),
        ..row(dice)
    };
    let masks = [vec![0], mask].concat();
    let found = sample(bench, &logits, &[row], (&entries, &masks))?;
    same("shaped logits", &found.shaped, &expected, (0.0, 0.0))?;
    same_token(found.ids[0], twin::choose(&row, &expected), &row)
}

/// A token that is known is scored, whatever else the row says.
pub(super) fn known<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let vocabulary = dice.of(1..900);
    let logits = logits(dice, 2 * vocabulary);
    let known = u32::try_from(dice.of(0..vocabulary)).unwrap_or(0);
    let asked = SamplerRow { logprobs: 1, known, ..row(dice) };
    let found = sample(bench, &logits, &[asked, SamplerRow { logprobs: NONE, ..asked }], (&[], &[]))?;
    same_token(found.ids[0], known, &asked)?;
    same_token(found.ids[1], known, &asked)?;
    let wanted = score(&logits[..vocabulary], known, 1, &mut Workspace::default());
    let wanted = wanted.map_err(|error| Wrong::Differs(error.to_string()))?;
    same("log probability", &[found.logprobs[0]], &[wanted.logprob], (1e-5, 1e-5))
}

pub(super) fn scored<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (count, vocabulary) = (3, dice.of(1..1500));
    let logits = logits(dice, count * vocabulary);
    let rows: Vec<_> = (0..count)
        .map(|_| SamplerRow { logprobs: u32::try_from(dice.of(0..TOP + 1)).unwrap_or(0), ..row(dice) })
        .collect();
    let found = sample(bench, &logits, &rows, (&[], &[]))?;
    for (index, (row, logits)) in rows.iter().zip(logits.chunks(vocabulary)).enumerate() {
        let wanted = score(logits, found.ids[index], row.logprobs as usize, &mut Workspace::default())
            .map_err(|error| Wrong::Differs(error.to_string()))?;
        same("log probability", &[found.logprobs[index]], &[wanted.logprob], (1e-5, 1e-5))?;
        for (rank, (token, logprob)) in wanted.top.iter().enumerate() {
            same_token(found.top_ids[index * TOP + rank], *token, row)?;
            same("log probability", &[found.top_logprobs[index * TOP + rank]], &[*logprob], (1e-5, 1e-5))?;
        }
    }
    Ok(())
}

pub(super) fn broken<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (count, vocabulary) = (3, dice.of(2..900));
    let mut logits = logits(dice, count * vocabulary);
    let rows: Vec<_> = (0..count).map(|_| row(dice)).collect();
    let broken = [dice.of(0..vocabulary), dice.of(0..vocabulary)];
    for at in broken {
        logits[vocabulary + at] = dice.one(&[f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    }
    let found = sample(bench, &logits, &rows, (&[], &[]))?;
    same_token(found.ids[1], NONE, &rows[1])?;
    same_token(found.logprobs[1].to_bits(), u32::try_from(broken[0].min(broken[1])).unwrap_or(0), &rows[1])?;
    for index in [0, 2] {
        same_token(
            found.ids[index],
            twin::choose(&rows[index], &logits[index * vocabulary..][..vocabulary]),
            &rows[index],
        )?;
    }
    Ok(())
}
