//! How the batches of providers are submitted, found, looked at and read: the trait, and the one table of its
//! implementations.
//!
//! A batch API is values in, values out, as a dialect is: what an item is asked and answers is the dialect's. Never
//! here: I/O (`calls`), what becomes of a batch (`perform`), when there is one (`genmill-worker`).

mod anthropic;
mod calls;
mod gemini;
mod held;
mod mistral;
mod named;
mod openai;
mod packing;
pub mod perform;
mod results;
mod search;
mod split;
#[cfg(test)]
mod tests;

use crate::dialect::Encoded;
use crate::url::escaped;
use genmill_core::ids::{Epoch, JobId};
use genmill_core::time::UnixMs;
use serde_json::Value;
use std::time::UNIX_EPOCH;

/// Every batch API that is spoken, by the name that `providers.toml` uses.
pub const BATCH_APIS: &[(&str, &dyn BatchApi)] = &[
    ("anthropic", &anthropic::Anthropic),
    ("gemini", &gemini::Gemini),
    ("mistral", &mistral::Mistral),
    ("openai", &openai::OpenAi),
];

/// The field of a batch's metadata that has its tag.
const TAG: &str = "genmill_tag";

/// The batch API of a name.
#[must_use]
pub fn find(name: &str) -> Option<&'static dyn BatchApi> {
    BATCH_APIS.iter().find(|(known, _)| *known == name).map(|(_, api)| *api)
}

/// The name of an item: that of its job, and under which epoch it went. Every provider takes such names.
#[must_use]
pub fn custom_id(id: JobId, epoch: Epoch) -> String {
    format!("{:032x}_{}", u128::from_be_bytes(*id.as_bytes()), epoch.0)
}

/// Whether a text has the form of such a name.
fn is_custom_id(text: &str) -> bool {
    parts(text).is_some()
}

/// The digits of the job and of the epoch in such a name.
fn parts(text: &str) -> Option<(&str, &str)> {
    let digits = |text: &str, of: fn(&u8) -> bool| !text.is_empty() && text.as_bytes().iter().all(of);
    text.split_once('_')
        .filter(|(id, epoch)| id.len() == 32 && digits(id, u8::is_ascii_hexdigit) && digits(epoch, u8::is_ascii_digit))
}

/// Whom such a name is of.
fn read_custom_id(text: &str) -> Option<(JobId, Epoch)> {
    let (id, epoch) = parts(text)?;
    let id = JobId::from_bytes(&u128::from_str_radix(id, 16).ok()?.to_be_bytes())?;
    Some((id, Epoch(epoch.parse().ok()?)))
}

/// Where a file is.
fn file_at(id: &str) -> String {
    format!("/files/{}", escaped(id))
}

/// A batch that is to be submitted.
#[derive(Clone, Copy, Debug)]
pub struct Submission<'a> {
    /// What it can be found by.
    pub tag: &'a str,
    /// The model, as the provider names it.
    pub model: &'a str,
}

/// What is done to a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// It is read.
    Get,
    /// It is made or changed.
    Post,
    /// It is deleted.
    Delete,
}

/// A request, but for the base URL, the key and what every request of a provider has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is done.
    pub method: Method,
    /// What follows the base URL.
    pub path: String,
    /// What the body is.
    pub content_type: String,
    /// The body.
    pub body: String,
}

impl Request {
    fn get(path: String) -> Self {
        Self { method: Method::Get, path, content_type: String::new(), body: String::new() }
    }

    fn delete(path: String) -> Self {
        Self { method: Method::Delete, ..Self::get(path) }
    }

    fn post(path: String, body: String) -> Self {
        Self { method: Method::Post, path, content_type: "application/json".to_owned(), body }
    }
}

/// The request that has the items, around them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carrier {
    /// What follows the base URL.
    pub path: String,
    /// What the body is.
    pub content_type: String,
    /// What stands before the items.
    pub opening: String,
    /// What stands between two of them.
    pub between: &'static str,
    /// What stands behind them.
    pub closing: String,
}

/// A file of items, as a form has it.
fn uploaded(submission: Submission<'_>) -> Carrier {
    let Submission { tag, .. } = submission;
    let boundary = format!("genmill-{tag}");
    let part = |head: &str| format!("--{boundary}\r\nContent-Disposition: form-data; {head}\r\n");
    let purpose = part("name=\"purpose\"\r\n\r\nbatch");
    let file = part(&format!("name=\"file\"; filename=\"{tag}.jsonl\"\r\nContent-Type: application/jsonl\r\n"));
    Carrier {
        path: "/files".to_owned(),
        content_type: format!("multipart/form-data; boundary={boundary}"),
        opening: format!("{purpose}{file}"),
        between: "\n",
        closing: format!("\n\r\n--{boundary}--\r\n"),
    }
}

