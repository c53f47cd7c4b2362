//! The contract: a request's tokens are the same alone and in any company, under any chunking.

use genmill_engine::{Completion, Engine, Prompt, Request};

use crate::{engine, greedy, submit};

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
    for name in ["qwen2", "gpt2", "qwen2-untied", "gpt2-odd"] {
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
