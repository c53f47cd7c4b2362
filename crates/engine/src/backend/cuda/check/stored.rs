//! Weights as files have them: in pieces, of every type and order, they become the bits that the host makes of them.

use half::{bf16, f16};

use crate::backend::cuda::check::{Bench, Dice, Held, Wrong};
use crate::backend::cuda::device::{Address, Device};
use crate::backend::cuda::launch::{Piece, Quants};
use crate::backend::cuda::packed;
use crate::gguf::{Format, Stored};
use crate::quantized::{self, Quantized, Rows};
use crate::raw::Order;

/// Types of values by the numbers that GGUF files have for them: f32, f16, bf16.
const FLOATS: [u32; 3] = [0, 1, 30];

/// Types of blocks, and where their bytes are half-precision numbers.
const BLOCKS: [(u32, &[usize]); 8] =
    [(2, &[0]), (3, &[0, 2]), (6, &[0]), (7, &[0, 2]), (8, &[0]), (12, &[0, 2]), (13, &[0, 2]), (14, &[208])];

fn format(id: u32) -> Result<&'static Format, Wrong> {
    Format::find(id).ok_or_else(|| Wrong::Differs(format!("no type of tensors has the number {id}")))
}

/// A matrix in a file.
struct File {
    format: &'static Format,
    order: Order,
    size: [usize; 2],
    bytes: Vec<u8>,
}

impl File {
    fn count(&self) -> usize {
        self.size[0] * self.size[1]
    }

    /// Copies it to the device in pieces of whole groups of values, and does something with each.
    fn in_pieces<D: Device>(
        &self,
        bench: &Bench<D>,
        (dice, group): (&mut Dice, usize),
        mut each: impl FnMut(&Piece) -> Result<(), Wrong>,
    ) -> Result<(), Wrong> {
        let bytes = |values: usize| values / self.format.values * self.format.bytes;
        let mut first = 0;
        while first < self.count() {
            let groups = (self.count() - first) / group;
            let count = group * dice.of(1..groups.min(40) + 1);
            let held = bench.hold(&self.bytes[bytes(first)..][..bytes(count)])?;
            each(&Piece { at: held.at(), format: self.format, order: self.order, size: self.size, first, count })?;
            first += count;
        }
        Ok(())
    }
}

/// Float values of a type, and what they are in float32.
fn floats(dice: &mut Dice, format: &Format, count: usize) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = Vec::new();
    let mut values = Vec::new();
    for _ in 0..count {
        let value = (dice.float() - 0.5) * if dice.word().is_multiple_of(32) { 0.0 } else { 3.0 };
        let (stored, value) = match format.bytes {
            4 => (value.to_le_bytes().to_vec(), value),
            _ if format.name == "f16" => (f16::from_f32(value).to_le_bytes().to_vec(), f16::from_f32(value).to_f32()),
            _ => (bf16::from_f32(value).to_le_bytes().to_vec(), bf16::from_f32(value).to_f32()),
        };
        bytes.extend(stored);
        values.push(value);
    }
    (bytes, values)
}

fn orders(dice: &mut Dice) -> (Order, usize) {
    let (heads, width) = (dice.of(1..4), 2 * dice.of(1..9));
    (dice.one(&[Order::Rows, Order::Pairs(width)]), heads * width)
}

/// Values in the order of rows, of values as they are stored.
fn in_order(stored: &[f32], order: Order, [outputs, inputs]: [usize; 2]) -> Vec<f32> {
    let at = |output: usize, input: usize| match order {
        Order::Columns => input * outputs + output,
        _ => order.stored_at(output) * inputs + input,
    };
    (0..outputs).flat_map(|output| (0..inputs).map(move |input| stored[at(output, input)])).collect()
}

