//! What the engine itself does, through its public face.

use crate::What;
use anyhow::{Context as _, ensure};
use genmill_engine::{Completion, Engine, EngineOptions, Event, LoadOptions, Model, ModelPaths, Prompt, Request};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// An engine that runs.
pub(crate) struct Ours(Engine);

/// Tokens of the prompts that are shared.
const SHARED: usize = 512;

/// Jobs that begin alike, and what each has of its own and answers.
const JOBS: usize = 64;
const OWN: usize = 16;
const ANSWER: usize = 16;

impl Ours {
    /// Loads a model.
    pub(crate) fn start(path: &Path, threads: usize, prefix_cache: bool) -> anyhow::Result<Self> {
        let paths = ModelPaths { model_path: path.to_owned(), tokenizer_path: None };
        let model = Model::load(&paths, &LoadOptions { threads, ..LoadOptions::default() })?;
        let options =
            EngineOptions { kv_tokens: 40_960, step_tokens: SHARED, prefix_cache, ..EngineOptions::default() };
        Ok(Self(Engine::start(model, options)?))
    }

    /// Tokens a second.
    pub(crate) fn speed(&self, what: What) -> anyhow::Result<f64> {
        let [count, tokens, decoded] = what.sizes();
        let prompts: Vec<String> = (0..count).map(|number| prompt(number, tokens)).collect();
        let jobs = self.run(&prompts, 1 + decoded)?;
        let seconds = |part: fn(&Completion) -> Option<Duration>| -> anyhow::Result<Duration> {
            jobs.iter().filter_map(part).max().context("no token was generated")
        };
        Ok(match what {
            What::Prefill => rate(count * tokens, seconds(|job| job.first_token)?),
            // What comes up to the first token is no decoding.
            _ => rate(count * decoded, seconds(|job| Some(job.total.saturating_sub(job.first_token?)))?),
        })
    }

    /// Submits all at once and waits until they are done.
    fn run(&self, prompts: &[String], tokens: usize) -> anyhow::Result<Vec<Completion>> {
        let mut jobs = Vec::new();
        for prompt in prompts {
            let (sender, events) = channel();
            let request = Request { ignore_end: true, ..Request::greedy(Prompt::Text(prompt.clone()), tokens) };
            self.0.submit(request, Box::new(move |event| drop(sender.send(event))))?;
            jobs.push(events);
        }
        jobs.into_iter().map(|events| end(&events, tokens)).collect()
    }
}

/// Waits for a job.
fn end(events: &Receiver<Event>, tokens: usize) -> anyhow::Result<Completion> {
    loop {
        match events.recv().context("the engine has stopped")? {
            Event::Started | Event::Text { .. } => {}
            Event::Failed(error) => return Err(error.into()),
            Event::Finished(done) => {
                ensure!(done.completion_tokens == tokens, "{} tokens, not {tokens}", done.completion_tokens);
                return Ok(done);
            }
        }
    }
}

/// So many tokens, one for each letter, that no other number has.
fn prompt(number: usize, tokens: usize) -> String {
    // Never "ab", which is one token.
    let letter = |digit: usize| char::from(b"cdefghijklmnopqrstuvwxyz"[digit % 24]);
    (0..tokens).map(|index| letter(number / 24_usize.pow(u32::try_from(index % 3).unwrap_or(0)) + index)).collect()
}

/// Seconds for jobs with a shared beginning, without and with the prefix cache, which has not seen it before.
pub(crate) fn shared_prefix(path: &Path, threads: usize) -> anyhow::Result<[f64; 2]> {
    let shared = prompt(0, SHARED);
    let prompts: Vec<String> = (0..JOBS).map(|number| format!("{shared}{}", prompt(number, OWN))).collect();
    let seconds = |prefix_cache| -> anyhow::Result<f64> {
        let ours = Ours::start(path, threads, prefix_cache)?;
        // The first step touches memory for the first time.
        ours.run(&[prompt(7, SHARED)], 2)?;
        let begun = Instant::now();
        ours.run(&prompts, ANSWER)?;
        Ok(begun.elapsed().as_secs_f64())
    };
    Ok([seconds(false)?, seconds(true)?])
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn rate(count: usize, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}
