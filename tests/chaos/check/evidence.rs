//! Everything a run leaves behind, and ways to look at it. Never here: rules.

use crate::chaos::history::{Entry, Event, unix_ms};
use crate::chaos::schedule::{Fault, Link, Target};
use crate::chaos::world::{MODELS, Model};
use genmill_client::v1;
use genmill_standin::bill::Call;
use std::collections::{BTreeMap, BTreeSet};

/// The name of the watch that told all jobs once more when everything was over.
pub const FINAL_WATCH: &str = "final";

/// What the mill was told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// How many calls a worker has in flight at once, to each provider.
    pub calls_max: usize,
    /// A tenant, and how many of its jobs run at once in each lane.
    pub tenant_cap: (&'static str, usize),
    /// A model, and how many jobs run at once in its lane.
    pub lane_cap: (&'static str, usize),
    /// How many failed attempts of a job are followed by another one.
    pub retries_max: u32,
    /// How often a job may lose its worker before it is poison.
    pub losses_max: u32,
    /// How long a lease lasts without a heartbeat, in milliseconds.
    pub lease_ms: u64,
}

/// Everything a run leaves behind.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// What the mill was told.
    pub settings: Settings,
    /// What happened, by time.
    pub history: Vec<Entry>,
    /// Every acknowledged job that was found, as it was read last.
    pub jobs: BTreeMap<String, v1::Job>,
    /// Every call that the provider got.
    pub calls: Vec<Call>,
}

/// The life of a worker's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WorkerLife<'a> {
    pub(super) key: &'a str,
    pub(super) worker: &'a str,
    pub(super) up_ms: u64,
    /// When it ended, and whether it was killed.
    pub(super) down: Option<(u64, bool)>,
}

/// One attempt of a job: all lines of its ledger with the same epoch. There are two when the worker was taken for lost, and
/// came back.
#[derive(Clone, Debug)]
pub(super) struct Epoch<'a> {
    pub(super) worker: &'a str,
    pub(super) started_ms: u64,
    pub(super) lines: Vec<&'a v1::Attempt>,
}

impl<'a> Epoch<'a> {
    pub(super) fn has(&self, outcome: v1::AttemptOutcome) -> bool {
        self.lines.iter().any(|line| line.outcome() == outcome)
    }

    /// The line that its worker wrote; `None` when it was only taken for lost.
    pub(super) fn told(&self) -> Option<&'a v1::Attempt> {
        self.lines.iter().copied().find(|line| line.outcome() != v1::AttemptOutcome::Lost)
    }

    /// What it cost in nanodollars, as its worker knew from the provider.
    pub(super) fn known_cost(&self) -> Option<u64> {
        self.cost().filter(|_| self.told().and_then(|line| line.cost.as_ref()).is_some_and(|cost| !cost.estimated))
    }

    /// What it cost in nanodollars, as its worker told.
    pub(super) fn cost(&self) -> Option<u64> {
        self.told().and_then(|line| line.cost.as_ref()).map(|cost| cost.nanodollars)
    }

    /// When its worker's line, or else its loss, was written.
    pub(super) fn ended_ms(&self) -> u64 {
        self.told().or_else(|| self.lines.first().copied()).map_or(0, |line| unix_ms(line.ended_at))
    }
}

/// The attempts of a job, by epoch.
pub(super) fn epochs(job: &v1::Job) -> BTreeMap<u32, Epoch<'_>> {
    let mut epochs: BTreeMap<u32, Epoch<'_>> = BTreeMap::new();
    for line in &job.attempt_history {
        let new = || Epoch { worker: &line.worker, started_ms: unix_ms(line.started_at), lines: Vec::new() };
        epochs.entry(line.epoch).or_insert_with(new).lines.push(line);
    }
    epochs
}

/// What a job asks its provider: the last part of what the stand-in takes for the content of a call.
#[must_use]
pub fn prompt(job: &v1::Job) -> &str {
    use v1::generation_request::Input;
    match job.request.as_ref().and_then(|request| request.input.as_ref()) {
        Some(Input::Prompt(prompt)) => prompt,
        Some(Input::Messages(_)) | None => "",
    }
}

/// The model of a job.
pub(super) fn model(job: &v1::Job) -> Option<&'static Model> {
    let name = job.request.as_ref().map(|request| request.model.as_str());
    MODELS.iter().find(|model| Some(model.name) == name)
}

impl Evidence {
    /// Every job that was acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> BTreeSet<&str> {
        let acknowledged = self.history.iter().filter_map(|entry| match &entry.event {
            Event::Acknowledged { job, .. } => Some(job.as_str()),
            _ => None,
        });
        acknowledged.collect()
    }

    pub(super) fn workers(&self) -> Vec<WorkerLife<'_>> {
        let mut lives: Vec<WorkerLife<'_>> = Vec::new();
        for entry in &self.history {
            match &entry.event {
                Event::WorkerUp { key, worker, .. } => {
                    lives.push(WorkerLife { key, worker, up_ms: entry.at_ms, down: None });
                }
                Event::WorkerDown { key, killed } => {
                    let life = lives.iter_mut().find(|life| life.key == key);
                    life.into_iter().for_each(|life| life.down = Some((entry.at_ms, *killed)));
                }
                _ => {}
            }
        }
        lives
    }

    /// The number of the worker that is known by a key.
    pub(super) fn slot(&self, worker_key: &str) -> Option<usize> {
        self.history.iter().find_map(|entry| match &entry.event {
            Event::WorkerUp { slot, key, .. } if key == worker_key => Some(*slot),
            _ => None,
        })
    }

    /// Whether anything of `targets` was amiss at any time from `from_ms` to `to_ms`. A second is added: what breaks is
    /// noticed later.
    pub(super) fn faulty(&self, targets: &[Target], from_ms: u64, to_ms: u64) -> bool {
        let mut open: Vec<(Fault, u64)> = Vec::new();
        let overlaps = |began: u64, ended: u64| began <= to_ms && ended + 1_000 >= from_ms;
        for entry in &self.history {
            match &entry.event {
                Event::FaultBegan { planned } if targets.contains(&planned.fault.target()) => {
                    open.push((planned.fault, entry.at_ms));
                }
                Event::FaultEnded { planned } => {
                    let Some(at) = open.iter().position(|(fault, _)| *fault == planned.fault) else { continue };
                    let (_, began) = open.swap_remove(at);
                    if overlaps(began, entry.at_ms) {
                        return true;
                    }
                }
                _ => {}
            }
        }
        open.iter().any(|(_, began)| overlaps(*began, u64::MAX - 1_000))
    }

    /// The connection of a worker to its providers.
    pub(super) fn provider_link(&self, key: &str) -> Vec<Target> {
        self.slot(key).map(|slot| Target::Link(Link::WorkerProvider(slot))).into_iter().collect()
    }
}
