//! The sampler of sampler.cu once more, for the processor, in the plainest way: it sorts.
//!
//! Every operation on floats is the one that the kernel does, so both draw the same tokens from the same logits.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "casts are those of the kernel: whole numbers from probabilities, halves of seeds, bits of floats"
)]

use crate::backend::cuda::sampling::SamplerRow;
use crate::sampler::{FORBIDDEN, philox};

/// A number that is larger for a better token, as `key` in sampler.rs.
fn key(logit: f32, token: u32) -> u64 {
    let bits = logit.to_bits();
    let ordered = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(ordered) << 32 | u64::from(!token)
}

/// The token that the kernel draws from logits that are shaped already.
pub(crate) fn choose(row: &SamplerRow, logits: &[f32]) -> u32 {
    let mut ranked: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    ranked.sort_by_key(|(token, logit)| std::cmp::Reverse(key(*logit, *token)));
    let (best, largest) = ranked[0];
    if row.temperature == 0.0 || row.top_k == 1 {
        return best;
    }
    let weight = |logit: f32| {
        let weight = crate::math::exp((logit - largest) / row.temperature);
        if logit > FORBIDDEN && weight >= row.min_p { weight } else { 0.0 }
    };
    if row.top_k > 0 {
        ranked.truncate(row.top_k as usize);
    }
    if row.top_p < 1.0 {
        let whole = |logit: f32| (weight(logit) * 4_294_967_296.0) as u64;
        let total: u64 = ranked.iter().map(|(_, logit)| whole(*logit)).sum();
        let target = f64::from(row.top_p) * total as f64;
        let mut sum = 0;
        let kept = ranked.iter().take_while(|(_, logit)| {
            let goes_on = (sum as f64) < target || sum == 0;
            sum += whole(*logit);
            goes_on
        });
        let kept = kept.count();
        ranked.truncate(kept);
    }
    let drawn = ranked.into_iter().filter(|(_, logit)| weight(*logit) > 0.0).max_by_key(|(token, logit)| {
        let noise = gumbel(random_word(row, *token));
        key((logit - largest) / row.temperature + noise, *token)
    });
    drawn.map_or(best, |(token, _)| token)
}

fn random_word(row: &SamplerRow, token: u32) -> u32 {
    let seed = [row.seed as u32, (row.seed >> 32) as u32];
    philox([row.position, 1 + token / 4, row.sample, 0], seed)[(token % 4) as usize]
}

/// Gumbel noise from a random word.
pub(crate) fn gumbel(word: u32) -> f32 {
    const STEP: f32 = 2.328_306_4e-10;
    let rest = (!word as f32 + 0.5) * STEP;
    let waiting = if rest < 0.29 { -log_near_one(-rest) } else { -log((word as f32 + 0.5) * STEP) };
    -log(waiting)
}

fn log_near_one(x: f32) -> f32 {
    let mut sum = 7.037_683_6e-2_f32;
    for coefficient in [
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_4e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ] {
        sum = sum.mul_add(x, coefficient);
    }
    let square = x * x;
    x + (sum * x).mul_add(square, -0.5 * square)
}

/// The natural logarithm of a normal positive number, as the kernels have it.
pub(crate) fn log(x: f32) -> f32 {
    const ROOT_OF_HALF: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(ROOT_OF_HALF);
    let exponent = ((bits as i32) >> 23) as f32;
    let rest = f32::from_bits((bits & 0x007f_ffff) + ROOT_OF_HALF) - 1.0;
    exponent.mul_add(0.693_359_4, exponent.mul_add(-2.121_944_4e-4, log_near_one(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_as_exact_as_float32() {
        for step in 1..40_000_u16 {
            let x = f32::from(step) / 97.0;
            let exact = f64::from(x).ln();
            assert!((f64::from(log(x)) - exact).abs() < 2e-7 * exact.abs().max(0.5), "{x}");
        }
    }

    #[test]
    fn noise_has_the_mean_and_variance_of_gumbels_distribution() {
        let words = (0..200_000).map(|index| philox([index, 0, 7, 0], [3, 4])[0]);
        let noise: Vec<f64> = words.map(|word| f64::from(gumbel(word))).collect();
        let mean = noise.iter().sum::<f64>() / noise.len() as f64;
        let variance = noise.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / noise.len() as f64;
        assert!((mean - 0.577_216).abs() < 0.01, "{mean}");
        assert!((variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 0.02, "{variance}");
        assert!(gumbel(0).is_finite() && gumbel(u32::MAX).is_finite());
        assert!(gumbel(u32::MAX) > 21.0 && gumbel(0) < -3.0);
    }
}
