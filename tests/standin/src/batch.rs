//! The batch APIs: files of items, batches, and what came of them, kept in memory. Never here: how each provider spells
//! it (`batch/forms.rs`), and what an item is answered (`chat`).
//!
//! A batch does what the directives of its items say that begin with `!batch-` (see `script`).

mod forms;
mod gate;

use crate::chat::{self, Provider, Refusal, refuse_key};
use crate::script::{Bad, BatchEnd, BatchScript, Fault, Lost, Script};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
pub(crate) use forms::Form;
use futures_util::stream;
pub(crate) use gate::{Gate, pass};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// How long a batch runs at least at which nobody looks.
const UNSEEN: Duration = Duration::from_secs(2);

/// A batch, for whoever counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Made {
    /// Its name.
    pub id: String,
    /// What it can be found by: of its metadata, or its display name; empty where there is no such thing.
    pub tag: String,
    /// Its items' names.
    pub items: Vec<String>,
    /// `running`, or how it ended.
    pub state: &'static str,
}

/// What is kept.
#[derive(Debug)]
pub(crate) struct Batches {
    open: Mutex<Kept>,
    pub(crate) gate: watch::Sender<Gate>,
}

impl Default for Batches {
    fn default() -> Self {
        Self { open: Mutex::default(), gate: gate::open() }
    }
}

#[derive(Debug, Default)]
struct Kept {
    files: Vec<Option<File>>,
    batches: Vec<Batch>,
    /// How often a batch with such a first item was asked for.
    asked: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct File {
    name: String,
    content: String,
}

/// An item of a batch.
#[derive(Clone, Debug)]
struct Item {
    custom_id: String,
    /// What is asked.
    body: Value,
    /// What came of it: a status and a body; `None` while it had no turn.
    result: Option<(u16, Value)>,
    /// Its batch is refused because of it.
    bad: Option<Bad>,
}

#[derive(Debug)]
struct Batch {
    form: Form,
    id: String,
    /// The metadata, or the display name.
    metadata: Value,
    /// The file that it was made of.
    input: String,
    model: String,
    items: Vec<Item>,
    created: SystemTime,
    begun: Instant,
    looks: u64,
    downloads: u64,
    end: Option<BatchEnd>,
    script: BatchScript,
    /// Looks that are answered with an error, this many still.
    failing: u64,
    /// The files of its results that were deleted: that of answers, that of errors.
    deleted: [bool; 2],
}

impl Batches {
    fn open(&self) -> MutexGuard<'_, Kept> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every batch, oldest first.
    pub(crate) fn made(&self) -> Vec<Made> {
        let made = |batch: &Batch| Made {
            id: batch.id.clone(),
            tag: batch.metadata.as_str().or(batch.metadata["genmill_tag"].as_str()).unwrap_or_default().to_owned(),
            items: batch.items.iter().map(|item| item.custom_id.clone()).collect(),
            state: batch.end.as_ref().map_or("running", BatchEnd::name),
        };
        self.open().batches.iter().map(made).collect()
    }

    /// The names of the files that are kept.
    pub(crate) fn files(&self) -> Vec<String> {
        let kept = self.open();
        let items =
            (0..).zip(&kept.files).filter(|(_, file)| file.is_some()).map(|(at, _): (usize, _)| format!("file-{at}"));
        let results = kept.batches.iter().flat_map(|batch| {
            let there = |errors: bool| batch.form.has_file(batch, errors) && !batch.deleted[usize::from(errors)];
            let name = |errors: bool| format!("{}-{}", if errors { "error" } else { "output" }, batch.id);
            [false, true].into_iter().filter(move |errors| there(*errors)).map(name)
        });
        items.chain(results).collect()
    }

    /// Ends every batch that still runs.
    pub(crate) fn end(&self, provider: &Provider) {
        for batch in &mut self.open().batches {
            batch.finish(provider);
        }
    }
}

impl Batch {
    /// Ends by itself when it is time.
    fn advance(&mut self, provider: &Provider) {
        self.looks += 1;
        let due = self.looks > self.script.looks && self.begun.elapsed() >= Duration::from_millis(self.script.ms);
        if due {
            self.finish(provider);
        }
    }

    /// Ends when it is time, though nobody looks at it.
    fn age(&mut self, provider: &Provider) {
        if self.script.looks == 0 && self.begun.elapsed() >= UNSEEN.max(Duration::from_millis(self.script.ms)) {
            self.finish(provider);
        }
    }

    fn finish(&mut self, provider: &Provider) {
        let bad = self.items.iter().any(|item| item.bad.is_some());
        let end = if bad { BatchEnd::Failed("invalid_request".to_owned()) } else { self.script.end.clone() };
        self.stop(end, provider);
    }

    /// Whether it is not known any more.
    fn is_gone(&self) -> bool {
        self.script.vanish.is_some_and(|looks| self.looks >= looks)
    }

