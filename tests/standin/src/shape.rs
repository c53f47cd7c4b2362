//! The forms in which providers are asked and answer: OpenAI's, Anthropic's, Gemini's, and those of `shape/`. Never here: what is said (see
//! `answer`), and how it goes wrong (see `chat`).

mod bedrock;
mod replicate;
mod tgi;
mod watsonx;

pub(crate) use bedrock::Bedrock;
pub(crate) use replicate::Replicate;
use serde_json::{Value, json};
pub(crate) use tgi::Tgi;
pub(crate) use watsonx::Watsonx;

/// What is told, whatever the form.
#[derive(Debug)]
pub(crate) struct Told<'a> {
    /// The model, as it was asked for.
    pub(crate) model: &'a str,
    /// Names the call.
    pub(crate) id: &'a str,
    /// The whole text.
    pub(crate) text: &'a str,
    /// `stop` or `length`.
    pub(crate) finish_reason: &'a str,
    /// How many texts were asked for, of a form that has several: each after the first is the same behind its number.
    pub(crate) samples: usize,
    /// Tokens read and written; `None` when told to keep silent about them.
    pub(crate) usage: Option<(usize, usize)>,
    /// What the call costs, as OpenRouter tells it.
    pub(crate) cost: Option<&'a Value>,
}

/// The form in which a provider speaks.
pub(crate) trait Shape: Sync + std::fmt::Debug {
    /// The request in OpenAI's form. `path` is the last part of the request's path.
    fn request(&self, path: &str, body: Value) -> Value;

    /// An answer as one object.
    fn whole(&self, told: &Told<'_>) -> Value;

    /// What a stream says before the text.
    fn opening(&self, told: &Told<'_>) -> Vec<Value>;

    /// A piece of text in a stream.
    fn piece(&self, model: &str, text: &str) -> Value;

    /// What a stream says after the text, and whether it has the usage.
    fn closing(&self, told: &Told<'_>) -> Vec<(Value, bool)>;

    /// The last event of a stream, where there is one beside what closes it.
    fn done(&self) -> Option<&'static str> {
        None
    }

    /// The object of an error.
    fn error(&self, status: u16, code: &str, message: &str) -> Value;

    /// An object as an event of a stream.
    fn event(&self, object: &Value) -> Vec<u8> {
        format!("data: {object}\n\n").into_bytes()
    }

    /// What says nothing between events; empty where nothing may stand there.
    fn comment(&self) -> &'static str {
        ": STANDIN PROCESSING\n\n"
    }

    /// The content type of a stream.
    fn stream_type(&self) -> &'static str {
        "text/event-stream; charset=utf-8"
    }
}

/// Chat completions.
#[derive(Debug)]
pub(crate) struct OpenAi;

impl OpenAi {
    fn object(object: &str, model: &str, choices: Value) -> Value {
        let created = 1_700_000_000;
        json!({"id": "chatcmpl-standin", "object": object, "created": created, "model": model, "choices": choices})
    }

    fn chunk(model: &str, delta: Value, reason: Value) -> Value {
        Self::chunk_of(0, model, delta, reason)
    }

    fn chunk_of(sample: usize, model: &str, delta: Value, reason: Value) -> Value {
        let choices = json!([{"index": sample, "delta": delta, "finish_reason": reason}]);
        Self::object("chat.completion.chunk", model, choices)
    }

    fn usage(told: &Told<'_>) -> Option<Value> {
        let (prompt, completion) = told.usage?;
        let mut usage =
            json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion});
        if let Some(cost) = told.cost {
            usage["cost"] = cost.clone();
        }
        Some(usage)
    }
}

impl Shape for OpenAi {
    fn request(&self, _path: &str, body: Value) -> Value {
        body
    }

    fn whole(&self, told: &Told<'_>) -> Value {
        let choice = |sample: usize| {
            let content = if sample == 0 { told.text.to_owned() } else { format!("{sample} {}", told.text) };
            let message = json!({"role": "assistant", "content": content});
            json!({"index": sample, "message": message, "finish_reason": told.finish_reason})
        };
        let mut object = Self::object("chat.completion", told.model, (0..told.samples).map(choice).collect());
        if let Some(usage) = Self::usage(told) {
            object["usage"] = usage;
        }
        object
    }

    fn opening(&self, told: &Told<'_>) -> Vec<Value> {
        let mut chunk = Self::chunk(told.model, json!({"role": "assistant", "content": ""}), Value::Null);
        chunk["id"] = json!(told.id);
        vec![chunk]
    }

    fn piece(&self, model: &str, text: &str) -> Value {
        Self::chunk(model, json!({"content": text}), Value::Null)
    }

    fn closing(&self, told: &Told<'_>) -> Vec<(Value, bool)> {
        let last = Self::usage(told).map(|usage| {
            let mut last = Self::object("chat.completion.chunk", told.model, json!([]));
            last["usage"] = usage;
            (last, true)
        });
        let finish = Self::chunk(told.model, json!({}), json!(told.finish_reason));
        let other = |sample: usize| {
            let delta = json!({"content": format!("{sample} {}", told.text)});
            (Self::chunk_of(sample, told.model, delta, json!(told.finish_reason)), false)
        };
        std::iter::once((finish, false)).chain((1..told.samples).map(other)).chain(last).collect()
    }

    fn done(&self) -> Option<&'static str> {
        Some("data: [DONE]\n\n")
    }

    fn error(&self, _status: u16, code: &str, message: &str) -> Value {
        json!({"error": {"message": message, "type": code, "param": null, "code": code}})
    }
}

/// Anthropic's messages.
#[derive(Debug)]
pub(crate) struct Anthropic;

