//! Rules about the life of jobs: none is lost, each ends once and for good, and everybody is told the same.

use super::Violation;
use super::evidence::{Evidence, epochs, prompt};
use crate::chaos::history::{Event, Face, unix_ms};
use crate::chaos::load::{PASSING, is_final};
use genmill_client::{Reason, v1};
use std::collections::{BTreeMap, BTreeSet};
use v1::{AttemptOutcome, ErrorClass, JobState};

pub(super) fn nothing_else_went_wrong(evidence: &Evidence) -> Vec<Violation> {
    let wrong = |event: &Event| match event {
        Event::Crashed { process } => Some(format!("{process} ended by itself")),
        Event::Trouble { what } => Some(what.clone()),
        _ => None,
    };
    evidence.history.iter().filter_map(|entry| wrong(&entry.event)).map(Violation::general).collect()
}

pub(super) fn acknowledged_jobs_end(evidence: &Evidence) -> Vec<Violation> {
    let judge = |id: &str| match evidence.jobs.get(id) {
        None => Some(Violation::of(id, "was acknowledged and is not there")),
        Some(job) if !is_final(job.state()) => Some(Violation::of(id, format!("is still {:?}", job.state()))),
        Some(_) => None,
    };
    evidence.acknowledged().into_iter().filter_map(judge).collect()
}

pub(super) fn lists_are_whole(evidence: &Evidence) -> Vec<Violation> {
    let mut listed: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in &evidence.history {
        if let Event::Listed { job, .. } = &entry.event {
            *listed.entry(job).or_default() += 1;
        }
    }
    let acknowledged = evidence.acknowledged();
    let missing = acknowledged.iter().filter(|id| !listed.contains_key(*id));
    let missing = missing.map(|id| Violation::of(id, "was acknowledged and is not listed"));
    let judge = |(id, times): (&&str, &usize)| {
        if !acknowledged.contains(id) {
            return Some(Violation::of(id, "is there, but nobody was told that it was accepted"));
        }
        (*times != 1).then(|| Violation::of(id, format!("is listed {times} times")))
    };
    missing.chain(listed.iter().filter_map(judge)).collect()
}

pub(super) fn request_ids_stand_for_one_job(evidence: &Evidence) -> Vec<Violation> {
    let mut first: BTreeMap<&str, &str> = BTreeMap::new();
    let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
    let mut violations = Vec::new();
    for entry in &evidence.history {
        match &entry.event {
            Event::Acknowledged { request_id, job, .. } => {
                let earlier = *first.entry(request_id).or_insert(job);
                if earlier != job {
                    violations.push(Violation::of(job, format!("request {request_id} was job {earlier} before")));
                }
                let owner = *owners.entry(job).or_insert(request_id);
                if owner != request_id {
                    violations.push(Violation::of(job, format!("stands for {owner} and for {request_id}")));
                }
            }
            Event::Reused { request_id, answer } => {
                let refused = answer == Reason::RequestIdReused.name();
                if !refused && !PASSING.iter().any(|reason| reason.name() == answer) {
                    violations
                        .push(Violation::general(format!("request {request_id}, used for another, was {answer}")));
                }
            }
            _ => {}
        }
    }
    violations
}

pub(super) fn final_jobs_never_change(evidence: &Evidence) -> Vec<Violation> {
    let mut shown: BTreeMap<&str, &Face> = BTreeMap::new();
    let mut violations = Vec::new();
    for entry in &evidence.history {
        let (Event::Seen { job, face } | Event::Told { job, face, .. }) = &entry.event else { continue };
        let earlier = *shown.entry(job).or_insert(face);
        if earlier != face {
            violations.push(Violation::of(job, format!("was {earlier:?}, and then {face:?}")));
        }
    }
    for (id, face) in shown {
        let last = evidence.jobs.get(id).map(Face::of);
        if last.as_ref().is_some_and(|last| last != face) {
            violations.push(Violation::of(id, format!("was {face:?}, and in the end {last:?}")));
        }
    }
    violations
}

