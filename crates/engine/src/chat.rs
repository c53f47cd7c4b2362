//! Chat templates: messages to the text of a prompt, as transformers renders them.
//!
//! Never here: tokens. The clock is an argument: a template that prints the date prints the one
//! it is given, so a retry of the same request gets the same prompt.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Kwargs, Object, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, context};

use crate::error::LoadError;
use crate::tools::{Call, CallFormat, Tool};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Mostly `system`, `user` or `assistant`; the template decides what it knows.
    pub role: String,
    /// The text.
    pub content: String,
    /// The calls that the model asked for in one of its messages, with their ids.
    pub calls: Vec<(String, Call)>,
    /// The call that a tool's message answers; empty: none.
    pub call_id: String,
}

impl ChatMessage {
    /// A message without calls.
    #[must_use]
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), calls: Vec::new(), call_id: String::new() }
    }
}

/// A message is a map in a template, with its keys in the order that transformers has.
impl Object for ChatMessage {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "role" => Some(Value::from(&self.role)),
            "content" => Some(Value::from(&self.content)),
            "tool_calls" if !self.calls.is_empty() => Some(self.calls.iter().map(call_value).collect()),
            "tool_call_id" if !self.call_id.is_empty() => Some(Value::from(&self.call_id)),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Str(match (self.calls.is_empty(), self.call_id.is_empty()) {
            (true, true) => &["role", "content"],
            (false, true) => &["role", "content", "tool_calls"],
            (true, false) => &["role", "content", "tool_call_id"],
            (false, false) => &["role", "content", "tool_calls", "tool_call_id"],
        })
    }
}

/// A call as templates see it: its arguments are an object, where they are one.
fn call_value((id, call): &(String, Call)) -> Value {
    let function = context! { name => &call.name, arguments => parsed(&call.arguments) };
    Value::from_pairs([("id", Value::from(id)), ("type", Value::from("function")), ("function", function)])
}

/// A JSON text as the value that it stands for; any other text as it is.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).map_or_else(|_| Value::from(text), |value| of_json(&value))
}

fn of_json(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(bool) => Value::from(*bool),
        serde_json::Value::Number(number) => {
            let whole = number.as_i64().map(Value::from).or_else(|| number.as_u64().map(Value::from));
            whole.unwrap_or_else(|| Value::from(number.as_f64()))
        }
        serde_json::Value::String(text) => Value::from(text),
        serde_json::Value::Array(items) => items.iter().map(of_json).collect(),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), of_json(value))))
        }
    }
}

/// A tool as templates see it, with its keys in the order in which they were written.
fn tool_value(tool: &Tool) -> Value {
    let mut function = vec![("name", Value::from(&tool.name))];
    if !tool.description.is_empty() {
        function.push(("description", Value::from(&tool.description)));
    }
    if !tool.parameters.is_empty() {
        function.push(("parameters", parsed(&tool.parameters)));
    }
    Value::from_pairs([("type", Value::from("function")), ("function", Value::from_pairs(function))])
}

