//! What a run is reported as: a table of what happened, and for each promise that was broken everything that is needed to
//! look into it.

use super::Run;
use super::check::{self, Evidence, Violation};
use super::history::Event;
use genmill_client::v1;
use std::collections::BTreeMap;
use std::fmt;
use v1::{AttemptOutcome, JobState};

/// How many violations of a promise are shown.
const SHOWN_MAX: usize = 3;

/// How many lines of a job's history are shown.
const LINES_MAX: usize = 60;

/// A run that was made.
#[derive(Clone, Debug)]
pub struct Report {
    run: Run,
    evidence: Evidence,
    /// What was found, with the rule that it breaks.
    pub violations: Vec<(&'static str, Violation)>,
    /// Where history and logs were left.
    kept: Option<String>,
}

/// The command that makes the same run again.
#[must_use]
pub fn replay(run: &Run) -> String {
    format!("cargo xtask chaos --minutes {} --seed {}", run.minutes, run.seed)
}

impl Report {
    /// Judges a run.
    #[must_use]
    pub fn new(run: Run, evidence: Evidence) -> Self {
        let violations = check::check(&evidence);
        Self { run, evidence, violations, kept: None }
    }

    /// The same report, of a run whose history and logs were left in `folder`.
    #[must_use]
    pub fn left_in(self, folder: String) -> Self {
        Self { kept: Some(folder), ..self }
    }

    fn rows(&self) -> Vec<(String, String)> {
        let jobs = || self.evidence.jobs.values();
        let lines = || jobs().flat_map(|job| &job.attempt_history);
        let states = counts(jobs().map(|job| short(job.state().as_str_name(), "JOB_STATE_")));
        let ends = counts(lines().map(|line| short(line.outcome().as_str_name(), "ATTEMPT_OUTCOME_")));
        let events = || self.evidence.history.iter().map(|entry| &entry.event);
        let faults = counts(events().filter_map(|event| match event {
            Event::FaultBegan { planned } => Some(planned.fault.kind().to_owned()),
            _ => None,
        }));
        let submitted = events().filter(|event| matches!(event, Event::Submitting { .. })).count();
        let of = |outcome| lines().filter(|line| line.outcome() == outcome).count();
        let poison = |job: &&v1::Job| job.error.as_ref().is_some_and(|e| e.error_class() == v1::ErrorClass::Poison);
        let failed = jobs().filter(|job| job.state() == JobState::Failed).filter(poison).count();
        let (books, fairness) = (check::books(&self.evidence), check::fairness(&self.evidence));
        let row = |name: &str, value: String| (name.to_owned(), value);
        vec![
            row("jobs", format!("{}: {}", self.evidence.jobs.len(), listed(&states))),
            row("submissions", format!("{submitted}, repeated ones included")),
            row("attempts", format!("{}: {}", lines().count(), listed(&ends))),
            row("retries", of(AttemptOutcome::Failed).to_string()),
            row("losses", format!("{}, {failed} jobs became poison", of(AttemptOutcome::Lost))),
            row("faults", format!("{}: {}", faults.values().sum::<usize>(), listed(&faults))),
            row(
                "money",
                format!(
                    "{} nanodollars billed in {} calls: {} booked, {} in {} calls of unknown cost",
                    books.billed,
                    self.evidence.calls.len(),
                    books.booked,
                    books.unknown,
                    books.unknown_calls
                ),
            ),
            row(
                "fairness",
                format!(
                    "{} tokens served while both waited, at most {} apart, {} allowed",
                    fairness.compared, fairness.apart, fairness.bound
                ),
            ),
        ]
    }

    /// What was written down about a job: the lines of its history.
    fn history_of(&self, id: &str) -> Vec<String> {
        let request = self.evidence.jobs.get(id).and_then(|job| job.request.as_ref());
        let request = request.map_or("", |request| &request.request_id);
        let about = self.evidence.history.iter().filter(|entry| entry.event.is_about(id, request));
        let mut lines: Vec<String> = about.filter_map(|entry| serde_json::to_string(entry).ok()).collect();
        lines.extend(self.evidence.jobs.get(id).map(|job| format!("in the end: {job:?}")));
        lines
    }
}

fn short(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_lowercase()
}

fn counts(names: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    counts
}

fn listed(counts: &BTreeMap<String, usize>) -> String {
    counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Run { minutes, seed } = self.run;
        writeln!(f, "chaos of {minutes} min, seed {seed}")?;
        for (name, value) in self.rows() {
            writeln!(f, "  {name:<12} {value}")?;
        }
        if self.violations.is_empty() {
            return writeln!(f, "  all {} promises were kept", check::RULES.len());
        }
        writeln!(f, "{} violations; again with: {}", self.violations.len(), replay(&self.run))?;
        if let Some(kept) = &self.kept {
            writeln!(f, "history and logs: {kept}")?;
        }
        for of_one_promise in self.violations.chunk_by(|(one, _), (next, _)| one == next) {
            let promise = of_one_promise.first().map_or("", |(promise, _)| promise);
            writeln!(f, "BROKEN {} times: {promise}", of_one_promise.len())?;
            for (_, violation) in of_one_promise.iter().take(SHOWN_MAX) {
                writeln!(f, "  {violation}")?;
                for line in violation.job.iter().flat_map(|id| self.history_of(id)).take(LINES_MAX) {
                    writeln!(f, "    {line}")?;
                }
            }
        }
        Ok(())
    }
}
