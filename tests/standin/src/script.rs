//! What a call tells the stand-in to do: directives in its last user message or its model name.
//!
//! In a message, every word that begins with `!` is a directive, and words such as `times=2` modify them all:
//! `!status=429 times=2 retry-after=1`. In a model name they follow the first `!` and are parted by `!` or commas:
//! `any-name!status=429,times=2`. Never here: doing any of it (see `chat`).
//!
//! | directive | effect |
//! |---|---|
//! | `!status=N` | answers with this status and an error |
//! | `!sleep=MS` | waits before it answers at all |
//! | `!first-byte=MS` | sends the status at once and waits before the first byte of the body |
//! | `!slow-stream=MS` | waits before each chunk |
//! | `!cut-after=N` | closes the connection after N chunks |
//! | `!stall-after=N` | sends nothing more after N chunks, but keeps the connection; a prediction runs until it is cancelled |
//! | `!endless` | a stream goes on with the pieces of its answer for as long as somebody reads |
//! | `!error-after=N` | sends an error object after N chunks |
//! | `!garbage` | truncated JSON in place of the (rest of the) answer |
//! | `!html` | a web page with status 200 |
//! | `!split-utf8` | borders of network chunks fall inside characters and events |
//! | `!comments` | comment lines between events |
//! | `!whole` | answers whole also where a stream was asked for |
//! | `!no-usage`, `!no-done` | leaves out the usage, the final `[DONE]` |
//! | `!rate=STYLE:REQUESTS:TOKENS:WINDOW_MS` | keeps these limits for each key, and tells of them (see `limit`) |
//! | `!keyless` | takes calls without a key |
//! | `!cost=X` | `usage.cost`, as OpenRouter tells it |
//! | `!words=N` | an answer of N words |
//! | `!sample=N` | an answer of N words drawn by the request's seed |
//! | `!batch-…` | what becomes of the batch that has the call as an item, below |
//! | `!echo=TEXT` | the rest of the message as the answer; must come last |
//!
//! | modifier | effect |
//! |---|---|
//! | `times=N` | misbehave in the first N calls of the same content only |
//! | `retry-after=X`, `retry-after-ms=X` | these headers with an error |
//! | `header=NAME:X` | this header with an error |
//! | `message=X` | the text of the error, with `_` for spaces |
//! | `type=X` | the content type of an answer |
//! | `code=X` | the code of the error |
//!
//! The first item of a batch that has any such directive speaks for all of it:
//!
//! | directive | effect |
//! |---|---|
//! | `!batch-status=N` | is not made: this status and an error; `times=N`: the first N times |
//! | `!batch-lost` | is made, but the answer is a 500; with `=cut` half an answer, with `=stall` none; `times=N`: the first N times |
//! | `!batch-upload=N` | its file is refused with this status; `times=N`: the first N times |
//! | `!batch-looks=N`, `!batch-ms=MS` | still runs when looked at the first N times, until MS after it was made |
//! | `!batch-end=X` | ends as `expired` or `cancelled`, else is failed with the code X; `times=N`: the first N times |
//! | `!batch-partial=N` | when it ends early, the first N items had their turn (else half of them) |
//! | `!batch-cut=N` | what is read of its results breaks off the first N times |
//! | `!batch-truncate` | the second line of its results is cut off |
//! | `!batch-poll=N` | looks at it are answered with this status; `times=N`: the first N |
//! | `!batch-vanish=N` | is not known any more after N looks |
//! | `!batch-clock=S` | is said to be made S seconds later (or, below 0, before) |
//! | `!batch-garbled` | results in reverse, twice, cut off, of nobody's items, with CR LF |
//! | `!batch-nameless` | its results do not tell whose they are |
//! | `!batch-forgets` | its metadata is not told (OpenAI) |
//! | `!batch-elsewhere` | its results are said to be at another host (Anthropic) |
//!
//! `!batch-bad`, in any item, makes its provider refuse all of the batch; `!batch-bad=named`, and name the item.

use crate::limit::Rate;

/// What a call asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// How to misbehave.
    pub fault: Fault,
    /// Misbehave only in the first calls of the same content.
    pub times: Option<u64>,
    /// What to answer.
    pub speech: Speech,
    /// Limits to keep.
    pub rate: Option<Rate>,
    /// `usage.cost`, as it is to be written.
    pub cost: Option<String>,
    /// What becomes of the batch that has the call as an item.
    pub batch: BatchScript,
}

