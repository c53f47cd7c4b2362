//! What a caller asks for, and the rules it must keep. Never here: whether anybody can serve it (see `admit`).

use crate::controls::{Controls, ToolCall};
use crate::image::{Image, Part};
use crate::model::ModelName;
use crate::names::{Experiment, Tenant};
use crate::time::UnixMs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Who speaks in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Instructions to the model.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What a tool that the model called has answered.
    Tool,
}

impl Role {
    /// The name that providers and chat templates use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What is said. Empty when it has parts.
    pub content: String,
    /// What is said in text and images, when there are any images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// What the model asked to be called, in one of its own messages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool's message answers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tool_call_id: String,
}

impl ChatMessage {
    /// A message without calls.
    #[must_use]
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        let content = content.into();
        Self { role, content, parts: Vec::new(), tool_calls: Vec::new(), tool_call_id: String::new() }
    }

    /// The texts that it says, one after the other.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let texts = self.parts.iter().filter_map(|part| if let Part::Text(text) = part { Some(text) } else { None });
        std::iter::once(&self.content).chain(texts).map(String::as_str)
    }

    /// The images that it shows.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.parts.iter().filter_map(|part| if let Part::Image(image) = part { Some(image) } else { None })
    }

    fn text_bytes(&self) -> usize {
        self.texts().map(str::len).sum::<usize>() + self.tool_calls.iter().map(ToolCall::text_bytes).sum::<usize>()
    }
}

/// What is to be continued or answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// Plain text.
    Prompt(String),
    /// A conversation, oldest message first.
    Messages(Vec<ChatMessage>),
}

impl Input {
    /// Bytes of text in it.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Prompt(prompt) => prompt.len(),
            Self::Messages(messages) => messages.iter().map(ChatMessage::text_bytes).sum(),
        }
    }

    /// The images in it.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        let messages = if let Self::Messages(messages) = self { &messages[..] } else { &[] };
        messages.iter().flat_map(ChatMessage::images)
    }
}

/// Which jobs go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Somebody is waiting for the answer.
    Interactive,
    /// The usual class.
    #[default]
    Normal,
    /// Large runs that may take what is left.
    Bulk,
}

impl Priority {
    /// The weight of the highest class, which a job that waits grows towards and never beyond.
    pub const WEIGHT_MAX: u32 = 100;

    /// A waiting job weighs twice as much after each such time, in milliseconds.
    pub const AGING_MS: u64 = 60_000;

    /// The share of a lane that a tenant's class gets, relative to other classes and tenants that have work.
    #[must_use]
    pub const fn weight(self) -> u32 {
        match self {
            Self::Interactive => Self::WEIGHT_MAX,
            Self::Normal => 10,
            Self::Bulk => 1,
        }
    }

    /// The one-letter code under which backlogs are stored.
    #[must_use]
    pub const fn code(self) -> char {
        match self {
            Self::Interactive => 'i',
            Self::Normal => 'n',
            Self::Bulk => 'b',
        }
    }
}

/// How tokens are picked. Unset means "all" for `top_p` and `top_k`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Upper bound of generated tokens.
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus sampling, in (0, 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Only the k most likely tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Generation ends before the first of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// What else steers them.
    #[serde(default, skip_serializing_if = "Controls::is_off")]
    pub controls: Controls,
}

/// How a job gets to its provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// In a batch where the provider takes them and the job has slack (see [`Request::has_slack`]), else by a call of its own.
    #[default]
    Auto,
    /// By a call of its own.
    Direct,
    /// In a batch, at the provider's price for batches.
    Batch,
}

impl Mode {
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// A job whose deadline is so far away, in milliseconds, can wait for a batch: providers promise a day. A little less, because
/// callers count from before they submit.
const SLACK_MS: u64 = (24 * 60 - 5) * 60_000;

/// A request as its caller wrote it: what is unset is for admission to fill in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The model.
    pub model: ModelName,
    /// What is to be continued or answered.
    pub input: Input,
    /// Upper bound of generated tokens.
    pub max_tokens: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    pub top_p: Option<f64>,
    /// Only the k most likely tokens.
    pub top_k: Option<u32>,
    /// Seed of the random numbers.
    pub seed: Option<u64>,
    /// Stop strings.
    pub stop: Vec<String>,
    /// What else steers the generation.
    #[serde(default, skip_serializing_if = "Controls::is_off")]
    pub controls: Controls,
    /// Free key-value pairs.
    pub labels: BTreeMap<String, String>,
    /// Who the job belongs to.
    pub tenant: Tenant,
    /// What it is part of.
    pub experiment: Option<Experiment>,
    /// Which jobs go first.
    pub priority: Priority,
    /// Makes submission idempotent.
    pub request_id: Option<String>,
    /// Bound of one attempt, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// When the job expires.
    pub deadline: Option<UnixMs>,
    /// No attempt starts earlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<UnixMs>,
    /// How the job gets to its provider.
    #[serde(default, skip_serializing_if = "Mode::is_auto")]
    pub mode: Mode,
}