pub(super) fn watches_tell_each_job_once(evidence: &Evidence) -> Vec<Violation> {
    let mut watches: BTreeMap<&str, (&str, &str, BTreeMap<&str, usize>)> = BTreeMap::new();
    for entry in &evidence.history {
        match &entry.event {
            Event::Watching { watch, tenant, experiment } => {
                watches.insert(watch, (tenant, experiment, BTreeMap::new()));
            }
            Event::Told { watch, job, .. } => {
                let (_, _, told) = watches.entry(watch).or_insert(("", "", BTreeMap::new()));
                *told.entry(job).or_default() += 1;
            }
            _ => {}
        }
    }
    let acknowledged = evidence.acknowledged();
    let jobs = || evidence.jobs.iter().filter(|(id, _)| acknowledged.contains(id.as_str()));
    let mut violations = Vec::new();
    for (watch, (tenant, experiment, told)) in watches {
        let matches = |job: &v1::Job| {
            job.request.as_ref().is_some_and(|request| {
                (tenant.is_empty() || request.tenant == tenant)
                    && (experiment.is_empty() || request.experiment == experiment)
            })
        };
        let expected: BTreeSet<&str> = jobs().filter(|(_, job)| matches(job)).map(|(id, _)| id.as_str()).collect();
        let missed = expected.iter().filter(|id| !told.contains_key(*id));
        violations.extend(missed.map(|id| Violation::of(id, format!("was not told by the watch {watch}"))));
        for (id, times) in told {
            if !expected.contains(id) {
                violations.push(Violation::of(id, format!("was told by the watch {watch}, which it does not match")));
            } else if times != 1 {
                violations.push(Violation::of(id, format!("was told {times} times by the watch {watch}")));
            }
        }
    }
    violations
}

pub(super) fn texts_are_results(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for entry in &evidence.history {
        let Event::Text { job: id, text } = &entry.event else { continue };
        let result = evidence.jobs.get(id).and_then(|job| job.result.as_ref());
        if result.is_some_and(|result| result.text != *text) {
            let result = result.map(|result| &result.text);
            violations.push(Violation::of(id, format!("its text was shown as `{text}`, its result is {result:?}")));
        }
    }
    violations
}

pub(super) fn states_have_their_reasons(evidence: &Evidence) -> Vec<Violation> {
    let mut cancelled: BTreeMap<&str, u64> = BTreeMap::new();
    for entry in &evidence.history {
        if let Event::CancelAsked { job } = &entry.event {
            cancelled.entry(job).or_insert(entry.at_ms);
        }
    }
    let reason = |id: &str, job: &v1::Job| match job.state() {
        JobState::Succeeded => succeeded(job),
        JobState::Failed => failed(job, evidence),
        JobState::Cancelled if !cancelled.contains_key(id) => Err("nobody cancelled it".to_owned()),
        JobState::Expired => expired(job),
        // Whether the others may be there at all is another rule.
        JobState::Cancelled | JobState::Unspecified | JobState::Queued | JobState::Delayed | JobState::Running => {
            Ok(())
        }
    };
    let judge = |(id, job): (&String, &v1::Job)| {
        let no_result = job.state() != JobState::Succeeded && job.result.is_some();
        let judged = if no_result { Err("it has a result".to_owned()) } else { reason(id, job) };
        judged.err().map(|why| Violation::of(id, format!("{:?}: {why}", job.state())))
    };
    evidence.jobs.iter().filter_map(judge).collect()
}

/// The result is what the provider says to this job's prompt, and one attempt, the last, brought it.
fn succeeded(job: &v1::Job) -> Result<(), String> {
    let text = job.result.as_ref().map(|result| result.text.as_str());
    let said = prompt(job).split_once("!echo=").map(|(_, said)| said);
    if text != said {
        return Err(format!("its result is {text:?}, the provider says {said:?}"));
    }
    let brought: Vec<u32> = (job.attempt_history.iter())
        .filter(|line| line.outcome() == AttemptOutcome::Succeeded)
        .map(|line| line.epoch)
        .collect();
    if brought == [job.attempts] { Ok(()) } else { Err(format!("attempts {brought:?} of {} succeeded", job.attempts)) }
}

/// It is poison, its retries are spent, or its provider refuses it for good.
fn failed(job: &v1::Job, evidence: &Evidence) -> Result<(), String> {
    let settings = &evidence.settings;
    let (class, message) =
        job.error.as_ref().map_or((ErrorClass::Unspecified, ""), |error| (error.error_class(), error.message.as_str()));
    let fair = match class {
        ErrorClass::Poison => job.losses == settings.losses_max,
        ErrorClass::Transient | ErrorClass::Timeout | ErrorClass::Overloaded | ErrorClass::CutStream => {
            job.failures == settings.retries_max + 1
        }
        ErrorClass::Invalid => prompt(job).starts_with("!status=400"),
        // One that is throttled waits for as long as it takes.
        ErrorClass::Throttled
        | ErrorClass::Unspecified
        | ErrorClass::Auth
        | ErrorClass::NotFound
        | ErrorClass::Internal
        | ErrorClass::Quota
        | ErrorClass::ContentFilter
        | ErrorClass::ContextOverflow => false,
    };
    let (failures, losses) = (job.failures, job.losses);
    if fair { Ok(()) } else { Err(format!("{class:?} after {failures} failures and {losses} losses: {message}")) }
}

