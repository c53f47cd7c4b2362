//! The API worker's peers, installed under `target` where that is possible. Never here: running or measuring them.

use crate::tool::{is_there, root, run, say};
use anyhow::bail;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What pip installs for LiteLLM's proxy. Since 1.108 it asks for a certifi that not every mirror has.
const LITELLM: [&str; 3] = ["litellm[proxy]==1.106.0", "opentelemetry-api", "opentelemetry-sdk"];

/// What npm installs for Portkey's gateway.
const PORTKEY: &str = "@portkey-ai/gateway@1.15.2";

/// The option of the benchmark for each gateway that is there, and its folder. Those that are not are told.
pub(crate) fn folders() -> Vec<(&'static str, PathBuf)> {
    let peers = root().join("target/bench-peers");
    let mut there = Vec::new();
    for (option, name, install) in [("--litellm", "litellm", litellm as Install), ("--portkey", "portkey", portkey)] {
        let folder = peers.join(name);
        match install(&folder) {
            Ok(()) => there.push((option, folder)),
            Err(error) => say(&format!("{name} is left out: {error:#}")),
        }
    }
    there
}

/// Sees to it that a folder has a gateway.
type Install = fn(&Path) -> anyhow::Result<()>;

fn litellm(folder: &Path) -> anyhow::Result<()> {
    let python = folder.join("bin/python");
    if is_there(&python.to_string_lossy(), &["-c", "import litellm.proxy, opentelemetry.sdk"]) {
        return Ok(());
    }
    say("installing litellm (once; half a gigabyte)");
    run(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
    run(Command::new(python).args(["-m", "pip", "install", "--quiet"]).args(LITELLM))
}

fn portkey(folder: &Path) -> anyhow::Result<()> {
    if !is_there("node", &["--version"]) || !is_there("npm", &["--version"]) {
        bail!("node and npm are not there");
    }
    std::fs::create_dir_all(folder)?;
    run(Command::new("npm").args(["install", "--no-audit", "--no-fund", "--silent", PORTKEY]).current_dir(folder))
}
