//! Requests that make a batch: their last byte leaves only while the hold on the batch lasts, so that a worker that was
//! stopped does not make a batch that another one has made meanwhile. Never here: what the bytes say.

use genmill_worker::hold::Hold;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the last byte of a request has left.
#[derive(Clone, Debug, Default)]
pub(super) struct Left(Arc<AtomicBool>);

impl Left {
    pub(super) fn is_so(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Asked when the last byte is about to leave: whether it may, which is noted.
    pub(super) fn under(&self, hold: &Hold) -> impl Fn() -> bool + Send + Sync + use<> {
        let (left, hold) = (self.clone(), hold.clone());
        move || {
            let lasts = hold.lasts();
            left.0.fetch_or(lasts, Ordering::AcqRel);
            lasts
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_makes_a_batch_leaves_while_the_hold_lasts() {
        for (lease_s, expect) in [(60, true), (0, false)] {
            let left = Left::default();
            let may_leave = left.under(&Hold::lasting(Duration::from_secs(lease_s)));
            assert!(!left.is_so());
            assert_eq!((may_leave(), left.is_so()), (expect, expect));
        }
    }
}
