//! Each kernel against its twin on the processor, over random odd shapes, with outputs full of what is no number.
//!
//! Never here: what a device is. The same cases run on the kernels compiled for the host (in the tests) and on a GPU
//! (`gpu-check`).

mod attention;
pub(crate) mod model;
pub(crate) mod product;
mod rows;
mod sampler;
pub(crate) mod schedules;
mod stored;

use std::ops::Range;

use crate::backend::cuda::device::{Address, Device, DeviceError, Dtype};
use crate::backend::cuda::launch::Kernels;
use crate::sampler::philox;

/// What went wrong with a case.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Wrong {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The results differ.
    #[error("{0}")]
    Differs(String),
}

/// A case: one kernel, at shapes that are drawn.
pub(crate) type Case<D> = (&'static str, fn(&Bench<D>, &mut Dice) -> Result<(), Wrong>);

/// All cases.
pub(crate) fn cases<D: Device>() -> Vec<Case<D>> {
    vec![
        ("product", product::product),
        ("rows of a product", product::invariance),
        ("quantised product", product::quantized),
        ("stored values", stored::values),
        ("stored blocks", stored::blocks),
        ("stored values quantised", stored::quantised),
        ("norm", rows::norm),
        ("fused norm", rows::fused_norm),
        ("activation", rows::activation),
        ("gather", rows::gather),
        ("chosen before", rows::resolve),
        ("add rows", rows::add_rows),
        ("scale and cap", rows::scale_and_cap),
        ("rope and write", rows::rope_store),
        ("attention", attention::attention),
        ("greedy sampling", sampler::greedy),
        ("sampling", sampler::drawn),
        ("shaping", sampler::shaped),
        ("log probabilities", sampler::scored),
        ("known tokens", sampler::known),
        ("broken logits", sampler::broken),
    ]
}

/// A device under test.
#[derive(Debug)]
pub(crate) struct Bench<D> {
    pub(crate) kernels: Kernels<D>,
}

/// Memory of a bench with its address.
pub(crate) struct Held<D: Device> {
    memory: D::Memory,
    bytes: usize,
}

impl<D: Device> Held<D> {
    fn at(&self) -> Address {
        D::address(&self.memory)
    }
}

impl<D: Device> Bench<D> {
    pub(crate) fn new(device: D, dtype: Dtype) -> Self {
        Self { kernels: Kernels { device, dtype } }
    }

    fn dtype(&self) -> Dtype {
        self.kernels.dtype
    }

    fn hold(&self, bytes: &[u8]) -> Result<Held<D>, DeviceError> {
        let memory = self.kernels.device.allocate(bytes.len())?;
        self.kernels.device.write(D::address(&memory), bytes)?;
        Ok(Held { memory, bytes: bytes.len() })
    }

    fn floats(&self, values: &[f32]) -> Result<Held<D>, DeviceError> {
        self.hold(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    fn words(&self, values: &[u32]) -> Result<Held<D>, DeviceError> {
        self.hold(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Values of the element type; they were rounded to it before.
    fn halves(&self, values: &[f32]) -> Result<Held<D>, DeviceError> {
        let dtype = self.dtype();
        self.hold(&values.iter().flat_map(|value| dtype.round(*value).to_le_bytes()).collect::<Vec<_>>())
    }

    /// Memory full of ones, which are no number in any type.
    fn poisoned(&self, bytes: usize) -> Result<Held<D>, DeviceError> {
        self.hold(&vec![0xff; bytes])
    }

    fn bytes(&self, held: &Held<D>) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = vec![0; held.bytes];
        self.kernels.device.read(held.at(), &mut bytes)?;
        Ok(bytes)
    }

    fn read_words(&self, held: &Held<D>) -> Result<Vec<u32>, DeviceError> {
        Ok(self.bytes(held)?.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    fn read_floats(&self, held: &Held<D>) -> Result<Vec<f32>, DeviceError> {
        Ok(self.read_words(held)?.into_iter().map(f32::from_bits).collect())
    }

    fn read_halves(&self, held: &Held<D>) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.bytes(held)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| self.dtype().widen(u16::from_le_bytes(*bytes))).collect())
    }

    /// How far a rounded value may be from an exact one, as a part of it.
    fn step(&self) -> f32 {
        match self.dtype() {
            Dtype::Bf16 => 1.0 / 128.0,
            Dtype::F16 => 1.0 / 1024.0,
        }
    }

    /// Random values of the element type.
    fn values(&self, dice: &mut Dice, count: usize) -> Vec<f32> {
        let rounded = |value| self.dtype().widen(self.dtype().round(value));
        (0..count).map(|_| rounded(dice.float() * 4.0 - 2.0)).collect()
    }
}

/// Fails with the first value that is farther from its twin than a step of its own size, or than `slack`.
fn same(what: &str, found: &[f32], expected: &[f32], (step, slack): (f32, f32)) -> Result<(), Wrong> {
    if found.len() != expected.len() {
        return Err(Wrong::Differs(format!("{what}: {} values instead of {}", found.len(), expected.len())));
    }
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        // A value that is no number is never near.
        let near = (found - expected).abs() <= step * expected.abs() + slack;
        if !near {
            return Err(Wrong::Differs(format!("{what}: value {index} is {found}, its twin is {expected}")));
        }
    }
    Ok(())
}

/// Random numbers of a seed.
#[derive(Debug)]
pub(crate) struct Dice {
    seed: u32,
    drawn: u32,
}

impl Dice {
    pub(crate) fn new(seed: u32) -> Self {
        Self { seed, drawn: 0 }
    }

    fn word(&mut self) -> u32 {
        self.drawn += 1;
        philox([self.drawn, 0, 0, 0], [self.seed, 77])[0]
    }

    /// A number of a range.
    pub(crate) fn of(&mut self, range: Range<usize>) -> usize {
        range.start + self.word() as usize % (range.end - range.start)
    }

    /// One of a list.
    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.of(0..of.len())]
    }

    /// One of a list, by turns of the seed, so that so many seeds have all.
    fn turn<T: Copy>(&self, of: &[T]) -> T {
        of[self.seed as usize % of.len()]
    }

    /// A number in [0, 1).
    #[expect(clippy::cast_precision_loss, reason = "24 bits are exact in float32")]
    fn float(&mut self) -> f32 {
        (self.word() >> 8) as f32 / 16_777_216.0
    }

    fn chance(&mut self) -> bool {
        self.word().is_multiple_of(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::emulator::Emulator;

    /// Runs a case with several seeds and both element types on the kernels compiled for the host.
    fn check(name: &str) {
        let Some(device) = Emulator::start() else { return };
        let (_, run) = cases::<Emulator>().into_iter().find(|(case, _)| *case == name).unwrap();
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let bench = Bench::new(device.clone(), dtype);
            for seed in 0..9 {
                if let Err(wrong) = run(&bench, &mut Dice::new(seed)) {
                    panic!("{name}, {dtype:?}, seed {seed}: {wrong}");
                }
            }
        }
    }

    /// Every case of the list, so that none is forgotten here.
    macro_rules! rehearse {
        ($($test:ident: $name:literal),* $(,)?) => {
            $(#[test]
            fn $test() {
                check($name);
            })*

            #[test]
            fn every_case_is_rehearsed() {
                let names: Vec<_> = cases::<Emulator>().iter().map(|(name, _)| *name).collect();
                assert_eq!(names, [$($name),*]);
            }
        };
    }

    rehearse! {
        products_are_near_the_definition: "product",
        products_do_not_depend_on_other_rows: "rows of a product",
        quantised_products_are_those_of_the_values: "quantised product",
        stored_values_are_rounded_as_on_the_host: "stored values",
        stored_blocks_are_unpacked_as_on_the_host: "stored blocks",
        stored_values_are_quantised_as_on_the_host: "stored values quantised",
        norms_are_those_of_the_cpu: "norm",
        a_fused_norm_is_an_addition_and_a_norm: "fused norm",
        activations_are_those_of_the_cpu: "activation",
        rows_are_gathered: "gather",
        tokens_chosen_before_stand_for_themselves: "chosen before",
        rows_are_added: "add rows",
        values_are_scaled_and_capped: "scale and cap",
        keys_are_normed_rotated_and_written: "rope and write",
        attention_is_that_of_the_cpu_in_prefill_and_decode_alike: "attention",
        the_best_token_is_taken: "greedy sampling",
        tokens_are_drawn_as_by_the_twin: "sampling",
        logits_are_shaped_as_on_the_cpu: "shaping",
        log_probabilities_are_those_of_the_cpu: "log probabilities",
        tokens_that_are_known_are_scored: "known tokens",
        logits_that_are_no_numbers_give_no_token: "broken logits",
    }
}
