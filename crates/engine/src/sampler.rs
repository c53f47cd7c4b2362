//! From logits to a token: a pure function of the logits, the parameters and the position.
//!
//! Never here: state. Random numbers are counter based (Philox), keyed by seed, sample and
//! position, so a token does not depend on what else was drawn, in this batch or before.

use std::cmp::Reverse;

use pulp::{Arch, NullaryFnOnce};

use crate::math;

/// How a token is chosen. Temperature first, then what it may be among: `min_p`, `top_k` and `top_p`, in the order of
/// vLLM's sampler (`vllm/v1/sample/sampler.py`), where each sees only what those before it left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the best token.
    pub temperature: f32,
    /// Only so many of the best tokens are considered; 0 considers all.
    pub top_k: usize,
    /// Only the best tokens whose probabilities together reach this are considered; 1 considers
    /// all.
    pub top_p: f32,
    /// Only tokens are considered whose probability is at least this part of the best one's; 0 considers all.
    pub min_p: f32,
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
    /// Keys of tokens, see [`key`].
    ranked: Vec<u64>,
    kept_weights: Vec<f32>,
    sums: Vec<f64>,
    groups: Vec<f32>,
    /// A row of logits that was changed before a token is chosen from it.
    pub(crate) shaped: Vec<f32>,
}

/// Stands in for the logit of a token that may not be chosen: its weight is nothing, and it is still a number.
pub const FORBIDDEN: f32 = f32::MIN;

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
        workspace.weights.resize(logits.len(), 0.0);
        let (largest, weights) = (logits[best as usize], &mut workspace.weights);
        workspace.arch.dispatch(Weigh { logits, largest, temperature: self.temperature, weights });
        if self.min_p > 0.0 {
            // The best token weighs 1, so weights are parts of its probability.
            weights.iter_mut().filter(|weight| **weight < self.min_p).for_each(|weight| *weight = 0.0);
        }
        let draw = uniform(self.seed, self.sample, position);
        let all = self.top_k == 0 || self.top_k >= logits.len();
        if all && self.top_p >= 1.0 {
            return Ok(u32::try_from(pick(weights, draw, &mut workspace.sums)).unwrap_or(best));
        }
        let kept = self.keep(logits, workspace);
        let Workspace { weights, ranked, kept_weights, sums, .. } = workspace;
        kept_weights.clear();
        kept_weights.extend(ranked[..kept].iter().map(|key| weights[token(*key) as usize]));
        Ok(token(ranked[pick(kept_weights, draw, sums)]))
    }

    /// Ranks tokens as far as needed and returns how many of them are considered: first the `top_k`
    /// best, then of these the fewest that reach `top_p`.
    fn keep(&self, logits: &[f32], workspace: &mut Workspace) -> usize {
        /// How many to rank first; a nucleus is mostly smaller.
        const FIRST_RANKS: usize = 64;
        let all = logits.len();
        let top_k = if self.top_k == 0 { all } else { self.top_k.min(all) };
        let mut ranks = if top_k == all { FIRST_RANKS.min(all) } else { top_k };
        workspace.rank(logits, ranks);
        let weight = |workspace: &Workspace, key: u64| f64::from(workspace.weights[token(key) as usize]);
        let total: f64 = if top_k == all {
            workspace.weights.iter().copied().map(f64::from).sum()
        } else {
            workspace.ranked.iter().map(|key| weight(workspace, *key)).sum()
        };
        let target = f64::from(self.top_p) * total;
        let mut sum = 0.0;
        for kept in 0..top_k {
            if kept == ranks {
                ranks = (ranks * 4).min(top_k);
                workspace.rank(logits, ranks);
            }
            sum += weight(workspace, workspace.ranked[kept]);
            if sum >= target {
                return kept + 1;
            }
        }
        top_k
    }
}

impl Workspace {
    /// Puts the keys of the `count` best tokens in order.
    fn rank(&mut self, logits: &[f32], count: usize) {
        let Self { arch, ranked, groups, .. } = self;
        arch.dispatch(Candidates { logits, count, groups, keys: ranked });
        if count < ranked.len() {
            ranked.select_nth_unstable_by_key(count, |key| Reverse(*key));
            ranked.truncate(count);
        }
        ranked.sort_unstable_by_key(|key| Reverse(*key));
    }
}

/// A number that is larger for a better token: a larger logit (as `total_cmp` has it), then a lower
/// id.
#[inline(always)]
fn key(logit: f32, token: u32) -> u64 {
    let bits = logit.to_bits();
    let ordered = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(ordered) << 32 | u64::from(!token)
}

