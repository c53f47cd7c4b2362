//! What steers a generation beyond the usual parameters, the form its text must have, and the tools its model may call.
//!
//! Never here: whether a schema or a grammar can be compiled (whoever admits a request asks a compiler).

use crate::request::{Input, Invalid, rule};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What steers a generation. The default steers nothing; nothing is filled in at admission, so a job has what its
/// request had. The semantics are those of vLLM's `SamplingParams` (<https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html>),
/// which took OpenAI's for the names that both have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Controls {
    /// Only tokens of at least this part of the best token's probability, after temperature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Added to the logits of tokens before anything else.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f64>,
    /// No end before so many tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tokens: Option<u32>,
    /// Generation ends before the first of these tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop_token_ids: Vec<u32>,
    /// The model's own end tokens do not end the text.
    #[serde(skip_serializing_if = "is_false")]
    pub ignore_eos: bool,
    /// Taken from a token's logit for each time it was generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// Taken from a token's logit when it was generated at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// Divides positive and multiplies negative logits of tokens of prompt and text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// How many texts; 1 when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// Log probabilities of the tokens of the text, and of so many of the best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// The same of the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<u32>,
    /// The text begins with the prompt.
    #[serde(skip_serializing_if = "is_false")]
    pub echo: bool,
    /// The form that the text must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub structured_output: Option<StructuredOutput>,
    /// What the model may call.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// Whether the model calls its tools; as it likes when unset. For remote models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<ToolChoice>,
    /// How long the model thinks before it answers. For remote models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_effort: Option<ReasoningEffort>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_false(value: &bool) -> bool {
    !value
}

/// The form of a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StructuredOutput {
    /// A JSON value that a JSON schema allows; the schema as JSON text.
    JsonSchema(String),
    /// The whole text matches a regular expression.
    Regex(String),
    /// The text is one of these.
    Choice(Vec<String>),
    /// The text is a sentence of a grammar in Lark's notation.
    Lark(String),
}

impl StructuredOutput {
    /// The field in which the API has it.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "structured_output.json_schema",
            Self::Regex(_) => "structured_output.regex",
            Self::Choice(_) => "structured_output.choice",
            Self::Lark(_) => "structured_output.lark",
        }
    }

    fn text_bytes(&self) -> usize {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(choices) => choices.iter().map(String::len).sum(),
        }
    }
}

/// A function that the model may ask its caller to call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// The JSON schema of its arguments as JSON text; empty: it has none.
    pub parameters: String,
}

/// Whether a model calls its tools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// As it likes.
    Auto,
    /// It does not.
    None,
    /// It calls one or more.
    Required,
    /// It calls the one of this name.
    Tool(String),
}

/// How long a model thinks before it answers, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningEffort {
    /// Not at all.
    None,
    /// Hardly.
    Minimal,
    /// Shortly.
    Low,
    /// In between.
    Medium,
    /// Long.
    High,
}

impl ReasoningEffort {
    /// The name that providers use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// A call that a model asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Names the call in its conversation.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

impl ToolCall {
    /// The bytes of text that it carries.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        self.id.len() + self.name.len() + self.arguments.len()
    }
}

/// The largest schema, expression or grammar, in bytes.
pub const STRUCTURE_BYTES_MAX: usize = 64 * 1024;

/// The most samples of one request.
pub const SAMPLES_MAX: u32 = 128;

/// The most of the best tokens whose log probabilities are told.
pub const LOGPROBS_MAX: u32 = 20;

