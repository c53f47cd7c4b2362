//! Replicate's predictions on their way: what is looked at again and called off. Never here: what one says (see `chat`).

use crate::chat::{Provider, answered, cut_whole, message_of, refuse_key};
use crate::script::{Break, Script};
use crate::shape::Replicate;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The predictions that were made.
#[derive(Debug, Default)]
pub(crate) struct Predictions(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    /// Their ids are their places.
    made: Vec<Prediction>,
    looks: u64,
    /// Those that were to be cancelled, in the order in which that was asked for.
    cancelled: Vec<usize>,
}

#[derive(Debug)]
enum Prediction {
    /// Has ended, and is told when it is looked at, once; one that broke off is told as broken off.
    Ended(Option<Response>),
    Runs,
    Cancelled,
}

impl Predictions {
    fn open(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn looks(&self) -> u64 {
        self.open().looks
    }

    pub(crate) fn cancelled(&self) -> Vec<usize> {
        self.open().cancelled.clone()
    }
}

/// `POST /v1/models/{owner}/{name}/predictions`: what it answers with is there only when it is looked at again.
pub(crate) async fn predict(
    provider: State<Arc<Provider>>,
    Path((owner, name)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let (at, shared) = (host(&headers), Arc::clone(&provider));
    let path = format!("{owner}/{name}");
    let asked = serde_json::from_slice(&body).ok().and_then(|body: Value| message_of(&Replicate, &body));
    let script = Script::parse(&path, &asked.unwrap_or_default());
    let response = answered(&Replicate, &path, provider, headers, body).await;
    if !response.status().is_success() {
        return response;
    }
    let prediction = if matches!(script.fault.break_after, Some((_, Break::Stall))) {
        Prediction::Runs
    } else {
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.ok();
        Prediction::Ended(body.map(|body| Response::from_parts(parts, Body::from(body))))
    };
    let mut books = shared.predictions.open();
    books.made.push(prediction);
    (StatusCode::CREATED, Json(told(&at, books.made.len() - 1, "starting"))).into_response()
}

/// `GET /v1/predictions/{id}`.
pub(crate) async fn look(provider: State<Arc<Provider>>, Path(id): Path<usize>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return refusal.respond(&Replicate);
    }
    let mut books = provider.predictions.open();
    books.looks += 1;
    match books.made.get_mut(id) {
        Some(Prediction::Ended(told)) => {
            told.take().unwrap_or_else(|| cut_whole("{\"status\": \"succeeded\", \"output\": []}"))
        }
        Some(Prediction::Runs) => Json(told(&host(&headers), id, "processing")).into_response(),
        Some(Prediction::Cancelled) => Json(told(&host(&headers), id, "canceled")).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// `POST /v1/predictions/{id}/cancel`: one that has ended stays as it is.
pub(crate) async fn cancel(provider: State<Arc<Provider>>, Path(id): Path<usize>, headers: HeaderMap) -> Response {
    if let Some(refusal) = refuse_key(&headers) {
        return refusal.respond(&Replicate);
    }
    let mut books = provider.predictions.open();
    books.cancelled.push(id);
    match books.made.get_mut(id) {
        Some(prediction @ Prediction::Runs) => {
            *prediction = Prediction::Cancelled;
            Json(told(&host(&headers), id, "canceled")).into_response()
        }
        Some(Prediction::Ended(_) | Prediction::Cancelled) => Json(json!({"id": id.to_string()})).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn host(headers: &HeaderMap) -> String {
    headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned()
}

fn told(host: &str, id: usize, status: &str) -> Value {
    let at = format!("http://{host}/v1/predictions/{id}");
    json!({"id": id.to_string(), "status": status, "urls": {"get": at, "cancel": format!("{at}/cancel")}})
}
