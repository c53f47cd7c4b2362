//! Until when a batch is surely held by one worker alone. Never here: who renews it (`batching`), and for which calls that
//! matters (whoever makes them).

use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// A point in time by two clocks: one that nobody sets, and one that also runs while a machine sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    steady: Instant,
    unix: UnixMs,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { steady: Instant::now(), unix: UnixMs(now_unix_ms()) }
    }

    /// So much later.
    pub(crate) fn later(self, by_ms: u64) -> Self {
        Self { steady: self.steady + Duration::from_millis(by_ms), unix: UnixMs(self.unix.0.saturating_add(by_ms)) }
    }
}

/// The hold on a batch: who has it may have the batch made at its provider, and nobody else may meanwhile. It ends by
/// itself where it is not renewed, as when its worker is stopped.
#[derive(Clone, Debug)]
pub struct Hold {
    until: watch::Receiver<Moment>,
    reserve_ms: u64,
}

impl Hold {
    /// A hold until a time that may be moved. What goes out under it must do so `reserve_ms` before its end: so long it may
    /// be on its way.
    pub(crate) const fn new(until: watch::Receiver<Moment>, reserve_ms: u64) -> Self {
        Self { until, reserve_ms }
    }

    /// A hold that lasts for so long. For tests of those who call providers.
    #[must_use]
    pub fn lasting(lease: Duration) -> Self {
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        Self::new(watch::channel(Moment::now().later(lease_ms)).1, 0)
    }

    /// Whether what goes out now does so in time.
    #[must_use]
    pub fn lasts(&self) -> bool {
        lasts(Moment::now(), *self.until.borrow(), self.reserve_ms)
    }
}

/// Whether `reserve_ms` are left until then by both clocks. That one of them was set can only make it say no too early,
/// because the other one still counts.
fn lasts(now: Moment, until: Moment, reserve_ms: u64) -> bool {
    let steady_left = until.steady.saturating_duration_since(now.steady);
    let unix_left_ms = until.unix.0.saturating_sub(now.unix.0);
    steady_left > Duration::from_millis(reserve_ms) && unix_left_ms > reserve_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_out_must_arrive_before_anybody_else_may_have_the_batch() {
        let start = Instant::now();
        let at = |steady_ms: u64, unix_ms: u64| Moment {
            steady: start + Duration::from_millis(steady_ms),
            unix: UnixMs(1_000_000 + unix_ms),
        };
        let check = |now: Moment, expect: bool| assert_eq!(lasts(now, at(15_000, 15_000), 5_000), expect, "{now:?}");
        check(at(0, 0), true);
        check(at(9_999, 9_999), true);
        check(at(10_000, 10_000), false);
        check(at(20_000, 20_000), false);
        // A machine that slept: its steady clock stood still.
        check(at(1, 600_000), false);
        // A clock that was set back does not make a hold longer.
        check(at(12_000, 0), false);
    }

    #[test]
    fn a_hold_that_is_renewed_lasts_on() {
        let now = Moment::now();
        let (renew, until) = watch::channel(now);
        let hold = Hold::new(until, 10);
        assert!(!hold.lasts());
        renew.send_replace(now.later(60_000));
        assert!(hold.lasts());
        assert!(!Hold::lasting(Duration::ZERO).lasts());
    }
}
