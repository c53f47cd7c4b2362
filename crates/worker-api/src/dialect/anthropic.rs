//! Anthropic's messages.

use super::parameters::{self, arguments_schema};
use super::{Dialect, Encoded, KeyHeader, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{calls, conversation, errors, images, sse};
use crate::providers::{Provider, Thinking};
use genmill_core::attempt::{FinishReason, Usage, UsageDetails};
use genmill_core::controls::{ReasoningEffort, Tool, ToolCall, ToolChoice};
use genmill_core::image::{Image, Source};
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Role};
use serde_json::{Value, json};

/// The path below the base URL.
const PATH: &str = "/v1/messages";

/// The least tokens of thought that may be asked for.
const BUDGET_MIN: u32 = 1_024;

/// What `stop_reason` may say. Anything else is unknown, which is no error.
const STOP_REASONS: &[(&str, FinishReason)] = &[
    ("end_turn", FinishReason::Stop),
    ("stop_sequence", FinishReason::Stop),
    ("max_tokens", FinishReason::Length),
    ("model_context_window_exceeded", FinishReason::Length),
    ("tool_use", FinishReason::ToolCalls),
    ("refusal", FinishReason::ContentFilter),
];

/// The dialect.
#[derive(Debug)]
pub(super) struct Anthropic;

impl Dialect for Anthropic {
    fn key_header(&self) -> KeyHeader {
        KeyHeader { name: "x-api-key", scheme: "" }
    }

    fn models_path(&self) -> Option<&'static str> {
        Some("/v1/models")
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let (body, left_out) = Self::body(spec, model, provider, streaming);
        let path = provider.path(model).unwrap_or_else(|| PATH.to_owned());
        Encoded { path, headers: parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        let message = errors::json(body, "the answer is not a message")?;
        if message["type"] == "error" {
            return Err(errors::of_value(&message));
        }
        let blocks = message["content"].as_array().into_iter().flatten().enumerate();
        let mut events: Vec<StreamEvent> = blocks.flat_map(|(index, block)| of_block(index, block)).collect();
        events.extend(StreamEvent::finished(&message["stop_reason"], STOP_REASONS));
        events.extend(usage(&message["usage"]).into_iter().flatten());
        Reply::of(events)
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        let mut message = Message::default();
        sse::reading(move |data| message.take(data))
    }
}

impl Anthropic {
    /// The body, and the parameters that have no place in it.
    pub(super) fn body(
        spec: &JobSpec,
        model: &str,
        provider: &Provider,
        streaming: Streaming,
    ) -> (Value, Vec<&'static str>) {
        let turns = conversation::turns(&spec.input, "assistant", "content", |message, _| blocks(message));
        let mut body = json!({"model": model, "messages": turns});
        let system = conversation::system(&spec.input);
        if !system.is_empty() {
            body["system"] = json!(system.join("\n\n"));
        }
        if streaming == Streaming::On {
            body["stream"] = json!(true);
        }
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec, provider.thinking(model)));
        (body, left_out)
    }
}

fn rows(spec: &JobSpec, thinking: Thinking) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let (thought, effort) = match (controls.reasoning_effort, thinking) {
        (Some(ReasoningEffort::None), _) => (Some(json!({"type": "disabled"})), None),
        (Some(effort), Thinking::Budget) => (budget(effort, sampling.max_tokens), None),
        // Unless asked, newer models do not tell what they think.
        (Some(effort), Thinking::Level) => {
            (Some(json!({"type": "adaptive", "display": "summarized"})), Some(parameters::level(effort)))
        }
        (None, _) => (None, None),
    };
    let thinks = thought.as_ref().is_some_and(|thought| thought["type"] != "disabled");
    // With top_p or thinking the temperature must be the default; with thinking there is no top_k either.
    let temperature = (!thinks && sampling.top_p.is_none()).then(|| json!(sampling.temperature));
    // Stop strings of nothing but white space are refused; the worker cuts at them itself.
    let stops = sampling.stop.iter().filter(|stop| !stop.trim().is_empty());
    vec![
        ("max_tokens", "max_tokens", Some(json!(sampling.max_tokens))),
        ("temperature", "temperature", temperature),
        ("top_p", "top_p", sampling.top_p.map(|top_p| json!(top_p))),
        ("top_k", "top_k", sampling.top_k.filter(|_| !thinks).map(|top_k| json!(top_k))),
        ("stop", "stop_sequences", parameters::list(stops)),
        ("tools", "tools", parameters::tools(controls, tool)),
        ("tool_choice", "tool_choice", controls.tool_choice.as_ref().map(tool_choice)),
        ("structured_output", "output_config.format", parameters::schema(controls).map(format)),
        ("reasoning_effort", "thinking", thought),
        ("reasoning_effort", "output_config.effort", effort.map(|effort| json!(effort))),
        parameters::IMAGES,
        parameters::IMAGE_URLS,
    ]
}

