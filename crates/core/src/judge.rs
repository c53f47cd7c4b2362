//! What follows from an attempt: the one place that decides about retries.

use crate::attempt::{AttemptEnd, Failure, FailureClass, Generation, Outcome};
use crate::state::{Event, State};

/// The longest wait that a provider may ask for, in milliseconds: a day. A job whose deadline comes before its next
/// attempt expires then.
pub const RETRY_AFTER_MS_MAX: u64 = 24 * 60 * 60 * 1_000;

/// How failures and losses are dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How many failed attempts are followed by another one.
    pub retries_max: u32,
    /// The wait after the first failure, in milliseconds; doubled after each further one.
    pub delay_ms_first: u64,
    /// The longest wait between attempts that nobody asked for, in milliseconds.
    pub delay_ms_max: u64,
    /// A job whose workers were lost this many times is poison.
    pub losses_max: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { retries_max: 3, delay_ms_first: 1_000, delay_ms_max: 600_000, losses_max: 3 }
    }
}

/// What is to be done with a job after an attempt.
#[expect(clippy::large_enum_variant, reason = "most are the large one, and few are alive at a time")]
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Keep the result.
    Succeed(Generation),
    /// Try again after `delay_ms` milliseconds.
    Retry {
        /// How long to wait.
        delay_ms: u64,
        /// Why.
        failure: Failure,
    },
    /// Let it wait until its provider takes calls again: its failures do not count it.
    Wait {
        /// How long, in milliseconds; 0: back in its place, its gate tells.
        delay_ms: u64,
        /// Why.
        failure: Failure,
    },
    /// Give up.
    Fail(Failure),
    /// End as cancelled.
    Cancel,
    /// End as expired.
    Expire,
    /// Put back in its place; nobody is to blame.
    HandBack,
}

impl Verdict {
    /// What happens to the job.
    #[must_use]
    pub const fn event(&self) -> Event {
        match self {
            Self::Succeed(_) => Event::Succeed,
            Self::Wait { delay_ms: 0, .. } => Event::HandBack,
            Self::Retry { .. } | Self::Wait { .. } => Event::Retry,
            Self::Fail(_) => Event::Fail,
            Self::Cancel => Event::Cancel,
            Self::Expire => Event::Expire,
            Self::HandBack => Event::HandBack,
        }
    }

    /// How the attempt is kept.
    #[must_use]
    pub const fn attempt_end(&self) -> AttemptEnd {
        match self {
            Self::Succeed(_) => AttemptEnd::Succeeded,
            Self::Retry { .. } | Self::Wait { .. } | Self::Fail(_) => AttemptEnd::Failed,
            Self::Cancel => AttemptEnd::Cancelled,
            Self::Expire => AttemptEnd::Expired,
            Self::HandBack => AttemptEnd::HandedBack,
        }
    }

    /// The failure, when there was one.
    #[must_use]
    pub const fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Retry { failure, .. } | Self::Wait { failure, .. } | Self::Fail(failure) => Some(failure),
            Self::Succeed(_) | Self::Cancel | Self::Expire | Self::HandBack => None,
        }
    }

    /// Whether it counts among the job's failures.
    #[must_use]
    pub const fn counts(&self) -> bool {
        matches!(self, Self::Retry { .. } | Self::Fail(_))
    }
}

/// What holds calls back that a provider throttles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttle {
    /// The gate through which the job came.
    Gate,
    /// Nothing but the job's own delay.
    Delay,
}

/// Decides what follows from `outcome` when `failures` attempts of the job had failed before. `random` spreads retries
/// of jobs that failed together. A throttled job has not failed: it waits for as long as it takes.
#[must_use]
pub fn judge(outcome: Outcome, failures: u32, policy: &Policy, throttle: Throttle, random: u64) -> Verdict {
    match outcome {
        Outcome::Generated(generation) => Verdict::Succeed(generation),
        Outcome::Cancelled => Verdict::Cancel,
        Outcome::DeadlinePassed => Verdict::Expire,
        Outcome::HandedBack => Verdict::HandBack,
        Outcome::Failed(failure) if failure.class == FailureClass::Throttled => {
            let delay_ms = match throttle {
                Throttle::Gate => 0,
                Throttle::Delay => delay_ms(failures, &failure, policy, random).max(1),
            };
            Verdict::Wait { delay_ms, failure }
        }
        Outcome::Failed(failure) if failure.is_retried() && failures < policy.retries_max => {
            Verdict::Retry { delay_ms: delay_ms(failures, &failure, policy, random), failure }
        }
        Outcome::Failed(failure) => Verdict::Fail(failure),
    }
}

/// First delay times 2 for every failure before, at least what the provider asked for, and up to a quarter more: of a
/// long wait, as much more as of the longest that nobody asked for.
fn delay_ms(failures: u32, failure: &Failure, policy: &Policy, random: u64) -> u64 {
    let doubled = policy.delay_ms_first.saturating_mul(2_u64.saturating_pow(failures));
    let asked_ms = failure.retry_after_ms.unwrap_or(0).min(RETRY_AFTER_MS_MAX);
    let delay_ms = doubled.min(policy.delay_ms_max).max(asked_ms);
    delay_ms + random % (delay_ms.min(policy.delay_ms_max) / 4 + 1)
}

