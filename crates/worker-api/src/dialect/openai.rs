//! Chat completions as OpenAI speaks them, and as most providers have learnt to.

mod extras;

use super::sse::Events;
use super::{Dialect, Encoded, KeyHeader, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use crate::providers::Provider;
use genmill_core::attempt::{FinishReason, Usage};
use genmill_core::job::JobSpec;
use genmill_core::money::Picodollars;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

/// The path below the base URL.
const PATH: &str = "/chat/completions";

/// How many stop strings OpenAI takes. The worker cuts at the others itself.
const STOPS_MAX: usize = 4;

/// What `finish_reason` may say. Anything else is unknown, which is no error.
const FINISH_REASONS: &[(&str, FinishReason)] = &[
    ("stop", FinishReason::Stop),
    ("eos", FinishReason::Stop),
    ("eos_token", FinishReason::Stop),
    ("end_turn", FinishReason::Stop),
    ("stop_sequence", FinishReason::Stop),
    ("length", FinishReason::Length),
    ("max_tokens", FinishReason::Length),
    ("model_length", FinishReason::Length),
    ("tool_calls", FinishReason::ToolCalls),
    ("function_call", FinishReason::ToolCalls),
    ("content_filter", FinishReason::ContentFilter),
    ("safety", FinishReason::ContentFilter),
];

/// Values of `finish_reason` that say the provider failed while it answered.
const FINISHED_BY_ERROR: &[&str] = &["error", "insufficient_system_resource", "aborted"];

/// The dialect.
#[derive(Debug)]
pub(super) struct OpenAi;

impl Dialect for OpenAi {
    fn key_header(&self) -> KeyHeader {
        KeyHeader { name: "authorization", scheme: "Bearer " }
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let mut headers: Vec<_> = provider.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        headers.push(("content-type".to_owned(), "application/json".to_owned()));
        let path = provider.path.as_deref().unwrap_or(PATH).to_owned();
        Encoded { path, headers, body: Value::Object(body(spec, model, provider, streaming)).to_string() }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        let events = events(&String::from_utf8_lossy(body));
        if events.is_empty() {
            return Err(unreadable("the answer says nothing"));
        }
        let mut reply = Reply::default();
        for event in events {
            match event {
                StreamEvent::Text(text) => reply.text.push_str(&text),
                StreamEvent::Finished(reason) => reply.finish_reason = Some(reason),
                StreamEvent::ToolCall { part, .. } => reply.tool_calls.push(part),
                StreamEvent::Logprobs(logprobs) => reply.logprobs.extend(logprobs),
                StreamEvent::Usage(usage) => reply.usage = Some(usage),
                StreamEvent::Billed(billed) => reply.billed = Some(billed),
                StreamEvent::Fingerprint(fingerprint) => reply.fingerprint = fingerprint,
                StreamEvent::Error(error) => return Err(error),
                StreamEvent::Done => {}
            }
        }
        Ok(reply)
    }

    fn decode_error(&self, body: &[u8]) -> ProviderError {
        match serde_json::from_slice::<Value>(body) {
            Ok(value) => provider_error(&value),
            Err(_) => ProviderError { message: plain_text(body), ..ProviderError::default() },
        }
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        Box::new(Decoder::default())
    }
}

fn body(spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Map<String, Value> {
    let sampling = &spec.sampling;
    let max_tokens_field = provider.max_tokens_field(model).unwrap_or("max_tokens");
    let seed_field = provider.seed_field.as_deref().unwrap_or("seed");
    let stops = &sampling.stop[..sampling.stop.len().min(STOPS_MAX)];
    // The parameter as Genmill names it, the field it is sent in, its value.
    let parameters = [
        ("max_tokens", max_tokens_field, Some(json!(sampling.max_tokens))),
        ("temperature", "temperature", Some(json!(sampling.temperature))),
        ("top_p", "top_p", sampling.top_p.map(|top_p| json!(top_p))),
        ("top_k", "top_k", sampling.top_k.map(|top_k| json!(top_k))),
        ("seed", seed_field, Some(json!(fold(sampling.seed)))),
        ("stop", "stop", (!stops.is_empty()).then(|| json!(stops))),
    ];
    let mut body = Map::new();
    body.insert("model".to_owned(), json!(model));
    body.insert("messages".to_owned(), extras::messages(&spec.input));
    for (parameter, field, value) in parameters.into_iter().chain(extras::parameters(&sampling.controls)) {
        if let (Some(value), true) = (value, provider.takes(model, parameter)) {
            body.insert(field.to_owned(), value);
        }
    }
    if streaming == Streaming::On {
        body.insert("stream".to_owned(), json!(true));
        if provider.stream_usage {
            body.insert("stream_options".to_owned(), json!({"include_usage": true}));
        }
    }
    body
}

/// The seed in 31 bits, which every provider takes; a seed that fits is sent as it is.
fn fold(seed: u64) -> u64 {
    (seed ^ (seed >> 31) ^ (seed >> 62)) & 0x7fff_ffff
}

/// Reads a stream of chunks.
#[derive(Debug, Default)]
struct Decoder {
    events: Events,
}

impl StreamDecoder for Decoder {
    fn push(&mut self, bytes: &[u8]) -> Vec<StreamEvent> {
        match self.events.push(bytes) {
            Ok(data) => data.iter().flat_map(|data| events(data)).collect(),
            Err(_) => vec![StreamEvent::Error(unreadable("an event of the stream is too long"))],
        }
    }

    fn end(&mut self) -> Vec<StreamEvent> {
        self.events.end().map(|data| events(&data)).unwrap_or_default()
    }
}

/// A chat completion or a chunk of one, as far as it is read.
#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    usage: Option<WireUsage>,
    #[serde(default)]
    x_groq: Option<Extension>,
    #[serde(default)]
    system_fingerprint: Value,
    #[serde(default)]
    error: Option<Value>,
}

/// Where Groq tells the usage of a stream.
#[derive(Deserialize)]
struct Extension {
    #[serde(default)]
    usage: Option<WireUsage>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: Option<Value>,
    #[serde(default)]
    delta: Option<Message>,
    /// In a chunk that has a delta too, this is the text so far.
    #[serde(default)]
    message: Option<Message>,
    #[serde(default)]
    logprobs: Value,
    #[serde(default)]
    finish_reason: Option<Value>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<Value>,
    #[serde(default)]
    tool_calls: Value,
}

#[derive(Deserialize)]
struct WireUsage {
    #[serde(default, deserialize_with = "count")]
    prompt_tokens: Option<u64>,
    #[serde(default, deserialize_with = "count")]
    completion_tokens: Option<u64>,
    #[serde(default, deserialize_with = "count")]
    total_tokens: Option<u64>,
    /// DeepSeek's name for cached tokens.
    #[serde(default, deserialize_with = "count")]
    prompt_cache_hit_tokens: Option<u64>,
    /// Moonshot's.
    #[serde(default, deserialize_with = "count")]
    cached_tokens: Option<u64>,
    #[serde(default)]
    prompt_tokens_details: Option<Value>,
    #[serde(default)]
    completion_tokens_details: Option<Value>,
    /// OpenRouter's figure in dollars, kept as it is written.
    #[serde(default)]
    cost: Option<Box<RawValue>>,
}

/// A count; anything that is none reads as absent.
fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(Value::deserialize(deserializer)?.as_u64())
}

