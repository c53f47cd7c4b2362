//! What goes wrong when: a seed and a length give a list of faults, the same on every machine. Never here: doing any of
//! it (see `world`).

use crate::dice::Dice;
use serde::Serialize;

/// How many schedulers run.
pub const SCHEDULERS: usize = 2;

/// How many workers run.
pub const WORKERS: usize = 3;

/// A process that can be killed, stopped and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Process {
    /// The one Redis.
    Redis,
    /// A scheduler, by number.
    Scheduler(usize),
    /// An API worker, by number.
    Worker(usize),
}

/// A connection that runs through a proxy of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// From clients to a scheduler.
    ClientScheduler(usize),
    /// From a scheduler to Redis.
    SchedulerRedis(usize),
    /// From a worker to Redis.
    WorkerRedis(usize),
    /// From a worker to its provider.
    WorkerProvider(usize),
}

/// One way of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// What the caller sends.
    ToServer,
    /// What the server sends.
    ToCaller,
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// SIGKILL, and another process after a while.
    Kill(Process),
    /// SIGSTOP, and SIGCONT after a while.
    Stop(Process),
    /// SIGTERM, and another process after a while.
    Drain(Process),
    /// All connections are reset, each after so many bytes more.
    Cut(Link, u64),
    /// New connections are reset at once, for a while.
    Refuse(Link),
    /// Each chunk waits so many milliseconds, for a while.
    Delay(Link, u64),
    /// One way of all connections is closed; after a while the other is reset.
    HalfClose(Link, Direction),
    /// Nothing passes, no byte and no end of a connection, for a while; then all of it does.
    Hold(Link),
}

impl Fault {
    /// The name of its kind, for tables.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Kill(Process::Redis) => "kill redis",
            Self::Kill(Process::Scheduler(_)) => "kill scheduler",
            Self::Kill(Process::Worker(_)) => "kill worker",
            Self::Stop(_) => "stop and continue",
            Self::Drain(Process::Redis) => "restart redis",
            Self::Drain(_) => "drain worker",
            Self::Cut(..) => "cut",
            Self::Refuse(_) => "refuse",
            Self::Delay(..) => "delay",
            Self::HalfClose(..) => "half-close",
            Self::Hold(_) => "hold",
        }
    }

    /// What it befalls. No two faults befall the same at the same time.
    #[must_use]
    pub const fn target(self) -> Target {
        match self {
            Self::Kill(process) | Self::Stop(process) | Self::Drain(process) => Target::Process(process),
            Self::Cut(link, _)
            | Self::Refuse(link)
            | Self::Delay(link, _)
            | Self::HalfClose(link, _)
            | Self::Hold(link) => Target::Link(link),
        }
    }
}

/// What a fault befalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A process.
    Process(Process),
    /// A connection.
    Link(Link),
}

/// A fault with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// When it begins, in milliseconds after the start.
    pub at_ms: u64,
    /// How long it lasts, in milliseconds: until the process is started or continued, or the connection is healed.
    pub for_ms: u64,
    /// What it is.
    pub fault: Fault,
}

/// The longest time between two faults, in milliseconds.
const GAP_MS_MAX: u64 = 2_600;

/// What befalls the same thing again keeps at least this distance, in milliseconds.
const REST_MS: u64 = 500;

/// The kinds of fault, as often as they stand here; all are drawn before any is drawn again.
const DECK: &[fn(&mut Dice) -> Fault] = &[
    |dice| Fault::Kill(worker(dice)),
    |dice| Fault::Kill(worker(dice)),
    |dice| Fault::Kill(worker(dice)),
    |dice| Fault::Kill(scheduler(dice)),
    |_| Fault::Kill(Process::Redis),
    |dice| Fault::Stop(worker(dice)),
    |dice| Fault::Stop(worker(dice)),
    |dice| Fault::Stop(scheduler(dice)),
    |_| Fault::Stop(Process::Redis),
    |_| Fault::Drain(Process::Redis),
    |dice| Fault::Drain(worker(dice)),
    cut,
    cut,
    cut,
    cut,
    |dice| Fault::Refuse(link(dice)),
    |dice| Fault::Delay(link(dice), dice.between(5, 150)),
    |dice| Fault::Delay(link(dice), dice.between(5, 150)),
    half_close,
    half_close,
    |dice| Fault::Hold(link(dice)),
    |dice| Fault::Hold(link(dice)),
    |dice| Fault::Hold(link(dice)),
];

fn any_of(dice: &mut Dice, count: usize) -> usize {
    usize::try_from(dice.roll(u64::try_from(count).unwrap_or(1))).unwrap_or_default()
}

fn worker(dice: &mut Dice) -> Process {
    Process::Worker(any_of(dice, WORKERS))
}

