//! Gemini's `generateContent`, as AI Studio and Vertex speak it.

use super::parameters::{self, arguments_schema};
use super::{Dialect, Encoded, KeyHeader, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{conversation, errors, images, sse};
use crate::providers::{Provider, Thinking};
use genmill_core::attempt::{FinishReason, TokenLogprob, Usage, UsageDetails};
use genmill_core::controls::{ReasoningEffort, Tool, ToolCall, ToolChoice};
use genmill_core::image::{Image, Source};
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Role};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// How many stop strings are taken. The worker cuts at the others itself.
const STOPS_MAX: usize = 5;

/// Stands in for the signature of a thought that led to a call, which was not kept: without any, newer models refuse the
/// call in the history (<https://ai.google.dev/gemini-api/docs/thought-signatures>).
const NO_SIGNATURE: &str = "skip_thought_signature_validator";

/// What `finishReason` may say. Anything else is unknown, which is no error.
const FINISH_REASONS: &[(&str, FinishReason)] = &[
    ("STOP", FinishReason::Stop),
    ("MAX_TOKENS", FinishReason::Length),
    ("SAFETY", FinishReason::ContentFilter),
    ("RECITATION", FinishReason::ContentFilter),
    ("LANGUAGE", FinishReason::ContentFilter),
    ("BLOCKLIST", FinishReason::ContentFilter),
    ("PROHIBITED_CONTENT", FinishReason::ContentFilter),
    ("SPII", FinishReason::ContentFilter),
    ("MODEL_ARMOR", FinishReason::ContentFilter),
];

/// The dialect.
#[derive(Debug)]
pub(super) struct Gemini;

impl Dialect for Gemini {
    fn key_header(&self) -> KeyHeader {
        KeyHeader { name: "x-goog-api-key", scheme: "" }
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let method = match streaming {
            Streaming::On => "streamGenerateContent?alt=sse",
            Streaming::Off => "generateContent",
        };
        let thinking = provider.thinking(model);
        let parts = |message: &ChatMessage, before: &[ChatMessage]| parts(message, before, thinking);
        let mut body = json!({"contents": conversation::turns(&spec.input, "model", "parts", parts)});
        let system: Vec<Value> =
            conversation::system(&spec.input).into_iter().map(|text| json!({"text": text})).collect();
        if !system.is_empty() {
            body["systemInstruction"] = json!({"parts": system});
        }
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec, thinking));
        let headers = parameters::headers(provider);
        Encoded { path: format!("/models/{model}:{method}"), headers, body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        Reply::of(Answer::default().take(&String::from_utf8_lossy(body)))
    }

    fn decode_error(&self, body: &[u8]) -> ProviderError {
        match serde_json::from_slice::<Value>(body) {
            Ok(value) => error(&value),
            Err(_) => errors::of_body(body),
        }
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        let mut answer = Answer::default();
        sse::reading(move |data| answer.take(data))
    }
}

fn rows(spec: &JobSpec, thinking: Thinking) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let number = |number: Option<f64>| number.map(|number| json!(number));
    let schema = parameters::schema(controls);
    let thought = controls.reasoning_effort.map(|effort| match thinking {
        Thinking::Budget => ("generationConfig.thinkingConfig.thinkingBudget", json!(budget(effort))),
        Thinking::Level => ("generationConfig.thinkingConfig.thinkingLevel", json!(level(effort))),
    });
    let (thought_place, thought) = thought.unzip();
    let samples = controls.n.filter(|n| *n > 1);
    let tells = controls.reasoning_effort.is_some_and(|effort| effort != ReasoningEffort::None);
    vec![
        ("max_tokens", "generationConfig.maxOutputTokens", Some(json!(sampling.max_tokens))),
        ("temperature", "generationConfig.temperature", Some(json!(sampling.temperature))),
        ("top_p", "generationConfig.topP", number(sampling.top_p)),
        ("top_k", "generationConfig.topK", sampling.top_k.map(|top_k| json!(top_k))),
        ("seed", "generationConfig.seed", Some(json!(parameters::seed(sampling.seed)))),
        ("stop", "generationConfig.stopSequences", parameters::list(sampling.stop.iter().take(STOPS_MAX))),
        ("frequency_penalty", "generationConfig.frequencyPenalty", number(controls.frequency_penalty)),
        ("presence_penalty", "generationConfig.presencePenalty", number(controls.presence_penalty)),
        ("logprobs", "generationConfig.responseLogprobs", controls.logprobs.map(|_| json!(true))),
        ("logprobs", "generationConfig.logprobs", controls.logprobs.filter(|top| *top > 0).map(|top| json!(top))),
        ("structured_output", "generationConfig.responseMimeType", schema.as_ref().map(|_| json!("application/json"))),
        ("structured_output", "generationConfig.responseJsonSchema", schema),
        ("reasoning_effort", thought_place.unwrap_or_default(), thought),
        ("reasoning_effort", "generationConfig.thinkingConfig.includeThoughts", tells.then_some(json!(true))),
        ("tools", "tools", parameters::tools(controls, tool).map(|tools| json!([{"functionDeclarations": tools}]))),
        ("tool_choice", "toolConfig.functionCallingConfig", controls.tool_choice.as_ref().map(tool_choice)),
        ("n", "generationConfig.candidateCount", samples.map(|n| json!(n))),
        parameters::IMAGES,
        parameters::IMAGE_URLS,
    ]
}

