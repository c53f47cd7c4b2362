//! A job's life: its states and the one table that tells what may follow.
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
    /// It was lost with a worker once too often.
    Poison,
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

/// Everything that may ever happen to a job: in which state, what, and the state after it.
pub const TRANSITIONS: [(State, Event, State); 14] = [
    (State::Queued, Event::Claim, State::Running),
    (State::Running, Event::Succeed, State::Succeeded),
    (State::Running, Event::Fail, State::Failed),
    (State::Running, Event::Retry, State::Delayed),
    (State::Delayed, Event::Promote, State::Queued),
    (State::Running, Event::HandBack, State::Queued),
    (State::Running, Event::Reclaim, State::Queued),
    (State::Running, Event::Poison, State::Failed),
    (State::Queued, Event::Cancel, State::Cancelled),
    (State::Delayed, Event::Cancel, State::Cancelled),
    (State::Running, Event::Cancel, State::Cancelled),
    (State::Queued, Event::Expire, State::Expired),
    (State::Delayed, Event::Expire, State::Expired),
    (State::Running, Event::Expire, State::Expired),
];

/// The state after `event` in `state`.
///
/// # Errors
/// [`IllegalTransition`] when `event` may not happen then. Final states never change.
pub fn transition(state: State, event: Event) -> Result<State, IllegalTransition> {
    let row = TRANSITIONS.iter().find(|(from, what, _)| (*from, *what) == (state, event));
    row.map(|(_, _, to)| *to).ok_or(IllegalTransition { state, event })
}

impl Event {
    /// Every event.
    pub const ALL: [Self; 10] = [
        Self::Claim,
        Self::Succeed,
        Self::Fail,
        Self::Retry,
        Self::HandBack,
        Self::Reclaim,
        Self::Poison,
        Self::Promote,
        Self::Cancel,
        Self::Expire,
    ];
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

    #[test]
    fn final_states_never_change_and_all_others_can_end() {
        for state in State::ALL {
            let can_change = Event::ALL.into_iter().any(|event| transition(state, event).is_ok());
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
    #[test]
    fn each_event_happens_somewhere_and_leads_to_one_state() {
        for event in Event::ALL {
            let mut from: Vec<State> = TRANSITIONS.iter().filter(|row| row.1 == event).map(|row| row.0).collect();
            assert!(!from.is_empty(), "{event:?} never happens");
            let rows = from.len();
            from.sort_unstable();
            from.dedup();
            assert_eq!(from.len(), rows, "{event:?} has two rows for one state");
        }
    }

    /// The transitions that a diagram shows. A line is `A --Event--> B --Event--> C`, with `|` between alternatives.
    fn drawn(diagram: &str) -> Vec<String> {
        let names = |part: &str| part.split('|').map(|name| name.trim().to_owned()).collect::<Vec<_>>();
        let mut arrows = Vec::new();
        for line in diagram.lines() {
            let parts: Vec<_> = line.split("--").map(|part| names(part.trim_start_matches('>'))).collect();
            assert!(parts.len() >= 3 && parts.len() % 2 == 1, "no arrow, or half of one: {line}");
            for arrow in parts.windows(3).step_by(2) {
                let [from, events, to] = arrow else { unreachable!("windows of three") };
                for (from, event) in from.iter().flat_map(|from| events.iter().map(move |event| (from, event))) {
                    arrows.extend(to.iter().map(|to| format!("{from} --{event}--> {to}")));
                }
            }
        }
        arrows.sort_unstable();
        arrows
    }

    #[test]
    fn the_diagram_in_the_architecture_shows_this_table() {
        let architecture = include_str!("../../../ARCHITECTURE.md");
        let (_, states) = architecture.split_once("\n## States\n\n```\n").unwrap();
        let (diagram, _) = states.split_once("\n```\n").unwrap();
        let mut table = TRANSITIONS.map(|(from, event, to)| format!("{from:?} --{event:?}--> {to:?}"));
        table.sort_unstable();
        assert_eq!(drawn(diagram), table);
    }
}
