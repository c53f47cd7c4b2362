//! How Redis keeps what is measured, and sums over what was; the figures themselves are those of every benchmark.

#[path = "../figures.rs"]
mod shared;

pub(crate) use shared::{Figures, Goal};

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

/// The value below which `percent` of `values` lie.
pub(crate) fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let index = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(index).copied().unwrap_or(f64::NAN)
}
