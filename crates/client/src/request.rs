//! Builds requests. What they may hold is checked by the server alone.

use crate::v1;
use std::time::{Duration, SystemTime};

/// Who speaks in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions to the model.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// A tool's answer to a call, see [`Request::tool_answer`].
    Tool,
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::System => Self::System,
            Role::User => Self::User,
            Role::Assistant => Self::Assistant,
            Role::Tool => Self::Tool,
        }
    }
}

/// A generation to ask for: a model, a prompt or messages, and how to sample. What is not set gets the server's default.
///
/// ```
/// use genmill_client::{Request, v1};
///
/// let request = Request::new("vllm_x").system("Be brief.").user("What is 2 + 2?").max_tokens(5).label("set", "a");
/// let message: v1::GenerationRequest = request.into();
/// assert_eq!(message.max_tokens, Some(5));
/// ```
#[derive(Clone, Debug, PartialEq)]
#[must_use = "a request does nothing until it is submitted"]
pub struct Request {
    message: v1::GenerationRequest,
}

impl Request {
    /// Asks `model`, named with its prefix: `vllm_NAME`, `hf_NAME`, `litellm_PROVIDER/MODEL`, …
    pub fn new(model: impl Into<String>) -> Self {
        Self { message: v1::GenerationRequest { model: model.into(), ..v1::GenerationRequest::default() } }
    }

    /// The input as plain text. Replaces messages.
    pub fn prompt(self, prompt: impl Into<String>) -> Self {
        self.input(v1::generation_request::Input::Prompt(prompt.into()))
    }

    /// Adds a message to the conversation. Replaces a prompt.
    pub fn message(self, role: Role, content: impl Into<String>) -> Self {
        self.add(v1::ChatMessage {
            role: v1::Role::from(role).into(),
            content: content.into(),
            ..v1::ChatMessage::default()
        })
    }

    /// Adds what the person says in text and images, for remote models: see [`v1::ContentPart::text`],
    /// [`v1::ContentPart::image_url`] and [`v1::ContentPart::image`].
    ///
    /// ```
    /// use genmill_client::{Request, v1::ContentPart};
    ///
    /// let picture = ContentPart::image_url("https://example.com/cat.jpg");
    /// let request = Request::new("litellm_gpt-4o").user_parts([picture, ContentPart::text("Which animal is this?")]);
    /// ```
    pub fn user_parts(self, parts: impl IntoIterator<Item = v1::ContentPart>) -> Self {
        self.add(v1::ChatMessage {
            role: v1::Role::User.into(),
            parts: parts.into_iter().collect(),
            ..v1::ChatMessage::default()
        })
    }

    fn add(mut self, message: v1::ChatMessage) -> Self {
        if let Some(v1::generation_request::Input::Messages(chat)) = &mut self.message.input {
            chat.messages.push(message);
            return self;
        }
        self.input(v1::generation_request::Input::Messages(v1::ChatMessages { messages: vec![message] }))
    }

    /// Adds instructions to the model.
    pub fn system(self, content: impl Into<String>) -> Self {
        self.message(Role::System, content)
    }

    /// Adds what the person says.
    pub fn user(self, content: impl Into<String>) -> Self {
        self.message(Role::User, content)
    }

    /// Adds what the model has said.
    pub fn assistant(self, content: impl Into<String>) -> Self {
        self.message(Role::Assistant, content)
    }

    /// Adds what the model has said together with the calls that it asked for.
    pub fn assistant_calls(self, content: impl Into<String>, calls: Vec<v1::ToolCall>) -> Self {
        self.add(v1::ChatMessage {
            role: v1::Role::Assistant.into(),
            content: content.into(),
            tool_calls: calls,
            ..v1::ChatMessage::default()
        })
    }

    /// Adds what a tool answered to the call of that id.
    pub fn tool_answer(self, call_id: impl Into<String>, content: impl Into<String>) -> Self {
        self.add(v1::ChatMessage {
            role: v1::Role::Tool.into(),
            content: content.into(),
            tool_call_id: call_id.into(),
            ..v1::ChatMessage::default()
        })
    }

    /// Adds a function that the model may ask to be called; `parameters` is the JSON schema of its arguments.
    pub fn tool(self, name: impl Into<String>, description: impl Into<String>, parameters: impl Into<String>) -> Self {
        let tool = v1::Tool { name: name.into(), description: description.into(), parameters: parameters.into() };
        self.with(|message| message.tools.push(tool))
    }

    fn input(self, input: v1::generation_request::Input) -> Self {
        self.with(|message| message.input = Some(input))
    }

    /// Upper bound of generated tokens.
    pub fn max_tokens(self, tokens: u32) -> Self {
        self.with(|message| message.max_tokens = Some(tokens))
    }

    /// Sampling temperature: 0 is greedy.
    pub fn temperature(self, temperature: f64) -> Self {
        self.with(|message| message.temperature = Some(temperature))
    }

    /// Only the most likely tokens that together reach this probability.
    pub fn top_p(self, top_p: f64) -> Self {
        self.with(|message| message.top_p = Some(top_p))
    }

    /// Only the `k` most likely tokens.
    pub fn top_k(self, k: u32) -> Self {
        self.with(|message| message.top_k = Some(k))
    }

    /// Seed of the random numbers: the same request with the same seed gives the same text.
    pub fn seed(self, seed: u64) -> Self {
        self.with(|message| message.seed = Some(seed))
    }

    /// Adds a string before which generation ends.
    pub fn stop(self, stop: impl Into<String>) -> Self {
        self.with(|message| message.stop.push(stop.into()))
    }