pub(super) fn values<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    for id in FLOATS {
        let (order, outputs) = orders(dice);
        let order = if dice.chance() { Order::Columns } else { order };
        let (format, size) = (format(id)?, [outputs, dice.of(1..70)]);
        let (bytes, stored) = floats(dice, format, size[0] * size[1]);
        let file = File { format, order, size, bytes };
        let out = bench.poisoned(2 * file.count())?;
        file.in_pieces(bench, (dice, 1), |piece| Ok(bench.kernels.convert(piece, out.at())?))?;
        let dtype = bench.dtype();
        let expected = in_order(&stored, order, size).into_iter().flat_map(|value| dtype.round(value).to_le_bytes());
        compare(&format!("{} {order:?}", format.name), &bench.bytes(&out)?, &expected.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Memory for quantised weights, full of what is wrong.
struct Room<D: Device> {
    quants: Held<D>,
    scales: Held<D>,
    minimums: Option<Held<D>>,
}

impl<D: Device> Room<D> {
    fn of(bench: &Bench<D>, like: &Quantized) -> Result<Self, Wrong> {
        let minimums = like.minimums.as_ref().map(|all| bench.poisoned(4 * all.len())).transpose()?;
        let quants = bench.poisoned(like.quants.len() / in_byte(like))?;
        Ok(Self { quants, scales: bench.poisoned(4 * like.scales.len())?, minimums })
    }

    fn at(&self, like: &Quantized) -> Quants {
        Quants {
            quants: self.quants.at(),
            scales: self.scales.at(),
            minimums: self.minimums.as_ref().map_or(0 as Address, Held::at),
            block: like.block,
            lowest: like.lowest,
            in_byte: in_byte(like),
        }
    }

    fn compare(&self, bench: &Bench<D>, what: &str, expected: &Quantized) -> Result<(), Wrong> {
        let floats = |all: &[f32]| all.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        let quants = packed(&expected.quants, expected.lowest, in_byte(expected));
        compare(&format!("quants of {what}"), &bench.bytes(&self.quants)?, &quants)?;
        compare(&format!("scales of {what}"), &bench.bytes(&self.scales)?, &floats(&expected.scales))?;
        match (&self.minimums, &expected.minimums) {
            (Some(held), Some(all)) => compare(&format!("minimums of {what}"), &bench.bytes(held)?, &floats(all)),
            _ => Ok(()),
        }
    }
}

const fn in_byte(quantized: &Quantized) -> usize {
    if quantized.bits == 4 { 2 } else { 1 }
}

pub(super) fn blocks<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    for (id, halves) in BLOCKS {
        let format = format(id)?;
        let Stored::Quants(layout) = &format.stored else { continue };
        let (order, outputs) = orders(dice);
        let size = [outputs, format.values * dice.of(1..4)];
        let mut bytes: Vec<u8> = Vec::new();
        for _ in 0..size[0] * size[1] / format.values {
            let mut block: Vec<u8> = (0..format.bytes).map(|_| dice.word().to_le_bytes()[1]).collect();
            for at in halves {
                block[*at..][..2].copy_from_slice(&f16::from_f32(dice.float() - 0.5).to_le_bytes());
            }
            bytes.extend(block);
        }
        let stored = format.unpack(layout, &bytes, size[0], size[1]);
        let mut expected = stored.reordered(|row| order.stored_at(row));
        if dice.chance() {
            // As it is beside rows of another type.
            let (quants, scales, minimums) = (Vec::new(), Vec::new(), dice.chance().then(Vec::new));
            let beside = Quantized {
                outputs: 0,
                inputs: size[1],
                block: 16,
                lowest: i8::MIN,
                bits: 8,
                quants,
                scales,
                minimums,
            };
            expected.append(beside);
        }
        let file = File { format, order, size, bytes };
        let room = Room::of(bench, &expected)?;
        let to = room.at(&expected);
        file.in_pieces(bench, (dice, format.values), |piece| Ok(bench.kernels.unpack(piece, &to)?))?;
        room.compare(bench, &format!("{} {order:?}", format.name), &expected)?;
    }
    Ok(())
}

pub(super) fn quantised<D: Device>(bench: &Bench<D>, dice: &mut Dice) -> Result<(), Wrong> {
    for id in FLOATS {
        let (order, outputs) = orders(dice);
        let (format, size) = (format(id)?, [outputs, 32 * dice.of(1..5)]);
        let (bytes, stored) = floats(dice, format, size[0] * size[1]);
        let rows = Rows::Dense(in_order(&stored, order, size)).quantised(quantized::Format::Q8_0, size[0], size[1]);
        let Rows::Quantized(expected) = rows else { continue };
        let file = File { format, order, size, bytes };
        let room = Room::of(bench, &expected)?;
        let to = room.at(&expected);
        file.in_pieces(bench, (dice, 32), |piece| Ok(bench.kernels.quantize(piece, &to)?))?;
        room.compare(bench, &format!("{} {order:?}", format.name), &expected)?;
    }
    Ok(())
}

fn compare(what: &str, found: &[u8], expected: &[u8]) -> Result<(), Wrong> {
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None if found.len() == expected.len() => Ok(()),
        None => Err(Wrong::Differs(format!("{what}: {} bytes, not {}", found.len(), expected.len()))),
        Some(at) => Err(Wrong::Differs(format!("{what}: byte {at} is {}, its twin is {}", found[at], expected[at]))),
    }
}