impl Anthropic {
    fn message(told: &Told<'_>, content: Value, reason: Value, output: usize) -> Value {
        let input = told.usage.map_or(0, |(input, _)| input);
        let usage = json!({"input_tokens": input, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": output});
        json!({"id": "msg_standin", "type": "message", "role": "assistant", "model": told.model, "content": content,
               "stop_reason": reason, "stop_sequence": null, "usage": usage})
    }

    fn reason(told: &Told<'_>) -> &'static str {
        if told.finish_reason == "length" { "max_tokens" } else { "end_turn" }
    }
}

impl Shape for Anthropic {
    fn request(&self, _path: &str, mut body: Value) -> Value {
        let system = body["system"].as_str().map(|text| json!({"role": "system", "content": text}));
        if let (Some(system), Some(messages)) = (system, body["messages"].as_array_mut()) {
            messages.insert(0, system);
        }
        body["stop"] = body["stop_sequences"].clone();
        // The usage always comes.
        body["stream_options"] = json!({"include_usage": true});
        // Without it a call is refused, as by the real one.
        if body["max_tokens"].is_null() {
            body["messages"] = Value::Null;
        }
        body
    }

    fn whole(&self, told: &Told<'_>) -> Value {
        let content = json!([{"type": "text", "text": told.text}]);
        let mut message =
            Self::message(told, content, json!(Self::reason(told)), told.usage.map_or(0, |(_, output)| output));
        if told.usage.is_none() {
            message["usage"] = Value::Null;
        }
        message
    }

    fn opening(&self, told: &Told<'_>) -> Vec<Value> {
        vec![
            json!({"type": "message_start", "message": Self::message(told, json!([]), Value::Null, 1)}),
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
            json!({"type": "ping"}),
        ]
    }

    fn piece(&self, _model: &str, text: &str) -> Value {
        json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})
    }

    fn closing(&self, told: &Told<'_>) -> Vec<(Value, bool)> {
        let mut delta =
            json!({"type": "message_delta", "delta": {"stop_reason": Self::reason(told), "stop_sequence": null}});
        // One that keeps silent takes back what the beginning said.
        delta["usage"] = match told.usage {
            Some((_, output)) => json!({"output_tokens": output}),
            None => json!({"input_tokens": "?"}),
        };
        vec![(json!({"type": "content_block_stop", "index": 0}), false), (delta, told.usage.is_some())]
    }

    fn done(&self) -> Option<&'static str> {
        Some("event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n")
    }

    fn error(&self, status: u16, code: &str, message: &str) -> Value {
        let kind = match status {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            529 => "overloaded_error",
            500.. => "api_error",
            _ => code,
        };
        json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_standin"})
    }

    fn event(&self, object: &Value) -> Vec<u8> {
        let name = object["type"].as_str().unwrap_or("message");
        format!("event: {name}\ndata: {object}\n\n").into_bytes()
    }
}

/// Gemini's content.
#[derive(Debug)]
pub(crate) struct Gemini;

impl Gemini {
    fn chunk(model: &str, text: &str) -> Value {
        let content = json!({"role": "model", "parts": [{"text": text}]});
        json!({"candidates": [{"content": content, "index": 0}], "modelVersion": model, "responseId": "standin"})
    }
}

impl Shape for Gemini {
    fn request(&self, path: &str, body: Value) -> Value {
        let (model, method) = path.split_once(':').unwrap_or((path, ""));
        let message = |content: &Value| {
            let role = if content["role"] == "model" { "assistant" } else { "user" };
            json!({"role": role, "content": content["parts"]})
        };
        let system = json!({"role": "system", "content": body["systemInstruction"]["parts"]});
        let contents = body["contents"].as_array().into_iter().flatten().map(message);
        let config = &body["generationConfig"];
        json!({
            "model": model,
            "messages": std::iter::once(system).chain(contents).collect::<Vec<_>>(),
            "max_tokens": config["maxOutputTokens"],
            "stop": config["stopSequences"],
            "seed": config["seed"],
            "stream": method == "streamGenerateContent",
            "stream_options": {"include_usage": true},
        })
    }

    fn whole(&self, told: &Told<'_>) -> Value {
        let mut chunk = Self::chunk(told.model, told.text);
        chunk["candidates"][0]["finishReason"] =
            json!(if told.finish_reason == "length" { "MAX_TOKENS" } else { "STOP" });
        if let Some((prompt, candidates)) = told.usage {
            let total = prompt + candidates;
            chunk["usageMetadata"] =
                json!({"promptTokenCount": prompt, "candidatesTokenCount": candidates, "totalTokenCount": total});
        }
        chunk
    }

    fn opening(&self, _told: &Told<'_>) -> Vec<Value> {
        Vec::new()
    }

    fn piece(&self, model: &str, text: &str) -> Value {
        let mut chunk = Self::chunk(model, text);
        chunk["usageMetadata"] = json!({"promptTokenCount": 1, "totalTokenCount": 1});
        chunk
    }

    fn closing(&self, told: &Told<'_>) -> Vec<(Value, bool)> {
        let mut last = self.whole(&Told { text: "", ..*told });
        last["candidates"][0]["content"] = json!({"role": "model", "parts": [{"text": ""}]});
        vec![(last, told.usage.is_some())]
    }

    fn error(&self, status: u16, _code: &str, message: &str) -> Value {
        let (name, reason) = match status {
            401 => ("INVALID_ARGUMENT", "API_KEY_INVALID"),
            404 => ("NOT_FOUND", ""),
            429 => ("RESOURCE_EXHAUSTED", ""),
            500.. => ("INTERNAL", ""),
            _ => ("INVALID_ARGUMENT", ""),
        };
        let code = if status == 401 { 400 } else { status };
        let details = json!([{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason}]);
        json!({"error": {"code": code, "message": message, "status": name, "details": details}})
    }
}