/// So many tokens of thought, of those that the answer may have; `None` when they are too few to think.
fn budget(effort: ReasoningEffort, max_tokens: u32) -> Option<Value> {
    let wanted = match effort {
        ReasoningEffort::None | ReasoningEffort::Minimal | ReasoningEffort::Low => BUDGET_MIN,
        ReasoningEffort::Medium => 4 * BUDGET_MIN,
        ReasoningEffort::High => 16 * BUDGET_MIN,
    };
    let budget = wanted.min(max_tokens.saturating_sub(1));
    (budget >= BUDGET_MIN).then(|| json!({"type": "enabled", "budget_tokens": budget}))
}

fn format(schema: Value) -> Value {
    json!({"type": "json_schema", "schema": schema})
}

fn tool(tool: &Tool) -> Value {
    let mut out = json!({"name": tool.name, "input_schema": arguments_schema(tool)});
    if !tool.description.is_empty() {
        out["description"] = json!(tool.description);
    }
    out
}

fn tool_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::Auto => json!({"type": "auto"}),
        ToolChoice::None => json!({"type": "none"}),
        ToolChoice::Required => json!({"type": "any"}),
        ToolChoice::Tool(name) => json!({"type": "tool", "name": name}),
    }
}

fn blocks(message: &ChatMessage) -> Vec<Value> {
    if message.role == Role::Tool {
        return vec![json!({"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content})];
    }
    let said = images::parts(message, |text| json!({"type": "text", "text": text}), image);
    let call = |ToolCall { id, name, arguments }: &ToolCall| json!({"type": "tool_use", "id": id, "name": name, "input": parameters::object(arguments)});
    said.into_iter().chain(message.tool_calls.iter().map(call)).collect()
}

fn image(image: &Image) -> Value {
    let source = match &image.source {
        Source::Url(url) => json!({"type": "url", "url": url}),
        Source::Data(bytes) => {
            json!({"type": "base64", "media_type": images::media_type(image), "data": images::base64(bytes)})
        }
    };
    json!({"type": "image", "source": source})
}

/// What a whole block says.
fn of_block(index: usize, block: &Value) -> Option<StreamEvent> {
    let text = |field: &str| block[field].as_str().unwrap_or_default().to_owned();
    match block["type"].as_str()? {
        "text" => Some(StreamEvent::Text(text("text"))),
        "thinking" => Some(StreamEvent::Reasoning(text("thinking"))),
        "tool_use" => {
            let part = ToolCall { id: text("id"), name: text("name"), arguments: block["input"].to_string() };
            Some(StreamEvent::ToolCall { index, part })
        }
        _ => None,
    }
}

/// The tokens of a call. Anthropic counts what was read from a cache and written to it apart from the rest of the input.
fn usage(usage: &Value) -> Option<[StreamEvent; 2]> {
    let count = |field: &str| usage[field].as_u64();
    let (input, output) = (count("input_tokens")?, count("output_tokens")?);
    let cached = count("cache_read_input_tokens").unwrap_or(0);
    let written = count("cache_creation_input_tokens").unwrap_or(0);
    let reasoning = usage["output_tokens_details"]["thinking_tokens"].as_u64().unwrap_or(0);
    let prompt_tokens = input.saturating_add(cached).saturating_add(written);
    Some([
        StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens: cached, completion_tokens: output }),
        StreamEvent::UsageDetails(UsageDetails { cache_write_tokens: written, reasoning_tokens: reasoning }),
    ])
}

/// What is known of a message that comes as named events; each names itself in its data too.
#[derive(Debug, Default)]
struct Message {
    /// The usage so far: its parts come at the beginning and at the end.
    usage: Value,
    /// The blocks that are calls, by their index in the message.
    calls: calls::Numbered,
}

impl Message {
    fn take(&mut self, data: &str) -> Vec<StreamEvent> {
        let Ok(event) = serde_json::from_str::<Value>(data) else {
            return vec![StreamEvent::Error(ProviderError::saying("the stream is not one of messages"))];
        };
        match event["type"].as_str().unwrap_or_default() {
            // Told again at the end; until then it is what is known of a message that breaks off.
            "message_start" => {
                self.count(&event["message"]["usage"]);
                return usage(&self.usage).into_iter().flatten().collect();
            }
            "content_block_start" => return self.begin(&event).into_iter().collect(),
            "content_block_delta" => return self.more(&event).into_iter().collect(),
            "message_delta" => {
                self.count(&event["usage"]);
                let usage = usage(&self.usage).into_iter().flatten();
                let ended = StreamEvent::finished(&event["delta"]["stop_reason"], STOP_REASONS);
                return ended.into_iter().chain(usage).collect();
            }
            "message_stop" => return vec![StreamEvent::Done],
            "error" => return vec![StreamEvent::Error(errors::of_value(&event))],
            _ if !event["error"].is_null() => return vec![StreamEvent::Error(errors::of_value(&event))],
            _ => {}
        }
        Vec::new()
    }

    /// Takes counts, of which later ones replace earlier ones.
    fn count(&mut self, usage: &Value) {
        for (field, count) in usage.as_object().into_iter().flatten().filter(|(_, count)| !count.is_null()) {
            self.usage[field] = count.clone();
        }
    }

    fn begin(&mut self, event: &Value) -> Option<StreamEvent> {
        let block = &event["content_block"];
        if block["type"] != "tool_use" {
            let begun = of_block(0, block)?;
            let is_empty = matches!(&begun, StreamEvent::Text(text) | StreamEvent::Reasoning(text) if text.is_empty());
            return (!is_empty).then_some(begun);
        }
        let StreamEvent::ToolCall { mut part, .. } = of_block(0, block)? else { return None };
        // The arguments follow in pieces, unless there are none.
        if part.arguments == "{}" {
            part.arguments.clear();
        }
        self.calls.begin(&event["index"], part)
    }

    fn more(&mut self, event: &Value) -> Option<StreamEvent> {
        let delta = &event["delta"];
        let text = |field: &str| delta[field].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        match delta["type"].as_str()? {
            "text_delta" => text("text").map(StreamEvent::Text),
            "thinking_delta" => text("thinking").map(StreamEvent::Reasoning),
            "input_json_delta" => self.calls.more(&event["index"], text("partial_json")?),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::spec;
    use crate::providers::Table;

    fn body(model: &str, change: impl FnOnce(&mut JobSpec)) -> (Value, Vec<&'static str>) {
        let mut spec = spec("litellm_claude-x", "hi");
        change(&mut spec);
        let encoded =
            Anthropic.encode(&spec, model, Table::embedded().unwrap().find("anthropic").unwrap(), Streaming::Off);
        (serde_json::from_str(&encoded.body).unwrap(), encoded.left_out)
    }

    fn effort(model: &str, effort: ReasoningEffort, max_tokens: u32) -> (Value, Vec<&'static str>) {
        body(model, |spec| {
            spec.sampling.max_tokens = max_tokens;
            spec.sampling.controls.reasoning_effort = Some(effort);
        })
    }

    #[test]
    fn thoughts_are_part_of_the_tokens_that_an_answer_may_have() {
        let (body, left_out) = effort("claude-sonnet-4-5", ReasoningEffort::High, 4_000);
        assert_eq!(body["thinking"], json!({"type": "enabled", "budget_tokens": 3_999}));
        assert_eq!((&body["temperature"], left_out), (&Value::Null, vec!["temperature", "seed"]));
        let (body, left_out) = effort("claude-sonnet-4-5", ReasoningEffort::High, 1_000);
        assert_eq!((&body["thinking"], left_out), (&Value::Null, vec!["seed", "reasoning_effort"]));
    }

    #[test]
    fn newer_models_are_told_by_a_word() {
        let (body, _) = effort("claude-opus-4-7", ReasoningEffort::Low, 100);
        assert_eq!(body["thinking"], json!({"type": "adaptive", "display": "summarized"}));
        assert_eq!(body["output_config"], json!({"effort": "low"}));
        let (body, _) = effort("claude-opus-4-7", ReasoningEffort::None, 100);
        assert_eq!((&body["thinking"], &body["output_config"]), (&json!({"type": "disabled"}), &Value::Null));
    }

    #[test]
    fn temperature_and_top_p_do_not_go_together() {
        let (body, left_out) = body("claude-haiku-4-5", |spec| spec.sampling.top_p = Some(0.9));
        assert_eq!((&body["temperature"], &body["top_p"]), (&Value::Null, &json!(0.9)));
        assert_eq!(left_out, ["temperature", "seed"]);
    }

    #[test]
    fn stop_strings_of_white_space_are_kept_by_the_worker() {
        let (body, left_out) =
            body("claude-haiku-4-5", |spec| spec.sampling.stop = vec!["\n".to_owned(), "END".to_owned()]);
        assert_eq!((&body["stop_sequences"], left_out), (&json!(["END"]), vec!["seed"]));
    }
}
