//! The circuit breaker of one model of one provider: whether calls go out now. Pure: the time is an argument.
//!
//! Never here: waiting for it (`gates`), and which failures count (`failure`).

use crate::failure::Health;
use std::time::Duration;
use tokio::time::Instant;

/// So many failures in a row open the circuit.
const FAILURES_MAX: u32 = 5;

/// How long it stays open the first time; doubled each time the probe fails too.
const OPEN_FIRST: Duration = Duration::from_secs(1);

/// The longest that it stays open when nobody asks for longer.
const OPEN_MAX: Duration = Duration::from_secs(60);

/// The states of a circuit, in the words of the pattern: closed lets calls pass, open does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Circuit {
    /// Calls go out.
    #[default]
    Closed,
    /// No call goes out before this time; the first one after it is a probe.
    Open(Instant),
    /// A probe is out. All others wait for what comes of it.
    HalfOpen,
}

/// Permission for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// One of many.
    Call,
    /// The one that shows whether the provider works again.
    Probe,
}

/// Why no call may go out now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not before this time.
    Until(Instant),
    /// Not before the probe has ended.
    Probed,
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// An answer, or a failure that says this of the provider, with the wait that it asks for.
    Told(Health, Option<Duration>),
    /// Nothing: it was given up.
    Nothing,
}

/// Opens when a provider fails several times in a row, or when it asks to be spared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Breaker {
    circuit: Circuit,
    /// Failures since the last answer.
    failures: u32,
    /// How often it was opened since the last answer.
    opened: u32,
}

impl Breaker {
    /// Asks for permission to call.
    ///
    /// # Errors
    /// [`Wait`] when the call has to wait.
    pub fn ask(&mut self, now: Instant) -> Result<Pass, Wait> {
        match self.circuit {
            Circuit::Closed => Ok(Pass::Call),
            Circuit::Open(until) if now < until => Err(Wait::Until(until)),
            Circuit::Open(_) => {
                self.circuit = Circuit::HalfOpen;
                Ok(Pass::Probe)
            }
            Circuit::HalfOpen => Err(Wait::Probed),
        }
    }

    /// Takes what came of a call. Calls that went out before the circuit opened tell nothing new, unless they tell to
    /// wait longer. True when the circuit has changed.
    pub fn came(&mut self, pass: Pass, came: Came, now: Instant) -> bool {
        let before = self.circuit;
        match (came, self.circuit) {
            (Came::Told(Health::Works, _), circuit) => {
                if circuit == Circuit::Closed || pass == Pass::Probe {
                    (self.circuit, self.failures, self.opened) = (Circuit::Closed, 0, 0);
                }
            }
            (Came::Told(Health::Spare, asked), _) => self.open(pass, asked, now),
            (Came::Told(Health::Fails, asked), Circuit::Closed) => {
                self.failures = self.failures.saturating_add(1);
                if asked.is_some() || self.failures >= FAILURES_MAX {
                    self.open(pass, asked, now);
                }
            }
            (Came::Told(Health::Fails, asked), _) if pass == Pass::Probe || asked.is_some() => {
                self.open(pass, asked, now);
            }
            // Somebody else may probe at once.
            (Came::Nothing, Circuit::HalfOpen) if pass == Pass::Probe => self.circuit = Circuit::Open(now),
            (Came::Told(Health::Fails, _) | Came::Nothing, _) => {}
        }
        self.circuit != before
    }

    /// Opens the circuit for as long as is asked for, else for longer each time. While it is open, only a longer wait
    /// counts.
    fn open(&mut self, pass: Pass, asked: Option<Duration>, now: Instant) {
        let own = OPEN_FIRST.saturating_mul(2_u32.saturating_pow(self.opened)).min(OPEN_MAX);
        let until = |wait: Duration| now.checked_add(wait).unwrap_or(now);
        match self.circuit {
            Circuit::Open(before) => self.circuit = Circuit::Open(asked.map_or(before, until).max(before)),
            Circuit::HalfOpen if pass == Pass::Call && asked.is_none() => {}
            Circuit::Closed | Circuit::HalfOpen => {
                self.circuit = Circuit::Open(until(asked.unwrap_or(own)));
                self.opened = self.opened.saturating_add(1);
            }
        }
    }

