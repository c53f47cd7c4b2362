//! What is known of workers when a request comes in: their registrations, read at most once a second.

use genmill_core::admit::Facts;
use genmill_core::model::ModelName;
use genmill_core::registration::Registration;
use genmill_queue::{Queue, QueueError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How old registrations may be when a request is admitted on them.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// All live registrations, remembered for a moment: a bulk run must not read them for every job.
pub(crate) struct Registrations {
    queue: Queue,
    cached: Mutex<Option<(Instant, Arc<Vec<Registration>>)>>,
}

impl Registrations {
    pub(crate) fn new(queue: Queue) -> Self {
        Self { queue, cached: Mutex::new(None) }
    }

    fn cached(&self) -> Option<Arc<Vec<Registration>>> {
        let cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        cached.as_ref().filter(|(at, _)| at.elapsed() < FRESH_FOR).map(|(_, live)| live.clone())
    }

    /// Registrations as they are now.
    pub(crate) async fn read(&self) -> Result<Arc<Vec<Registration>>, QueueError> {
        let live = Arc::new(self.queue.registrations().await?);
        *self.cached.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), live.clone()));
        Ok(live)
    }

    /// What is known of `model`. Only good news may be a second old: before a request is refused, they are read anew.
    pub(crate) async fn about(&self, model: &ModelName) -> Result<Facts, QueueError> {
        if let Some(live) = self.cached() {
            let facts = Facts::about(model, &live);
            if facts.check(model).is_ok() {
                return Ok(facts);
            }
        }
        Ok(Facts::about(model, &self.read().await?))
    }
}
