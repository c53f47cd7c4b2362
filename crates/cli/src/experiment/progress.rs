//! The progress of a run on standard error, shown only on a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// How many lines about single jobs are written; the file of results has them all.
const TOLD_MAX: usize = 10;

/// A bar that counts finished jobs.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    submitted: usize,
    told: usize,
}

impl Progress {
    pub(crate) fn new(jobs: usize) -> Self {
        // Draws to standard error, and not at all when that is no terminal.
        let bar = ProgressBar::new(u64::try_from(jobs).unwrap_or(u64::MAX));
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} done, {msg}, {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message("0 submitted");
        Self { bar, submitted: 0, told: 0 }
    }

    pub(crate) fn submitted(&mut self) {
        self.submitted += 1;
        // Often enough for the eye.
        if self.submitted.is_multiple_of(100) || u64::try_from(self.submitted).ok() == self.bar.length() {
            self.bar.set_message(format!("{} submitted", self.submitted));
        }
    }

    pub(crate) fn finished(&self) {
        self.bar.inc(1);
    }

    /// Writes a line about a job above the bar, for the first few that need one.
    pub(crate) fn tell(&mut self, line: &str) {
        self.told += 1;
        if self.told <= TOLD_MAX {
            self.bar.suspend(|| crate::output::note(line));
        }
    }

    /// Takes the bar away.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
