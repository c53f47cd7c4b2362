//! One text of an answer, put together from its events. Never here: what is told of the call as a whole (`collect`).

use crate::dialect::StreamEvent;
use crate::stop::StopCut;
use genmill_core::attempt::{FinishReason, Sample, TokenLogprob};
use genmill_core::controls::ToolCall;

/// What is known of a text so far.
#[derive(Clone, Debug)]
pub(crate) struct Collecting {
    pub(crate) text: String,
    pub(crate) reasoning: String,
    cut: StopCut,
    tool_calls: Vec<ToolCall>,
    logprobs: Vec<TokenLogprob>,
    finish_reason: Option<FinishReason>,
    begun: bool,
}

impl Collecting {
    /// Nothing yet, of a text that ends where `cut` cuts it.
    pub(crate) const fn new(cut: StopCut) -> Self {
        Self {
            text: String::new(),
            reasoning: String::new(),
            cut,
            tool_calls: Vec::new(),
            logprobs: Vec::new(),
            finish_reason: None,
            begun: false,
        }
    }

    /// Takes an event that is about a text; others are not for it. Returns the text to report, which may be empty.
    pub(crate) fn take(&mut self, event: StreamEvent) -> String {
        self.begun = true;
        match event {
            StreamEvent::Text(text) => {
                let piece = self.cut.push(&text);
                return self.keep(piece);
            }
            StreamEvent::Finished(reason) => {
                self.finish_reason = Some(reason);
                return self.end();
            }
            StreamEvent::Reasoning(thought) => self.reasoning.push_str(&thought),
            StreamEvent::ToolCall { index, part } => self.add_call(index, part),
            StreamEvent::Logprobs(logprobs) => self.logprobs.extend(logprobs),
            StreamEvent::OfSample { .. }
            | StreamEvent::Usage(_)
            | StreamEvent::UsageDetails(_)
            | StreamEvent::Billed(_)
            | StreamEvent::Class(_)
            | StreamEvent::Fingerprint(_)
            | StreamEvent::Id(_)
            | StreamEvent::Error(_)
            | StreamEvent::Done => {}
        }
        String::new()
    }

    /// No more text comes. Returns what was held back, to be reported.
    pub(crate) fn end(&mut self) -> String {
        let held = self.cut.end();
        self.keep(held)
    }

    /// Takes more of a call. Indices without a call in between are not believed.
    fn add_call(&mut self, index: usize, part: ToolCall) {
        if index >= self.tool_calls.len() {
            return self.tool_calls.push(part);
        }
        let call = &mut self.tool_calls[index];
        if call.id.is_empty() {
            call.id = part.id;
        }
        call.name.push_str(&part.name);
        call.arguments.push_str(&part.arguments);
    }

    fn keep(&mut self, piece: String) -> String {
        self.text.push_str(&piece);
        piece
    }

    /// True once anything of it has come.
    pub(crate) const fn is_begun(&self) -> bool {
        self.begun
    }

    /// True once it is told why it ended.
    pub(crate) const fn is_finished(&self) -> bool {
        self.finish_reason.is_some()
    }

    /// How much has come, in bytes of text and thought.
    pub(crate) const fn bytes(&self) -> usize {
        self.text.len() + self.reasoning.len()
    }

    /// How much of its calls has come, in bytes.
    pub(crate) fn call_bytes(&self) -> usize {
        self.tool_calls.iter().map(ToolCall::text_bytes).sum()
    }

    /// The finished text.
    pub(crate) fn into_sample(mut self) -> Sample {
        let told = self.finish_reason.unwrap_or(FinishReason::Unknown);
        // A call without arguments may come without any piece of them.
        for call in self.tool_calls.iter_mut().filter(|call| call.arguments.is_empty()) {
            call.arguments.push_str("{}");
        }
        Sample {
            finish_reason: if self.cut.stopped() { FinishReason::Stop } else { told },
            text: self.text,
            logprobs: self.logprobs,
            tool_calls: self.tool_calls,
        }
    }
}
