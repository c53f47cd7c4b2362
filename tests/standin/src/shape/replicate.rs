//! Replicate's predictions, as they are once they have ended.

use super::{Shape, Told};
use serde_json::{Value, json};

/// The shape.
#[derive(Debug)]
pub(crate) struct Replicate;

impl Shape for Replicate {
    fn request(&self, path: &str, body: Value) -> Value {
        let input = &body["input"];
        json!({
            "model": path,
            "messages": [{"role": "user", "content": input["prompt"]}],
            "max_tokens": input["max_tokens"],
            "seed": input["seed"],
        })
    }

    fn whole(&self, told: &Told<'_>) -> Value {
        let pieces: Vec<&str> = told.text.split_inclusive(' ').collect();
        let metrics = match told.usage {
            Some((input, output)) => {
                json!({"input_token_count": input, "output_token_count": output, "predict_time": 0.1})
            }
            None => json!({"predict_time": 0.1}),
        };
        json!({
            "id": "standin", "model": told.model, "status": "succeeded", "output": pieces, "error": null,
            "metrics": metrics,
        })
    }

    /// It does not stream.
    fn opening(&self, _told: &Told<'_>) -> Vec<Value> {
        Vec::new()
    }

    fn piece(&self, _model: &str, text: &str) -> Value {
        json!(text)
    }

    fn closing(&self, _told: &Told<'_>) -> Vec<(Value, bool)> {
        Vec::new()
    }

    fn error(&self, status: u16, _code: &str, message: &str) -> Value {
        json!({"title": "The stand-in", "detail": message, "status": status})
    }
}
