//! The benchmark that small engines have in common (nano-vllm's `bench.py`): 256 requests of random lengths, as Python's
//! `random` makes them from seed 0.
//!
//! Never here: an engine.

/// Requests of the benchmark.
const REQUESTS: usize = 256;

/// The lengths of a prompt or an output.
const LENGTHS: [u32; 2] = [100, 1024];

/// Tokens of a prompt are below this.
const TOKENS: u32 = 10_001;

/// The tokens of each prompt and of each output.
pub(crate) fn lengths() -> Vec<(usize, usize)> {
    let mut random = Random::new(0);
    let length = |random: &mut Random| LENGTHS[0] + random.below(LENGTHS[1] - LENGTHS[0] + 1);
    let prompts: Vec<u32> = (0..REQUESTS)
        .map(|_| {
            let tokens = length(&mut random);
            (0..tokens).for_each(|_| {
                random.below(TOKENS);
            });
            tokens
        })
        .collect();
    prompts.into_iter().map(|prompt| (prompt as usize, length(&mut random) as usize)).collect()
}

const STATE: usize = 624;

/// Python's generator (Matsumoto and Nishimura 1998, "Mersenne twister", MT19937 with `init_by_array`).
struct Random {
    state: [u32; STATE],
    next: usize,
}

impl Random {
    /// As `random.seed` with a number of 32 bits.
    fn new(seed: u32) -> Self {
        let mut state = [0; STATE];
        state[0] = 19_650_218;
        let mixed = |before: u32| before ^ before >> 30;
        for (index, number) in (1..STATE).zip(1_u32..) {
            state[index] = mixed(state[index - 1]).wrapping_mul(1_812_433_253).wrapping_add(number);
        }
        let mut place = 1;
        let step = |state: &mut [u32; STATE], place: &mut usize, change: &dyn Fn(u32, u32, usize) -> u32| {
            state[*place] = change(state[*place], mixed(state[*place - 1]), *place);
            *place += 1;
            if *place == STATE {
                state[0] = state[STATE - 1];
                *place = 1;
            }
        };
        for _ in 0..STATE {
            step(&mut state, &mut place, &|now, before, _| (now ^ before.wrapping_mul(1_664_525)).wrapping_add(seed));
        }
        for _ in 1..STATE {
            step(&mut state, &mut place, &|now, before, place| {
                let place = u32::try_from(place).unwrap_or(0);
                (now ^ before.wrapping_mul(1_566_083_941)).wrapping_sub(place)
            });
        }
        state[0] = 1 << 31;
        Self { state, next: STATE }
    }

    fn word(&mut self) -> u32 {
        if self.next == STATE {
            for index in 0..STATE {
                let pair = (self.state[index] & 1 << 31) | (self.state[(index + 1) % STATE] & 0x7fff_ffff);
                let odd = if pair & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[index] = self.state[(index + 397) % STATE] ^ pair >> 1 ^ odd;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= word << 7 & 0x9d2c_5680;
        word ^= word << 15 & 0xefc6_0000;
        word ^ word >> 18
    }

    /// As `random.randrange`.
    fn below(&mut self, end: u32) -> u32 {
        let bits = u32::BITS - end.leading_zeros();
        loop {
            let drawn = self.word() >> (u32::BITS - bits);
            if drawn < end {
                return drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The totals that the benchmark is known by.
    #[test]
    fn lengths_are_those_of_pythons_random() {
        let lengths = lengths();
        assert_eq!(lengths[0], (964, 845));
        let sum = |side: fn(&(usize, usize)) -> usize| lengths.iter().map(side).sum::<usize>();
        assert_eq!((sum(|each| each.0), sum(|each| each.1)), (142_827, 133_966));
    }
}
