//! What happened, as clients and the runner saw it: a list that only grows, written to a file line by line. Never here:
//! judging it (see `check`).

use super::schedule::Planned;
use genmill_client::v1;
use prost_types::Timestamp;
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Tells the time as Redis does, in unix milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Instant,
    started_ms: u64,
}

impl Clock {
    /// A clock that showed `started_ms` at `started`.
    #[must_use]
    pub const fn new(started: Instant, started_ms: u64) -> Self {
        Self { started, started_ms }
    }

    /// Unix milliseconds.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.started_ms + u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A final job as somebody was shown it: what must never change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Face {
    /// The name of its state.
    pub state: String,
    /// Text, finish reason, tokens read and written.
    pub result: Option<(String, i32, u64, u64)>,
    /// Class and message.
    pub error: Option<(i32, String)>,
    /// When it ended, in unix milliseconds.
    pub finished_ms: u64,
}

impl Face {
    /// The face of a job.
    #[must_use]
    pub fn of(job: &v1::Job) -> Self {
        let usage = |result: &v1::Result| {
            result.usage.as_ref().map_or((0, 0), |usage| (usage.prompt_tokens, usage.completion_tokens))
        };
        let result = |result: &v1::Result| {
            let (read, written) = usage(result);
            (result.text.clone(), result.finish_reason, read, written)
        };
        Self {
            state: job.state().as_str_name().to_owned(),
            result: job.result.as_ref().map(result),
            error: job.error.as_ref().map(|error| (error.error_class, error.message.clone())),
            finished_ms: unix_ms(job.finished_at),
        }
    }
}

/// A time of a message in unix milliseconds; 0 when it is not set.
#[must_use]
pub fn unix_ms(at: Option<Timestamp>) -> u64 {
    let ms = |number: i64| u64::try_from(number).unwrap_or_default();
    at.map_or(0, |at| ms(at.seconds) * 1_000 + ms(at.nanos.into()) / 1_000_000)
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A request is about to be sent, for the first time or again.
    Submitting {
        /// The request.
        request_id: String,
    },
    /// A request was accepted as a job.
    Acknowledged {
        /// The request.
        request_id: String,
        /// The job.
        job: String,
        /// The server said that it had been accepted before.
        existed: bool,
    },
    /// A request was refused; it is sent again later.
    Refused {
        /// The request.
        request_id: String,
        /// The server's reason.
        reason: String,
    },
    /// A request id was used for another request, and this was the answer.
    Reused {
        /// The request.
        request_id: String,
        /// The server's reason, or that it accepted.
        answer: String,
    },
    /// Somebody is about to cancel a job.
    CancelAsked {
        /// The job.
        job: String,
    },
    /// The server has taken note of a cancellation.
    CancelAnswered {
        /// The job.
        job: String,
    },
    /// Somebody read a final job.
    Seen {
        /// The job.
        job: String,
        /// What was shown.
        face: Face,
    },
    /// A watch of many jobs begins; it goes on by itself when its connection breaks.
    Watching {
        /// The watch.
        watch: String,
        /// The tenant whose jobs it tells; empty: all.
        tenant: String,
        /// The experiment whose jobs it tells; empty: all.
        experiment: String,
    },
    /// A watch of many jobs told a job.
    Told {
        /// The watch.
        watch: String,
        /// The job.
        job: String,
        /// What was shown.
        face: Face,
    },
    /// A watch of one job has shown its text to the end.
    Text {
        /// The job.
        job: String,
        /// The text, as its pieces make it up.
        text: String,
    },
    /// A list of all jobs showed a job.
    Listed {
        /// The job.
        job: String,
        /// The name of its state.
        state: String,
    },
    /// A client got an answer that none of the faults explains.
    Trouble {
        /// What it was.
        what: String,
    },
    /// Something begins to go wrong.
    FaultBegan {
        /// What.
        planned: Planned,
    },
    /// It has ended.
    FaultEnded {
        /// What.
        planned: Planned,
    },
    /// A worker is ready.
    WorkerUp {
        /// Its number.
        slot: usize,
        /// The key with which it calls its providers; no other process has it.
        key: String,
        /// The name under which it holds leases.
        worker: String,
    },
    /// A worker has ended.
    WorkerDown {
        /// The key with which it called its providers.
        key: String,
        /// It was killed, so nothing it knew was written down. Otherwise it drained.
        killed: bool,
    },
    /// A process ended that nobody had ended.
    Crashed {
        /// Which.
        process: String,
    },
}

impl Event {
    /// Whether it is about a job: names it, or the request that became it.
    #[must_use]
    pub fn is_about(&self, id: &str, request: &str) -> bool {
        match self {
            Self::Submitting { request_id } | Self::Refused { request_id, .. } | Self::Reused { request_id, .. } => {
                request_id == request
            }
            Self::Acknowledged { request_id, job, .. } => job == id || request_id == request,
            Self::CancelAsked { job }
            | Self::CancelAnswered { job }
            | Self::Seen { job, .. }
            | Self::Told { job, .. }
            | Self::Text { job, .. }
            | Self::Listed { job, .. } => job == id,
            Self::Watching { .. }
            | Self::Trouble { .. }
            | Self::FaultBegan { .. }
            | Self::FaultEnded { .. }
            | Self::WorkerUp { .. }
            | Self::WorkerDown { .. }
            | Self::Crashed { .. } => false,
        }
    }
}

/// An event with its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// When, in unix milliseconds.
    pub at_ms: u64,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// Takes events. Clones share one list.
#[derive(Clone, Debug)]
pub struct History {
    clock: Clock,
    pages: Arc<Mutex<Pages>>,
}

#[derive(Debug)]
struct Pages {
    entries: Vec<Entry>,
    file: BufWriter<File>,
}

impl History {
    /// An empty history, written to `file` as JSON, a line for each event.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn new(clock: Clock, file: &Path) -> std::io::Result<Self> {
        let pages = Pages { entries: Vec::new(), file: BufWriter::new(File::create(file)?) };
        Ok(Self { clock, pages: Arc::new(Mutex::new(pages)) })
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something happens now.
    pub fn note(&self, event: Event) {
        let mut pages = self.pages();
        // Under the lock, so that times never go back from line to line.
        let entry = Entry { at_ms: self.clock.now_ms(), event };
        if let Ok(line) = serde_json::to_string(&entry) {
            // The file is for people; the check reads the list.
            drop(writeln!(pages.file, "{line}"));
        }
        pages.entries.push(entry);
    }

    /// All that has happened so far.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let mut pages = self.pages();
        drop(pages.file.flush());
        pages.entries.clone()
    }

    /// The clock by which times are noted.
    #[must_use]
    pub const fn clock(&self) -> Clock {
        self.clock
    }
}