const fn budget(effort: ReasoningEffort) -> u32 {
    match effort {
        ReasoningEffort::None => 0,
        ReasoningEffort::Minimal => 512,
        ReasoningEffort::Low => 1_024,
        ReasoningEffort::Medium => 8_192,
        ReasoningEffort::High => 24_576,
    }
}

const fn level(effort: ReasoningEffort) -> &'static str {
    match effort {
        ReasoningEffort::None | ReasoningEffort::Minimal => "MINIMAL",
        ReasoningEffort::Low => "LOW",
        ReasoningEffort::Medium => "MEDIUM",
        ReasoningEffort::High => "HIGH",
    }
}

fn tool(tool: &Tool) -> Value {
    let mut out = json!({"name": tool.name, "parametersJsonSchema": arguments_schema(tool)});
    if !tool.description.is_empty() {
        out["description"] = json!(tool.description);
    }
    out
}

fn tool_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::Auto => json!({"mode": "AUTO"}),
        ToolChoice::None => json!({"mode": "NONE"}),
        ToolChoice::Required => json!({"mode": "ANY"}),
        ToolChoice::Tool(name) => json!({"mode": "ANY", "allowedFunctionNames": [name]}),
    }
}

fn parts(message: &ChatMessage, before: &[ChatMessage], thinking: Thinking) -> Vec<Value> {
    if message.role == Role::Tool {
        let name = conversation::called(message, before);
        let answer = serde_json::from_str(&message.content).ok().filter(Value::is_object);
        let answer = answer.unwrap_or_else(|| json!({"result": message.content}));
        return vec![json!({"functionResponse": {"name": name, "response": answer}})];
    }
    let said = images::parts(message, |text| json!({"text": text}), image);
    let call = |(place, ToolCall { name, arguments, .. }): (usize, &ToolCall)| {
        let mut part = json!({"functionCall": {"name": name, "args": parameters::object(arguments)}});
        if place == 0 && thinking == Thinking::Level {
            part["thoughtSignature"] = json!(NO_SIGNATURE);
        }
        part
    };
    said.into_iter().chain(message.tool_calls.iter().enumerate().map(call)).collect()
}

fn image(image: &Image) -> Value {
    match &image.source {
        Source::Data(bytes) => {
            json!({"inlineData": {"mimeType": images::media_type(image), "data": images::base64(bytes)}})
        }
        Source::Url(url) if image.media_type.is_none() => json!({"fileData": {"fileUri": url}}),
        Source::Url(url) => json!({"fileData": {"mimeType": images::media_type(image), "fileUri": url}}),
    }
}

/// What must be known of the chunks so far to read the next one. A whole answer is one chunk.
#[derive(Debug, Default)]
struct Answer {
    /// Of each candidate the calls so far.
    calls: BTreeMap<usize, usize>,
    finished: bool,
}

