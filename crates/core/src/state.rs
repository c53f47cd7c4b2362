//! A job's life: its states and the one function that tells what may follow.
//!
//! Never here: how a transition is carried out (each is one script of the queue).

use serde::{Deserialize, Serialize};

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Waits for a worker.
    Queued,
    /// Waits for its next attempt's time.
    Delayed,
    /// A worker holds its lease.
    Running,
    /// Final: finished with a result.
    Succeeded,
    /// Final: finished without a result.
    Failed,
    /// Final: cancelled by a caller.
    Cancelled,
    /// Final: its deadline passed.
    Expired,
}

/// What may happen to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker takes it.
    Claim,
    /// The attempt produced a result.
    Succeed,
    /// The attempt failed for good.
    Fail,
    /// The attempt failed and may be repeated after a while.
    Retry,
    /// The worker gives it back unfinished.
    HandBack,
    /// The worker was lost: its lease ran out.
    Reclaim,
    /// Its next attempt's time has come.
    Promote,
    /// A caller cancels it.
    Cancel,
    /// Its deadline passes.
    Expire,
}

/// Something that may not happen in this state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} may not happen to a job that is {state}")]
pub struct IllegalTransition {
    /// The state.
    pub state: State,
    /// The event.
    pub event: Event,
}

/// The state after `event` in `state`.
///
/// # Errors
/// [`IllegalTransition`] when `event` may not happen then. Final states never change.
pub fn transition(state: State, event: Event) -> Result<State, IllegalTransition> {
    match (state, event) {
        (State::Queued, Event::Claim) => Ok(State::Running),
        (State::Running, Event::Succeed) => Ok(State::Succeeded),
        (State::Running, Event::Fail) => Ok(State::Failed),
        (State::Running, Event::Retry) => Ok(State::Delayed),
        (State::Running, Event::HandBack | Event::Reclaim) | (State::Delayed, Event::Promote) => Ok(State::Queued),
        (State::Queued | State::Delayed | State::Running, Event::Cancel) => Ok(State::Cancelled),
        (State::Queued | State::Delayed | State::Running, Event::Expire) => Ok(State::Expired),
        (state, event) => Err(IllegalTransition { state, event }),
    }
}

impl State {
    /// Every state.
    pub const ALL: [Self; 7] =
        [Self::Queued, Self::Delayed, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled, Self::Expired];

    /// The name under which it is stored and shown.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Delayed => "delayed",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }

    /// The state of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// True when nothing can follow.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled | Self::Expired)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 9] = [
        Event::Claim,
        Event::Succeed,
        Event::Fail,
        Event::Retry,
        Event::HandBack,
        Event::Reclaim,
        Event::Promote,
        Event::Cancel,
        Event::Expire,
    ];

    #[test]
    fn final_states_never_change_and_all_others_can_end() {
        for state in State::ALL {
            let can_change = EVENTS.iter().any(|event| transition(state, *event).is_ok());
            assert_eq!(can_change, !state.is_final(), "{state}");
        }
    }

    #[test]
    fn only_a_running_job_can_succeed_or_fail() {
        for state in State::ALL {
            let running = state == State::Running;
            assert_eq!(transition(state, Event::Succeed).is_ok(), running);
            assert_eq!(transition(state, Event::Fail).is_ok(), running);
        }
    }

    #[test]
    fn every_state_is_found_by_its_name() {
        for state in State::ALL {
            assert_eq!(State::from_name(state.name()), Some(state));
        }
    }
}
