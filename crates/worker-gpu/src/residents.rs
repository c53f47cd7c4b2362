//! The models that a worker holds: one task owns them, loads what is worth it and gives up what is not, within the memory
//! for all.
//!
//! Never here: which of them (that is `swap`), how much each gets (`budget`), and no blocking: loading and freeing happen
//! on threads for that.

use crate::budget::{Plan, part, shown};
use crate::desk::{CLOSED, Desk, Shown};
use crate::device::Device;
use crate::hub::Hub;
use crate::load::{Entry, Files, Measured};
use crate::swap::{self, Move, Standing};
use futures_util::future::join_all;
use genmill_core::registration::{Availability, ServedModel};
use genmill_engine::Engine;
use genmill_engine::measure::Totals;
use genmill_worker::perform::Places;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// While jobs wait for a model that is not held, its turn is looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The files of models that could not be loaded are looked at this often.
const FILES_EVERY: Duration = Duration::from_secs(2);

/// What failed for want of memory or of the hub is tried again after this time, whatever the files say.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// What loading is thought to take before it was done once: so much and a byte of weights after the other.
const LOAD_MS: u64 = 500;
const LOAD_BYTES_PER_MS: u64 = 200_000;

/// The owner of all models.
#[derive(Debug)]
pub struct Residents {
    models: Vec<Model>,
    budget: u64,
    /// Whose memory it is.
    device: Device,
    hub: Hub,
    bell: Arc<Notify>,
    /// Rung when other things are to be registered than before.
    told: Arc<Notify>,
    work: JoinSet<Done>,
    looked_at_files: Instant,
}

/// A model and what is known of it.
#[derive(Debug)]
struct Model {
    entry: Arc<Entry>,
    desk: Arc<Desk>,
    phase: Phase,
    measured: Option<Arc<Measured>>,
    preload: bool,
    /// What its engines did that were given up since.
    past: Totals,
    waiting_since: Option<Instant>,
    load_ms: Option<u64>,
}

#[derive(Debug)]
enum Phase {
    /// Not held.
    Cold,
    /// Looked for, and its headers read.
    Measuring,
    Loading(Plan),
    Resident {
        engine: Arc<Engine>,
        bytes: u64,
        since: Instant,
    },
    /// Given up once its jobs have ended; without an engine, its memory is being freed.
    Leaving {
        engine: Option<Arc<Engine>>,
        bytes: u64,
    },
    Failed {
        reason: String,
        /// What they looked like then, where they may be at fault.
        files: Option<Files>,
        again_at: Option<Instant>,
    },
}

/// What was done beside the runtime, with the index of the model.
enum Done {
    Measured(usize, Result<Measured, String>, Files),
    Loaded(usize, Result<Option<Engine>, String>, Files, Duration),
    Freed(usize),
    Looked(usize, Files),
}

/// Reads the headers of what lies here, and loads what is to be preloaded and fits.
pub async fn prepare(all: &mut [Residents]) {
    join_all(all.iter_mut().map(Residents::prepare)).await;
}

/// Loads and gives up for as long as it is polled. Never ends.
pub async fn run_all(all: Vec<Residents>) {
    join_all(all.into_iter().map(Residents::run)).await;
}

impl Residents {
    /// An owner for the models of this machine's memory, and one for those of each other device. `budget` tells how many
    /// bytes they may take of so many that can be had.
    #[must_use]
    pub fn of_devices(entries: Vec<Entry>, hub: &Hub, budget: impl Fn(Option<u64>) -> u64) -> Vec<Self> {
        let told = Arc::new(Notify::new());
        let (mut here, mut devices): (_, Vec<(Device, Vec<Entry>)>) = (Vec::new(), Vec::new());
        for entry in entries {
            let device = entry.device;
            if device == Device::Cpu {
                here.push(entry);
                continue;
            }
            match devices.iter_mut().find(|(other, _)| device.is_shared_with(other)) {
                Some((_, entries)) => entries.push(entry),
                None => devices.push((device, vec![entry])),
            }
        }
        devices.insert(0, (Device::Cpu, here));
        let owner = |(device, entries): (Device, Vec<Entry>)| {
            let budget = match device {
                Device::Simulated(device) => device.gpu.memory_bytes,
                Device::Cpu | Device::Cuda(_) => budget(device.available_bytes()),
            };
            Self::new(entries, hub.clone(), (device, budget), told.clone())
        };
        devices.into_iter().map(owner).collect()
    }

