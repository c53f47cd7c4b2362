//! The ledger against the provider's bill.
//!
//! Every attempt makes one call at most, and a call belongs to a job (by its content) and to a worker's process (by its
//! key). So attempts and calls are compared for each job and process:
//!
//! - Every cost that is booked is that of one call, which told its price. None is booked twice, none is made up.
//! - Every call that was billed and is not booked belongs to an attempt whose cost is unknown or estimated, and that is allowed only to
//!   1. an attempt that was lost with its worker: the process was killed, or gave up a drain because Redis was away,
//!   2. an attempt that was told to stop: it hung up before the price. That shows in its outcome (cancelled, expired, timed
//!      out, handed back, fenced), unless its text was whole already: then it succeeded,
//!   3. an attempt whose connection to the provider was at fault, by the schedule or by a directive of its prompt.
//! - A worker that lives tells of every attempt that called: one that was only taken for lost comes back, and is fenced.

use super::Violation;
use super::evidence::{Epoch, Evidence, WorkerLife, epochs, model, prompt};
use crate::chaos::history::Event;
use crate::chaos::schedule::{Link, Process, Target};
use genmill_client::v1;
use genmill_core::attempt::{Usage, UsageDetails};
use genmill_core::money::{Picodollars, price};
use genmill_standin::bill::Call;
use std::collections::{BTreeMap, HashMap};
use v1::AttemptOutcome;

/// How long a drain of a worker takes at most, in milliseconds: what it waits for running jobs, for Redis and for leaving.
const DRAIN_MS: u64 = 12_000;

/// The sums of a run, in nanodollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// What the provider billed.
    pub billed: u64,
    /// What the ledger knows.
    pub booked: u64,
    /// What the provider billed for attempts whose cost is unknown.
    pub unknown: u64,
    /// How many calls that was.
    pub unknown_calls: usize,
}

/// The attempts and calls of one job and one worker's process.
struct Account<'a> {
    job: &'a str,
    prompt: &'a str,
    life: Option<&'a WorkerLife<'a>>,
    epochs: Vec<Epoch<'a>>,
    calls: Vec<&'a Call>,
}

/// What a call was billed, in nanodollars.
fn bill(call: &Call, job: &v1::Job) -> u64 {
    let usage =
        Usage { prompt_tokens: call.prompt_tokens, completion_tokens: call.completion_tokens, cached_prompt_tokens: 0 };
    let picodollars = model(job).map_or(Picodollars(0), |model| price(&usage, &UsageDetails::default(), &model.rates));
    picodollars.to_nanodollars().0
}

/// A call with what it was billed; those that cost nothing are left out.
type Billed<'a> = (&'a Call, u64);

/// What is left when what the ledger knows is taken from the bill.
struct Compared<'a> {
    booked: u64,
    /// Costs in the ledger that no call has.
    made_up: Vec<u64>,
    unbooked: Vec<Billed<'a>>,
}

fn compare<'a>(account: &Account<'a>, job: &v1::Job) -> Compared<'a> {
    let billed = account.calls.iter().map(|call| (*call, bill(call, job)));
    let mut unbooked: Vec<Billed<'a>> = billed.filter(|(_, cost)| *cost > 0).collect();
    let (mut booked, mut made_up) = (0, Vec::new());
    for cost in account.epochs.iter().filter_map(Epoch::known_cost).filter(|cost| *cost > 0) {
        match unbooked.iter().position(|(call, billed)| call.usage_sent && *billed == cost) {
            Some(at) => {
                booked += cost;
                unbooked.swap_remove(at);
            }
            None => made_up.push(cost),
        }
    }
    Compared { booked, made_up, unbooked }
}

/// Whether an attempt may have called without anybody knowing its cost.
fn may_be_unknown(epoch: &Epoch<'_>, account: &Account<'_>, evidence: &Evidence) -> bool {
    let Some(line) = epoch.told() else { return lost_for_good(account.life, evidence) };
    if line.cost.as_ref().is_some_and(|cost| !cost.estimated) {
        return false;
    }
    let timed_out = line.error.as_ref().is_some_and(|error| error.error_class() == v1::ErrorClass::Timeout);
    let stopped = match line.outcome() {
        AttemptOutcome::Cancelled | AttemptOutcome::Expired | AttemptOutcome::HandedBack | AttemptOutcome::Fenced => {
            true
        }
        AttemptOutcome::Succeeded => may_have_been_stopped(epoch, account, evidence),
        AttemptOutcome::Failed | AttemptOutcome::Lost | AttemptOutcome::Unspecified => timed_out,
    };
    let links = account.life.map(|life| evidence.provider_link(life.key)).unwrap_or_default();
    stopped || account.prompt.starts_with("!cut-after") || evidence.faulty(&links, epoch.started_ms, epoch.ended_ms())
}