fn scheduler(dice: &mut Dice) -> Process {
    Process::Scheduler(any_of(dice, SCHEDULERS))
}

fn link(dice: &mut Dice) -> Link {
    match dice.roll(4) {
        0 => Link::ClientScheduler(any_of(dice, SCHEDULERS)),
        1 => Link::SchedulerRedis(any_of(dice, SCHEDULERS)),
        2 => Link::WorkerRedis(any_of(dice, WORKERS)),
        _ => Link::WorkerProvider(any_of(dice, WORKERS)),
    }
}

fn cut(dice: &mut Dice) -> Fault {
    Fault::Cut(link(dice), dice.roll(4_000))
}

fn half_close(dice: &mut Dice) -> Fault {
    let direction = if dice.roll(2) == 0 { Direction::ToServer } else { Direction::ToCaller };
    Fault::HalfClose(link(dice), direction)
}

/// How long a fault lasts. Most are short, some outlast a lease, a few the patience for an answer of Redis (10 s).
fn duration_ms(fault: Fault, dice: &mut Dice) -> u64 {
    let drawn = match dice.roll(12) {
        0 => dice.between(10_500, 13_000),
        1..=3 => dice.between(2_500, 5_000),
        _ => dice.between(100, 2_000),
    };
    match fault {
        // Mostly long enough for a lease to run out, and short enough for the worker to come back while another one has
        // its jobs: the time for which there are fences.
        Fault::Stop(Process::Worker(_)) | Fault::Hold(Link::WorkerRedis(_)) if dice.roll(4) > 0 => {
            dice.between(2_400, 5_500)
        }
        // Without Redis nothing goes on at all.
        Fault::Kill(Process::Redis) | Fault::Stop(Process::Redis) => drawn.min(4_000),
        Fault::Kill(_) | Fault::Drain(_) => drawn.min(3_000),
        Fault::Cut(..) => 0,
        Fault::Stop(_) | Fault::Refuse(_) | Fault::Delay(..) | Fault::HalfClose(..) | Fault::Hold(_) => drawn,
    }
}

/// The faults of `seed` for a run in which things go wrong for `length_ms` milliseconds, by time. All have ended then.
#[must_use]
pub fn schedule(seed: u64, length_ms: u64) -> Vec<Planned> {
    let mut dice = Dice::new(seed);
    let mut planned: Vec<Planned> = Vec::new();
    let mut deck: Vec<fn(&mut Dice) -> Fault> = Vec::new();
    let mut at_ms = dice.between(0, GAP_MS_MAX);
    while at_ms < length_ms {
        if deck.is_empty() {
            deck = DECK.to_vec();
            dice.shuffle(&mut deck);
        }
        if let Some(draw) = deck.pop() {
            let fault = draw(&mut dice);
            let for_ms = duration_ms(fault, &mut dice).min(length_ms - at_ms);
            let begins = planned.iter().filter(|earlier| earlier.fault.target() == fault.target());
            let free_ms = begins.map(|earlier| earlier.at_ms + earlier.for_ms + REST_MS).max().unwrap_or(0);
            // A thing that is still down is left alone; the next card is drawn sooner.
            if free_ms <= at_ms {
                planned.push(Planned { at_ms, for_ms, fault });
                at_ms += dice.between(GAP_MS_MAX / 3, GAP_MS_MAX);
            } else {
                at_ms += 50;
            }
        }
    }
    planned
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_replays_its_schedule_and_another_does_not() {
        assert_eq!(schedule(7, 60_000), schedule(7, 60_000));
        assert_ne!(schedule(7, 60_000), schedule(8, 60_000));
    }

    #[test]
    fn a_minute_has_every_kind_of_fault() {
        for seed in 0..50 {
            let kinds: BTreeSet<&str> = schedule(seed, 60_000).iter().map(|planned| planned.fault.kind()).collect();
            assert!(kinds.len() >= 9, "seed {seed}: {kinds:?}");
        }
    }

    #[test]
    fn faults_end_in_time_and_never_befall_the_same_at_once() {
        for seed in 0..50 {
            let planned = schedule(seed, 45_000);
            assert!(planned.len() > 15, "seed {seed} has {} faults", planned.len());
            assert!(planned.is_sorted_by_key(|planned| planned.at_ms));
            for (at, one) in planned.iter().enumerate() {
                assert!(one.at_ms + one.for_ms <= 45_000);
                let same = |other: &&Planned| other.fault.target() == one.fault.target();
                let next = planned[at + 1..].iter().find(same);
                assert!(next.is_none_or(|next| next.at_ms >= one.at_ms + one.for_ms + REST_MS), "{one:?} {next:?}");
            }
        }
    }
}