    /// Ends in this way, unless it has ended.
    fn stop(&mut self, end: BatchEnd, provider: &Provider) {
        if self.end.is_some() {
            return;
        }
        let turns = match &end {
            BatchEnd::Completed => self.items.len(),
            BatchEnd::Expired | BatchEnd::Cancelled => self.script.partial.unwrap_or(self.items.len() / 2),
            BatchEnd::Failed(_) => 0,
        };
        for item in self.items.iter_mut().take(turns) {
            item.result =
                Some(chat::item(provider, self.form.shape(), &self.form.path(&self.model), item.body.clone()));
        }
        if self.script.nameless {
            self.items.iter_mut().for_each(|item| item.custom_id.clear());
        }
        self.end = Some(end);
    }

    fn created_s(&self) -> u64 {
        let at = self.created.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        at.saturating_add_signed(self.script.clock_s)
    }

    /// Whether the results are cut off this time.
    fn is_cut(&mut self) -> bool {
        self.downloads += 1;
        self.downloads <= self.script.cut
    }
}

type Shared = State<Arc<Provider>>;

/// `POST /v1/files`.
pub(crate) async fn upload(provider: Shared, headers: HeaderMap, body: Bytes) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return Form::OpenAi.refuse(refusal);
    }
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let Some(file) = forms::uploaded(kind, &String::from_utf8_lossy(&body)) else {
        return Form::OpenAi.refuse(Refusal::new(400, "invalid_request_error", "no file with the purpose batch"));
    };
    let items = forms::lines(&file.content);
    let script = items.iter().find_map(|item| script_of(Form::OpenAi, &item["body"])).unwrap_or_default();
    let mut kept = provider.batches.open();
    if let Some(status) = script.batch.upload.filter(|_| kept.is_to_fail(&format!("file {}", items[0]), &script)) {
        return Form::OpenAi.refuse(Refusal::new(status, "server_error", "The stand-in was told to fail."));
    }
    kept.files.push(Some(file));
    let id = format!("file-{}", kept.files.len() - 1);
    Json(json!({"id": id, "object": "file", "purpose": "batch"})).into_response()
}

/// `GET /v1/files/{id}`.
pub(crate) async fn file(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return Form::OpenAi.refuse(refusal);
    }
    match provider.batches.open().file(&id) {
        Some(file) => Json(json!({"id": id, "filename": file.name, "purpose": "batch"})).into_response(),
        None => Form::OpenAi.refuse(Refusal::new(404, "not_found", "No such file.")),
    }
}

impl Kept {
    fn file(&self, id: &str) -> Option<&File> {
        self.files.get(id.strip_prefix("file-")?.parse::<usize>().ok()?)?.as_ref()
    }

    /// Whether a call with this content misbehaves, this time.
    fn is_to_fail(&mut self, content: &str, script: &Script) -> bool {
        let nth = self.asked.entry(content.to_owned()).or_default();
        *nth += 1;
        script.times.is_none_or(|times| *nth <= times)
    }

    /// Whether there was such a file.
    fn delete(&mut self, id: &str) -> bool {
        let at = id.strip_prefix("file-").and_then(|at| at.parse::<usize>().ok());
        if let Some(at) = at {
            return self.files.get_mut(at).is_some_and(|file| file.take().is_some());
        }
        let (which, of) = id.split_once('-').unwrap_or((id, ""));
        let errors = which == "error";
        let found = self.batches.iter_mut().find(|batch| batch.id == of && batch.form.has_file(batch, errors));
        found.is_some_and(|batch| !std::mem::replace(&mut batch.deleted[usize::from(errors)], true))
    }
}

/// `DELETE /v1/files/{id}`.
pub(crate) async fn delete(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return Form::OpenAi.refuse(refusal);
    }
    match provider.batches.open().delete(&id) {
        true => Json(json!({"id": id, "object": "file", "deleted": true})).into_response(),
        false => Form::OpenAi.refuse(Refusal::new(404, "not_found", "No such file.")),
    }
}

/// `GET /v1/files/{id}/content`: of items, or of results, `output-BATCH` or `error-BATCH`.
pub(crate) async fn content(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return Form::OpenAi.refuse(refusal);
    }
    let mut kept = provider.batches.open();
    if let Some(file) = kept.file(&id) {
        return sent(file.content.clone(), false, "application/jsonl");
    }
    let (which, of) = id.split_once('-').unwrap_or((&id, ""));
    let errors = which == "error";
    match kept.batches.iter_mut().find(|batch| batch.id == of && !batch.deleted[usize::from(errors)]) {
        Some(batch) => {
            let text = batch.form.results(batch, errors);
            sent(text, batch.is_cut(), "application/jsonl")
        }
        None => Form::OpenAi.refuse(Refusal::new(404, "not_found", "No such file.")),
    }
}

