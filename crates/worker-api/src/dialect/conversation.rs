//! A request's conversation in the forms that several dialects share. Never here: how a dialect writes one message.

use genmill_core::request::{ChatMessage, Input, Role};
use serde_json::{Value, json};
use std::borrow::Cow;

/// The messages; a prompt is one of the user.
fn messages(input: &Input) -> Cow<'_, [ChatMessage]> {
    match input {
        Input::Prompt(prompt) => Cow::Owned(vec![ChatMessage::new(Role::User, prompt.as_str())]),
        Input::Messages(messages) => Cow::Borrowed(messages),
    }
}

/// What every message is written as, one after the other. `form` is given a message and those before it.
pub(super) fn each<T: IntoIterator<Item = Value>>(
    input: &Input,
    form: impl Fn(&ChatMessage, &[ChatMessage]) -> T,
) -> Value {
    let messages = messages(input);
    messages.iter().enumerate().flat_map(|(at, message)| form(message, &messages[..at])).collect()
}

/// The function that the answer of a tool is of, for dialects that name it: messages name only the call, and a later call
/// may have the id of an earlier one.
pub(super) fn called<'a>(answer: &ChatMessage, before: &'a [ChatMessage]) -> &'a str {
    let mut calls = before.iter().rev().flat_map(|message| &message.tool_calls);
    calls.find(|call| call.id == answer.tool_call_id).map(|call| call.name.as_str()).unwrap_or_default()
}

/// The texts of all system messages, for dialects that have them beside the conversation.
pub(super) fn system(input: &Input) -> Vec<&str> {
    let Input::Messages(messages) = input else { return Vec::new() };
    let system = messages.iter().filter(|message| message.role == Role::System);
    system.map(|message| message.content.as_str()).collect()
}

/// The conversation without its system messages, as turns of the user and of the model (which is called `model`), each
/// with its parts in the field `field`. Answers of tools are the user's. Messages of the same side that follow each
/// other are one turn: the answers to the calls of a turn must come together. `parts` is given a message and those
/// before it.
pub(super) fn turns(
    input: &Input,
    model: &str,
    field: &str,
    parts: impl Fn(&ChatMessage, &[ChatMessage]) -> Vec<Value>,
) -> Vec<Value> {
    let messages = messages(input);
    let mut turns: Vec<Value> = Vec::new();
    for (at, message) in messages.iter().enumerate().filter(|(_, message)| message.role != Role::System) {
        let role = if message.role == Role::Assistant { model } else { Role::User.name() };
        let parts = parts(message, &messages[..at]);
        match turns.last_mut().filter(|last| last["role"] == role).and_then(|last| last[field].as_array_mut()) {
            Some(last) => last.extend(parts),
            None => turns.push(json!({"role": role, field: parts})),
        }
    }
    turns
}