fn expired(job: &v1::Job) -> Result<(), String> {
    let deadline = job.request.as_ref().and_then(|request| request.deadline).ok_or("it has no deadline")?;
    let (deadline, ended) = (unix_ms(Some(deadline)), unix_ms(job.finished_at));
    if ended >= deadline { Ok(()) } else { Err(format!("it ended at {ended}, its deadline is {deadline}")) }
}

pub(super) fn attempts_add_up(evidence: &Evidence) -> Vec<Violation> {
    let ended = evidence.jobs.iter().filter(|(_, job)| is_final(job.state()));
    ended.flat_map(|(id, job)| sums(job).into_iter().map(|what| Violation::of(id, what))).collect()
}

fn sums(job: &v1::Job) -> Vec<String> {
    let mut wrong = Vec::new();
    let epochs = epochs(job);
    let count = u32::try_from(epochs.len()).unwrap_or(u32::MAX);
    if count != job.attempts || epochs.keys().next_back().copied().unwrap_or(0) != job.attempts {
        let known: Vec<&u32> = epochs.keys().collect();
        wrong.push(format!("{} attempts began, of {known:?} the end is known", job.attempts));
    }
    for (number, epoch) in &epochs {
        let outcomes: Vec<AttemptOutcome> = epoch.lines.iter().map(|line| line.outcome()).collect();
        // A worker that was taken for lost may come back; what it brings then is fenced.
        let sound = matches!(outcomes[..], [_] | [AttemptOutcome::Lost, AttemptOutcome::Fenced]);
        if !sound || outcomes == [AttemptOutcome::Fenced] {
            wrong.push(format!("attempt {number} ended as {outcomes:?}"));
        }
        if epoch.lines.iter().any(|line| line.worker != epoch.worker) {
            wrong.push(format!("attempt {number} was of two workers"));
        }
    }
    // To be throttled is no failure of the job.
    let counts =
        |line: &&v1::Attempt| line.error.as_ref().is_none_or(|error| error.error_class() != ErrorClass::Throttled);
    let of = |outcome: AttemptOutcome| {
        let lines = job.attempt_history.iter().filter(counts).filter(|line| line.outcome() == outcome);
        u32::try_from(lines.count()).unwrap_or(u32::MAX)
    };
    for (name, counted, told) in
        [("failures", of(AttemptOutcome::Failed), job.failures), ("losses", of(AttemptOutcome::Lost), job.losses)]
    {
        if counted != told {
            wrong.push(format!("{told} {name} are told, {counted} are in the ledger"));
        }
    }
    wrong
}

