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
    #[serde(default, deserialize_with = "null_is_empty")]
    content: String,
    #[serde(default)]
    tool_calls: Vec<ToolCall>,
    #[serde(default)]
    tool_call_id: String,
}

/// A call as chat APIs write it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ToolCall {
    #[serde(default)]
    id: String,
    #[serde(default, rename = "type")]
    _kind: Option<String>,
    function: Function,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    arguments: String,
}

impl ToolCall {
    fn into_message(self) -> v1::ToolCall {
        v1::ToolCall { id: self.id, name: self.function.name, arguments: self.function.arguments }
    }
}

/// A message that only calls tools has no content.
fn null_is_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Tools as chat APIs take them: `{type: function, function: {name, description, parameters}}`, or the function bare.
#[derive(Deserialize)]
#[serde(untagged)]
enum ToolForm {
    Wrapped { function: ToolFunction },
    Bare(ToolFunction),
}

#[derive(Deserialize)]
struct ToolFunction {
    name: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    parameters: Option<serde_json::Value>,
}

/// Reads a list of tools in YAML or JSON.
pub(crate) fn tools(text: &str) -> anyhow::Result<Vec<v1::Tool>> {
    let tools: Vec<ToolForm> = documents::parse(text)
        .context("tools are a list of {type: function, function: {name, description, parameters}}")?;
    let tool = |form| {
        let (ToolForm::Wrapped { function } | ToolForm::Bare(function)) = form;
        let parameters = function.parameters.map(|schema| schema.to_string()).unwrap_or_default();
        v1::Tool { name: function.name, description: function.description, parameters }
    };
    Ok(tools.into_iter().map(tool).collect())
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Speaker {
    System,
    User,
    Assistant,
    Tool,
}

/// The other form of a conversation, as chat APIs take it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Conversation {
    messages: Vec<Message>,
}

const EXPECTED: &str =
    "a conversation is a list of {role: system|user|assistant|tool, content: TEXT}, bare or under the key `messages`";

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
    let message = |Message { role, content, tool_calls, tool_call_id }| {
        let role = match role {
            Speaker::System => Role::System,
            Speaker::User => Role::User,
            Speaker::Assistant => Role::Assistant,
            Speaker::Tool => Role::Tool,
        };
        let tool_calls = tool_calls.into_iter().map(ToolCall::into_message).collect();
        v1::ChatMessage { role: v1::Role::from(role).into(), content, tool_calls, tool_call_id }
    };
    let messages = messages.into_iter().map(message).collect();
    v1::generation_request::Input::Messages(v1::ChatMessages { messages })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str, says: &str) {
        let error = format!("{:#}", read(text).unwrap_err());
        assert!(error.contains(says) && error.contains("{role: system|user|assistant|tool, content: TEXT}"), "{error}");
    }

    #[test]
    fn a_conversation_is_a_list_bare_or_under_a_key() {
        let bare = read("- {role: user, content: Hi}").unwrap();
        assert_eq!(read("messages:\n  - {role: user, content: Hi}").unwrap(), bare);
        assert_eq!(read(r#"{"messages": [{"role": "user", "content": "Hi"}]}"#).unwrap(), bare);
    }

    #[test]
    fn calls_and_answers_are_read_as_chat_apis_write_them() {
        let text = r#"[{"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
            "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "c1", "content": "4"}]"#;
        let v1::generation_request::Input::Messages(chat) = input(read(text).unwrap()) else { panic!("a prompt") };
        assert_eq!((chat.messages[0].content.as_str(), chat.messages[0].tool_calls[0].name.as_str()), ("", "f"));
        assert_eq!((chat.messages[1].role(), chat.messages[1].tool_call_id.as_str()), (v1::Role::Tool, "c1"));
        let read = tools(
            "- {type: function, function: {name: f, parameters: {type: object}}}
- {name: g}",
        )
        .unwrap();
        assert_eq!((read[0].parameters.as_str(), read[1].name.as_str()), (r#"{"type":"object"}"#, "g"));
        assert!(tools("f").is_err());
    }

    #[test]
    fn what_is_no_conversation_is_told_the_form() {
        refused("Hi", "invalid type");
        refused("{content: Hi, role: user}", "unknown key `content`");
        refused("{message: []}", "did you mean `messages`?");
        refused("{messages: [{role: boss, content: Hi}]}", "messages[0].role");
        refused("{model: gpt-4, messages: []}", "unknown key `model`");
        refused("[{role: user, content: [{type: text}]}]", "[0].content");
        refused("", "invalid type");
    }
}
