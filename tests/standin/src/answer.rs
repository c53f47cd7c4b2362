//! What the stand-in says, and how many tokens that is: one for each word. Never here: how it is sent (see `chat`).

use crate::script::{Script, Speech};
use serde_json::Value;

/// An answer, ready to be sent whole or in pieces.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The text in pieces of a word each; joined they are the text.
    pub(crate) pieces: Vec<String>,
    /// `stop` or `length`.
    pub(crate) finish_reason: &'static str,
    /// Words of all messages.
    pub(crate) prompt_tokens: usize,
}

/// What a request says, as far as the stand-in cares.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    body: &'a Value,
}

impl<'a> Request<'a> {
    pub(crate) fn new(body: &'a Value) -> Self {
        Self { body }
    }

    pub(crate) fn model(&self) -> &'a str {
        self.body["model"].as_str().unwrap_or_default()
    }

    pub(crate) fn streams(&self) -> bool {
        self.body["stream"].as_bool().unwrap_or(false)
    }

    pub(crate) fn wants_usage(&self) -> bool {
        self.body["stream_options"]["include_usage"].as_bool().unwrap_or(false)
    }

    /// The texts of all messages; `None` when there is no list of messages.
    fn texts(&self) -> Option<Vec<(&'a str, String)>> {
        let messages = self.body["messages"].as_array()?;
        Some(messages.iter().map(|m| (m["role"].as_str().unwrap_or_default(), text_of(&m["content"]))).collect())
    }

    pub(crate) fn last_user_text(&self) -> Option<String> {
        let texts = self.texts()?;
        texts.into_iter().rev().find(|(role, _)| *role == "user").map(|(_, text)| text)
    }

    /// Tokens of the prompt, and those that the answer may have.
    pub(crate) fn asked_tokens(&self) -> usize {
        self.prompt_tokens().saturating_add(self.tokens_max())
    }

    fn prompt_tokens(&self) -> usize {
        self.texts().unwrap_or_default().iter().map(|(_, text)| text.split_whitespace().count()).sum()
    }

    fn tokens_max(&self) -> usize {
        let field = ["max_tokens", "max_completion_tokens"].iter().find_map(|name| self.body[*name].as_u64());
        field.and_then(|max| usize::try_from(max).ok()).unwrap_or(usize::MAX)
    }

    /// How many texts are asked for.
    pub(crate) fn samples(&self) -> usize {
        self.body["n"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(1).max(1)
    }

    fn stops(&self) -> Vec<&'a str> {
        match &self.body["stop"] {
            Value::String(stop) => vec![stop],
            Value::Array(stops) => stops.iter().filter_map(Value::as_str).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
        }
    }
}

fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => String::new(),
    }
}

/// The answer to `request`: the same for the same request.
pub(crate) fn answer(request: &Request<'_>, script: &Script) -> Answer {
    let message = request.last_user_text().unwrap_or_default();
    let text = match &script.speech {
        Speech::Echo(text) => text.clone(),
        Speech::Words(count) => numbered(*count),
        Speech::Sample(count) => sampled(request.body["seed"].as_u64().unwrap_or_default(), *count),
        Speech::Repeat => Some(Script::strip(&message)).filter(|text| !text.is_empty()).unwrap_or_else(|| numbered(20)),
    };
    let text = match request.stops().iter().filter_map(|stop| text.find(stop)).min() {
        Some(at) => text[..at].to_owned(),
        None => text,
    };
    let mut pieces: Vec<String> = text.split_inclusive(char::is_whitespace).map(str::to_owned).collect();
    let finish_reason = if pieces.len() > request.tokens_max() { "length" } else { "stop" };
    pieces.truncate(request.tokens_max());
    Answer { pieces, finish_reason, prompt_tokens: request.prompt_tokens() }
}

fn numbered(count: usize) -> String {
    (1..=count).map(|n| format!("word{n}")).collect::<Vec<_>>().join(" ")
}

/// Words drawn by a multiplicative congruential generator, so that a seed always says the same.
fn sampled(seed: u64, count: usize) -> String {
    const WORDS: [&str; 8] = ["mill", "grain", "stone", "water", "wheel", "flour", "sack", "miller"];
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        WORDS[usize::try_from(state >> 61).unwrap_or_default()]
    };
    (0..count).map(|_| draw()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(body: Value, text: &str, finish_reason: &str) {
        let request = Request::new(&body);
        let message = request.last_user_text().unwrap();
        let answer = answer(&request, &Script::parse(request.model(), &message));
        assert_eq!((answer.pieces.concat().as_str(), answer.finish_reason), (text, finish_reason));
    }

    fn user(text: &str) -> Value {
        json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": text}])
    }

    #[test]
    fn it_repeats_the_last_user_message() {
        check(json!({"messages": user("a b  c")}), "a b c", "stop");
    }

    #[test]
    fn it_keeps_the_bound_of_tokens_and_stop_strings() {
        check(json!({"messages": user("!words=3"), "max_tokens": 2}), "word1 word2 ", "length");
        check(json!({"messages": user("!words=3"), "max_completion_tokens": 3}), "word1 word2 word3", "stop");
        check(json!({"messages": user("!words=3"), "stop": ["3", "d2"]}), "word1 wor", "stop");
    }

    #[test]
    fn a_seed_says_the_same_every_time() {
        assert_eq!(sampled(7, 5), sampled(7, 5));
        assert_ne!(sampled(7, 5), sampled(8, 5));
    }
}
