//! A conversation as people write it: a list of role and content.

use crate::documents;
use anyhow::Context as _;
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

/// The other form of a conversation, as chat APIs take it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Conversation {
    messages: Vec<Message>,
}

const EXPECTED: &str =
    "a conversation is a list of {role: system|user|assistant, content: TEXT}, bare or under the key `messages`";

/// Reads a conversation in YAML or JSON.
pub(crate) fn read(text: &str) -> anyhow::Result<Vec<Message>> {
    let read = if documents::parse::<serde_json::Value>(text)?.is_object() {
        documents::parse::<Conversation>(text).map(|conversation| conversation.messages)
    } else {
        documents::parse(text)
    };
    read.context(EXPECTED)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str, says: &str) {
        let error = format!("{:#}", read(text).unwrap_err());
        assert!(error.contains(says) && error.contains("{role: system|user|assistant, content: TEXT}"), "{error}");
    }

    #[test]
    fn a_conversation_is_a_list_bare_or_under_a_key() {
        let bare = read("- {role: user, content: Hi}").unwrap();
        assert_eq!(read("messages:\n  - {role: user, content: Hi}").unwrap(), bare);
        assert_eq!(read(r#"{"messages": [{"role": "user", "content": "Hi"}]}"#).unwrap(), bare);
    }

    #[test]
    fn what_is_no_conversation_is_told_the_form() {
        refused("Hi", "invalid type");
        refused("{role: user, content: Hi}", "unknown key `content`");
        refused("{message: []}", "did you mean `messages`?");
        refused("{messages: [{role: boss, content: Hi}]}", "messages[0].role");
        refused("{model: gpt-4, messages: []}", "unknown key `model`");
        refused("[{role: user, content: [{type: text}]}]", "[0].content");
        refused("", "invalid type");
    }
}
