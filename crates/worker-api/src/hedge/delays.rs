//! How long a model's answers take to begin, lately, and how long a second call therefore waits. Never here: the calls.

use crate::repeats::Newest;
use genmill_core::model::ModelName;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// So many times are remembered of each model.
const KEPT: usize = 256;

/// Of fewer times nothing follows.
const KNOWN_MIN: usize = 20;

/// A share of a model's answers, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percentile(u8);

impl Percentile {
    /// Reads one, written as `p95`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        text.strip_prefix('p')?.parse().ok().filter(|percent| (1..=99).contains(percent)).map(Self)
    }

    /// The least of these times that the share does not exceed; `None` when they are too few.
    fn of(self, times: impl Iterator<Item = u32>) -> Option<u32> {
        let mut times: Vec<u32> = times.collect();
        let place = (times.len() * usize::from(self.0)).div_ceil(100).checked_sub(1)?;
        (times.len() >= KNOWN_MIN).then(|| *times.select_nth_unstable(place).1)
    }
}

/// The newest times of each model, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct Delays(Mutex<Newest<ModelName, VecDeque<u32>>>);

impl Delays {
    /// Notes how long an answer of `model` took to begin, or that it had not begun by then.
    pub(super) fn note(&self, model: &ModelName, took: Duration) {
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let times = models.entry(model.clone(), VecDeque::new);
        times.truncate(KEPT - 1);
        times.push_front(u32::try_from(took.as_millis()).unwrap_or(u32::MAX));
    }

    /// How long the answers of `model` take to begin, all but the slowest; `None` when too little is known.
    pub(super) fn of(&self, model: &ModelName, share: Percentile) -> Option<Duration> {
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let times = models.entry(model.clone(), VecDeque::new).iter().copied();
        share.of(times).map(|ms| Duration::from_millis(u64::from(ms)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_share_is_written_in_percent() {
        let parsed = ["p95", "p1", "p99", "p0", "p100", "95", "p", "p9.5", "P95"].map(Percentile::parse);
        assert_eq!(
            parsed.map(|share| share.map(|share| share.0)),
            [Some(95), Some(1), Some(99), None, None, None, None, None, None]
        );
    }

    #[test]
    fn the_newest_times_of_a_model_count_once_they_are_enough() {
        let (delays, share) = (Delays::default(), Percentile(95));
        let model = |name| ModelName::parse(name).unwrap();
        let (one, other) = (model("litellm_a"), model("litellm_b"));
        let note = |times: std::ops::Range<u64>| times.for_each(|ms| delays.note(&one, Duration::from_millis(ms)));
        note(0..19);
        assert_eq!(delays.of(&one, share), None);
        note(19..100);
        assert_eq!((delays.of(&one, share), delays.of(&other, share)), (Some(Duration::from_millis(94)), None));
        note(1_000..1_256);
        assert_eq!(delays.of(&one, Percentile(1)), Some(Duration::from_millis(1_002)), "what is old is forgotten");
    }

    proptest! {
        #[test]
        fn so_many_answers_begin_in_time_and_no_shorter_time_would_do(
            times in prop::collection::vec(0_u32..50, KNOWN_MIN..80), percent in 1_u8..100,
        ) {
            let found = Percentile(percent).of(times.iter().copied()).unwrap();
            let enough = |within: &dyn Fn(u32) -> bool| {
                times.iter().filter(|ms| within(**ms)).count() * 100 >= times.len() * usize::from(percent)
            };
            prop_assert!(enough(&|ms| ms <= found) && !enough(&|ms| ms < found));
        }
    }
}
