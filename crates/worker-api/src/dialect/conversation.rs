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

/// What every message is written as, one after the other.
pub(super) fn each<T: IntoIterator<Item = Value>>(input: &Input, form: impl Fn(&ChatMessage) -> T) -> Value {
    messages(input).iter().flat_map(form).collect()
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
