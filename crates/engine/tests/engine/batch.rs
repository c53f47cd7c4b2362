//! The contract: a request's tokens are the same alone and in any company, under any chunking.

use std::sync::mpsc::channel;

use genmill_engine::{Completion, Engine, EngineOptions, Event, Prompt, Request};

use crate::{engine, fixture, greedy, load, submit};

/// Requests of many lengths, seeded, with all samplings.
fn requests() -> Vec<Request> {
    let text = "Money: $0.16 per hour, 75% of the budget is spent. 你好，世界。 def add(a, b):";
    (0..32)
        .map(|index: usize| {
            let prompt: String = text.chars().cycle().skip(index * 3).take(1 + index * 7 % 120).collect();
            Request {
                prompt: Prompt::Text(prompt),
                temperature: [0.0, 0.1, 0.8, 1.5][index % 4],
                top_k: [0, 40, 5][index % 3],
                top_p: [1.0, 0.9][index % 2],
                seed: 1000 + index as u64,
                stop: if index.is_multiple_of(5) { vec!["or".to_owned()] } else { Vec::new() },
                ..greedy("", 20 + index % 13)
            }
        })
        .collect()
}

fn together(engine: &Engine, requests: &[Request]) -> Vec<Completion> {
    let jobs: Vec<_> = requests.iter().map(|request| submit(engine, request.clone()).unwrap()).collect();
    jobs.into_iter().map(crate::Job::completion).collect()
}

#[test]
fn texts_alone_are_texts_in_a_batch_under_any_budget() {
    let families = ["gemma2", "gemma3", "llama-yarn", "mistral", "mixtral", "phi3-long", "qwen3-moe"];
    for name in ["qwen2", "gpt2", "qwen2-untied", "gpt2-odd"].into_iter().chain(families) {
        let requests = requests();
        let engine_alone = engine(name, 512);
        let alone: Vec<Completion> =
            requests.iter().map(|request| submit(&engine_alone, request.clone()).unwrap().completion()).collect();
        for step_tokens in [32, 33, 47, 100, 512] {
            let engine = engine(name, step_tokens);
            for (alone, among) in alone.iter().zip(together(&engine, &requests)) {
                assert_eq!(alone.text, among.text, "{name}, {step_tokens} tokens a step");
                assert_eq!(alone.completion_tokens, among.completion_tokens);
                assert_eq!(alone.reason, among.reason);
            }
        }
    }
}

/// Requests of three groups that begin alike within each, all with log probabilities.
fn groups() -> Vec<Request> {
    let request = |index: usize| {
        let beginning = format!("{} You are asked for the best move, and answer in one word.", index % 3).repeat(4);
        Request {
            prompt: Prompt::Text(format!("{beginning} {index}")),
            temperature: [0.0, 0.9][index % 2],
            seed: index as u64,
            logprobs: Some(2),
            samples: 1 + usize::from(index.is_multiple_of(7)),
            ..greedy("", 24)
        }
    };
    (0..30).map(request).collect()
}

#[test]
fn what_others_have_computed_changes_no_bit() {
    for name in ["qwen2", "gpt2"] {
        let outcome = |engine: &Engine, requests: &[Request]| {
            let completions = together(engine, requests).into_iter();
            completions.map(|c| ((c.text, c.logprobs, c.more), c.cached_prompt_tokens)).unzip::<_, _, Vec<_>, Vec<_>>()
        };
        let options = |kv_tokens, prefix_cache| EngineOptions {
            kv_tokens,
            max_sequences: 32,
            step_tokens: 64,
            max_waiting: 64,
            prefix_cache,
        };
        let start = |options| Engine::start(load(&fixture(name)), options).unwrap();
        let (without, cached) = outcome(&start(options(8_192, false)), &groups());
        assert_eq!(cached.iter().sum::<usize>(), 0);
        // With room for all, and with so little that beginnings come and go.
        for kv_tokens in [8_192, 1_024] {
            let engine = start(options(kv_tokens, true));
            for round in 0..2 {
                let (with, cached) = outcome(&engine, &groups());
                assert!(with == without, "{name}, {kv_tokens} tokens, round {round}");
                assert!(cached.iter().filter(|cached| **cached > 0).count() > 10, "{cached:?}");
            }
        }
    }
}

#[test]
fn a_seed_decides_the_text() {
    let engine = engine("qwen2", 64);
    let text = |seed| {
        let request = Request { temperature: 1.0, seed, ..greedy("X moves first", 24) };
        submit(&engine, request).unwrap().completion().text
    };
    assert_eq!(text(7), text(7));
    assert_ne!(text(7), text(8));
}

/// The engine is held in the middle of its steps while somebody comes and somebody leaves.
#[test]
fn who_comes_joins_at_the_next_step_and_who_leaves_changes_nothing() {
    const LATE: u64 = 99;
    for name in ["qwen2", "gpt2"] {
        let engine = engine(name, 64);
        let long = |seed| Request { temperature: 0.8, seed, ..greedy("X moves first", 220) };
        let alone: Vec<String> = (0..12).map(|seed| submit(&engine, long(seed)).unwrap().completion().text).collect();
        let (ended, ends) = channel();
        let (held, hold) = channel();
        let (release, released) = channel::<()>();
        let mut pieces = 0;
        let sink = |seed: u64, mut each: Box<dyn FnMut() + Send>| {
            let ended = ended.clone();
            Box::new(move |event| match event {
                Event::Text { .. } => each(),
                Event::Finished(completion) => ended.send((seed, completion)).unwrap(),
                Event::Started | Event::Failed(_) => {}
            })
        };
        let wait = Box::new(move || {
            pieces += 1;
            if pieces == 40 {
                held.send(()).unwrap();
                released.recv().unwrap();
            }
        });
        let mut ids = vec![engine.submit(long(0), sink(0, wait)).unwrap()];
        ids.extend((1..12).map(|seed| engine.submit(long(seed), sink(seed, Box::new(|| ()))).unwrap()));
        hold.recv().unwrap();
        engine.submit(greedy("X", 2), sink(LATE, Box::new(|| ()))).unwrap();
        engine.cancel(ids[3]);
        release.send(()).unwrap();
        let order: Vec<(u64, Completion)> = (0..13).map(|_| ends.recv().unwrap()).collect();
        let place = |seed| order.iter().position(|(ended, _)| *ended == seed).unwrap();
        let whole = order.iter().position(|(_, completion)| completion.completion_tokens == 220).unwrap();
        assert!(place(3) < place(LATE) && place(LATE) < whole, "{name}");
        for (seed, completion) in order.iter().filter(|(seed, _)| ![3, LATE].contains(seed)) {
            assert!(completion.text == alone[usize::try_from(*seed).unwrap()], "{name}, seed {seed}");
        }
    }
}
