//! What the stand-in was asked and what it billed. Never here: HTTP.

use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many requests are kept whole.
const REQUESTS_MAX: usize = 10_000;

/// The sums, as `GET /bill` tells them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bill {
    /// Calls that came in.
    pub calls: u64,
    /// Calls that were answered to their end, by status. A call that its caller gave up is in none.
    pub statuses: BTreeMap<u16, u64>,
    /// Tokens read, of all calls that were billed.
    pub prompt_tokens: u64,
    /// Tokens written, of all calls that were billed; a broken stream is billed as far as it came.
    pub completion_tokens: u64,
    /// The same, for each model and content.
    pub contents: BTreeMap<String, Content>,
}

/// The sums of one content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Content {
    /// Calls that came in.
    pub calls: u64,
    /// Calls that were answered whole, with status 200.
    pub answered: u64,
}

/// A call as it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// Its headers.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Value,
}

/// The books of one stand-in.
#[derive(Debug, Default)]
pub(crate) struct Books {
    open: Mutex<(Bill, VecDeque<Received>)>,
}

impl Books {
    fn open(&self) -> MutexGuard<'_, (Bill, VecDeque<Received>)> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bill(&self) -> Bill {
        self.open().0.clone()
    }

    pub(crate) fn requests(&self) -> Vec<Received> {
        self.open().1.iter().cloned().collect()
    }

    /// Notes a call; returns which one of the same content it is, from 1.
    pub(crate) fn call(&self, content: &str, received: Received) -> u64 {
        let mut open = self.open();
        let (bill, requests) = &mut *open;
        if requests.len() == REQUESTS_MAX {
            requests.pop_front();
        }
        requests.push_back(received);
        bill.calls += 1;
        let sums = bill.contents.entry(content.to_owned()).or_default();
        sums.calls += 1;
        sums.calls
    }

    /// Notes the answer to a call.
    pub(crate) fn answered(&self, status: u16) {
        *self.open().0.statuses.entry(status).or_default() += 1;
    }

    /// Notes that a call was answered whole.
    pub(crate) fn completed(&self, content: &str) {
        let mut open = self.open();
        *open.0.statuses.entry(200).or_default() += 1;
        open.0.contents.entry(content.to_owned()).or_default().answered += 1;
    }

    /// Notes tokens.
    pub(crate) fn charge(&self, prompt_tokens: usize, completion_tokens: usize) {
        let mut open = self.open();
        open.0.prompt_tokens += u64::try_from(prompt_tokens).unwrap_or_default();
        open.0.completion_tokens += u64::try_from(completion_tokens).unwrap_or_default();
    }
}
