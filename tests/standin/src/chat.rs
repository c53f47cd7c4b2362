//! The HTTP side: takes a call, does what its script says, answers whole or as a stream. Never here: what is said (see
//! `answer`) and what was asked for (see `script`).

use crate::BAD_KEY;
use crate::answer::{Answer, Request, answer};
use crate::batch::Batches;
use crate::bill::{Bill, Books, Entry, Received};
use crate::limit::{Limits, Said};
use crate::prediction::Predictions;
use crate::script::{Break, Fault, Script};
use crate::shape::{Anthropic, Bedrock, Gemini, OpenAi, Shape, Tgi, Told, Watsonx};
use crate::token::TOKEN;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream::{self, Stream};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::sleep;

/// What calls cost that tell it, by their ids, and how often that was asked for.
pub(crate) type Generations = Mutex<BTreeMap<String, (Value, u32)>>;

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct Provider {
    pub(crate) books: Arc<Books>,
    pub(crate) models: Vec<String>,
    pub(crate) limits: Arc<Limits>,
    /// Answers that wait to be looked at.
    pub(crate) predictions: Predictions,
    /// What calls cost that tell it, by their ids, and how often that was asked for.
    pub(crate) generations: Arc<Generations>,
    /// Files and batches.
    pub(crate) batches: Arc<Batches>,
}

impl Provider {
    /// Keeps the record of a call.
    fn record(&self, reply: &Reply) {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        generations.extend(reply.cost.clone().map(|cost| (reply.id.clone(), (cost, 0))));
    }
}

/// `GET /v1/generation?id=ID`, as OpenRouter has it: the record is there the second time it is asked for.
pub(crate) async fn generation(provider: State<Arc<Provider>>, address: Uri, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return refusal.respond(&OpenAi);
    }
    let id = address.query().and_then(|query| query.strip_prefix("id=")).unwrap_or_default();
    let mut generations = provider.generations.lock().unwrap_or_else(PoisonError::into_inner);
    let (cost, asked) = generations.entry(id.to_owned()).or_default();
    *asked += 1;
    if *asked == 1 || cost.is_null() {
        return Refusal::new(404, "404", "Generation not found").respond(&OpenAi);
    }
    Json(json!({"data": {"id": id, "total_cost": cost, "cancelled": true, "streamed": true}})).into_response()
}

/// The last user message of a body.
pub(crate) fn message_of(shape: &dyn Shape, body: &Value) -> Option<String> {
    Request::new(&shape.request("", body.clone())).last_user_text()
}

/// What a call with this body would be answered, as a status and a body. It is on the bill as such a call is.
pub(crate) fn item(provider: &Provider, shape: &'static dyn Shape, path: &str, body: Value) -> (u16, Value) {
    let asked = shape.request(path, body.clone());
    let request = Request::new(&asked);
    let message = request.last_user_text();
    let text = message.as_deref().unwrap_or_default();
    let received = Received { headers: Vec::new(), body };
    let (nth, entry) = provider.books.call(&format!("{}: {text}", request.model()), "", received);
    let script = Script::parse(request.model(), text);
    let fault = script.fault_of_call(nth);
    let refusal = refuse_request(&request, message.is_some());
    if let Some(refusal) = refusal.or_else(|| fault.status.map(|status| failed(status, &fault))) {
        entry.refused(refusal.status);
        return (refusal.status, shape.error(refusal.status, &refusal.code, &refusal.message));
    }
    let reply = Reply::new(shape, &request, &script, fault, entry.id());
    entry.charge(reply.answer.prompt_tokens, reply.answer.pieces.len());
    entry.completed();
    (200, shape.whole(&reply.told(true)))
}

/// `GET /bill`.
pub(crate) async fn bill(State(provider): State<Arc<Provider>>) -> Json<Bill> {
    Json(provider.books.bill())
}

/// `GET /v1/models`.
pub(crate) async fn models(State(provider): State<Arc<Provider>>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return refusal.respond(&OpenAi);
    }
    let row = |id: &String| json!({"id": id, "object": "model", "created": 1_700_000_000, "owned_by": "standin"});
    let data: Vec<Value> = provider.models.iter().map(row).collect();
    Json(json!({"object": "list", "data": data})).into_response()
}

