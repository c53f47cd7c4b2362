//! Judges a run: pure functions of what was written down, of the jobs as they ended and of the provider's books. Never here:
//! running anything.

mod caps;
mod evidence;
mod fairness;
mod ledger;
mod life;

pub use evidence::{Evidence, FINAL_WATCH, Settings, prompt};
pub use fairness::{Fairness, fairness};
pub use ledger::{Books, books};

use std::fmt;

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The job it is about, if it is about one.
    pub job: Option<String>,
    /// What is wrong.
    pub what: String,
}

impl Violation {
    fn of(job: &str, what: impl Into<String>) -> Self {
        Self { job: Some(job.to_owned()), what: what.into() }
    }

    fn general(what: impl Into<String>) -> Self {
        Self { job: None, what: what.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.job {
            Some(job) => write!(f, "job {job}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// A rule: what breaks it in a run.
pub type Rule = fn(&Evidence) -> Vec<Violation>;

/// Every rule, with what it promises.
pub const RULES: &[(&str, Rule)] = &[
    ("no process ends by itself, and no client gets an answer that no fault explains", life::nothing_else_went_wrong),
    ("an acknowledged job is there and ends in one final state", life::acknowledged_jobs_end),
    ("nothing is there that was not acknowledged, and a list shows each job once", life::lists_are_whole),
    ("a request id stands for one job", life::request_ids_stand_for_one_job),
    ("a final job never changes, however often and wherever it is read", life::final_jobs_never_change),
    ("a watch tells each of its jobs exactly once", life::watches_tell_each_job_once),
    ("a job's text comes in pieces that make up its result", life::texts_are_results),
    ("a final state has its reason", life::states_have_their_reasons),
    ("every attempt ends, and is counted as what it was", life::attempts_add_up),
    ("no attempt begins after a cancellation was acknowledged, or after the job's end", life::nothing_begins_too_late),
    ("the ledger is the provider's bill", ledger::ledger_is_the_bill),
    ("a job costs what its attempts cost", ledger::jobs_cost_what_attempts_cost),
    ("no cap is exceeded", caps::no_cap_is_exceeded),
    ("steady tenants of equal weight are served alike", fairness::steady_tenants_are_served_alike),
];

/// What breaks any of the rules, with the rule.
#[must_use]
pub fn check(evidence: &Evidence) -> Vec<(&'static str, Violation)> {
    let broken = |(promise, rule): &(&'static str, Rule)| {
        let promise = *promise;
        rule(evidence).into_iter().map(move |violation| (promise, violation))
    };
    RULES.iter().flat_map(broken).collect()
}

#[cfg(test)]
mod fixture;
