//! Workloads of a whole engine on a GPU, with made-up weights: requests of mixed lengths, requests that begin alike, and the
//! same requests as transformers gets.
//!
//! Never here: single steps. Weights are made up, so texts have no sense and end by their length alone. Words are those of a
//! test's tokenizer, whose vocabulary is smaller than the model's: a token that it does not know has no text.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::Dtype;
use crate::backend::cuda::driver::Driver;
use crate::config::Config;
use crate::decoder::Decoder;
use crate::error::LoadError;
use crate::generate_batch::{self, Job, median};
use crate::gpu::{CheckError, Measured};
use crate::sampler::philox;
use crate::small_engines;
use crate::weights::Weights;
use crate::{Engine, EngineOptions, Event, LoadOptions, Model, ModelPaths, Prompt, Request};

/// Tokens of the longest sequence.
pub(super) const CONTEXT: usize = 4096;

/// How an engine for these workloads is set up: as for a GPU of its own.
const OPTIONS: EngineOptions =
    EngineOptions { kv_tokens: 1 << 22, max_sequences: 256, step_tokens: 8192, max_waiting: 1024, prefix_cache: true };

/// Requests that begin alike: how many, tokens of the beginning, of what is each one's own, and of outputs.
const ALIKE: [usize; 4] = [256, 1024, 64, 128];

/// Requests that transformers gets too, which has one length of outputs for all: how many, and tokens of each output.
/// Prompts are as long as those of the mixed ones.
const BESIDE: [usize; 2] = [256, 256];

/// How often these run: once to warm up, then for the median.
const RUNS: usize = 4;

/// What a workload took.
struct Taken {
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    seconds: f64,
}

impl Taken {
    fn per_s(&self) -> f64 {
        self.output_tokens as f64 / self.seconds
    }
}

/// Runs the workloads with the model in a folder, and tells of them.
pub(super) fn workloads(
    (driver, ordinal): (&Arc<Driver>, usize),
    (model, folder): (&Measured, &Path),
    tokenizer: &Path,
    out: &mut dyn Write,
) -> Result<serde_json::Value, CheckError> {
    let engine = engine(driver, folder, tokenizer)?;
    let mixed = run(
        &engine,
        small_engines::lengths()
            .into_iter()
            .enumerate()
            .map(|(seed, (prompt, output))| request(seed, text(seed, prompt), output)),
    )?;
    let [count, beginning, own, output] = ALIKE;
    let begins = text(count, beginning);
    let alike = run(&engine, (0..count).map(|seed| request(seed, format!("{begins}{}", text(seed, own)), output)))?;
    let mut found = serde_json::Map::new();
    for (name, taken) in [("mixed", mixed), ("alike", alike)] {
        let per_s = taken.per_s();
        writeln!(
            out,
            "{:14} {name}: {per_s:9.0} output tokens/s; {} tokens in, of which {} were cached, {} out, {:.1} s",
            model.name, taken.prompt_tokens, taken.cached_tokens, taken.output_tokens, taken.seconds
        )?;
        let taken = serde_json::json!({
            "prompt_tokens": taken.prompt_tokens, "cached_prompt_tokens": taken.cached_tokens,
            "output_tokens": taken.output_tokens, "seconds": taken.seconds, "output_tokens_per_s": per_s,
        });
        found.insert(name.to_owned(), taken);
    }
    found.insert("beside".to_owned(), beside(engine, (model, folder), ordinal, out)?);
    Ok(found.into())
}