/// Whether a successful attempt may have been told to stop when its text was whole: its job was cancelled, was to end by a
/// certain time, or its worker was draining.
fn may_have_been_stopped(epoch: &Epoch<'_>, account: &Account<'_>, evidence: &Evidence) -> bool {
    let request = evidence.jobs.get(account.job).and_then(|job| job.request.as_ref());
    let bounded = request.is_some_and(|request| {
        request.deadline.is_some()
            || request.timeout_ms.is_some_and(|ms| epoch.started_ms + ms <= epoch.ended_ms() + 500)
    });
    let cancelled = evidence.history.iter().any(|entry| match &entry.event {
        Event::CancelAsked { job } => job == account.job && entry.at_ms <= epoch.ended_ms(),
        _ => false,
    });
    let drained = account
        .life
        .and_then(|life| life.down)
        .is_some_and(|(at, killed)| !killed && epoch.ended_ms() + DRAIN_MS >= at);
    bounded || cancelled || drained
}

/// Whether what a worker's process held when it ended was lost.
fn lost_for_good(life: Option<&WorkerLife<'_>>, evidence: &Evidence) -> bool {
    // It was claimed by a process that never got ready, or the ledger names nobody.
    let Some(life) = life else { return true };
    match life.down {
        Some((_, true)) => true,
        // It gives up when Redis is away for long; the fault may have ended meanwhile.
        Some((at_ms, false)) => {
            let redis = evidence
                .slot(life.key)
                .map(|slot| [Target::Process(Process::Redis), Target::Link(Link::WorkerRedis(slot))]);
            redis.is_some_and(|redis| evidence.faulty(&redis, at_ms.saturating_sub(DRAIN_MS), at_ms))
        }
        None => false,
    }
}

fn judge(account: &Account<'_>, job: &v1::Job, evidence: &Evidence) -> Vec<Violation> {
    let compared = compare(account, job);
    let worker = account.life.map_or("nobody", |life| life.worker);
    let mut wrong: Vec<String> = (compared.made_up.iter())
        .map(|cost| format!("{worker} booked {cost} nanodollars, which no call of its was billed"))
        .collect();
    let unknown = account.epochs.iter().filter(|epoch| may_be_unknown(epoch, account, evidence)).count();
    if compared.unbooked.len() > unknown {
        let costs: Vec<u64> = compared.unbooked.iter().map(|(_, cost)| *cost).collect();
        wrong.push(format!("{worker} was billed {costs:?} and booked neither; it may not know {unknown} of them"));
    }
    let told = account.epochs.iter().filter(|epoch| epoch.told().is_some()).count();
    if account.calls.len() > told && !lost_for_good(account.life, evidence) {
        wrong.push(format!("{worker} lives, made {} calls and told of {told} attempts", account.calls.len()));
    }
    if account.calls.len() > account.epochs.len() {
        wrong.push(format!("{worker} made {} calls in {} attempts", account.calls.len(), account.epochs.len()));
    }
    wrong.into_iter().map(|what| Violation::of(account.job, what)).collect()
}

/// Sorts all attempts and calls into accounts. Calls that belong to no job are returned beside.
fn accounts<'a>(evidence: &'a Evidence, lives: &'a [WorkerLife<'a>]) -> (Vec<Account<'a>>, Vec<&'a Call>) {
    let by_content: HashMap<String, &'a str> = (evidence.jobs.iter())
        .map(|(id, job)| {
            (format!("{}: {}", model(job).map_or("", |model| model.backend_name), prompt(job)), id.as_str())
        })
        .collect();
    let by_key: HashMap<&str, &WorkerLife<'_>> = lives.iter().map(|life| (life.key, life)).collect();
    let by_worker: HashMap<&str, &WorkerLife<'_>> = lives.iter().map(|life| (life.worker, life)).collect();
    let mut accounts: BTreeMap<(&str, &str), Account<'a>> = BTreeMap::new();
    let new = |job: &'a str, life| {
        let prompt = evidence.jobs.get(job).map_or("", prompt);
        Account { job, prompt, life, epochs: Vec::new(), calls: Vec::new() }
    };
    for (id, job) in &evidence.jobs {
        for epoch in epochs(job).into_values() {
            let life = by_worker.get(epoch.worker).copied();
            let account = accounts.entry((id, epoch.worker)).or_insert_with(|| new(id, life));
            account.epochs.push(epoch);
        }
    }
    let mut strays = Vec::new();
    for call in &evidence.calls {
        match (by_content.get(&call.content), by_key.get(call.key.as_str())) {
            (Some(id), Some(life)) => {
                let account = accounts.entry((id, life.worker)).or_insert_with(|| new(id, Some(*life)));
                account.calls.push(call);
            }
            (_, None) | (None, _) => strays.push(call),
        }
    }
    (accounts.into_values().collect(), strays)
}

