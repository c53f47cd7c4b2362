//! An attempt: what a worker reports when it has performed a job, and what is kept of it.
//!
//! Never here: what follows from it (see `judge`).

use crate::controls::ToolCall;
use crate::gate::Observation;
use crate::ids::{Epoch, WorkerId};
use crate::model::ModelName;
use crate::money::Cost;
use crate::time::UnixMs;
use serde::{Deserialize, Serialize};

/// Tokens read and written, as the model's tokenizer counts them or as the provider bills them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the prompt served from a cache; part of `prompt_tokens`.
    pub cached_prompt_tokens: u64,
    /// Generated tokens, an end token included.
    pub completion_tokens: u64,
}

/// What a provider tells of a call's tokens beyond [`Usage`], of which these are parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UsageDetails {
    /// Tokens of the prompt that were written to a cache; part of `prompt_tokens`.
    pub cache_write_tokens: u64,
    /// Tokens that the model thought; part of `completion_tokens`.
    pub reasoning_tokens: u64,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its answer, or a stop string came.
    Stop,
    /// The bound of tokens or the model's context was reached.
    Length,
    /// The provider withheld (part of) the text.
    ContentFilter,
    /// The model asks for tools to be called.
    ToolCalls,
    /// The provider gave none, or one that is not known.
    Unknown,
}

/// The log probability of a token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token in the model's vocabulary; `None` when a provider does not tell.
    pub token_id: Option<u32>,
    /// The token's text by itself.
    pub token: String,
    /// The natural logarithm of its probability; `None` for a prompt's first token, before which nothing stands.
    pub logprob: Option<f32>,
    /// The best tokens at its place, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<Self>,
}

impl TokenLogprob {
    /// About the bytes that it takes in a message.
    fn bytes(&self) -> usize {
        16 + self.token.len() + self.top.iter().map(Self::bytes).sum::<usize>()
    }
}

/// A sample after the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The text, without stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Of its tokens, where asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// What the model asks to be called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// What the same request gives when it is made again: same model, input, parameters and seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Determinism {
    /// The same tokens and log probabilities, bit for bit, wherever the fingerprint is the same.
    Bitwise,
    /// The provider took the seed, and does what it can.
    Seeded,
    /// Whatever comes.
    None,
}

/// What an attempt generated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// The text, without stop string; of several samples the first.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens; `None` when neither the provider told nor anything counted them.
    pub usage: Option<Usage>,
    /// From the start of the attempt to its first text, in milliseconds.
    pub first_token_ms: Option<u64>,
    /// Of the text's tokens, where asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
    /// Of the prompt's tokens, where asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// What the model asks to be called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The samples after the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<Sample>,
    /// What the same request gives again; `None` in records of before this was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub determinism: Option<Determinism>,
    /// What decides the output beside the request: model, dtype, backend, level and version of an engine, or the
    /// provider's own `system_fingerprint`. Empty: not told.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fingerprint: String,
    /// More of the usage, when told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage_details: Option<UsageDetails>,
    /// What the model thought, as far as its provider tells.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// Parameters of the request that the provider does not take: it was asked without them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// The model that answered, when that is not the one that was asked for: a fallback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_by: Option<ModelName>,
    /// It is the kept answer to an earlier job with the same request: no call was made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cached: bool,
}

impl Generation {
    /// The longest fingerprint that is kept, in bytes.
    pub const FINGERPRINT_BYTES_MAX: usize = 256;

    /// A text and nothing else.
    #[must_use]
    pub const fn new(text: String, finish_reason: FinishReason) -> Self {
        Self {
            text,
            finish_reason,
            usage: None,
            first_token_ms: None,
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            tool_calls: Vec::new(),
            more: Vec::new(),
            determinism: None,
            fingerprint: String::new(),
            usage_details: None,
            reasoning: String::new(),
            left_out: Vec::new(),
            answered_by: None,
            cached: false,
        }
    }

    /// About the bytes that it takes in a message.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let calls = |calls: &[ToolCall]| calls.iter().map(ToolCall::text_bytes).sum::<usize>();
        let logprobs = |logprobs: &[TokenLogprob]| logprobs.iter().map(TokenLogprob::bytes).sum::<usize>();
        let more =
            self.more.iter().map(|sample| sample.text.len() + logprobs(&sample.logprobs) + calls(&sample.tool_calls));
        let own = self.text.len()
            + self.reasoning.len()
            + logprobs(&self.logprobs)
            + logprobs(&self.prompt_logprobs)
            + calls(&self.tool_calls)
            + self.fingerprint.len();
        own + more.sum::<usize>()
    }

    /// The text of a sample.
    #[must_use]
    pub fn text_of(&self, sample: usize) -> Option<&str> {
        match sample.checked_sub(1) {
            None => Some(&self.text),
            Some(index) => self.more.get(index).map(|sample| sample.text.as_str()),
        }
    }
}

