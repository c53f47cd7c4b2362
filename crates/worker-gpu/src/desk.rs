//! What the task that owns a model and the jobs that run on it tell each other.
//!
//! Never here: decisions. The owner writes what is held and what may be claimed; the loop of the lane writes what waits;
//! each job counts itself in and out.

use crate::device::Device;
use crate::load::Entry;
use genmill_core::model::ModelName;
use genmill_core::money::Picodollars;
use genmill_core::registration::ServedModel;
use genmill_engine::Engine;
use genmill_engine::measure::Totals;
use genmill_worker::perform::Places;
use std::sync::Arc;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// What is to be seen of a model.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    /// What is registered of it.
    pub(crate) served: ServedModel,
    /// Its engine, while it is held.
    pub(crate) engine: Option<Arc<Engine>>,
    /// What engines of it did that were given up since.
    pub(crate) past: Totals,
}

/// What waits for a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Waits {
    pub(crate) jobs: u64,
    /// Whether another worker holds the model.
    pub(crate) elsewhere: bool,
}

/// The jobs that use an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Users {
    pub(crate) count: usize,
    /// When the last one came or went.
    pub(crate) since: Instant,
}

/// The desk of a model.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) name: ModelName,
    pub(crate) price_per_hour: Option<Picodollars>,
    /// How many sequences its engine runs at once.
    pub(crate) sequences: usize,
    /// Bytes that a simulated device reads in a second.
    pub(crate) device_bytes_per_s: Option<f64>,
    pub(crate) shown: watch::Sender<Shown>,
    pub(crate) places: watch::Sender<Places>,
    waits: watch::Sender<Waits>,
    users: watch::Sender<Users>,
    /// Rung when something has changed that the owner may act on.
    bell: Arc<Notify>,
}

impl Desk {
    pub(crate) fn new(entry: &Entry, served: ServedModel, bell: Arc<Notify>) -> Self {
        Self {
            name: served.name.clone(),
            price_per_hour: entry.price_per_hour,
            sequences: entry.engine.max_sequences,
            device_bytes_per_s: match &entry.device {
                Device::Simulated(device) => Some(device.gpu.bytes_per_s),
                Device::Cpu | Device::Cuda(_) => None,
            },
            shown: watch::Sender::new(Shown { served, engine: None, past: Totals::default() }),
            places: watch::Sender::new(CLOSED),
            waits: watch::Sender::default(),
            users: watch::Sender::new(Users { count: 0, since: Instant::now() }),
            bell,
        }
    }

    pub(crate) fn waits(&self) -> Waits {
        *self.waits.borrow()
    }

    pub(crate) fn set_waits(&self, now: Waits) {
        if self.waits.send_replace(now) != now {
            self.bell.notify_one();
        }
    }

    pub(crate) fn users(&self) -> Users {
        *self.users.borrow()
    }

    /// Counts a job in, where the model is held.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<User> {
        // First in, then a look: whoever gives the engine up looks at the count afterwards.
        self.count(|count| count + 1);
        let leaving = Leaving(self.clone());
        let engine = self.shown.borrow().engine.clone()?;
        Some(User { engine, _leaving: leaving })
    }

    fn count(&self, change: impl FnOnce(usize) -> usize) {
        self.users.send_modify(|users| *users = Users { count: change(users.count), since: Instant::now() });
    }
}

/// Nothing is claimed.
pub(crate) const CLOSED: Places = Places { capacity: 0, tokens: Some(0) };

/// A job that uses an engine, which stays for as long as this lives.
#[derive(Debug)]
pub(crate) struct User {
    pub(crate) engine: Arc<Engine>,
    _leaving: Leaving,
}

/// Counts a job out.
#[derive(Debug)]
struct Leaving(Arc<Desk>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.count(|count| count.saturating_sub(1));
        if self.0.users().count == 0 {
            self.0.bell.notify_one();
        }
    }
}
