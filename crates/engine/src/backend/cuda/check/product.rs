//! Matrix products: near the definition, and bit for bit the same for a row alone and among others.

use crate::backend::cuda::check::{Bench, Dice, Held, Wrong, same};
use crate::backend::cuda::device::{Adds, Device, Product, Written};

/// Shapes of weights as models have them, and odd ones; multiples of 8, which tensor cores ask for.
const SIZES: [usize; 6] = [8, 64, 136, 200, 256, 768];

pub(super) fn product<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (outputs, inputs, rows) = (dice.one(&SIZES), dice.one(&SIZES), dice.one(&[1, 2, 3, 17, 33]));
    let x = bench.values(dice, rows * inputs);
    let weights = bench.values(dice, outputs * inputs);
    let bias = bench.values(dice, outputs);
    let before = bench.values(dice, rows * outputs);
    let has_bias = dice.chance();
    let adds = dice.one(&[Adds::No, Adds::Yes]);
    let held: [Held<D>; 3] = [bench.halves(&weights)?, bench.halves(&x)?, bench.halves(&bias)?];
    let run = |rows: usize, first: usize| -> Result<Vec<f32>, Wrong> {
        let out = match adds {
            Adds::No => bench.poisoned(2 * rows * outputs)?,
            Adds::Yes => bench.halves(&before[first * outputs..][..rows * outputs])?,
        };
        // A row is taken out by a copy, so that addresses are aligned as a decoder's are.
        let x = bench.halves(&x[first * inputs..][..rows * inputs])?;
        bench.kernels.device.product(&Product {
            dtype: bench.dtype(),
            weights: held[0].at(),
            x: x.at(),
            bias: if has_bias { held[2].at() } else { 0 },
            out: out.at(),
            rows,
            outputs,
            inputs,
            written: Written::Half,
            adds,
        })?;
        Ok(bench.read_halves(&out)?)
    };
    let expected = |row: usize, output: usize| {
        let pairs = x[row * inputs..][..inputs].iter().zip(&weights[output * inputs..][..inputs]);
        let sum: f64 = pairs.map(|(x, weight)| f64::from(*x) * f64::from(*weight)).sum();
        let bias = if has_bias { f64::from(bias[output]) } else { 0.0 };
        let old = if adds == Adds::Yes { f64::from(before[row * outputs + output]) } else { 0.0 };
        #[expect(clippy::cast_possible_truncation, reason = "it is compared as float32")]
        let value = (sum + bias + old) as f32;
        value
    };
    let expected: Vec<f32> = (0..rows * outputs).map(|index| expected(index / outputs, index % outputs)).collect();
    let together = run(rows, 0)?;
    // Terms of up to 4 cancel each other.
    same("product", &together, &expected, (bench.step(), 1e-3))?;
    for row in [0, rows / 2, rows - 1] {
        same("row alone", &run(1, row)?, &together[row * outputs..][..outputs], (0.0, 0.0))?;
    }
    let wide: Product = Product {
        dtype: bench.dtype(),
        weights: held[0].at(),
        x: held[1].at(),
        bias: 0,
        out: 0,
        rows,
        outputs,
        inputs,
        written: Written::Single,
        adds: Adds::No,
    };
    let out = bench.poisoned(4 * rows * outputs)?;
    bench.kernels.device.product(&Product { out: out.at(), ..wide })?;
    let found = bench.read_floats(&out)?;
    let alone = bench.poisoned(4 * outputs)?;
    bench.kernels.device.product(&Product { out: alone.at(), rows: 1, ..wide })?;
    same("float32 row alone", &bench.read_floats(&alone)?, &found[..outputs], (0.0, 0.0))
}
