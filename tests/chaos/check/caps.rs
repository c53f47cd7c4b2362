//! How much runs at once.

use super::Violation;
use super::evidence::{Evidence, epochs, model, prompt};
use crate::chaos::history::unix_ms;
use genmill_client::v1;
use std::collections::BTreeMap;
use v1::AttemptOutcome;

/// Something that runs from one time to another, under caps: what each counts, and how many may be at once.
struct Span {
    caps: Vec<(String, usize)>,
    from: u64,
    to: u64,
}

/// No more runs at once than may.
///
/// Each worker has a capacity in each lane; a lane has a cap, and a tenant in each lane. They are kept in the ledger, where
/// an attempt takes a place from its claim to the end that its worker told, and the capacity at the provider as well, where
/// a call takes one from its arrival to its end. Left out is what takes no place any more although it may still seem to:
/// attempts that were taken for lost, and calls that somebody gave up, whose end the provider learns later.
pub(super) fn no_cap_is_exceeded(evidence: &Evidence) -> Vec<Violation> {
    let mut by_cap: BTreeMap<(String, usize), Vec<(u64, u64)>> = BTreeMap::new();
    for span in attempts(evidence).into_iter().chain(calls(evidence)) {
        for cap in span.caps {
            by_cap.entry(cap).or_default().push((span.from, span.to));
        }
    }
    let most = by_cap.into_iter().map(|((what, cap), spans)| (what, cap, most_at_once(&spans)));
    let over = most.filter(|(_, cap, most)| most > cap);
    over.map(|(what, cap, most)| Violation::general(format!("{most} at once {what}, where {cap} may be"))).collect()
}

fn attempts(evidence: &Evidence) -> Vec<Span> {
    let settings = &evidence.settings;
    let mut spans = Vec::new();
    for job in evidence.jobs.values() {
        let lane = model(job).map_or("", |model| model.name);
        let tenant = job.request.as_ref().map_or("", |request| &request.tenant);
        for epoch in epochs(job).values() {
            let Some(line) = epoch.told().filter(|_| !epoch.has(AttemptOutcome::Lost)) else { continue };
            let mut caps = vec![(format!("in the ledger of {} for {lane}", epoch.worker), settings.calls_max)];
            if lane == settings.lane_cap.0 {
                caps.push((format!("in the lane of {lane}"), settings.lane_cap.1));
            }
            if tenant == settings.tenant_cap.0 {
                caps.push((format!("of tenant {tenant} in the lane of {lane}"), settings.tenant_cap.1));
            }
            spans.push(Span { caps, from: epoch.started_ms, to: unix_ms(line.ended_at) });
        }
    }
    spans
}

/// The calls that somebody waited for to their end: that of a job's only attempt, which succeeded.
fn calls(evidence: &Evidence) -> Vec<Span> {
    let mut awaited = BTreeMap::new();
    for job in evidence.jobs.values() {
        let model = model(job).map_or("", |model| model.backend_name);
        if job.state() == v1::JobState::Succeeded && job.attempts == 1 {
            awaited.insert(format!("{model}: {}", prompt(job)), model);
        }
    }
    let span = |call: &genmill_standin::bill::Call| {
        let model = awaited.get(&call.content)?;
        let us = |at: std::time::Duration| u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
        Some(Span {
            caps: vec![(format!("at the provider by {} for {model}", call.key), evidence.settings.calls_max)],
            from: us(call.begun),
            to: us(call.ended?),
        })
    };
    evidence.calls.iter().filter_map(span).collect()
}

/// How many spans there are at the fullest time. One that ends when another begins has made room for it, so those that
/// begin and end in one moment cannot be told from others before and after.
fn most_at_once(spans: &[(u64, u64)]) -> usize {
    let lasting = spans.iter().filter(|(from, to)| from < to);
    let mut borders: Vec<(u64, bool)> = lasting.flat_map(|(from, to)| [(*from, true), (*to, false)]).collect();
    borders.sort_unstable();
    let mut now: usize = 0;
    let count = |(_, begins): (u64, bool)| {
        now = if begins { now + 1 } else { now.saturating_sub(1) };
        now
    };
    borders.into_iter().map(count).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::check::fixture::{Builder, call, check, job};

    /// A run with so many jobs in the same second of the same worker, of which two may run at once.
    fn at_once(jobs: usize) -> Builder {
        let mut run = Builder::empty();
        for n in 0..jobs {
            let id = format!("job-{n}");
            run.evidence.calls.push(call(&id));
            run.evidence.jobs.insert(id.clone(), job(&id));
        }
        run
    }

    #[test]
    fn a_worker_must_not_run_more_than_it_may() {
        check(no_cap_is_exceeded, &at_once(2), &[]);
        check(no_cap_is_exceeded, &at_once(3), &["3 at once in the ledger of w", "3 at once at the provider by key-w"]);
    }

    #[test]
    fn caps_of_lanes_and_tenants_are_kept() {
        let capped = |change: fn(&mut v1::GenerationRequest)| {
            at_once(2)
                .change("job-0", |job| job.request.as_mut().into_iter().for_each(change))
                .change("job-1", |job| job.request.as_mut().into_iter().for_each(change))
        };
        check(
            no_cap_is_exceeded,
            &capped(|request| "capped".clone_into(&mut request.tenant)),
            &["2 at once of tenant"],
        );
        let lane = capped(|request| "litellm_groq/openai/gpt-oss-20b".clone_into(&mut request.model));
        check(no_cap_is_exceeded, &lane, &["2 at once in the lane"]);
    }

    #[test]
    fn what_was_taken_for_lost_takes_no_place() {
        let lost = at_once(3).change("job-0", |job| {
            job.attempt_history[0].set_outcome(AttemptOutcome::Lost);
            job.set_state(v1::JobState::Failed);
        });
        check(no_cap_is_exceeded, &lost, &[]);
    }

    #[test]
    fn one_that_ends_makes_room_for_the_next() {
        assert_eq!(most_at_once(&[(0, 5), (5, 9), (5, 9)]), 2);
        assert_eq!(most_at_once(&[(0, 6), (5, 9), (5, 9)]), 3);
        assert_eq!(most_at_once(&[(5, 5), (5, 5), (4, 6)]), 1);
        assert_eq!(most_at_once(&[]), 0);
    }
}