/// Kinds of failure. Chosen where the fault was seen; everything after branches on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The request is wrong, or the model cannot serve it.
    Invalid,
    /// The key was refused.
    Auth,
    /// The model is unknown to whoever should run it.
    NotFound,
    /// The provider asked to slow down.
    Throttled,
    /// A passing fault of the network, the provider or the worker.
    Transient,
    /// The attempt took longer than it may.
    Timeout,
    /// The job's workers were lost too often to be chance.
    Poison,
    /// A defect of Genmill itself.
    Internal,
    /// The account cannot pay, or has used up what it may use for a long time.
    Quota,
    /// The provider has too much to do.
    Overloaded,
    /// What was asked or answered is not allowed.
    ContentFilter,
    /// Prompt and answer are longer than the model takes.
    ContextOverflow,
    /// The answer broke off.
    CutStream,
}

impl FailureClass {
    /// True when trying again can help.
    #[must_use]
    pub const fn is_retried(self) -> bool {
        matches!(self, Self::Throttled | Self::Transient | Self::Timeout | Self::Overloaded | Self::CutStream)
    }
}

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub class: FailureClass,
    /// What happened, for a person. Never holds a key.
    pub message: String,
    /// How long the provider asked to wait before the next call, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// True when trying again is known not to help, although it may with others of its class.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_lasting: bool,
    /// The message without what somebody else said, where it has any of that: providers quote prompts.
    #[serde(skip)]
    pub unquoted: Option<String>,
}

impl Failure {
    /// The longest message that is kept, in bytes.
    pub const MESSAGE_BYTES_MAX: usize = 2_048;

    /// A failure; an overlong message is cut at a character.
    #[must_use]
    pub fn new(class: FailureClass, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > Self::MESSAGE_BYTES_MAX {
            message.truncate(message.floor_char_boundary(Self::MESSAGE_BYTES_MAX));
        }
        Self { class, message, retry_after_ms: None, is_lasting: false, unquoted: None }
    }

    /// The same failure with its message as it may be logged.
    #[must_use]
    pub fn unquoted(self, unquoted: Option<String>) -> Self {
        Self { unquoted, ..self }
    }

    /// What happened, as far as it may be logged.
    #[must_use]
    pub fn loggable(&self) -> &str {
        self.unquoted.as_deref().unwrap_or(&self.message)
    }

    /// The same failure as one that ends the job.
    #[must_use]
    pub fn lasting(self) -> Self {
        Self { is_lasting: true, ..self }
    }

    /// True when trying again can help.
    #[must_use]
    pub const fn is_retried(&self) -> bool {
        !self.is_lasting && self.class.is_retried()
    }

    /// The same failure with the wait the provider asked for.
    #[must_use]
    pub fn retry_after_ms(self, retry_after_ms: Option<u64>) -> Self {
        Self { retry_after_ms, ..self }
    }
}

/// How performing a job ended, as its worker saw it.
#[expect(clippy::large_enum_variant, reason = "most are the large one, and few are alive at a time")]
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// With a result.
    Generated(Generation),
    /// With an error.
    Failed(Failure),
    /// It was told to stop because the job was cancelled.
    Cancelled,
    /// It was told to stop because the job's deadline passed.
    DeadlinePassed,
    /// It was told to stop because the worker drains, or could not start.
    HandedBack,
}

/// An outcome with what it cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Performed {
    /// How it ended.
    pub outcome: Outcome,
    /// What the attempt cost; `None` when unknown.
    pub cost: Option<Cost>,
    /// What its call tells of the provider's limits; `None` when it made none.
    pub observation: Option<Observation>,
}

/// How an attempt ended, as kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttemptEnd {
    /// With the job's result.
    Succeeded,
    /// With an error.
    Failed,
    /// Its worker was lost.
    Lost,
    /// Its worker gave it back.
    HandedBack,
    /// It was cancelled.
    Cancelled,
    /// The job's deadline passed.
    Expired,
    /// It ended after its lease had gone to another; the result was refused, the cost is booked.
    Fenced,
}

/// One attempt that has ended: a line of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The lease under which it ran.
    pub epoch: Epoch,
    /// Who ran it.
    pub worker: WorkerId,
    /// When it started.
    pub started_at: UnixMs,
    /// When its end was recorded.
    pub ended_at: UnixMs,
    /// How it ended.
    pub end: AttemptEnd,
    /// What it cost; `None` when unknown.
    pub cost: Option<Cost>,
    /// Set when it failed.
    pub failure: Option<Failure>,
}
