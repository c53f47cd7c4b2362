//! The HTTP side: takes a call, does what its script says, answers whole or as a stream. Never here: what is said (see
//! `answer`) and what was asked for (see `script`).

use crate::BAD_KEY;
use crate::answer::{Answer, Request, answer};
use crate::bill::{Bill, Books, Entry, Received};
use crate::script::{Break, Fault, Script};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream::{self, Stream};
use serde_json::{Value, json};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct Provider {
    pub(crate) books: Arc<Books>,
    pub(crate) models: Vec<String>,
}

/// `GET /bill`.
pub(crate) async fn bill(State(provider): State<Arc<Provider>>) -> Json<Bill> {
    Json(provider.books.bill())
}

/// `GET /v1/models`.
pub(crate) async fn models(State(provider): State<Arc<Provider>>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return refusal;
    }
    let row = |id: &String| json!({"id": id, "object": "model", "created": 1_700_000_000, "owned_by": "standin"});
    let data: Vec<Value> = provider.models.iter().map(row).collect();
    Json(json!({"object": "list", "data": data})).into_response()
}

/// `POST /v1/chat/completions`.
pub(crate) async fn complete(State(provider): State<Arc<Provider>>, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let request = Request::new(&body);
    let message = request.last_user_text();
    let content = format!("{}: {}", request.model(), message.as_deref().unwrap_or_default());
    let received = Received { headers: readable(&headers), body: body.clone() };
    let (nth, entry) = provider.books.call(&content, key_of(&headers), received);
    let script = Script::parse(request.model(), message.as_deref().unwrap_or_default());
    let fault = script.fault_of_call(nth);
    sleep(Duration::from_millis(fault.sleep_ms)).await;
    let refusal = refuse_key(&headers)
        .or_else(|| refuse_request(&request, message.is_some()))
        .or_else(|| fault.status.map(|status| failed(status, &fault)));
    if let Some(refusal) = refusal {
        entry.refused(refusal.status().as_u16());
        return refusal;
    }
    let reply = Reply::new(&request, &script, fault);
    if reply.fault.html {
        entry.refused(200);
        return ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], "<html><body>hello</body></html>")
            .into_response();
    }
    if request.streams() { reply.into_stream(entry, request.wants_usage()) } else { reply.into_whole(&entry) }
}

fn readable(headers: &HeaderMap) -> Vec<(String, String)> {
    headers.iter().map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into())).collect()
}

fn key_of(headers: &HeaderMap) -> &str {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.strip_prefix("Bearer ").unwrap_or_default()
}

fn refuse_key(headers: &HeaderMap) -> Option<Response> {
    let key = key_of(headers);
    (key.is_empty() || key == BAD_KEY).then(|| error(401, "invalid_api_key", "Incorrect API key provided."))
}

fn refuse_request(request: &Request<'_>, has_message: bool) -> Option<Response> {
    if request.model().starts_with("missing") {
        return Some(error(404, "model_not_found", "The model does not exist."));
    }
    (!has_message).then(|| error(400, "invalid_request_error", "messages: a message of the user is needed."))
}

