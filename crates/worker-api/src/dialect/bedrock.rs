//! Converse, as Bedrock speaks it to all its models. Streams are binary frames.

mod frames;

use super::parameters::{self, arguments_schema};
use super::{Dialect, Encoded, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{calls, conversation, errors, images};
use crate::providers::Provider;
use crate::url::escaped;
use frames::{Frame, Frames};
use genmill_core::attempt::{FinishReason, Usage, UsageDetails};
use genmill_core::controls::{ReasoningEffort, Tool, ToolCall, ToolChoice};
use genmill_core::image::{Image, MediaType, Source};
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Role};
use serde_json::{Value, json};

/// How many stop strings are taken of every model. The worker cuts at the others itself.
const STOPS_MAX: usize = 4;

/// What `stopReason` may say. Anything else is unknown, which is no error.
const STOP_REASONS: &[(&str, FinishReason)] = &[
    ("end_turn", FinishReason::Stop),
    ("stop_sequence", FinishReason::Stop),
    ("max_tokens", FinishReason::Length),
    ("model_context_window_exceeded", FinishReason::Length),
    ("tool_use", FinishReason::ToolCalls),
    ("guardrail_intervened", FinishReason::ContentFilter),
    ("content_filtered", FinishReason::ContentFilter),
];

/// The statuses that stand for exceptions within a stream.
const EXCEPTIONS: &[(&str, u16)] = &[
    ("throttlingException", 429),
    ("validationException", 400),
    ("modelStreamErrorException", 424),
    ("internalServerException", 500),
    ("serviceUnavailableException", 503),
];

/// The dialect.
#[derive(Debug)]
pub(super) struct Bedrock;

impl Dialect for Bedrock {
    /// The list is at another host.
    fn models_path(&self) -> Option<&'static str> {
        None
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let method = match streaming {
            Streaming::On => "converse-stream",
            Streaming::Off => "converse",
        };
        let turns = conversation::turns(&spec.input, "assistant", "content", |message, _| blocks(message));
        let mut body = json!({"messages": turns});
        let system: Vec<Value> =
            conversation::system(&spec.input).into_iter().map(|text| json!({"text": text})).collect();
        if !system.is_empty() {
            body["system"] = json!(system);
        }
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec));
        let path = format!("/model/{}/{method}", escaped(model));
        Encoded { path, headers: parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        let answer = errors::json(body, "the answer is not that of a conversation")?;
        let blocks = answer["output"]["message"]["content"].as_array().into_iter().flatten();
        let mut calls = 0;
        let mut events: Vec<StreamEvent> = blocks.filter_map(|block| of_block(block, &mut calls)).collect();
        events.extend(StreamEvent::finished(&answer["stopReason"], STOP_REASONS));
        events.extend(usage(&answer["usage"]).into_iter().flatten());
        Reply::of(events)
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        Box::new(Decoder::default())
    }
}

fn rows(spec: &JobSpec) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let stops = parameters::list(sampling.stop.iter().take(STOPS_MAX));
    // That it is not to think cannot be told.
    let effort = controls.reasoning_effort.filter(|effort| *effort != ReasoningEffort::None);
    let hidden = parameters::hides_tools(spec);
    let tools = parameters::tools(controls, tool).filter(|_| !hidden);
    let rows = vec![
        ("max_tokens", "inferenceConfig.maxTokens", Some(json!(sampling.max_tokens))),
        ("temperature", "inferenceConfig.temperature", Some(json!(sampling.temperature))),
        ("top_p", "inferenceConfig.topP", sampling.top_p.map(|top_p| json!(top_p))),
        ("stop", "inferenceConfig.stopSequences", stops),
        ("structured_output", "outputConfig.textFormat", parameters::schema(controls).map(|schema| format(&schema))),
        ("reasoning_effort", "outputConfig.effort", effort.map(|effort| json!(parameters::level(effort)))),
        ("tools", "toolConfig.tools", tools),
        ("tool_choice", "toolConfig.toolChoice", controls.tool_choice.as_ref().and_then(tool_choice)),
        parameters::IMAGES,
    ];
    rows.into_iter().chain(parameters::hidden_tools(hidden)).collect()
}

/// The form of the text; its schema is a text itself.
fn format(schema: &Value) -> Value {
    let schema = json!({"name": "answer", "schema": schema.to_string()});
    json!({"type": "json_schema", "structure": {"jsonSchema": schema}})
}

fn tool(tool: &Tool) -> Value {
    let mut out = json!({"name": tool.name, "inputSchema": {"json": arguments_schema(tool)}});
    if !tool.description.is_empty() {
        out["description"] = json!(tool.description);
    }
    json!({"toolSpec": out})
}

/// That no tool is called cannot be told.
fn tool_choice(choice: &ToolChoice) -> Option<Value> {
    match choice {
        ToolChoice::Auto => Some(json!({"auto": {}})),
        ToolChoice::None => None,
        ToolChoice::Required => Some(json!({"any": {}})),
        ToolChoice::Tool(name) => Some(json!({"tool": {"name": name}})),
    }
}

fn blocks(message: &ChatMessage) -> Vec<Value> {
    if message.role == Role::Tool {
        let (id, text) = (&message.tool_call_id, &message.content);
        return vec![json!({"toolResult": {"toolUseId": id, "content": [{"text": text}]}})];
    }
    let said = images::parts(message, |text| json!({"text": text}), image);
    let call = |ToolCall { id, name, arguments }: &ToolCall| json!({"toolUse": {"toolUseId": id, "name": name, "input": parameters::object(arguments)}});
    said.into_iter().chain(message.tool_calls.iter().map(call)).collect()
}