/// The token of a key.
fn token(key: u64) -> u32 {
    !halves(key)[0]
}

/// The keys of at least the `count` best tokens, and of few others when many are left out.
struct Candidates<'a> {
    logits: &'a [f32],
    count: usize,
    groups: &'a mut Vec<f32>,
    keys: &'a mut Vec<u64>,
}

impl NullaryFnOnce for Candidates<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { logits, count, groups, keys } = self;
        let border = border(logits, count, groups);
        keys.resize(logits.len(), 0);
        let mut found = 0;
        for (first, part) in (0..).step_by(PART).zip(logits.chunks(PART)) {
            if math::largest(part) >= border {
                for (logit, id) in part.iter().zip(first..) {
                    // Always written, and kept by counting it: there is no branch to mispredict.
                    keys[found] = key(*logit, id);
                    found += usize::from(*logit >= border);
                }
            }
        }
        keys.truncate(found);
    }
}

/// A logit that the `count` best reach. There are twice as many groups of logits or more, so that
/// few others reach the `count`-th best of the groups' largest.
#[inline(always)]
fn border(logits: &[f32], count: usize, groups: &mut Vec<f32>) -> f32 {
    let size = (2 * count).next_power_of_two();
    if count == 0 || 2 * size > logits.len() {
        return f32::NEG_INFINITY;
    }
    groups.clear();
    groups.resize(size, f32::NEG_INFINITY);
    for part in logits.chunks(size) {
        for (largest, logit) in groups.iter_mut().zip(part) {
            *largest = if *logit > *largest { *logit } else { *largest };
        }
    }
    let (_, border, _) = groups.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    *border
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
            let weighed = math::exp((logit - self.largest) / self.temperature);
            // A logit that is forbidden weighs nothing at any temperature.
            *weight = if *logit > FORBIDDEN { weighed } else { 0.0 };
        }
    }
}

/// What a token was worth to the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The best tokens with theirs, best first; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// The log probability of `token` and of the `top` best tokens, from the model's own logits: before temperature, bias,
/// penalties and masks (vLLM's default, `raw_logprobs`). All in float32, added up in one fixed order.
///
/// # Errors
/// When a logit is not finite.
pub fn score(logits: &[f32], token: u32, top: usize, workspace: &mut Workspace) -> Result<Scored, NotFinite> {
    let largest = logits[best(workspace.arch, logits)? as usize];
    let spread = libm::logf(workspace.arch.dispatch(Spread { logits, largest }));
    let logprob = |logit: f32| (logit - largest) - spread;
    let top = top.min(logits.len());
    if top > 0 {
        workspace.rank(logits, top);
    }
    let best = workspace.ranked.iter().take(top).map(|key| self::token(*key));
    Ok(Scored {
        token,
        logprob: logits.get(token as usize).map_or(f32::MIN, |logit| logprob(*logit)),
        top: best.map(|token| (token, logprob(logits[token as usize]))).collect(),
    })
}

/// The sum of e^(logit - largest).
struct Spread<'a> {
    logits: &'a [f32],
    largest: f32,
}

impl NullaryFnOnce for Spread<'_> {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        math::sum(self.logits, |logit, sum| sum + math::exp(logit - self.largest))
    }
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

/// Logits or weights that are looked at as one before each alone.
const PART: usize = 64;

/// The sums of all parts, each from its first weight to its last; several parts side by side, for
/// a sum waits for each of its additions.
fn sum_parts(weights: &[f32], sums: &mut Vec<f64>) {
    const SIDE_BY_SIDE: usize = 8;
    sums.clear();
    let (parts, rest) = weights.as_chunks::<PART>();
    let (many, few) = parts.as_chunks::<SIDE_BY_SIDE>();
    for parts in many {
        let mut each = [0.0; SIDE_BY_SIDE];
        for place in 0..PART {
            for (sum, part) in each.iter_mut().zip(parts) {
                *sum += f64::from(part[place]);
            }
        }
        sums.extend(each);
    }
    let few = few.iter().map(<[f32; PART]>::as_slice).chain((!rest.is_empty()).then_some(rest));
    sums.extend(few.map(|part| part.iter().copied().map(f64::from).sum::<f64>()));
}

/// Walks over weights until `draw` of their sum is passed, and returns the index there; `sums` is
/// memory to work in.
fn pick(weights: &[f32], draw: f64, sums: &mut Vec<f64>) -> usize {
    sum_parts(weights, sums);
    let mut left = draw * sums.iter().sum::<f64>();
    let mut part = 0;
    for (index, sum) in sums.iter().enumerate() {
        part = index;
        if left < *sum {
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
