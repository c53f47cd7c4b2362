//! Tasks that end with the connections they serve, or with all of them. Never here: what they do.

use std::sync::{Mutex, PoisonError};
use tokio::task::JoinSet;

/// Tasks with one owner, which takes them along when it goes.
#[derive(Debug, Default)]
pub(super) struct Tasks(Mutex<JoinSet<()>>);

impl Tasks {
    /// Begins another one.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that have ended are let go of.
        while running.try_join_next().is_some() {}
        running.spawn(task);
    }
}
