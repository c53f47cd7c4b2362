//! The peer to beat, BullMQ, on a Redis of its own, in the same run and with the same payloads.

use crate::figures::{Figures, Fsync, Goal};
use anyhow::Context as _;
use genmill_tests::redis_server::RedisServer;
use std::path::Path;
use std::process::Command;

/// Measures it, and tells what share of its rate of whole lives `ours` is.
pub(crate) fn measure(figures: &mut Figures, fsync: Fsync, folder: &Path, jobs: u64, ours: f64) -> anyhow::Result<()> {
    let redis = RedisServer::start_with(fsync.settings())?;
    let script = folder.join("bullmq.mjs");
    // Node looks for packages beside the script.
    std::fs::write(&script, include_str!("bullmq.mjs"))?;
    let told = Command::new("node").arg(&script).args([redis.url(), jobs.to_string()]).output()?;
    let text = String::from_utf8_lossy(&told.stdout);
    let line = text
        .lines()
        .last()
        .with_context(|| format!("BullMQ measured nothing: {}", String::from_utf8_lossy(&told.stderr).trim()))?;
    let measured: serde_json::Value = serde_json::from_str(line)?;
    let number = |name: &str| measured[name].as_f64().with_context(|| format!("no {name} in {line}"));
    let version = measured["version"].as_str().unwrap_or("?");
    figures.heading(&format!("BullMQ {version}, {jobs} jobs, fsync: {}", fsync.name()))?;
    figures.add("bulk add", number("add_per_s")?, "jobs/s", Goal::Nothing)?;
    figures.add("drain", number("drain_per_s")?, "jobs/s", Goal::Nothing)?;
    let lives = number("life_per_s")?;
    figures.add("whole life", lives, "jobs/s", Goal::Nothing)?;
    figures.add("redis time, whole life", number("redis_us")?, "us/job", Goal::Nothing)?;
    figures.add("memory, queued", number("queued_bytes")?, "bytes/job", Goal::Nothing)?;
    figures.add("whole life, of BullMQ's", ours / lives, "of it", Goal::AtLeast(1.0))
}