/// What one object says: a whole completion or a chunk, which differ in one name.
fn events(data: &str) -> Vec<StreamEvent> {
    let data = data.trim();
    if data == "[DONE]" {
        return vec![StreamEvent::Done];
    }
    let Ok(completion) = serde_json::from_str::<Completion>(data) else {
        return vec![StreamEvent::Error(unreadable("the answer is not a chat completion"))];
    };
    if let Some(error) = completion.error.filter(|error| !error.is_null()) {
        return vec![StreamEvent::Error(provider_error(&json!({ "error": error })))];
    }
    if completion.choices.is_none() && completion.usage.is_none() {
        return strange(data);
    }
    let first = |choice: &Choice| choice.index.as_ref().is_none_or(|index| index.as_u64().is_none_or(|i| i == 0));
    let choice = completion.choices.unwrap_or_default().into_iter().find(first);
    let mut events = choice.map(of_choice).unwrap_or_default();
    let usage = completion.usage.or(completion.x_groq.and_then(|extension| extension.usage));
    events.extend(usage.map(of_usage).unwrap_or_default());
    if let Some(fingerprint) = completion.system_fingerprint.as_str().filter(|fingerprint| !fingerprint.is_empty()) {
        events.push(StreamEvent::Fingerprint(fingerprint.to_owned()));
    }
    events
}

/// An object that is no completion: an error of another shape, or something to pass over.
fn strange(data: &str) -> Vec<StreamEvent> {
    let error = provider_error(&serde_json::from_str(data).unwrap_or_default());
    if error.message.is_empty() { Vec::new() } else { vec![StreamEvent::Error(error)] }
}

