//! The own API of Hugging Face's text generation inference: a text is continued.

use super::{Dialect, Encoded, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{errors, parameters, sse};
use crate::providers::Provider;
use genmill_core::attempt::{FinishReason, TokenLogprob, Usage};
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Input, Role};
use serde_json::{Value, json};

/// How many stop strings are taken. The worker cuts at the others itself.
const STOPS_MAX: usize = 4;

/// What `finish_reason` may say. Anything else is unknown, which is no error.
const FINISH_REASONS: &[(&str, FinishReason)] =
    &[("eos_token", FinishReason::Stop), ("stop_sequence", FinishReason::Stop), ("length", FinishReason::Length)];

/// The dialect.
#[derive(Debug)]
pub(super) struct Tgi;

impl Dialect for Tgi {
    fn models_path(&self) -> Option<&'static str> {
        None
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let method = match streaming {
            Streaming::On => "generate_stream",
            Streaming::Off => "generate",
        };
        // The tokens of the prompt can be counted in a whole answer only.
        let count = streaming == Streaming::Off;
        let parameters = json!({"details": true, "return_full_text": false, "decoder_input_details": count});
        let mut body = json!({"inputs": prompt(&spec.input), "parameters": parameters});
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec));
        let below = provider.path(model).unwrap_or_default();
        let headers = parameters::headers(provider);
        Encoded { path: format!("{below}/{method}"), headers, body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        let answer = errors::json(body, "the answer is no generated text")?;
        // Servers that take several texts answer with a list.
        let answer = answer.get(0).unwrap_or(&answer);
        if !answer["error"].is_null() {
            return Err(errors::of_value(answer));
        }
        let Some(text) = answer["generated_text"].as_str() else {
            return Err(ProviderError::saying("the answer is no generated text"));
        };
        let details = &answer["details"];
        let tokens = details["tokens"].as_array().into_iter().flatten();
        let tops = details["top_tokens"].as_array().into_iter().flatten();
        let logprobs = tokens.zip(tops).filter(|(token, _)| !is_special(token));
        let logprobs = logprobs.filter_map(|(token, top)| logprob_of(token, top)).collect();
        let said = [StreamEvent::Text(text.to_owned()), StreamEvent::Logprobs(logprobs)];
        let events = said.into_iter().chain(ended(details)).collect();
        Reply::of(events)
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        sse::reading(events)
    }
}

fn rows(spec: &JobSpec) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let greedy = sampling.temperature <= 0.0;
    let number = |number: Option<f64>| number.map(|number| json!(number));
    let grammar = parameters::schema(controls).map(|schema| json!({"type": "json", "value": schema}));
    vec![
        ("max_tokens", "parameters.max_new_tokens", Some(json!(sampling.max_tokens))),
        // A temperature of 0 is refused: not sampling is the same.
        ("temperature", "parameters.temperature", (!greedy).then(|| json!(sampling.temperature))),
        ("temperature", "parameters.do_sample", Some(json!(!greedy))),
        // It must be below 1.
        ("top_p", "parameters.top_p", number(sampling.top_p.filter(|top_p| *top_p < 1.0))),
        ("top_k", "parameters.top_k", sampling.top_k.map(|top_k| json!(top_k))),
        ("seed", "parameters.seed", Some(json!(parameters::seed(sampling.seed)))),
        ("stop", "parameters.stop", parameters::list(sampling.stop.iter().take(STOPS_MAX))),
        ("repetition_penalty", "parameters.repetition_penalty", number(controls.repetition_penalty)),
        ("frequency_penalty", "parameters.frequency_penalty", number(controls.frequency_penalty)),
        ("logprobs", "parameters.top_n_tokens", controls.logprobs.map(|top| json!(top.max(1)))),
        ("structured_output", "parameters.grammar", grammar),
    ]
}

/// What is to be continued. There is no chat template here: a conversation is written down as one would on paper.
pub(super) fn prompt(input: &Input) -> String {
    let messages = match input {
        Input::Prompt(prompt) => return prompt.clone(),
        Input::Messages(messages) => messages,
    };
    if let [ChatMessage { role: Role::User, content, .. }] = &messages[..] {
        return content.clone();
    }
    let line = |message: &ChatMessage| {
        let speaker = match message.role {
            Role::System => return format!("{}\n\n", message.content),
            Role::User => "User",
            Role::Assistant => "Assistant",
            Role::Tool => "Tool",
        };
        format!("{speaker}: {}\n\n", message.content)
    };
    messages.iter().map(line).chain(["Assistant:".to_owned()]).collect()
}

/// What an event of a stream says: a token, with the last of which the details come.
fn events(data: &str) -> Vec<StreamEvent> {
    let chunk = match errors::json(data.as_bytes(), "the stream is not one of tokens") {
        Ok(chunk) => chunk,
        Err(error) => return vec![StreamEvent::Error(error)],
    };
    if !chunk["error"].is_null() {
        return vec![StreamEvent::Error(errors::of_value(&chunk))];
    }
    let token = &chunk["token"];
    let mut events = Vec::new();
    // Marks of the model, such as that of the end, are no text.
    if let (Some(text), false) = (token["text"].as_str(), is_special(token)) {
        events.push(StreamEvent::Text(text.to_owned()));
        events.extend(logprob_of(token, &chunk["top_tokens"]).map(|logprob| StreamEvent::Logprobs(vec![logprob])));
    }
    if !chunk["details"].is_null() {
        events.extend(ended(&chunk["details"]));
        events.push(StreamEvent::Done);
    }
    events
}

/// Why a text ended, and its tokens. Those of the prompt are told in two ways, or not at all.
fn ended(details: &Value) -> Vec<StreamEvent> {
    let prefill = details["prefill"].as_array().and_then(|prefill| u64::try_from(prefill.len()).ok());
    let prompt = details["input_length"].as_u64().or(prefill.filter(|tokens| *tokens > 0));
    let usage = prompt.zip(details["generated_tokens"].as_u64()).map(|(prompt_tokens, completion_tokens)| {
        StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens: 0, completion_tokens })
    });
    StreamEvent::finished(&details["finish_reason"], FINISH_REASONS).into_iter().chain(usage).collect()
}

fn is_special(token: &Value) -> bool {
    token["special"].as_bool().unwrap_or(false)
}

/// A token's log probability where it was asked for: then the best tokens at its place are told.
fn logprob_of(token: &Value, top: &Value) -> Option<TokenLogprob> {
    let top = top.as_array()?.iter().map(logprob).collect();
    Some(TokenLogprob { top, ..logprob(token) })
}

fn logprob(token: &Value) -> TokenLogprob {
    #[expect(clippy::cast_possible_truncation, reason = "log probabilities are kept in float32")]
    let logprob = token["logprob"].as_f64().map(|number| number as f32);
    TokenLogprob {
        token_id: token["id"].as_u64().and_then(|id| u32::try_from(id).ok()),
        token: token["text"].as_str().unwrap_or_default().to_owned(),
        logprob,
        top: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::messages;

    #[test]
    fn a_conversation_is_written_down() {
        assert_eq!(prompt(&messages(&[(Role::User, "Hi")])), "Hi");
        let all =
            messages(&[(Role::System, "Be brief."), (Role::User, "Hi"), (Role::Assistant, "Yes?"), (Role::User, "So")]);
        assert_eq!(prompt(&all), "Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: So\n\nAssistant:");
    }

    #[test]
    fn marks_of_the_model_are_no_text() {
        assert_eq!(events(r#"{"token":{"id":2,"text":"</s>","logprob":-0.1,"special":true}}"#), []);
    }
}
