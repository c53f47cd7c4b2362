//! Workloads of a whole engine on a GPU, with made-up weights: requests of mixed lengths, and requests that begin alike.
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
use crate::decoder::Decoder;
use crate::error::LoadError;
use crate::gpu::{CheckError, Measured};
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

/// What a workload took.
struct Taken {
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    seconds: f64,
}

/// Runs both workloads with a model, and tells of them.
pub(super) fn workloads(
    driver: &Arc<Driver>,
    model: &Measured,
    tokenizer: &Path,
    out: &mut dyn Write,
) -> Result<serde_json::Value, CheckError> {
    let engine = engine(driver, model, tokenizer)?;
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
        let per_s = taken.output_tokens as f64 / taken.seconds;
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
    Ok(found.into())
}

/// An engine with the tokenizer of a test's model and the made-up weights of another.
fn engine(driver: &Arc<Driver>, model: &Measured, tokenizer: &Path) -> Result<Engine, CheckError> {
    let paths = ModelPaths { model_path: tokenizer.to_owned(), tokenizer_path: None };
    let words = Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() })?;
    let backend = Cuda::new(driver.clone(), Dtype::Bf16).with_graphs();
    let decoder = Decoder::load(backend, super::config(model)?, &mut Weights::made_up(model.without))?;
    let model = words.with_forward(Box::new(decoder)).with_context(CONTEXT);
    let started = Engine::start_after_dry_run(model, OPTIONS);
    Ok(started.map_err(|error| LoadError::Device { message: error.to_string() })?)
}

/// A text of so many tokens: letters of two bytes, which a tokenizer of bytes takes one by one.
fn text(seed: usize, tokens: usize) -> String {
    let number = |index: usize| u32::try_from((index * 7919 + seed * 104_729) % 128).unwrap_or(0);
    let letter = |index: usize| char::from_u32(0x100 + number(index)).unwrap_or('a');
    (0..tokens.div_ceil(2)).map(letter).collect()
}

fn request(seed: usize, text: String, output: usize) -> Request {
    Request { temperature: 0.6, seed: seed as u64, ignore_end: true, ..Request::greedy(Prompt::Text(text), output) }
}

/// Runs requests that come all at once.
fn run(engine: &Engine, requests: impl Iterator<Item = Request>) -> Result<Taken, CheckError> {
    let failed = |message: String| CheckError::Device(LoadError::Device { message });
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
