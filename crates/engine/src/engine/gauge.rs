//! What an engine's thread shows of itself while it works: the step it is in, and totals of those before.
//!
//! Never here: what follows from it. The thread writes, whoever wants to know reads; the lock is held for copies only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::RequestId;
use crate::measure::{Measured, Totals};
use crate::schedule::{Slice, Step};

/// A step that has begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underway {
    /// Its number, from 1.
    pub step: u64,
    /// How long it has been going on.
    pub time: Duration,
    /// The sequences in it.
    pub sequences: Vec<SequenceUnderway>,
    /// Samples of requests that run or wait, those of this step included.
    pub open: usize,
}

/// A sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceUnderway {
    /// What the request was called when it was submitted.
    pub label: Arc<str>,
    /// The position of its first token in the step.
    pub start: usize,
    /// How many tokens.
    pub tokens: usize,
}

/// Shared by an engine and its thread.
#[derive(Debug, Default)]
pub(super) struct Gauge(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    totals: Totals,
    steps: u64,
    begun: Option<Instant>,
    slices: Vec<Slice>,
    labels: BTreeMap<RequestId, Arc<str>>,
}

impl Gauge {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sample of a request came in.
    pub(super) fn open(&self, id: RequestId, label: Arc<str>) {
        self.lock().labels.insert(id, label);
    }

    /// A sample ended.
    pub(super) fn close(&self, id: RequestId) {
        self.lock().labels.remove(&id);
    }

    /// A sample was admitted.
    pub(super) fn admit(&self, prompt_tokens: usize, cached: usize) {
        let mut state = self.lock();
        state.totals.prompt_tokens += prompt_tokens as u64;
        state.totals.cached_prompt_tokens += cached as u64;
    }

    /// A step begins.
    pub(super) fn begin(&self, step: &Step) {
        let mut state = self.lock();
        state.steps += 1;
        state.begun = Some(Instant::now());
        state.slices.clone_from(&step.slices);
    }

    /// The step ended.
    pub(super) fn end(&self) {
        self.lock().begun = None;
    }

    /// The step gave something.
    pub(super) fn add(&self, measured: &Measured) {
        self.lock().totals.add(measured);
    }

    pub(super) fn totals(&self) -> Totals {
        self.lock().totals
    }

    pub(super) fn underway(&self) -> Option<Underway> {
        let state = self.lock();
        let label = |id: &RequestId| state.labels.get(id).cloned().unwrap_or_default();
        let sequence = |Slice { id, start, tokens, .. }: &Slice| SequenceUnderway {
            label: label(id),
            start: *start,
            tokens: *tokens,
        };
        Some(Underway {
            step: state.steps,
            time: state.begun?.elapsed(),
            sequences: state.slices.iter().map(sequence).collect(),
            open: state.labels.len(),
        })
    }
}
