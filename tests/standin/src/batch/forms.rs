//! How each provider spells its batches. Never here: what becomes of them.

use super::{Batch, File, Item};
use crate::chat::Refusal;
use crate::script::{Bad, BatchEnd};
use crate::shape::{Anthropic, Gemini, OpenAi, Shape};
use axum::http::Uri;
use axum::response::Response;
use serde_json::{Value, json};

/// How many batches a page has at most, whatever is asked.
const PAGE: usize = 2;

/// A provider's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    OpenAi,
    Anthropic,
    Gemini,
    Mistral,
}

impl Form {
    pub(super) fn shape(self) -> &'static dyn Shape {
        match self {
            Self::OpenAi | Self::Mistral => &OpenAi,
            Self::Anthropic => &Anthropic,
            Self::Gemini => &Gemini,
        }
    }

    /// The last part of the path of a single call.
    pub(super) fn path(self, model: &str) -> String {
        if self == Self::Gemini { format!("{model}:generateContent") } else { String::new() }
    }

    pub(super) fn refuse(self, refusal: Refusal) -> Response {
        refusal.respond(self.shape())
    }

    /// Names items, counted from 0.
    pub(super) fn names(self, places: &[usize]) -> String {
        let name = |place: &usize| match self {
            Self::Gemini => format!("Invalid value at 'batch.input_config.requests.requests[{place}].request'"),
            _ => format!("requests.{place}.params: Input should be better"),
        };
        places.iter().map(name).collect::<Vec<_>>().join("; ")
    }

    /// Whether there is a file of answers, or of errors.
    pub(super) fn has_file(self, batch: &Batch, errors: bool) -> bool {
        let files = matches!(self, Self::OpenAi | Self::Mistral) && batch.end.is_some();
        files && !self.is_failed(batch) && !self.results(batch, errors).is_empty()
    }

    fn is_failed(self, batch: &Batch) -> bool {
        self == Self::OpenAi && matches!(batch.end, Some(BatchEnd::Failed(_)))
    }

    pub(super) fn id(self, place: usize) -> String {
        match self {
            Self::OpenAi => format!("batch_{place}"),
            Self::Anthropic => format!("msgbatch_{place}"),
            Self::Gemini => format!("batches/{place}"),
            Self::Mistral => format!("job-{place}"),
        }
    }

    /// The part of the name that stands in paths.
    pub(super) fn id_of(self, batch: &Batch) -> &str {
        batch.id.strip_prefix("batches/").unwrap_or(&batch.id)
    }

    pub(super) fn input(self, asked: &Value) -> String {
        [&asked["input_file_id"], &asked["input_files"][0]]
            .into_iter()
            .find_map(Value::as_str)
            .unwrap_or_default()
            .into()
    }

    pub(super) fn metadata(self, asked: &Value) -> Value {
        if self == Self::Gemini { asked["batch"]["displayName"].clone() } else { asked["metadata"].clone() }
    }

    pub(super) fn items(self, asked: &Value, file: &str) -> Vec<Item> {
        let each = match self {
            Self::OpenAi | Self::Mistral => lines(file),
            Self::Anthropic => asked["requests"].as_array().cloned().unwrap_or_default(),
            Self::Gemini => {
                asked["batch"]["inputConfig"]["requests"]["requests"].as_array().cloned().unwrap_or_default()
            }
        };
        let item = |item: Value| {
            let (name, body) = match self {
                Self::OpenAi => (&item["custom_id"], item["body"].clone()),
                Self::Mistral => {
                    let mut body = item["body"].clone();
                    body["model"] = asked["model"].clone();
                    (&item["custom_id"], body)
                }
                Self::Anthropic => (&item["custom_id"], item["params"].clone()),
                Self::Gemini => (&item["metadata"]["key"], item["request"].clone()),
            };
            Item { custom_id: name.as_str().unwrap_or_default().to_owned(), body, result: None, bad: None }
        };
        each.into_iter().map(item).collect()
    }

    /// What is told of a batch.
    pub(super) fn told(self, batch: &Batch, host: &str) -> Value {
        match self {
            Self::OpenAi => openai(batch),
            Self::Anthropic => anthropic(batch, host),
            Self::Gemini => gemini(batch),
            Self::Mistral => mistral(batch),
        }
    }

    pub(super) fn page(self, batches: &[&Batch], address: &Uri, host: &str) -> Value {
        let of = |name: &str| {
            let pairs = address.query().unwrap_or_default().split('&');
            pairs.filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        let number = |name: &str| of(name).and_then(|value| value.parse::<usize>().ok());
        let behind = |id: &str| batches.iter().position(|batch| batch.id == id).map_or(batches.len(), |at| at + 1);
        let (from, size) = match self {
            Self::OpenAi => (of("after").map_or(0, behind), PAGE),
            Self::Anthropic => (of("after_id").map_or(0, behind), PAGE),
            Self::Gemini => (number("pageToken").unwrap_or(0), PAGE),
            // Whoever pages by numbers counts on getting what was asked for.
            Self::Mistral => {
                let size = number("page_size").unwrap_or(PAGE);
                (number("page").unwrap_or(0) * size, size)
            }
        };
        let rows: Vec<&&Batch> = batches.iter().skip(from).take(size).collect();
        let more = from + rows.len() < batches.len();
        let (first, last) = (rows.first().map(|batch| &batch.id), rows.last().map(|batch| &batch.id));
        let data: Vec<Value> = rows.iter().map(|batch| self.told(batch, host)).collect();
        match self {
            Self::OpenAi | Self::Anthropic => {
                json!({"object": "list", "data": data, "has_more": more, "first_id": first, "last_id": last})
            }
            Self::Gemini if more => json!({"operations": data, "nextPageToken": (from + size).to_string()}),
            Self::Gemini => json!({"operations": data}),
            Self::Mistral => json!({"object": "list", "data": data, "total": batches.len()}),
        }
    }

    /// The results as lines: with OpenAI and Mistral of one of the two files.
    pub(super) fn results(self, batch: &Batch, errors: bool) -> String {
        let line = |item: &Item| match (self, &item.result) {
            (Self::Anthropic, _) => Some(anthropic_result(batch, item)),
            (_, Some((status, body))) => (errors == (*status >= 300)).then(|| {
                let response = json!({"status_code": status, "request_id": "r", "body": body});
                json!({"id": "batch_req", "custom_id": item.custom_id, "response": response, "error": null})
            }),
            (Self::OpenAi, None) if errors => {
                let code = format!("batch_{}", batch.end.as_ref().map_or("", BatchEnd::name));
                let error = json!({"code": code, "message": "This request could not be executed."});
                Some(json!({"id": "batch_req", "custom_id": item.custom_id, "response": null, "error": error}))
            }
            (_, None) => None,
        };
        let mut lines: Vec<String> = batch.items.iter().filter_map(line).map(|line| line.to_string()).collect();
        if let Some(second) = lines.get_mut(1).filter(|_| batch.script.truncate) {
            second.truncate(second.len() / 2);
        }
        if batch.script.garbled { garbled(&lines) } else { lines.iter().map(|line| format!("{line}\n")).collect() }
    }
}