impl Answer {
    fn take(&mut self, data: &str) -> Vec<StreamEvent> {
        let chunk = match errors::json(data.as_bytes(), "the answer is not generated content") {
            Ok(chunk) => chunk,
            Err(error) => return vec![StreamEvent::Error(error)],
        };
        if !chunk["error"].is_null() || chunk.is_array() {
            return vec![StreamEvent::Error(error(&chunk))];
        }
        let candidates = chunk["candidates"].as_array().into_iter().flatten().enumerate();
        let mut events: Vec<StreamEvent> =
            candidates.flat_map(|(place, candidate)| self.candidate(place, candidate)).collect();
        // Whatever the reason is, the prompt was not let through.
        if chunk["promptFeedback"]["blockReason"].is_string() {
            self.finished = true;
            events.push(StreamEvent::Finished(FinishReason::ContentFilter));
        }
        // Counts grow from chunk to chunk: only the last are those of the whole call.
        if self.finished {
            events.extend(usage(&chunk["usageMetadata"]).into_iter().flatten());
        }
        events
    }

    /// What a candidate says, which is named by its index, or failing that by its place.
    fn candidate(&mut self, place: usize, candidate: &Value) -> Vec<StreamEvent> {
        let index = candidate["index"].as_u64().and_then(|index| usize::try_from(index).ok()).unwrap_or(place);
        let calls = self.calls.entry(index).or_default();
        let parts = candidate["content"]["parts"].as_array().into_iter().flatten();
        let mut events: Vec<StreamEvent> = parts.filter_map(|said| part(said, calls)).collect();
        events.extend(logprobs(&candidate["logprobsResult"]));
        if let Some(reason) = candidate["finishReason"].as_str() {
            self.finished = true;
            events.push(StreamEvent::Finished(finish_reason(reason, *calls)));
        }
        events.into_iter().map(|event| event.of(index)).collect()
    }
}

/// What a part says; `calls` counts the calls before it.
fn part(part: &Value, calls: &mut usize) -> Option<StreamEvent> {
    if let Some(text) = part["text"].as_str().filter(|text| !text.is_empty()) {
        let thinks = part["thought"].as_bool().unwrap_or(false);
        return Some(if thinks { StreamEvent::Reasoning } else { StreamEvent::Text }(text.to_owned()));
    }
    let call = part.get("functionCall")?;
    let index = *calls;
    *calls += 1;
    let id = call["id"].as_str().map_or_else(|| format!("call_{index}"), str::to_owned);
    let arguments = call.get("args").filter(|args| args.is_object()).map_or_else(|| "{}".to_owned(), Value::to_string);
    let name = call["name"].as_str().unwrap_or_default().to_owned();
    Some(StreamEvent::ToolCall { index, part: ToolCall { id, name, arguments } })
}

fn finish_reason(reason: &str, calls: usize) -> FinishReason {
    let known = FINISH_REASONS.iter().find(|(name, _)| *name == reason);
    match known.map_or(FinishReason::Unknown, |(_, reason)| *reason) {
        FinishReason::Stop if calls > 0 => FinishReason::ToolCalls,
        reason => reason,
    }
}

/// The tokens of a call. Thoughts are counted apart from the text and billed as it is; a tool's input apart from the prompt.
fn usage(usage: &Value) -> Option<[StreamEvent; 2]> {
    let count = |field: &str| usage[field].as_u64().unwrap_or(0);
    let prompt = usage["promptTokenCount"].as_u64()?;
    let thoughts = count("thoughtsTokenCount");
    let told = Usage {
        prompt_tokens: prompt.saturating_add(count("toolUsePromptTokenCount")),
        cached_prompt_tokens: count("cachedContentTokenCount"),
        completion_tokens: count("candidatesTokenCount").saturating_add(thoughts),
    };
    let details = UsageDetails { cache_write_tokens: 0, reasoning_tokens: thoughts };
    Some([StreamEvent::Usage(told), StreamEvent::UsageDetails(details)])
}

fn logprobs(result: &Value) -> Option<StreamEvent> {
    let chosen = result["chosenCandidates"].as_array().filter(|chosen| !chosen.is_empty())?;
    let top = |place: usize| result["topCandidates"][place]["candidates"].as_array().into_iter().flatten();
    let each =
        |(place, chosen): (usize, &Value)| TokenLogprob { top: top(place).map(logprob).collect(), ..logprob(chosen) };
    Some(StreamEvent::Logprobs(chosen.iter().enumerate().map(each).collect()))
}

