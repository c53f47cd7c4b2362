//! How long and how often a broken stream is opened again: a doubling wait, up to a bound of the whole outage.

use std::time::Duration;
use tokio::time::Instant;

/// How long an outage may last before it is reported: a restarted scheduler is back within seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const FIRST_DELAY: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);

/// Measures one outage at a time.
#[derive(Debug)]
pub(crate) struct Patience {
    bound: Duration,
    failing_since: Option<Instant>,
    delay: Duration,
}

impl Patience {
    pub(crate) fn new(bound: Duration) -> Self {
        Self { bound, failing_since: None, delay: FIRST_DELAY }
    }

    /// Something worked: the outage, if there was one, is over.
    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.bound);
    }

    /// Something failed at `now`. How long to wait before the next try; `None` when the outage has lasted too long.
    pub(crate) fn after_failure(&mut self, now: Instant) -> Option<Duration> {
        let since = *self.failing_since.get_or_insert(now);
        if now.duration_since(since) >= self.bound {
            return None;
        }
        let delay = self.delay;
        self.delay = (delay * 2).min(DELAY_MAX);
        Some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_end_with_the_patience() {
        let start = Instant::now();
        let mut patience = Patience::new(Duration::from_secs(10));
        let mut now = start;
        let mut delays = Vec::new();
        while let Some(delay) = patience.after_failure(now) {
            delays.push(delay.as_millis());
            now += delay;
        }
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 5000]);
        patience.reset();
        assert_eq!(patience.after_failure(now), Some(FIRST_DELAY));
    }

    #[test]
    fn no_patience_means_no_second_try() {
        assert_eq!(Patience::new(Duration::ZERO).after_failure(Instant::now()), None);
    }
}
