//! How Redis keeps what is measured, and rates; the figures themselves are those of every benchmark.

#[path = "../figures.rs"]
mod shared;

pub(crate) use shared::{Figures, Goal, percentile};

/// How Redis keeps what it acknowledges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fsync {
    /// In memory only.
    None,
    /// In an append-only file that is synced every second.
    EverySecond,
}

impl Fsync {
    /// Its name in tables.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "no append-only file",
            Self::EverySecond => "everysec",
        }
    }

    /// The arguments that make a redis-server do so.
    pub(crate) const fn settings(self) -> &'static [&'static str] {
        match self {
            Self::None => &["--appendonly", "no"],
            Self::EverySecond => &["--appendonly", "yes", "--appendfsync", "everysec"],
        }
    }
}

/// So many in such a time, each second.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
pub(crate) fn rate(count: u64, took: std::time::Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}