/// `POST /v1/chat/completions`.
pub(crate) async fn complete(provider: State<Arc<Provider>>, headers: HeaderMap, body: Bytes) -> Response {
    answered(&OpenAi, "", provider, headers, body).await
}

/// `POST /v1/messages`.
pub(crate) async fn messages(provider: State<Arc<Provider>>, headers: HeaderMap, body: Bytes) -> Response {
    answered(&Anthropic, "", provider, headers, body).await
}

/// `POST /v1beta/models/{model}:{method}`.
pub(crate) async fn content(
    provider: State<Arc<Provider>>,
    Path(path): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    answered(&Gemini, &path, provider, headers, body).await
}

/// `POST …/publishers/{publisher}/models/{model}:{method}`, as Vertex has it.
pub(crate) async fn vertex(
    provider: State<Arc<Provider>>,
    Path((_, _, publisher, path)): Path<(String, String, String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let shape: &'static dyn Shape = if publisher == "anthropic" { &Anthropic } else { &Gemini };
    answered(shape, &path, provider, headers, body).await
}

/// `POST /ml/v1/text/{method}`.
pub(crate) async fn watsonx(
    provider: State<Arc<Provider>>,
    Path(path): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    answered(&Watsonx, &path, provider, headers, body).await
}

/// `POST /generate` and `POST /generate_stream`.
pub(crate) async fn generate(provider: State<Arc<Provider>>, path: Uri, headers: HeaderMap, body: Bytes) -> Response {
    answered(&Tgi, path.path().trim_start_matches('/'), provider, headers, body).await
}

/// `POST /model/{model}/{method}`.
pub(crate) async fn converse(
    provider: State<Arc<Provider>>,
    Path((model, method)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    answered(&Bedrock, &format!("{model}/{method}"), provider, headers, body).await
}

/// `GET /v1/key`, as OpenRouter has it: what is left of a key's limit stands in the key, as in `sk-left-0.50`.
pub(crate) async fn key(headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return refusal.respond(&OpenAi);
    }
    let left: Value = left(&headers).and_then(|left| serde_json::from_str(left).ok()).unwrap_or_default();
    Json(json!({"data": {"label": "standin", "limit": left, "limit_remaining": left, "usage": 0}})).into_response()
}

/// `GET /v1/credits`, as OpenRouter has it: for management keys only, whose account's balance stands in the key, as in
/// `sk-management-left-0.50`.
pub(crate) async fn credits(headers: HeaderMap) -> Response {
    let balance = left(&headers).filter(|_| key_of(&headers).contains("management"));
    match balance.and_then(|balance| balance.parse::<f64>().ok()) {
        Some(balance) => {
            Json(json!({"data": {"total_credits": 100.0 + balance, "total_usage": 100.0}})).into_response()
        }
        None => Refusal::new(403, "403", "Only management keys can perform this operation").respond(&OpenAi),
    }
}

fn left(headers: &HeaderMap) -> Option<&str> {
    key_of(headers).split_once("left-").map(|(_, left)| left)
}

pub(crate) async fn answered(
    shape: &'static dyn Shape,
    path: &str,
    State(provider): State<Arc<Provider>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let received: Value = serde_json::from_slice(&body).unwrap_or_default();
    let body = shape.request(path, received.clone());
    let request = Request::new(&body);
    let message = request.last_user_text();
    let content = format!("{}: {}", request.model(), message.as_deref().unwrap_or_default());
    let received = Received { headers: readable(&headers), body: received };
    let (nth, entry) = provider.books.call(&content, key_of(&headers), received);
    let script = Script::parse(request.model(), message.as_deref().unwrap_or_default());
    let fault = script.fault_of_call(nth);
    pause(fault.sleep_ms).await;
    let refusal = refuse_key(&headers)
        .filter(|_| !fault.keyless)
        .or_else(|| refuse_request(&request, message.is_some()))
        .or_else(|| fault.status.map(|status| failed(status, &fault)));
    let key = format!("{} {}", key_of(&headers), request.model());
    let said =
        script.rate.filter(|_| refusal.is_none()).map(|rate| provider.limits.ask(&key, &rate, request.asked_tokens()));
    let Said { refused, headers: limits } = said.unwrap_or(Said { refused: None, headers: Vec::new() });
    let exceeded =
        |message: String| Refusal { headers: limits.clone(), ..Refusal::new(429, "rate_limit_exceeded", &message) };
    let refusal = refusal.or_else(|| refused.map(exceeded));
    if let Some(refusal) = refusal {
        entry.refused(refusal.status);
        return refusal.respond(shape);
    }
    let reply = Reply::new(shape, &request, &script, fault, entry.id());
    provider.record(&reply);
    if reply.fault.html {
        entry.refused(200);
        return ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], "<html><body>hello</body></html>")
            .into_response();
    }
    let streams = request.streams() && !reply.fault.whole;
    let answer = if streams { reply.into_stream(entry, request.wants_usage()) } else { reply.into_whole(&entry) };
    with_headers(answer, limits)
}

