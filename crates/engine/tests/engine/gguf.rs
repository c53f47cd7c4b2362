//! GGUF models from outside: whole engines on them, split files, broken and hostile ones.

use std::fs;
use std::path::{Path, PathBuf};

use genmill_engine::{ChatMessage, Engine, EngineOptions, LoadOptions, Model, ModelPaths, Prompt};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::{fixture, greedy, load, submit};

fn gguf(name: &str) -> PathBuf {
    fixture("..").join("gguf").join(format!("{name}.gguf"))
}

fn engine(path: &Path) -> Engine {
    let options =
        EngineOptions { kv_tokens: 8192, max_sequences: 32, step_tokens: 64, max_waiting: 64, ..Default::default() };
    Engine::start(load(path), options).unwrap()
}

fn error(path: &Path) -> String {
    let paths = ModelPaths { model_path: path.to_owned(), tokenizer_path: None };
    Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap_err().to_string()
}

#[test]
fn a_model_answers_as_from_safetensors() {
    // Rounded weights may continue otherwise; what the two say of themselves is the same.
    let (ours, theirs) = (engine(&gguf("qwen2-f16")), crate::engine("qwen2", 64));
    let message = ChatMessage::new("user", "hello");
    let prompt = Prompt::Chat(vec![message]);
    let (ours, theirs) = (ours.card(), theirs.card());
    assert_eq!(ours.prompt_tokens(&prompt, &[], 0).unwrap(), theirs.prompt_tokens(&prompt, &[], 0).unwrap());
    assert_eq!(ours.context_tokens(), theirs.context_tokens());
    let ends = |ends: Vec<u32>| ends.into_iter().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(ends(ours.end_tokens(&prompt)), ends(theirs.end_tokens(&prompt)));
}

#[test]
fn answers_do_not_depend_on_the_batch() {
    for name in ["qwen2-q4_0", "qwen2-q5_0", "qwen2-q8_0", "qwen2-q4_k_m", "qwen2-q5_k", "qwen2-q6_k", "qwen2-bf16"] {
        let engine = engine(&gguf(name));
        let request = |seed| genmill_engine::Request { temperature: 1.0, seed, ..greedy("1 + 1 =", 20) };
        let alone: Vec<_> = (0..16).map(|seed| submit(&engine, request(seed)).unwrap().completion().text).collect();
        let jobs: Vec<_> = (0..16).map(|seed| submit(&engine, request(seed)).unwrap()).collect();
        let batch: Vec<_> = jobs.into_iter().map(|job| job.completion().text).collect();
        assert_eq!(alone, batch, "{name}");
    }
}

#[test]
fn a_folder_with_one_model_and_any_part_of_a_split_one_lead_to_it() {
    let folder = TempDir::new().unwrap();
    let parts = split(folder.path());
    let whole = load(&gguf("qwen2-q8_0")).card().fingerprint().clone();
    for path in [folder.path(), &parts[0], &parts[1]] {
        assert_eq!(*load(path).card().fingerprint(), whole, "{}", path.display());
    }
    fs::remove_file(&parts[1]).unwrap();
    assert!(error(&parts[0]).contains("m-00002-of-00002.gguf"), "{}", error(&parts[0]));
    let renamed = folder.path().join("m.gguf");
    fs::rename(&parts[0], &renamed).unwrap();
    assert!(error(&renamed).contains("split.count is 2, but 1 of these files are there"), "{}", error(&renamed));
}