/// The lines in another order, and between them whatever can go wrong.
fn garbled(lines: &[String]) -> String {
    let stranger = r#"{"custom_id":"nobody","response":{"status_code":200,"body":{}},"result":{"type":"canceled"}}"#;
    let mut out = format!("\r\n{stranger}\r\n{{\"oops\r\n[]\r\n");
    for line in lines.iter().rev().chain(lines.first()) {
        out.push_str(line);
        out.push_str("\r\n");
    }
    // The last line is cut off.
    out.push_str(lines.first().map_or("", |line| &line[..line.len() / 2]));
    out
}

fn openai(batch: &Batch) -> Value {
    let status = match &batch.end {
        None => "in_progress",
        Some(end) => end.name(),
    };
    let any = |errors: bool| batch.form.has_file(batch, errors);
    let mut told = json!({
        "id": batch.id, "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": batch.input,
        "completion_window": "24h", "status": status, "created_at": batch.created_s(), "metadata": batch.metadata,
        "output_file_id": any(false).then(|| format!("output-{}", batch.id)),
        "error_file_id": any(true).then(|| format!("error-{}", batch.id)),
        "request_counts": {"total": batch.items.len()},
    });
    if batch.script.forgets {
        told["metadata"] = Value::Null;
    }
    if let Some(BatchEnd::Failed(code)) = &batch.end {
        let error = |line: Value| json!({"code": code, "message": "The stand-in was told to fail.", "line": line});
        let bad = batch.items.iter().enumerate().filter(|(_, item)| item.bad == Some(Bad::Named));
        let mut errors: Vec<Value> = bad.map(|(at, _)| error(json!(at + 1))).collect();
        if errors.is_empty() {
            errors.push(error(Value::Null));
        }
        told["errors"] = json!({"object": "list", "data": errors});
    }
    told
}

fn mistral(batch: &Batch) -> Value {
    let status = match &batch.end {
        None => "RUNNING",
        Some(BatchEnd::Completed) => "SUCCESS",
        Some(BatchEnd::Expired) => "TIMEOUT_EXCEEDED",
        Some(BatchEnd::Cancelled) => "CANCELLED",
        Some(BatchEnd::Failed(_)) => "FAILED",
    };
    let any = |errors: bool| batch.form.has_file(batch, errors);
    let errors = match &batch.end {
        Some(BatchEnd::Failed(code)) => json!([{"message": code, "count": 1}]),
        _ => json!([]),
    };
    json!({
        "id": batch.id, "object": "batch", "input_files": [batch.input], "metadata": batch.metadata, "errors": errors,
        "endpoint": "/v1/chat/completions", "model": batch.model, "status": status, "created_at": batch.created_s(),
        "output_file": any(false).then(|| format!("output-{}", batch.id)),
        "error_file": any(true).then(|| format!("error-{}", batch.id)),
        "total_requests": batch.items.len(),
    })
}