/// The same requests with this engine and with transformers, which has the device to itself then. Where it is not there, a line
/// says so.
fn beside(
    engine: Engine,
    (model, folder): (&Measured, &Path),
    ordinal: usize,
    out: &mut dyn Write,
) -> Result<serde_json::Value, CheckError> {
    let [count, output] = BESIDE;
    // Other texts in each run, or the cache would have them.
    let texts = |run: usize| -> Vec<String> {
        let lengths = small_engines::lengths().into_iter().take(count).enumerate();
        lengths.map(|(seed, (prompt, _))| text((run + 1) * 1000 + seed, prompt)).collect()
    };
    let (mut rates, mut runs) = (Vec::new(), Vec::new());
    for number in 0..RUNS {
        let texts = texts(number);
        let ids = texts.iter().map(|text| engine.card().prompt_tokens(&Prompt::Text(text.clone()), &[], 0));
        runs.push(ids.collect::<Result<Vec<_>, _>>().map_err(|error| failed(error.to_string()))?);
        let greedy = |(seed, text)| Request { temperature: 0.0, ..request(seed, text, output) };
        let taken = run(&engine, texts.into_iter().enumerate().map(greedy))?;
        rates.push(taken.per_s());
    }
    drop(engine);
    // The first run warmed up.
    let ours = median(&mut rates[1..]);
    let job = Job { folder, device: ordinal, runs: &runs, output_tokens: output };
    let name = model.name;
    match generate_batch::measure("python3", &job) {
        Ok(theirs) => {
            let ratio = ours / theirs.tokens_per_s;
            writeln!(
                out,
                "{name:14} beside {}: {ours:9.0} and {:9.0} output tokens/s, {ratio:.2} times",
                theirs.setting, theirs.tokens_per_s
            )?;
            Ok(serde_json::json!({
                "output_tokens_per_s": ours, "transformers_output_tokens_per_s": theirs.tokens_per_s,
                "ratio": ratio, "transformers": theirs.setting,
            }))
        }
        Err(missing) => {
            writeln!(out, "{name:14} {ours:9.0} output tokens/s; none of transformers: {missing}")?;
            Ok(serde_json::json!({"output_tokens_per_s": ours, "transformers": missing}))
        }
    }
}

/// An engine with the tokenizer of a test's model and the weights of another.
fn engine(driver: &Arc<Driver>, folder: &Path, tokenizer: &Path) -> Result<Engine, CheckError> {
    let paths = ModelPaths { model_path: tokenizer.to_owned(), tokenizer_path: None };
    let words = Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() })?;
    let backend = Cuda::new(driver.clone(), Dtype::Bf16).with_graphs();
    let decoder = Decoder::load(backend, Config::read(folder)?, &mut Weights::open(folder)?)?;
    let model = words.with_forward(Box::new(decoder)).with_context(CONTEXT);
    let started = Engine::start_after_dry_run(model, OPTIONS);
    Ok(started.map_err(|error| LoadError::Device { message: error.to_string() })?)
}

/// A text of so many tokens: letters of two bytes, which a tokenizer of bytes takes one by one. No two of them begin alike.
fn text(seed: usize, tokens: usize) -> String {
    let word =
        |index: usize| philox([u32::try_from(index).unwrap_or(0), 0, 0, 0], [u32::try_from(seed).unwrap_or(0), 9]);
    let letter = |index: usize| char::from_u32(0x100 + word(index)[0] % 128).unwrap_or('a');
    (0..tokens.div_ceil(2)).map(letter).collect()
}

fn request(seed: usize, text: String, output: usize) -> Request {
    Request { temperature: 0.6, seed: seed as u64, ignore_end: true, ..Request::greedy(Prompt::Text(text), output) }
}

fn failed(message: String) -> CheckError {
    CheckError::Device(LoadError::Device { message })
}

/// Runs requests that come all at once.
fn run(engine: &Engine, requests: impl Iterator<Item = Request>) -> Result<Taken, CheckError> {
    let begun = Instant::now();
    let mut open: Vec<Receiver<Event>> = Vec::new();
    for request in requests {
        let (sender, events) = channel();
        let sink = Box::new(move |event| drop(sender.send(event)));
        engine.submit(request, sink).map_err(|error| failed(error.to_string()))?;
        open.push(events);
    }
    let mut taken = Taken { prompt_tokens: 0, cached_tokens: 0, output_tokens: 0, seconds: 0.0 };
    for events in open {
        match events.iter().last() {
            Some(Event::Finished(done)) => {
                taken.prompt_tokens += done.prompt_tokens;
                taken.cached_tokens += done.cached_prompt_tokens;
                taken.output_tokens += done.completion_tokens;
            }
            other => return Err(failed(format!("a request ended with {other:?}"))),
        }
    }
    taken.seconds = begun.elapsed().as_secs_f64();
    Ok(taken)
}
