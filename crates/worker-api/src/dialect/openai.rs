//! Chat completions as OpenAI speaks them, and as most providers have learnt to.

mod extras;

pub(super) use extras::logprobs_of;

use super::{Dialect, Encoded, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{calls, conversation, errors, parameters, sse};
use crate::prices::Class;
use crate::providers::Provider;
use genmill_core::attempt::{FinishReason, Usage, UsageDetails};
use genmill_core::job::JobSpec;
use genmill_core::money::Picodollars;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};

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
    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let path = provider.path(model).unwrap_or_else(|| PATH.to_owned());
        let (body, left_out) = Self::body(spec, model, provider, streaming);
        Encoded { path, headers: parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        Reply::of(events(&String::from_utf8_lossy(body)))
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        let mut begun = false;
        sse::reading(move |data| {
            // Each chunk has the id: it is enough to tell it once.
            let id = if std::mem::replace(&mut begun, true) { None } else { id(data) };
            id.into_iter().chain(events(data)).collect()
        })
    }
}

impl OpenAi {
    /// The body, and the parameters that have no place in it.
    pub(super) fn body(
        spec: &JobSpec,
        model: &str,
        provider: &Provider,
        streaming: Streaming,
    ) -> (Value, Vec<&'static str>) {
        let sampling = &spec.sampling;
        let max_tokens_field = provider.max_tokens_field(model).unwrap_or("max_tokens");
        let seed_field = provider.seed_field.as_deref().unwrap_or("seed");
        let stops = &sampling.stop[..sampling.stop.len().min(STOPS_MAX)];
        let rows = vec![
            ("max_tokens", max_tokens_field, Some(json!(sampling.max_tokens))),
            ("temperature", "temperature", Some(json!(sampling.temperature))),
            ("top_p", "top_p", sampling.top_p.map(|top_p| json!(top_p))),
            ("top_k", "top_k", sampling.top_k.map(|top_k| json!(top_k))),
            ("seed", seed_field, Some(json!(parameters::seed(sampling.seed)))),
            ("stop", "stop", (!stops.is_empty()).then(|| json!(stops))),
        ];
        let rows = rows.into_iter().chain(extras::parameters(&sampling.controls));
        let model_field = provider.model_field.as_deref().unwrap_or("model");
        let mut body =
            json!({model_field: model, "messages": conversation::each(&spec.input, |said, _| [extras::message(said)])});
        for (field, value) in &provider.body {
            body[field] = json!(value);
        }
        let left_out = parameters::fill(&mut body, spec, model, provider, rows);
        if !provider.takes(model, "image_detail") {
            extras::forget_detail(&mut body["messages"]);
        }
        provider.wants.iter().for_each(|want| extras::add(*want, &mut body));
        if streaming == Streaming::On {
            body["stream"] = json!(true);
            if provider.stream_usage {
                body["stream_options"] = json!({"include_usage": true});
            }
        }
        (body, left_out)
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
    service_tier: Value,
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
    /// Where Moonshot tells the usage of a stream.
    #[serde(default)]
    usage: Option<WireUsage>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<Value>,
    #[serde(default)]
    tool_calls: Value,
    /// Why it does not answer, in place of a content.
    #[serde(default)]
    refusal: Value,
    /// What the model thinks, by either of its names. Some servers use both at once.
    #[serde(default)]
    reasoning_content: Value,
    #[serde(default)]
    reasoning: Value,
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
    /// The figure of OpenRouter, Perplexity and others in dollars, kept as it is written.
    #[serde(default)]
    cost: Option<Box<RawValue>>,
    /// Perplexity's place for tokens of thought.
    #[serde(default, deserialize_with = "count")]
    reasoning_tokens: Option<u64>,
    /// That of xAI, in ten-thousand-millionths of a dollar.
    #[serde(default, deserialize_with = "count")]
    cost_in_usd_ticks: Option<u64>,
}

/// A count, which some write as `5.0`; anything that is none reads as absent.
fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let whole = || value.as_f64().filter(|number| number.fract() == 0.0)?.to_string().parse().ok();
    Ok(value.as_u64().or_else(whole))
}

/// The id of the completion that a chunk is of.
fn id(data: &str) -> Option<StreamEvent> {
    #[derive(Deserialize)]
    struct Named {
        id: String,
    }
    let named: Named = serde_json::from_str(data).ok()?;
    (!named.id.is_empty()).then_some(StreamEvent::Id(named.id))
}

/// What one object says: a whole completion or a chunk, which differ in one name.
fn events(data: &str) -> Vec<StreamEvent> {
    let data = data.trim();
    if data == "[DONE]" {
        return vec![StreamEvent::Done];
    }
    let Ok(completion) = serde_json::from_str::<Completion>(data) else {
        return vec![StreamEvent::Error(ProviderError::saying("the answer is not a chat completion"))];
    };
    if let Some(error) = completion.error.filter(|error| !error.is_null()) {
        return vec![StreamEvent::Error(errors::of_value(&json!({ "error": error })))];
    }
    if completion.choices.is_none() && completion.usage.is_none() {
        return strange(data);
    }
    let mut choices = completion.choices.unwrap_or_default();
    let usage = completion.usage.or(completion.x_groq.and_then(|extension| extension.usage));
    let usage = usage.or_else(|| choices.iter_mut().find_map(|choice| choice.usage.take()));
    let choices = choices.into_iter().enumerate();
    let mut events: Vec<StreamEvent> = choices.flat_map(|(place, choice)| of_sample(place, choice)).collect();
    events.extend(usage.map(of_usage).unwrap_or_default());
    let class = completion.service_tier.as_str().and_then(Class::of_tier);
    events.extend(class.map(StreamEvent::Class));
    if let Some(fingerprint) = completion.system_fingerprint.as_str().filter(|fingerprint| !fingerprint.is_empty()) {
        events.push(StreamEvent::Fingerprint(fingerprint.to_owned()));
    }
    events
}