pub(super) fn ledger_is_the_bill(evidence: &Evidence) -> Vec<Violation> {
    let lives = evidence.workers();
    let (accounts, strays) = accounts(evidence, &lives);
    let judged = accounts.iter().filter_map(|account| Some(judge(account, evidence.jobs.get(account.job)?, evidence)));
    let strays = strays.into_iter().map(|call| Violation::general(format!("a call that is nobody's: {call:?}")));
    judged.flatten().chain(strays).collect()
}

/// The sums of a run.
#[must_use]
pub fn books(evidence: &Evidence) -> Books {
    let lives = evidence.workers();
    let (accounts, _) = accounts(evidence, &lives);
    let mut books = Books::default();
    for account in &accounts {
        let Some(job) = evidence.jobs.get(account.job) else { continue };
        let compared = compare(account, job);
        books.billed += account.calls.iter().map(|call| bill(call, job)).sum::<u64>();
        books.booked += compared.booked;
        books.unknown += compared.unbooked.iter().map(|(_, cost)| *cost).sum::<u64>();
        books.unknown_calls += compared.unbooked.len();
    }
    books
}

pub(super) fn jobs_cost_what_attempts_cost(evidence: &Evidence) -> Vec<Violation> {
    let judge = |(id, job): (&String, &v1::Job)| {
        let costs: Vec<Option<u64>> = epochs(job).values().map(Epoch::cost).collect();
        // Unknown when one is, or when there is none.
        let sum = costs.iter().copied().reduce(|sum, cost| Some(sum? + cost?)).flatten();
        let told = job.cost.as_ref().map(|cost| cost.nanodollars);
        (told != sum).then(|| Violation::of(id, format!("costs {told:?}, its attempts {costs:?}")))
    };
    evidence.jobs.iter().filter_map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::check::fixture::{Builder, CALL_NANODOLLARS, attempt, call, check};
    use crate::chaos::schedule::{Fault, Planned};

    /// A run with one job, which had these attempts, and these calls.
    fn run(attempts: &[(u32, AttemptOutcome, Option<u64>)], calls: usize) -> Builder {
        let lines: Vec<v1::Attempt> = attempts.iter().map(|(epoch, end, cost)| attempt(*epoch, *end, *cost)).collect();
        let mut run = Builder::good().without("b").change("a", |job| job.attempt_history.clone_from(&lines));
        run.evidence.calls = vec![call("a"); calls];
        run
    }

    fn down(killed: bool) -> Event {
        Event::WorkerDown { key: "key-w".to_owned(), killed }
    }

    const BOOKED: Option<u64> = Some(CALL_NANODOLLARS);

    #[test]
    fn what_is_billed_must_be_booked_once() {
        use AttemptOutcome::{Failed, Succeeded};
        check(ledger_is_the_bill, &Builder::good(), &[]);
        check(ledger_is_the_bill, &run(&[(1, Failed, Some(0)), (2, Succeeded, BOOKED)], 1), &[]);
        check(ledger_is_the_bill, &run(&[(1, Succeeded, Some(7))], 1), &["booked 7 nanodollars", "billed [1500]"]);
        check(ledger_is_the_bill, &run(&[(1, Succeeded, Some(0))], 1), &["was billed [1500]"]);
        check(ledger_is_the_bill, &run(&[(1, Failed, BOOKED), (2, Succeeded, BOOKED)], 1), &["booked 1500"]);
        check(
            ledger_is_the_bill,
            &run(&[(1, Succeeded, BOOKED)], 2),
            &["billed [1500]", "made 2 calls and told of 1", "made 2 calls in 1 attempts"],
        );
    }

    #[test]
    fn a_price_that_was_not_told_cannot_be_booked() {
        let mut run = run(&[(1, AttemptOutcome::Succeeded, BOOKED)], 1);
        run.evidence.calls[0].usage_sent = false;
        check(ledger_is_the_bill, &run, &["booked 1500 nanodollars", "billed [1500]"]);
    }

    #[test]
    fn a_cost_may_be_unknown_when_the_attempt_was_told_to_stop() {
        use AttemptOutcome::{Cancelled, Expired, Fenced, HandedBack, Lost};
        for outcome in [Cancelled, Expired, HandedBack] {
            check(ledger_is_the_bill, &run(&[(1, outcome, None)], 1), &[]);
        }
        check(ledger_is_the_bill, &run(&[(1, Lost, None), (1, Fenced, None)], 1), &[]);
        check(ledger_is_the_bill, &run(&[(1, Lost, None), (1, Fenced, BOOKED)], 1), &[]);
        check(ledger_is_the_bill, &run(&[(1, Lost, None), (1, Fenced, Some(0))], 1), &["was billed [1500]"]);
        check(ledger_is_the_bill, &run(&[(1, AttemptOutcome::Succeeded, None)], 1), &["was billed [1500]"]);
        check(ledger_is_the_bill, &run(&[(1, AttemptOutcome::Failed, None)], 1), &["was billed [1500]"]);
    }

    #[test]
    fn a_success_may_cost_nobody_knows_what_when_it_was_told_to_stop() {
        let success = || run(&[(1, AttemptOutcome::Succeeded, None)], 1);
        check(ledger_is_the_bill, &success().event_at(3_000, down(false)), &[]);
        check(ledger_is_the_bill, &success().event_at(30_000, down(false)), &["was billed [1500]"]);
        check(ledger_is_the_bill, &success().event_at(3_000, down(true)), &["was billed [1500]"]);
        let cancelled = |at| success().event_at(at, Event::CancelAsked { job: "a".to_owned() });
        check(ledger_is_the_bill, &cancelled(1_500), &[]);
        check(ledger_is_the_bill, &cancelled(2_500), &["was billed [1500]"]);
    }

    #[test]
    fn a_cost_may_be_unknown_when_the_connection_was_at_fault() {
        let faulty = |link, at_ms| {
            let planned = Planned { at_ms: 0, for_ms: 0, fault: Fault::Cut(link, 0) };
            run(&[(1, AttemptOutcome::Failed, None)], 1)
                .event_at(at_ms, Event::FaultBegan { planned })
                .event_at(at_ms, Event::FaultEnded { planned })
        };
        check(ledger_is_the_bill, &faulty(Link::WorkerProvider(0), 1_500), &[]);
        check(ledger_is_the_bill, &faulty(Link::WorkerProvider(1), 1_500), &["was billed [1500]"]);
        check(ledger_is_the_bill, &faulty(Link::WorkerRedis(0), 1_500), &["was billed [1500]"]);
        check(ledger_is_the_bill, &faulty(Link::WorkerProvider(0), 2_500), &["was billed [1500]"]);
    }

    #[test]
    fn a_cost_is_lost_only_with_its_worker() {
        let lost = || run(&[(1, AttemptOutcome::Lost, None)], 1);
        check(ledger_is_the_bill, &lost(), &["was billed [1500]", "lives, made 1 calls and told of 0"]);
        check(ledger_is_the_bill, &lost().event(down(true)), &[]);
        check(ledger_is_the_bill, &lost().event(down(false)), &["was billed [1500]", "made 1 calls and told of 0"]);
        let planned = Planned { at_ms: 0, for_ms: 0, fault: Fault::Kill(Process::Redis) };
        let without_redis = lost().event(Event::FaultBegan { planned }).event(down(false));
        check(ledger_is_the_bill, &without_redis, &[]);
        // A lease whose claim was answered to nobody: no call was made.
        check(ledger_is_the_bill, &run(&[(1, AttemptOutcome::Lost, None)], 0), &[]);
    }

    #[test]
    fn a_call_that_is_nobodys_is_seen() {
        let mut run = Builder::good();
        run.evidence.calls.push(call("x"));
        check(ledger_is_the_bill, &run, &["a call that is nobody's"]);
    }

    #[test]
    fn the_sums_add_up() {
        let run = run(&[(1, AttemptOutcome::Lost, None), (2, AttemptOutcome::Succeeded, BOOKED)], 2);
        let sums = books(&run.evidence);
        assert_eq!(sums, Books { billed: 3_000, booked: 1_500, unknown: 1_500, unknown_calls: 1 });
    }

    #[test]
    fn a_job_must_cost_the_sum_of_its_attempts() {
        use AttemptOutcome::{Failed, Fenced, Lost, Succeeded};
        let cost = |job: Option<u64>, attempts: &[(u32, AttemptOutcome, Option<u64>)]| {
            let cost = job.map(|nanodollars| v1::Cost { nanodollars, estimated: false });
            run(attempts, 1).change("a", |job| job.cost = cost)
        };
        check(jobs_cost_what_attempts_cost, &cost(Some(5), &[(1, Failed, Some(2)), (2, Succeeded, Some(3))]), &[]);
        check(
            jobs_cost_what_attempts_cost,
            &cost(Some(3), &[(1, Failed, None), (2, Succeeded, Some(3))]),
            &["costs Some(3)"],
        );
        check(jobs_cost_what_attempts_cost, &cost(None, &[(1, Lost, None), (2, Succeeded, Some(3))]), &[]);
        check(jobs_cost_what_attempts_cost, &cost(Some(3), &[(1, Lost, None), (1, Fenced, Some(3))]), &[]);
    }
}
