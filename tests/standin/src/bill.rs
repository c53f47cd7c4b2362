//! What the stand-in was asked and what it billed. Never here: HTTP.

use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    /// The most calls of each model that were open at the same time.
    pub most_at_once: BTreeMap<String, usize>,
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

/// One call, from its arrival to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The key it came with, which tells callers apart.
    pub key: String,
    /// Its model and last user message, as in [`Bill::contents`].
    pub content: String,
    /// When it came in, since the stand-in was started.
    pub begun: Duration,
    /// When the end of its answer went out or its connection ended, since the stand-in was started; `None` while it goes
    /// on.
    pub ended: Option<Duration>,
    /// Tokens read that were billed.
    pub prompt_tokens: u64,
    /// Tokens written that were billed; a broken stream is billed as far as it came.
    pub completion_tokens: u64,
    /// The caller was sent the tokens, so it can know the price.
    pub usage_sent: bool,
    /// How it ended. While it goes on: as one that its caller gave up.
    pub end: CallEnd,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallEnd {
    /// Its answer was handed to the network whole.
    Answered,
    /// With this status and an error, or a web page.
    Refused(u16),
    /// Its connection ended before the answer did: given up by the caller, cut by the network or by a directive.
    GivenUp,
}

/// The books of one stand-in.
#[derive(Debug)]
pub(crate) struct Books {
    opened: Instant,
    open: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    bill: Bill,
    requests: VecDeque<Received>,
    calls: Vec<Call>,
}

impl Default for Books {
    fn default() -> Self {
        Self { opened: Instant::now(), open: Mutex::default() }
    }
}

impl Books {
    pub(crate) fn opened(&self) -> Instant {
        self.opened
    }

    fn open(&self) -> MutexGuard<'_, Pages> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bill(&self) -> Bill {
        let open = self.open();
        let mut borders: BTreeMap<&str, Vec<(Duration, bool)>> = BTreeMap::new();
        for call in &open.calls {
            let (model, _) = call.content.split_once(": ").unwrap_or((&call.content, ""));
            let borders = borders.entry(model).or_default();
            borders.push((call.begun, true));
            borders.extend(call.ended.map(|ended| (ended, false)));
        }
        let most = borders.into_iter().map(|(model, borders)| (model.to_owned(), most_at_once(borders)));
        Bill { most_at_once: most.collect(), ..open.bill.clone() }
    }

    pub(crate) fn requests(&self) -> Vec<Received> {
        self.open().requests.iter().cloned().collect()
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.open().calls.clone()
    }

    /// Notes a call; returns which one of the same content it is, from 1, and its entry.
    pub(crate) fn call(self: &Arc<Self>, content: &str, key: &str, received: Received) -> (u64, Entry) {
        let begun = self.opened.elapsed();
        let mut open = self.open();
        let Pages { bill, requests, calls } = &mut *open;
        if requests.len() == REQUESTS_MAX {
            requests.pop_front();
        }
        requests.push_back(received);
        bill.calls += 1;
        let sums = bill.contents.entry(content.to_owned()).or_default();
        sums.calls += 1;
        calls.push(Call {
            key: key.to_owned(),
            content: content.to_owned(),
            begun,
            ended: None,
            prompt_tokens: 0,
            completion_tokens: 0,
            usage_sent: false,
            end: CallEnd::GivenUp,
        });
        (sums.calls, Entry { books: Arc::clone(self), at: calls.len() - 1 })
    }
}

/// How many are open at the fullest time, by when each begins (true) and ends.
fn most_at_once(mut borders: Vec<(Duration, bool)>) -> usize {
    borders.sort_unstable();
    let count = |open: &mut usize, (_, begins): (Duration, bool)| {
        *open = if begins { *open + 1 } else { open.saturating_sub(1) };
        Some(*open)
    };
    borders.into_iter().scan(0, count).max().unwrap_or(0)
}

/// A call's entry in the books. When it is dropped, the call has ended.
#[derive(Debug)]
pub(crate) struct Entry {
    books: Arc<Books>,
    at: usize,
}

impl Entry {
    /// Names the call.
    pub(crate) fn id(&self) -> String {
        format!("gen-standin-{}", self.at)
    }

    fn note(&self, note: impl FnOnce(&mut Bill, &mut Call)) {
        let mut open = self.books.open();
        let Pages { bill, calls, .. } = &mut *open;
        note(bill, &mut calls[self.at]);
    }

    /// Notes that the call was answered with a status and no answer.
    pub(crate) fn refused(&self, status: u16) {
        self.note(|bill, call| {
            *bill.statuses.entry(status).or_default() += 1;
            call.end = CallEnd::Refused(status);
        });
    }

    /// Notes that the call was answered whole.
    pub(crate) fn completed(&self) {
        self.note(|bill, call| {
            *bill.statuses.entry(200).or_default() += 1;
            bill.contents.entry(call.content.clone()).or_default().answered += 1;
            call.end = CallEnd::Answered;
        });
    }

    /// Notes that the end of the answer goes out: who has it may call again before the connection notices.
    pub(crate) fn ends(&self) {
        let ended = self.books.opened.elapsed();
        self.note(|_, call| call.ended = call.ended.or(Some(ended)));
    }

    /// Notes tokens.
    pub(crate) fn charge(&self, prompt_tokens: usize, completion_tokens: usize) {
        let count = |tokens| u64::try_from(tokens).unwrap_or_default();
        self.note(|bill, call| {
            bill.prompt_tokens += count(prompt_tokens);
            bill.completion_tokens += count(completion_tokens);
            call.prompt_tokens += count(prompt_tokens);
            call.completion_tokens += count(completion_tokens);
        });
    }

    /// Notes that the caller is told what it has to pay.
    pub(crate) fn usage_sent(&self) {
        self.note(|_, call| call.usage_sent = true);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.ends();
    }
}
