//! The samples of one request: their events go to one sink, and the request ends when all have ended.
//!
//! Never here: tokens, steps. Samples of one request may be computed in lanes side by side, so their group is locked
//! while it tells something.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::{Completion, Event, FinishReason, Output, RequestError, Sink};
use crate::sampler::Scored;

/// What a sample adds to its request when it ends.
pub(super) struct Share {
    pub(super) sample: usize,
    pub(super) output: Output,
    pub(super) tokens: usize,
    pub(super) first_token: Option<Instant>,
    pub(super) engine_time: Duration,
    /// Of the first sample only.
    pub(super) prompt_logprobs: Vec<Scored>,
}

/// What is known of the request as a whole.
pub(super) struct Whole {
    pub(super) first_prompt_token: Option<u32>,
    pub(super) prompt_tokens: usize,
    pub(super) submitted: Instant,
}

/// Shared by the samples of a request.
#[derive(Clone)]
pub(super) struct Group(Arc<Mutex<State>>);

struct State {
    whole: Whole,
    /// None once the last event was told.
    sink: Option<Sink>,
    started: Option<Instant>,
    /// Tokens of the prompt that were found computed.
    cached: usize,
    /// By sample.
    shares: Vec<Option<Share>>,
}

impl Group {
    pub(super) fn new(samples: usize, whole: Whole, sink: Sink) -> Self {
        let shares = (0..samples).map(|_| None).collect();
        Self(Arc::new(Mutex::new(State { whole, sink: Some(sink), started: None, cached: 0, shares })))
    }

    /// Nothing that is done under the lock panics: sinks are caught.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sample was admitted, at this time, with so many tokens of the prompt computed.
    pub(super) fn start(&self, now: Instant, cached: usize) {
        let mut state = self.lock();
        if state.started.is_none() {
            state.started = Some(now);
            state.cached = cached;
            state.tell(Event::Started);
        }
    }

    /// More text of a sample.
    pub(super) fn text(&self, sample: usize, delta: String) {
        self.lock().tell(Event::Text { sample, delta });
    }

    /// A sample ended; the request ends with its last.
    pub(super) fn finish(&self, share: Share) {
        let mut state = self.lock();
        let sample = share.sample;
        if let Some(place) = state.shares.get_mut(sample) {
            *place = Some(share);
        }
        if state.shares.iter().all(Option::is_some) {
            let shares = std::mem::take(&mut state.shares).into_iter().flatten().collect();
            if let Some(completion) = state.complete(shares) {
                state.end(Event::Finished(completion));
            }
        }
    }

    /// The request could not go on.
    pub(super) fn fail(&self, error: RequestError) {
        self.lock().end(Event::Failed(error));
    }
}

impl State {
    fn complete(&self, shares: Vec<Share>) -> Option<Completion> {
        let now = Instant::now();
        let since = |time: Instant| time.saturating_duration_since(self.whole.submitted);
        let completion_tokens = shares.iter().map(|share| share.tokens).sum();
        let engine_time = shares.iter().map(|share| share.engine_time).sum();
        let first_token = shares.iter().filter_map(|share| share.first_token).min().map(since);
        let mut shares = shares.into_iter();
        let Share { output: Output { reason, text, logprobs }, prompt_logprobs, .. } = shares.next()?;
        Some(Completion {
            reason,
            text,
            logprobs,
            more: shares.map(|share| share.output).collect(),
            prompt_logprobs,
            first_prompt_token: self.whole.first_prompt_token,
            prompt_tokens: self.whole.prompt_tokens,
            cached_prompt_tokens: self.cached,
            completion_tokens,
            queued: since(self.started.unwrap_or(now)),
            first_token,
            total: since(now),
            engine_time,
        })
    }

    /// A sink that panics loses its events, nothing else.
    fn tell(&mut self, event: Event) {
        if let Some(sink) = &mut self.sink
            && catch_unwind(AssertUnwindSafe(|| sink(event))).is_err()
        {
            tracing::error!("a request's sink panicked");
        }
    }

    /// Tells the last event and lets go of the sink.
    fn end(&mut self, event: Event) {
        self.tell(event);
        self.sink = None;
    }
}

impl FinishReason {
    /// Whether somebody ended the request before the text did.
    #[must_use]
    pub const fn is_early(self) -> bool {
        matches!(self, Self::Cancelled | Self::Deadline)
    }
}