    fn new(entries: Vec<Entry>, hub: Hub, (device, budget): (Device, u64), told: Arc<Notify>) -> Self {
        let bell = Arc::new(Notify::new());
        let model = |entry: Entry| Model {
            desk: Arc::new(Desk::new(&entry, described(&entry), bell.clone())),
            phase: Phase::Cold,
            past: Totals::default(),
            measured: None,
            preload: entry.preload,
            waiting_since: None,
            load_ms: None,
            entry: Arc::new(entry),
        };
        Self {
            models: entries.into_iter().map(model).collect(),
            budget,
            device,
            hub,
            bell,
            told,
            work: JoinSet::new(),
            looked_at_files: Instant::now(),
        }
    }

    pub(crate) fn desks(&self) -> impl Iterator<Item = Arc<Desk>> {
        self.models.iter().map(|model| model.desk.clone())
    }

    pub(crate) fn told(&self) -> Arc<Notify> {
        self.told.clone()
    }

    async fn prepare(&mut self) {
        loop {
            self.step();
            match self.work.join_next().await {
                Some(done) => self.done(done),
                None => break,
            }
        }
        for model in &mut self.models {
            model.preload = false;
        }
    }

    async fn run(mut self) {
        loop {
            self.step();
            let waits = self.models.iter().any(|model| model.waiting_since.is_some());
            tokio::select! {
                Some(done) = self.work.join_next() => self.done(done),
                () = self.bell.notified() => {}
                () = sleep(if waits { LOOK_EVERY } else { FILES_EVERY }) => {}
            }
        }
    }

    fn step(&mut self) {
        let now = Instant::now();
        for index in 0..self.models.len() {
            self.tend(index, now);
        }
        if now - self.looked_at_files >= FILES_EVERY {
            self.looked_at_files = now;
            self.look_at_files(now);
        }
        let standings: Vec<Standing> = self.models.iter().map(|model| model.standing(now, self.budget)).collect();
        match swap::next(&standings, self.budget) {
            Some(Move::Load(index)) => self.load(index, &standings),
            Some(Move::Evict(index)) => {
                self.evict(index);
                self.tend(index, now);
            }
            None => {}
        }
        let mut news = false;
        for model in &self.models {
            news |= model.show();
        }
        if news {
            self.told.notify_one();
        }
    }

    /// What a model needs by itself.
    fn tend(&mut self, index: usize, now: Instant) {
        let model = &mut self.models[index];
        let waits = model.desk.waits().jobs > 0;
        let wanted = waits || model.preload || !model.entry.may_be_downloaded();
        model.waiting_since = match (&model.phase, waits) {
            (Phase::Cold | Phase::Measuring | Phase::Loading(_), true) => Some(model.waiting_since.unwrap_or(now)),
            _ => None,
        };
        match &mut model.phase {
            Phase::Cold if model.measured.is_none() && wanted => {
                model.phase = Phase::Measuring;
                let (entry, hub) = (model.entry.clone(), self.hub.clone());
                self.work.spawn_blocking(move || {
                    let files = entry.files();
                    Done::Measured(index, unbroken(|| entry.measure(&hub)), files)
                });
            }
            Phase::Leaving { engine, .. } if engine.is_some() && model.desk.users().count == 0 => {
                let mut past = model.past;
                if let Some(engine) = &engine {
                    past.join(&engine.totals());
                }
                model.desk.shown.send_modify(|shown| (shown.engine, shown.past) = (None, past));
                // Who came in between has seen the engine, and is counted.
                if model.desk.users().count > 0 {
                    let back = (engine.clone(), model.past);
                    model.desk.shown.send_modify(|shown| (shown.engine, shown.past) = back);
                } else {
                    model.past = past;
                    let engine = engine.take();
                    self.work.spawn_blocking(move || {
                        drop(engine);
                        Done::Freed(index)
                    });
                }
            }
            _ => {}
        }
    }

    fn look_at_files(&mut self, now: Instant) {
        for (index, model) in self.models.iter_mut().enumerate() {
            match &model.phase {
                Phase::Failed { again_at: Some(at), .. } if *at <= now => model.begin_again(),
                Phase::Failed { .. } => {
                    let entry = model.entry.clone();
                    self.work.spawn_blocking(move || Done::Looked(index, entry.files()));
                }
                _ => {}
            }
        }
    }