/// An object that is no completion: an error of another shape, or something to pass over.
fn strange(data: &str) -> Vec<StreamEvent> {
    let error = errors::of_value(&serde_json::from_str(data).unwrap_or_default());
    if error.message.is_empty() { Vec::new() } else { vec![StreamEvent::Error(error)] }
}

/// What a choice says, which is named by its index, or failing that by its place.
fn of_sample(place: usize, choice: Choice) -> Vec<StreamEvent> {
    let index = choice.index.as_ref().and_then(Value::as_u64).and_then(|index| usize::try_from(index).ok());
    let sample = index.unwrap_or(place);
    of_choice(choice).into_iter().map(|event| event.of(sample)).collect()
}

fn of_choice(choice: Choice) -> Vec<StreamEvent> {
    if let Some(error) = choice.error.filter(|error| !error.is_null()) {
        return vec![StreamEvent::Error(errors::of_value(&json!({ "error": error })))];
    }
    let message = choice.delta.or(choice.message);
    let mut events = Vec::new();
    if let Some(Message { content, tool_calls, refusal, reasoning_content, reasoning }) = message {
        let said = |value: &Value| value.as_str().filter(|said| !said.is_empty()).map(str::to_owned);
        let content = content.unwrap_or_default();
        let thought = said(&reasoning_content).or_else(|| said(&reasoning)).unwrap_or_else(|| thought_of(&content));
        events.extend((!thought.is_empty()).then_some(StreamEvent::Reasoning(thought)));
        let text = text_of(content);
        let text = if text.is_empty() { said(&refusal).unwrap_or_default() } else { text };
        events.extend((!text.is_empty()).then_some(StreamEvent::Text(text)));
        events.extend(calls::all_told(&tool_calls));
    }
    events.extend(extras::logprobs(&choice.logprobs));
    let reason = choice.finish_reason.unwrap_or_default();
    if reason.as_str().is_some_and(|reason| FINISHED_BY_ERROR.contains(&reason)) {
        events.push(StreamEvent::Error(ProviderError::saying("the provider failed while it answered")));
    } else {
        events.extend(StreamEvent::finished(&reason, FINISH_REASONS));
    }
    events
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

/// What the model thinks, where that is a part of the content, which has parts itself (Mistral).
fn thought_of(content: &Value) -> String {
    let parts = content.as_array().into_iter().flatten();
    let thoughts = parts.filter(|part| part["type"] == "thinking").filter_map(|part| part["thinking"].as_array());
    thoughts.flatten().filter_map(|part| part["text"].as_str()).collect()
}

fn of_usage(wire: WireUsage) -> Vec<StreamEvent> {
    let mut events = Vec::new();
    if let (Some(prompt_tokens), Some(completion_tokens)) = (wire.prompt_tokens, wire.completion_tokens) {
        let of_prompt = |name| detail(wire.prompt_tokens_details.as_ref(), name);
        let cached = of_prompt("cached_tokens").or(wire.prompt_cache_hit_tokens).or(wire.cached_tokens);
        let cached_prompt_tokens = cached.unwrap_or(0).min(prompt_tokens);
        let cache_write_tokens = of_prompt("cache_write_tokens").unwrap_or(0);
        let of_completion = detail(wire.completion_tokens_details.as_ref(), "reasoning_tokens");
        let reasoning_tokens = of_completion.or(wire.reasoning_tokens).unwrap_or(0);
        // Reasoning that is billed but not counted in the completion: the total tells (xAI).
        let with_reasoning = prompt_tokens.saturating_add(completion_tokens).saturating_add(reasoning_tokens);
        let outside = if wire.total_tokens == Some(with_reasoning) { reasoning_tokens } else { 0 };
        let completion_tokens = completion_tokens.saturating_add(outside);
        events.push(StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens, completion_tokens }));
        let details = UsageDetails { cache_write_tokens, reasoning_tokens };
        events.extend((details != UsageDetails::default()).then_some(StreamEvent::UsageDetails(details)));
    }
    let ticks = || wire.cost_in_usd_ticks.map(|ticks| Picodollars(100).times(ticks));
    events.extend(wire.cost.as_deref().and_then(dollars).or_else(ticks).map(StreamEvent::Billed));
    events
}

/// A count among details.
fn detail(details: Option<&Value>, name: &str) -> Option<u64> {
    details.and_then(|details| details[name].as_u64())
}

/// A figure in dollars: a number, or the total of a breakdown.
fn dollars(cost: &RawValue) -> Option<Picodollars> {
    #[derive(Deserialize)]
    struct Breakdown {
        total_cost: Box<RawValue>,
    }
    let breakdown: Option<Breakdown> = serde_json::from_str(cost.get()).ok();
    let cost = breakdown.as_ref().map_or(cost, |breakdown| &breakdown.total_cost);
    Picodollars::parse_dollars(cost.get().trim_matches('"')).ok()
}

#[cfg(test)]
mod tests;