/// The bytes of a string of a header.
fn text(text: &str) -> Vec<u8> {
    [(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes()].concat()
}

/// A header of so many tensors and keys.
fn header(tensors: u64, keys: u64) -> Vec<u8> {
    [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
}

/// A tensor's entry: sizes, type, offset.
fn entry(name: &str, sizes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend(u32::try_from(sizes.len()).unwrap().to_le_bytes());
    bytes.extend(sizes.iter().flat_map(|size| size.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// Makes two parts of a fixture: all metadata and no tensor, then all tensors.
fn split(folder: &Path) -> [PathBuf; 2] {
    let bytes = fs::read(gguf("qwen2-q8_0")).unwrap();
    let tensors = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    let keys = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    // The first tensor's name ends the metadata.
    let mark = text("blk.0.attn_norm.weight");
    let first = [mark, text("token_embd.weight")]
        .into_iter()
        .filter_map(|mark| bytes.windows(mark.len()).position(|part| part == mark));
    let first = first.min().unwrap();
    let count = [text("split.count"), 2_u32.to_le_bytes().to_vec(), 2_u16.to_le_bytes().to_vec()].concat();
    let paths = [1, 2].map(|part| folder.join(format!("m-0000{part}-of-00002.gguf")));
    fs::write(&paths[0], [header(0, keys + 1), bytes[24..first].to_vec(), count].concat()).unwrap();
    // As many bytes of metadata as before, so that the data stays aligned: one key with a long value.
    let length = first - 24 - (8 + 1 + 4 + 8);
    let filler = [text("x"), 8_u32.to_le_bytes().to_vec(), text(&"-".repeat(length))].concat();
    fs::write(&paths[1], [header(tensors, 1), filler, bytes[first..].to_vec()].concat()).unwrap();
    paths
}

/// Expects this error of a file with such bytes.
fn check(bytes: &[u8], expected: &str) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("broken.gguf");
    fs::write(&path, bytes).unwrap();
    let error = error(&path);
    assert!(error.contains("broken.gguf") && error.contains(expected), "{error}");
}

#[test]
fn a_truncated_file_is_an_error() {
    let bytes = fs::read(gguf("qwen2-q4_0")).unwrap();
    for length in [0, 3, 4, 8, 23, 100, 2000, 20_000] {
        check(&bytes[..length], "truncated or damaged");
    }
    for length in [bytes.len() / 2, bytes.len() - 1] {
        check(&bytes[..length], "ends beyond the file's");
    }
}

#[test]
fn headers_that_lie_are_errors() {
    check(b"GGML\x03\0\0\0", "is not a GGUF file");
    check(&[b"GGUF".as_slice(), &1_u32.to_le_bytes()].concat(), "is GGUF version 1");
    check(&[b"GGUF".as_slice(), &3_u32.to_be_bytes()].concat(), "is GGUF version 50331648");
    check(&header(u64::MAX, 0), "states 18446744073709551615 tensors");
    check(&header(0, 1 << 40), "states 1099511627776 metadata keys");
    check(&[header(0, 1), (1_u64 << 60).to_le_bytes().to_vec()].concat(), "states 1152921504606846976 bytes for");
    let huge_list = [text("k"), 9_u32.to_le_bytes().to_vec(), 8_u32.to_le_bytes().to_vec(), vec![0xFF; 8]].concat();
    check(&[header(0, 1), huge_list].concat(), "elements of k");
    let nested =
        [text("k"), 9_u32.to_le_bytes().to_vec(), 9_u32.to_le_bytes().to_vec(), vec![1, 0, 0, 0, 0, 0, 0, 0, 0]];
    check(&[header(0, 1), nested.concat()].concat(), "k has a value of unknown type 9");
}

#[test]
fn tensors_that_lie_are_named() {
    let tensor = |sizes: &[u64], kind, offset| [header(1, 0), entry("t", sizes, kind, offset)].concat();
    check(&tensor(&[32], 8, 0), "tensor t of shape [32] and type q8_0 at byte 0 of the data ends beyond");
    check(&tensor(&[32], 0, u64::MAX - 7), "tensor t of shape [32] and type f32");
    check(&tensor(&[1 << 40, 1 << 40], 0, 0), "tensor t has an impossible shape");
    check(&tensor(&[33], 8, 0), "tensor t of shape [33] cannot be of type q8_0");
    check(&tensor(&[32], 16, 0), "tensor t has type 16, which is not read; read are: f32");
    check(&tensor(&[1; 5], 0, 0), "tensor t has 5 dimensions");
    check(&tensor(&[], 0, 0), "tensor t has 0 dimensions");
    let twice = [header(2, 0), entry("t", &[0], 0, 0), entry("t", &[0], 0, 0), vec![0; 64]];
    check(&twice.concat(), "tensor t is listed twice");
    let shared = [header(2, 0), entry("a", &[8], 0, 0), entry("b", &[8], 0, 16), vec![0; 128]];
    check(&shared.concat(), "tensors a and b overlap");
}

/// Puts other bytes in the place of some, of the same length, and expects this error.
fn check_changed(from: &[u8], to: &[u8], expected: &str) {
    let mut bytes = fs::read(gguf("qwen2-q4_0")).unwrap();
    let at = bytes.windows(from.len()).position(|part| part == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    check(&bytes, expected);
}

#[test]
fn metadata_that_does_not_fit_is_named() {
    let number =
        |key: &str, number: u32| [text(key), 4_u32.to_le_bytes().to_vec(), number.to_le_bytes().to_vec()].concat();
    check_changed(
        &number("qwen2.embedding_length", 64),
        &number("qwen2.embedding_length", 96),
        "has shape [640, 64], config.json asks for [640, 96]",
    );
    check_changed(&number("qwen2.block_count", 2), &number("qwen2.block_count", 3), "tensor blk.2.");
    check_changed(
        &number("qwen2.attention.head_count", 4),
        &number("qwen2.attention.head_count", 0),
        "num_attention_heads is 0",
    );
    check_changed(&text("qwen2.block_count"), &text("qwen2.block_c0unt"), "qwen2.block_count is missing");
    check_changed(b"gpt-2", b"gpt-9", "tokenizer.ggml.pre is gpt-9; read are: qwen2");
    check_changed(&text("tokenizer.ggml.merges"), &text("tokenizer.ggml.mergez"), "tokenizer.ggml.merges is missing");
    check_changed(&[text("qwen2"), text("x")].concat()[..13], &text("bert2"), "architecture bert2 is not known");
    check_changed(&text("blk.1.ffn_up.weight"), &text("blk.1.ffn_aa.weight"), "tensor blk.1.ffn_up.weight is missing");
    check_changed(
        &number("tokenizer.ggml.eos_token_id", 2),
        &number("tokenizer.ggml.eos_token_id", 9999),
        "tokenizer.ggml.eos_token_id is 9999, but there are only 640 tokens",
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Flipped bytes give an error or another model, never a panic.
    #[test]
    fn damaged_headers_never_panic(at in 0_usize..14_000, value in any::<u8>()) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("m.gguf");
        let mut bytes = fs::read(gguf("qwen2-q4_0")).unwrap();
        bytes[at] = value;
        fs::write(&path, bytes).unwrap();
        let paths = ModelPaths { model_path: path, tokenizer_path: None };
        drop(Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() }));
    }
}