fn of_choice(choice: Choice) -> Vec<StreamEvent> {
    if let Some(error) = choice.error.filter(|error| !error.is_null()) {
        return vec![StreamEvent::Error(provider_error(&json!({ "error": error })))];
    }
    let message = choice.delta.or(choice.message);
    let mut events = Vec::new();
    if let Some(Message { content, tool_calls }) = message {
        let text = content.map(text_of).unwrap_or_default();
        events.extend((!text.is_empty()).then_some(StreamEvent::Text(text)));
        events.extend(extras::tool_calls(&tool_calls));
    }
    events.extend(extras::logprobs(&choice.logprobs));
    match choice.finish_reason.as_ref().and_then(Value::as_str).filter(|reason| !reason.is_empty()) {
        Some(reason) if FINISHED_BY_ERROR.contains(&reason) => {
            events.push(StreamEvent::Error(unreadable("the provider failed while it answered")));
        }
        Some(reason) => events.push(StreamEvent::Finished(finish_reason(reason))),
        None => {}
    }
    events
}

fn finish_reason(reason: &str) -> FinishReason {
    let known = FINISH_REASONS.iter().find(|(name, _)| name.eq_ignore_ascii_case(reason));
    known.map_or(FinishReason::Unknown, |(_, reason)| *reason)
}

/// The text of a content: a string, or a list of parts of which some are text.
fn text_of(content: Value) -> String {
    match content {
        Value::String(text) => text,
        Value::Array(parts) => {
            let is_text = |part: &&Value| part["type"].as_str().is_none_or(|kind| kind == "text");
            parts.iter().filter(is_text).filter_map(|part| part.as_str().or(part["text"].as_str())).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => String::new(),
    }
}

fn of_usage(wire: WireUsage) -> Vec<StreamEvent> {
    let mut events = Vec::new();
    if let (Some(prompt_tokens), Some(completion_tokens)) = (wire.prompt_tokens, wire.completion_tokens) {
        let details = wire.prompt_tokens_details.as_ref();
        let cached = details.and_then(|details| details["cached_tokens"].as_u64());
        let cached_prompt_tokens = cached.or(wire.prompt_cache_hit_tokens).or(wire.cached_tokens).unwrap_or(0);
        let outside = reasoning_outside(&wire, prompt_tokens.saturating_add(completion_tokens));
        let completion_tokens = completion_tokens.saturating_add(outside);
        events.push(StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens, completion_tokens }));
    }
    let cost = wire.cost.as_ref().map(|cost| cost.get().trim_matches('"'));
    events.extend(cost.and_then(|cost| Picodollars::parse_dollars(cost).ok()).map(StreamEvent::Billed));
    events
}

/// Reasoning tokens that are billed but not counted in the completion: the total tells (xAI).
fn reasoning_outside(wire: &WireUsage, counted: u64) -> u64 {
    let details = wire.completion_tokens_details.as_ref();
    let reasoning = details.and_then(|details| details["reasoning_tokens"].as_u64()).unwrap_or(0);
    if wire.total_tokens == Some(counted.saturating_add(reasoning)) { reasoning } else { 0 }
}

fn unreadable(message: &str) -> ProviderError {
    ProviderError { status: None, code: String::new(), message: message.to_owned() }
}

/// Reads an error in any of the shapes that are found at large.
fn provider_error(value: &Value) -> ProviderError {
    let value = value.get(0).unwrap_or(value);
    let inner = ["error", "errors"].iter().find_map(|name| value.get(name)).filter(|inner| !inner.is_null());
    let inner = inner.map_or(value, |inner| inner.get(0).unwrap_or(inner));
    let code = ["code", "type", "error_type"].iter().find_map(|name| inner.get(name).filter(|code| !code.is_null()));
    let message = inner.as_str().or_else(|| inner["message"].as_str()).or_else(|| value["message"].as_str());
    ProviderError {
        status: code.and_then(status_of),
        code: code.map(|code| code.as_str().map_or_else(|| code.to_string(), str::to_owned)).unwrap_or_default(),
        message: message.map_or_else(|| detail(value), str::to_owned),
    }
}

/// A code that is an HTTP status.
fn status_of(code: &Value) -> Option<u16> {
    let number = code.as_u64().or_else(|| code.as_str()?.parse().ok())?;
    u16::try_from(number).ok().filter(|status| (400..600).contains(status))
}

/// What servers built with FastAPI say: a text, or a list of places and problems. The rejected input, which they quote
/// too, is left out: it may be the prompt.
fn detail(value: &Value) -> String {
    let detail = &value["detail"];
    if let Some(text) = detail.as_str() {
        return text.to_owned();
    }
    let place = |row: &Value| row["loc"].as_array().map(|parts| parts.iter().map(word).collect::<Vec<_>>().join("."));
    let line = |row: &Value| Some(format!("{}: {}", place(row)?, row["msg"].as_str()?));
    detail.as_array().map(|rows| rows.iter().filter_map(line).collect::<Vec<_>>().join("; ")).unwrap_or_default()
}

fn word(part: &Value) -> String {
    part.as_str().map_or_else(|| part.to_string(), str::to_owned)
}

/// A body that is no JSON, unless it is a web page.
fn plain_text(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    if text.starts_with('<') { "the answer is a web page".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests;