/// An image by its bytes; others are refused before the call.
fn image(image: &Image) -> Value {
    let format = image.media_type.map(MediaType::format).unwrap_or_default();
    let bytes = if let Source::Data(bytes) = &image.source { images::base64(bytes) } else { String::new() };
    json!({"image": {"format": format, "source": {"bytes": bytes}}})
}

/// What a whole block says.
fn of_block(block: &Value, calls: &mut usize) -> Option<StreamEvent> {
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    if let Some(call) = block.get("toolUse") {
        let part = ToolCall { arguments: call["input"].to_string(), ..begun(call) };
        *calls += 1;
        return Some(StreamEvent::ToolCall { index: *calls - 1, part });
    }
    let thought = text(&block["reasoningContent"]["reasoningText"]["text"]).map(StreamEvent::Reasoning);
    thought.or_else(|| text(&block["text"]).map(StreamEvent::Text))
}

/// A call without its arguments.
fn begun(call: &Value) -> ToolCall {
    let text = |field: &str| call[field].as_str().unwrap_or_default().to_owned();
    ToolCall { id: text("toolUseId"), name: text("name"), arguments: String::new() }
}

/// The tokens of a call. What was read from a cache and written to it is counted apart from the rest of the input.
fn usage(usage: &Value) -> Option<[StreamEvent; 2]> {
    let count = |field: &str| usage[field].as_u64();
    let (input, completion_tokens) = (count("inputTokens")?, count("outputTokens")?);
    let cached_prompt_tokens = count("cacheReadInputTokens").unwrap_or(0);
    let cache_write_tokens = count("cacheWriteInputTokens").unwrap_or(0);
    let prompt_tokens = input.saturating_add(cached_prompt_tokens).saturating_add(cache_write_tokens);
    Some([
        StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens, completion_tokens }),
        StreamEvent::UsageDetails(UsageDetails { cache_write_tokens, reasoning_tokens: 0 }),
    ])
}

/// Reads a stream.
#[derive(Debug, Default)]
struct Decoder {
    frames: Frames,
    /// The blocks that are calls, by their index in the message.
    calls: calls::Numbered,
}

impl StreamDecoder for Decoder {
    fn push(&mut self, bytes: &[u8]) -> Vec<StreamEvent> {
        let (frames, broken) = self.frames.push(bytes);
        let broken = broken.map(|broken| StreamEvent::Error(ProviderError::saying(&broken.to_string())));
        frames.iter().flat_map(|frame| self.take(frame)).chain(broken).collect()
    }

    fn end(&mut self) -> Vec<StreamEvent> {
        Vec::new()
    }
}

impl Decoder {
    fn take(&mut self, frame: &Frame) -> Vec<StreamEvent> {
        let payload: Value = serde_json::from_slice(&frame.payload).unwrap_or_default();
        let Some(event) = &frame.event else {
            let exception = frame.exception.as_deref().unwrap_or_default();
            let status = EXCEPTIONS.iter().find(|(name, _)| *name == exception).map(|(_, status)| *status);
            let code = exception.to_owned();
            return vec![StreamEvent::Error(ProviderError { status, code, ..errors::of_value(&payload) })];
        };
        match event.as_str() {
            "contentBlockStart" => self.begin(&payload).into_iter().collect(),
            "contentBlockDelta" => self.more(&payload).into_iter().collect(),
            "messageStop" => StreamEvent::finished(&payload["stopReason"], STOP_REASONS).into_iter().collect(),
            "metadata" => usage(&payload["usage"]).into_iter().flatten().chain([StreamEvent::Done]).collect(),
            _ => Vec::new(),
        }
    }

    fn begin(&mut self, payload: &Value) -> Option<StreamEvent> {
        self.calls.begin(&payload["contentBlockIndex"], begun(payload["start"].get("toolUse")?))
    }

    fn more(&self, payload: &Value) -> Option<StreamEvent> {
        let delta = &payload["delta"];
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        if let Some(arguments) = text(&delta["toolUse"]["input"]) {
            return self.calls.more(&payload["contentBlockIndex"], arguments);
        }
        let thought = text(&delta["reasoningContent"]["text"]).map(StreamEvent::Reasoning);
        thought.or_else(|| text(&delta["text"]).map(StreamEvent::Text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_no_tool_is_called_is_told_by_naming_none() {
        let mut spec = crate::fixture::rich();
        spec.sampling.controls.tool_choice = Some(ToolChoice::None);
        let table = crate::providers::Table::embedded().unwrap();
        let sent = |spec: &JobSpec| Bedrock.encode(spec, "x", table.find("bedrock").unwrap(), Streaming::Off);
        let with_calls = sent(&spec);
        assert!(with_calls.body.contains("toolConfig") && with_calls.left_out.contains(&"tool_choice"));
        spec.input = crate::fixture::messages(&[(Role::User, "hi")]);
        let without = sent(&spec);
        assert!(!without.body.contains("toolConfig"), "{}", without.body);
        assert!(!without.left_out.iter().any(|name| name.starts_with("tool")), "{:?}", without.left_out);
    }

    #[test]
    fn an_exception_in_a_stream_has_the_status_of_its_name() {
        let payload = br#"{"message":"slow down"}"#.to_vec();
        let frame = Frame { event: None, exception: Some("throttlingException".to_owned()), payload };
        let told = Decoder::default().take(&frame);
        let [StreamEvent::Error(error)] = &told[..] else { unreachable!("{told:?}") };
        assert_eq!((error.status, error.message.as_str()), (Some(429), "slow down"));
    }
}
