//! The decoder against transformers: every fixture's ids, logits and greedy texts.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::*;
use crate::backend::cpu::Cpu;
use crate::text::{Special, Words};

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    input_ids: Vec<u32>,
    next_logits: Vec<f32>,
    greedy_ids: Vec<u32>,
}

pub(crate) fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 2);
    folders
}

fn reference(folder: &Path) -> Reference {
    serde_json::from_slice(&std::fs::read(folder.join("reference.json")).unwrap()).unwrap()
}

pub(crate) fn decoder(folder: &Path) -> Decoder<Cpu> {
    let config = Config::read(folder).unwrap();
    let mut weights = Weights::open(folder).unwrap();
    let mut decoder = Decoder::load(Cpu::new(2).unwrap(), config, &mut weights).unwrap();
    decoder.reserve(Room { rows: 128, outputs: 8, blocks: 40, tokens: 640 });
    decoder
}

/// Blocks in no particular order, as after much coming and going.
fn table(first: u32) -> Vec<u32> {
    (0..12).map(|index| first + (index * 7) % 12).collect()
}

/// The logits after the last of `ids`, computed in chunks of that size.
fn logits(decoder: &mut Decoder<Cpu>, ids: &[u32], chunk: usize) -> Vec<f32> {
    let mut batch = Batch::default();
    let mut start = 0;
    let mut last = Vec::new();
    for part in ids.chunks(chunk) {
        batch.clear();
        batch.push(part, start, ids.len(), &table(3));
        batch.want_logits();
        start += part.len();
        last = decoder.forward(&batch).to_vec();
    }
    last
}

fn best(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    u32::try_from(logits.iter().position(|logit| *logit == largest).unwrap()).unwrap()
}

#[test]
fn input_ids_are_those_of_the_tokenizer() {
    for folder in fixtures() {
        let path = folder.join("tokenizer.json");
        let words = Words::load(&path, &std::fs::read(&path).unwrap()).unwrap();
        for case in reference(&folder).cases {
            assert_eq!(words.encode(&case.prompt, Special::Add).unwrap(), case.input_ids);
        }
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for folder in fixtures() {
        let mut decoder = decoder(&folder);
        for case in reference(&folder).cases {
            let logits = logits(&mut decoder, &case.input_ids, 128);
            let pairs = logits.iter().zip(&case.next_logits);
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3, "{}: {worst} after {:?}", folder.display(), case.prompt);
            assert_eq!(logits.len(), case.next_logits.len());
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for folder in fixtures() {
        let mut decoder = decoder(&folder);
        for case in reference(&folder).cases {
            let mut ids = case.input_ids.clone();
            let mut next = best(&logits(&mut decoder, &ids, 128));
            let mut greedy = vec![next];
            let mut batch = Batch::default();
            while greedy.len() < case.greedy_ids.len() {
                let start = if decoder.restarts_after() == Some(ids.len()) { 0 } else { ids.len() };
                ids.push(next);
                batch.clear();
                batch.push(&ids[start..], start, ids.len(), &table(3));
                batch.want_logits();
                next = best(decoder.forward(&batch));
                greedy.push(next);
            }
            assert_eq!(greedy, case.greedy_ids, "{}", folder.display());
        }
    }
}

#[test]
fn logits_do_not_depend_on_the_chunks() {
    for folder in fixtures() {
        let mut decoder = decoder(&folder);
        for case in reference(&folder).cases {
            let whole = logits(&mut decoder, &case.input_ids, 128);
            for chunk in [1, 2, 3, 5, 7, 16, 17, 33] {
                let chunked = logits(&mut decoder, &case.input_ids, chunk);
                assert!(same_bits(&whole, &chunked), "chunks of {chunk}");
            }
        }
    }
}

#[test]
fn logits_do_not_depend_on_neighbours_or_stale_blocks() {
    for folder in fixtures() {
        let mut decoder = decoder(&folder);
        let cases = reference(&folder).cases;
        let alone: Vec<_> = cases.iter().map(|case| logits(&mut decoder, &case.input_ids, 128)).collect();
        // Fills the whole cache with something else first, numbers that are none included.
        let poison = &mut decoder.lanes[0].cache;
        poison.fill(f32::NAN);
        let mut batch = Batch::default();
        for (index, case) in (0..).zip(&cases[..3]) {
            batch.push(&case.input_ids, 0, case.input_ids.len(), &table(index * 12));
            batch.want_logits();
        }
        let vocabulary = decoder.vocabulary();
        let together = decoder.forward(&batch);
        for (alone, together) in alone.iter().zip(together.chunks(vocabulary)) {
            assert!(same_bits(alone, together));
        }
    }
}

/// Sequences that change lanes take their keys and values along.
#[test]
fn logits_do_not_depend_on_the_lane() {
    for folder in fixtures() {
        let mut decoder = decoder(&folder);
        assert_eq!(decoder.lanes.len(), 2);
        let cases = reference(&folder).cases;
        let length = cases[2].input_ids.len().min(cases[3].input_ids.len());
        let sequences = [&cases[2].input_ids[..length], &cases[3].input_ids[..length]];
        let alone = sequences.map(|ids| logits(&mut decoder, ids, 128));
        for chunk in [1, 3, 20] {
            for (step, start) in (0..length).step_by(chunk).enumerate() {
                let last = start + chunk >= length;
                let mut batches = [0, 1].map(|index| {
                    let mut batch = Batch::default();
                    let ids = &sequences[index][start..length.min(start + chunk)];
                    batch.push(ids, start, length, &table([3, 20][index]));
                    batch.want_logits();
                    (batch, &alone[index])
                });
                batches.rotate_left(step % 2);
                let lanes = batches.iter_mut().map(|(batch, alone)| {
                    let finish = move |logits: &[f32], _: &mut Batch| {
                        assert!(!last || same_bits(alone, logits), "chunks of {chunk}");
                        Next::Done
                    };
                    Lane { batch, finish: Box::new(finish) }
                });
                let lanes = lanes.collect();
                decoder.pool().unwrap().install(|| decoder.forward_lanes(lanes));
            }
        }
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Tokens on a machine with other instructions are the same tokens.
#[test]
fn logits_do_not_depend_on_the_instruction_set() {
    let mut archs = vec![pulp::Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    archs.extend(pulp::x86::V3::try_new().map(pulp::Arch::V3));
    for folder in fixtures() {
        let case = &reference(&folder).cases[3];
        let expected = logits(&mut decoder(&folder), &case.input_ids, 128);
        for arch in &archs {
            let mut weights = Weights::open(&folder).unwrap();
            let config = Config::read(&folder).unwrap();
            let mut other = Decoder::load(Cpu::with_arch(*arch), config, &mut weights).unwrap();
            other.reserve(Room { rows: 128, outputs: 8, blocks: 40, tokens: 640 });
            assert!(same_bits(&expected, &logits(&mut other, &case.input_ids, 128)), "{arch:?}");
        }
    }
}
