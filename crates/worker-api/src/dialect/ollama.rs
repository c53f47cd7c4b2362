//! Ollama's own chat: a line of JSON for each piece.

use super::openai::logprobs_of;
use super::parameters;
use super::{
    Dialect, Encoded, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming, conversation, errors, images,
};
use crate::providers::{Provider, Thinking};
use genmill_core::attempt::{FinishReason, Usage};
use genmill_core::controls::{ReasoningEffort, ToolCall};
use genmill_core::image::{Image, Source};
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Role};
use serde_json::{Value, json};

/// The path below the base URL.
const PATH: &str = "/api/chat";

/// The longest line that is taken, in bytes.
const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The dialect.
#[derive(Debug)]
pub(super) struct Ollama;

impl Dialect for Ollama {
    fn models_path(&self) -> Option<&'static str> {
        Some("/api/tags")
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let messages = conversation::each(&spec.input, |said, before| [message(said, before)]);
        // Unless told not to, it streams.
        let mut body = json!({"model": model, "messages": messages, "stream": streaming == Streaming::On});
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec, provider.thinking(model)));
        let path = provider.path(model).unwrap_or_else(|| PATH.to_owned());
        Encoded { path, headers: parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        Reply::of(Lines::default().take(body))
    }

    fn streams_json(&self) -> bool {
        true
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        Box::new(Lines::default())
    }
}

fn rows(spec: &JobSpec, thinking: Thinking) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let number = |number: Option<f64>| number.map(|number| json!(number));
    let hidden = parameters::hides_tools(spec);
    let tools = parameters::tools(controls, parameters::function).filter(|_| !hidden);
    let rows = vec![
        ("max_tokens", "options.num_predict", Some(json!(sampling.max_tokens))),
        ("temperature", "options.temperature", Some(json!(sampling.temperature))),
        ("top_p", "options.top_p", number(sampling.top_p)),
        ("top_k", "options.top_k", sampling.top_k.map(|top_k| json!(top_k))),
        ("min_p", "options.min_p", number(controls.min_p)),
        ("seed", "options.seed", Some(json!(parameters::seed(sampling.seed)))),
        ("stop", "options.stop", parameters::list(sampling.stop.iter())),
        ("frequency_penalty", "options.frequency_penalty", number(controls.frequency_penalty)),
        ("presence_penalty", "options.presence_penalty", number(controls.presence_penalty)),
        ("repetition_penalty", "options.repeat_penalty", number(controls.repetition_penalty)),
        ("structured_output", "format", parameters::schema(controls)),
        ("tools", "tools", tools),
        ("reasoning_effort", "think", controls.reasoning_effort.map(|effort| think(effort, thinking))),
        ("logprobs", "logprobs", controls.logprobs.map(|_| json!(true))),
        ("logprobs", "top_logprobs", controls.logprobs.filter(|top| *top > 0).map(|top| json!(top))),
        parameters::IMAGES,
    ];
    rows.into_iter().chain(parameters::hidden_tools(hidden)).collect()
}

/// Most models think or do not; some are told how long, and always think.
fn think(effort: ReasoningEffort, thinking: Thinking) -> Value {
    match (effort, thinking) {
        (ReasoningEffort::None, _) => json!(false),
        (_, Thinking::Budget) => json!(true),
        (_, Thinking::Level) => json!(parameters::level(effort)),
    }
}

fn message(message: &ChatMessage, before: &[ChatMessage]) -> Value {
    let mut out = json!({"role": message.role.name(), "content": message.texts().collect::<String>()});
    let bytes =
        |image: &Image| if let Source::Data(bytes) = &image.source { Some(images::base64(bytes)) } else { None };
    let shown: Vec<String> = message.images().filter_map(bytes).collect();
    if !shown.is_empty() {
        out["images"] = json!(shown);
    }
    let call = |ToolCall { name, arguments, .. }: &ToolCall| json!({"function": {"name": name, "arguments": parameters::object(arguments)}});
    if !message.tool_calls.is_empty() {
        out["tool_calls"] = message.tool_calls.iter().map(call).collect();
    }
    if message.role == Role::Tool {
        out["tool_name"] = json!(conversation::called(message, before));
    }
    out
}

