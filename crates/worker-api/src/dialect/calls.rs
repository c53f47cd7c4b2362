//! Calls of tools in the forms that several dialects share. Never here: which dialect has which.

use super::StreamEvent;
use genmill_core::controls::ToolCall;
use serde_json::{Value, json};

/// A call as chat completions have it in a message.
pub(super) fn sent(ToolCall { id, name, arguments }: &ToolCall) -> Value {
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// A call as chat completions tell it, or a piece of one. Which one it is, is its own index, or failing that its place.
pub(super) fn told((place, call): (usize, &Value)) -> StreamEvent {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let index = call["index"].as_u64().and_then(|index| usize::try_from(index).ok()).unwrap_or(place);
    let function = &call["function"];
    // Some providers send the arguments as an object.
    let arguments = match &function["arguments"] {
        Value::Object(_) => function["arguments"].to_string(),
        other => text(other),
    };
    StreamEvent::ToolCall { index, part: ToolCall { id: text(&call["id"]), name: text(&function["name"]), arguments } }
}

/// All calls of a message, or pieces of them.
pub(super) fn all_told(calls: &Value) -> impl Iterator<Item = StreamEvent> {
    calls.as_array().into_iter().flatten().enumerate().map(told)
}

/// The calls of a stream whose parts are numbered, whatever they are.
#[derive(Debug, Default)]
pub(super) struct Numbered(Vec<u64>);

impl Numbered {
    /// How many have begun.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// The part `number` begins, which is a call.
    pub(super) fn begin(&mut self, number: &Value, part: ToolCall) -> Option<StreamEvent> {
        self.0.push(number.as_u64()?);
        Some(StreamEvent::ToolCall { index: self.0.len() - 1, part })
    }

    /// More arguments of the part `number`, if that is a call.
    pub(super) fn more(&self, number: &Value, arguments: String) -> Option<StreamEvent> {
        let number = number.as_u64()?;
        let index = self.0.iter().position(|call| *call == number)?;
        Some(StreamEvent::ToolCall { index, part: ToolCall { id: String::new(), name: String::new(), arguments } })
    }
}