    /// Whether calls go out.
    #[must_use]
    pub fn circuit(&self) -> Circuit {
        self.circuit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const FAILS: Came = Came::Told(Health::Fails, None);
    const WORKS: Came = Came::Told(Health::Works, None);

    /// A breaker that has just been opened by failures in a row, and when.
    fn open() -> (Breaker, Instant) {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for failure in 1..=FAILURES_MAX {
            assert_eq!(breaker.ask(now), Ok(Pass::Call));
            assert_eq!(breaker.came(Pass::Call, FAILS, now), failure == FAILURES_MAX);
        }
        (breaker, now)
    }

    #[test]
    fn failures_in_a_row_open_the_circuit_and_an_answer_between_does_not_let_them() {
        let (mut breaker, now) = open();
        assert_eq!(breaker.ask(now), Err(Wait::Until(now + OPEN_FIRST)));
        let mut mixed = Breaker::default();
        for _ in 0..FAILURES_MAX {
            mixed.came(Pass::Call, FAILS, now);
            mixed.came(Pass::Call, WORKS, now);
        }
        assert_eq!(mixed.circuit(), Circuit::Closed);
    }

    #[test]
    fn one_probe_decides_for_all() {
        let (mut breaker, now) = open();
        let later = now + OPEN_FIRST;
        assert_eq!(breaker.ask(later), Ok(Pass::Probe));
        assert_eq!(breaker.ask(later), Err(Wait::Probed));
        assert!(breaker.came(Pass::Probe, FAILS, later));
        assert_eq!(breaker.circuit(), Circuit::Open(later + 2 * OPEN_FIRST), "it waits longer each time");
        let again = later + 2 * OPEN_FIRST;
        assert_eq!(breaker.ask(again), Ok(Pass::Probe));
        assert!(breaker.came(Pass::Probe, WORKS, again));
        assert_eq!(breaker.ask(again), Ok(Pass::Call));
    }

    #[test]
    fn a_probe_that_is_given_up_lets_another_go() {
        let (mut breaker, now) = open();
        let later = now + OPEN_FIRST;
        assert_eq!(breaker.ask(later), Ok(Pass::Probe));
        assert!(breaker.came(Pass::Probe, Came::Nothing, later));
        assert_eq!(breaker.ask(later), Ok(Pass::Probe));
    }

    #[test]
    fn a_wait_that_is_asked_for_is_kept_by_all() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        let asks = |seconds| Came::Told(Health::Spare, Some(Duration::from_secs(seconds)));
        assert!(breaker.came(Pass::Call, asks(7), now));
        // Calls that were out already: answers do not open it, a shorter wait does not shorten it.
        assert!(!breaker.came(Pass::Call, WORKS, now + SECOND));
        assert!(!breaker.came(Pass::Call, asks(1), now + SECOND));
        assert!(!breaker.came(Pass::Call, FAILS, now + SECOND));
        assert_eq!(breaker.ask(now + SECOND), Err(Wait::Until(now + 7 * SECOND)));
        assert!(breaker.came(Pass::Call, asks(9), now + SECOND));
        assert_eq!(breaker.ask(now + 10 * SECOND), Ok(Pass::Probe));
    }

    #[test]
    fn an_episode_of_refusals_opens_it_once() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..50 {
            breaker.came(Pass::Call, Came::Told(Health::Spare, None), now);
        }
        assert_eq!(breaker.circuit(), Circuit::Open(now + OPEN_FIRST));
    }

    #[test]
    fn what_others_say_while_a_probe_is_out_does_not_count() {
        let (mut breaker, now) = open();
        let later = now + OPEN_FIRST;
        assert_eq!(breaker.ask(later), Ok(Pass::Probe));
        for came in [FAILS, WORKS, Came::Nothing, Came::Told(Health::Spare, None)] {
            assert!(!breaker.came(Pass::Call, came, later), "{came:?}");
        }
        assert!(breaker.came(Pass::Call, Came::Told(Health::Spare, Some(SECOND)), later));
    }

    #[test]
    fn it_stays_open_for_a_minute_at_most_unless_asked() {
        let (mut breaker, mut now) = open();
        for _ in 0..40 {
            let Err(Wait::Until(until)) = breaker.ask(now) else { panic!("{breaker:?}") };
            assert!(until - now <= OPEN_MAX);
            now = until;
            assert_eq!(breaker.ask(now), Ok(Pass::Probe));
            breaker.came(Pass::Probe, FAILS, now);
        }
    }
}
