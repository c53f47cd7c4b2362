//! Cohere's chat, version 2.

use super::parameters;
use super::{Dialect, Encoded, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{calls, conversation, errors, images, sse};
use crate::providers::Provider;
use genmill_core::attempt::{FinishReason, Usage};
use genmill_core::controls::{ReasoningEffort, ToolChoice};
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Role};
use serde_json::{Value, json};

/// The path below the base URL.
const PATH: &str = "/v2/chat";

/// How many stop strings are taken. The worker cuts at the others itself.
const STOPS_MAX: usize = 5;

/// What `finish_reason` may say. Anything else is unknown, which is no error.
const FINISH_REASONS: &[(&str, FinishReason)] = &[
    ("COMPLETE", FinishReason::Stop),
    ("STOP_SEQUENCE", FinishReason::Stop),
    ("MAX_TOKENS", FinishReason::Length),
    ("TOOL_CALL", FinishReason::ToolCalls),
    ("ERROR_TOXIC", FinishReason::ContentFilter),
];

/// Values of `finish_reason` that say the provider failed while it answered.
const FINISHED_BY_ERROR: &[&str] = &["ERROR", "TIMEOUT"];

/// The dialect.
#[derive(Debug)]
pub(super) struct Cohere;

impl Dialect for Cohere {
    fn models_path(&self) -> Option<&'static str> {
        Some("/v1/models")
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let messages = conversation::each(&spec.input, |said, _| [message(said)]);
        let mut body = json!({"model": model, "messages": messages, "stream": streaming == Streaming::On});
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec));
        let path = provider.path(model).unwrap_or_else(|| PATH.to_owned());
        Encoded { path, headers: parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        let answer = errors::json(body, "the answer is not a chat response")?;
        let message = &answer["message"];
        let parts = message["content"].as_array().into_iter().flatten().filter_map(part);
        let plan = message["tool_plan"].as_str().map(|plan| StreamEvent::Reasoning(plan.to_owned()));
        let mut events: Vec<StreamEvent> =
            plan.into_iter().chain(parts).chain(calls::all_told(&message["tool_calls"])).collect();
        events.extend(finished(&answer["finish_reason"]));
        events.extend(usage(&answer["usage"]));
        Reply::of(events)
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        sse::reading(events)
    }
}

fn rows(spec: &JobSpec) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let number = |number: Option<f64>| number.map(|number| json!(number));
    let stops = parameters::list(sampling.stop.iter().take(STOPS_MAX));
    let format = parameters::schema(controls).map(|schema| json!({"type": "json_object", "json_schema": schema}));
    vec![
        ("max_tokens", "max_tokens", Some(json!(sampling.max_tokens))),
        ("temperature", "temperature", Some(json!(sampling.temperature))),
        // It must be below 1.
        ("top_p", "p", number(sampling.top_p.filter(|top_p| *top_p < 1.0))),
        ("top_k", "k", sampling.top_k.map(|top_k| json!(top_k))),
        ("seed", "seed", Some(json!(parameters::seed(sampling.seed)))),
        ("stop", "stop_sequences", stops),
        ("frequency_penalty", "frequency_penalty", number(controls.frequency_penalty)),
        ("presence_penalty", "presence_penalty", number(controls.presence_penalty)),
        ("structured_output", "response_format", format),
        ("tools", "tools", parameters::tools(controls, parameters::function)),
        ("tool_choice", "tool_choice", controls.tool_choice.as_ref().and_then(tool_choice)),
        ("reasoning_effort", "thinking", controls.reasoning_effort.map(thinking)),
        parameters::IMAGES,
        parameters::IMAGE_URLS,
        parameters::IMAGE_DETAIL,
    ]
}

/// Thinking is on or off; how long is not told.
fn thinking(effort: ReasoningEffort) -> Value {
    json!({"type": if effort == ReasoningEffort::None { "disabled" } else { "enabled" }})
}

/// A tool cannot be chosen by its name.
fn tool_choice(choice: &ToolChoice) -> Option<Value> {
    match choice {
        ToolChoice::None => Some(json!("NONE")),
        ToolChoice::Required => Some(json!("REQUIRED")),
        ToolChoice::Auto | ToolChoice::Tool(_) => None,
    }
}

fn message(message: &ChatMessage) -> Value {
    let mut out = json!({"role": message.role.name(), "content": images::chat_content(message)});
    if !message.tool_calls.is_empty() {
        out["tool_calls"] = message.tool_calls.iter().map(calls::sent).collect();
        // What is said beside calls is their plan.
        if let Some(out) = out.as_object_mut() {
            let said = out.remove("content");
            out.extend(said.filter(|said| *said != "").map(|said| ("tool_plan".to_owned(), said)));
        }
    }
    if message.role == Role::Tool {
        out["tool_call_id"] = json!(message.tool_call_id);
    }
    out
}

/// A part of a content: text or thought.
fn part(part: &Value) -> Option<StreamEvent> {
    let text = |field: &str| part[field].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    text("text").map(StreamEvent::Text).or_else(|| text("thinking").map(StreamEvent::Reasoning))
}

fn finished(reason: &Value) -> Option<StreamEvent> {
    if reason.as_str().is_some_and(|reason| FINISHED_BY_ERROR.contains(&reason)) {
        return Some(StreamEvent::Error(ProviderError::saying("the provider failed while it answered")));
    }
    StreamEvent::finished(reason, FINISH_REASONS)
}

/// The tokens that are billed, which are fewer than those that are read: Cohere adds to prompts at its own cost.
fn usage(usage: &Value) -> Option<StreamEvent> {
    // Counts are written as decimal numbers, such as 12.0.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count, which f64 holds exactly")]
    let count = |value: &Value| value.as_f64().filter(|count| *count >= 0.0).map(|count| count as u64);
    let of = |field: &str| count(&usage["billed_units"][field]).or_else(|| count(&usage["tokens"][field]));
    let (prompt_tokens, completion_tokens) = (of("input_tokens")?, of("output_tokens")?);
    let cached_prompt_tokens = count(&usage["cached_tokens"]).unwrap_or(0).min(prompt_tokens);
    Some(StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens, completion_tokens }))
}

fn events(data: &str) -> Vec<StreamEvent> {
    if data.trim() == "[DONE]" {
        return vec![StreamEvent::Done];
    }
    let Ok(event) = serde_json::from_str::<Value>(data) else {
        return vec![StreamEvent::Error(ProviderError::saying("the stream is not one of a chat"))];
    };
    let delta = &event["delta"];
    let index = || event["index"].as_u64().and_then(|index| usize::try_from(index).ok()).unwrap_or(0);
    match event["type"].as_str().unwrap_or_default() {
        "content-start" | "content-delta" => part(&delta["message"]["content"]).into_iter().collect(),
        "tool-plan-delta" => {
            let plan = delta["message"]["tool_plan"].as_str().unwrap_or_default();
            vec![StreamEvent::Reasoning(plan.to_owned())]
        }
        "tool-call-start" | "tool-call-delta" => {
            vec![calls::told((index(), &delta["message"]["tool_calls"]))]
        }
        "message-end" => {
            let failed = delta["error"].as_str().map(|error| StreamEvent::Error(ProviderError::saying(error)));
            let ended = finished(&delta["finish_reason"]).into_iter().chain(usage(&delta["usage"]));
            failed.into_iter().chain(ended).chain([StreamEvent::Done]).collect()
        }
        "" if !event["message"].is_null() => vec![StreamEvent::Error(errors::of_value(&event))],
        _ => Vec::new(),
    }
}
