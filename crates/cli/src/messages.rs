//! A conversation as people write it: a list of role and content.

use genmill_client::{Role, v1};
use serde::Deserialize;

/// One message.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Message {
    role: Speaker,
    content: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Speaker {
    System,
    User,
    Assistant,
}

/// The messages as a request carries them.
pub(crate) fn input(messages: Vec<Message>) -> v1::generation_request::Input {
    let message = |Message { role, content }| {
        let role = match role {
            Speaker::System => Role::System,
            Speaker::User => Role::User,
            Speaker::Assistant => Role::Assistant,
        };
        v1::ChatMessage { role: v1::Role::from(role).into(), content }
    };
    let messages = messages.into_iter().map(message).collect();
    v1::generation_request::Input::Messages(v1::ChatMessages { messages })
}
