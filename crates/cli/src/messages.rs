//! A conversation as people write it: a list of role and content.

use crate::documents;
use crate::images::Part;
use anyhow::Context as _;
use genmill_client::{Role, v1};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;

/// One message.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Message {
    role: Speaker,
    #[serde(default)]
    content: Content,
    #[serde(default)]
    tool_calls: Vec<ToolCall>,
    #[serde(default)]
    tool_call_id: String,
}

impl Message {
    /// What the person says and shows.
    pub(crate) const fn of_user(parts: Vec<Part>) -> Self {
        let content = Content::Parts(parts);
        Self { role: Speaker::User, content, tool_calls: Vec::new(), tool_call_id: String::new() }
    }
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

/// What a message says: a text, or a list of parts. A message that only calls tools says nothing.
#[derive(Clone, Debug, PartialEq)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

impl Default for Content {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// Reads it by hand: an error then still tells where it is.
impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Said;
        impl<'de> Visitor<'de> for Said {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of parts")
            }

            fn visit_unit<E>(self) -> Result<Content, E> {
                Ok(Content::default())
            }

            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut listed: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = listed.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(Said)
    }
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

/// The messages as a request carries them; files of images are read.
pub(crate) fn input(messages: Vec<Message>) -> anyhow::Result<v1::generation_request::Input> {
    let message = |Message { role, content, tool_calls, tool_call_id }| {
        let role = match role {
            Speaker::System => Role::System,
            Speaker::User => Role::User,
            Speaker::Assistant => Role::Assistant,
            Speaker::Tool => Role::Tool,
        };
        let tool_calls = tool_calls.into_iter().map(ToolCall::into_message).collect();
        let (content, parts) = match content {
            Content::Text(text) => (text, Vec::new()),
            Content::Parts(parts) => (String::new(), parts),
        };
        let parts = parts.into_iter().map(Part::into_message).collect::<anyhow::Result<_>>()?;
        Ok(v1::ChatMessage { role: v1::Role::from(role).into(), content, tool_calls, tool_call_id, parts })
    };
    let messages = messages.into_iter().map(message).collect::<anyhow::Result<_>>()?;
    Ok(v1::generation_request::Input::Messages(v1::ChatMessages { messages }))
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
        let v1::generation_request::Input::Messages(chat) = input(read(text).unwrap()).unwrap() else {
            panic!("a prompt")
        };
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
    fn parts_are_read_as_chat_apis_write_them() {
        let text = r#"[{"role": "user", "content": [{"type": "text", "text": "Which animal?"},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}]}]"#;
        let v1::generation_request::Input::Messages(chat) = input(read(text).unwrap()).unwrap() else {
            panic!("a prompt")
        };
        let mut image = v1::Image::from(v1::image::Source::Url("https://example.com/a.png".to_owned()));
        image.set_detail(v1::ImageDetail::Low);
        let expect = [v1::ContentPart::text("Which animal?"), v1::ContentPart::of(image)];
        assert_eq!((chat.messages[0].content.as_str(), &chat.messages[0].parts[..]), ("", &expect[..]));
        assert!(input(read("- {role: user, content: [{type: image, file: no/such}]}").unwrap()).is_err());
        refused("- {role: user, content: [{type: image_url, image_url: a}, {type: sound}]}", "[0].content[1]");
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
