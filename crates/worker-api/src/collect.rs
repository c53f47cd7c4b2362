//! Puts an answer together from the events of a stream, or from a whole reply. Never here: I/O.

use crate::dialect::{ProviderError, Reply, StreamEvent};
use crate::failure::ANSWER_TOO_LONG;
use crate::limits::Told;
use crate::prices::Class;
use crate::sample::Collecting;
use crate::stop::StopCut;
use genmill_core::attempt::{FinishReason, Generation, Usage, UsageDetails};
use genmill_core::money::{Picodollars, Rates, price};
use genmill_core::request::TEXT_BYTES_MAX;
use tokio::time::Instant;

/// What is known of an answer so far.
#[derive(Clone, Debug)]
pub struct Collected {
    /// How many texts were asked for.
    asked: usize,
    first: Collecting,
    /// The texts after the first, as far as anything came of them.
    more: Vec<Collecting>,
    /// As no text has it yet.
    cut: StopCut,
    left_out: Vec<String>,
    usage: Option<Usage>,
    usage_details: Option<UsageDetails>,
    billed: Option<Picodollars>,
    class: Class,
    fingerprint: String,
    id: Option<String>,
    first_token_ms: Option<u64>,
    error: Option<ProviderError>,
    limits: Option<(Told, Instant)>,
    cancel: Option<String>,
    done: bool,
}