    fn load(&mut self, index: usize, standings: &[Standing]) {
        let held: u64 = self.models.iter().map(Model::held_bytes).sum();
        let budget_left = self.budget.saturating_sub(held);
        let available = self.device.available_bytes().unwrap_or(u64::MAX);
        let model = &mut self.models[index];
        let Some(measured) = model.measured.clone() else { return };
        let may_take = part(self.budget, model.entry.memory_part);
        // Beyond what it needs it gets what the others that could be held as well do not need.
        let mut spare = budget_left.saturating_sub(standings[index].bytes);
        for (other, one) in standings.iter().enumerate() {
            if other != index && matches!(one.phase, swap::Phase::Cold { .. }) && one.bytes <= spare {
                spare -= one.bytes;
            }
        }
        let bytes = standings[index].bytes.saturating_add(spare).min(may_take).min(available);
        let Some(plan) = measured.needs.plan(bytes) else {
            let reason = format!(
                "it needs {} to be loaded, and this machine has {} available: it is tried again every minute",
                shown(measured.needs.least_bytes()),
                shown(available)
            );
            return model.fail(reason, None, Some(AGAIN_AFTER));
        };
        model.phase = Phase::Loading(plan);
        let entry = model.entry.clone();
        tracing::info!(model = %entry.name, bytes = shown(plan.bytes()), "loading");
        self.work.spawn_blocking(move || {
            let (begun, files) = (std::time::Instant::now(), entry.files());
            let loaded = unbroken(|| entry.start(&measured, &plan));
            Done::Loaded(index, loaded, files, begun.elapsed())
        });
    }

    fn evict(&mut self, index: usize) {
        let model = &mut self.models[index];
        if let Phase::Resident { engine, bytes, .. } = &model.phase {
            let running = model.desk.users().count;
            tracing::info!(model = %model.entry.name, bytes = shown(*bytes), running, "gives its memory to others");
            model.phase = Phase::Leaving { engine: Some(engine.clone()), bytes: *bytes };
            model.desk.places.send_replace(CLOSED);
        }
    }

    fn done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        // What is done there catches its panics, and nothing aborts it.
        let Ok(done) = done else { return };
        match done {
            Done::Measured(index, Ok(measured), files) => {
                let model = &mut self.models[index];
                let may_take = part(self.budget, model.entry.memory_part);
                if measured.needs.least_bytes() > may_take {
                    return model.fail(measured.needs.never_fits(may_take), Some(files), None);
                }
                model.phase = Phase::Cold;
                model.measured = Some(Arc::new(measured));
            }
            Done::Measured(index, Err(reason), files) => {
                let model = &mut self.models[index];
                let again = model.entry.may_be_downloaded().then_some(AGAIN_AFTER);
                model.fail(reason, Some(files), again);
            }
            Done::Loaded(index, Ok(Some(engine)), _, took) => self.models[index].hold(engine, took),
            Done::Loaded(index, Ok(None), ..) => {
                let reason = "memory went to others while it was loaded: it is tried again every minute".to_owned();
                self.models[index].fail(reason, None, Some(AGAIN_AFTER));
            }
            Done::Loaded(index, Err(reason), files, _) => self.models[index].fail(reason, Some(files), None),
            Done::Freed(index) => self.models[index].phase = Phase::Cold,
            Done::Looked(index, now) => {
                let model = &mut self.models[index];
                let Phase::Failed { files, .. } = &mut model.phase else { return };
                if files.replace(now.clone()).is_some_and(|before| before != now) {
                    tracing::info!(model = %model.entry.name, "its files have changed: looking again");
                    model.begin_again();
                }
            }
        }
    }
}

/// Runs what may break off by a panic: that is a model's fault, not the worker's.
fn unbroken<T>(work: impl FnOnce() -> anyhow::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| format!("{error:#}")),
        Err(_) => Err("loading it broke off; the log tells where".to_owned()),
    }
}

fn described(entry: &Entry) -> ServedModel {
    ServedModel {
        name: entry.name.clone(),
        availability: Availability::Available,
        description: entry.description.clone(),
        context_tokens: entry.context_tokens,
        batches: false,
    }
}