impl Controls {
    /// Whether nothing is steered.
    #[must_use]
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }

    /// How many texts are asked for.
    #[must_use]
    pub fn samples(&self) -> u32 {
        self.n.unwrap_or(1)
    }

    /// Bytes of text in it.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        let tools = self.tools.iter().map(|tool| tool.name.len() + tool.description.len() + tool.parameters.len());
        self.structured_output.as_ref().map_or(0, StructuredOutput::text_bytes) + tools.sum::<usize>()
    }

    /// Checks every rule that needs nothing but the request.
    ///
    /// # Errors
    /// [`Invalid`] for the first broken rule.
    pub fn check(&self, input: &Input) -> Result<(), Invalid> {
        self.check_choice_of_tokens()?;
        self.check_ends()?;
        self.check_what_is_told(input)?;
        self.check_structure()?;
        self.check_tools(input)
    }

    fn check_choice_of_tokens(&self) -> Result<(), Invalid> {
        let within = |value: Option<f64>, low: f64, high: f64| value.is_none_or(|value| (low..=high).contains(&value));
        rule(within(self.min_p, 0.0, 1.0), "min_p", || "must be 0 to 1; leave it out for all tokens".to_owned())?;
        rule(within(self.frequency_penalty, -2.0, 2.0), "frequency_penalty", || "must be -2 to 2".to_owned())?;
        rule(within(self.presence_penalty, -2.0, 2.0), "presence_penalty", || "must be -2 to 2".to_owned())?;
        rule(within(self.repetition_penalty, 0.01, 10.0), "repetition_penalty", || {
            "must be 0.01 to 10; 1 changes nothing".to_owned()
        })?;
        rule(self.logit_bias.len() <= 1_024, "logit_bias", || {
            format!("{} tokens; at most 1,024", self.logit_bias.len())
        })?;
        rule(self.logit_bias.values().all(|bias| within(Some(*bias), -100.0, 100.0)), "logit_bias", || {
            "a bias must be -100 to 100".to_owned()
        })
    }

    fn check_ends(&self) -> Result<(), Invalid> {
        rule(self.stop_token_ids.len() <= 64, "stop_token_ids", || {
            format!("{} tokens; at most 64", self.stop_token_ids.len())
        })?;
        let structured = self.structured_output.is_some();
        rule(!structured || self.min_tokens.is_none(), "min_tokens", || {
            "cannot go with structured_output, which tells where the text ends".to_owned()
        })?;
        rule(!structured || !self.ignore_eos, "ignore_eos", || {
            "cannot go with structured_output, which tells where the text ends".to_owned()
        })
    }

    fn check_what_is_told(&self, input: &Input) -> Result<(), Invalid> {
        rule(self.n.is_none_or(|n| (1..=SAMPLES_MAX).contains(&n)), "n", || format!("must be 1 to {SAMPLES_MAX}"))?;
        let fits = |top: Option<u32>| top.is_none_or(|top| top <= LOGPROBS_MAX);
        rule(fits(self.logprobs), "logprobs", || format!("must be 0 to {LOGPROBS_MAX}"))?;
        rule(fits(self.prompt_logprobs), "prompt_logprobs", || format!("must be 0 to {LOGPROBS_MAX}"))?;
        rule(!self.echo || matches!(input, Input::Prompt(_)), "echo", || {
            "needs a prompt: messages are not a text that could be repeated".to_owned()
        })
    }

    fn check_structure(&self) -> Result<(), Invalid> {
        let Some(structure) = &self.structured_output else { return Ok(()) };
        let (field, bytes) = (structure.field(), structure.text_bytes());
        rule(bytes <= STRUCTURE_BYTES_MAX, field, || format!("{bytes} bytes; at most {STRUCTURE_BYTES_MAX}"))?;
        rule(bytes > 0, field, || "must not be empty".to_owned())?;
        match structure {
            StructuredOutput::Choice(choices) => {
                rule(choices.iter().all(|choice| !choice.is_empty()), field, || "no choice may be empty".to_owned())
            }
            StructuredOutput::JsonSchema(_) | StructuredOutput::Regex(_) | StructuredOutput::Lark(_) => Ok(()),
        }
    }

    fn check_tools(&self, input: &Input) -> Result<(), Invalid> {
        self.check_tool_choice()?;
        if self.tools.is_empty() {
            return Ok(());
        }
        rule(matches!(input, Input::Messages(_)), "tools", || {
            "need messages: a prompt has no place for them".to_owned()
        })?;
        rule(self.structured_output.is_none(), "tools", || "cannot go with structured_output".to_owned())?;
        rule(self.tools.len() <= 128, "tools", || format!("{} tools; at most 128", self.tools.len()))?;
        let letter = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '-' || letter == '.';
        let named = |tool: &Tool| (1..=64).contains(&tool.name.len()) && tool.name.chars().all(letter);
        rule(self.tools.iter().all(named), "tools", || {
            "a name must have 1 to 64 characters of [A-Za-z0-9._-]".to_owned()
        })
    }

    fn check_tool_choice(&self) -> Result<(), Invalid> {
        let field = "tool_choice";
        rule(self.tool_choice.is_none() || !self.tools.is_empty(), field, || "needs tools".to_owned())?;
        let Some(ToolChoice::Tool(name)) = &self.tool_choice else { return Ok(()) };
        rule(self.tools.iter().any(|tool| tool.name == *name), field, || "names none of the tools".to_owned())
    }

    /// Checks what no local model is asked for.
    ///
    /// # Errors
    /// [`Invalid`] for the first such thing.
    pub fn check_local(&self) -> Result<(), Invalid> {
        let remote = |asked: bool, field: &'static str| {
            rule(!asked, field, || "is for remote models; local ones do not take it".to_owned())
        };
        let forced = self.tool_choice.as_ref().is_some_and(|choice| *choice != ToolChoice::Auto);
        remote(forced, "tool_choice")?;
        remote(self.reasoning_effort.is_some(), "reasoning_effort")
    }

    /// Checks what no remote model is asked for: what its providers do not do, or do in ways that differ.
    ///
    /// # Errors
    /// [`Invalid`] for the first such thing.
    pub fn check_remote(&self) -> Result<(), Invalid> {
        let local = |asked: bool, field: &'static str| {
            rule(!asked, field, || "is for local models; providers do not take it".to_owned())
        };
        local(self.min_tokens.is_some(), "min_tokens")?;
        local(!self.stop_token_ids.is_empty(), "stop_token_ids")?;
        local(self.ignore_eos, "ignore_eos")?;
        local(self.prompt_logprobs.is_some(), "prompt_logprobs")?;
        local(self.echo, "echo")?;
        match &self.structured_output {
            Some(StructuredOutput::JsonSchema(_)) | None => Ok(()),
            Some(other) => local(true, other.field()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{ChatMessage, Role};

    fn check(change: impl FnOnce(&mut Controls), field: Option<&str>) {
        let mut controls = Controls::default();
        change(&mut controls);
        let input = Input::Prompt("a".to_owned());
        assert_eq!(controls.check(&input).err().map(|invalid| invalid.field), field);
    }

    fn tool(name: &str) -> Tool {
        Tool { name: name.to_owned(), description: String::new(), parameters: String::new() }
    }

    #[test]
    fn each_rule_names_its_field() {
        check(|_| (), None);
        check(|c| c.min_p = Some(1.5), Some("min_p"));
        check(|c| c.min_p = Some(f64::NAN), Some("min_p"));
        check(|c| c.frequency_penalty = Some(2.1), Some("frequency_penalty"));
        check(|c| c.presence_penalty = Some(-2.1), Some("presence_penalty"));
        check(|c| c.repetition_penalty = Some(0.0), Some("repetition_penalty"));
        check(|c| c.logit_bias = [(1, 101.0)].into(), Some("logit_bias"));
        check(|c| c.logit_bias = (0..1_025).map(|token| (token, 0.0)).collect(), Some("logit_bias"));
        check(|c| c.stop_token_ids = vec![1; 65], Some("stop_token_ids"));
        check(|c| c.n = Some(0), Some("n"));
        check(|c| c.n = Some(129), Some("n"));
        check(|c| c.logprobs = Some(21), Some("logprobs"));
        check(|c| c.prompt_logprobs = Some(21), Some("prompt_logprobs"));
        check(|c| c.tools = vec![tool("f")], Some("tools"));
        let regex = |text: &str| Some(StructuredOutput::Regex(text.to_owned()));
        check(|c| c.structured_output = regex("a*"), None);
        check(|c| c.structured_output = regex(""), Some("structured_output.regex"));
        check(|c| c.structured_output = regex(&"a".repeat(65_537)), Some("structured_output.regex"));
        check(|c| (c.structured_output, c.min_tokens) = (regex("a"), Some(1)), Some("min_tokens"));
        check(|c| (c.structured_output, c.ignore_eos) = (regex("a"), true), Some("ignore_eos"));
        let choice = StructuredOutput::Choice(vec!["a".to_owned(), String::new()]);
        check(|c| c.structured_output = Some(choice), Some("structured_output.choice"));
    }

    #[test]
    fn tools_need_messages_and_messages_have_no_echo() {
        let input = Input::Messages(vec![ChatMessage::new(Role::User, "Hi")]);
        let with = |tools: &[&str], echo| {
            let controls =
                Controls { tools: tools.iter().map(|name| tool(name)).collect(), echo, ..Controls::default() };
            controls.check(&input).err().map(|invalid| invalid.field)
        };
        assert_eq!((with(&["get-weather_2"], false), with(&["a b"], false)), (None, Some("tools")));
        assert_eq!(with(&[], true), Some("echo"));
    }

    #[test]
    fn remote_models_are_not_asked_for_what_providers_do_not_do() {
        let refused = |controls: Controls| controls.check_remote().err().map(|invalid| invalid.field);
        let schema = StructuredOutput::JsonSchema("{}".to_owned());
        let usual = Controls { frequency_penalty: Some(1.0), structured_output: Some(schema), ..Controls::default() };
        assert_eq!(refused(usual), None);
        assert_eq!(refused(Controls { n: Some(2), ..Controls::default() }), None);
        assert_eq!(refused(Controls { echo: true, ..Controls::default() }), Some("echo"));
        let lark = Some(StructuredOutput::Lark("start: \"a\"".to_owned()));
        assert_eq!(
            refused(Controls { structured_output: lark, ..Controls::default() }),
            Some("structured_output.lark")
        );
    }
}
