//! Real daemons as processes, as a user would start them, on free ports of loopback.

use crate::redis_server::pause;
use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long a daemon may take to say that it is ready. Generous: test machines are shared.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// The folder of the built binaries: that of the running program; a test lies one deeper, in `deps`.
fn binaries() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.parent().context("a program lies in a folder")?;
    let folder = if folder.ends_with("deps") { folder.parent().context("deps lies in a folder")? } else { folder };
    Ok(folder.to_owned())
}

/// Sends a signal to a process.
pub(crate) fn send(process: &Child, signal: Signal) -> anyhow::Result<()> {
    let id = Pid::from_raw(i32::try_from(process.id())?).context("a process id is not 0")?;
    Ok(kill_process(id, signal)?)
}

/// Waits for the end of a process.
pub(crate) fn wait(process: &mut Child, patience: Duration) -> anyhow::Result<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = process.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            bail!("it did not end within {patience:?}");
        }
        pause(Duration::from_millis(20));
    }
}

/// A running process of ours. Killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    process: Child,
    /// What its line `ready name=value …` said.
    places: HashMap<String, String>,
}

/// How to start a daemon.
#[derive(Debug)]
pub struct Start {
    command: Command,
    name: String,
}

impl Start {
    /// The binary `name`, in `folder`, with logs on standard error.
    ///
    /// # Errors
    /// When the folder of binaries cannot be found.
    pub fn new(name: &str, folder: &Path) -> anyhow::Result<Self> {
        let path = binaries()?.join(name);
        if !path.is_file() {
            bail!("{} is not built: run `cargo build --workspace` first, as `cargo xtask test` does", path.display());
        }
        let mut command = Command::new(path);
        command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped());
        // Settings and keys of whoever runs the tests must not change what they find.
        command
            .env_clear()
            .envs(["PATH", "HOME", "TMPDIR"].iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        Ok(Self { command, name: name.to_owned() })
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Writes its logs to `file` instead.
    #[must_use]
    pub fn logs_to(mut self, file: File) -> Self {
        self.command.stderr(file);
        self
    }

    /// Starts it and waits for its line `ready …`.
    ///
    /// # Errors
    /// When it ends or stays silent.
    pub fn until_ready(mut self) -> anyhow::Result<Daemon> {
        let mut process = self.command.spawn().with_context(|| format!("cannot start {}", self.name))?;
        let out = process.stdout.take().context("standard output is piped")?;
        let (first, line) = mpsc::channel();
        // Reads on after the first line, so that the daemon is never blocked by a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                drop(first.send(line));
            }
        });
        let mut daemon = Daemon { name: self.name, process, places: HashMap::new() };
        let line = line.recv_timeout(READY_WITHIN).with_context(|| format!("{} did not get ready", daemon.name))?;
        let places = line.strip_prefix("ready ").with_context(|| format!("unexpected line `{line}`"))?;
        let place = |part: &str| part.split_once('=').map(|(name, place)| (name.to_owned(), place.to_owned()));
        daemon.places = places.split(' ').filter_map(place).collect();
        Ok(daemon)
    }

    /// Runs it to its end and returns what it printed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(mut self) -> anyhow::Result<std::process::Output> {
        Ok(self.command.stderr(Stdio::piped()).output()?)
    }
}

impl Daemon {
    /// An address from its line `ready name=address`.
    #[must_use]
    pub fn place(&self, name: &str) -> &str {
        self.places.get(name).map_or("", String::as_str)
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        send(&self.process, signal)
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// When the system refuses to tell.
    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.process.try_wait()?.is_some())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end within `patience`.
    pub fn wait(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        wait(&mut self.process, patience).with_context(|| self.name.clone())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
