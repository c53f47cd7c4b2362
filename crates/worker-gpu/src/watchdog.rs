//! Watches over the steps of engines. One that takes too long has hung: a kernel, a driver, memory that is gone. Nothing in
//! the process can end it, so the process ends; its leases run out, and the queue hands its jobs to others.
//!
//! Never here: slow jobs, which have deadlines and timeouts of their own.

use crate::perform::Performer;
use genmill_engine::{SequenceUnderway, Underway};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The exit code of a worker whose engine hung: starting it again helps (`EX_TEMPFAIL` of sysexits).
pub const EXIT_STALLED: i32 = 75;

/// Steps are looked at this often at most.
const LOOK_EVERY_MAX: Duration = Duration::from_secs(1);

/// A thread that watches until this is dropped.
#[derive(Debug)]
pub struct Watchdog {
    _open: SyncSender<()>,
}

impl Watchdog {
    /// Watches the engines of `performer`, none of whose steps may take longer than `bound`. What is known of one that
    /// does is logged and written to a file in `folder`.
    ///
    /// # Errors
    /// When the system refuses the thread.
    pub fn start(performer: &Arc<Performer>, bound: Duration, folder: PathBuf) -> std::io::Result<Self> {
        let (open, closed) = sync_channel(0);
        let performer = Arc::downgrade(performer);
        let thread = std::thread::Builder::new().name("genmill-watchdog".to_owned());
        thread.spawn(move || {
            if let Some(what) = watch(&performer, bound, &closed) {
                end(&what, &folder);
            }
        })?;
        Ok(Self { _open: open })
    }
}

/// Looks until something hangs, and tells what; `None` when it is no longer asked to.
fn watch(performer: &Weak<Performer>, bound: Duration, closed: &Receiver<()>) -> Option<String> {
    let mut gone: Option<Instant> = None;
    while closed.recv_timeout((bound / 4).min(LOOK_EVERY_MAX)) == Err(RecvTimeoutError::Timeout) {
        match performer.upgrade() {
            Some(performer) => {
                if let Some(what) = stalled(&performer, bound) {
                    return Some(what);
                }
            }
            // Engines that end wait for their last step.
            None if gone.get_or_insert_with(Instant::now).elapsed() > bound => {
                return Some("an engine does not end".to_owned());
            }
            None => {}
        }
    }
    None
}

fn stalled(performer: &Performer, bound: Duration) -> Option<String> {
    performer.engines().find_map(|(name, engine)| {
        if engine.has_ended() {
            return Some(format!("the engine of {name} has ended by itself"));
        }
        let underway = engine.underway().filter(|underway| underway.time > bound)?;
        Some(format!("the engine of {name} hangs: {}", told(&underway)))
    })
}

/// What is known of a step: jobs, positions and numbers of tokens, never texts.
fn told(underway: &Underway) -> String {
    let Underway { step, time, sequences, open } = underway;
    let count = sequences.len();
    let mut text = format!("step {step} goes on for {time:.1?}, with {count} of {open} open sequences:");
    for SequenceUnderway { label, start, tokens } in sequences {
        // Writing to a string cannot fail.
        write!(text, "\n  job {label}: {tokens} tokens from position {start}").unwrap_or_default();
    }
    text
}

/// The threads of this process as Linux shows them: name, state, time on the processor, and what they wait for.
fn threads() -> String {
    let mut text = String::from("threads (name, state, user and system time in ticks, waiting in):");
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return text };
    for task in tasks.flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let stat = read("stat");
        // The name stands in parentheses and may have any characters.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or("?");
        let (name, waits) = (read("comm"), read("wchan"));
        let line = format!("\n  {} {} {} {} {}", name.trim(), field(0), field(11), field(12), waits.trim());
        text.push_str(&line);
    }
    text
}

/// Writes down what is known, and ends the process without waiting for anything: nothing beats for its leases any more.
fn end(what: &str, folder: &Path) {
    let report = format!("{what}\n{}\n", threads());
    let file = folder.join(format!("genmill-stall-{}.txt", std::process::id()));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, &report));
    let file = file.display();
    match written {
        Ok(()) => tracing::error!(%file, "ending this worker, so that its jobs go to others: {report}"),
        Err(error) => tracing::error!(%file, %error, "ending this worker; cannot write to the file: {report}"),
    }
    #[expect(clippy::exit, clippy::disallowed_methods, reason = "the thread that hangs cannot be waited for")]
    std::process::exit(EXIT_STALLED);
}
