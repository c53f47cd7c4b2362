//! Standard output, which belongs to what was asked for, and standard error, which has everything else.

use genmill_client::v1;
use std::io::Write as _;

/// Writes a line to standard output.
pub(crate) fn line(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Writes a part of a line to standard output, at once.
pub(crate) fn part(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a line to standard error. When nobody reads it there is nobody to tell.
pub(crate) fn note(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

/// Writes a job to standard output as one line of JSON.
pub(crate) fn job_json(job: &v1::Job) -> anyhow::Result<()> {
    Ok(line(&genmill_wire::json::to_json("Job", job)?)?)
}
