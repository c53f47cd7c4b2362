//! Every GGUF fixture: ids, logits and greedy tokens, computed from what the `gguf` package says its weights are.

use serde::Deserialize;

use super::*;
use crate::architectures;
use crate::backend::Batch;
use crate::backend::cpu::Cpu;
use crate::config::{Config, Fields};
use crate::decoder::{Decoder, Forward as _, Room};
use crate::text::{Special, Words};
use crate::weights::Weights;

#[derive(Deserialize)]
struct Reference {
    class: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    input_ids: Vec<u32>,
    next_logits: Vec<f32>,
    greedy_ids: Vec<u32>,
}

/// All fixtures.
fn all() -> Vec<(PathBuf, Reference)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf");
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "gguf")).collect();
    paths.sort();
    let reference = |path: &Path| serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
    let all: Vec<_> = paths.into_iter().map(|path| (path.clone(), reference(&path))).collect();
    assert!(all.len() >= 17);
    all
}

/// The fixtures of families that the decoder has.
fn fixtures() -> Vec<(PathBuf, Reference)> {
    let mut known = all();
    known.retain(|(_, reference)| architectures::find(&reference.class).is_some());
    assert!(known.len() >= 10);
    known
}

fn fixture(name: &str) -> Gguf {
    Gguf::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf").join(name)).unwrap()
}

fn words(gguf: &Gguf) -> Words {
    Words::load(gguf.path(), gguf.tokenizer().unwrap().to_string().as_bytes()).unwrap()
}

fn decoder(path: &Path) -> Decoder<Cpu> {
    let gguf = Gguf::open(path).unwrap();
    let config = Config::of(&Fields::of(path, gguf.config()), None).unwrap();
    let mut decoder = Decoder::load(Cpu::new(2).unwrap(), config, &mut Weights::of_gguf(gguf)).unwrap();
    decoder.reserve(Room { rows: 128, outputs: 8, blocks: 40, tokens: 640 });
    decoder
}

fn logits(decoder: &mut Decoder<Cpu>, ids: &[u32], start: usize) -> Vec<f32> {
    let mut batch = Batch::default();
    batch.push(ids, start, start + ids.len(), &(0..12).collect::<Vec<_>>());
    batch.want_logits();
    decoder.forward(&batch).to_vec()
}

#[test]
fn ids_are_those_of_the_model_s_own_tokenizer() {
    for (path, reference) in all() {
        let json = Gguf::open(&path).unwrap().tokenizer().unwrap().to_string();
        let words = Words::load(&path, json.as_bytes()).unwrap();
        for case in reference.cases {
            let ids = words.encode(&case.prompt, Special::Add).unwrap();
            assert_eq!(ids, case.input_ids, "{}: {:?}", path.display(), case.prompt);
        }
    }
}

