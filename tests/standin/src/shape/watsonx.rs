//! watsonx: chat completions, asked for at paths of their own, with the model in another field.

use super::{OpenAi, Shape, Told};
use serde_json::{Value, json};

/// The shape.
#[derive(Debug)]
pub(crate) struct Watsonx;

impl Shape for Watsonx {
    fn request(&self, path: &str, mut body: Value) -> Value {
        body["model"] = body["model_id"].clone();
        body["stream"] = json!(path == "chat_stream");
        body["stream_options"] = json!({"include_usage": true});
        // Without a project a call is refused, as by the real one.
        if body["project_id"].is_null() {
            body["messages"] = Value::Null;
        }
        body
    }

    fn whole(&self, told: &Told<'_>) -> Value {
        OpenAi.whole(told)
    }

    fn opening(&self, told: &Told<'_>) -> Vec<Value> {
        OpenAi.opening(told)
    }

    fn piece(&self, model: &str, text: &str) -> Value {
        OpenAi.piece(model, text)
    }

    fn closing(&self, told: &Told<'_>) -> Vec<(Value, bool)> {
        OpenAi.closing(told)
    }

    fn error(&self, status: u16, code: &str, message: &str) -> Value {
        json!({"errors": [{"code": code, "message": message}], "trace": "standin", "status_code": status})
    }

    fn event(&self, object: &Value) -> Vec<u8> {
        format!("id: 1\nevent: message\ndata: {object}\n\n").into_bytes()
    }
}
