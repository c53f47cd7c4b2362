//! Kernels over single rows: norms, rotation, activations.
//!
//! Never here: threads, or anything that looks at more than one row. Each kernel is a structure
//! that pulp calls with the chosen instructions; a closure would not reliably be compiled for
//! them.

use pulp::NullaryFnOnce;

use crate::backend::Write;
use crate::config::Activation;
use crate::math;

/// Root mean square norm of a row.
pub(super) struct RmsNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) epsilon: f32,
    pub(super) out: &'a mut [f32],
    pub(super) write: Write,
}

impl NullaryFnOnce for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { x, weight, epsilon, out, write } = self;
        let scale = rms_scale(x, epsilon);
        put(x.iter().zip(weight).map(|(x, weight)| x * scale * weight), out, write);
    }
}

/// Root mean square norms of heads that share their weights, in place.
pub(super) struct NormHeads<'a> {
    pub(super) heads: &'a mut [f32],
    pub(super) weight: &'a [f32],
    pub(super) epsilon: f32,
}

impl NullaryFnOnce for NormHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for head in self.heads.chunks_exact_mut(self.weight.len()) {
            let scale = rms_scale(head, self.epsilon);
            for (x, weight) in head.iter_mut().zip(self.weight) {
                *x = *x * scale * weight;
            }
        }
    }
}

#[inline(always)]
fn rms_scale(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (math::sum(x, |x, sum| x.mul_add(x, sum)) / length(x) + epsilon).sqrt()
}

/// Layer norm of a row.
pub(super) struct LayerNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) epsilon: f32,
    pub(super) out: &'a mut [f32],
    pub(super) write: Write,
}

impl NullaryFnOnce for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { x, weight, bias, epsilon, out, write } = self;
        let mean = math::sum(x, |x, sum| x + sum) / length(x);
        let square = |x: f32, sum: f32| (x - mean).mul_add(x - mean, sum);
        let scale = 1.0 / (math::sum(x, square) / length(x) + epsilon).sqrt();
        let values = x.iter().zip(weight).zip(bias);
        put(values.map(|((x, weight), bias)| ((x - mean) * scale).mul_add(*weight, *bias)), out, write);
    }
}

/// Rotates each head of a row: as many of its first values as there are angles, their first half
/// with their second, by the angles whose cosines and sines are given.
pub(super) struct Rotate<'a> {
    pub(super) heads: &'a mut [f32],
    /// Width of a head.
    pub(super) width: usize,
    pub(super) angles: &'a [f32],
}

impl NullaryFnOnce for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let (cosines, sines) = self.angles.split_at(self.angles.len() / 2);
        for head in self.heads.chunks_exact_mut(self.width) {
            let (first, second) = head[..self.angles.len()].split_at_mut(cosines.len());
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cosines.iter().zip(sines)) {
                let (x, y) = (*a, *b);
                *a = x.mul_add(*cos, -(y * sin));
                *b = y.mul_add(*cos, x * sin);
            }
        }
    }
}

/// Applies the activation to a row.
pub(super) struct Activate<'a> {
    pub(super) activation: Activation,
    pub(super) x: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl NullaryFnOnce for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { activation, x, out } = self;
        match activation {
            Activation::Silu => map(math::silu, x, out),
            Activation::GeluTanh => map(math::gelu_tanh, x, out),
            Activation::GeluErf => map(math::gelu_erf, x, out),
            Activation::Relu => map(math::relu, x, out),
        }
    }
}

/// Applies the activation to a row's gates and multiplies with its ups.
pub(super) struct ActivateGated<'a> {
    pub(super) gates: Activate<'a>,
    pub(super) up: &'a [f32],
}

impl NullaryFnOnce for ActivateGated<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Activate { activation, x, out } = self.gates;
        Activate { activation, x, out: &mut *out }.call();
        for (out, up) in out.iter_mut().zip(self.up) {
            *out *= up;
        }
    }
}

/// Adds a row times a factor.
pub(super) struct AddScaled<'a> {
    pub(super) x: &'a [f32],
    pub(super) factor: f32,
    pub(super) out: &'a mut [f32],
}

impl NullaryFnOnce for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = x.mul_add(self.factor, *out);
        }
    }
}

/// Keeps values between a cap and its negative.
pub(super) struct Cap<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) cap: f32,
}

impl NullaryFnOnce for Cap<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for x in self.x {
            *x = math::cap(*x, self.cap);
        }
    }
}

#[inline(always)]
fn put(values: impl Iterator<Item = f32>, out: &mut [f32], write: Write) {
    match write {
        Write::Set => out.iter_mut().zip(values).for_each(|(out, value)| *out = value),
        Write::Add => out.iter_mut().zip(values).for_each(|(out, value)| *out += value),
    }
}

#[inline(always)]
fn map(f: impl Fn(f32) -> f32, x: &[f32], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = f(*x);
    }
}

#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
fn length(x: &[f32]) -> f32 {
    x.len() as f32
}
