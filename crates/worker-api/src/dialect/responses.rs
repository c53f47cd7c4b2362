//! OpenAI's responses.

use super::parameters::{self, arguments_schema};
use super::{Dialect, Encoded, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{calls, conversation, errors, images, sse};
use crate::prices::Class;
use crate::providers::Provider;
use genmill_core::attempt::{FinishReason, Usage, UsageDetails};
use genmill_core::controls::{Tool, ToolCall, ToolChoice};
use genmill_core::image::Image;
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Role};
use serde_json::{Value, json};

/// The path below the base URL.
const PATH: &str = "/responses";

/// The dialect.
#[derive(Debug)]
pub(super) struct Responses;

impl Dialect for Responses {
    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let input = conversation::each(&spec.input, |said, _| items(said));
        // Nothing is kept at the provider.
        let mut body = json!({"model": model, "input": input, "store": false});
        if streaming == Streaming::On {
            body["stream"] = json!(true);
        }
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec));
        let path = provider.path(model).unwrap_or_else(|| PATH.to_owned());
        Encoded { path, headers: parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        let response = errors::json(body, "the answer is not a response")?;
        let mut calls = 0;
        let items = response["output"].as_array().into_iter().flatten();
        let mut events: Vec<StreamEvent> = items.flat_map(|item| of_item(item, &mut calls)).collect();
        events.extend(ended(&response, calls));
        Reply::of(events)
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        let mut response = Response::default();
        sse::reading(move |data| response.take(data))
    }
}

fn rows(spec: &JobSpec) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let format = parameters::schema(controls)
        .map(|schema| json!({"type": "json_schema", "name": "answer", "schema": schema, "strict": false}));
    let effort = controls.reasoning_effort;
    vec![
        ("max_tokens", "max_output_tokens", Some(json!(sampling.max_tokens))),
        ("temperature", "temperature", Some(json!(sampling.temperature))),
        ("top_p", "top_p", sampling.top_p.map(|top_p| json!(top_p))),
        ("structured_output", "text.format", format),
        ("tools", "tools", parameters::tools(controls, tool)),
        ("tool_choice", "tool_choice", controls.tool_choice.as_ref().map(tool_choice)),
        ("reasoning_effort", "reasoning.effort", effort.map(|effort| json!(effort.name()))),
        ("reasoning_effort", "reasoning.summary", effort.map(|_| json!("auto"))),
        parameters::IMAGES,
        parameters::IMAGE_URLS,
        parameters::IMAGE_DETAIL,
    ]
}

fn tool(tool: &Tool) -> Value {
    let mut out = json!({"type": "function", "name": tool.name, "parameters": arguments_schema(tool), "strict": false});
    if !tool.description.is_empty() {
        out["description"] = json!(tool.description);
    }
    out
}

fn tool_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::Auto => json!("auto"),
        ToolChoice::None => json!("none"),
        ToolChoice::Required => json!("required"),
        ToolChoice::Tool(name) => json!({"type": "function", "name": name}),
    }
}

/// A message as items: what is said, and each call by itself.
fn items(message: &ChatMessage) -> Vec<Value> {
    if message.role == Role::Tool {
        let (id, output) = (&message.tool_call_id, &message.content);
        return vec![json!({"type": "function_call_output", "call_id": id, "output": output})];
    }
    let said = (!message.content.is_empty() || message.tool_calls.is_empty())
        .then(|| json!({"role": message.role.name(), "content": content(message)}));
    let call = |ToolCall { id, name, arguments }: &ToolCall| json!({"type": "function_call", "call_id": id, "name": name, "arguments": arguments});
    said.into_iter().chain(message.tool_calls.iter().map(call)).collect()
}

/// What a message says: a text, or a list when there are images.
fn content(message: &ChatMessage) -> Value {
    let text = |text: &str| json!({"type": "input_text", "text": text});
    let image = |image: &Image| json!({"type": "input_image", "image_url": images::address(image), "detail": images::detail(image)});
    if message.parts.is_empty() { json!(message.content) } else { Value::Array(images::parts(message, text, image)) }
}