/// What a lost worker means for a job that had lost `losses` workers before: back to the queue, or the end as poison.
#[must_use]
pub fn judge_loss(losses: u32, policy: &Policy) -> (State, Option<Failure>) {
    let losses = losses.saturating_add(1);
    if losses < policy.losses_max {
        return (State::Queued, None);
    }
    let message = format!(
        "lost its worker {losses} times: either the job makes its workers crash, or they are stopped before they finish"
    );
    (State::Failed, Some(Failure::new(FailureClass::Poison, message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(class: FailureClass, retry_after_ms: Option<u64>) -> Outcome {
        Outcome::Failed(Failure::new(class, "x").retry_after_ms(retry_after_ms))
    }

    fn check(outcome: Outcome, failures: u32, delay_ms: Option<u64>) {
        let verdict = judge(outcome, failures, &Policy::default(), Throttle::Delay, 0);
        assert!(verdict.counts());
        let delay = match verdict {
            Verdict::Retry { delay_ms, .. } => Some(delay_ms),
            Verdict::Fail(_) => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(delay, delay_ms);
    }

    #[test]
    fn a_passing_fault_is_retried_three_times_with_doubled_delays() {
        for class in [FailureClass::Transient, FailureClass::Timeout, FailureClass::Overloaded, FailureClass::CutStream]
        {
            check(failed(class, None), 0, Some(1_000));
            check(failed(class, None), 1, Some(2_000));
            check(failed(class, None), 2, Some(4_000));
            check(failed(class, None), 3, None);
        }
    }

    #[test]
    fn a_fault_that_is_known_to_last_is_not_retried_whatever_its_class() {
        let failure = Failure::new(FailureClass::CutStream, "x").lasting();
        check(Outcome::Failed(failure), 0, None);
    }

    #[test]
    fn a_lasting_fault_is_not_retried() {
        for class in [
            FailureClass::Invalid,
            FailureClass::Auth,
            FailureClass::NotFound,
            FailureClass::Poison,
            FailureClass::Internal,
            FailureClass::Quota,
            FailureClass::ContentFilter,
            FailureClass::ContextOverflow,
        ] {
            check(failed(class, Some(1)), 0, None);
        }
    }

    #[test]
    fn the_provider_may_ask_for_a_longer_wait_but_not_for_a_shorter_one() {
        check(failed(FailureClass::Transient, Some(30_000)), 0, Some(30_000));
        check(failed(FailureClass::Transient, Some(1)), 1, Some(2_000));
        check(failed(FailureClass::Transient, Some(3_600_000)), 0, Some(3_600_000));
        check(failed(FailureClass::Transient, Some(u64::MAX)), 0, Some(RETRY_AFTER_MS_MAX));
    }

    #[test]
    fn a_throttled_job_waits_however_often_it_was() {
        for (throttle, asked_ms, delay_ms, event) in [
            (Throttle::Gate, Some(30_000), 0, Event::HandBack),
            (Throttle::Delay, Some(30_000), 30_000, Event::Retry),
            (Throttle::Delay, None, 20_000, Event::Retry),
        ] {
            let policy = Policy { delay_ms_max: 20_000, ..Policy::default() };
            let verdict = judge(failed(FailureClass::Throttled, asked_ms), 100, &policy, throttle, 0);
            assert!(matches!(verdict, Verdict::Wait { delay_ms: ms, .. } if ms == delay_ms), "{verdict:?}");
            assert_eq!((verdict.event(), verdict.attempt_end()), (event, AttemptEnd::Failed));
            assert!(!verdict.counts() && verdict.failure().is_some());
        }
    }

    #[test]
    fn jitter_makes_a_delay_up_to_a_quarter_longer() {
        for random in [0, 1, 250, 251, u64::MAX] {
            let failure = Failure::new(FailureClass::Transient, "x");
            let delay_ms = delay_ms(0, &failure, &Policy::default(), random);
            assert!((1_000..=1_250).contains(&delay_ms), "{delay_ms}");
        }
        assert_eq!(delay_ms(0, &Failure::new(FailureClass::Transient, "x"), &Policy::default(), 250), 1_250);
        let hour = Failure::new(FailureClass::Throttled, "x").retry_after_ms(Some(3_600_000));
        let longest = (0..300_000).map(|random| delay_ms(0, &hour, &Policy::default(), random)).max();
        assert_eq!(longest, Some(3_750_000));
    }

    #[test]
    fn a_job_that_loses_three_workers_is_poison() {
        let policy = Policy::default();
        assert_eq!(judge_loss(0, &policy).0, State::Queued);
        assert_eq!(judge_loss(1, &policy).0, State::Queued);
        let (state, failure) = judge_loss(2, &policy);
        assert_eq!(state, State::Failed);
        assert_eq!(failure.unwrap().class, FailureClass::Poison);
    }
}