fn with_headers(mut response: Response, headers: Vec<(String, String)>) -> Response {
    for (name, value) in headers {
        if let (Ok(name), Ok(value)) = (name.parse::<header::HeaderName>(), value.parse()) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

fn readable(headers: &HeaderMap) -> Vec<(String, String)> {
    headers.iter().map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into())).collect()
}

/// The key, in whichever header it comes.
fn key_of(headers: &HeaderMap) -> &str {
    let names = ["authorization", "x-api-key", "x-goog-api-key", "api-key"];
    let value = names.iter().find_map(|name| headers.get(*name)?.to_str().ok()).unwrap_or_default();
    // A signature names its key first.
    let signed = value.strip_prefix("AWS4-HMAC-SHA256 Credential=").and_then(|signed| signed.split('/').next());
    let key = signed.unwrap_or_else(|| value.strip_prefix("Bearer ").unwrap_or(value));
    key.strip_prefix(TOKEN).unwrap_or(key)
}

/// A refusal, in no form yet.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: u16,
    code: String,
    message: String,
    headers: Vec<(String, String)>,
}

impl Refusal {
    pub(crate) fn new(status: u16, code: &str, message: &str) -> Self {
        Self { status, code: code.to_owned(), message: message.to_owned(), headers: Vec::new() }
    }

    pub(crate) fn respond(self, shape: &dyn Shape) -> Response {
        let object = shape.error(self.status, &self.code, &self.message);
        // The status that an error names itself is the one it comes with, as with Gemini's refusal of a key.
        let status = object["error"]["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or(self.status);
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        with_headers((status, Json(object)).into_response(), self.headers)
    }
}

pub(crate) fn refuse_key(headers: &HeaderMap) -> Option<Refusal> {
    let key = key_of(headers);
    (key.is_empty() || key == BAD_KEY).then(|| Refusal::new(401, "invalid_api_key", "Incorrect API key provided."))
}

fn refuse_request(request: &Request<'_>, has_message: bool) -> Option<Refusal> {
    if request.model().starts_with("missing") {
        return Some(Refusal::new(404, "model_not_found", "The model does not exist."));
    }
    let message = "messages: a message of the user is needed.";
    (!has_message).then(|| Refusal::new(400, "invalid_request_error", message))
}

pub(crate) fn failed(status: u16, fault: &Fault) -> Refusal {
    let code = fault.code.as_deref().unwrap_or(match status {
        429 => "rate_limit_exceeded",
        500.. => "server_error",
        _ => "invalid_request_error",
    });
    let message = fault.message.as_deref().unwrap_or("The stand-in was told to fail.");
    Refusal { headers: fault.headers.clone(), ..Refusal::new(status, code, message) }
}

/// An answer with how it goes wrong.
#[derive(Debug)]
struct Reply {
    shape: &'static dyn Shape,
    id: String,
    model: String,
    answer: Answer,
    text: String,
    cost: Option<Value>,
    fault: Fault,
    samples: usize,
}

impl Reply {
    fn new(shape: &'static dyn Shape, request: &Request<'_>, script: &Script, fault: Fault, id: String) -> Self {
        let answer = answer(request, script);
        let cost = script.cost.as_deref().and_then(|cost| serde_json::from_str(cost).ok());
        let (model, text, samples) = (request.model().to_owned(), answer.pieces.concat(), request.samples());
        Self { shape, id, model, text, answer, cost, fault, samples }
    }