/// What a whole item says.
fn of_item(item: &Value, calls: &mut usize) -> Vec<StreamEvent> {
    let texts = |field: &str| {
        let parts = item[field].as_array().into_iter().flatten();
        parts.filter_map(|part| part["text"].as_str().or_else(|| part["refusal"].as_str())).collect::<String>()
    };
    match item["type"].as_str().unwrap_or_default() {
        "message" => vec![StreamEvent::Text(texts("content"))],
        "reasoning" => vec![StreamEvent::Reasoning(texts("summary")), StreamEvent::Reasoning(texts("content"))],
        "function_call" => {
            let index = *calls;
            *calls += 1;
            let mut part = begun(item);
            part.arguments = item["arguments"].as_str().unwrap_or_default().to_owned();
            vec![StreamEvent::ToolCall { index, part }]
        }
        _ => Vec::new(),
    }
}

/// A call without its arguments.
fn begun(item: &Value) -> ToolCall {
    let text = |field: &str| item[field].as_str().unwrap_or_default().to_owned();
    ToolCall { id: text("call_id"), name: text("name"), arguments: String::new() }
}

/// What a response that has ended says beside its items.
fn ended(response: &Value, calls: usize) -> Vec<StreamEvent> {
    if !response["error"].is_null() {
        return vec![StreamEvent::Error(errors::of_value(response))];
    }
    let reason = match (response["status"].as_str(), response["incomplete_details"]["reason"].as_str()) {
        (Some("completed"), _) if calls > 0 => FinishReason::ToolCalls,
        (Some("completed"), _) => FinishReason::Stop,
        (_, Some("max_output_tokens")) => FinishReason::Length,
        (_, Some("content_filter")) => FinishReason::ContentFilter,
        (Some("incomplete"), _) => FinishReason::Unknown,
        _ => return vec![StreamEvent::Error(ProviderError::saying("the provider failed while it answered"))],
    };
    let class = response["service_tier"].as_str().and_then(Class::of_tier).map(StreamEvent::Class);
    let usage = usage(&response["usage"]).into_iter().flatten();
    std::iter::once(StreamEvent::Finished(reason)).chain(usage).chain(class).collect()
}

/// The tokens of a call: those of the cache are part of the input, those of thoughts of the output.
fn usage(usage: &Value) -> Option<[StreamEvent; 2]> {
    let (prompt_tokens, completion_tokens) = (usage["input_tokens"].as_u64()?, usage["output_tokens"].as_u64()?);
    let input = &usage["input_tokens_details"];
    let cached_prompt_tokens = input["cached_tokens"].as_u64().unwrap_or(0).min(prompt_tokens);
    let details = UsageDetails {
        cache_write_tokens: input["cache_write_tokens"].as_u64().unwrap_or(0),
        reasoning_tokens: usage["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap_or(0),
    };
    let usage = Usage { prompt_tokens, cached_prompt_tokens, completion_tokens };
    Some([StreamEvent::Usage(usage), StreamEvent::UsageDetails(details)])
}

/// What is known of a response that comes as typed events.
#[derive(Debug, Default)]
struct Response {
    /// The items that are calls, by their place in the output.
    calls: calls::Numbered,
}

impl Response {
    fn take(&mut self, data: &str) -> Vec<StreamEvent> {
        let Ok(event) = serde_json::from_str::<Value>(data) else {
            return vec![StreamEvent::Error(ProviderError::saying("the stream is not one of a response"))];
        };
        let delta = || event["delta"].as_str().unwrap_or_default().to_owned();
        match event["type"].as_str().unwrap_or_default() {
            "response.output_text.delta" | "response.refusal.delta" => vec![StreamEvent::Text(delta())],
            "response.reasoning_summary_text.delta" | "response.reasoning_text.delta" => {
                vec![StreamEvent::Reasoning(delta())]
            }
            "response.output_item.added" if event["item"]["type"] == "function_call" => {
                self.calls.begin(&event["output_index"], begun(&event["item"])).into_iter().collect()
            }
            "response.function_call_arguments.delta" => {
                self.calls.more(&event["output_index"], delta()).into_iter().collect()
            }
            "response.completed" | "response.incomplete" | "response.failed" => {
                ended(&event["response"], self.calls.count()).into_iter().chain([StreamEvent::Done]).collect()
            }
            "error" => vec![StreamEvent::Error(errors::of_value(&event))],
            _ if !event["error"].is_null() => vec![StreamEvent::Error(errors::of_value(&event))],
            _ => Vec::new(),
        }
    }
}