/// Where results can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// What follows the base URL, or a whole URL.
    pub at: String,
    /// How they stand there.
    pub form: Form,
}

/// How results stand in what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Each on a line.
    Lines,
    /// Each in a list of one document.
    Elements,
}

/// How far a batch is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The provider works on it.
    Works,
    /// It has ended.
    Ended {
        /// Where its results are.
        sources: Vec<Source>,
        /// Which items had their turn.
        turns: Turns,
    },
    /// The provider refused all of it, and with which status and body such a refusal would have come as an answer.
    Refused {
        /// The status.
        status: u16,
        /// The body.
        body: String,
        /// The items that it names as its reason.
        lines: Vec<Line>,
        /// Where the items can be read.
        items: Option<Source>,
    },
}

/// Which items of a batch that has ended had their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turns {
    /// All: what is told of none is lost.
    All,
    /// Each is told of, and whether it had its turn.
    Told,
    /// Those that are told of: the batch ended early.
    Some,
}

/// An item that a provider names as the reason of its refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its place in the file, counted from 1.
    pub number: u64,
    /// The body with which it would have been refused by itself.
    pub body: String,
}

/// A batch in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The provider's name of it.
    pub remote: String,
    /// What can be found of its tag.
    pub tag: Tag,
    /// When it was created, when told.
    pub created: Option<UnixMs>,
    /// How many items it has, when told.
    pub items: Option<u64>,
}

/// What a list tells of a batch's tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tag {
    /// The tag.
    Is(String),
    /// None, but the name of its file of items, which is read here below the base URL, has the tag.
    InNameOf(String),
    /// Nothing: only its results tell whose it is.
    InResults(State),
    /// It has another one, or none.
    Other,
}

/// A page of a list.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Page {
    /// The batches.
    pub batches: Vec<Listed>,
    /// What the next page is asked with; `None` after the last one.
    pub next: Option<String>,
}

/// What came of an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The item.
    pub custom_id: String,
    /// What came of it.
    pub answer: Answer,
}

/// What came of an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// An answer, as the dialect reads it.
    Body(String),
    /// A refusal, as the dialect reads it.
    Refused {
        /// The status with which it would have come as an answer; 200 when nobody can tell.
        status: u16,
        /// The body.
        body: String,
    },
    /// The provider gave it up: it was cancelled, or its time was over.
    GivenUp,
}

/// A way of having jobs done in batches.
pub trait BatchApi: Sync {
    /// How many items a batch may have.
    fn items_max(&self) -> usize;

    /// How many bytes the request with the items may have.
    fn bytes_max(&self) -> usize;

    /// An item.
    fn item(&self, custom_id: &str, encoded: &Encoded) -> String;

    /// What is around the items.
    fn carrier(&self, submission: Submission<'_>) -> Carrier;

    /// The request that makes a batch of items that were carried over as `file`. They are to be done at `path`, which
    /// follows the base URL. `None`: what carries them makes the batch.
    fn creation(&self, submission: Submission<'_>, path: &str, file: &str) -> Option<Request>;

    /// The name that an answer gives to what was made.
    fn name(&self, answer: &Value) -> Option<String>;

    /// Where the batches are listed; one that is sought was not made before `since`.
    fn list(&self, since: UnixMs, next: Option<&str>) -> String;

    /// Whether such a list begins with the newest.
    fn newest_first(&self) -> bool {
        false
    }

    /// What such a list says that was `asked` for with this.
    fn page(&self, answer: &Value, asked: Option<&str>) -> Page;

    /// Where a batch is told of.
    fn batch(&self, remote: &str) -> String;

    /// What is told there.
    fn state(&self, answer: &Value) -> State;

    /// The files that a batch leaves behind, of whom this is told.
    fn files(&self, _answer: &Value) -> Vec<String> {
        Vec::new()
    }

    /// The request that ends a batch early.
    fn cancel(&self, remote: &str) -> Request;

    /// What a result says; `None` when it is none.
    fn result(&self, record: &[u8]) -> Option<Answered>;
}

/// A point in time in RFC 3339.
fn rfc3339(text: &Value) -> Option<UnixMs> {
    let at = humantime::parse_rfc3339_weak(text.as_str()?.trim_end_matches('Z')).ok()?;
    u64::try_from(at.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok().map(UnixMs)
}

/// A point in time in seconds since 1970.
fn unix_s(seconds: &Value) -> Option<UnixMs> {
    Some(UnixMs(seconds.as_u64()?.checked_mul(1_000)?))
}

/// A text that is there and says something.
fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}
