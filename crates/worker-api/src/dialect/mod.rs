//! How providers are spoken to: the trait, the one table of its implementations, and the words they share.
//!
//! A dialect is values in, values out. Never here: I/O, clocks, keys, retries, prices.

mod anthropic;
mod bedrock;
mod calls;
mod cohere;
#[cfg(test)]
mod conformance;
mod conversation;
mod errors;
mod gemini;
mod images;
mod ollama;
mod openai;
mod parameters;
#[cfg(test)]
mod published;
mod replicate;
mod responses;
mod sse;
mod tgi;
mod vertex;
mod watsonx;

use crate::prices::Class;
use crate::providers::Provider;
use genmill_core::attempt::{FinishReason, TokenLogprob, Usage, UsageDetails};
use genmill_core::controls::ToolCall;
use genmill_core::job::JobSpec;
use genmill_core::money::Picodollars;
use http::HeaderMap;
use serde_json::Value;

pub(crate) use parameters::{FILLED_IN, NEVER_LEFT_OUT};

/// Every dialect that is spoken, by the name that `providers.toml` uses.
pub const DIALECTS: &[(&str, &dyn Dialect)] = &[
    ("openai", &openai::OpenAi),
    ("anthropic", &anthropic::Anthropic),
    ("gemini", &gemini::Gemini),
    ("cohere-v2", &cohere::Cohere),
    ("ollama", &ollama::Ollama),
    ("bedrock-converse", &bedrock::Bedrock),
    ("openai-responses", &responses::Responses),
    ("vertex", &vertex::Vertex),
    ("vertex-anthropic", &vertex::VertexAnthropic),
    ("watsonx", &watsonx::Watsonx),
    ("tgi", &tgi::Tgi),
    ("replicate", &replicate::Replicate),
];

/// The dialect of a name.
#[must_use]
pub fn find(name: &str) -> Option<&'static dyn Dialect> {
    DIALECTS.iter().find(|(known, _)| *known == name).map(|(_, dialect)| *dialect)
}

/// Whether an answer is asked for whole or in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streaming {
    /// In pieces.
    On,
    /// Whole.
    Off,
}

/// A request, but for the base URL and the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// What follows the base URL.
    pub path: String,
    /// Headers beside the key.
    pub headers: Vec<(String, String)>,
    /// The body, as JSON.
    pub body: String,
    /// Parameters that are set but not sent, because provider, model or dialect do not take them.
    pub left_out: Vec<&'static str>,
}

/// Where a dialect wants the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyHeader {
    /// The header.
    pub name: &'static str,
    /// What stands before the key.
    pub scheme: &'static str,
}

/// An answer as it is told whole.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Reply {
    /// The text.
    pub text: String,
    /// What the model thought, as far as it is told.
    pub reasoning: String,
    /// Why it ended, when told.
    pub finish_reason: Option<FinishReason>,
    /// Calls of tools that the model asks for.
    pub tool_calls: Vec<ToolCall>,
    /// Of the text's tokens, when told.
    pub logprobs: Vec<TokenLogprob>,
    /// Tokens, when told.
    pub usage: Option<Usage>,
    /// More of them, when told.
    pub usage_details: Option<UsageDetails>,
    /// What the provider says it costs.
    pub billed: Option<Picodollars>,
    /// What the provider says of the system that answered; may be empty.
    pub fingerprint: String,
    /// What is said of the samples after the first, and of the price.
    pub more: Vec<StreamEvent>,
}

impl Reply {
    /// Puts the events of a whole answer together.
    ///
    /// # Errors
    /// The error among them, or that there are none.
    fn of(events: Vec<StreamEvent>) -> Result<Self, ProviderError> {
        let says = |event: &StreamEvent| event.is_heard() || matches!(event, StreamEvent::Error(_));
        if !events.iter().any(says) {
            return Err(ProviderError::saying("the answer says nothing"));
        }
        let mut reply = Self::default();
        for event in events {
            match event {
                StreamEvent::Text(text) => reply.text.push_str(&text),
                StreamEvent::Reasoning(text) => reply.reasoning.push_str(&text),
                StreamEvent::Finished(reason) => reply.finish_reason = Some(reason),
                StreamEvent::ToolCall { part, .. } => reply.tool_calls.push(part),
                StreamEvent::Logprobs(logprobs) => reply.logprobs.extend(logprobs),
                StreamEvent::Usage(usage) => reply.usage = Some(usage),
                StreamEvent::UsageDetails(details) => reply.usage_details = Some(details),
                StreamEvent::Billed(billed) => reply.billed = Some(billed),
                StreamEvent::Fingerprint(fingerprint) => reply.fingerprint = fingerprint,
                StreamEvent::Error(error) => return Err(error),
                event @ (StreamEvent::OfSample { .. } | StreamEvent::Class(_)) => reply.more.push(event),
                StreamEvent::Id(_) | StreamEvent::Done => {}
            }
        }
        Ok(reply)
    }
}