    fn told(&self, wants_usage: bool) -> Told<'_> {
        let tells = wants_usage && !self.fault.no_usage;
        Told {
            model: &self.model,
            id: &self.id,
            text: &self.text,
            finish_reason: self.answer.finish_reason,
            samples: self.samples,
            usage: tells.then_some((self.answer.prompt_tokens, self.answer.pieces.len())),
            cost: self.cost.as_ref(),
        }
    }

    fn into_whole(self, entry: &Entry) -> Response {
        let mut body = self.shape.whole(&self.told(true)).to_string();
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
        ([(header::CONTENT_TYPE, self.content_type("application/json"))], body).into_response()
    }

    /// What an answer calls itself.
    fn content_type(&self, own: &str) -> String {
        self.fault.content_type.as_deref().unwrap_or(own).to_owned()
    }

    fn into_stream(self, entry: Entry, wants_usage: bool) -> Response {
        let frames = self.frames(wants_usage);
        let kind = self.content_type(self.shape.stream_type());
        let body = Body::from_stream(Sending { entry, reply: self, frames, next: 0 }.into_stream());
        ([(header::CONTENT_TYPE, kind)], body).into_response()
    }

    /// Everything a stream sends, in order: what opens it, a frame for each piece of text, what closes it.
    fn frames(&self, wants_usage: bool) -> Vec<Frame> {
        let told = self.told(wants_usage);
        let mut frames: Vec<Frame> = self.shape.opening(&told).iter().map(|object| self.frame(object)).collect();
        for (at, piece) in self.answer.pieces.iter().enumerate() {
            if let Some(broken) = self.break_at(at) {
                return frames.into_iter().chain([broken]).collect();
            }
            frames.push(Frame { tokens: 1, ..self.frame(&self.shape.piece(&self.model, piece)) });
        }
        if let Some(broken) = self.break_at(self.answer.pieces.len()) {
            return frames.into_iter().chain([broken]).collect();
        }
        if self.fault.endless {
            return frames;
        }
        let closing = self.shape.closing(&told);
        frames.extend(
            closing.iter().map(|(object, tells_usage)| Frame { tells_usage: *tells_usage, ..self.frame(object) }),
        );
        let done = self.shape.done().filter(|_| !self.fault.no_done);
        frames.extend(done.map(|done| Frame { bytes: done.into(), ..Frame::default() }));
        frames
    }

    fn frame(&self, object: &Value) -> Frame {
        let comment = if self.fault.comments { self.shape.comment() } else { "" };
        Frame { bytes: [comment.as_bytes(), &self.shape.event(object)].concat().into(), ..Frame::default() }
    }

    fn break_at(&self, piece: usize) -> Option<Frame> {
        let (after, kind) = self.fault.break_after?;
        if piece < after.min(self.answer.pieces.len()) {
            return None;
        }
        let bytes: Bytes = match kind {
            Break::Cut | Break::Stall => Bytes::new(),
            Break::Error => self.shape.event(&self.shape.error(500, "server_error", "It broke.")).into(),
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
            pause(self.reply.fault.first_byte_ms).await;
            self.entry.charge(self.reply.answer.prompt_tokens, 0);
        }
        if self.reply.fault.endless && self.next == self.frames.len() {
            // What opens it is said once.
            self.next = self.frames.len().min(2) - 1;
        }
        let Some(frame) = self.frames.get(self.next) else {
            self.entry.completed();
            return None;
        };
        self.next += 1;
        // What came before goes out before it breaks off.
        let settles = if frame.broken.is_some() { 5 } else { 0 };
        pause(self.reply.fault.chunk_ms.max(settles)).await;
        self.entry.charge(0, frame.tokens);
        if self.next == self.frames.len() && frame.broken.is_none() && !self.reply.fault.endless {
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

/// Waits; for 0 not at all, which a timer would round up to a millisecond.
async fn pause(ms: u64) {
    if ms > 0 {
        sleep(Duration::from_millis(ms)).await;
    }
}

/// Half of a body, then the end of the connection.
pub(crate) fn cut_whole(body: &str) -> Response {
    let half = Bytes::copy_from_slice(&body.as_bytes()[..body.len() / 2]);
    let pieces = [Ok(half), Err(io::Error::other("told to cut"))];
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(stream::iter(pieces))).into_response()
}