/// A compiled chat template with the names of the special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    call_format: Option<CallFormat>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template; `special_tokens` are variables such as `bos_token`, and `path` is for
    /// messages.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn compile(path: &Path, source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, LoadError> {
        let wrong = |source| LoadError::Template { path: path.to_owned(), source };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(wrong)?);
        // What else an error would hold is the template's values, and whoever drops it has a small stack.
        environment.set_debug(false);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        // To Jinja, nothing is not iterable; to minijinja it is an empty list.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(wrong)?;
        Ok(Self { environment, special_tokens, call_format: CallFormat::of_template(source) })
    }

    /// How its model writes calls of tools; `None` when it knows none.
    #[must_use]
    pub fn call_format(&self) -> Option<CallFormat> {
        self.call_format
    }

    /// The prompt for the assistant's next turn, with the tools that it may call. `now_unix_s` is what `strftime_now` shows, in
    /// UTC.
    ///
    /// # Errors
    /// When the template raises an exception, cannot handle these messages, or would go on for ever.
    pub fn render(&self, messages: &[ChatMessage], tools: &[Tool], now_unix_s: u64) -> Result<String, Error> {
        let failed = |reason: &str| Error::new(ErrorKind::InvalidOperation, reason.to_owned());
        let render = || {
            catch_unwind(AssertUnwindSafe(|| self.render_here(messages, tools, now_unix_s)))
                .unwrap_or_else(|_| Err(failed("the template engine panicked")))
        };
        // Values in values, as deep as the fuel lets a template nest them, are shown and dropped by recursion.
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("genmill-template".to_owned()).stack_size(STACK_BYTES);
            let rendering = thread.spawn_scoped(scope, render).map_err(|error| failed(&error.to_string()))?;
            rendering.join().unwrap_or_else(|_| Err(failed("the template engine panicked")))
        })
    }

    fn render_here(&self, messages: &[ChatMessage], tools: &[Tool], now_unix_s: u64) -> Result<String, Error> {
        let mut environment = self.environment.clone();
        let parts = u64::try_from(messages.len() + tools.len()).unwrap_or(u64::MAX);
        environment.set_fuel(Some(parts.saturating_mul(FUEL_PER_PART).saturating_add(FUEL)));
        let tools = if tools.is_empty() { Value::from(()) } else { tools.iter().map(tool_value).collect() };
        let messages: Vec<Value> = messages.iter().cloned().map(Value::from_object).collect();
        let now = Value::from_function(move |format: &str| strftime(now_unix_s, format));
        let special = self.special_tokens.iter().map(|(name, token)| (name.as_str(), token));
        let context = context! {
            messages => messages,
            add_generation_prompt => true,
            tools => tools,
            documents => Value::from(()),
            strftime_now => now,
            ..Value::from_pairs(special)
        };
        let mut out = Bounded(Vec::new());
        environment.get_template(NAME)?.render_captured_to(context, &mut out)?;
        // A template writes strings.
        Ok(String::from_utf8(out.0).unwrap_or_default())
    }
}

/// Instructions that a template may take, and more for each message and tool. Those of known models take a few hundred
/// for each.
const FUEL: u64 = 100_000;
const FUEL_PER_PART: u64 = 5_000;

/// Enough to drop what so many instructions can nest; only what is used of it is ever memory.
const STACK_BYTES: usize = 64 << 20;

/// A longer text is no prompt of any model.
const TEXT_BYTES_MAX: usize = 64 << 20;