/// What becomes of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchScript {
    /// Refuse it with this status.
    pub status: Option<u16>,
    /// Make it, and do not say so.
    pub lost: Option<Lost>,
    /// Refuse its file with this status.
    pub upload: Option<u16>,
    /// It runs for so many looks.
    pub looks: u64,
    /// It runs for so many milliseconds.
    pub ms: u64,
    /// How it ends.
    pub end: BatchEnd,
    /// So many items have their turn when it ends early.
    pub partial: Option<usize>,
    /// What is read of its results breaks off so often.
    pub cut: u64,
    /// It is refused because of the item that has the directive.
    pub bad: Option<Bad>,
    /// Looks at it fail with this status.
    pub poll: Option<u16>,
    /// It is gone after so many looks.
    pub vanish: Option<u64>,
    /// How far the clock is off by which it was made, in seconds.
    pub clock_s: i64,
    /// A line of its results is cut off.
    pub truncate: bool,
    /// Its results are in disorder.
    pub garbled: bool,
    /// Its results do not tell whose they are.
    pub nameless: bool,
    /// Its metadata is not told.
    pub forgets: bool,
    /// Its results are said to be at another host.
    pub elsewhere: bool,
}

/// How a batch is refused because of one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// Nobody says which.
    Unnamed,
    /// The refusal names it.
    Named,
}

/// How a batch that was made is not said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// By an error.
    Failed,
    /// By half an answer.
    Cut,
    /// By an answer that does not come.
    Stall,
}

/// How a batch ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BatchEnd {
    /// By itself.
    #[default]
    Completed,
    /// By its time.
    Expired,
    /// It was cancelled.
    Cancelled,
    /// It was refused as a whole, with this code.
    Failed(String),
}

impl BatchEnd {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Failed(_) => "failed",
        }
    }
}

/// How to misbehave; the default is not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Answer with this status.
    pub status: Option<u16>,
    /// The code of the error.
    pub code: Option<String>,
    /// The text of the error.
    pub message: Option<String>,
    /// Headers of the error.
    pub headers: Vec<(String, String)>,
    /// The content type of an answer, in place of its own.
    pub content_type: Option<String>,
    /// Milliseconds before the answer.
    pub sleep_ms: u64,
    /// Milliseconds between the headers and the first byte.
    pub first_byte_ms: u64,
    /// Milliseconds before each chunk.
    pub chunk_ms: u64,
    /// Where the stream goes wrong, and how.
    pub break_after: Option<(usize, Break)>,
    /// A stream never ends.
    pub endless: bool,
    /// Answer with a web page.
    pub html: bool,
    /// Small network chunks.
    pub split_utf8: bool,
    /// Comment lines between events.
    pub comments: bool,
    /// No usage.
    pub no_usage: bool,
    /// No `[DONE]`.
    pub no_done: bool,
    /// Answers whole also where a stream was asked for.
    pub whole: bool,
    /// No key is needed.
    pub keyless: bool,
}

/// How a stream goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// The connection is closed.
    Cut,
    /// Nothing more comes.
    Stall,
    /// An error object comes.
    Error,
    /// Half a JSON object comes.
    Garbage,
}

/// What to answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Speech {
    /// The words of the last user message, without directives.
    #[default]
    Repeat,
    /// This text.
    Echo(String),
    /// So many words.
    Words(usize),
    /// So many words, drawn by the seed.
    Sample(usize),
}

impl Script {
    /// Reads the directives of a model name and of a message.
    #[must_use]
    pub fn parse(model: &str, message: &str) -> Self {
        let mut script = Self::default();
        if let Some((_, rest)) = model.split_once('!') {
            rest.split(['!', ',']).for_each(|word| script.read(word));
        }
        let (words, echo) = match message.split_once("!echo=") {
            Some((before, text)) => (before, Some(text.to_owned())),
            None => (message, None),
        };
        if words.contains('!') {
            words.split_whitespace().for_each(|word| script.read(word.trim_start_matches('!')));
        }
        script.speech = echo.map_or(script.speech, Speech::Echo);
        script
    }

    /// What is left of a message without its directives and modifiers.
    #[must_use]
    pub fn strip(message: &str) -> String {
        let is_modifier = |word: &str| {
            let names = ["times=", "retry-after=", "retry-after-ms=", "header=", "code=", "message=", "type="];
            names.iter().any(|name| word.starts_with(name))
        };
        let steered = message.split_whitespace().any(|word| word.starts_with('!'));
        let kept = message.split_whitespace().filter(|word| !(steered && (word.starts_with('!') || is_modifier(word))));
        kept.collect::<Vec<_>>().join(" ")
    }

