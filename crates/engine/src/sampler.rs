//! From logits to a token: a pure function of the logits, the parameters and the position.
//!
//! Never here: state. Random numbers are counter based (Philox), keyed by seed, sample and
//! position, so a token does not depend on what else was drawn, in this batch or before.

use std::cmp::Ordering;

use pulp::{Arch, NullaryFnOnce};

use crate::math;

/// How a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the best token.
    pub temperature: f32,
    /// Only so many of the best tokens are considered; 0 considers all.
    pub top_k: usize,
    /// Only the best tokens whose probabilities together reach this are considered; 1 considers
    /// all.
    pub top_p: f32,
    /// The key of the random numbers.
    pub seed: u64,
    /// Which of several samples for the same prompt and seed.
    pub sample: u32,
}

/// The logits of a request are not numbers, so it cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logit of token {token} is not a finite number")]
pub struct NotFinite {
    /// The first such token.
    pub token: u32,
}

/// Memory to work in, kept between calls.
#[derive(Debug, Default)]
pub struct Workspace {
    arch: Arch,
    weights: Vec<f32>,
    ranked: Vec<u32>,
    kept_weights: Vec<f32>,
}

impl Sampling {
    /// The token at `position` (counted from the prompt's first). Equal logits: the lower id wins
    /// or is ranked first.
    ///
    /// # Errors
    /// When a logit is not finite.
    pub fn choose(&self, logits: &[f32], position: u32, workspace: &mut Workspace) -> Result<u32, NotFinite> {
        let best = best(workspace.arch, logits)?;
        if self.temperature == 0.0 || self.top_k == 1 {
            return Ok(best);
        }
        let Workspace { arch, weights, ranked, kept_weights } = workspace;
        weights.resize(logits.len(), 0.0);
        let largest = logits[best as usize];
        arch.dispatch(Weigh { logits, largest, temperature: self.temperature, weights });
        let draw = uniform(self.seed, self.sample, position);
        let all = self.top_k == 0 || self.top_k >= logits.len();
        if all && self.top_p >= 1.0 {
            return Ok(u32::try_from(pick(weights, draw)).unwrap_or(best));
        }
        let kept = self.keep(logits, weights, ranked);
        kept_weights.clear();
        kept_weights.extend(ranked[..kept].iter().map(|id| weights[*id as usize]));
        Ok(ranked[pick(kept_weights, draw)])
    }

    /// Ranks tokens in `ranked` as far as needed and returns how many of them are considered:
    /// first the `top_k` best, then of these the fewest that reach `top_p`.
    fn keep(&self, logits: &[f32], weights: &[f32], ranked: &mut Vec<u32>) -> usize {
        /// How many to rank first; a nucleus is mostly smaller.
        const FIRST_RANKS: usize = 64;
        ranked.clear();
        ranked.extend((0..).take(logits.len()));
        let all = logits.len();
        let top_k = if self.top_k == 0 { all } else { self.top_k.min(all) };
        let total: f64 = if top_k == all {
            weights.iter().copied().map(f64::from).sum()
        } else {
            rank(logits, ranked, 0, top_k);
            ranked[..top_k].iter().map(|id| f64::from(weights[*id as usize])).sum()
        };
        let target = f64::from(self.top_p) * total;
        let (mut sum, mut ranks) = (0.0, if top_k == all { 0 } else { top_k });
        for kept in 0..top_k {
            if kept == ranks {
                let more = (ranks * 4).max(FIRST_RANKS).min(top_k);
                rank(logits, ranked, ranks, more);
                ranks = more;
            }
            sum += f64::from(weights[ranked[kept] as usize]);
            if sum >= target {
                return kept + 1;
            }
        }
        top_k
    }
}

/// Unnormalised probabilities: e^((logit - largest) / temperature).
struct Weigh<'a> {
    logits: &'a [f32],
    largest: f32,
    temperature: f32,
    weights: &'a mut [f32],
}

impl NullaryFnOnce for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (weight, logit) in self.weights.iter_mut().zip(self.logits) {
            *weight = math::exp((logit - self.largest) / self.temperature);
        }
    }
}

/// Sorts the best tokens to places `from..to`, given that places below `from` hold better ones.
fn rank(logits: &[f32], ranked: &mut [u32], from: usize, to: usize) {
    let order = |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
    let open = &mut ranked[from..];
    if to - from < open.len() {
        open.select_nth_unstable_by(to - from, order);
    }
    open[..to - from].sort_unstable_by(order);
}

/// The token of the largest logit, the lowest of equals.
fn best(arch: Arch, logits: &[f32]) -> Result<u32, NotFinite> {
    let largest = arch.dispatch(Largest { logits });
    let found = |wanted: &dyn Fn(f32) -> bool| (0..).zip(logits).find(|(_, logit)| wanted(**logit));
    match largest {
        Some(largest) => Ok(found(&|logit| logit == largest).map_or(0, |(token, _)| token)),
        None => Err(NotFinite { token: found(&|logit| !logit.is_finite()).map_or(0, |(token, _)| token) }),
    }
}

/// The largest logit, if all are finite.
struct Largest<'a> {
    logits: &'a [f32],
}

impl NullaryFnOnce for Largest<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    fn call(self) -> Option<f32> {
        // Zero times a finite number is zero, and only then.
        let finite = math::sum(self.logits, |logit, sum| logit.mul_add(0.0, sum)) == 0.0;
        finite.then(|| math::largest(self.logits))
    }
}

/// Weights whose sum is looked at as one while walking.
const PART: usize = 64;

/// Walks over weights until `draw` of their sum is passed, and returns the index there.
fn pick(weights: &[f32], draw: f64) -> usize {
    let sum = |part: &[f32]| -> f64 { part.iter().copied().map(f64::from).sum() };
    let parts = || weights.chunks(PART).map(sum).enumerate();
    let mut left = draw * parts().map(|(_, sum)| sum).sum::<f64>();
    let mut part = 0;
    for (index, sum) in parts() {
        part = index;
        if left < sum {
            break;
        }
        left -= sum;
    }
    let mut last = part * PART;
    for (index, weight) in weights.iter().enumerate().skip(last).take(PART) {
        // Rounding may leave a rest at the end: the last weight that is not zero takes it.
        if *weight > 0.0 {
            last = index;
        }
        left -= f64::from(*weight);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// A number in [0, 1) with 53 random bits.
fn uniform(seed: u64, sample: u32, position: u32) -> f64 {
    let [a, b, ..] = philox([position, 0, sample, 0], halves(seed));
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in float64")]
    let whole = bits as f64;
    whole / 9_007_199_254_740_992.0
}

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
#[must_use]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let [low0, high0] = halves(u64::from(a) * 0xD251_1F53);
        let [low1, high1] = halves(u64::from(c) * 0xCD9E_8D57);
        (a, b, c, d) = (high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d]
}

/// The lower and the upper half.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}