/// The text of a template on its way.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_BYTES_MAX {
            return Err(io::Error::other(format!("the text is longer than {TEXT_BYTES_MAX} bytes")));
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// transformers marks the assistant's part with `{% generation %}`, which does not change the
/// text; a condition that holds has the same white space rules.
fn without_generation_tags(source: &str) -> String {
    let mut text = source.to_owned();
    for (dash, other) in [("", ""), ("-", ""), ("", "-"), ("-", "-")] {
        let tag = |name: &str| format!("{{%{dash} {name} {other}%}}");
        text = text.replace(&tag("generation"), &tag("if true"));
        text = text.replace(&tag("endgeneration"), &tag("endif"));
    }
    text
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// `json.dumps` of Python as transformers calls it: unlike the filter of Jinja, it escapes neither HTML nor, unless told
/// to, other alphabets.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let separators = match separators.as_deref() {
        None => [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned),
        Some([items, keys]) => [items.clone(), keys.clone()],
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two separators")),
    };
    let mut writer = JsonWriter {
        indent,
        ascii: ascii.unwrap_or_default(),
        sorted: sorted.unwrap_or_default(),
        separators,
        out: String::new(),
    };
    writer.write(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

struct JsonWriter {
    indent: Option<usize>,
    ascii: bool,
    sorted: bool,
    /// Between items, and after a key.
    separators: [String; 2],
    out: String,
}

impl JsonWriter {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::String => self.quote(value.as_str().unwrap_or_default()),
            ValueKind::Undefined | ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.surround("[]", items, depth, |writer, item| writer.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort_by_key(ToString::to_string);
                }
                self.surround("{}", keys, depth, |writer, key| {
                    writer.quote(&key.to_string());
                    let separator = writer.separators[1].clone();
                    writer.out.push_str(&separator);
                    writer.write(&value.get_item(key)?, depth + 1)
                })?;
            }
            _ => self.out.push_str(&value.to_string()),
        }
        Ok(())
    }

    /// Items between two brackets.
    fn surround(
        &mut self,
        brackets: &str,
        items: Vec<Value>,
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (open, close) = brackets.split_at(1);
        self.out.push_str(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                let separator = self.separators[0].clone();
                self.out.push_str(&separator);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.out.push_str(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width.saturating_mul(depth)));
        }
    }

    fn quote(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ascii {
            return self.out.push_str(&quoted);
        }
        for letter in quoted.chars() {
            if letter.is_ascii() {
                self.out.push(letter);
            } else {
                let units = letter.encode_utf16(&mut [0; 2]).to_vec();
                self.out.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `datetime.strftime` of Python in UTC, for the codes that templates use.
fn strftime(now_unix_s: u64, format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let code = match letters.next() {
            Some('-') => format!("-{}", letters.next().unwrap_or(' ')),
            other => other.unwrap_or(' ').to_string(),
        };
        let part = time_part(now_unix_s, &code).ok_or_else(|| {
            let message = format!("strftime_now does not know %{code}");
            Error::new(ErrorKind::InvalidOperation, message)
        })?;
        out.push_str(&part);
    }
    Ok(out)
}

/// What one code of `strftime` stands for.
fn time_part(now_unix_s: u64, code: &str) -> Option<String> {
    let (days, seconds) = (now_unix_s / 86_400, now_unix_s % 86_400);
    let (year, month, day) = date(days);
    let month_name = name(&MONTHS, month - 1);
    let day_name = name(&DAYS, days % 7);
    let hour = seconds / 3600;
    Some(match code {
        "Y" => year.to_string(),
        "y" => format!("{:02}", year % 100),
        "m" => format!("{month:02}"),
        "-m" => month.to_string(),
        "B" => month_name.to_owned(),
        "b" => month_name[..3].to_owned(),
        "d" => format!("{day:02}"),
        "-d" => day.to_string(),
        "A" => day_name.to_owned(),
        "a" => day_name[..3].to_owned(),
        "H" => format!("{hour:02}"),
        "I" => format!("{:02}", (hour + 11) % 12 + 1),
        "p" => if hour < 12 { "AM" } else { "PM" }.to_owned(),
        "M" => format!("{:02}", seconds / 60 % 60),
        "S" => format!("{:02}", seconds % 60),
        "%" => "%".to_owned(),
        _ => return None,
    })
}

fn name<'a>(names: &[&'a str], index: u64) -> &'a str {
    usize::try_from(index).ok().and_then(|index| names.get(index)).copied().unwrap_or("unknown")
}

