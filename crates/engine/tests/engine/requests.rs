//! The life of a request: refusals, ends, cancellation, deadlines, bounds.

use std::time::{Duration, Instant};

use genmill_engine::{
    ChatMessage, Engine, EngineOptions, Event, FinishReason, Prompt, PromptError, Request, StartError, SubmitError,
};

use crate::{engine, fixture, greedy, load, submit};

fn refusal(engine: &Engine, request: Request) -> SubmitError {
    match submit(engine, request) {
        Ok(_) => panic!("accepted"),
        Err(error) => error,
    }
}

#[test]
fn a_malformed_request_is_refused_with_the_parameter() {
    let engine = engine("qwen2", 64);
    let base = || greedy("text", 4);
    for (request, expected) in [
        (Request { max_tokens: 0, ..base() }, "max_tokens is 0"),
        (Request { temperature: -1.0, ..base() }, "temperature is -1"),
        (Request { temperature: f32::NAN, ..base() }, "temperature is NaN"),
        (Request { top_p: 0.0, ..base() }, "top_p is 0"),
        (Request { top_p: 1.5, ..base() }, "top_p is 1.5"),
        (Request { stop: vec![String::new()], ..base() }, "stop has an empty string"),
    ] {
        let message = refusal(&engine, request).to_string();
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn what_can_never_fit_is_refused_with_the_numbers() {
    let message = refusal(&engine("qwen2", 64), greedy("text", 600)).to_string();
    assert!(message.contains("600") && message.contains("512"), "{message}");
    let options = EngineOptions { kv_tokens: 100, ..EngineOptions::default() };
    let small = Engine::start(load(&fixture("qwen2")), options).unwrap();
    let error = refusal(&small, greedy("X", 96));
    assert!(matches!(error, SubmitError::NeverFits(_)), "{error}");
    assert_eq!(error.to_string(), "needs 97 KV tokens (prompt and max_tokens), the pool has 96");
    assert_eq!(submit(&small, greedy("X", 95)).unwrap().completion().completion_tokens, 95);
}

#[test]
fn an_empty_prompt_starts_from_the_begin_token_or_is_refused() {
    let error = refusal(&engine("qwen2", 64), greedy("", 4));
    assert!(matches!(error, SubmitError::Prompt { source: PromptError::Empty }));
    let completion = submit(&engine("gpt2", 64), greedy("", 4)).unwrap().completion();
    assert_eq!(completion.prompt_tokens, 1);
}

#[test]
fn messages_need_a_template() {
    let message = ChatMessage::new("user", "Your move?");
    let chat = || Request { prompt: Prompt::Chat(vec![message.clone()]), ..greedy("", 4) };
    let error = refusal(&engine("gpt2", 64), chat());
    assert!(matches!(error, SubmitError::Prompt { source: PromptError::NoChatTemplate }));
    let completion = submit(&engine("qwen2", 64), chat()).unwrap().completion();
    assert_eq!(completion.prompt_tokens, 22);
}

#[test]
fn a_stop_string_across_tokens_ends_the_text_before_it() {
    let engine = engine("gpt2", 64);
    let prompt = "你好，世界。 🚀";
    let full = submit(&engine, greedy(prompt, 24)).unwrap().completion();
    // "uler��lledlledis batching": "lledis bat" crosses three borders.
    let request = Request { stop: vec!["lledis bat".to_owned()], ..greedy(prompt, 24) };
    let outcome = submit(&engine, request).unwrap().outcome();
    let cut = outcome.end.unwrap();
    assert_eq!(cut.text, full.text.split("lledis bat").next().unwrap());
    assert_eq!(cut.reason, FinishReason::Stop);
    assert!(cut.completion_tokens < 24);
    assert!(outcome.deltas.iter().all(|delta| !delta.is_empty()));
}

#[test]
fn a_cancelled_request_ends_at_the_next_step_and_leaves_its_place() {
    let engine = engine("qwen2", 64);
    let free = engine.free();
    let request = Request { temperature: 1.0, seed: 5, ..greedy("X", 500) };
    let job = submit(&engine, request).unwrap();
    assert!(engine.free().kv_tokens < free.kv_tokens);
    assert!(matches!(job.next(), Event::Started));
    engine.cancel(job.id);
    let completion = job.completion();
    assert_eq!(completion.reason, FinishReason::Cancelled);
    assert!(completion.completion_tokens < 500);
    assert_eq!(engine.free(), free);
}

#[test]
fn a_deadline_ends_a_request() {
    let engine = engine("qwen2", 64);
    let request = Request { deadline: Some(Instant::now()), ..greedy("X", 400) };
    let outcome = submit(&engine, request).unwrap().outcome();
    assert_eq!(outcome.end.unwrap().reason, FinishReason::Deadline);
    assert!(!outcome.started);
}

#[test]
fn more_than_may_wait_is_refused() {
    let options =
        EngineOptions { kv_tokens: 512, max_sequences: 1, step_tokens: 16, max_waiting: 2, ..Default::default() };
    let engine = Engine::start(load(&fixture("qwen2")), options).unwrap();
    let long = || Request { temperature: 1.0, ..greedy("X", 500) };
    let jobs: Vec<_> = (0..3).map(|_| submit(&engine, long()).unwrap()).collect();
    assert!(matches!(refusal(&engine, long()), SubmitError::Full { waiting: 2 }));
    assert_eq!((engine.free().sequences, engine.free().kv_tokens), (0, 0));
    jobs.iter().for_each(|job| engine.cancel(job.id));
    for job in jobs {
        job.outcome().end.unwrap();
    }
    assert_eq!(engine.free().sequences, 1);
}

#[test]
fn times_and_shares_add_up() {
    let engine = engine("qwen2", 64);
    let begun = Instant::now();
    let jobs: Vec<_> = (0..8).map(|_| submit(&engine, greedy("def add", 20)).unwrap()).collect();
    let completions: Vec<_> = jobs.into_iter().map(crate::Job::completion).collect();
    let all = begun.elapsed();
    let shares: Duration = completions.iter().map(|completion| completion.engine_time).sum();
    assert!(shares <= all && shares > Duration::ZERO);
    for completion in completions {
        let first = completion.first_token.unwrap();
        assert!(completion.queued <= first && first <= completion.total);
    }
}

#[test]
fn a_shutdown_cancels_what_runs() {
    let engine = engine("qwen2", 64);
    let job = submit(&engine, Request { temperature: 1.0, ..greedy("X", 500) }).unwrap();
    engine.shutdown();
    assert_eq!(job.completion().reason, FinishReason::Cancelled);
}

#[test]
fn a_sink_that_panics_harms_nobody_else() {
    let engine = engine("qwen2", 64);
    let job = submit(&engine, greedy("def add", 20)).unwrap();
    engine.submit(greedy("X", 20), Box::new(|_| panic!("a sink"))).unwrap();
    assert_eq!(job.completion().completion_tokens, 20);
    assert_eq!(submit(&engine, greedy("X", 5)).unwrap().completion().completion_tokens, 5);
}

#[test]
fn options_that_make_no_sense_are_refused() {
    for (options, expected) in [
        (EngineOptions { max_sequences: 0, ..EngineOptions::default() }, "max_sequences"),
        (EngineOptions { step_tokens: 1, ..EngineOptions::default() }, "step_tokens"),
        (EngineOptions { kv_tokens: 3, ..EngineOptions::default() }, "kv_tokens"),
    ] {
        match Engine::start(load(&fixture("qwen2")), options) {
            Err(StartError::Option { option, .. }) => assert_eq!(option, expected),
            other => panic!("{other:?}"),
        }
    }
}
