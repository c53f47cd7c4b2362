//! What workers say they serve. The scheduler admits jobs against it.

use crate::ids::WorkerId;
use crate::model::ModelName;
use crate::time::UnixMs;
use serde::{Deserialize, Serialize};

/// A live worker, as it describes itself at every heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The worker.
    pub worker: WorkerId,
    /// When it started.
    pub started_at: UnixMs,
    /// How many jobs it runs at once.
    pub capacity: u32,
    /// The backend prefixes it reads configuration for, whether or not any model is listed.
    pub prefixes: Vec<String>,
    /// Every model in its configuration.
    pub models: Vec<ServedModel>,
}

/// A model in a worker's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedModel {
    /// Its name with the prefix.
    pub name: ModelName,
    /// Whether the worker can run it.
    pub availability: Availability,
    /// What its configuration says about it.
    pub description: String,
    /// Longest input plus output in tokens, where known.
    pub context_tokens: Option<u64>,
    /// Whether the worker can have its jobs done in batches.
    #[serde(default)]
    pub batches: bool,
}

/// Whether a worker can run a model that it has in its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Availability {
    /// It takes jobs for it, which start at once.
    Ready,
    /// It takes jobs for it, and is loading it.
    Loading,
    /// It takes jobs for it, and loads it when it is worth it.
    Available,
    /// The provider's key is missing.
    KeyMissing {
        /// The environment variable to set.
        variable: String,
    },
    /// Something else is missing.
    Unavailable {
        /// What, and what to set and where.
        reason: String,
    },
}

impl Availability {
    /// Whether jobs for the model are taken, now or once it is loaded.
    #[must_use]
    pub const fn takes_jobs(&self) -> bool {
        matches!(self, Self::Ready | Self::Loading | Self::Available)
    }
}
