//! Mistral's batch jobs: OpenAI's files, and a job that names model and address for all of its items.
//!
//! <https://docs.mistral.ai/capabilities/batch/>

use super::openai::{named_files, result, sources};
use super::{
    Answered, BatchApi, Carrier, Listed, Page, Request, State, Submission, TAG, Tag, Turns, text, unix_s, uploaded,
};
use crate::dialect::Encoded;
use crate::url::escaped;
use genmill_core::time::UnixMs;
use serde_json::{Value, json};
use std::time::{Duration, UNIX_EPOCH};

/// How many jobs a page of the list has.
const PAGE: usize = 100;

/// The last point in time that RFC 3339 can spell.
const SPELLED_MAX_MS: u64 = 253_402_300_799_999;

/// The fields that name files of results.
const RESULTS: [&str; 2] = ["output_file", "error_file"];

/// The API.
#[derive(Debug)]
pub(super) struct Mistral;

impl BatchApi for Mistral {
    fn items_max(&self) -> usize {
        1_000_000
    }

    fn bytes_max(&self) -> usize {
        512_000_000
    }

    fn item(&self, custom_id: &str, encoded: &Encoded) -> String {
        let mut body: Value = serde_json::from_str(&encoded.body).unwrap_or_default();
        // The job has it.
        if let Some(body) = body.as_object_mut() {
            body.remove("model");
        }
        json!({"custom_id": custom_id, "body": body}).to_string()
    }

    fn carrier(&self, submission: Submission<'_>) -> Carrier {
        uploaded(submission)
    }

    fn creation(&self, submission: Submission<'_>, path: &str, file: &str) -> Option<Request> {
        let body = json!({
            "input_files": [file],
            "model": submission.model,
            "endpoint": format!("/v1{path}"),
            "metadata": {TAG: submission.tag},
        });
        Some(Request::post("/batch/jobs".to_owned(), body.to_string()))
    }

    fn name(&self, answer: &Value) -> Option<String> {
        text(&answer["id"])
    }

    fn list(&self, since: UnixMs, next: Option<&str>) -> String {
        let since = UNIX_EPOCH + Duration::from_millis(since.0.min(SPELLED_MAX_MS));
        let since = escaped(&humantime::format_rfc3339_seconds(since).to_string());
        format!("/batch/jobs?page={}&page_size={PAGE}&created_after={since}", escaped(next.unwrap_or("0")))
    }

    fn page(&self, answer: &Value, asked: Option<&str>) -> Page {
        let jobs = answer["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        let page: usize = asked.and_then(|page| page.parse().ok()).unwrap_or(0);
        let next = (jobs.len() >= PAGE).then(|| (page + 1).to_string());
        Page { batches: jobs.iter().filter_map(listed).collect(), next }
    }

    fn batch(&self, remote: &str) -> String {
        format!("/batch/jobs/{}", escaped(remote))
    }

    fn state(&self, answer: &Value) -> State {
        let sources = sources(answer, RESULTS);
        let turns = match answer["status"].as_str().unwrap_or_default() {
            "SUCCESS" => Turns::All,
            "TIMEOUT_EXCEEDED" | "CANCELLED" => Turns::Some,
            "FAILED" if sources.is_empty() => {
                // Whether the fault lies in the items is not told.
                let body = json!({"error": answer["errors"][0]}).to_string();
                return State::Refused { status: 200, body, lines: Vec::new(), items: None };
            }
            "FAILED" => Turns::Some,
            // Queued, running, cancellation requested.
            _ => return State::Works,
        };
        State::Ended { sources, turns }
    }

    fn files(&self, answer: &Value) -> Vec<String> {
        let inputs = answer["input_files"].as_array().into_iter().flatten().filter_map(text);
        inputs.chain(named_files(answer, RESULTS)).collect()
    }

    fn cancel(&self, remote: &str) -> Request {
        Request::post(format!("/batch/jobs/{}/cancel", escaped(remote)), String::new())
    }

    fn result(&self, record: &[u8]) -> Option<Answered> {
        result(record)
    }
}

fn listed(job: &Value) -> Option<Listed> {
    let tag = job["metadata"][TAG].as_str().map_or(Tag::Other, |tag| Tag::Is(tag.to_owned()));
    Some(Listed { remote: text(&job["id"])?, tag, created: unix_s(&job["created_at"]), items: None })
}
