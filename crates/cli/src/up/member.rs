//! What a mill consists of, in which order it starts and stops, and what follows when a part dies. Pure.

use genmill_daemon::config::Config;
use std::time::Duration;

/// A process of the mill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Redis,
    Scheduler,
    WorkerGpu,
    WorkerApi,
}

/// Where a member is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Has not been started.
    Idle,
    /// Runs and has not said that it is ready.
    Starting,
    /// Runs.
    Ready,
    /// Died; will be started again.
    Down,
    /// Has ended for good.
    Gone,
}

/// What follows when a member dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It is started again after a wait.
    Restart(Duration),
    /// The mill cannot run, because its configuration is wrong.
    WrongConfig,
    /// The mill cannot run.
    GiveUp,
}

/// How a member died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Death {
    /// Its exit code; `None` when it was killed by a signal.
    pub(crate) code: Option<i32>,
    /// How many times in a row it has died now.
    pub(crate) in_a_row: u32,
    /// Whether the mill has been ready as a whole.
    pub(crate) mill_was_ready: bool,
}

/// How long a member must have been ready for its earlier deaths to be forgotten.
pub(crate) const STABLE_AFTER: Duration = Duration::from_secs(60);
/// How often a member may die before the mill has ever been ready.
const STARTS_MAX: u32 = 5;
const FIRST_DELAY: Duration = Duration::from_secs(1);
const DELAY_MAX: Duration = Duration::from_secs(30);
/// What stopping may take beyond draining: ending processes, and Redis writing what it has.
const STOP_MARGIN: Duration = Duration::from_secs(10);

impl Role {
    /// Every role of a mill; `Redis` only when it is private.
    pub(crate) const ALL: [Self; 4] = [Self::Redis, Self::Scheduler, Self::WorkerGpu, Self::WorkerApi];

    /// The program, as people know it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis-server",
            Self::Scheduler => "genmill-scheduler",
            Self::WorkerGpu => "genmill-worker-gpu",
            Self::WorkerApi => "genmill-worker-api",
        }
    }

    /// Members start when all of lower stages are ready, and stop when all of higher ones are gone.
    pub(crate) const fn stage(self) -> u8 {
        match self {
            Self::Redis => 0,
            Self::Scheduler => 1,
            Self::WorkerGpu | Self::WorkerApi => 2,
        }
    }
}

/// Whom to start now.
pub(crate) fn to_start(members: &[(Role, Phase)]) -> Vec<Role> {
    let blocked = |stage| members.iter().any(|(role, phase)| role.stage() < stage && *phase != Phase::Ready);
    let startable = members.iter().filter(|(role, phase)| *phase == Phase::Idle && !blocked(role.stage()));
    startable.map(|(role, _)| *role).collect()
}

/// Whom to ask to stop now: all that run of the highest stage that still has any.
pub(crate) fn to_stop(members: &[(Role, Phase)]) -> Vec<Role> {
    let running = |phase: Phase| matches!(phase, Phase::Starting | Phase::Ready);
    let alive = || members.iter().filter(|(_, phase)| running(*phase)).map(|(role, _)| *role);
    let highest = alive().map(Role::stage).max();
    alive().filter(|role| Some(role.stage()) == highest).collect()
}

/// How long all members together may take to stop before they are killed: the workers drain, then the scheduler does.
pub(crate) fn stop_max(config: &Config) -> Duration {
    let drains_ms = config.worker.drain_timeout_ms.saturating_add(config.scheduler.drain_timeout_ms);
    Duration::from_millis(drains_ms).saturating_add(STOP_MARGIN)
}

/// What follows a death.
pub(crate) fn after(death: Death) -> Next {
    // Started again it would read the same configuration, whatever it did before.
    if death.code == Some(i32::from(genmill_daemon::run::EXIT_WRONG_CONFIG)) {
        return Next::WrongConfig;
    }
    if !death.mill_was_ready && death.in_a_row >= STARTS_MAX {
        return Next::GiveUp;
    }
    let doublings = death.in_a_row.saturating_sub(1).min(16);
    Next::Restart((FIRST_DELAY * 2_u32.pow(doublings)).min(DELAY_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Phase::{Gone, Idle, Ready, Starting};
    use Role::{Redis, Scheduler, WorkerApi, WorkerGpu};

    fn start(phases: [Phase; 4], expect: &[Role]) {
        let members: Vec<_> = Role::ALL.into_iter().zip(phases).collect();
        assert_eq!(to_start(&members), expect, "{phases:?}");
    }

    #[test]
    fn a_stage_starts_when_the_one_below_is_ready() {
        start([Idle, Idle, Idle, Idle], &[Redis]);
        start([Starting, Idle, Idle, Idle], &[]);
        start([Ready, Idle, Idle, Idle], &[Scheduler]);
        start([Ready, Starting, Idle, Idle], &[]);
        start([Ready, Ready, Idle, Idle], &[WorkerGpu, WorkerApi]);
        start([Ready, Ready, Ready, Starting], &[]);
        assert_eq!(to_start(&[(Scheduler, Idle), (WorkerGpu, Idle)]), [Scheduler], "without a private Redis");
    }

    fn stop(phases: [Phase; 4], expect: &[Role]) {
        let members: Vec<_> = Role::ALL.into_iter().zip(phases).collect();
        assert_eq!(to_stop(&members), expect, "{phases:?}");
    }

    #[test]
    fn a_stage_stops_when_the_one_above_is_gone() {
        stop([Ready, Ready, Ready, Starting], &[WorkerGpu, WorkerApi]);
        stop([Ready, Ready, Gone, Ready], &[WorkerApi]);
        stop([Ready, Ready, Gone, Gone], &[Scheduler]);
        stop([Ready, Ready, Phase::Down, Idle], &[Scheduler]);
        stop([Starting, Idle, Idle, Idle], &[Redis]);
        stop([Gone, Gone, Gone, Gone], &[]);
    }

    #[test]
    fn nobody_is_killed_who_may_still_drain() {
        let mut config = Config::default();
        config.worker.drain_timeout_ms = 60_000;
        config.scheduler.drain_timeout_ms = 5_000;
        assert_eq!(stop_max(&config), Duration::from_secs(75));
        config.worker.drain_timeout_ms = u64::MAX;
        assert!(stop_max(&config) > Duration::from_secs(75));
    }

    fn death(code: Option<i32>, in_a_row: u32, mill_was_ready: bool) -> Next {
        after(Death { code, in_a_row, mill_was_ready })
    }

    #[test]
    fn the_dead_are_started_again_after_doubling_waits() {
        let waits = [(1, 1), (2, 2), (3, 4), (5, 16), (6, 30), (1_000, 30)];
        for (in_a_row, seconds) in waits {
            assert_eq!(death(None, in_a_row, true), Next::Restart(Duration::from_secs(seconds)));
        }
    }

    #[test]
    fn what_cannot_get_better_ends_the_mill() {
        assert_eq!(death(Some(2), 1, false), Next::WrongConfig);
        assert_eq!(death(Some(2), 1, true), Next::WrongConfig);
        assert_eq!(death(Some(1), 5, false), Next::GiveUp);
        assert_eq!(death(Some(1), 4, false), Next::Restart(Duration::from_secs(8)));
    }
}
