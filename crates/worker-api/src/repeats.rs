//! Which failures of a job are the very same each time, and its own, so that trying again helps nobody.
//!
//! Remembered by the worker for the newest failures only: what is forgotten is tried as often as any other failure.

use genmill_core::ids::JobId;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// So many jobs, and so many failures, are remembered.
const KEPT: usize = 4_096;

/// A failure ends its job when it has come so often in a row.
const TIMES_MAX: u32 = 3;

/// What failed lately.
#[derive(Debug, Default)]
pub struct Repeats(Mutex<Memory>);

#[derive(Debug, Default)]
struct Memory {
    /// The newest failure of each job, and how often it has come in a row.
    jobs: Newest<JobId, (String, u32)>,
    /// The job of each failure; `None` once it has come to several.
    marks: Newest<String, Option<JobId>>,
}

impl Repeats {
    /// Notes a failure with the mark that tells it from others. True when it ends the job: it has come three times in a
    /// row, and to no other job. What comes to several jobs is the provider's own trouble, which passes.
    pub fn ends(&self, job: JobId, mark: &str) -> bool {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let whose = memory.marks.entry(mark.to_owned(), || Some(job));
        if *whose != Some(job) {
            *whose = None;
        }
        let own = whose.is_some();
        let last = memory.jobs.entry(job, || (mark.to_owned(), 0));
        if last.0 != mark {
            *last = (mark.to_owned(), 0);
        }
        last.1 += 1;
        own && last.1 >= TIMES_MAX
    }
}

/// A map that forgets its oldest entries.
#[derive(Debug)]
pub(crate) struct Newest<K, V> {
    entries: HashMap<K, V>,
    oldest_first: VecDeque<K>,
}

impl<K, V> Default for Newest<K, V> {
    fn default() -> Self {
        Self { entries: HashMap::new(), oldest_first: VecDeque::new() }
    }
}

impl<K: Clone + Eq + Hash, V> Newest<K, V> {
    pub(crate) fn entry(&mut self, key: K, new: impl FnOnce() -> V) -> &mut V {
        if !self.entries.contains_key(&key) {
            self.oldest_first.push_back(key.clone());
            if self.oldest_first.len() > KEPT {
                let oldest = self.oldest_first.pop_front();
                oldest.and_then(|oldest| self.entries.remove(&oldest));
            }
        }
        self.entries.entry(key).or_insert_with(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_core::ids::LaneNumber;
    use genmill_core::time::UnixMs;

    fn job(number: u64) -> JobId {
        JobId::new(UnixMs(number), LaneNumber(1), number)
    }

    #[test]
    fn a_jobs_own_failure_ends_it_the_third_time_in_a_row() {
        let repeats = Repeats::default();
        assert_eq!([1, 2, 3].map(|_| repeats.ends(job(1), "a")), [false, false, true]);
        assert_eq!(["b", "b", "c", "b", "b"].map(|mark| repeats.ends(job(2), mark)), [false; 5], "not in a row");
        assert!(repeats.ends(job(2), "b"));
    }

    #[test]
    fn what_comes_to_several_jobs_ends_none() {
        let repeats = Repeats::default();
        for _ in 0..5 {
            assert!(!repeats.ends(job(1), "down") || !repeats.ends(job(2), "down"));
        }
        assert!(!repeats.ends(job(1), "down"));
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let repeats = Repeats::default();
        let fail_twice = |number| (0..2).for_each(|_| assert!(!repeats.ends(job(number), &format!("mark {number}"))));
        (0..=KEPT as u64).for_each(fail_twice);
        assert!(!repeats.ends(job(0), "mark 0"));
        assert!(repeats.ends(job(KEPT as u64), &format!("mark {KEPT}")));
    }
}
