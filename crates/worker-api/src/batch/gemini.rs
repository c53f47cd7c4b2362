//! Gemini's batches: the items stand in the request that makes the batch, the results in what is told of it.
//!
//! Larger ones could go through files; these are kept within what may stand in a request.
//! <https://ai.google.dev/api/batch-api>

use super::{
    Answer, Answered, BatchApi, Carrier, Form, Listed, Page, Request, Source, State, Submission, Tag, Turns, rfc3339,
    text,
};
use crate::dialect::Encoded;
use crate::url::escaped;
use genmill_core::time::UnixMs;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// The code of what was cancelled.
const CANCELLED: u64 = 1;

/// The status with which each code of `google.rpc.Code` comes as an answer.
const STATUSES: &[(u64, u16)] = &[
    (CANCELLED, 499),
    (2, 500),
    (3, 400),
    (4, 504),
    (5, 404),
    (6, 409),
    (7, 403),
    (8, 429),
    (9, 400),
    (10, 409),
    (11, 400),
    (12, 501),
    (13, 500),
    (14, 503),
    (15, 500),
    (16, 401),
];

/// The API.
#[derive(Debug)]
pub(super) struct Gemini;

impl BatchApi for Gemini {
    fn items_max(&self) -> usize {
        10_000
    }

    fn bytes_max(&self) -> usize {
        20_000_000
    }

    fn item(&self, custom_id: &str, encoded: &Encoded) -> String {
        format!(r#"{{"request":{},"metadata":{{"key":"{custom_id}"}}}}"#, encoded.body)
    }

    fn carrier(&self, submission: Submission<'_>) -> Carrier {
        let name = json!(submission.tag);
        Carrier {
            path: format!("/models/{}:batchGenerateContent", submission.model),
            content_type: "application/json".to_owned(),
            opening: format!(r#"{{"batch":{{"displayName":{name},"inputConfig":{{"requests":{{"requests":["#),
            between: ",",
            closing: "]}}}}".to_owned(),
        }
    }

    fn creation(&self, _submission: Submission<'_>, _path: &str, _file: &str) -> Option<Request> {
        None
    }

    fn name(&self, answer: &Value) -> Option<String> {
        text(&answer["name"])
    }

    fn list(&self, _since: UnixMs, next: Option<&str>) -> String {
        let token = next.map(|next| format!("&pageToken={}", escaped(next))).unwrap_or_default();
        format!("/batches?pageSize=100{token}")
    }

    fn page(&self, answer: &Value, _asked: Option<&str>) -> Page {
        let batches = answer["operations"].as_array().into_iter().flatten();
        let listed = |batch: &Value| {
            let tag = text(&batch["metadata"]["displayName"]).map_or(Tag::Other, Tag::Is);
            let created = rfc3339(&batch["metadata"]["createTime"]);
            Some(Listed { remote: text(&batch["name"])?, tag, created, items: None })
        };
        Page { batches: batches.filter_map(listed).collect(), next: text(&answer["nextPageToken"]) }
    }

    fn batch(&self, remote: &str) -> String {
        let id = remote.strip_prefix("batches/").unwrap_or(remote);
        format!("/batches/{}", escaped(id))
    }

    fn state(&self, answer: &Value) -> State {
        let told = [&answer["metadata"]["state"], &answer["state"]].into_iter().find_map(Value::as_str);
        // It is spelled BATCH_STATE_… and JOB_STATE_….
        let state = told.unwrap_or_default().rsplit_once("STATE_").map_or("", |(_, state)| state);
        let cancelled = answer["error"]["code"] == CANCELLED;
        let turns = match state {
            "SUCCEEDED" => Turns::All,
            "CANCELLED" | "EXPIRED" => Turns::Some,
            "FAILED" => return failed(&answer["error"]),
            _ if answer["done"] != true => return State::Works,
            _ if cancelled => Turns::Some,
            _ if answer["error"].is_null() => Turns::All,
            _ => return failed(&answer["error"]),
        };
        let remote = self.name(answer).unwrap_or_default();
        State::Ended { sources: vec![Source { at: self.batch(&remote), form: Form::Elements }], turns }
    }

    fn cancel(&self, remote: &str) -> Request {
        Request::post(format!("{}:cancel", self.batch(remote)), String::new())
    }

    fn result(&self, record: &[u8]) -> Option<Answered> {
        let element: Element<'_> = serde_json::from_slice(record).ok()?;
        let answer = match (element.response, element.error) {
            (_, Value::Object(error)) => {
                let code = error.get("code").and_then(Value::as_u64).unwrap_or_default();
                if code == CANCELLED { Answer::GivenUp } else { refused(&Value::Object(error)) }
            }
            (Some(response), _) => Answer::Body(response.get().to_owned()),
            (None, _) => return None,
        };
        Some(Answered { custom_id: element.metadata.key, answer })
    }
}

/// A result.
#[derive(Deserialize)]
struct Element<'a> {
    metadata: Metadata,
    #[serde(borrow, default)]
    response: Option<&'a RawValue>,
    #[serde(default)]
    error: Value,
}

#[derive(Deserialize)]
struct Metadata {
    key: String,
}

/// The status of a `google.rpc.Status`, and the body with which it would have come.
fn status(error: &Value) -> (u16, String) {
    let code = error["code"].as_u64().unwrap_or_default();
    let status = STATUSES.iter().find(|(known, _)| *known == code).map_or(200, |(_, status)| *status);
    (status, json!({ "error": error }).to_string())
}

fn refused(error: &Value) -> Answer {
    let (status, body) = status(error);
    Answer::Refused { status, body }
}

fn failed(error: &Value) -> State {
    let (status, body) = status(error);
    State::Refused { status, body, lines: Vec::new(), items: None }
}