impl Model {
    /// What it holds, or will in a moment.
    fn held_bytes(&self) -> u64 {
        match &self.phase {
            Phase::Loading(plan) => plan.bytes(),
            Phase::Resident { bytes, .. } | Phase::Leaving { bytes, .. } => *bytes,
            Phase::Cold | Phase::Measuring | Phase::Failed { .. } => 0,
        }
    }

    fn standing(&self, now: Instant, budget: u64) -> Standing {
        let ms = |since: Instant| u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX);
        let (waits, users) = (self.desk.waits(), self.desk.users());
        let phase = match (&self.phase, &self.measured) {
            (Phase::Cold, Some(_)) => {
                swap::Phase::Cold { waiting_ms: self.waiting_since.map_or(0, ms), elsewhere: waits.elsewhere }
            }
            (Phase::Loading(_), _) => swap::Phase::Loading,
            (Phase::Resident { since, .. }, _) => {
                swap::Phase::Resident { running: users.count, held_ms: ms(*since), unused_ms: ms(users.since) }
            }
            (Phase::Leaving { .. }, _) => swap::Phase::Leaving,
            (Phase::Cold | Phase::Measuring | Phase::Failed { .. }, _) => swap::Phase::Out,
        };
        // What cannot have enough for its longest sequence takes as much as it may.
        let fair = |measured: &Arc<Measured>| measured.needs.fair_bytes().min(part(budget, self.entry.memory_part));
        let bytes = match (&self.phase, &self.measured) {
            (Phase::Cold, Some(measured)) => fair(measured),
            _ => self.held_bytes(),
        };
        let guessed = || match &self.entry.device {
            Device::Simulated(device) => u64::try_from(device.load_time(bytes).as_millis()).unwrap_or(u64::MAX),
            Device::Cpu | Device::Cuda(_) => bytes / LOAD_BYTES_PER_MS + LOAD_MS,
        };
        let load_ms = self.load_ms.unwrap_or_else(guessed);
        Standing { phase, bytes, waiting: waits.jobs, load_ms, preload: self.preload }
    }

    fn hold(&mut self, engine: Engine, took: Duration) {
        let Phase::Loading(plan) = &self.phase else { return };
        let bytes = plan.bytes();
        let engine = Arc::new(engine);
        self.load_ms = u64::try_from(took.as_millis()).ok();
        self.preload = false;
        self.phase = Phase::Resident { engine: engine.clone(), bytes, since: Instant::now() };
        let capacity = u32::try_from(self.entry.engine.max_sequences).unwrap_or(u32::MAX);
        // Nothing runs yet, so what is free is all there is.
        let tokens = u64::try_from(engine.free().kv_tokens).ok();
        // First the engine, then the claims.
        self.show();
        self.desk.places.send_replace(Places { capacity, tokens });
    }

    fn fail(&mut self, reason: String, files: Option<Files>, again_after: Option<Duration>) {
        tracing::warn!(model = %self.entry.name, reason, "listed, but cannot be served");
        let again_at = again_after.map(|wait| Instant::now() + wait);
        self.phase = Phase::Failed { reason, files, again_at };
        self.measured = None;
        self.preload = false;
    }

    fn begin_again(&mut self) {
        self.phase = Phase::Cold;
        // It is loaded at once where nothing has to go for it, so that it shows whether it can be.
        self.preload = true;
    }

    /// Shows how it stands; whether that is news.
    fn show(&self) -> bool {
        let availability = match &self.phase {
            Phase::Resident { .. } => Availability::Ready,
            Phase::Loading(_) => Availability::Loading,
            Phase::Cold | Phase::Measuring | Phase::Leaving { .. } => Availability::Available,
            Phase::Failed { reason, .. } => Availability::Unavailable { reason: reason.clone() },
        };
        let needs = self.measured.as_ref().map(|measured| &measured.needs);
        let context = needs.and_then(|needs| u64::try_from(needs.context_tokens).ok()).or(self.entry.context_tokens);
        let served = ServedModel { availability, context_tokens: context, ..described(&self.entry) };
        let engine = match &self.phase {
            Phase::Resident { engine, .. } | Phase::Leaving { engine: Some(engine), .. } => Some(engine.clone()),
            _ => None,
        };
        self.desk.shown.send_if_modified(|shown| {
            let news = shown.served != served;
            *shown = Shown { served, engine, past: self.past };
            news
        })
    }
}
