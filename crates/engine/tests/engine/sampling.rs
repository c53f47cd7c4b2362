//! Sampling parameters through the engine: samples, penalties, ends, log probabilities, echo.

use std::collections::BTreeMap;

use genmill_engine::{Completion, Engine, FinishReason, Prompt, Request, Shaping, SubmitError};

use crate::{engine, greedy, submit};

fn run(engine: &Engine, request: Request) -> Completion {
    submit(engine, request).unwrap().completion()
}

fn hot(prompt: &str, max_tokens: usize, seed: u64) -> Request {
    Request { temperature: 1.2, seed, ..greedy(prompt, max_tokens) }
}

fn tokens(completion: &Completion) -> Vec<u32> {
    completion.logprobs.iter().map(|scored| scored.token).collect()
}

/// Requests that use every parameter, one way or another.
fn requests() -> Vec<Request> {
    (0..32_usize)
        .map(|index| {
            let shaping = Shaping {
                logit_bias: if index % 4 == 0 { BTreeMap::from([(10, 2.5), (300, -100.0)]) } else { BTreeMap::new() },
                frequency_penalty: [0.0, 0.7][index % 2],
                presence_penalty: [0.0, 0.3, -0.5][index % 3],
                repetition_penalty: [1.0, 1.3][index % 2],
                min_tokens: index % 7,
            };
            Request {
                min_p: [0.0, 0.05][index % 2],
                top_p: [1.0, 0.9, 0.8][index % 3],
                top_k: [0, 30][index % 2],
                samples: 1 + index % 3,
                shaping,
                logprobs: (index % 2 == 0).then_some(index % 5),
                prompt_logprobs: (index % 5 == 0).then_some(2),
                echo: index % 6 == 0,
                ignore_end: index % 2 == 0,
                stop: if index % 4 == 1 { vec!["th".to_owned(), "or".to_owned()] } else { Vec::new() },
                ..hot(&"X moves first, then O. 你好 ".repeat(1 + index % 4), 12 + index % 9, 70 + index as u64)
            }
        })
        .collect()
}

/// All that a request's answer says, without its times.
fn content(completion: Completion) -> impl PartialEq + std::fmt::Debug {
    let Completion { reason, text, logprobs, more, prompt_logprobs, completion_tokens, .. } = completion;
    (reason, text, logprobs, more, prompt_logprobs, completion_tokens)
}

#[test]
fn a_seeded_request_says_the_same_alone_and_among_31_others() {
    for name in ["qwen2", "gpt2"] {
        let engine_alone = engine(name, 512);
        let alone: Vec<_> = requests().into_iter().map(|request| content(run(&engine_alone, request))).collect();
        for step_tokens in [32, 100] {
            let engine = engine(name, step_tokens);
            let jobs: Vec<_> = requests().into_iter().map(|request| submit(&engine, request).unwrap()).collect();
            for (index, (job, alone)) in jobs.into_iter().zip(&alone).enumerate() {
                assert_eq!(&content(job.completion()), alone, "{name}, request {index}, {step_tokens} tokens a step");
            }
        }
    }
}

#[test]
fn samples_differ_and_the_prompt_counts_once() {
    let engine = engine("qwen2", 64);
    let free = engine.free();
    let one = run(&engine, hot("X moves first", 16, 5));
    let four = run(&engine, Request { samples: 4, ..hot("X moves first", 16, 5) });
    assert_eq!((&four.text, four.more.len()), (&one.text, 3));
    let mut texts: Vec<&str> =
        four.more.iter().map(|output| output.text.as_str()).chain([four.text.as_str()]).collect();
    texts.sort_unstable();
    texts.dedup();
    assert_eq!(texts.len(), 4);
    assert_eq!((four.prompt_tokens, four.completion_tokens), (one.prompt_tokens, 64));
    assert_eq!(engine.free(), free);
}

#[test]
fn a_cancelled_request_ends_with_all_its_samples() {
    let engine = engine("qwen2", 64);
    let free = engine.free();
    let job = submit(&engine, Request { samples: 5, ignore_end: true, ..hot("X", 480, 1) }).unwrap();
    job.next();
    engine.cancel(job.id);
    let completion = job.completion();
    assert_eq!(completion.reason, FinishReason::Cancelled);
    assert!(completion.more.iter().all(|output| output.reason == FinishReason::Cancelled));
    assert_eq!(engine.free(), free);
}

#[test]
fn more_samples_than_there_are_places_are_refused() {
    let error = submit(&engine("qwen2", 64), Request { samples: 97, ..greedy("X", 4) }).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "samples is 97; this engine has room for 1 to 96");
}

#[test]
fn a_bias_decides_and_a_stop_token_ends() {
    let engine = engine("qwen2", 64);
    let bias = |bias| Shaping { logit_bias: BTreeMap::from([(40, bias)]), ..Shaping::default() };
    let request = Request { shaping: bias(100.0), logprobs: Some(0), ..greedy("X moves", 5) };
    let always = run(&engine, request.clone());
    assert_eq!(tokens(&always), [40; 5]);
    assert_eq!(always.reason, FinishReason::Length);
    let stopped = run(&engine, Request { stop_tokens: vec![40], ..request.clone() });
    assert_eq!((stopped.text.as_str(), stopped.completion_tokens), ("", 1));
    assert_eq!(stopped.reason, FinishReason::Stop);
    let shaping = Shaping { min_tokens: 3, ..bias(100.0) };
    let later = run(&engine, Request { stop_tokens: vec![40], shaping, ..request });
    assert_eq!(later.completion_tokens, 4);
    assert!(!tokens(&later)[..3].contains(&40));
    let error = submit(&engine, Request { stop_tokens: vec![640], ..greedy("X", 4) }).map(|_| ()).unwrap_err();
    assert!(matches!(&error, SubmitError::Parameter { parameter: "stop_tokens", .. }), "{error}");
}