    /// The faults for the `nth` call of the same content, counted from 1.
    #[must_use]
    pub fn fault_of_call(&self, nth: u64) -> Fault {
        if self.times.is_some_and(|times| nth > times) { Fault::default() } else { self.fault.clone() }
    }

    /// Reads one word; what is not understood means nothing.
    fn read(&mut self, word: &str) {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let number = || value.parse::<u64>().unwrap_or_default();
        let count = || value.parse::<usize>().unwrap_or_default();
        let (fault, batch) = (&mut self.fault, &mut self.batch);
        match name {
            "batch-status" => batch.status = value.parse().ok(),
            "batch-lost" => {
                batch.lost = Some(match value {
                    "cut" => Lost::Cut,
                    "stall" => Lost::Stall,
                    _ => Lost::Failed,
                });
            }
            "batch-upload" => batch.upload = value.parse().ok(),
            "batch-looks" => batch.looks = number(),
            "batch-ms" => batch.ms = number(),
            "batch-end" => {
                batch.end = match value {
                    "expired" => BatchEnd::Expired,
                    "cancelled" => BatchEnd::Cancelled,
                    code => BatchEnd::Failed(code.to_owned()),
                }
            }
            "batch-partial" => batch.partial = value.parse().ok(),
            "batch-cut" => batch.cut = number(),
            "batch-bad" => batch.bad = Some(if value == "named" { Bad::Named } else { Bad::Unnamed }),
            "batch-poll" => batch.poll = value.parse().ok(),
            "batch-vanish" => batch.vanish = value.parse().ok(),
            "batch-clock" => batch.clock_s = value.parse().unwrap_or_default(),
            "batch-truncate" => batch.truncate = true,
            "batch-garbled" => batch.garbled = true,
            "batch-nameless" => batch.nameless = true,
            "batch-forgets" => batch.forgets = true,
            "batch-elsewhere" => batch.elsewhere = true,
            "status" => fault.status = value.parse().ok(),
            "code" => fault.code = Some(value.to_owned()),
            "message" => fault.message = Some(value.replace('_', " ")),
            "retry-after" | "retry-after-ms" => fault.headers.push((name.to_owned(), value.to_owned())),
            "header" => {
                fault.headers.extend(value.split_once(':').map(|(name, value)| (name.to_owned(), value.to_owned())));
            }
            "type" => fault.content_type = Some(value.to_owned()),
            "sleep" => fault.sleep_ms = number(),
            "first-byte" => fault.first_byte_ms = number(),
            "slow-stream" => fault.chunk_ms = number(),
            "cut-after" => fault.break_after = Some((count(), Break::Cut)),
            "stall-after" => fault.break_after = Some((count(), Break::Stall)),
            "error-after" => fault.break_after = Some((count(), Break::Error)),
            "garbage" => fault.break_after = Some((count(), Break::Garbage)),
            "endless" => fault.endless = true,
            "html" => fault.html = true,
            "split-utf8" => fault.split_utf8 = true,
            "comments" => fault.comments = true,
            "no-usage" => fault.no_usage = true,
            "no-done" => fault.no_done = true,
            "whole" => fault.whole = true,
            "keyless" => fault.keyless = true,
            "times" => self.times = value.parse().ok(),
            "cost" => self.cost = Some(value.to_owned()),
            "rate" => self.rate = Rate::parse(value),
            "words" => self.speech = Speech::Words(count()),
            "sample" => self.speech = Speech::Sample(count()),
            _ => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_stand_in_the_message_or_in_the_model_name() {
        let by_message = Script::parse("m", "!status=429 times=2 retry-after=1 hello");
        let by_model = Script::parse("m!status=429,times=2,retry-after=1", "hello");
        assert_eq!(by_message, by_model);
        assert_eq!(by_message.fault.status, Some(429));
        assert_eq!(by_message.fault_of_call(2).status, Some(429));
        assert_eq!(by_message.fault_of_call(3), Fault::default());
    }

    #[test]
    fn a_message_without_directives_steers_nothing() {
        assert_eq!(Script::parse("gpt-4o", "say times=2 and code=x"), Script::default());
        assert_eq!(Script::strip("say times=2"), "say times=2");
        assert_eq!(Script::strip("!status=500 times=2 say it"), "say it");
    }

    #[test]
    fn an_echo_takes_the_rest_of_the_message() {
        let script = Script::parse("m", "!slow-stream=1 !echo=two words");
        assert_eq!(script.speech, Speech::Echo("two words".to_owned()));
        assert_eq!(script.fault.chunk_ms, 1);
    }
}
