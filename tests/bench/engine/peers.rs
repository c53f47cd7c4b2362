//! The peers, in the same run and on the same files: a process each, which measures when told to. One that is missing is
//! told.

use crate::What;
use crate::figures::Goal;
use crate::model::Kind;
use anyhow::{Context as _, bail};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// Who is measured beside us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    LlamaCpp,
    Transformers,
}

/// A peer that has loaded a model. It ends when this is dropped.
pub(crate) struct Theirs {
    process: Child,
    answers: BufReader<ChildStdout>,
    log: PathBuf,
    version: String,
}

/// What the script exits with when a package is missing.
const MISSING: i32 = 3;

impl Peer {
    /// The one that reads such files.
    pub(crate) const fn of(kind: Kind) -> Self {
        match kind {
            Kind::F32 => Self::Transformers,
            Kind::Q8 | Kind::Q4K => Self::LlamaCpp,
        }
    }

    /// Its package in Python.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::LlamaCpp => "llama_cpp",
            Self::Transformers => "transformers",
        }
    }

    /// What our decoding alone and together and our prefill are to reach of its decoding alone (twice) and its prefill.
    pub(crate) const fn goals(self, kind: Kind) -> [Goal; 3] {
        match (self, kind) {
            (Self::LlamaCpp, Kind::Q8) => [Goal::AtLeast(0.8), Goal::AtLeast(2.5), Goal::AtLeast(0.5)],
            (Self::LlamaCpp, _) => [Goal::Nothing, Goal::AtLeast(2.5), Goal::AtLeast(0.5)],
            (Self::Transformers, _) => [Goal::Nothing; 3],
        }
    }
}

impl Theirs {
    /// Loads a file into the peer, with the first python that has it; None when none has.
    pub(crate) fn start(
        peer: Peer,
        pythons: &[PathBuf],
        (path, threads): (&Path, usize),
    ) -> anyhow::Result<Option<Self>> {
        for python in pythons {
            let mut script = Command::new(python);
            script.arg("-c").arg(include_str!("peers.py")).arg(peer.name()).arg(path).arg(threads.to_string());
            // Peers log at length.
            let log = path.with_file_name("peer.log");
            script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log)?);
            // A python that is not there has no packages either.
            let Ok(mut process) = script.spawn() else { continue };
            let answers = BufReader::new(process.stdout.take().context("no output")?);
            let mut theirs = Self { process, answers, log, version: String::new() };
            match theirs.answer()? {
                Some(version) => {
                    theirs.version = version;
                    return Ok(Some(theirs));
                }
                None if theirs.process.wait()?.code() == Some(MISSING) => {}
                None => bail!("{} did not start: {}", peer.name(), theirs.last_error()),
            }
        }
        let name = peer.name();
        writeln!(std::io::stdout(), "  {name} IS MISSING: no python of GENMILL_BENCH_PYTHON or --python has it")?;
        Ok(None)
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Tokens a second.
    pub(crate) fn speed(&mut self, what: What) -> anyhow::Result<f64> {
        let [count, tokens, decoded] = what.sizes();
        let input = self.process.stdin.as_mut().context("no input")?;
        writeln!(input, "{count} {tokens} {decoded}").and_then(|()| input.flush()).context("the peer has ended")?;
        match self.answer()? {
            Some(speed) => speed.parse().with_context(|| format!("a peer answered {speed}")),
            None => bail!("the peer has ended: {}", self.last_error()),
        }
    }

    /// The next line, unless it has ended.
    fn answer(&mut self) -> anyhow::Result<Option<String>> {
        let mut line = String::new();
        let bytes = self.answers.read_line(&mut line)?;
        Ok((bytes > 0).then(|| line.trim().to_owned()))
    }

    /// What went wrong stands last in the log.
    fn last_error(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.trim().lines().last().unwrap_or("no reason told").to_owned()
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        drop(self.process.kill().and_then(|()| self.process.wait()));
    }
}