/// A rule that a request breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// The field, as the API names it.
    pub field: &'static str,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl Invalid {
    /// Says what is wrong with a field.
    #[must_use]
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

/// The most images of a request.
const IMAGES_MAX: usize = 100;

/// The most text and images a request, or text a result may carry, in bytes: a job with both must fit into a gRPC message
/// of 4 MiB.
pub const TEXT_BYTES_MAX: usize = 3 * 512 * 1024;

impl Request {
    /// Whether nobody waits for the job: it is of the bulk class and has a day or more until its deadline.
    #[must_use]
    pub fn has_slack(&self, now: UnixMs) -> bool {
        let left_ms = |deadline: UnixMs| deadline.ms_since(self.not_before.unwrap_or(now).max(now));
        self.priority == Priority::Bulk && self.deadline.is_some_and(|deadline| left_ms(deadline) >= SLACK_MS)
    }

    /// Checks every rule that needs nothing but the request and the time.
    ///
    /// # Errors
    /// [`Invalid`] for the first broken rule.
    pub fn check(&self, now: UnixMs) -> Result<(), Invalid> {
        self.check_input()?;
        self.check_sampling()?;
        self.check_stop()?;
        self.controls.check(&self.input)?;
        if self.model.prefix().is_remote() {
            self.controls.check_remote()?;
        } else {
            rule(self.input.images().next().is_none(), "messages", || {
                "images are for remote models; local ones do not see them".to_owned()
            })?;
            self.controls.check_local()?;
        }
        self.check_labels()?;
        self.check_life(now)
    }

    fn check_input(&self) -> Result<(), Invalid> {
        match &self.input {
            Input::Prompt(prompt) => rule(!prompt.is_empty(), "prompt", || "must not be empty".to_owned()),
            Input::Messages(messages) => {
                rule(!messages.is_empty(), "messages", || "at least one message is needed".to_owned())?;
                let calls = |message: &ChatMessage| !message.tool_calls.is_empty() && message.role != Role::Assistant;
                rule(!messages.iter().any(calls), "messages", || "only the assistant calls tools".to_owned())?;
                let shows = |message: &ChatMessage| message.images().next().is_some() && message.role != Role::User;
                rule(!messages.iter().any(shows), "messages", || "only the user shows images".to_owned())?;
                let images = self.input.images().count();
                rule(images <= IMAGES_MAX, "messages", || format!("{images} images; at most {IMAGES_MAX}"))
            }
        }
    }

    fn check_sampling(&self) -> Result<(), Invalid> {
        let fits = |value: Option<u32>, max: u32| value.is_none_or(|value| (1..=max).contains(&value));
        rule(fits(self.max_tokens, 1_000_000), "max_tokens", || "must be 1 to 1,000,000".to_owned())?;
        rule(self.temperature.is_none_or(|t| (0.0..=2.0).contains(&t)), "temperature", || {
            "must be 0 (greedy) to 2".to_owned()
        })?;
        rule(self.top_p.is_none_or(|p| p > 0.0 && p <= 1.0), "top_p", || {
            "must be above 0 and at most 1; leave it out for all tokens".to_owned()
        })?;
        rule(fits(self.top_k, u32::MAX), "top_k", || "must be at least 1; leave it out for all tokens".to_owned())
    }

    fn check_stop(&self) -> Result<(), Invalid> {
        rule(self.stop.len() <= 16, "stop", || format!("{} stop strings; at most 16", self.stop.len()))?;
        rule(self.stop.iter().all(|stop| (1..=1_024).contains(&stop.len())), "stop", || {
            "a stop string must have 1 to 1,024 bytes".to_owned()
        })
    }

    fn check_labels(&self) -> Result<(), Invalid> {
        rule(self.labels.len() <= 32, "labels", || format!("{} labels; at most 32", self.labels.len()))?;
        let fits = |(key, value): (&String, &String)| (1..=64).contains(&key.len()) && value.len() <= 256;
        rule(self.labels.iter().all(fits), "labels", || "keys must have 1 to 64 bytes, values at most 256".to_owned())
    }

