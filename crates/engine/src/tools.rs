//! Calls of tools in the text of a model: each family writes them in its own form, which its chat template tells.
//!
//! Never here: rendering (that is the template's), calling.

use serde_json::Value;

/// A function that the model may ask its caller to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// What it does; empty: not told.
    pub description: String,
    /// The JSON schema of its arguments as JSON text; empty: it has none.
    pub parameters: String,
}

/// A call that a model asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The function's name.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

/// How a family writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, any number of them, text around them: Qwen 2.5 and 3 and
    /// others that follow Hermes.
    Hermes,
    /// The whole text is `{"name": .., "parameters": {..}}`, several with `;` between: Llama 3.1 and later.
    Llama,
    /// `[TOOL_CALLS]` and a list of `{"name": .., "arguments": {..}}`, or a name and its arguments: Mistral. The marker
    /// is a special token, which is no text.
    Mistral,
}

/// Formats by what their templates hold, the first that is found.
const MARKS: [(&str, CallFormat); 4] = [
    ("<tool_call>", CallFormat::Hermes),
    ("[TOOL_CALLS]", CallFormat::Mistral),
    ("<|python_tag|>", CallFormat::Llama),
    ("\"parameters\": ", CallFormat::Llama),
];

impl CallFormat {
    /// The format that a chat template asks its model for; `None` when it knows no tools.
    #[must_use]
    pub fn of_template(source: &str) -> Option<Self> {
        MARKS.iter().find(|(mark, _)| source.contains(mark)).map(|(_, format)| *format)
    }

    /// The calls in a text, in order; those that cannot be read are left in the text alone. A call counts only when it
    /// is of one of `tools`.
    #[must_use]
    pub fn calls(self, text: &str, tools: &[Tool]) -> Vec<Call> {
        let calls = match self {
            Self::Hermes => hermes(text),
            Self::Llama => llama(text),
            Self::Mistral => mistral(text, tools),
        };
        calls.into_iter().filter(|call| tools.iter().any(|tool| tool.name == call.name)).collect()
    }
}

fn hermes(text: &str) -> Vec<Call> {
    // The last one may lack its end, which some models leave to their end token.
    let parts = text.split("<tool_call>").skip(1).map(|part| part.split("</tool_call>").next().unwrap_or(part));
    parts.filter_map(|part| call(&serde_json::from_str(part.trim()).ok()?)).collect()
}

fn llama(text: &str) -> Vec<Call> {
    let text = text.trim().trim_start_matches("<|python_tag|>").trim_start();
    if !text.starts_with('{') {
        return Vec::new();
    }
    let mut calls = Vec::new();
    let mut rest = text;
    while let Some((value, after)) = json(rest) {
        calls.extend(call(&value));
        rest = after.trim_start().trim_start_matches(';').trim_start();
    }
    calls
}

fn mistral(text: &str, tools: &[Tool]) -> Vec<Call> {
    // Later versions begin every call with the marker: a name, perhaps [ARGS], and the arguments.
    let one = |part: &str| {
        let tool = tools.iter().filter(|tool| part.starts_with(&tool.name)).max_by_key(|tool| tool.name.len())?;
        let rest = part.strip_prefix(&tool.name)?.trim_start();
        let (arguments, _) = json(rest.strip_prefix("[ARGS]").unwrap_or(rest))?;
        arguments.is_object().then(|| Call { name: tool.name.clone(), arguments: arguments.to_string() })
    };
    let all = |part: &str| match json(part) {
        Some((Value::Array(list), _)) => list.iter().filter_map(call).collect(),
        _ => one(part).into_iter().collect::<Vec<_>>(),
    };
    text.split("[TOOL_CALLS]").flat_map(|part| all(part.trim_start())).collect()
}

/// The JSON value that a text begins with, and what follows it.
fn json(text: &str) -> Option<(Value, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let value = values.next()?.ok()?;
    Some((value, text.get(values.byte_offset()..)?))
}

/// A call as a JSON object: arguments under either name, as an object or as its text.
fn call(value: &Value) -> Option<Call> {
    let name = value.get("name")?.as_str()?.to_owned();
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => {
            serde_json::from_str::<Value>(text).ok().filter(Value::is_object)?;
            text.clone()
        }
        Some(object @ Value::Object(_)) => object.to_string(),
        Some(_) => return None,
    };
    Some(Call { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: CallFormat, text: &str, expected: &[(&str, &str)]) {
        let tool = |name: &str| Tool { name: name.to_owned(), description: String::new(), parameters: String::new() };
        let calls = format.calls(text, &[tool("add"), tool("add_all"), tool("now")]);
        let calls: Vec<_> = calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
        assert_eq!(calls, expected, "{text}");
    }

    #[test]
    fn qwen_writes_calls_between_tags() {
        let one = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        check(CallFormat::Hermes, one, &[("add", r#"{"a":1}"#)]);
        let two = format!("I will.\n{one}\n<tool_call>\n{{\"name\": \"now\", \"arguments\": {{}}}}");
        check(CallFormat::Hermes, &two, &[("add", r#"{"a":1}"#), ("now", "{}")]);
        check(CallFormat::Hermes, "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>", &[]);
        check(CallFormat::Hermes, "<tool_call>\n{\"name\": \"add\", \"argu", &[]);
        check(CallFormat::Hermes, "{\"name\": \"add\", \"arguments\": {}}", &[]);
    }

    #[test]
    fn llama_writes_an_object_and_nothing_else() {
        check(CallFormat::Llama, "{\"name\": \"add\", \"parameters\": {\"a\": \"1\"}}", &[("add", r#"{"a":"1"}"#)]);
        let two = "<|python_tag|>{\"name\": \"add\", \"parameters\": {}}; {\"name\": \"now\", \"parameters\": {}}";
        check(CallFormat::Llama, two, &[("add", "{}"), ("now", "{}")]);
        check(CallFormat::Llama, "Use {\"name\": \"add\", \"parameters\": {}}", &[]);
        check(CallFormat::Llama, "{\"name\": \"add\", \"parameters\": [1]}", &[]);
    }

    #[test]
    fn mistral_writes_a_list_or_names() {
        let list = "[{\"name\": \"add\", \"arguments\": {\"a\": 1}}, {\"name\": \"now\", \"arguments\": {}}]";
        check(CallFormat::Mistral, list, &[("add", r#"{"a":1}"#), ("now", "{}")]);
        check(CallFormat::Mistral, &format!("[TOOL_CALLS] {list}"), &[("add", r#"{"a":1}"#), ("now", "{}")]);
        check(CallFormat::Mistral, "[TOOL_CALLS]add_all[ARGS]{\"a\": [1]}", &[("add_all", r#"{"a":[1]}"#)]);
        check(CallFormat::Mistral, "add{\"a\": 1}[TOOL_CALLS]now{}", &[("add", r#"{"a":1}"#), ("now", "{}")]);
        check(CallFormat::Mistral, "The answer is add.", &[]);
    }

    #[test]
    fn a_template_tells_the_format() {
        assert_eq!(CallFormat::of_template("{{ '<tool_call>' }}"), Some(CallFormat::Hermes));
        assert_eq!(CallFormat::of_template("{{ \"[TOOL_CALLS] [\" }}"), Some(CallFormat::Mistral));
        assert_eq!(CallFormat::of_template("{{ \"<|python_tag|>\" }}"), Some(CallFormat::Llama));
        assert_eq!(CallFormat::of_template("{{ messages }}"), None);
    }
}
