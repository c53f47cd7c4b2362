//! The end of a daemon: a signal asks for it, every task is told, and all are waited for.

use std::future::Future;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tells tasks to end and waits for them. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tracker: TaskTracker,
}

impl Shutdown {
    /// Spawns a task that shutdown waits for. It must end soon after [`Self::token`] is cancelled.
    pub fn spawn<F>(&self, task: F)
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        drop(self.tracker.spawn(task));
    }

    /// Cancelled when the daemon is to stop.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Asks everything to stop.
    pub fn begin(&self) {
        self.token.cancel();
    }

    /// Asks everything to stop and waits until it has.
    pub async fn finish(&self) {
        self.begin();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// Waits for SIGTERM or Ctrl-C and returns the name of what came.
///
/// # Errors
/// When the process cannot listen for signals.
pub async fn signal() -> std::io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}