/// Year, month and day of a day since 1970 ("civil_from_days", H. Hinnant, chrono-compatible
/// low-level date algorithms).
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(template: &str, expected: &str) {
        let tokens = vec![("bos_token".to_owned(), "<s>".to_owned())];
        let template = ChatTemplate::compile(Path::new("t"), template, tokens).unwrap();
        let messages = [ChatMessage::new("system", " Be <brief> & kind. "), ChatMessage::new("user", "Où ?")];
        assert_eq!(template.render(&messages, &[], 1_732_147_445).unwrap(), expected);
    }

    #[test]
    fn templates_see_what_transformers_shows_them() {
        check("{{ bos_token }}{% if tools is none %}none{% endif %}", "<s>none");
        check("{{ messages[0].content.strip() }}", "Be <brief> & kind.");
        check("{{ messages[0]['content'] | trim | upper }}", "BE <BRIEF> & KIND.");
        check("{{ messages[1].content | tojson }}", "\"Où ?\"");
        check("{{ messages[1] | tojson }}", "{\"role\": \"user\", \"content\": \"Où ?\"}");
        check("{{ [1, true, none, 'a<b'] | tojson }}", "[1, true, null, \"a<b\"]");
        check("{{ [1, []] | tojson(indent=2) }}", "[\n  1,\n  []\n]");
        check(
            "{{ messages[1].content | tojson(ensure_ascii=True) }}{{ '🚀' | tojson(ensure_ascii=True) }}",
            r#""O\u00f9 ?""\ud83d\ude80""#,
        );
        check("{{ {'b': 1, 'a': [2, {}]} | tojson(sort_keys=True, separators=(',', ':')) }}", r#"{"a":[2,{}],"b":1}"#);
        check(
            "{{ tools is iterable }} {{ messages is iterable }} {{ 'a' is iterable }} {{ 1 is iterable }}",
            "False True True False",
        );
        check("{{ strftime_now('%d %b %Y %H:%M:%S %A %-d %p') }}", "21 Nov 2024 00:04:05 Thursday 21 AM");
        check(
            "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n",
            "system\nuser\n",
        );
        check("{% generation %}x{%- endgeneration -%} y", "xy");
        check("{{ messages[0].tool_calls is defined }}{{ undefined_name }}", "False");
    }

    #[test]
    fn tools_calls_and_answers_are_shown_as_transformers_does() {
        let tool = |name: &str, parameters: &str| Tool {
            name: name.to_owned(),
            description: "Adds.".to_owned(),
            parameters: parameters.to_owned(),
        };
        let call = Call { name: "add".to_owned(), arguments: r#"{"b": 2, "a": [1]}"#.to_owned() };
        let messages = [
            ChatMessage { calls: vec![("c1".to_owned(), call)], ..ChatMessage::new("assistant", "") },
            ChatMessage { call_id: "c1".to_owned(), ..ChatMessage::new("tool", "3") },
        ];
        let check = |template: &str, expected: &str| {
            let template = ChatTemplate::compile(Path::new("t"), template, vec![]).unwrap();
            let tools = [tool("add", r#"{"type": "object", "properties": {"b": {}, "a": {}}}"#)];
            assert_eq!(template.render(&messages, &tools, 0).unwrap(), expected);
        };
        let shown = r#"{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": "#;
        let schema = r#"{"type": "object", "properties": {"b": {}, "a": {}}}"#;
        check("{% for tool in tools %}{{ tool | tojson }}{% endfor %}", &format!("{shown}{schema}}}}}"));
        check(
            "{% for c in messages[0].tool_calls %}{{ c.function.name }} {{ c.function.arguments | tojson }} {{ c.id }}{% endfor %}",
            r#"add {"b": 2, "a": [1]} c1"#,
        );
        check("{{ messages[0].tool_calls is defined }} {{ 'tool_calls' in messages[1] }}", "True False");
        check(
            "{{ messages[1].tool_call_id }} {{ messages[1] | tojson }}",
            "c1 {\"role\": \"tool\", \"content\": \"3\", \"tool_call_id\": \"c1\"}",
        );
        check(
            "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
            "assistant",
        );
        check("{{ messages[1].content.startswith('3') }}{{ 'a,b'.split(',')[-1] }}", "Trueb");
    }

    #[test]
    fn an_exception_of_the_template_is_an_error() {
        let template = ChatTemplate::compile(Path::new("t"), "{{ raise_exception('only users') }}", vec![]);
        let error = template.unwrap().render(&[], &[], 0).unwrap_err();
        assert!(error.to_string().contains("only users"));
        assert!(ChatTemplate::compile(Path::new("t"), "{% if %}", vec![]).is_err());
    }

    #[test]
    fn a_template_that_would_go_on_for_ever_is_an_error() {
        let loops = "{% for i in range(90000) %}".repeat(3) + &"{% endfor %}".repeat(3);
        let nests =
            "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}";
        for (source, expected) in [
            (loops.as_str(), "fuel"),
            (nests, "fuel"),
            ("{% for i in range(9000) %}{{ 'x' * 9999 }}{% endfor %}", "failed to write"),
            ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion limit"),
            // minijinja 3.0.5 panics here.
            ("{% for m in messages[::-1] %}{% endfor %}", "panicked"),
        ] {
            let template = ChatTemplate::compile(Path::new("t"), source, vec![]).unwrap();
            let error = template.render(&[], &[], 0).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let nested =
            "{% set n = namespace(x=[]) %}{% for i in range(9000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}";
        let template = ChatTemplate::compile(Path::new("t"), nested, vec![]).unwrap();
        assert_eq!(template.render(&[], &[], 0).unwrap().len(), 18_002);
    }
}
