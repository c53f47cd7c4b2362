//! How fast an engine is: tokens per second of requests one at a time and of the same together.
//!
//! `cargo run --release -p genmill-engine --example throughput -- FOLDER [REQUESTS] [TOKENS] [THREADS]`
//!
//! Never here: a queue, a worker. Both runs must give the same texts, or it fails.

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::error::Error;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use genmill_engine::{Completion, Engine, EngineOptions, Event, LoadOptions, Model, ModelPaths, Prompt, Request};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Every run is repeated, and the fastest counts.
const REPEATS: usize = 5;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model_path = PathBuf::from(args.next().ok_or("which folder?")?);
    let mut number = |default| args.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (requests, tokens, threads) = (number(32)?, number(128)?, number(0)?);
    let begun = Instant::now();
    let model = Model::load(
        &ModelPaths { model_path, tokenizer_path: None },
        &LoadOptions { threads, ..LoadOptions::default() },
    )?;
    println!("loaded in {:.2?}, {}", begun.elapsed(), model.card().instructions());
    let options = EngineOptions { max_sequences: requests.max(1), ..EngineOptions::default() };
    let engine = Engine::start(model, options)?;
    for (name, temperature, top_p, top_k) in
        [("greedy", 0.0, 1.0, 0), ("temperature 0.8", 0.8, 1.0, 0), ("and top_p 0.95, top_k 50", 0.8, 0.95, 50)]
    {
        let all: Vec<Request> = (0..requests)
            .map(|index| Request {
                temperature,
                top_p,
                top_k,
                seed: index as u64,
                ..Request::greedy(Prompt::Text(format!("Tell me about number {index}")), tokens)
            })
            .collect();
        let (tokens, alone, texts_alone) = fastest(&engine, &all, 1)?;
        let (_, together, texts_together) = fastest(&engine, &all, requests)?;
        if texts_alone != texts_together {
            return Err("the texts differ".into());
        }
        println!(
            "{name:25} {tokens:5} tokens: alone {alone:8.0} tok/s, {requests} together {together:8.0} tok/s, ratio {:.2}",
            together / alone
        );
    }
    Ok(())
}

/// Runs all requests, so many at a time; the tokens, the tokens per second and the texts.
fn fastest(engine: &Engine, all: &[Request], at_a_time: usize) -> Result<(u32, f64, Vec<String>)> {
    let mut best: (Duration, Vec<Completion>) = (Duration::MAX, Vec::new());
    for _ in 0..REPEATS {
        let begun = Instant::now();
        let mut done = Vec::new();
        for some in all.chunks(at_a_time) {
            let jobs = some.iter().map(|request| submit(engine, request)).collect::<Result<Vec<_>>>()?;
            for events in jobs {
                done.push(completion(&events)?);
            }
        }
        if begun.elapsed() < best.0 {
            best = (begun.elapsed(), done);
        }
    }
    let (time, done) = best;
    let tokens = u32::try_from(done.iter().map(|done| done.completion_tokens).sum::<usize>())?;
    Ok((tokens, f64::from(tokens) / time.as_secs_f64(), done.into_iter().map(|done| done.text).collect()))
}

fn submit(engine: &Engine, request: &Request) -> Result<Receiver<Event>> {
    let (sender, events) = channel();
    let mut text = String::new();
    // As a worker does: text is collected, and the waiting thread woken at the end.
    let sink = Box::new(move |event| match event {
        Event::Text { delta, .. } => text.push_str(&delta),
        Event::Started => {}
        Event::Finished(_) | Event::Failed(_) => drop(sender.send(event)),
    });
    engine.submit(request.clone(), sink)?;
    Ok(events)
}

fn completion(events: &Receiver<Event>) -> Result<Completion> {
    match events.recv()? {
        Event::Finished(completion) => Ok(completion),
        Event::Failed(error) => Err(error.into()),
        event @ (Event::Started | Event::Text { .. }) => Err(format!("{event:?} was not expected").into()),
    }
}
