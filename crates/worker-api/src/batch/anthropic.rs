//! Anthropic's batches of messages: the items stand in the request that makes the batch. A batch has no name of one's
//! own, so it is found by its results.
//!
//! <https://platform.claude.com/docs/en/api/creating-message-batches>

use super::{
    Answer, Answered, BatchApi, Carrier, Form, Listed, Page, Request, Source, State, Submission, Tag, Turns, rfc3339,
    text,
};
use crate::dialect::Encoded;
use crate::url::escaped;
use genmill_core::time::UnixMs;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

/// The path below the base URL.
const PATH: &str = "/v1/messages/batches";

/// The status with which each type of error comes as an answer (<https://platform.claude.com/docs/en/api/errors>).
const STATUSES: &[(&str, u16)] = &[
    ("invalid_request_error", 400),
    ("authentication_error", 401),
    ("billing_error", 402),
    ("permission_error", 403),
    ("not_found_error", 404),
    ("request_too_large", 413),
    ("rate_limit_error", 429),
    ("api_error", 500),
    ("timeout_error", 504),
    ("overloaded_error", 529),
];

/// The API.
#[derive(Debug)]
pub(super) struct Anthropic;

impl BatchApi for Anthropic {
    fn items_max(&self) -> usize {
        100_000
    }

    fn bytes_max(&self) -> usize {
        256_000_000
    }

    fn item(&self, custom_id: &str, encoded: &Encoded) -> String {
        format!(r#"{{"custom_id":"{custom_id}","params":{}}}"#, encoded.body)
    }

    fn carrier(&self, _submission: Submission<'_>) -> Carrier {
        Carrier {
            path: PATH.to_owned(),
            content_type: "application/json".to_owned(),
            opening: r#"{"requests":["#.to_owned(),
            between: ",",
            closing: "]}".to_owned(),
        }
    }

    fn creation(&self, _submission: Submission<'_>, _path: &str, _file: &str) -> Option<Request> {
        None
    }

    fn name(&self, answer: &Value) -> Option<String> {
        text(&answer["id"])
    }

    fn list(&self, _since: UnixMs, next: Option<&str>) -> String {
        let after = next.map(|next| format!("&after_id={}", escaped(next))).unwrap_or_default();
        format!("{PATH}?limit=100{after}")
    }

    fn newest_first(&self) -> bool {
        true
    }

    fn page(&self, answer: &Value, _asked: Option<&str>) -> Page {
        let batches = answer["data"].as_array().into_iter().flatten();
        let listed = |batch: &Value| {
            let (tag, created) = (Tag::InResults(self.state(batch)), rfc3339(&batch["created_at"]));
            let counts = batch["request_counts"].as_object();
            let items = counts.map(|counts| counts.values().filter_map(Value::as_u64).fold(0, u64::saturating_add));
            Some(Listed { remote: text(&batch["id"])?, tag, created, items })
        };
        let next = text(&answer["last_id"]).filter(|_| answer["has_more"] == true);
        Page { batches: batches.filter_map(listed).collect(), next }
    }

    fn batch(&self, remote: &str) -> String {
        format!("{PATH}/{}", escaped(remote))
    }

    fn state(&self, answer: &Value) -> State {
        // In progress, or canceling.
        if answer["processing_status"] != "ended" {
            return State::Works;
        }
        let sources = text(&answer["results_url"]).map(|at| Source { at, form: Form::Lines });
        State::Ended { sources: sources.into_iter().collect(), turns: Turns::Told }
    }

    fn cancel(&self, remote: &str) -> Request {
        Request::post(format!("{PATH}/{}/cancel", escaped(remote)), String::new())
    }

    fn result(&self, record: &[u8]) -> Option<Answered> {
        let line: Line<'_> = serde_json::from_slice(record).ok()?;
        let answer = match line.result.kind.as_str() {
            "succeeded" => Answer::Body(line.result.message?.get().to_owned()),
            "errored" => refused(line.result.error?.get()),
            "canceled" | "expired" => Answer::GivenUp,
            _ => return None,
        };
        Some(Answered { custom_id: line.custom_id, answer })
    }
}

/// A line of the results.
#[derive(Deserialize)]
struct Line<'a> {
    custom_id: String,
    #[serde(borrow)]
    result: Ended<'a>,
}

#[derive(Deserialize)]
struct Ended<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(borrow, default)]
    message: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

fn refused(error: &str) -> Answer {
    let told: Value = serde_json::from_str(error).unwrap_or_default();
    let kind = told["error"]["type"].as_str().or_else(|| told["type"].as_str()).unwrap_or_default();
    let status = STATUSES.iter().find(|(name, _)| *name == kind).map_or(200, |(_, status)| *status);
    Answer::Refused { status, body: error.to_owned() }
}