    /// Only tokens of at least this part of the best token's probability.
    pub fn min_p(self, min_p: f64) -> Self {
        self.with(|message| message.min_p = Some(min_p))
    }

    /// Adds to the logit of a token.
    pub fn logit_bias(self, token_id: u32, bias: f64) -> Self {
        self.with(|message| message.logit_bias.extend([(token_id, bias)]))
    }

    /// No end before so many tokens.
    pub fn min_tokens(self, tokens: u32) -> Self {
        self.with(|message| message.min_tokens = Some(tokens))
    }

    /// Adds a token before which generation ends.
    pub fn stop_token(self, token_id: u32) -> Self {
        self.with(|message| message.stop_token_ids.push(token_id))
    }

    /// The model's own end tokens do not end the text.
    pub fn ignore_eos(self) -> Self {
        self.with(|message| message.ignore_eos = true)
    }

    /// Taken from a token's logit for each time it was generated.
    pub fn frequency_penalty(self, penalty: f64) -> Self {
        self.with(|message| message.frequency_penalty = Some(penalty))
    }

    /// Taken from a token's logit when it was generated at all.
    pub fn presence_penalty(self, penalty: f64) -> Self {
        self.with(|message| message.presence_penalty = Some(penalty))
    }

    /// Divides positive and multiplies negative logits of tokens of prompt and text.
    pub fn repetition_penalty(self, penalty: f64) -> Self {
        self.with(|message| message.repetition_penalty = Some(penalty))
    }

    /// How many texts to generate.
    pub fn samples(self, n: u32) -> Self {
        self.with(|message| message.n = Some(n))
    }

    /// Log probabilities of the text's tokens, and of the `top` best at each place.
    pub fn logprobs(self, top: u32) -> Self {
        self.with(|message| message.logprobs = Some(top))
    }

    /// Log probabilities of the prompt's tokens, and of the `top` best at each place.
    pub fn prompt_logprobs(self, top: u32) -> Self {
        self.with(|message| message.prompt_logprobs = Some(top))
    }

    /// The text begins with the prompt.
    pub fn echo(self) -> Self {
        self.with(|message| message.echo = true)
    }

    /// The text is a JSON value that this JSON schema, written as JSON, allows.
    pub fn json_schema(self, schema: impl Into<String>) -> Self {
        self.form(v1::structured_output::Form::JsonSchema(schema.into()))
    }

    /// The text matches this regular expression.
    pub fn regex(self, regex: impl Into<String>) -> Self {
        self.form(v1::structured_output::Form::Regex(regex.into()))
    }

    /// The text is one of these.
    pub fn choice<S: Into<String>>(self, choices: impl IntoIterator<Item = S>) -> Self {
        let choices = choices.into_iter().map(Into::into).collect();
        self.form(v1::structured_output::Form::Choice(v1::Choices { choices }))
    }

    /// The text is a sentence of this grammar in Lark's notation.
    pub fn lark(self, grammar: impl Into<String>) -> Self {
        self.form(v1::structured_output::Form::Lark(grammar.into()))
    }

    fn form(self, form: v1::structured_output::Form) -> Self {
        self.with(|message| message.structured_output = Some(v1::StructuredOutput { form: Some(form) }))
    }

    /// Adds a label, kept with the job.
    pub fn label(self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.with(|message| drop(message.labels.insert(key.into(), value.into())))
    }

    /// Who the job belongs to.
    pub fn tenant(self, tenant: impl Into<String>) -> Self {
        self.with(|message| message.tenant = tenant.into())
    }

    /// The experiment the job is part of.
    pub fn experiment(self, experiment: impl Into<String>) -> Self {
        self.with(|message| message.experiment = experiment.into())
    }

    /// Which jobs go first.
    pub fn priority(self, priority: v1::Priority) -> Self {
        self.with(|message| message.priority = priority.into())
    }

    /// How the job gets to its provider.
    pub fn mode(self, mode: v1::Mode) -> Self {
        self.with(|message| message.mode = mode.into())
    }

    /// Makes submission idempotent: submitted twice with the same id, it is one job.
    pub fn request_id(self, id: impl Into<String>) -> Self {
        self.with(|message| message.request_id = id.into())
    }

    /// Bound of one attempt.
    pub fn timeout(self, timeout: Duration) -> Self {
        let ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.with(|message| message.timeout_ms = Some(ms))
    }

    /// When the job expires.
    pub fn deadline(self, at: SystemTime) -> Self {
        self.with(|message| message.deadline = Some(at.into()))
    }

    /// No attempt starts earlier.
    pub fn not_before(self, at: SystemTime) -> Self {
        self.with(|message| message.not_before = Some(at.into()))
    }

    fn with(mut self, change: impl FnOnce(&mut v1::GenerationRequest)) -> Self {
        change(&mut self.message);
        self
    }
}

impl From<Request> for v1::GenerationRequest {
    fn from(request: Request) -> Self {
        request.message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(request: Request) -> v1::generation_request::Input {
        v1::GenerationRequest::from(request).input.unwrap()
    }

    #[test]
    fn the_input_set_last_wins() {
        let prompt = input(Request::new("vllm_x").user("a").prompt("b"));
        assert_eq!(prompt, v1::generation_request::Input::Prompt("b".to_owned()));
        let chat = input(Request::new("vllm_x").prompt("b").user("a").assistant("c"));
        assert!(matches!(chat, v1::generation_request::Input::Messages(chat) if chat.messages.len() == 2));
    }
}
