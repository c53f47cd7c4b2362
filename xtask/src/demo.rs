//! `cargo xtask demo`: a whole mill on this machine, two tiny models (one of them twice), one experiment, one table.

use crate::redis;
use crate::tool::{cargo, root, run, say};
use anyhow::{Context as _, bail};
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the mill may take to stop before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// Runs the demo.
pub(crate) fn run_demo() -> anyhow::Result<()> {
    redis::install_if_missing()?;
    let binaries = ["genmill-cli", "genmill-scheduler", "genmill-worker-gpu", "genmill-worker-api"];
    let packages: Vec<&str> = binaries.iter().flat_map(|package| ["--package", package]).collect();
    run(cargo().args(["build", "--release", "--bins"]).args(packages))?;
    let genmill = target().join("release/genmill");
    let data = std::env::temp_dir().join(format!("genmill-demo-{}", std::process::id()));
    let mut mill = Mill::start(&genmill, &data)?;
    let compared = compare(&genmill, &mill.grpc);
    let stopped = mill.stop();
    // The folder lies among temporary files; one that stays behind does no harm.
    drop(std::fs::remove_dir_all(&data));
    compared.and(stopped)
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn compare(genmill: &Path, grpc: &str) -> anyhow::Result<()> {
    run(Command::new(genmill)
        .args(["--server", &format!("http://{grpc}")])
        .args(["experiment", "run", "examples/tictactoe/experiment.yaml", "--out"])
        .arg(target().join("demo-results.jsonl"))
        .current_dir(root()))
}

/// A running `genmill up`. Killed when dropped, unless it was stopped.
struct Mill {
    process: Child,
    grpc: String,
    // Kept open: a mill whose reader is gone could not print.
    _out: BufReader<ChildStdout>,
}

impl Mill {
    fn start(genmill: &Path, data: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(data).with_context(|| format!("cannot make {}", data.display()))?;
        let log = data.join("mill.log");
        say(&format!("starting a mill (its log: {})", log.display()));
        let mut command = Command::new(genmill);
        // Settings of whoever runs the demo must not change it.
        let theirs = |name: &OsString| {
            let name = name.to_string_lossy();
            name.starts_with("GENMILL")
                || name.starts_with("HF_")
                || ["MODELS_DIR", "MAX_TOKENS", "TEMPERATURE"].contains(&&*name)
        };
        for name in std::env::vars_os().map(|(name, _)| name).filter(theirs) {
            command.env_remove(name);
        }
        let mut process = command
            .args(["up", "--listen", "127.0.0.1:0", "--config", "examples/tictactoe/genmill.toml"])
            .args(["--models", "examples/tictactoe/models", "--data-dir"])
            .arg(data)
            .current_dir(root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot start {}", genmill.display()))?;
        let mut out = BufReader::new(process.stdout.take().context("standard output is piped")?);
        let mut line = String::new();
        out.read_line(&mut line)?;
        let place = line.split_whitespace().find_map(|word| word.strip_prefix("grpc="));
        let grpc = place.unwrap_or_default().to_owned();
        let mill = Self { process, grpc, _out: out };
        if mill.grpc.is_empty() {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            bail!("the mill did not start; its log says:\n{log}");
        }
        Ok(mill)
    }

    /// Lets it drain, as Ctrl-C would.
    fn stop(&mut self) -> anyhow::Result<()> {
        let id = self.process.id().to_string();
        run(Command::new("kill").args(["-TERM", &id]))?;
        let deadline = Instant::now() + STOP_WITHIN;
        while Instant::now() < deadline {
            if let Some(status) = self.process.try_wait()? {
                if !status.success() {
                    bail!("the mill ended with {status}");
                }
                return Ok(());
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
        bail!("the mill did not stop within {STOP_WITHIN:?}")
    }
}

impl Drop for Mill {
    fn drop(&mut self) {
        // It has usually ended already.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
