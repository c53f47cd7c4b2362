//! How far a download is: a bar on a terminal, else a log line now and then.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

/// How often a log line is written.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The progress of one file.
pub(super) struct Progress {
    file: String,
    bar: Option<ProgressBar>,
    done: u64,
    total: u64,
    logged: Instant,
}

impl Progress {
    /// Begins at `done` of `total` bytes.
    pub(super) fn new(file: &str, done: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let style = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(file.to_owned());
            bar.set_position(done);
            bar.reset_eta();
            bar
        });
        if bar.is_none() {
            tracing::info!(file, bytes = total, present = done, "downloading");
        }
        Self { file: file.to_owned(), bar, done, total, logged: Instant::now() }
    }

    /// More bytes have come.
    pub(super) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        match &self.bar {
            Some(bar) => bar.set_position(self.done),
            None if self.logged.elapsed() >= LOG_EVERY => {
                self.logged = Instant::now();
                tracing::info!(file = self.file, bytes = self.done, of = self.total, "downloading");
            }
            None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
