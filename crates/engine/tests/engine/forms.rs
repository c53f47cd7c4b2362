//! Texts that must have a form, from models that would write anything.

use genmill_engine::{Completion, Engine, FinishReason, Form, Prompt, Request, SubmitError};
use serde_json::Value;

use crate::{engine, greedy, submit};

fn hot(form: Form, seed: u64) -> Request {
    Request { temperature: 1.0, seed, form: Some(form), ..greedy("X moves", 200) }
}

fn run(engine: &Engine, request: Request) -> Completion {
    submit(engine, request).unwrap().completion()
}

/// A form whose texts end.
fn person() -> Form {
    let schema = r#"{
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "role": {"enum": ["player", "referee"]},
            "wins": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 999}, "maxItems": 4},
            "captain": {"type": "boolean"}
        },
        "required": ["name", "role", "wins", "captain"],
        "additionalProperties": false,
        "x-guidance": {"whitespace_flexible": false}
    }"#;
    Form::JsonSchema(schema.to_owned())
}

fn is_person(value: &Value) -> bool {
    let wins = value["wins"].as_array();
    value.as_object().is_some_and(|object| object.len() == 4)
        && value["name"].as_str().is_some_and(|name| name.chars().count() <= 12)
        && ["player", "referee"].contains(&value["role"].as_str().unwrap_or_default())
        && wins
            .is_some_and(|wins| wins.len() <= 4 && wins.iter().all(|win| (-9..=999).contains(&win.as_i64().unwrap())))
        && value["captain"].is_boolean()
}

#[test]
fn json_always_parses_and_fits_its_schema() {
    for name in ["qwen2", "gpt2", "llama2", "gemma2"] {
        let engine = engine(name, 64);
        let jobs: Vec<_> = (0..24).map(|seed| submit(&engine, hot(person(), seed)).unwrap()).collect();
        let mut texts: Vec<String> = Vec::new();
        for job in jobs {
            let completion = job.completion();
            assert_eq!(completion.reason, FinishReason::Stop, "{name}: {}", completion.text);
            let value = serde_json::from_str(&completion.text).unwrap();
            assert!(is_person(&value), "{name}: {value}");
            texts.push(completion.text);
        }
        texts.sort_unstable();
        texts.dedup();
        assert!(texts.len() > 20, "the model chooses");
    }
}

#[test]
fn choices_expressions_and_grammars_are_kept_to() {
    let engine = engine("qwen2", 64);
    for seed in 0..8 {
        let text = |form| {
            let completion = run(&engine, hot(form, seed));
            assert_eq!(completion.reason, FinishReason::Stop, "{}", completion.text);
            completion.text
        };
        assert!(
            ["left", "right", "straight on"]
                .contains(&&*text(Form::Choice(["left", "right", "straight on"].map(str::to_owned).to_vec())))
        );
        let date = text(Form::Regex("[0-9]{4}-[01][0-9]-[0-3][0-9]".to_owned()));
        assert!(date.len() == 10 && date.chars().filter(|letter| *letter == '-').count() == 2, "{date}");
        let sum = text(Form::Lark("start: n (\" + \" n)~2\nn: /[1-9]/".to_owned()));
        assert!(sum.len() == 9 && sum.split(" + ").count() == 3, "{sum}");
    }
}

/// Also with log probabilities, of which forced tokens have theirs, and with several samples.
#[test]
fn a_seeded_form_says_the_same_alone_and_in_company() {
    for name in ["gpt2", "llama2"] {
        check_company(name);
    }
}

fn check_company(name: &str) {
    let requests = || {
        (0..16).map(|seed| Request {
            samples: 1 + usize::try_from(seed % 3).unwrap(),
            logprobs: (seed % 2 == 0).then_some(2),
            ..hot(person(), seed)
        })
    };
    let content = |completion: Completion| (completion.text, completion.logprobs, completion.more);
    let engine_alone = engine(name, 512);
    let alone: Vec<_> = requests().map(|request| content(run(&engine_alone, request))).collect();
    for step_tokens in [32, 100] {
        let engine = engine(name, step_tokens);
        let plain = submit(&engine, Request { ignore_end: true, ..greedy("X", 200) }).unwrap();
        let jobs: Vec<_> = requests().map(|request| submit(&engine, request).unwrap()).collect();
        for (job, alone) in jobs.into_iter().zip(&alone) {
            let completion = job.completion();
            assert_eq!(&content(completion), alone, "{step_tokens} tokens a step");
        }
        assert_eq!(plain.completion().completion_tokens, 200);
    }
}

/// A choice that is clear after its first letter takes one pick; its other tokens need no step of their own. They have
/// their log probabilities all the same, where those are wanted.
#[test]
fn forced_tokens_are_appended_at_once() {
    for name in ["gpt2", "llama2"] {
        let engine = engine(name, 64);
        let choice = Form::Choice(vec!["a long answer that leaves no doubt".to_owned(), "b".to_owned()]);
        let request = |seed| hot(choice.clone(), seed);
        let seed = (0..40).find(|seed| run(&engine, request(*seed)).text.len() > 1).unwrap();
        let steps = || engine.totals().steps;
        let before = steps();
        let long = run(&engine, request(seed));
        assert_eq!(long.text, "a long answer that leaves no doubt");
        assert!(long.completion_tokens > 5, "{name}: {long:?}");
        assert!(steps() - before <= 2, "{name}: all after the first picks was forced: {long:?}");
        for max_tokens in [200, 4] {
            let scored = run(&engine, Request { logprobs: Some(0), max_tokens, ..request(seed) });
            assert_eq!(scored.logprobs.len(), scored.completion_tokens, "{name}: {scored:?}");
            assert!(long.text.starts_with(&scored.text) && scored.completion_tokens <= max_tokens);
        }
    }
}

/// A space at a text's beginning is a part of it, also where a tokenizer would drop it.
#[test]
fn a_form_and_an_echo_keep_the_first_space() {
    for name in ["llama2", "gpt2"] {
        let engine = engine(name, 64);
        let form = Form::Choice(vec![" yes".to_owned(), " no".to_owned()]);
        let text = run(&engine, hot(form.clone(), 1)).text;
        assert!([" yes", " no"].contains(&text.as_str()), "{name}: {text:?}");
        if name == "llama2" {
            // Nothing but a begin token stands before it.
            let first = run(&engine, Request { prompt: Prompt::Text(String::new()), ..hot(form.clone(), 1) }).text;
            assert!([" yes", " no"].contains(&first.as_str()), "{first:?}");
        }
        let echoed = run(&engine, Request { echo: true, ..hot(form, 1) }).text;
        assert_eq!(echoed, format!("X moves{text}"));
    }
}

#[test]
fn a_form_may_be_cut_by_max_tokens_and_a_malformed_one_is_refused() {
    let engine = engine("qwen2", 64);
    let cut = run(&engine, Request { max_tokens: 3, ..hot(person(), 1) });
    assert_eq!((cut.reason, cut.completion_tokens), (FinishReason::Length, 3));
    let error = submit(&engine, hot(Form::Regex("(".to_owned()), 1)).map(|_| ()).unwrap_err();
    assert!(
        matches!(&error, SubmitError::Parameter { parameter: "form", reason } if reason.contains("unclosed")),
        "{error}"
    );
    assert_eq!(engine.free().sequences, 32);
}
