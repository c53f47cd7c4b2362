//! A ring of host memory from which copies to a device are made: which part is next, and which copies must be done before it
//! is written again.
//!
//! Never here: memory, or a device.

use std::collections::VecDeque;
use std::ops::Range;

/// Parts begin at multiples of this.
const ALIGNMENT: usize = 64;

/// A copy takes at most one part in so many, so that it can be filled while others are on their way.
pub(crate) const PARTS: usize = 4;

/// The state of a ring. A fence tells when the copy of a part is done; fences are reached in the order in which they were
/// given.
#[derive(Debug)]
pub(crate) struct Ring<F> {
    bytes: usize,
    next: usize,
    open: VecDeque<(Range<usize>, F)>,
}

impl<F> Ring<F> {
    /// A ring of so many bytes, at least four times [`ALIGNMENT`].
    pub(crate) const fn new(bytes: usize) -> Self {
        Self { bytes, next: 0, open: VecDeque::new() }
    }

    /// The next part for as many of `wanted` bytes as a copy may take, and the fences after which it may be written: the
    /// last is the one to be waited for.
    pub(crate) fn take(&mut self, wanted: usize) -> (Range<usize>, Vec<F>) {
        let length = wanted.min(self.bytes / PARTS / ALIGNMENT * ALIGNMENT);
        if self.next + length > self.bytes {
            self.next = 0;
        }
        let part = self.next..self.next + length;
        self.next = part.end.next_multiple_of(ALIGNMENT);
        let last = self.open.iter().rposition(|(other, _)| other.start < part.end && part.start < other.end);
        let reached = self.open.drain(..last.map_or(0, |last| last + 1));
        (part, reached.map(|(_, fence)| fence).collect())
    }

    /// The copy of a part that was taken has begun; this tells when it is done.
    pub(crate) fn close(&mut self, part: Range<usize>, fence: F) {
        self.open.push_back((part, fence));
    }

    /// All fences that were given and not handed back.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = F> {
        self.open.drain(..).map(|(_, fence)| fence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::check::Dice;

    #[test]
    fn no_part_is_written_again_before_its_copy_is_done() {
        let mut dice = Dice::new(5);
        for bytes in [256, 1000, 4096] {
            // For each byte the last copy that it was taken for, and how many copies are done.
            let (mut ring, mut taken, mut done) = (Ring::new(bytes), vec![0_usize; bytes], 0);
            for copy in 1..2000 {
                let wanted = dice.of(1..bytes);
                let (part, reached) = ring.take(wanted);
                done = reached.last().copied().unwrap_or(done).max(done);
                assert!(reached.is_sorted() && !part.is_empty() && part.len() <= wanted && part.end <= bytes);
                assert!(taken[part.clone()].iter().all(|copy| *copy <= done), "{part:?} at {copy}");
                taken[part.clone()].fill(copy);
                ring.close(part, copy);
            }
            assert!(ring.drain().is_sorted());
        }
    }

    #[test]
    fn a_copy_leaves_room_for_others() {
        let mut ring: Ring<()> = Ring::new(1024);
        let parts: Vec<_> = (0..4).map(|_| ring.take(5000)).collect();
        assert_eq!(
            parts.iter().map(|(part, _)| part.clone()).collect::<Vec<_>>(),
            [0..256, 256..512, 512..768, 768..1024]
        );
    }
}
