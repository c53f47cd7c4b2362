//! Matrix products: near the definition, and bit for bit the same for a row alone and among others.

use crate::backend::Write;
use crate::backend::cuda::check::{Bench, Dice, Held, Wrong, same};
use crate::backend::cuda::device::{Adds, Device, DeviceError, Product, Written};
use crate::backend::cuda::launch::Quants;
use crate::backend::cuda::packed;
use crate::quantized::Quantized;

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

/// Shapes of weights for which rows are compared alone and among others: small and odd ones.
const INVARIANT_SIZES: [[usize; 2]; 3] = [[136, 64], [56, 136], [200, 8]];

/// Numbers of rows that a row is among.
const INVARIANT_ROWS: [usize; 5] = [1, 5, 64, 100, 257];

/// A row's bits are the same among any number of others, for each type of result.
pub(super) fn invariance<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let size = dice.turn(&INVARIANT_SIZES);
    let weights = bench.values(dice, size[0] * size[1]);
    let weights = bench.halves(&weights)?;
    among_others(bench, dice, (size, &INVARIANT_ROWS), &|product| {
        bench.kernels.device.product(&Product { weights: weights.at(), ..*product })
    })
}

/// The same of weights as large as models have them, which only a GPU does in time.
#[cfg(feature = "cuda")]
pub(crate) fn invariance_at_size<D: Device>(bench: &Bench<D>, size: [usize; 2]) -> Result<(), Wrong> {
    let mut dice = Dice::new(8);
    // A prime number of them, so that rows differ.
    let values = bench.values(&mut dice, 65_537);
    let weights: Vec<f32> = values.iter().copied().cycle().take(size[0] * size[1]).collect();
    let weights = bench.halves(&weights)?;
    // Logits are wanted of no more rows than sequences run.
    let counts: &[usize] =
        if size[0] > 40_000 { &[1, 2, 8, 64, 200, 256] } else { &[1, 2, 8, 31, 64, 256, 1000, 4096] };
    among_others(bench, &mut dice, (size, counts), &|product| {
        bench.kernels.device.product(&Product { weights: weights.at(), ..*product })
    })
}

/// Compares rows of a product with the same rows among fewer.
fn among_others<D: Device>(
    bench: &Bench<D>,
    dice: &mut Dice,
    ([outputs, inputs], counts): ([usize; 2], &[usize]),
    run: &dyn Fn(&Product) -> Result<(), DeviceError>,
) -> Result<(), Wrong> {
    let most = counts.iter().copied().max().unwrap_or(1);
    let x = bench.values(dice, 4099);
    let x: Vec<f32> = x.iter().copied().cycle().take(most * inputs).collect();
    let (x, bias) = (bench.halves(&x)?, bench.values(dice, outputs));
    let bias = bench.halves(&bias)?;
    for (written, bytes) in [(Written::Half, 2), (Written::Single, 4)] {
        let all = |rows: usize| -> Result<Vec<u8>, Wrong> {
            let out = bench.poisoned(bytes * rows * outputs)?;
            run(&Product {
                dtype: bench.dtype(),
                weights: 0,
                x: x.at(),
                bias: if written == Written::Half { bias.at() } else { 0 },
                out: out.at(),
                rows,
                outputs,
                inputs,
                written,
                adds: Adds::No,
            })?;
            Ok(bench.bytes(&out)?)
        };
        let together = all(most)?;
        for rows in counts {
            if all(*rows)? != together[..bytes * rows * outputs] {
                return Err(Wrong::Differs(format!(
                    "{rows} rows of {outputs} x {inputs} ({written:?}) differ from the same among {most}"
                )));
            }
        }
    }
    Ok(())
}

/// Quantised weights of all sorts: near the product with the values that they stand for, and the same alone and among others.
pub(super) fn quantized<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    let (outputs, inputs, rows) = (dice.of(1..70), 32 * dice.of(1..12), dice.one(&[1, 2, 9, 65]));
    let (bits, lowest) = dice.turn(&[(8, i8::MIN), (4, -8), (4, 0)]);
    let block = dice.one(&[16, 32]);
    let quant = |dice: &mut Dice| {
        let above = u8::try_from(dice.word() % (1 << bits)).unwrap_or(0);
        lowest.wrapping_add(above.cast_signed())
    };
    let floats = |dice: &mut Dice, count: usize| (0..count).map(|_| dice.float() * 0.03).collect::<Vec<_>>();
    let blocks = outputs * inputs / block;
    let weights = Quantized {
        outputs,
        inputs,
        block,
        lowest,
        bits,
        quants: (0..outputs * inputs).map(|_| quant(dice)).collect(),
        scales: floats(dice, blocks),
        minimums: dice.chance().then(|| floats(dice, blocks)),
    };
    let in_byte = if bits == 4 { 2 } else { 1 };
    let held = bench.hold(&packed(&weights.quants, lowest, in_byte))?;
    let scales = bench.floats(&weights.scales)?;
    let minimums = weights.minimums.as_ref().map(|minimums| bench.floats(minimums)).transpose()?;
    let minimums = minimums.as_ref().map_or(0, Held::at);
    let quants = Quants { quants: held.at(), scales: scales.at(), minimums, block, lowest, in_byte };
    let dtype = bench.dtype();
    let values: Vec<f32> = weights.values().into_iter().map(|value| dtype.widen(dtype.round(value))).collect();

    let x = bench.values(dice, rows * inputs);
    let before = bench.values(dice, rows * outputs);
    let (held_x, out) = (bench.halves(&x)?, bench.halves(&before)?);
    let product = Product {
        dtype,
        weights: 0,
        x: held_x.at(),
        bias: 0,
        out: out.at(),
        rows,
        outputs,
        inputs,
        written: Written::Half,
        adds: Adds::Yes,
    };
    bench.kernels.quantized_product(&quants, &product)?;
    let expected = (0..rows * outputs).map(|index| {
        let (row, output) = (index / outputs, index % outputs);
        let pairs = x[row * inputs..][..inputs].iter().zip(&values[output * inputs..][..inputs]);
        let sum: f64 = pairs.map(|(x, weight)| f64::from(*x) * f64::from(*weight)).sum();
        #[expect(clippy::cast_possible_truncation, reason = "it is compared as float32")]
        let value = (sum + f64::from(before[index])) as f32;
        value
    });
    same("product", &bench.read_halves(&out)?, &expected.collect::<Vec<_>>(), (bench.step(), 1e-3))?;
    among_others(bench, dice, ([outputs, inputs], &[1, 7, 64, 70]), &|product| {
        bench.kernels.quantized_product(&quants, product)
    })?;

    let ids: Vec<u32> = (0..rows).map(|_| u32::try_from(dice.of(0..outputs)).unwrap_or(0)).collect();
    let (held_ids, out) = (bench.words(&ids)?, bench.poisoned(2 * rows * inputs)?);
    bench.kernels.quantized_rows(&quants, [held_ids.at(), out.at()], (rows, inputs), Write::Set)?;
    let expected: Vec<f32> = ids.iter().flat_map(|id| values[*id as usize * inputs..][..inputs].to_vec()).collect();
    same("rows", &bench.read_halves(&out)?, &expected, (0.0, 0.0))
}