fn logprob(token: &Value) -> TokenLogprob {
    #[expect(clippy::cast_possible_truncation, reason = "log probabilities are kept in float32")]
    let logprob = token["logProbability"].as_f64().map(|number| number as f32);
    TokenLogprob {
        token_id: token["tokenId"].as_u64().and_then(|id| u32::try_from(id).ok()),
        token: token["token"].as_str().unwrap_or_default().to_owned(),
        logprob,
        top: Vec::new(),
    }
}

/// A `google.rpc.Status`: what matters stands in its details.
fn error(value: &Value) -> ProviderError {
    let value = value.get(0).unwrap_or(value);
    let details = value["error"]["details"].as_array();
    let details = || details.into_iter().flatten();
    let mut error = ProviderError {
        code: value["error"]["status"].as_str().unwrap_or_default().to_owned(),
        ..errors::of_value(value)
    };
    // A wrong key is told as a wrong request.
    if details().any(|detail| detail["reason"] == "API_KEY_INVALID") {
        error.status = Some(401);
    }
    let quotas = details().flat_map(|detail| detail["violations"].as_array().into_iter().flatten());
    if quotas.filter_map(|quota| quota["quotaId"].as_str()).any(|id| id.contains("PerDay")) {
        error.code = "insufficient_quota".to_owned();
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, status: Option<u16>, code: &str, retry_after_ms: Option<u64>) {
        let error = Gemini.decode_error(body.as_bytes());
        assert_eq!((error.status, error.code.as_str(), error.retry_after_ms), (status, code, retry_after_ms), "{body}");
    }

    #[test]
    fn refusals_tell_what_their_details_say() {
        let of = |code: u16, status: &str, details: &str| {
            format!(r#"{{"error":{{"code":{code},"message":"no","status":"{status}","details":[{details}]}}}}"#)
        };
        check(&of(400, "INVALID_ARGUMENT", ""), Some(400), "INVALID_ARGUMENT", None);
        check(&of(400, "INVALID_ARGUMENT", r#"{"reason":"API_KEY_INVALID"}"#), Some(401), "INVALID_ARGUMENT", None);
        let minute = r#"{"violations":[{"quotaId":"RequestsPerMinute"}]},{"retryDelay":"22.5s"}"#;
        check(&of(429, "RESOURCE_EXHAUSTED", minute), Some(429), "RESOURCE_EXHAUSTED", Some(22_500));
        let day = r#"{"violations":[{"quotaId":"RequestsPerDayPerProject"}]}"#;
        check(&of(429, "RESOURCE_EXHAUSTED", day), Some(429), "insufficient_quota", None);
        check(&of(429, "RESOURCE_EXHAUSTED", r#"{"retryDelay":"soon"}"#), Some(429), "RESOURCE_EXHAUSTED", None);
        check("oops", None, "", None);
    }

    #[test]
    fn what_was_blocked_is_filtered() {
        for reason in ["PROHIBITED_CONTENT", "OTHER", "JAILBREAK"] {
            let told = format!(r#"{{"promptFeedback":{{"blockReason":"{reason}"}}}}"#);
            let reply = Gemini.decode(told.as_bytes()).unwrap();
            assert_eq!(reply.finish_reason, Some(FinishReason::ContentFilter));
        }
    }

    #[test]
    fn candidates_are_samples_each_with_its_own_calls() {
        let call = r#"{"functionCall":{"name":"f","args":{}}}"#;
        let chunk = format!(
            r#"{{"candidates":[{{"index":1,"content":{{"parts":[{call}]}},"finishReason":"STOP"}},{{"content":{{"parts":[{{"text":"a"}}]}},"index":0}}]}}"#
        );
        let mut answer = Answer::default();
        let said = answer.take(&chunk);
        let of = |event| StreamEvent::OfSample { sample: 1, event: Box::new(event) };
        let part = ToolCall { id: "call_0".to_owned(), name: "f".to_owned(), arguments: "{}".to_owned() };
        let called = of(StreamEvent::ToolCall { index: 0, part });
        let expect = [called, of(StreamEvent::Finished(FinishReason::ToolCalls)), StreamEvent::Text("a".to_owned())];
        assert_eq!(said, expect);
        let ended = answer.take(r#"{"candidates":[{"finishReason":"STOP"}]}"#);
        assert_eq!(
            ended,
            [StreamEvent::Finished(FinishReason::Stop)],
            "the calls of another candidate are not its own"
        );
    }
}