/// Reads lines. A whole answer is one.
#[derive(Debug, Default)]
struct Lines {
    line: Vec<u8>,
    calls: usize,
}

impl StreamDecoder for Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<StreamEvent> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            events.extend(self.take(&line));
        }
        self.line.extend_from_slice(rest);
        if self.line.len() > LINE_BYTES_MAX {
            events.push(StreamEvent::Error(ProviderError::saying("a line of the stream is too long")));
        }
        events
    }

    fn end(&mut self) -> Vec<StreamEvent> {
        let line = std::mem::take(&mut self.line);
        self.take(&line)
    }
}

impl Lines {
    fn take(&mut self, line: &[u8]) -> Vec<StreamEvent> {
        if line.trim_ascii().is_empty() {
            return Vec::new();
        }
        let Ok(chunk) = serde_json::from_slice::<Value>(line) else {
            return vec![StreamEvent::Error(ProviderError::saying("the answer is not a chat response"))];
        };
        if !chunk["error"].is_null() {
            return vec![StreamEvent::Error(errors::of_value(&chunk))];
        }
        let text = |field: &str| chunk["message"][field].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let said = [text("thinking").map(StreamEvent::Reasoning), text("content").map(StreamEvent::Text)];
        let mut events: Vec<StreamEvent> = said.into_iter().flatten().collect();
        events.extend(logprobs_of(&chunk["logprobs"]));
        for call in chunk["message"]["tool_calls"].as_array().into_iter().flatten() {
            events.push(self.call(&call["function"]));
        }
        if chunk["done"].as_bool().unwrap_or(false) {
            events.push(StreamEvent::Finished(self.finish_reason(&chunk["done_reason"])));
            events.extend(usage(&chunk));
            events.push(StreamEvent::Done);
        }
        events
    }

    /// A call, which comes whole and without an id.
    fn call(&mut self, function: &Value) -> StreamEvent {
        let index = self.calls;
        self.calls += 1;
        let name = function["name"].as_str().unwrap_or_default().to_owned();
        let arguments = function["arguments"].to_string();
        StreamEvent::ToolCall { index, part: ToolCall { id: format!("call_{index}"), name, arguments } }
    }

    fn finish_reason(&self, reason: &Value) -> FinishReason {
        match reason.as_str() {
            Some("stop") if self.calls > 0 => FinishReason::ToolCalls,
            Some("stop") => FinishReason::Stop,
            Some("length") => FinishReason::Length,
            _ => FinishReason::Unknown,
        }
    }
}

/// The tokens of a call. A prompt that was found in the cache as a whole is not counted.
fn usage(chunk: &Value) -> Option<StreamEvent> {
    let completion_tokens = chunk["eval_count"].as_u64()?;
    let prompt_tokens = chunk["prompt_eval_count"].as_u64().unwrap_or(0);
    Some(StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens: 0, completion_tokens }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::providers::Table;
    use genmill_core::attempt::TokenLogprob;

    #[test]
    fn some_models_are_told_how_long_to_think() {
        let table = Table::embedded().unwrap();
        let think = |model: &str, effort| {
            let mut spec = crate::fixture::spec("litellm_ollama/x", "hi");
            spec.sampling.controls.reasoning_effort = Some(effort);
            let sent = Ollama.encode(&spec, model, table.find("ollama").unwrap(), Streaming::On);
            serde_json::from_str::<Value>(&sent.body).unwrap()["think"].clone()
        };
        assert_eq!([think("qwen3", ReasoningEffort::Low), think("qwen3", ReasoningEffort::None)], [true, false]);
        assert_eq!(think("gpt-oss:20b", ReasoningEffort::Medium), "medium");
    }

    #[test]
    fn log_probabilities_are_read() {
        let line =
            br#"{"message":{"content":"a"},"logprobs":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[]}]}"#;
        let first = TokenLogprob { token_id: None, token: "a".to_owned(), logprob: Some(-0.5), top: Vec::new() };
        let told = Lines::default().take(line);
        assert_eq!(told, [StreamEvent::Text("a".to_owned()), StreamEvent::Logprobs(vec![first])]);
    }
}
