//! The only place that reads the wall clock.

/// Milliseconds since 1970-01-01 UTC.
#[must_use]
pub fn now_unix_ms() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
