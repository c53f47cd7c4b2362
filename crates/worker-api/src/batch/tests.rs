//! What every batch API must do, on answers in `recorded/` that have the shape of those of its provider.

use super::split::Splitter;
use super::*;
use crate::dialect::{self, Dialect, Streaming};
use crate::fixture::spec;
use crate::providers::{Provider, Table};
use genmill_core::ids::LaneNumber;
use proptest::prelude::*;
use std::fmt::Write as _;
use std::path::Path;

const TAG: &str = "00112233445566778899aabbccddeeff";

fn recorded(file: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/batch/recorded").join(file)).unwrap()
}

/// The provider of a batch API's name, and how it is spoken to.
fn provider(name: &str) -> (Provider, &'static dyn Dialect) {
    let provider = Table::embedded().unwrap().find(name).unwrap().clone();
    let dialect = dialect::find(&provider.dialect).unwrap();
    (provider, dialect)
}

/// A request as it goes out, but for the base URL and the key.
fn shown(request: &Request) -> String {
    // Whether a map keeps its order depends on what else is built.
    let body = serde_json::from_str::<Value>(&request.body).map(|mut body| {
        body.sort_all_objects();
        serde_json::to_string_pretty(&body).unwrap()
    });
    let body = body.unwrap_or_else(|_| request.body.replace('\r', "␍"));
    format!("{:?} {}\n{}\n{body}\n", request.method, request.path, request.content_type)
}

/// Everything that is sent for a batch of two jobs, and for what follows.
fn sent(api: &dyn BatchApi, provider: &Provider, dialect: &dyn Dialect) -> String {
    let submission = Submission { tag: TAG, model: "the-model" };
    let items: Vec<(String, Encoded)> = (1..3)
        .map(|place| {
            let id = JobId::new(UnixMs(1), LaneNumber(1), place);
            let encoded = dialect.encode(&spec("litellm_x/y", "Say \"hi\""), "the-model", provider, Streaming::Off);
            (custom_id(id, Epoch(3)), encoded)
        })
        .collect();
    let texts: Vec<String> = items.iter().map(|(id, encoded)| sorted(&api.item(id, encoded))).collect();
    let carrier = api.carrier(submission);
    let body = format!("{}{}{}", carrier.opening, texts.join(carrier.between), carrier.closing);
    let request = Request { content_type: carrier.content_type, ..Request::post(carrier.path, body) };
    let mut out = shown(&request);
    let creation = api.creation(submission, &items[0].1.path, "file-1");
    let list = |next| Request::get(api.list(UnixMs(1_700_000_000_000), next));
    let others = [list(None), list(Some("7")), Request::get(api.batch("batches/a b")), api.cancel("batches/a b")];
    for request in creation.into_iter().chain(others) {
        write!(out, "\n{}", shown(&request)).unwrap();
    }
    out
}

fn sorted(json: &str) -> String {
    let mut value: Value = serde_json::from_str(json).unwrap();
    value.sort_all_objects();
    value.to_string()
}

/// The results in these pieces of a document.
fn results(api: &dyn BatchApi, form: Form, pieces: &[&[u8]]) -> Vec<Option<Answered>> {
    let mut splitter = Splitter::new(form, 1_000_000);
    let mut records: Vec<Option<Vec<u8>>> = pieces.iter().flat_map(|piece| splitter.push(piece)).collect();
    records.extend(splitter.end().ok().flatten());
    records.into_iter().map(|record| api.result(&record?)).collect()
}

/// The file of results of an API, and how they stand there.
fn results_of(name: &str) -> (Vec<u8>, Form) {
    if name == "gemini" {
        (recorded("gemini.ended.json"), Form::Elements)
    } else {
        (recorded(&format!("{name}.results.jsonl")), Form::Lines)
    }
}

#[test]
fn what_is_sent() {
    for (name, api) in BATCH_APIS {
        let (provider, dialect) = provider(name);
        insta::assert_snapshot!(format!("sent_{name}"), sent(*api, &provider, dialect));
    }
}

#[test]
fn a_model_that_is_asked_for_responses_is_so_in_batches() {
    let (provider, dialect) = provider("openai_responses");
    let sent = sent(find("openai").unwrap(), &provider, dialect);
    assert_eq!(sent.matches("\"/v1/responses\"").count(), 3, "{sent}");
    assert!(sent.contains("\"input\":"), "{sent}");
}

