//! The sampler: known answers of Philox, membership in the nucleus, frequencies, ties.

use std::collections::BTreeSet;

use genmill_engine::sampler::{Sampling, Workspace, philox};
use proptest::prelude::*;

const PLAIN: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 1, sample: 0, min_p: 0.0 };

fn draws(sampling: Sampling, logits: &[f32], count: u32) -> Vec<u32> {
    let mut workspace = Workspace::default();
    (0..count).map(|position| sampling.choose(logits, position, &mut workspace).unwrap()).collect()
}

/// The known answers of Random123 (kat_vectors, philox4x32-10).
#[test]
fn philox_gives_the_known_answers() {
    for (counter, key, expected) in [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ] {
        assert_eq!(philox(counter, key), expected);
    }
}

#[test]
fn frequencies_follow_the_probabilities() {
    let probabilities = [0.5_f32, 0.3, 0.15, 0.05];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
    for (sampling, expected) in [
        (PLAIN, [0.5, 0.3, 0.15, 0.05]),
        (Sampling { top_k: 2, ..PLAIN }, [0.625, 0.375, 0.0, 0.0]),
        (Sampling { top_p: 0.9, ..PLAIN }, [0.526, 0.316, 0.158, 0.0]),
        (Sampling { temperature: 0.5, ..PLAIN }, [0.685, 0.247, 0.062, 0.007]),
    ] {
        let drawn = draws(sampling, &logits, 20_000);
        for (token, expected) in (0..).zip(expected) {
            let count = drawn.iter().filter(|drawn| **drawn == token).count();
            let frequency = count as f64 / 20_000.0;
            assert!((frequency - expected).abs() < 0.015, "{sampling:?} {token}: {frequency}");
        }
    }
}

#[test]
fn equal_logits_go_to_the_lowest_id() {
    let logits = [1.0, 3.0, 3.0, 2.0, 3.0];
    assert_eq!(draws(Sampling { temperature: 0.0, ..PLAIN }, &logits, 3), [1; 3]);
    assert_eq!(draws(Sampling { top_k: 1, ..PLAIN }, &logits, 3), [1; 3]);
    let two: BTreeSet<u32> = draws(Sampling { top_k: 2, ..PLAIN }, &logits, 200).into_iter().collect();
    assert_eq!(two, BTreeSet::from([1, 2]));
}

#[test]
fn a_logit_that_is_no_number_is_an_error() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = PLAIN.choose(&[0.0, bad], 0, &mut Workspace::default()).unwrap_err();
        assert_eq!(error.token, 1);
    }
}

#[test]
fn seed_sample_and_position_each_change_the_draw() {
    let logits = [0.0; 1000];
    let base = draws(PLAIN, &logits, 50);
    assert_eq!(base, draws(PLAIN, &logits, 50));
    assert_ne!(base, draws(Sampling { seed: 2, ..PLAIN }, &logits, 50));
    assert_ne!(base, draws(Sampling { seed: 1 | 1 << 32, ..PLAIN }, &logits, 50));
    assert_ne!(base, draws(Sampling { sample: 1, ..PLAIN }, &logits, 50));
    assert!(base.iter().collect::<BTreeSet<_>>().len() > 40);
}

/// The considered tokens by sorting everything.
fn considered(logits: &[f32], sampling: &Sampling) -> BTreeSet<u32> {
    let mut ids: Vec<u32> = (0..).take(logits.len()).collect();
    ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    if sampling.top_k > 0 {
        ids.truncate(sampling.top_k);
    }
    let weight = |id: &u32| (f64::from(logits[*id as usize]) / f64::from(sampling.temperature)).exp();
    let total: f64 = ids.iter().map(weight).sum();
    let mut sum = 0.0;
    let kept = ids.iter().take_while(|id| {
        let open = sum < f64::from(sampling.top_p) * total * (1.0 + 1e-5);
        sum += weight(id);
        open
    });
    kept.copied().collect()
}

proptest! {
    #[test]
    fn draws_are_among_the_considered(
        logits in proptest::collection::vec(-4.0_f32..4.0, 1..600),
        top_k in 0_usize..100,
        top_p in 0.05_f32..=1.0,
        temperature in 0.2_f32..3.0,
        seed: u64,
    ) {
        let sampling = Sampling { temperature, top_k, top_p, min_p: 0.0, seed, sample: 0 };
        let considered = considered(&logits, &sampling);
        for token in draws(sampling, &logits, 30) {
            prop_assert!(considered.contains(&token));
        }
    }
}
