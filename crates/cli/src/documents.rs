//! Reading what people write in files.

use anyhow::Context as _;
use std::path::Path;

pub(crate) use genmill_daemon::documents::parse;

/// Reads a file; `-` is standard input.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let text = if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin().lock())
    } else {
        std::fs::read_to_string(path)
    };
    text.with_context(|| format!("cannot read {}", path.display()))
}