#[test]
fn what_is_understood() {
    for (name, api) in BATCH_APIS {
        let json = |file: &str| serde_json::from_slice::<Value>(&recorded(&format!("{name}.{file}.json"))).unwrap();
        let (made, ended) = (json("made"), json("ended"));
        let told =
            (api.name(&made), api.state(&made), api.state(&ended), api.files(&ended), api.page(&json("list"), None));
        insta::assert_debug_snapshot!(format!("told_{name}"), told);
        let (document, form) = results_of(name);
        let (_, dialect) = provider(name);
        let read = |answered: Option<Answered>| {
            let answered = answered?;
            let reply = match &answered.answer {
                Answer::Body(body) => Some(dialect.decode(body.as_bytes())),
                Answer::Refused { body, .. } => Some(Err(dialect.decode_error(body.as_bytes()))),
                Answer::GivenUp => None,
            };
            let status = if let Answer::Refused { status, .. } = answered.answer { Some(status) } else { None };
            Some((answered.custom_id, status, reply))
        };
        let results: Vec<_> = results(*api, form, &[&document]).into_iter().map(read).collect();
        insta::assert_debug_snapshot!(format!("results_{name}"), results);
    }
}

#[test]
fn every_state_is_known() {
    let check = |name: &str, answer: Value, expect: &str| {
        let told = match find(name).unwrap().state(&answer) {
            State::Works => "works".to_owned(),
            State::Ended { turns: Turns::All, .. } => "ended".to_owned(),
            State::Ended { .. } => "early".to_owned(),
            State::Refused { status, .. } => status.to_string(),
        };
        assert_eq!(told, expect, "{name}: {answer}");
    };
    let openai = [
        ("validating", "works"),
        ("in_progress", "works"),
        ("finalizing", "works"),
        ("cancelling", "works"),
        ("completed", "ended"),
        ("expired", "early"),
        ("cancelled", "early"),
        ("failed", "400"),
    ];
    for (status, expect) in openai {
        check("openai", serde_json::json!({"id": "b", "status": status}), expect);
    }
    for (status, expect) in [("in_progress", "works"), ("canceling", "works"), ("ended", "early")] {
        check("anthropic", serde_json::json!({"processing_status": status, "results_url": "https://x/y"}), expect);
    }
    let gemini = [
        ("BATCH_STATE_PENDING", "works"),
        ("BATCH_STATE_RUNNING", "works"),
        ("JOB_STATE_RUNNING", "works"),
        ("BATCH_STATE_SUCCEEDED", "ended"),
        ("JOB_STATE_SUCCEEDED", "ended"),
        ("BATCH_STATE_CANCELLED", "early"),
        ("BATCH_STATE_EXPIRED", "early"),
    ];
    for (state, expect) in gemini {
        check("gemini", serde_json::json!({"name": "batches/x", "metadata": {"state": state}}), expect);
    }
    let failed = |code: u64, state: &str| serde_json::json!({"name": "batches/x", "metadata": {"state": state}, "done": true, "error": {"code": code}});
    check("gemini", failed(8, "BATCH_STATE_FAILED"), "429");
    check("gemini", failed(1, ""), "early");
    check("gemini", failed(3, ""), "400");
    let mistral = [
        ("QUEUED", "works"),
        ("RUNNING", "works"),
        ("CANCELLATION_REQUESTED", "works"),
        ("SUCCESS", "ended"),
        ("TIMEOUT_EXCEEDED", "early"),
        ("CANCELLED", "early"),
        ("FAILED", "200"),
    ];
    for (status, expect) in mistral {
        check("mistral", serde_json::json!({"id": "j", "status": status}), expect);
    }
}

#[test]
fn an_items_name_suits_every_provider() {
    let id = JobId::new(UnixMs(1), LaneNumber(1), u64::MAX);
    let name = custom_id(id, Epoch(u32::MAX));
    assert_eq!(name, format!("{}_4294967295", id.to_string().replace('-', "")));
    assert!(name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'));
    assert!(is_custom_id(&name));
    assert_eq!(read_custom_id(&name), Some((id, Epoch(u32::MAX))));
    assert!(!["", "nobody", "_1", &name[..33], &name[1..], &format!("{name}x")].into_iter().any(is_custom_id));
}

proptest! {
    #[test]
    fn where_results_are_split_never_matters(at: prop::sample::Index, step in 1_usize..100) {
        for (name, api) in BATCH_APIS {
            let (document, form) = results_of(name);
            let whole = results(*api, form, &[&document]);
            let (a, b) = document.split_at(at.index(document.len()));
            prop_assert_eq!(&results(*api, form, &[a, b]), &whole, "{}", name);
            let pieces: Vec<&[u8]> = document.chunks(step).collect();
            prop_assert_eq!(&results(*api, form, &pieces), &whole, "{}", name);
        }
    }

    #[test]
    fn no_bytes_panic(bytes: Vec<u8>, text: String) {
        for (_, api) in BATCH_APIS {
            for bytes in [&bytes[..], text.as_bytes()] {
                api.result(bytes);
                results(*api, Form::Lines, &[bytes]);
                results(*api, Form::Elements, &[bytes]);
                let answer: Value = serde_json::from_slice(bytes).unwrap_or_default();
                api.name(&answer);
                api.state(&answer);
                api.page(&answer, Some(&text));
                api.batch(&text);
                api.cancel(&text);
                api.files(&answer);
                named::named(&text);
                api.list(UnixMs(u64::MAX), Some(&text));
            }
        }
    }
}