    fn check_life(&self, now: UnixMs) -> Result<(), Invalid> {
        rule(self.request_id.as_ref().is_none_or(|id| (1..=256).contains(&id.len())), "request_id", || {
            "must have 1 to 256 bytes".to_owned()
        })?;
        rule(self.timeout_ms.is_none_or(|ms| (1..=86_400_000).contains(&ms)), "timeout_ms", || {
            "must be 1 to 86,400,000 (a day)".to_owned()
        })?;
        rule(self.deadline.is_none_or(|deadline| deadline > now), "deadline", || "has passed already".to_owned())?;
        let in_time = self.not_before.zip(self.deadline).is_none_or(|(start, end)| start < end);
        rule(in_time, "not_before", || "must be before the deadline".to_owned())
    }
}

pub(crate) fn rule(kept: bool, field: &'static str, problem: impl FnOnce() -> String) -> Result<(), Invalid> {
    if kept { Ok(()) } else { Err(Invalid { field, problem: problem() }) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::controls::{ReasoningEffort, ToolChoice};

    pub(crate) fn request(model: &str) -> Request {
        Request {
            model: ModelName::parse(model).unwrap(),
            input: Input::Prompt("Hello".to_owned()),
            max_tokens: None,
            temperature: None,
            top_p: None,
            top_k: None,
            seed: None,
            stop: Vec::new(),
            controls: Controls::default(),
            labels: BTreeMap::new(),
            tenant: Tenant::default(),
            experiment: None,
            priority: Priority::Normal,
            request_id: None,
            timeout_ms: None,
            deadline: None,
            not_before: None,
            mode: Mode::Auto,
        }
    }

    fn check(change: impl FnOnce(&mut Request), field: Option<&str>) {
        let mut request = request("vllm_x");
        change(&mut request);
        assert_eq!(request.check(UnixMs(1_000)).err().map(|invalid| invalid.field), field);
    }

    #[test]
    fn a_plain_request_keeps_all_rules() {
        check(|_| (), None);
    }

    #[test]
    fn images_are_the_users_and_for_remote_models() {
        let shows = |role, images| ChatMessage {
            parts: vec![Part::Image(Image::at("https://example.com/a.png".to_owned(), "").unwrap()); images],
            ..ChatMessage::new(role, "")
        };
        let of = |model: &str, message| Request { input: Input::Messages(vec![message]), ..request(model) };
        let says = |request: Request| request.check(UnixMs(1_000)).err().map(|invalid| invalid.problem);
        assert_eq!(says(of("litellm_gpt-4o", shows(Role::User, 100))), None);
        assert_eq!(says(of("litellm_gpt-4o", shows(Role::User, 101))).as_deref(), Some("101 images; at most 100"));
        assert_eq!(says(of("litellm_gpt-4o", shows(Role::System, 1))).as_deref(), Some("only the user shows images"));
        let local = "images are for remote models; local ones do not see them";
        assert_eq!(says(of("vllm_x", shows(Role::User, 1))).as_deref(), Some(local));
    }

    #[test]
    fn each_rule_names_its_field() {
        check(|r| r.input = Input::Prompt(String::new()), Some("prompt"));
        check(|r| r.input = Input::Messages(Vec::new()), Some("messages"));
        check(|r| r.max_tokens = Some(0), Some("max_tokens"));
        check(|r| r.max_tokens = Some(1_000_001), Some("max_tokens"));
        check(|r| r.temperature = Some(-0.1), Some("temperature"));
        check(|r| r.temperature = Some(f64::NAN), Some("temperature"));
        check(|r| r.top_p = Some(0.0), Some("top_p"));
        check(|r| r.top_p = Some(f64::NAN), Some("top_p"));
        check(|r| r.top_k = Some(0), Some("top_k"));
        check(|r| r.controls.reasoning_effort = Some(ReasoningEffort::Low), Some("reasoning_effort"));
        check(|r| r.controls.tool_choice = Some(ToolChoice::Required), Some("tool_choice"));
        check(|r| r.stop = vec![String::new()], Some("stop"));
        check(|r| r.stop = vec!["x".to_owned(); 17], Some("stop"));
        check(|r| drop(r.labels.insert(String::new(), String::new())), Some("labels"));
        check(|r| r.request_id = Some("x".repeat(257)), Some("request_id"));
        check(|r| r.timeout_ms = Some(0), Some("timeout_ms"));
        check(|r| r.deadline = Some(UnixMs(1_000)), Some("deadline"));
        check(|r| (r.deadline, r.not_before) = (Some(UnixMs(2_000)), Some(UnixMs(2_000))), Some("not_before"));
    }
}