/// The creation of a batch.
#[expect(clippy::disallowed_methods, reason = "a provider tells when a batch was made")]
fn create(form: Form, provider: Arc<Provider>, model: String, headers: HeaderMap, body: Bytes) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return form.refuse(refusal);
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut kept = provider.batches.open();
    let input = form.input(&asked);
    let mut items = form.items(&asked, kept.file(&input).map_or("", |file| &file.content));
    for item in &mut items {
        item.bad = script_of(form, &item.body).and_then(|script| script.batch.bad);
    }
    if items.is_empty() {
        return form.refuse(Refusal::new(400, "invalid_request_error", "no items"));
    }
    let model = if model.is_empty() { asked["model"].as_str().unwrap_or_default().to_owned() } else { model };
    let script = items.iter().find_map(|item| script_of(form, &item.body)).unwrap_or_default();
    let misbehaves = kept.is_to_fail(&items[0].body.to_string(), &script);
    if let Some(status) = script.batch.status.filter(|_| misbehaves) {
        return form.refuse(chat::failed(status, &script.fault));
    }
    let bad: Vec<usize> = items.iter().enumerate().filter(|(_, item)| item.bad.is_some()).map(|(at, _)| at).collect();
    if let (Some(at), true) = (bad.first(), form != Form::OpenAi) {
        let words = if items[*at].bad == Some(Bad::Named) { form.names(&bad) } else { "Bad request.".to_owned() };
        return form.refuse(Refusal::new(400, "invalid_request_error", &words));
    }
    let end = if misbehaves { script.batch.end.clone() } else { BatchEnd::Completed };
    let batch = Batch {
        form,
        id: form.id(kept.batches.len()),
        metadata: form.metadata(&asked),
        input,
        model,
        items,
        created: SystemTime::now(),
        begun: Instant::now(),
        looks: 0,
        downloads: 0,
        end: None,
        failing: script.batch.poll.map_or(0, |_| script.times.unwrap_or(u64::MAX)),
        script: BatchScript { end, ..script.batch },
        deleted: [false; 2],
    };
    let told = form.told(&batch, &host(&headers)).to_string();
    kept.batches.push(batch);
    match script.batch.lost.filter(|_| misbehaves) {
        Some(Lost::Failed) => form.refuse(Refusal::new(500, "server_error", "The stand-in was told to fail.")),
        Some(Lost::Cut) => sent(told, true, "application/json"),
        Some(Lost::Stall) => Body::from_stream(stream::pending::<io::Result<Bytes>>()).into_response(),
        None => sent(told, false, "application/json"),
    }
}

/// The directives of an item that are about its batch.
fn script_of(form: Form, body: &Value) -> Option<Script> {
    let script = Script::parse("", &chat::message_of(form.shape(), body)?);
    (script.batch != BatchScript::default()).then_some(script)
}

/// What is told of one batch.
fn look(form: Form, provider: Arc<Provider>, id: String, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return form.refuse(refusal);
    }
    let mut kept = provider.batches.open();
    let Some(batch) = kept.batches.iter_mut().find(|batch| batch.form == form && form.id_of(batch) == id) else {
        return form.refuse(Refusal::new(404, "not_found", "No such batch."));
    };
    if batch.failing > 0 {
        batch.failing -= 1;
        return form.refuse(chat::failed(batch.script.poll.unwrap_or(500), &Fault::default()));
    }
    if batch.is_gone() {
        return form.refuse(Refusal::new(404, "not_found", "No such batch."));
    }
    batch.advance(&provider);
    // With Gemini the results come along; that it has ended is told whole once.
    let cut = form == Form::Gemini && batch.end.is_some() && {
        batch.downloads += 1;
        batch.downloads > 1 && batch.downloads <= batch.script.cut + 1
    };
    sent(form.told(batch, &host(&headers)).to_string(), cut, "application/json")
}

/// A page of the batches, newest first.
fn list(form: Form, provider: Arc<Provider>, address: Uri, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return form.refuse(refusal);
    }
    let mut kept = provider.batches.open();
    kept.batches.iter_mut().for_each(|batch| batch.age(&provider));
    let batches = kept.batches.iter().rev().filter(|batch| batch.form == form && !batch.is_gone());
    let batches: Vec<&Batch> = batches.collect();
    Json(form.page(&batches, &address, &host(&headers))).into_response()
}

fn cancel(form: Form, provider: Arc<Provider>, id: String, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return form.refuse(refusal);
    }
    let mut kept = provider.batches.open();
    let Some(batch) = kept.batches.iter_mut().find(|batch| batch.form == form && form.id_of(batch) == id) else {
        return form.refuse(Refusal::new(404, "not_found", "No such batch."));
    };
    if batch.end.is_some() {
        return form.refuse(Refusal::new(409, "invalid_request_error", "It has ended."));
    }
    batch.stop(BatchEnd::Cancelled, &provider);
    Json(form.told(batch, &host(&headers))).into_response()
}