impl Collected {
    /// Nothing yet, of an answer whose text ends at the first of `stops`.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        let cut = StopCut::new(stops);
        Self {
            asked: 1,
            first: Collecting::new(cut.clone()),
            more: Vec::new(),
            cut,
            left_out: Vec::new(),
            usage: None,
            usage_details: None,
            billed: None,
            class: Class::Standard,
            fingerprint: String::new(),
            id: None,
            first_token_ms: None,
            error: None,
            limits: None,
            cancel: None,
            done: false,
        }
    }

    /// The same of an answer that is to have so many texts.
    #[must_use]
    pub fn of_samples(self, asked: u32) -> Self {
        Self { asked: usize::try_from(asked).unwrap_or(usize::MAX), ..self }
    }

    /// Takes an event that came `elapsed_ms` after the call began. Returns the texts to report, each with its sample.
    pub fn take(&mut self, event: StreamEvent, elapsed_ms: u64) -> Vec<(u32, String)> {
        match event {
            StreamEvent::Text(_)
            | StreamEvent::Finished(_)
            | StreamEvent::Reasoning(_)
            | StreamEvent::ToolCall { .. }
            | StreamEvent::Logprobs(_) => return self.take_of(0, event, elapsed_ms),
            StreamEvent::OfSample { sample, event } => return self.take_of(sample, *event, elapsed_ms),
            StreamEvent::Usage(usage) => self.usage = Some(usage),
            StreamEvent::UsageDetails(details) => self.usage_details = Some(details),
            StreamEvent::Billed(billed) => self.billed = Some(billed),
            StreamEvent::Class(class) => self.class = class,
            StreamEvent::Fingerprint(fingerprint) => self.fingerprint = fingerprint,
            StreamEvent::Id(id) => self.id = Some(id),
            StreamEvent::Error(error) => self.error = Some(error),
            StreamEvent::Done => return self.finish(),
        }
        Vec::new()
    }

    fn take_of(&mut self, sample: usize, event: StreamEvent, elapsed_ms: u64) -> Vec<(u32, String)> {
        // What was not asked for is passed over.
        if sample >= self.asked {
            return Vec::new();
        }
        if matches!(event, StreamEvent::Text(_) | StreamEvent::Reasoning(_) | StreamEvent::ToolCall { .. }) {
            self.first_token_ms.get_or_insert(elapsed_ms);
        }
        let of = match sample.checked_sub(1) {
            None => &mut self.first,
            Some(place) => {
                let count = self.more.len().max(sample);
                self.more.resize_with(count, || Collecting::new(self.cut.clone()));
                &mut self.more[place]
            }
        };
        let texts = reported([(sample, of.take(event))]);
        // The rest of what is not kept is neither read nor paid for.
        if self.bytes() > TEXT_BYTES_MAX {
            let message = format!("more than {TEXT_BYTES_MAX} bytes");
            let code = ANSWER_TOO_LONG.to_owned();
            self.error.get_or_insert(ProviderError { code, message, ..ProviderError::default() });
        }
        texts
    }

    /// Nothing more comes.
    fn finish(&mut self) -> Vec<(u32, String)> {
        self.done = true;
        let texts = std::iter::once(&mut self.first).chain(&mut self.more);
        reported(texts.map(Collecting::end).enumerate())
    }

    /// The connection has ended. Where every text that was begun is finished, nothing is missing: some providers know of one
    /// text only, however many they are asked for, and some do not say when all is said.
    pub fn ended(&mut self) {
        let mut begun = std::iter::once(&self.first).chain(&self.more).filter(|text| text.is_begun()).peekable();
        self.done |= begun.peek().is_some() && begun.all(Collecting::is_finished);
    }

    /// Takes a whole reply. Returns the texts to report, each with its sample.
    pub fn take_reply(&mut self, reply: Reply, elapsed_ms: u64) -> Vec<(u32, String)> {
        let finished = StreamEvent::Finished(reply.finish_reason.unwrap_or(FinishReason::Unknown));
        let text = (!reply.text.is_empty()).then_some(StreamEvent::Text(reply.text));
        let thought = (!reply.reasoning.is_empty()).then_some(StreamEvent::Reasoning(reply.reasoning));
        let usage = reply.usage.map(StreamEvent::Usage);
        let details = reply.usage_details.map(StreamEvent::UsageDetails);
        let billed = reply.billed.map(StreamEvent::Billed);
        let calls = reply.tool_calls.into_iter().enumerate();
        let calls = calls.map(|(index, part)| Some(StreamEvent::ToolCall { index, part }));
        let logprobs = (!reply.logprobs.is_empty()).then_some(StreamEvent::Logprobs(reply.logprobs));
        let fingerprint = (!reply.fingerprint.is_empty()).then_some(StreamEvent::Fingerprint(reply.fingerprint));
        let rest = [logprobs, Some(finished), usage, details, billed, fingerprint];
        let events = [thought, text].into_iter().chain(calls).chain(rest).flatten();
        let events = events.chain(reply.more).chain([StreamEvent::Done]);
        events.flat_map(|event| self.take(event, elapsed_ms)).collect()
    }

    /// Tokens of the prompt; 0 until they are told.
    #[must_use]
    pub fn prompt_tokens(&self) -> u64 {
        self.usage.map_or(0, |usage| usage.prompt_tokens)
    }

    /// Under which name the provider keeps its record of the call, when told.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// About what a call took that ended before its provider told all of it: a prompt of so many bytes and what has come of
    /// the answer, at four bytes a token; what was told of either counts as well.
    #[must_use]
    pub fn estimated_usage(&self, prompt_bytes: usize) -> Usage {
        let calls: usize = std::iter::once(&self.first).chain(&self.more).map(Collecting::call_bytes).sum();
        let tokens = |bytes: usize| u64::try_from(bytes.div_ceil(4)).unwrap_or(u64::MAX);
        let told = self.usage.unwrap_or(Usage { prompt_tokens: tokens(prompt_bytes), ..Usage::default() });
        Usage { completion_tokens: told.completion_tokens.max(tokens(self.bytes() + calls)), ..told }
    }

    /// How much of the answer has come, in bytes of text and thought.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.first.bytes() + self.more.iter().map(Collecting::bytes).sum::<usize>()
    }

    /// True when all texts are whole; usage may still come. An end without a text is none.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let finished = 1 + self.more.len() >= self.asked
            && self.first.is_finished()
            && self.more.iter().all(Collecting::is_finished);
        let begun = || self.first.is_begun() || !self.more.is_empty();
        self.error.is_none() && (finished || self.done && begun())
    }

    /// True when nothing more will come.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done || self.error.is_some()
    }

    /// The error that the provider told in place of (the rest of) the answer.
    #[must_use]
    pub fn error(&self) -> Option<&ProviderError> {
        self.error.as_ref()
    }

    /// Notes where it can be told that nobody wants the answer any more; `None` once it has come.
    pub fn goes_on(&mut self, cancel: Option<String>) {
        self.cancel = cancel;
    }

    /// Where it can be told that nobody wants the answer any more, while the provider works at it.
    #[must_use]
    pub fn cancel(&self) -> Option<&str> {
        self.cancel.as_deref()
    }

    /// Notes what the provider told of its limits just now.
    pub fn limits(&mut self, told: Told) {
        self.limits = Some((told, Instant::now()));
    }

    /// The limits that the provider told, and how many milliseconds ago.
    #[must_use]
    pub fn told(&self) -> (Told, u64) {
        self.limits.map_or_else(Default::default, |(told, at)| {
            (told, u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX))
        })
    }

    /// The tokens, as far as the provider told.
    #[must_use]
    pub const fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// What the provider says that the call costs.
    #[must_use]
    pub const fn billed(&self) -> Option<Picodollars> {
        self.billed
    }

    /// The class whose price the call has.
    #[must_use]
    pub const fn class(&self) -> Class {
        self.class
    }

    /// What `usage` costs, as far as the price is known.
    #[must_use]
    pub fn priced(&self, usage: &Usage, rates: Option<&Rates>) -> Option<Picodollars> {
        Some(price(usage, &self.usage_details.unwrap_or_default(), rates?))
    }

    /// Notes parameters that the provider was not sent.
    pub fn left_out(&mut self, parameters: &[&str]) {
        self.left_out = parameters.iter().map(|parameter| (*parameter).to_owned()).collect();
    }

    /// The finished generation; a provider's overlong fingerprint is cut. Where fewer texts came than were asked for, the
    /// provider left `n` out by itself.
    #[must_use]
    pub fn into_generation(mut self) -> Generation {
        let mut fingerprint = std::mem::take(&mut self.fingerprint);
        fingerprint.truncate(fingerprint.floor_char_boundary(Generation::FINGERPRINT_BYTES_MAX));
        let mut left_out = self.left_out;
        if 1 + self.more.len() < self.asked {
            left_out.push("n".to_owned());
        }
        let reasoning = std::mem::take(&mut self.first.reasoning);
        let first = self.first.into_sample();
        Generation {
            usage: self.usage,
            usage_details: self.usage_details,
            reasoning,
            left_out,
            first_token_ms: self.first_token_ms,
            tool_calls: first.tool_calls,
            logprobs: first.logprobs,
            more: self.more.into_iter().map(Collecting::into_sample).collect(),
            fingerprint,
            ..Generation::new(first.text, first.finish_reason)
        }
    }
}

