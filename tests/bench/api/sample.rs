//! What calls say, and what was seen of each: when it was asked for, when the stand-in had it, when its end was known.
//! Never here: making calls.

use crate::figures::{Figures, Goal, percentile};
use genmill_standin::Standin;
use std::collections::HashMap;
use std::time::Instant;

/// What makes a message as long as those of the queue's benchmark: 300 bytes.
const FILLER: &str = "A message of a usual length, so that what is measured is not the cost of an empty one: it is \
    read from the queue, put into a request's body, sent, and read again by the stand-in, which is told behind it what \
    to answer. Whatever is longer costs each of them a little more, and the benchmark of none of them.";

/// The words of a call. `orders` are the stand-in's, such as `!sleep=9 `; unless they say what, it answers one word.
pub(crate) fn message(number: u64, orders: &str) -> String {
    let echo = if orders.contains("!words=") { "" } else { "!echo=four" };
    format!("{number} {FILLER} {orders}{echo}")
}

/// What the client and the queue saw of calls, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// When each was asked for.
    pub(crate) called: HashMap<u64, Instant>,
    /// When its end was known.
    pub(crate) ended: HashMap<u64, Instant>,
}

/// When the stand-in had a call, from its arrival to the end of its answer.
pub(crate) fn at_provider(standin: &Standin) -> HashMap<u64, (Instant, Instant)> {
    let number = |content: &str| content.split_once(": ")?.1.split(' ').next()?.parse().ok();
    let calls = standin.calls().into_iter();
    let times = calls.filter_map(|call| {
        let (begun, ended) = (standin.opened() + call.begun, standin.opened() + call.ended?);
        Some((number(&call.content)?, (begun, ended)))
    });
    times.collect()
}

/// Milliseconds from one time to a later one.
pub(crate) fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}

impl Seen {
    /// What each call took beyond the time for which the stand-in had it, in milliseconds, from number `first` on.
    pub(crate) fn added(&self, standin: &Standin, first: u64) -> Vec<f64> {
        let at = at_provider(standin);
        let counted = self.ended.iter().filter(|(number, _)| **number >= first);
        let added = counted.filter_map(|(number, ended)| {
            let (begun, answered) = at.get(number)?;
            Some(ms(*self.called.get(number)?, *ended) - ms(*begun, *answered))
        });
        added.collect()
    }
}

/// Adds the middle and the p99 of times; returns the latter.
pub(crate) fn add_times(figures: &mut Figures, name: &str, mut times: Vec<f64>, goal: Goal) -> anyhow::Result<f64> {
    let p99 = percentile(&mut times, 99);
    figures.add(&format!("{name}, p50"), percentile(&mut times, 50), "ms", Goal::Nothing)?;
    figures.add(&format!("{name}, p99"), p99, "ms", goal)?;
    Ok(p99)
}
