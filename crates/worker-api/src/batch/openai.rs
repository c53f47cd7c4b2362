//! OpenAI's batches, which some others have taken over: a file of items, a batch of it, and files of results.
//!
//! <https://platform.openai.com/docs/api-reference/batch>

use super::{
    Answer, Answered, BatchApi, Carrier, Form, Line, Listed, Page, Request, Source, State, Submission, TAG, Tag, Turns,
    file_at, text, unix_s, uploaded,
};
use crate::dialect::Encoded;
use crate::url::escaped;
use genmill_core::time::UnixMs;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// The codes of items whose batch ended before their turn.
const GIVEN_UP: &[&str] = &["batch_expired", "batch_cancelled"];

/// The code of a batch that is refused because others have to be done first.
const TOO_MUCH: &str = "token_limit_exceeded";

/// The fields that name files of results.
const RESULTS: [&str; 2] = ["output_file_id", "error_file_id"];

/// The API.
#[derive(Debug)]
pub(super) struct OpenAi;

impl BatchApi for OpenAi {
    fn items_max(&self) -> usize {
        50_000
    }

    fn bytes_max(&self) -> usize {
        200_000_000
    }

    fn item(&self, custom_id: &str, encoded: &Encoded) -> String {
        let url = endpoint(&encoded.path);
        format!(r#"{{"custom_id":"{custom_id}","method":"POST","url":"{url}","body":{}}}"#, encoded.body)
    }

    fn carrier(&self, submission: Submission<'_>) -> Carrier {
        uploaded(submission)
    }

    fn creation(&self, submission: Submission<'_>, path: &str, file: &str) -> Option<Request> {
        let body = json!({
            "input_file_id": file,
            "endpoint": endpoint(path),
            "completion_window": "24h",
            "metadata": {TAG: submission.tag},
        });
        Some(Request::post("/batches".to_owned(), body.to_string()))
    }

    fn name(&self, answer: &Value) -> Option<String> {
        text(&answer["id"])
    }

    fn list(&self, _since: UnixMs, next: Option<&str>) -> String {
        let after = next.map(|next| format!("&after={}", escaped(next))).unwrap_or_default();
        format!("/batches?limit=100{after}")
    }

    fn page(&self, answer: &Value, _asked: Option<&str>) -> Page {
        let batches: Vec<Listed> = answer["data"].as_array().into_iter().flatten().filter_map(listed).collect();
        let last = batches.last().map(|batch| batch.remote.clone());
        Page { next: last.filter(|_| answer["has_more"] == true), batches }
    }

    fn batch(&self, remote: &str) -> String {
        format!("/batches/{}", escaped(remote))
    }

    fn state(&self, answer: &Value) -> State {
        let turns = match answer["status"].as_str().unwrap_or_default() {
            "completed" => Turns::All,
            "expired" | "cancelled" => Turns::Some,
            "failed" => return refused(answer),
            // Validating, in progress, finalizing, cancelling.
            _ => return State::Works,
        };
        State::Ended { sources: sources(answer, RESULTS), turns }
    }

    fn files(&self, answer: &Value) -> Vec<String> {
        text(&answer["input_file_id"]).into_iter().chain(named_files(answer, RESULTS)).collect()
    }

    fn cancel(&self, remote: &str) -> Request {
        Request::post(format!("/batches/{}/cancel", escaped(remote)), String::new())
    }

    fn result(&self, record: &[u8]) -> Option<Answered> {
        result(record)
    }
}

/// An address of items. Providers name it by OpenAI's own, wherever they have it themselves.
fn endpoint(path: &str) -> String {
    format!("/v1{path}")
}

fn listed(batch: &Value) -> Option<Listed> {
    let metadata = batch["metadata"].as_object().filter(|metadata| !metadata.is_empty());
    let tag = match (metadata, &batch["input_file_id"]) {
        (Some(metadata), _) => metadata.get(TAG).and_then(text).map_or(Tag::Other, Tag::Is),
        // Whoever forgets metadata has it in the name of a file.
        (None, Value::String(file)) => Tag::InNameOf(file_at(file)),
        (None, _) => Tag::Other,
    };
    Some(Listed { remote: text(&batch["id"])?, tag, created: unix_s(&batch["created_at"]), items: None })
}

fn refused(answer: &Value) -> State {
    let errors = answer["errors"]["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    let body = |error: &Value| json!({ "error": error }).to_string();
    let status = if errors.iter().any(|error| error["code"] == TOO_MUCH) { 429 } else { 400 };
    let line = |error: &Value| Some(Line { number: error["line"].as_u64()?, body: body(error) });
    State::Refused {
        status,
        body: body(errors.first().unwrap_or(&Value::Null)),
        lines: errors.iter().filter(|_| status == 400).filter_map(line).collect(),
        items: text(&answer["input_file_id"]).map(|id| content(&id)),
    }
}

fn content(file: &str) -> Source {
    Source { at: format!("{}/content", file_at(file)), form: Form::Lines }
}

/// The files of results, as far as there are any.
pub(super) fn named_files(answer: &Value, fields: [&str; 2]) -> impl Iterator<Item = String> {
    fields.into_iter().filter_map(|field| text(&answer[field]))
}

/// Where the results are.
pub(super) fn sources(answer: &Value, fields: [&str; 2]) -> Vec<Source> {
    named_files(answer, fields).map(|file| content(&file)).collect()
}

/// A line of a file of results.
#[derive(Deserialize)]
struct Told<'a> {
    custom_id: String,
    #[serde(borrow, default)]
    response: Option<Response<'a>>,
    #[serde(default)]
    error: Value,
}

#[derive(Deserialize)]
struct Response<'a> {
    #[serde(default)]
    status_code: Option<u16>,
    #[serde(borrow, default)]
    body: Option<&'a RawValue>,
}

/// What a line of a file of results says.
pub(super) fn result(record: &[u8]) -> Option<Answered> {
    let line: Told<'_> = serde_json::from_slice(record).ok()?;
    let code = line.error["code"].as_str().unwrap_or_default();
    let status = line.response.as_ref().and_then(|response| response.status_code);
    let body = line.response.as_ref().and_then(|response| response.body).map(|body| body.get().to_owned());
    let answer = match (status, body) {
        (Some(200..=299) | None, Some(body)) if line.error.is_null() => Answer::Body(body),
        _ if GIVEN_UP.contains(&code) => Answer::GivenUp,
        (status, Some(body)) if line.error.is_null() => Answer::Refused { status: status.unwrap_or(200), body },
        (status, None) if line.error.is_null() && status.is_none() => return None,
        (status, _) => {
            Answer::Refused { status: status.unwrap_or(200), body: json!({ "error": line.error }).to_string() }
        }
    };
    Some(Answered { custom_id: line.custom_id, answer })
}
