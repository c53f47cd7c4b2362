//! One subscription for all watchers: events come in once and ring the bells of those who wait.

use genmill_core::ids::JobId;
use genmill_queue::{Event, Events};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

type Bells = HashMap<JobId, watch::Sender<()>>;

/// Rings bells. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Hub {
    bells: Arc<Mutex<Bells>>,
    finished: watch::Sender<()>,
}

/// Rings when something may have happened to a job.
pub(crate) struct Bell {
    hub: Hub,
    id: JobId,
    rings: watch::Receiver<()>,
}

impl Bell {
    /// Waits for the next ring. A ring since the last call counts.
    pub(crate) async fn rung(&mut self) {
        // The sender stays in the hub for as long as this bell lives.
        drop(self.rings.changed().await);
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        let mut bells = self.hub.lock();
        if bells.get(&self.id).is_some_and(|bell| bell.receiver_count() <= 1) {
            bells.remove(&self.id);
        }
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Bells> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A bell for one job. To be taken before the job is read, so that nothing falls between.
    pub(crate) fn bell(&self, id: JobId) -> Bell {
        let rings = self.lock().entry(id).or_default().subscribe();
        Bell { hub: self.clone(), id, rings }
    }

    /// Rings whenever any job finishes.
    pub(crate) fn any_finished(&self) -> watch::Receiver<()> {
        self.finished.subscribe()
    }

    /// Passes events on until `stop`.
    pub(crate) async fn listen(self, mut events: Events, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => self.ring(event),
            }
        }
    }

    fn ring(&self, event: Event) {
        let (id, finished) = match event {
            Event::Text(id) => (Some(id), false),
            Event::Finished(id) => (Some(id), true),
            Event::Missed => (None, true),
        };
        {
            let bells = self.lock();
            match id {
                Some(id) => bells.get(&id).into_iter().for_each(|bell| bell.send_replace(())),
                None => bells.values().for_each(|bell| bell.send_replace(())),
            }
        }
        if finished {
            self.finished.send_replace(());
        }
    }
}
