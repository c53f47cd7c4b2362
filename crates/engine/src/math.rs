//! The transcendental functions, made of exactly rounded operations only.
//!
//! Never here: a call into the system's math library. Each step below is one IEEE operation, so
//! the compiler may turn a loop of them into vectors of any length without changing a bit, and a
//! loop's remainder gives what its body gives.

/// `e^x`, within 2 units in the last place for results in the normal range; arguments beyond it
/// are moved to its border, and a NaN stays one.
///
/// Range reduction and coefficients are those of Cephes' `expf` (S. Moshier).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding this rounds to a whole number, whose bits then stand at the bottom of the sum.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let rest = whole.mul_add(-LN_2_LOW, whole.mul_add(-LN_2_HIGH, x));
    let mut sum = 1.987_569_1e-4_f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        sum = sum.mul_add(rest, coefficient);
    }
    let power = sum.mul_add(rest * rest, rest) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    power * scale
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, written with the identity
/// `1 + tanh(u) = 2 / (1 + e^(-2u))`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
    let cube = x * x * x;
    x / (1.0 + exp(-TWICE_SQRT_2_OVER_PI * 0.044_715_f32.mul_add(cube, x)))
}

/// `x / 2 * (1 + erf(x / sqrt(2)))`, with the complementary error function of Numerical Recipes
/// (Press et al., second edition, section 6.2), whose relative error is below 1.2e-7.
#[inline(always)]
pub(crate) fn gelu_erf(x: f32) -> f32 {
    let z = (x * std::f32::consts::FRAC_1_SQRT_2).abs();
    let t = 1.0 / 0.5_f32.mul_add(z, 1.0);
    let mut sum = 0.170_872_77_f32;
    for coefficient in [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ] {
        sum = sum.mul_add(t, coefficient);
    }
    let tail = t * exp(z.mul_add(-z, sum));
    let both = if x < 0.0 { tail } else { 2.0 - tail };
    0.5 * x * both
}

/// `max(x, 0)`, where a NaN stays one.
#[inline(always)]
pub(crate) fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// The hyperbolic tangent: near 0 the polynomial of Cephes' `tanhf` (S. Moshier), else
/// `1 - 2 / (e^(2 |x|) + 1)` with the sign of `x`.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut sum = -5.704_988_7e-3_f32;
    for coefficient in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        sum = sum.mul_add(square, coefficient);
    }
    let near = (sum * square).mul_add(x, x);
    let far = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    // A NaN is not below, and stays one on the way of the exponential.
    if x.abs() < 0.625 { near } else { far }
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(crate) fn cap(x: f32, cap: f32) -> f32 {
    tanh(x / cap) * cap
}

/// How many partial sums a sum over a row has.
pub(crate) const LANES: usize = 16;

/// The partial sums of a row added up in one fixed order.
#[inline(always)]
pub(crate) fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of `step(x, partial sum)` over a row: element `i` goes to partial sum `i % LANES`.
#[inline(always)]
pub(crate) fn sum(x: &[f32], step: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = step(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = step(*x, *lane);
    }
    add_lanes(lanes)
}

/// The largest value; a NaN may be passed over.
#[inline(always)]
pub(crate) fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*x, *lane);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = larger(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(f: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        (-8_000_i16..8_000)
            .map(|step| f32::from(step) / 100.0)
            .map(|x| {
                let expected = exact(f64::from(x));
                (f64::from(f(x)) - expected).abs() / expected.abs().max(1e-6)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn the_functions_are_as_exact_as_float32() {
        assert!(worst(exp, f64::exp) < 3e-7);
        assert!(worst(silu, |x| x / (1.0 + (-x).exp())) < 1e-6);
        let tanh = |x: f64| {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            x / (1.0 + (-2.0 * u).exp())
        };
        assert!(worst(gelu_tanh, tanh) < 2e-5);
        assert!(worst(super::tanh, f64::tanh) < 3e-7);
        for (x, expected) in [(1.0, 0.841_344_7), (-1.0, -0.158_655_3), (-3.0, -0.004_049_7)] {
            assert!((gelu_erf(x) - expected).abs() < 1e-6, "{x}");
        }
    }

    #[test]
    fn nan_stays_nan_and_large_arguments_stay_finite() {
        for f in [exp, silu, gelu_tanh, gelu_erf, relu, tanh] {
            assert!(f(f32::NAN).is_nan());
            assert!(f(-1e30).is_finite());
        }
        assert!(exp(f32::INFINITY).is_finite() && exp(f32::NEG_INFINITY) < 1e-37);
    }
}
