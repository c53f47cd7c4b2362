//! Bedrock's Converse: objects in binary frames.

use super::{Shape, Told};
use serde_json::{Value, json};

/// The shape. Objects of a stream name their event in the field `event`, which is not sent.
#[derive(Debug)]
pub(crate) struct Bedrock;

impl Bedrock {
    fn reason(told: &Told<'_>) -> &'static str {
        if told.finish_reason == "length" { "max_tokens" } else { "end_turn" }
    }

    fn usage(told: &Told<'_>) -> Value {
        told.usage.map_or(
            Value::Null,
            |(input, output)| json!({"inputTokens": input, "outputTokens": output, "totalTokens": input + output}),
        )
    }
}

impl Shape for Bedrock {
    fn request(&self, path: &str, body: Value) -> Value {
        let (model, method) = path.rsplit_once('/').unwrap_or((path, ""));
        let config = &body["inferenceConfig"];
        json!({
            "model": model,
            "messages": body["messages"],
            "max_tokens": config["maxTokens"],
            "stop": config["stopSequences"],
            "stream": method == "converse-stream",
            "stream_options": {"include_usage": true},
        })
    }

    fn whole(&self, told: &Told<'_>) -> Value {
        let message = json!({"role": "assistant", "content": [{"text": told.text}]});
        json!({
            "output": {"message": message}, "stopReason": Self::reason(told), "usage": Self::usage(told),
            "metrics": {"latencyMs": 1},
        })
    }

    fn opening(&self, _told: &Told<'_>) -> Vec<Value> {
        vec![json!({"event": "messageStart", "role": "assistant"})]
    }

    fn piece(&self, _model: &str, text: &str) -> Value {
        json!({"event": "contentBlockDelta", "contentBlockIndex": 0, "delta": {"text": text}})
    }

    fn closing(&self, told: &Told<'_>) -> Vec<(Value, bool)> {
        vec![
            (json!({"event": "contentBlockStop", "contentBlockIndex": 0}), false),
            (json!({"event": "messageStop", "stopReason": Self::reason(told)}), false),
            (json!({"event": "metadata", "usage": Self::usage(told)}), told.usage.is_some()),
        ]
    }

    fn error(&self, _status: u16, code: &str, message: &str) -> Value {
        json!({"__type": code, "message": message})
    }

    fn event(&self, object: &Value) -> Vec<u8> {
        let mut object = object.clone();
        let event = object.as_object_mut().and_then(|fields| fields.remove("event"));
        let event = event.as_ref().and_then(Value::as_str);
        let (kind, name) = event.map_or(("exception", "internalServerException"), |event| ("event", event));
        let mut headers = header(":message-type", kind);
        headers.extend(header(&format!(":{kind}-type"), name));
        headers.extend(header(":content-type", "application/json"));
        frame(&headers, object.to_string().as_bytes())
    }

    fn comment(&self) -> &'static str {
        ""
    }

    fn stream_type(&self) -> &'static str {
        "application/vnd.amazon.eventstream"
    }
}

fn header(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| u16::try_from(text.len()).unwrap_or_default().to_be_bytes();
    let mut header = vec![length(name)[1]];
    header.extend(name.as_bytes());
    // 7: a text.
    header.push(7);
    header.extend(length(value));
    header.extend(value.as_bytes());
    header
}

fn frame(headers: &[u8], payload: &[u8]) -> Vec<u8> {
    let number = |number: usize| u32::try_from(number).unwrap_or_default().to_be_bytes();
    let mut frame = number(12 + headers.len() + payload.len() + 4).to_vec();
    frame.extend(number(headers.len()));
    frame.extend(crc32(&frame).to_be_bytes());
    frame.extend(headers);
    frame.extend(payload);
    frame.extend(crc32(&frame).to_be_bytes());
    frame
}

/// The checksum of zlib and Ethernet, with a table, as nobody else here computes it.
fn crc32(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256)
        .map(|byte: u32| (0..8).fold(byte, |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 }))
        .collect();
    let step = |crc: u32, byte: &u8| {
        let at = usize::from(crc.to_le_bytes()[0] ^ byte);
        (crc >> 8) ^ table[at]
    };
    !bytes.iter().fold(!0, step)
}