/// What the model would end with goes on when it is told to.
#[test]
fn an_ignored_end_is_a_token_like_any_other() {
    let engine = engine("qwen2", 64);
    let end = engine.card().end_tokens(&Prompt::Text(String::new()))[0];
    let shaping = Shaping { logit_bias: BTreeMap::from([(end, 100.0)]), ..Shaping::default() };
    let request = Request { shaping, logprobs: Some(0), ..greedy("X moves", 6) };
    let ended = run(&engine, request.clone());
    assert_eq!((tokens(&ended), ended.reason), (vec![end], FinishReason::Stop));
    let ignored = run(&engine, Request { ignore_end: true, ..request });
    assert_eq!((tokens(&ignored), ignored.reason), (vec![end; 6], FinishReason::Length));
}

#[test]
fn no_stop_string_is_looked_for_in_the_first_min_tokens() {
    let engine = engine("gpt2", 64);
    let whole = run(&engine, greedy("X moves", 20));
    let stop: String = whole.text.chars().take(2).collect();
    let shaping = Shaping { min_tokens: 10, ..Shaping::default() };
    let stopped = run(&engine, Request { stop: vec![stop.clone()], ..greedy("X moves", 20) });
    assert_eq!(stopped.text, "");
    let held = run(&engine, Request { stop: vec![stop], shaping, ..greedy("X moves", 20) });
    assert!(held.completion_tokens >= 10, "{held:?}");
}

#[test]
fn penalties_keep_a_greedy_text_from_repeating() {
    let engine = engine("qwen2", 64);
    let distinct = |shaping: Shaping| {
        let mut tokens = tokens(&run(&engine, Request { shaping, logprobs: Some(0), ..greedy("X X X X", 60) }));
        tokens.sort_unstable();
        tokens.dedup();
        tokens.len()
    };
    let plain = distinct(Shaping::default());
    for shaping in [
        Shaping { repetition_penalty: 8.0, ..Shaping::default() },
        Shaping { presence_penalty: 50.0, ..Shaping::default() },
        Shaping { frequency_penalty: 50.0, ..Shaping::default() },
    ] {
        assert!(distinct(shaping.clone()) > plain, "{shaping:?}");
    }
}

/// A greedy pick is the best token, and a prompt is scored, in whatever pieces, with what its beginnings go on with.
#[test]
fn log_probabilities_of_the_prompt_are_those_of_generating_it() {
    for step_tokens in [32, 33, 512] {
        let engine = engine("gpt2", step_tokens);
        let generated = run(&engine, Request { logprobs: Some(3), ..greedy("X moves first and then", 40) });
        assert_eq!(generated.logprobs.len(), generated.completion_tokens);
        for scored in &generated.logprobs {
            assert_eq!(scored.top[0], (scored.token, scored.logprob));
            assert!(scored.top.is_sorted_by(|a, b| a.1 >= b.1) && scored.top.len() == 3 && scored.logprob < 0.0);
        }
        let scored = run(&engine, Request { prompt_logprobs: Some(3), ..greedy("X moves first and then", 1) });
        assert_eq!(scored.prompt_logprobs.len(), scored.prompt_tokens - 1);
        for prefix in ["X moves", "X moves first", "X moves first and"] {
            let next = run(&engine, Request { logprobs: Some(3), ..greedy(prefix, 1) });
            assert_eq!(scored.prompt_logprobs[next.prompt_tokens - 1].top, next.logprobs[0].top, "after {prefix}");
        }
    }
}

#[test]
fn an_echo_is_the_prompt_before_each_text() {
    let engine = engine("qwen2", 64);
    let plain = run(&engine, hot("X moves", 6, 3));
    let echoed = run(&engine, Request { echo: true, samples: 2, stop: vec!["mov".to_owned()], ..hot("X moves", 6, 3) });
    assert_eq!(echoed.text, format!("X moves{}", plain.text));
    assert!(echoed.more[0].text.starts_with("X moves"));
    let request = Request { prompt: Prompt::Chat(Vec::new()), echo: true, ..greedy("", 4) };
    let error = submit(&engine, request).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "echo needs a prompt that is text");
}

/// A prompt that is computed again, because its text outgrows the first table of angles, keeps its scores.
#[test]
fn a_prompt_that_is_computed_again_is_scored_once() {
    let engine = engine("phi3-long", 64);
    let prompt = "X moves first, then O. ".repeat(5);
    for max_tokens in [1, 40] {
        let request = Request { prompt_logprobs: Some(1), logprobs: Some(0), ..greedy(&prompt, max_tokens) };
        let completion = run(&engine, request);
        assert!((30..44).contains(&completion.prompt_tokens), "{}", completion.prompt_tokens);
        assert_eq!(completion.prompt_logprobs.len() + 1, completion.prompt_tokens);
        assert_eq!(completion.logprobs.len(), completion.completion_tokens);
    }
}