/// The weights are exactly those of the reference, so what is left is what float32 sums differ from float64 ones: the
/// bound that holds for float32 checkpoints.
#[test]
fn logits_are_those_of_the_dequantised_weights() {
    for (path, reference) in fixtures() {
        let mut decoder = decoder(&path);
        for case in reference.cases {
            let logits = logits(&mut decoder, &case.input_ids, 0);
            assert_eq!(logits.len(), case.next_logits.len());
            let pairs = logits.iter().zip(&case.next_logits);
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3, "{}: {worst} after {:?}", path.display(), case.prompt);
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_dequantised_weights() {
    for (path, reference) in fixtures() {
        let mut decoder = decoder(&path);
        for case in reference.cases {
            let (mut ids, mut start) = (case.input_ids.clone(), 0);
            for expected in case.greedy_ids {
                let logits = logits(&mut decoder, &ids, start);
                start += ids.len();
                let best = (0..).zip(&logits).max_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap().0;
                assert_eq!(best, expected, "{}", path.display());
                ids = vec![best];
            }
        }
    }
}

/// A prompt's rows have the same bits when the prompt is computed at once and token by token.
#[test]
fn logits_do_not_depend_on_the_batch() {
    for (path, reference) in fixtures() {
        let mut decoder = decoder(&path);
        for case in reference.cases {
            let at_once = logits(&mut decoder, &case.input_ids, 0);
            let single: Vec<_> = (0..).zip(&case.input_ids).map(|(at, id)| logits(&mut decoder, &[*id], at)).collect();
            let same = at_once.iter().zip(single.last().unwrap()).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{}", path.display());
        }
    }
}

#[test]
fn any_part_of_a_model_leads_to_all_of_them() {
    let path = Path::new("/m/a-b-00002-of-00003.gguf");
    let split = Split::of(path).unwrap();
    assert_eq!(split, Split { stem: "a-b".to_owned(), part: 2, parts: 3 });
    let names: Vec<_> = split.paths(path).unwrap();
    assert_eq!(names[0], Path::new("/m/a-b-00001-of-00003.gguf"));
    assert_eq!((names.len(), &*names[2]), (3, Path::new("/m/a-b-00003-of-00003.gguf")));
    for other in ["a.gguf", "a-of-b.gguf", "a-1-of-2.gguf", "00001-of-00002.gguf"] {
        assert_eq!(Split::of(Path::new(other)), None, "{other}");
    }
    assert!(Split::of(Path::new("a-00001-of-99999.gguf")).unwrap().paths(path).is_err());
    assert!(Split::of(Path::new("a-00001-of-00000.gguf")).unwrap().paths(path).is_err());
}

#[test]
fn every_way_of_splitting_gives_the_text_back() {
    let mut gguf = fixture("qwen2-q4_0.gguf");
    let text = "It's 1234 o'clock, gr\u{fc}\u{df}e \u{4f60}\u{597d}!\r\n\tx = {'a': [10, 100]}  ";
    for name in tokenizer::splittings() {
        gguf.metadata.values.insert("tokenizer.ggml.pre".to_owned(), Value::Text(name.to_owned()));
        let words = words(&gguf);
        let mut stream = words.stream();
        let ids = words.encode(text, Special::Add).unwrap();
        let back: String = ids.iter().map(|id| stream.push(*id)).collect();
        assert_eq!(back + &stream.finish(), text, "{name}");
        // This vocabulary has 10 as a token.
        let digits = words.encode("10", Special::Leave).unwrap().len();
        assert_eq!(digits, if ["qwen2", "smollm"].contains(&name) { 2 } else { digits }, "{name}");
    }
}

/// Files fill up ids that the tokenizer does not have with names such as `[PAD600]`.
#[test]
fn a_token_that_is_unused_is_no_text() {
    let words = words(&fixture("qwen2-q8_0.gguf"));
    let mut stream = words.stream();
    assert_eq!((stream.push(639), stream.finish()), (String::new(), String::new()));
    let ids = words.encode("[PAD639]", Special::Add).unwrap();
    assert!(!ids.contains(&639), "{ids:?}");
}

#[test]
fn windows_are_those_that_the_file_tells() {
    let windows = |change: &dyn Fn(&mut BTreeMap<String, Value>)| {
        let mut gguf = fixture("gemma3-q8_0.gguf");
        change(&mut gguf.metadata.values);
        let told = gguf.make_config().unwrap();
        let config = Config::of(&Fields::of(gguf.path(), &told), None).unwrap();
        [0, 1, 2, 3].map(|layer| config.windows.tokens(layer).unwrap_or(0))
    };
    let (window, pattern) = ("gemma3.attention.sliding_window", "gemma3.attention.sliding_window_pattern");
    let put =
        |number: f64| move |values: &mut BTreeMap<_, _>| drop(values.insert(pattern.to_owned(), Value::Number(number)));
    assert_eq!(windows(&|_| ()), [20, 0, 20, 0]);
    assert_eq!(windows(&put(3.0)), [20, 20, 0, 20]);
    assert_eq!(windows(&put(0.0)), [20, 20, 20, 20]);
    assert_eq!(windows(&|values| drop(values.remove(pattern))), [20; 4]);
    assert_eq!(windows(&|values| drop(values.remove(window))), [0; 4]);
}