fn failed(status: u16, fault: &Fault) -> Response {
    let code = fault.code.as_deref().unwrap_or(match status {
        429 => "rate_limit_exceeded",
        500.. => "server_error",
        _ => "invalid_request_error",
    });
    let mut response = error(status, code, "The stand-in was told to fail.");
    for (name, value) in [("retry-after", &fault.retry_after), ("retry-after-ms", &fault.retry_after_ms)] {
        if let Some(value) = value.as_ref().and_then(|value| value.parse().ok()) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

fn error(status: u16, code: &str, message: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(error_object(code, message))).into_response()
}

fn error_object(code: &str, message: &str) -> Value {
    json!({"error": {"message": message, "type": code, "param": null, "code": code}})
}

/// An answer with how it goes wrong.
#[derive(Debug)]
struct Reply {
    model: String,
    answer: Answer,
    cost: Option<String>,
    fault: Fault,
}

impl Reply {
    fn new(request: &Request<'_>, script: &Script, fault: Fault) -> Self {
        let answer = answer(request, script);
        Self { model: request.model().to_owned(), answer, cost: script.cost.clone(), fault }
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = (self.answer.prompt_tokens, self.answer.pieces.len());
        let mut usage =
            json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion});
        if let Some(cost) = self.cost.as_deref().and_then(|cost| serde_json::from_str::<Value>(cost).ok()) {
            usage["cost"] = cost;
        }
        usage
    }

    /// A chat completion, or with `chat.completion.chunk` a chunk of one.
    fn object(&self, object: &str, choices: Value) -> Value {
        let created = 1_700_000_000;
        json!({"id": "chatcmpl-standin", "object": object, "created": created, "model": self.model, "choices": choices})
    }

    fn into_whole(self, entry: &Entry) -> Response {
        let message = json!({"role": "assistant", "content": self.answer.pieces.concat()});
        let choices = json!([{"index": 0, "message": message, "finish_reason": self.answer.finish_reason}]);
        let mut object = self.object("chat.completion", choices);
        if !self.fault.no_usage {
            object["usage"] = self.usage();
        }
        let mut body = object.to_string();
        entry.charge(self.answer.prompt_tokens, self.answer.pieces.len());
        match self.fault.break_after {
            Some((_, Break::Garbage | Break::Error)) => body.truncate(body.len() / 2),
            Some((_, Break::Cut | Break::Stall)) => return cut_whole(&body),
            None => {
                if !self.fault.no_usage {
                    entry.usage_sent();
                }
                entry.completed();
            }
        }
        ([(header::CONTENT_TYPE, "application/json")], body).into_response()
    }

    fn into_stream(self, entry: Entry, wants_usage: bool) -> Response {
        let frames = self.frames(wants_usage);
        let body = Body::from_stream(Sending { entry, reply: self, frames, next: 0 }.into_stream());
        ([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response()
    }

    /// Everything a stream sends, in order. The first frame tells the role, then comes one for each piece of text.
    fn frames(&self, wants_usage: bool) -> Vec<Frame> {
        let choice = |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "finish_reason": reason}]);
        let chunk = |choices: Value| self.object("chat.completion.chunk", choices);
        let mut frames = vec![self.frame(&chunk(choice(json!({"role": "assistant", "content": ""}), Value::Null)))];
        for (at, piece) in self.answer.pieces.iter().enumerate() {
            if let Some(broken) = self.break_at(at) {
                return frames.into_iter().chain([broken]).collect();
            }
            let mut frame = self.frame(&chunk(choice(json!({"content": piece}), Value::Null)));
            frame.tokens = 1;
            frames.push(frame);
        }
        if let Some(broken) = self.break_at(self.answer.pieces.len()) {
            return frames.into_iter().chain([broken]).collect();
        }
        frames.push(self.frame(&chunk(choice(json!({}), json!(self.answer.finish_reason)))));
        if wants_usage && !self.fault.no_usage {
            let mut last = chunk(json!([]));
            last["usage"] = self.usage();
            frames.push(Frame { tells_usage: true, ..self.frame(&last) });
        }
        if !self.fault.no_done {
            frames.push(Frame { bytes: "data: [DONE]\n\n".into(), ..Frame::default() });
        }
        frames
    }

    fn frame(&self, object: &Value) -> Frame {
        let comment = if self.fault.comments { ": STANDIN PROCESSING\n\n" } else { "" };
        Frame { bytes: format!("{comment}data: {object}\n\n").into(), ..Frame::default() }
    }

    fn break_at(&self, piece: usize) -> Option<Frame> {
        let (after, kind) = self.fault.break_after?;
        if piece < after.min(self.answer.pieces.len()) {
            return None;
        }
        let bytes: Bytes = match kind {
            Break::Cut | Break::Stall => Bytes::new(),
            Break::Error => format!("data: {}\n\n", error_object("server_error", "It broke.")).into(),
            Break::Garbage => "data: {\"choices\":[{\"delta\":{\"con\n\n".into(),
        };
        Some(Frame { bytes, broken: Some(kind), ..Frame::default() })
    }
}

/// One event of a stream.
#[derive(Debug, Default)]
struct Frame {
    bytes: Bytes,
    tokens: usize,
    tells_usage: bool,
    broken: Option<Break>,
}

/// A stream on its way.
struct Sending {
    entry: Entry,
    reply: Reply,
    frames: Vec<Frame>,
    next: usize,
}

impl Sending {
    fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> {
        let pieces = stream::unfold(self, |mut sending| async move {
            let sent = sending.send().await?;
            Some((sent, sending))
        });
        futures_util::StreamExt::flat_map(pieces, stream::iter)
    }

    /// The network chunks of the next frame; `None` after the last.
    async fn send(&mut self) -> Option<Vec<io::Result<Bytes>>> {
        if self.next == 0 {
            sleep(Duration::from_millis(self.reply.fault.first_byte_ms)).await;
            self.entry.charge(self.reply.answer.prompt_tokens, 0);
        }
        let Some(frame) = self.frames.get(self.next) else {
            self.entry.completed();
            return None;
        };
        self.next += 1;
        sleep(Duration::from_millis(self.reply.fault.chunk_ms)).await;
        self.entry.charge(0, frame.tokens);
        if self.next == self.frames.len() && frame.broken.is_none() {
            self.entry.ends();
        }
        if frame.tells_usage {
            self.entry.usage_sent();
        }
        match frame.broken {
            Some(Break::Cut) => return Some(vec![Err(io::Error::other("told to cut"))]),
            Some(Break::Stall) => std::future::pending::<()>().await,
            Some(Break::Error | Break::Garbage) | None => (),
        }
        let step = if self.reply.fault.split_utf8 { 3 } else { frame.bytes.len() };
        Some(frame.bytes.chunks(step).map(|piece| Ok(frame.bytes.slice_ref(piece))).collect())
    }
}

/// Half of a body, then the end of the connection.
fn cut_whole(body: &str) -> Response {
    let half = Bytes::copy_from_slice(&body.as_bytes()[..body.len() / 2]);
    let pieces = [Ok(half), Err(io::Error::other("told to cut"))];
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(stream::iter(pieces))).into_response()
}
