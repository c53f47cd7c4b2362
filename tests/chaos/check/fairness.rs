//! Whether tenants of equal weight that always have work waiting are served alike.
//!
//! **What is compared.** A backlog pays with a job's estimated tokens each time the job is fed to the stream, and a claim
//! takes jobs from the stream in the order they were fed. So the service of a tenant is the estimated tokens of its attempts,
//! in the order they started.
//!
//! **When.** While both have more jobs that were never claimed than the look-ahead holds: then some of each wait in the
//! backlog, whatever else happens.
//!
//! **The bound.** Start-time fair queueing keeps the service of two flows with waiting jobs within the largest job of one
//! plus the largest of the other. At the beginning of such a time the stream may hold a whole look-ahead of one tenant alone,
//! fed before. So from any claim to any later one the two differ by at most (look-ahead + 2) times the largest job. The
//! look-ahead is at most the capacity of all workers that count as live, and a worker counts until its lease ends. Beside
//! that, what waits longer pays less, by 2^(1/60) for each second: a tenant whose backlog happens to be some seconds older
//! may have a few hundredths more of all that is served.

use super::Violation;
use super::evidence::{Evidence, WorkerLife, epochs};
use crate::chaos::history::unix_ms;
use crate::chaos::load::STEADY;
use genmill_client::v1;

/// The part of what is served by which older jobs may be ahead: that of four seconds.
const AGEING: u64 = 20;

/// How far two tenants were apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fairness {
    /// The largest difference between their service, from any claim to any later one, in tokens.
    pub apart: u64,
    /// How far apart they may be, in tokens.
    pub bound: u64,
    /// How much both were served while both had work waiting, in tokens.
    pub compared: u64,
}

/// Something that changes what a tenant has waiting, or had served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// A job was stored.
    Stored,
    /// A job was claimed for the first time, or again.
    Claimed { first: bool, tokens: u64 },
}

/// The estimate by which a backlog pays, as `JobSpec::estimated_tokens` has it.
fn estimated_tokens(job: &v1::Job) -> u64 {
    let bytes = u64::try_from(super::evidence::prompt(job).len()).unwrap_or(u64::MAX);
    let tokens_max = job.request.as_ref().and_then(|request| request.max_tokens).unwrap_or(0);
    (bytes / 4 + u64::from(tokens_max)).max(1)
}

/// The most jobs that the look-ahead ever held.
fn look_ahead(evidence: &Evidence) -> u64 {
    let lives = evidence.workers();
    let lease_ms = evidence.settings.lease_ms;
    // Its first heartbeat comes before it says that it is up.
    let counts_from = |life: &WorkerLife<'_>| life.up_ms.saturating_sub(lease_ms);
    let counts_until = |life: &WorkerLife<'_>| life.down.map_or(u64::MAX, |(at, _)| at + lease_ms);
    let live_at = |at: u64| lives.iter().filter(|life| counts_from(life) <= at && at <= counts_until(life)).count();
    let most = lives.iter().map(|life| live_at(counts_from(life))).max().unwrap_or(0);
    u64::try_from(most * evidence.settings.calls_max).unwrap_or(u64::MAX)
}

/// Compares the steady tenants of a run.
#[must_use]
pub fn fairness(evidence: &Evidence) -> Fairness {
    let mut steps: Vec<(u64, usize, Step)> = Vec::new();
    let mut largest = 0;
    for job in evidence.jobs.values() {
        let tenant = job.request.as_ref().map_or("", |request| &request.tenant);
        let Some(which) = STEADY.iter().position(|(steady, _)| *steady == tenant) else { continue };
        let tokens = estimated_tokens(job);
        largest = largest.max(tokens);
        steps.push((unix_ms(job.created_at), which, Step::Stored));
        for (at, epoch) in epochs(job).values().enumerate() {
            steps.push((epoch.started_ms, which, Step::Claimed { first: at == 0, tokens }));
        }
    }
    steps.sort_unstable();
    let look_ahead = look_ahead(evidence);
    let (apart, compared) = compare(&steps, look_ahead);
    Fairness { apart, bound: (look_ahead + 2) * largest + compared / AGEING, compared }
}

/// Walks through a run: the largest difference, and how much was served, while both had more than `look_ahead` waiting.
fn compare(steps: &[(u64, usize, Step)], look_ahead: u64) -> (u64, u64) {
    let mut waiting = [0_u64; 2];
    let (mut apart, mut compared) = (0, 0);
    // The difference now, and its smallest and largest since both have work waiting.
    let (mut difference, mut least, mut most) = (0_i64, 0, 0);
    for together in steps.chunk_by(|one, next| one.0 == next.0) {
        let both_wait = waiting.iter().all(|waiting| *waiting > look_ahead);
        for (_, tenant, step) in together {
            match step {
                Step::Stored => waiting[*tenant] += 1,
                Step::Claimed { first, tokens } => {
                    waiting[*tenant] -= u64::from(*first).min(waiting[*tenant]);
                    let tokens = i64::try_from(*tokens).unwrap_or(i64::MAX);
                    difference += if *tenant == 0 { tokens } else { -tokens };
                    compared += if both_wait { tokens.unsigned_abs() } else { 0 };
                }
            }
        }
        if both_wait {
            (least, most) = (difference.min(least), difference.max(most));
            apart = apart.max(most.abs_diff(least));
        } else {
            (least, most) = (difference, difference);
        }
    }
    (apart, compared)
}