/// An error as a provider tells it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ProviderError {
    /// The HTTP status that it names itself, for errors that come where the status line said 200.
    pub status: Option<u16>,
    /// Its code, or failing that its type; may be empty.
    pub code: String,
    /// What it says; may be empty.
    pub message: String,
    /// How long it asks to wait, where it tells so in the body.
    pub retry_after_ms: Option<u64>,
    /// The headers that it quotes of another provider's refusal, as OpenRouter does.
    pub headers: Option<Box<HeaderMap>>,
}

impl ProviderError {
    /// An error without a code.
    fn saying(message: &str) -> Self {
        Self { message: message.to_owned(), ..Self::default() }
    }
}

/// An answer that is still worked at, whether anybody waits for it or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The URL at which it will be.
    pub look: String,
    /// The URL to which is posted that nobody wants it any more.
    pub cancel: Option<String>,
}

/// What a stream says.
#[derive(Clone, Debug, PartialEq)]
pub enum StreamEvent {
    /// More text.
    Text(String),
    /// More of what the model thinks.
    Reasoning(String),
    /// More of a call that the model asks for: what is empty says nothing, arguments follow each other.
    ToolCall {
        /// Which call.
        index: usize,
        /// More of it.
        part: ToolCall,
    },
    /// Of more tokens.
    Logprobs(Vec<TokenLogprob>),
    /// Why the text ended.
    Finished(FinishReason),
    /// Any of those above, of a sample after the first.
    OfSample {
        /// Which one: 1 for the second.
        sample: usize,
        /// What is said of it.
        event: Box<Self>,
    },
    /// Tokens of the whole call.
    Usage(Usage),
    /// More of them.
    UsageDetails(UsageDetails),
    /// What the provider says the call costs.
    Billed(Picodollars),
    /// Its price is that of a class which is not the usual one.
    Class(Class),
    /// What the provider says of the system that answers.
    Fingerprint(String),
    /// Under which name the provider keeps its record of the call.
    Id(String),
    /// The call failed.
    Error(ProviderError),
    /// Nothing more comes.
    Done,
}

impl StreamEvent {
    /// The event as one of a sample. An error is one of the whole call.
    fn of(self, sample: usize) -> Self {
        match self {
            Self::Error(_) => self,
            event if sample == 0 => event,
            event => Self::OfSample { sample, event: Box::new(event) },
        }
    }

    /// Whether it is (the end of) an answer, and nothing that only goes with one.
    pub(crate) const fn is_heard(&self) -> bool {
        match self {
            Self::OfSample { event, .. } => event.is_heard(),
            Self::Text(_) | Self::Reasoning(_) | Self::ToolCall { .. } | Self::Finished(_) | Self::Done => true,
            _ => false,
        }
    }

    /// Why the text ended, by the names that a dialect has for it. A name that is not known is no error.
    fn finished(reason: &Value, known: &[(&str, FinishReason)]) -> Option<Self> {
        let reason = reason.as_str().filter(|reason| !reason.is_empty())?;
        let known = known.iter().find(|(name, _)| name.eq_ignore_ascii_case(reason));
        Some(Self::Finished(known.map_or(FinishReason::Unknown, |(_, reason)| *reason)))
    }
}

/// A way of speaking to providers.
pub trait Dialect: Sync {
    /// Where the key goes.
    fn key_header(&self) -> KeyHeader {
        KeyHeader { name: "authorization", scheme: "Bearer " }
    }

    /// Where the list of models is, below the base URL; `None` when there is none.
    fn models_path(&self) -> Option<&'static str> {
        Some("/models")
    }

    /// The request for `spec` to `model`, as the provider names it.
    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded;

    /// What a whole answer says.
    ///
    /// # Errors
    /// The error that it tells in place of an answer, or that it cannot be read.
    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError>;

    /// Whether a stream begins as a whole answer does: with an object.
    fn streams_json(&self) -> bool {
        false
    }

    /// Where to look again, when a whole answer only says that the real one will be there.
    fn pending(&self, _body: &[u8]) -> Option<Pending> {
        None
    }

    /// What the body of a refusal says.
    fn decode_error(&self, body: &[u8]) -> ProviderError {
        errors::of_body(body)
    }

    /// Reads one stream.
    fn decoder(&self) -> Box<dyn StreamDecoder + Send>;
}

/// Reads one stream. Where its bytes are split never matters.
pub trait StreamDecoder {
    /// Takes the next bytes and returns what they complete.
    fn push(&mut self, bytes: &[u8]) -> Vec<StreamEvent>;

    /// What is left when no more bytes come.
    fn end(&mut self) -> Vec<StreamEvent>;
}
