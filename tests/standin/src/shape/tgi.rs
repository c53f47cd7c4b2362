//! TGI's own generation: a text is continued, token by token.

use super::{Shape, Told};
use serde_json::{Value, json};

/// The shape.
#[derive(Debug)]
pub(crate) struct Tgi;

impl Tgi {
    fn details(told: &Told<'_>) -> Value {
        let reason = if told.finish_reason == "length" { "length" } else { "eos_token" };
        let Some((prompt, completion)) = told.usage else { return json!({"finish_reason": reason}) };
        let prefill = vec![json!({"id": 1, "text": "x", "logprob": null}); prompt];
        json!({
            "finish_reason": reason, "generated_tokens": completion, "seed": 1, "prefill": prefill,
            "input_length": prompt, "tokens": [],
        })
    }
}

impl Shape for Tgi {
    fn request(&self, path: &str, body: Value) -> Value {
        let parameters = &body["parameters"];
        json!({
            "model": "tgi",
            "messages": [{"role": "user", "content": body["inputs"]}],
            "max_tokens": parameters["max_new_tokens"],
            "stop": parameters["stop"],
            "seed": parameters["seed"],
            "stream": path == "generate_stream",
            "stream_options": {"include_usage": true},
        })
    }

    fn whole(&self, told: &Told<'_>) -> Value {
        json!({"generated_text": told.text, "details": Self::details(told)})
    }

    fn opening(&self, _told: &Told<'_>) -> Vec<Value> {
        Vec::new()
    }

    fn piece(&self, _model: &str, text: &str) -> Value {
        let token = json!({"id": 7, "text": text, "logprob": -0.5, "special": false});
        json!({"index": 1, "token": token, "generated_text": null, "details": null})
    }

    fn closing(&self, told: &Told<'_>) -> Vec<(Value, bool)> {
        let mut last = self.piece(told.model, "</s>");
        last["token"]["special"] = json!(true);
        last["generated_text"] = json!(told.text);
        last["details"] = Self::details(told);
        vec![(last, told.usage.is_some())]
    }

    fn error(&self, _status: u16, code: &str, message: &str) -> Value {
        json!({"error": message, "error_type": code})
    }

    fn event(&self, object: &Value) -> Vec<u8> {
        format!("data:{object}\n\n").into_bytes()
    }
}