pub(super) fn steady_tenants_are_served_alike(evidence: &Evidence) -> Vec<Violation> {
    let Fairness { apart, bound, .. } = fairness(evidence);
    if apart <= bound {
        return Vec::new();
    }
    vec![Violation::general(format!("the steady tenants were {apart} tokens apart, {bound} are allowed"))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::check::fixture::{Builder, check, job};
    use genmill_core::time::UnixMs;
    use genmill_wire::to_pb::timestamp;

    /// A run of 200 jobs of each tenant, of which those of the second are three times as large; `order` says whose turn it
    /// is, by how many it has had and the other one has had.
    fn served(order: impl Fn(u64, u64) -> usize) -> Builder {
        let mut run = Builder::empty();
        let mut turns = [0, 0];
        for turn in 0..200_u64 {
            let tenant = order(turns[0], turns[1]);
            turns[tenant] += 1;
            add(&mut run, tenant, turns[tenant], Some(10_000 + 10 * turn));
        }
        for tenant in [0, 1] {
            (turns[tenant] + 1..=200).for_each(|number| add(&mut run, tenant, number, None));
        }
        run
    }

    fn add(run: &mut Builder, tenant: usize, number: u64, started_ms: Option<u64>) {
        let id = format!("{tenant}-{number:03}");
        let mut job = job(&id);
        let (name, tokens_max) = STEADY[tenant];
        job.request.iter_mut().for_each(|request| {
            request.tenant = name.to_owned();
            request.max_tokens = Some(tokens_max);
        });
        match started_ms {
            Some(at) => job.attempt_history[0].started_at = Some(timestamp(UnixMs(at))),
            None => job.attempt_history.clear(),
        }
        run.evidence.jobs.insert(id, job);
    }

    #[test]
    fn tenants_that_take_turns_by_tokens_are_served_alike() {
        // 20 + 12/4 tokens against 60 + 12/4: nearly three jobs of the one for each of the other.
        let run = served(|small, large| if small * 23 <= large * 63 { 0 } else { 1 });
        let fairness = fairness(&run.evidence);
        assert!(fairness.apart <= 2 * 63, "{fairness:?}");
        assert!(fairness.compared > 4_000, "{fairness:?}");
        check(steady_tenants_are_served_alike, &run, &[]);
    }

    #[test]
    fn a_tenant_that_is_served_more_is_seen() {
        // One worker with two places: the look-ahead is 2 jobs, so 4 times 63 tokens are allowed, and a twentieth.
        let fairness = fairness(&served(|_, _| 0).evidence);
        assert_eq!(fairness.bound, 4 * 63 + fairness.compared / 20);
        check(steady_tenants_are_served_alike, &served(|small, large| usize::from(small > large)), &["are allowed"]);
        check(steady_tenants_are_served_alike, &served(|_, _| 1), &["are allowed"]);
    }

    #[test]
    fn what_happens_while_one_has_nothing_waiting_is_not_compared() {
        let stored = |tenant, count| (0..count).map(move |_| (1, tenant, Step::Stored));
        let claimed = |at, tenant| (at, tenant, Step::Claimed { first: true, tokens: 10 });
        let alone: Vec<_> = stored(0, 50).chain((2..40).map(|at| claimed(at, 0))).collect();
        assert_eq!(compare(&alone, 4), (0, 0));
        let both: Vec<_> = stored(0, 50).chain(stored(1, 50)).chain((2..40).map(|at| claimed(at, 0))).collect();
        assert_eq!(compare(&both, 4), (380, 380));
        // The second has 4 waiting, which may all be in the stream.
        let few: Vec<_> = stored(0, 50).chain(stored(1, 4)).chain((2..40).map(|at| claimed(at, 0))).collect();
        assert_eq!(compare(&few, 4), (0, 0));
    }

    #[test]
    fn workers_count_until_their_leases_end() {
        use crate::chaos::history::Event;
        let up = |key: &str| Event::WorkerUp { slot: 0, key: key.to_owned(), worker: key.to_owned() };
        let down = |key: &str| Event::WorkerDown { key: key.to_owned(), killed: true };
        let one_after_the_other = Builder::empty().event_at(5_000, down("key-w")).event_at(7_001, up("x"));
        assert_eq!(look_ahead(&one_after_the_other.evidence), 2);
        let overlapping = Builder::empty().event_at(5_000, down("key-w")).event_at(6_999, up("x"));
        assert_eq!(look_ahead(&overlapping.evidence), 4);
    }
}