fn anthropic(batch: &Batch, host: &str) -> Value {
    let host = if batch.script.elsewhere { "elsewhere.example" } else { host };
    let results = batch.end.as_ref().map(|_| format!("http://{host}/v1/messages/batches/{}/results", batch.id));
    json!({
        "id": batch.id, "type": "message_batch", "results_url": results, "created_at": rfc3339(batch.created_s()),
        "processing_status": if batch.end.is_some() { "ended" } else { "in_progress" },
        "request_counts": {"processing": batch.items.len()},
    })
}

fn anthropic_result(batch: &Batch, item: &Item) -> Value {
    let result = match (&item.result, &batch.end) {
        (Some((200, message)), _) => json!({"type": "succeeded", "message": message}),
        (Some((_, error)), _) => json!({"type": "errored", "error": error}),
        (None, Some(BatchEnd::Cancelled)) => json!({"type": "canceled"}),
        (None, _) => json!({"type": "expired"}),
    };
    json!({"custom_id": item.custom_id, "result": result})
}

fn gemini(batch: &Batch) -> Value {
    let state = match &batch.end {
        None => "RUNNING",
        Some(BatchEnd::Completed) => "SUCCEEDED",
        Some(BatchEnd::Expired) => "EXPIRED",
        Some(BatchEnd::Cancelled) => "CANCELLED",
        Some(BatchEnd::Failed(_)) => "FAILED",
    };
    let metadata = json!({
        "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
        "model": format!("models/{}", batch.model), "displayName": batch.metadata, "name": batch.id,
        "createTime": rfc3339(batch.created_s()), "state": format!("BATCH_STATE_{state}"),
    });
    let mut told = json!({"name": batch.id, "metadata": metadata});
    match &batch.end {
        None => {}
        Some(BatchEnd::Failed(code)) => {
            told["done"] = json!(true);
            let status = if code.contains("limit") { 8 } else { 3 };
            told["error"] = json!({"code": status, "message": code});
        }
        Some(_) => {
            told["done"] = json!(true);
            told["response"] = json!({"inlinedResponses": {"inlinedResponses": elements(batch)}});
        }
    }
    told
}

fn elements(batch: &Batch) -> Vec<Value> {
    let element = |item: &Item| {
        let metadata = json!({"key": item.custom_id});
        match &item.result {
            Some((200, response)) => json!({"response": response, "metadata": metadata}),
            Some((status, _)) => {
                let code = match status {
                    400 => 3,
                    429 => 8,
                    _ => 13,
                };
                json!({"error": {"code": code, "message": "The stand-in was told to fail."}, "metadata": metadata})
            }
            None => json!({"error": {"code": 1, "message": "The operation was cancelled."}, "metadata": metadata}),
        }
    };
    let mut elements: Vec<Value> = batch.items.iter().map(element).collect();
    if batch.script.garbled {
        elements.extend(elements.first().cloned());
        elements.extend([json!({"response": {}, "metadata": {"key": "nobody"}}), json!({"response": {}})]);
        elements.reverse();
    }
    elements
}

/// The items of a file.
pub(super) fn lines(file: &str) -> Vec<Value> {
    file.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The file of a form that has the purpose batch.
pub(super) fn uploaded(kind: &str, body: &str) -> Option<File> {
    let border = format!("--{}", kind.strip_prefix("multipart/form-data; boundary=")?);
    let part = |name: &str| {
        let parts = body.split(border.as_str()).filter_map(|part| part.split_once("\r\n\r\n"));
        let mut named = parts.filter(|(head, _)| head.contains(&format!("name=\"{name}\"")));
        named.next().and_then(|(head, content)| Some((head.to_owned(), content.strip_suffix("\r\n")?.to_owned())))
    };
    let (head, content) = part("file").filter(|_| part("purpose").is_some_and(|(_, purpose)| purpose == "batch"))?;
    let name = head.split("filename=\"").nth(1)?.split('"').next()?.to_owned();
    Some(File { name, content })
}

/// A point in time, in seconds since 1970, as RFC 3339 has it (Howard Hinnant's days).
fn rfc3339(at_s: u64) -> String {
    let (days, second) = (at_s / 86_400 + 719_468, at_s % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let moved = (5 * of_year + 2) / 153;
    let day = of_year - (153 * moved + 2) / 5 + 1;
    let month = if moved < 10 { moved + 3 } else { moved - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.000000Z", second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_in_time_is_spelled() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(1_709_251_199), "2024-02-29T23:59:59.000000Z");
        assert_eq!(rfc3339(1_795_219_200), "2026-11-21T00:00:00.000000Z");
    }

    #[test]
    fn a_form_has_a_file() {
        let body = "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
                    --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x.jsonl\"\r\n\r\n{}\n{}\r\n--b--\r\n";
        let file = uploaded("multipart/form-data; boundary=b", body).unwrap();
        assert_eq!((file.name.as_str(), file.content.as_str()), ("x.jsonl", "{}\n{}"));
        assert!(uploaded("multipart/form-data; boundary=b", &body.replace("batch", "assistants")).is_none());
        assert!(uploaded("application/json", body).is_none());
    }
}