/// `POST /v1/batches`.
pub(crate) async fn openai(provider: Shared, headers: HeaderMap, body: Bytes) -> Response {
    create(Form::OpenAi, provider.0, String::new(), headers, body)
}

/// `GET /v1/batches`.
pub(crate) async fn openai_list(provider: Shared, address: Uri, headers: HeaderMap) -> Response {
    list(Form::OpenAi, provider.0, address, headers)
}

/// `GET /v1/batches/{id}`.
pub(crate) async fn openai_look(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    look(Form::OpenAi, provider.0, id, headers)
}

/// `POST /v1/batches/{id}/cancel`.
pub(crate) async fn openai_cancel(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    cancel(Form::OpenAi, provider.0, id, headers)
}

/// `POST /v1/batch/jobs`.
pub(crate) async fn mistral(provider: Shared, headers: HeaderMap, body: Bytes) -> Response {
    create(Form::Mistral, provider.0, String::new(), headers, body)
}

/// `GET /v1/batch/jobs`.
pub(crate) async fn mistral_list(provider: Shared, address: Uri, headers: HeaderMap) -> Response {
    list(Form::Mistral, provider.0, address, headers)
}

/// `GET /v1/batch/jobs/{id}`.
pub(crate) async fn mistral_look(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    look(Form::Mistral, provider.0, id, headers)
}

/// `POST /v1/batch/jobs/{id}/cancel`.
pub(crate) async fn mistral_cancel(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    cancel(Form::Mistral, provider.0, id, headers)
}

/// `POST /v1/messages/batches`.
pub(crate) async fn anthropic(provider: Shared, headers: HeaderMap, body: Bytes) -> Response {
    create(Form::Anthropic, provider.0, String::new(), headers, body)
}

/// `GET /v1/messages/batches`.
pub(crate) async fn anthropic_list(provider: Shared, address: Uri, headers: HeaderMap) -> Response {
    list(Form::Anthropic, provider.0, address, headers)
}

/// `GET /v1/messages/batches/{id}`.
pub(crate) async fn anthropic_look(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    look(Form::Anthropic, provider.0, id, headers)
}

/// `POST /v1/messages/batches/{id}/cancel`.
pub(crate) async fn anthropic_cancel(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    cancel(Form::Anthropic, provider.0, id, headers)
}

/// `GET /v1/messages/batches/{id}/results`.
pub(crate) async fn anthropic_results(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return Form::Anthropic.refuse(refusal);
    }
    let mut kept = provider.batches.open();
    match kept.batches.iter_mut().find(|batch| batch.id == id && batch.end.is_some()) {
        Some(batch) => sent(batch.form.results(batch, false), batch.is_cut(), "application/x-jsonl"),
        None => Form::Anthropic.refuse(Refusal::new(404, "not_found_error", "No results.")),
    }
}

/// `POST /v1beta/models/{model}:{method}`.
pub(crate) async fn gemini(provider: Shared, path: Path<String>, headers: HeaderMap, body: Bytes) -> Response {
    match path.0.strip_suffix(":batchGenerateContent") {
        Some(model) => create(Form::Gemini, provider.0, model.to_owned(), headers, body),
        None => chat::content(provider, path, headers, body).await,
    }
}

/// `GET /v1beta/batches`.
pub(crate) async fn gemini_list(provider: Shared, address: Uri, headers: HeaderMap) -> Response {
    list(Form::Gemini, provider.0, address, headers)
}

/// `GET /v1beta/batches/{id}`.
pub(crate) async fn gemini_look(provider: Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    look(Form::Gemini, provider.0, id, headers)
}

/// `POST /v1beta/batches/{id}:cancel`.
pub(crate) async fn gemini_cancel(provider: Shared, Path(call): Path<String>, headers: HeaderMap) -> Response {
    let id = call.strip_suffix(":cancel").unwrap_or_default().to_owned();
    cancel(Form::Gemini, provider.0, id, headers)
}

/// `GET /batches`: every batch, with its items.
pub(crate) async fn made(State(provider): Shared) -> Json<Vec<Made>> {
    Json(provider.batches.made())
}

fn host(headers: &HeaderMap) -> String {
    headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned()
}

/// A text, or half of it and the end of the connection.
fn sent(text: String, cut: bool, kind: &'static str) -> Response {
    let kind = [(header::CONTENT_TYPE, kind)];
    if !cut {
        return (StatusCode::OK, kind, text).into_response();
    }
    let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
    let pieces = [Ok(half), Err(io::Error::other("told to cut"))];
    (kind, Body::from_stream(stream::iter(pieces))).into_response()
}
