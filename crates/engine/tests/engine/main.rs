//! The engine from outside: texts of the fixtures, independence of the batch, the life of a
//! request, broken checkpoints; and random runs of schedule and sampler.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails loudly")]

mod batch;
mod broken;
mod defaults;
mod forms;
mod gguf;
mod quantise;
mod reference;
mod requests;
mod sampler;
mod sampling;
mod schedule;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use genmill_engine::{
    Completion, Engine, EngineOptions, Event, LoadOptions, Model, ModelPaths, Prompt, Request, RequestError, RequestId,
    SubmitError,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The names of all fixtures.
fn fixtures() -> Vec<String> {
    let entries = std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path());
    let folders = entries.filter(|path| path.is_dir());
    let mut names: Vec<String> = folders.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    assert!(names.len() >= 20);
    names
}

fn load(folder: &Path) -> Model {
    let paths = ModelPaths { model_path: folder.to_owned(), tokenizer_path: None };
    Model::load(&paths, &LoadOptions { threads: 2, ..LoadOptions::default() }).unwrap()
}

/// A small engine on a fixture.
fn engine(name: &str, step_tokens: usize) -> Engine {
    let options =
        EngineOptions { kv_tokens: 8192, max_sequences: 32, step_tokens, max_waiting: 64, ..Default::default() };
    Engine::start(load(&fixture(name)), options).unwrap()
}

/// A greedy request.
fn greedy(prompt: &str, max_tokens: usize) -> Request {
    Request::greedy(Prompt::Text(prompt.to_owned()), max_tokens)
}

/// A submitted request's events.
struct Job {
    id: RequestId,
    events: Receiver<Event>,
}

/// What became of a request.
#[derive(Debug)]
struct Outcome {
    /// Of the first sample.
    deltas: Vec<String>,
    /// Of the others.
    more: Vec<String>,
    started: bool,
    end: Result<Completion, RequestError>,
}

fn submit(engine: &Engine, request: Request) -> Result<Job, SubmitError> {
    let (sender, events) = channel();
    // A test that has seen enough may be gone.
    let id = engine.submit(request, Box::new(move |event| drop(sender.send(event))))?;
    Ok(Job { id, events })
}

impl Job {
    fn next(&self) -> Event {
        self.events.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    /// Waits for the end and checks that the deltas are the text.
    fn outcome(self) -> Outcome {
        let mut outcome =
            Outcome { deltas: Vec::new(), more: Vec::new(), started: false, end: Err(step_error("no end")) };
        loop {
            match self.next() {
                Event::Started => outcome.started = true,
                Event::Text { sample: 0, delta } => outcome.deltas.push(delta),
                Event::Text { sample, delta } => {
                    outcome.more.resize(outcome.more.len().max(sample), String::new());
                    outcome.more[sample - 1] += &delta;
                }
                Event::Finished(completion) => {
                    assert_eq!(outcome.deltas.concat(), completion.text);
                    assert!(outcome.more.iter().zip(&completion.more).all(|(text, output)| *text == output.text));
                    assert!(self.events.recv().is_err(), "an event after the last");
                    return Outcome { end: Ok(completion), ..outcome };
                }
                Event::Failed(error) => return Outcome { end: Err(error), ..outcome },
            }
        }
    }

    fn completion(self) -> Completion {
        self.outcome().end.unwrap()
    }
}

fn step_error(message: &str) -> RequestError {
    RequestError::Step { message: message.to_owned() }
}
