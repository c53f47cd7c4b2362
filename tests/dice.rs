//! Numbers that are the same for the same seed, on every machine. Never here: a source of seeds.

/// Draws numbers (splitmix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The numbers of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number below `sides`, which must not be 0.
    pub const fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    /// The next number from `from` up to, but without, `to`; `from` when there is none between.
    pub const fn between(&mut self, from: u64, to: u64) -> u64 {
        if to <= from { from } else { from + self.roll(to - from) }
    }

    /// One of `from`; `None` when it is empty.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        let sides = u64::try_from(from.len()).unwrap_or(u64::MAX);
        if sides == 0 { None } else { from.get(usize::try_from(self.roll(sides)).unwrap_or_default()) }
    }

    /// Puts `all` into another order, each as likely as any other.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            let sides = u64::try_from(last + 1).unwrap_or(u64::MAX);
            all.swap(last, usize::try_from(self.roll(sides)).unwrap_or_default());
        }
    }
}