pub(super) fn nothing_begins_too_late(evidence: &Evidence) -> Vec<Violation> {
    let mut acknowledged: BTreeMap<&str, u64> = BTreeMap::new();
    for entry in &evidence.history {
        if let Event::CancelAnswered { job } = &entry.event {
            acknowledged.entry(job).or_insert(entry.at_ms);
        }
    }
    let mut violations = Vec::new();
    for (id, job) in &evidence.jobs {
        let end = if is_final(job.state()) { unix_ms(job.finished_at) } else { u64::MAX };
        // The clocks are one, but times are rounded down to milliseconds.
        let last = acknowledged.get(id.as_str()).map_or(end, |cancelled| end.min(cancelled + 1));
        for (number, epoch) in epochs(job) {
            if epoch.started_ms > last {
                let what =
                    format!("attempt {number} began at {}, {} ms too late", epoch.started_ms, epoch.started_ms - last);
                violations.push(Violation::of(id, what));
            }
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::check::fixture::{Builder, attempt, check};

    #[test]
    fn a_good_run_breaks_no_rule() {
        let good = Builder::good();
        for rule in [
            nothing_else_went_wrong,
            acknowledged_jobs_end,
            lists_are_whole,
            request_ids_stand_for_one_job,
            final_jobs_never_change,
            watches_tell_each_job_once,
            texts_are_results,
            states_have_their_reasons,
            attempts_add_up,
            nothing_begins_too_late,
        ] {
            check(rule, &good, &[]);
        }
    }

    #[test]
    fn a_crash_and_an_unexplained_answer_are_seen() {
        let run = Builder::good()
            .event(Event::Crashed { process: "worker-1".to_owned() })
            .event(Event::Trouble { what: "INTERNAL".to_owned() });
        check(nothing_else_went_wrong, &run, &["worker-1 ended by itself", "INTERNAL"]);
    }

    #[test]
    fn a_lost_job_and_an_unfinished_one_are_seen() {
        check(acknowledged_jobs_end, &Builder::good().without("a"), &["job a: was acknowledged and is not there"]);
        let stuck = Builder::good().change("a", |job| job.set_state(JobState::Running));
        check(acknowledged_jobs_end, &stuck, &["job a: is still Running"]);
    }

    #[test]
    fn lists_must_hold_what_was_acknowledged_and_nothing_else() {
        let listed = |job: &str| Event::Listed { job: job.to_owned(), state: String::new() };
        check(lists_are_whole, &Builder::good().event(listed("a")), &["job a: is listed 2 times"]);
        check(lists_are_whole, &Builder::good().event(listed("x")), &["job x: is there, but nobody was told"]);
        let unlisted = Builder::good().forget(|event| matches!(event, Event::Listed { job, .. } if job == "b"));
        check(lists_are_whole, &unlisted, &["job b: was acknowledged and is not listed"]);
    }

    #[test]
    fn a_request_id_must_not_stand_for_two_jobs_nor_be_taken_for_another() {
        let twice = Builder::good().acknowledged("request-a", "b");
        check(request_ids_stand_for_one_job, &twice, &["request-a was job a before", "stands for request-b and for"]);
        let reused = |answer: &str| Event::Reused { request_id: "request-a".to_owned(), answer: answer.to_owned() };
        check(request_ids_stand_for_one_job, &Builder::good().event(reused("REQUEST_ID_REUSED")), &[]);
        check(request_ids_stand_for_one_job, &Builder::good().event(reused("NO_LIVE_WORKER")), &[]);
        check(request_ids_stand_for_one_job, &Builder::good().event(reused("accepted as y")), &["accepted as y"]);
    }

    #[test]
    fn a_final_job_that_changes_is_seen() {
        let other = Face { state: "JOB_STATE_FAILED".to_owned(), result: None, error: None, finished_ms: 1 };
        let told = Event::Seen { job: "a".to_owned(), face: other };
        // It differs from what was seen before; the last reading is as the first.
        check(final_jobs_never_change, &Builder::good().event(told), &["job a: was Face"]);
        let changed = Builder::good().change("a", |job| job.result.iter_mut().for_each(|r| r.text.push('!')));
        check(final_jobs_never_change, &changed, &["and in the end"]);
    }

    #[test]
    fn a_watch_must_tell_each_of_its_jobs_once() {
        let told = |job: &str| Event::Told { watch: "final".to_owned(), job: job.to_owned(), face: Builder::face("a") };
        check(
            watches_tell_each_job_once,
            &Builder::good().event(told("a")),
            &["job a: was told 2 times by the watch final"],
        );
        check(
            watches_tell_each_job_once,
            &Builder::good().event(told("x")),
            &["job x: was told by the watch final, which"],
        );
        let silent = Builder::good().forget(|event| matches!(event, Event::Told { job, .. } if job == "b"));
        check(watches_tell_each_job_once, &silent, &["job b: was not told by the watch final"]);
        let watching =
            Event::Watching { watch: "w".to_owned(), tenant: "nobody".to_owned(), experiment: String::new() };
        check(watches_tell_each_job_once, &Builder::good().event(watching), &[]);
    }

    #[test]
    fn pieces_of_text_must_make_up_the_result() {
        let text = |text: &str| Event::Text { job: "a".to_owned(), text: text.to_owned() };
        check(texts_are_results, &Builder::good().event(text("a w1")), &[]);
        check(texts_are_results, &Builder::good().event(text("a ")), &["job a: its text was shown as `a `"]);
    }

    #[test]
    fn a_final_state_without_its_reason_is_seen() {
        let becomes = |state| Builder::good().change("a", move |job| job.set_state(state));
        let without_result = |state| {
            Builder::good().change("a", move |job| {
                job.set_state(state);
                job.result = None;
            })
        };
        check(states_have_their_reasons, &becomes(JobState::Cancelled), &["it has a result"]);
        check(states_have_their_reasons, &without_result(JobState::Cancelled), &["nobody cancelled it"]);
        check(states_have_their_reasons, &without_result(JobState::Expired), &["it has no deadline"]);
        check(states_have_their_reasons, &without_result(JobState::Failed), &["Unspecified after 0 failures"]);
        check(states_have_their_reasons, &without_result(JobState::Succeeded), &["its result is None"]);
        let others = Builder::good().change("a", |job| job.result.iter_mut().for_each(|r| r.text = "b w1".to_owned()));
        check(states_have_their_reasons, &others, &["the provider says Some(\"a w1\")"]);
        let twice = Builder::good().change("a", |job| {
            job.attempts = 2;
            job.attempt_history.push(attempt(2, AttemptOutcome::Succeeded, Some(1)));
        });
        check(states_have_their_reasons, &twice, &["attempts [1, 2] of 2 succeeded"]);
    }

    #[test]
    fn a_job_fails_only_as_poison_or_when_its_retries_are_spent() {
        let fails = |class: ErrorClass, failures: u32, losses: u32| {
            Builder::good().change("a", move |job| {
                job.set_state(JobState::Failed);
                (job.result, job.failures, job.losses) = (None, failures, losses);
                job.error = Some(v1::JobError { error_class: class.into(), message: String::new() });
            })
        };
        check(states_have_their_reasons, &fails(ErrorClass::Poison, 0, 3), &[]);
        check(states_have_their_reasons, &fails(ErrorClass::Poison, 0, 2), &["Poison after 0 failures and 2 losses"]);
        check(states_have_their_reasons, &fails(ErrorClass::Transient, 7, 0), &[]);
        check(states_have_their_reasons, &fails(ErrorClass::Transient, 6, 0), &["Transient after 6 failures"]);
        check(states_have_their_reasons, &fails(ErrorClass::Invalid, 1, 0), &["Invalid after 1 failures"]);
        check(states_have_their_reasons, &fails(ErrorClass::Internal, 1, 0), &["Internal after 1 failures"]);
    }

    #[test]
    fn every_attempt_must_end_and_be_counted() {
        let with = |lines: Vec<v1::Attempt>, attempts: u32, failures: u32, losses: u32| {
            Builder::good().change("a", move |job| {
                job.attempt_history.clone_from(&lines);
                (job.attempts, job.failures, job.losses) = (attempts, failures, losses);
            })
        };
        let [succeeded, failed, lost, fenced] =
            [AttemptOutcome::Succeeded, AttemptOutcome::Failed, AttemptOutcome::Lost, AttemptOutcome::Fenced];
        let line = |epoch, outcome| attempt(epoch, outcome, None);
        let came_back = vec![line(1, lost), line(1, fenced), line(2, failed), line(3, succeeded)];
        check(attempts_add_up, &with(came_back, 3, 1, 1), &[]);
        check(attempts_add_up, &with(vec![line(2, succeeded)], 2, 0, 0), &["of [2] the end is known"]);
        check(attempts_add_up, &with(vec![line(1, succeeded), line(1, fenced)], 1, 0, 0), &["[Succeeded, Fenced]"]);
        check(attempts_add_up, &with(vec![line(1, fenced), line(2, succeeded)], 2, 0, 0), &["ended as [Fenced]"]);
        check(attempts_add_up, &with(vec![line(1, lost), line(2, succeeded)], 2, 0, 0), &["0 losses are told, 1 are"]);
        check(attempts_add_up, &with(vec![line(1, succeeded)], 1, 1, 0), &["1 failures are told, 0 are"]);
    }

    #[test]
    fn an_attempt_must_not_begin_after_the_end_or_a_cancellation() {
        let late = Builder::good().change("a", |job| {
            job.attempts = 2;
            let mut second = attempt(2, AttemptOutcome::Fenced, None);
            second.started_at = Some(genmill_wire::to_pb::timestamp(genmill_core::time::UnixMs(9_000)));
            job.attempt_history.push(second);
        });
        check(nothing_begins_too_late, &late, &["attempt 2 began at 9000"]);
        let cancelled = Builder::good().event_at(900, Event::CancelAnswered { job: "a".to_owned() });
        check(nothing_begins_too_late, &cancelled, &["attempt 1 began at 1000, 99 ms too late"]);
    }
}