/// What there is to report of some texts.
fn reported(pieces: impl IntoIterator<Item = (usize, String)>) -> Vec<(u32, String)> {
    let pieces = pieces.into_iter().filter(|(_, piece)| !piece.is_empty());
    pieces.map(|(sample, piece)| (u32::try_from(sample).unwrap_or(u32::MAX), piece)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_core::controls::ToolCall;

    const USAGE: Usage = Usage { prompt_tokens: 10, cached_prompt_tokens: 0, completion_tokens: 5 };

    fn text(text: &str) -> StreamEvent {
        StreamEvent::Text(text.to_owned())
    }

    fn collect(stops: &[&str], events: Vec<StreamEvent>) -> (Collected, String) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut collected = Collected::new(&stops);
        let reported = events.into_iter().zip(1..).flat_map(|(event, ms)| collected.take(event, ms));
        let reported = reported.map(|(_, text)| text).collect();
        (collected, reported)
    }

    #[test]
    fn what_is_reported_is_the_text() {
        let events = vec![text("a x"), text("y"), StreamEvent::Finished(FinishReason::Length), StreamEvent::Done];
        let (collected, reported) = collect(&["xyz"], events);
        let generation = collected.into_generation();
        assert_eq!((generation.text.as_str(), reported.as_str()), ("a xy", "a xy"));
        assert_eq!((generation.finish_reason, generation.first_token_ms), (FinishReason::Length, Some(1)));
    }

    #[test]
    fn an_answer_that_nobody_keeps_is_not_read_to_its_end() {
        let half = || text(&"x".repeat(TEXT_BYTES_MAX / 2));
        let (collected, _) = collect(&[], vec![half(), half()]);
        assert!(collected.error().is_none());
        let (collected, _) = collect(&[], vec![half(), StreamEvent::Reasoning("x".to_owned()), half()]);
        assert_eq!(collected.error().map(|error| error.code.as_str()), Some(ANSWER_TOO_LONG));
        assert!(collected.is_done() && !collected.is_whole());
    }

    #[test]
    fn an_end_without_a_text_is_no_answer() {
        assert!(!collect(&[], vec![StreamEvent::Usage(USAGE), StreamEvent::Done]).0.is_whole());
        assert!(collect(&[], vec![StreamEvent::Finished(FinishReason::Stop)]).0.is_whole());
        assert!(collect(&[], vec![text("a"), StreamEvent::Done]).0.is_whole());
    }

    #[test]
    fn a_fingerprint_is_kept_up_to_its_bound() {
        let told = StreamEvent::Fingerprint("é".repeat(500));
        let (collected, _) = collect(&[], vec![text("a"), told, StreamEvent::Done]);
        assert_eq!(collected.into_generation().fingerprint, "é".repeat(128));
    }

    #[test]
    fn pieces_of_calls_are_put_together() {
        let part = |index, id: &str, name: &str, arguments: &str| StreamEvent::ToolCall {
            index,
            part: ToolCall { id: id.to_owned(), name: name.to_owned(), arguments: arguments.to_owned() },
        };
        let events = vec![
            part(0, "a", "f", ""),
            part(0, "", "", "{\"x\":"),
            part(0, "", "", "1}"),
            part(1, "b", "g", "{}"),
            StreamEvent::Finished(FinishReason::ToolCalls),
        ];
        let generation = collect(&[], events).0.into_generation();
        let calls: Vec<_> =
            generation.tool_calls.iter().map(|call| (&*call.id, &*call.name, &*call.arguments)).collect();
        assert_eq!(calls, [("a", "f", "{\"x\":1}"), ("b", "g", "{}")]);
        assert_eq!(generation.finish_reason, FinishReason::ToolCalls);
    }

    #[test]
    fn a_stop_string_that_the_provider_passed_over_ends_the_text() {
        let (collected, _) =
            collect(&["xy"], vec![text("a x"), text("yz"), StreamEvent::Finished(FinishReason::Length)]);
        let generation = collected.into_generation();
        assert_eq!((generation.text.as_str(), generation.finish_reason), ("a ", FinishReason::Stop));
    }

    #[test]
    fn a_stream_without_an_end_is_not_whole() {
        assert!(!collect(&[], vec![text("a"), StreamEvent::Usage(USAGE)]).0.is_whole());
        assert!(collect(&[], vec![StreamEvent::Finished(FinishReason::Stop)]).0.is_whole());
        assert!(collect(&[], vec![text("a"), StreamEvent::Done]).0.is_whole());
        let failed = vec![StreamEvent::Error(ProviderError::default()), StreamEvent::Done];
        assert!(!collect(&[], failed).0.is_whole());
    }

    #[test]
    fn tokens_are_priced_and_unknown_is_none() {
        let (input, output) = (Picodollars(2), Picodollars(3));
        let rates = Rates { input, output, cached_input: None, cache_write: None, reasoning: None };
        let (collected, _) = collect(&[], vec![text("abcde"), StreamEvent::Billed(Picodollars(7))]);
        assert_eq!(collected.priced(&USAGE, Some(&rates)), Some(Picodollars(35)));
        assert_eq!((collected.priced(&USAGE, None), collected.billed()), (None, Some(Picodollars(7))));
    }

    #[test]
    fn what_was_not_told_is_estimated_from_bytes() {
        let usage = |events| {
            let usage = collect(&[], events).0.estimated_usage(9);
            (usage.prompt_tokens, usage.completion_tokens)
        };
        assert_eq!(usage(vec![]), (3, 0));
        assert_eq!(usage(vec![text("abcd"), StreamEvent::Reasoning("e".to_owned())]), (3, 2));
        assert_eq!(usage(vec![StreamEvent::Usage(USAGE), text("a")]), (10, 5));
        assert_eq!(usage(vec![StreamEvent::Usage(USAGE), text(&"a".repeat(24))]), (10, 6));
    }

    #[test]
    fn a_whole_reply_is_cut_as_a_stream_is() {
        let mut collected = Collected::new(&["b".to_owned()]);
        let reply = Reply { text: "abc".to_owned(), usage: Some(USAGE), ..Reply::default() };
        assert_eq!(collected.take_reply(reply, 9), [(0, "a".to_owned())]);
        assert!(collected.is_whole());
        assert_eq!(collected.into_generation().text, "a");
    }

    fn of(sample: usize, event: StreamEvent) -> StreamEvent {
        StreamEvent::OfSample { sample, event: Box::new(event) }
    }

    #[test]
    fn several_texts_come_each_for_itself() {
        let mut collected = Collected::new(&["!".to_owned()]).of_samples(3);
        let finished = || StreamEvent::Finished(FinishReason::Length);
        let events = [text("a"), of(2, text("c!d")), of(1, text("b")), finished(), of(2, finished()), of(9, text("x"))];
        let told: Vec<_> = events.into_iter().flat_map(|event| collected.take(event, 1)).collect();
        assert_eq!(told, [(0, "a".to_owned()), (2, "c".to_owned()), (1, "b".to_owned())]);
        assert!(!collected.is_whole(), "one of them goes on");
        collected.ended();
        assert!(!collected.is_whole(), "and was cut");
        collected.take(of(1, finished()), 1);
        assert!(collected.is_whole());
        let generation = collected.into_generation();
        let more: Vec<_> = generation.more.iter().map(|more| (more.text.as_str(), more.finish_reason)).collect();
        assert_eq!((generation.text.as_str(), generation.left_out.len()), ("a", 0));
        assert_eq!(more, [("b", FinishReason::Length), ("c", FinishReason::Stop)]);
    }

    #[test]
    fn a_provider_that_knows_of_one_text_only_has_left_the_others_out() {
        let mut collected = Collected::new(&[]).of_samples(2);
        collected.take(text("a"), 1);
        collected.take(StreamEvent::Finished(FinishReason::Stop), 1);
        assert!(!collected.is_whole(), "another may come");
        collected.ended();
        assert!(collected.is_whole());
        assert_eq!(collected.into_generation().left_out, ["n"]);
    }
}
