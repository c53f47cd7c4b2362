//! The types of tensors in GGUF files, one row each, and how a block of each is unpacked.
//!
//! Never here: files, products. The layouts are those of ggml (`ggml-common.h`); float types go through candle.

use candle_core::DType;
use half::f16;

use crate::quantized::Quantized;

/// A type of tensors.
#[derive(Debug)]
pub(crate) struct Format {
    /// The number that files have for it.
    pub(crate) id: u32,
    /// Its usual name.
    pub(crate) name: &'static str,
    /// Values per block; rows are multiples of it.
    pub(crate) values: usize,
    /// Bytes per block.
    pub(crate) bytes: usize,
    /// What the bytes are.
    pub(crate) stored: Stored,
}

/// What the bytes of a block are.
#[derive(Debug)]
pub(crate) enum Stored {
    /// Floating-point values.
    Floats(DType),
    /// Whole numbers with scales.
    Quants(Layout),
}

/// How quants are kept once they are unpacked; see [`Quantized`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) block: usize,
    pub(crate) lowest: i8,
    pub(crate) bits: u8,
    pub(crate) minimums: bool,
    unpack: fn(&[u8], &mut Block),
}

/// One unpacked block, filled in from the front.
#[derive(Default)]
struct Block {
    quants: Vec<i8>,
    scales: Vec<f32>,
    minimums: Vec<f32>,
}

/// Values of the large blocks with scales of scales.
const SUPER: usize = 256;

const fn floats(id: u32, name: &'static str, bytes: usize, dtype: DType) -> Format {
    Format { id, name, values: 1, bytes, stored: Stored::Floats(dtype) }
}

const fn quants(id: u32, name: &'static str, sizes: (usize, usize), layout: Layout) -> Format {
    Format { id, name, values: sizes.0, bytes: sizes.1, stored: Stored::Quants(layout) }
}

const BYTES: Layout = Layout { block: 32, lowest: i8::MIN, bits: 8, minimums: false, unpack: q8_0 };
const WITH_MINIMUMS: Layout = Layout { minimums: true, ..BYTES };

/// The table of types.
const FORMATS: &[Format] = &[
    floats(0, "f32", 4, DType::F32),
    floats(1, "f16", 2, DType::F16),
    floats(30, "bf16", 2, DType::BF16),
    quants(2, "q4_0", (32, 18), Layout { lowest: -8, bits: 4, unpack: q4_0, ..BYTES }),
    quants(3, "q4_1", (32, 20), Layout { lowest: 0, bits: 4, unpack: q4_1, ..WITH_MINIMUMS }),
    quants(6, "q5_0", (32, 22), Layout { unpack: q5_0, ..BYTES }),
    quants(7, "q5_1", (32, 24), Layout { unpack: q5_1, ..WITH_MINIMUMS }),
    quants(8, "q8_0", (32, 34), BYTES),
    quants(12, "q4_k", (SUPER, 144), Layout { lowest: 0, bits: 4, unpack: q4_k, ..WITH_MINIMUMS }),
    quants(13, "q5_k", (SUPER, 176), Layout { unpack: q5_k, ..WITH_MINIMUMS }),
    quants(14, "q6_k", (SUPER, 210), Layout { block: 16, unpack: q6_k, ..BYTES }),
];

impl Format {
    /// The type with that number.
    pub(crate) fn find(id: u32) -> Option<&'static Self> {
        FORMATS.iter().find(|format| format.id == id)
    }

    /// The type of such values.
    pub(crate) fn of_floats(dtype: DType) -> Option<&'static Self> {
        FORMATS.iter().find(|format| matches!(format.stored, Stored::Floats(stored) if stored == dtype))
    }

    /// All names, for messages.
    pub(crate) fn names() -> String {
        FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ")
    }

    /// Bytes that so many values take in memory: floats as float32, quants with a float32 scale (and minimum) for each
    /// block.
    pub(crate) fn bytes_in_memory(&self, values: u64) -> u64 {
        match &self.stored {
            Stored::Floats(_) => values.saturating_mul(4),
            Stored::Quants(Layout { block, bits, minimums, .. }) => {
                let per_block = if *minimums { 8 } else { 4 };
                (values / 8).saturating_mul(u64::from(*bits)) + values / (*block as u64) * per_block
            }
        }
    }

    /// Unpacks a matrix of this type.
    pub(crate) fn unpack(&self, layout: &Layout, bytes: &[u8], outputs: usize, inputs: usize) -> Quantized {
        let values = outputs * inputs;
        let Layout { block, lowest, bits, minimums, unpack } = *layout;
        let mut all = Block {
            quants: Vec::with_capacity(values),
            scales: Vec::with_capacity(values / block),
            minimums: Vec::with_capacity(if minimums { values / block } else { 0 }),
        };
        bytes.chunks_exact(self.bytes).for_each(|bytes| unpack(bytes, &mut all));
        let Block { quants, scales, minimums: all_minimums } = all;
        let minimums = minimums.then_some(all_minimums);
        Quantized { outputs, inputs, block, lowest, bits, quants, scales, minimums }
    }
}

/// The half-precision number at a place of a block.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The two halves of a byte as quants.
fn low(byte: u8) -> i8 {
    (byte & 15).cast_signed()
}

fn high(byte: u8) -> i8 {
    (byte >> 4).cast_signed()
}

/// 32 quants of 4 bits: first the low halves, then the high ones, `offset` taken from each.
fn nibbles(bytes: &[u8], offset: i8, block: &mut Block) {
    block.quants.extend(bytes.iter().map(|byte| low(*byte) - offset));
    block.quants.extend(bytes.iter().map(|byte| high(*byte) - offset));
}

/// 32 quants of 5 bits: halves as in [`nibbles`], and the fifth bits before them.
fn five_bits(bytes: &[u8], offset: i8, block: &mut Block) {
    let fifth = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let halves = bytes[4..].iter().map(|byte| low(*byte)).chain(bytes[4..].iter().map(|byte| high(*byte)));
    block.quants.extend(halves.enumerate().map(|(place, half)| {
        let bit = if fifth >> place & 1 == 1 { 16 } else { 0 };
        half + bit - offset
    }));
}

fn q4_0(bytes: &[u8], block: &mut Block) {
    block.scales.push(half_at(bytes, 0));
    nibbles(&bytes[2..], 8, block);
}

fn q4_1(bytes: &[u8], block: &mut Block) {
    block.scales.push(half_at(bytes, 0));
    block.minimums.push(-half_at(bytes, 2));
    nibbles(&bytes[4..], 0, block);
}

fn q5_0(bytes: &[u8], block: &mut Block) {
    block.scales.push(half_at(bytes, 0));
    five_bits(&bytes[2..], 16, block);
}

fn q5_1(bytes: &[u8], block: &mut Block) {
    block.scales.push(half_at(bytes, 0));
    block.minimums.push(-half_at(bytes, 2));
    five_bits(&bytes[4..], 0, block);
}

fn q8_0(bytes: &[u8], block: &mut Block) {
    block.scales.push(half_at(bytes, 0));
    block.quants.extend(bytes[2..].iter().map(|byte| byte.cast_signed()));
}

/// The scales and minimums of q4_k and q5_k: eight of six bits each, in twelve bytes after two half-precision factors.
fn scales_of_eight(bytes: &[u8], block: &mut Block) {
    let (scale, minimum) = (half_at(bytes, 0), half_at(bytes, 2));
    let packed = &bytes[4..16];
    for part in 0..8 {
        let (of_scale, of_minimum) = match part {
            0..4 => (packed[part] & 63, packed[part + 4] & 63),
            _ => (packed[part + 4] & 15 | packed[part - 4] >> 6 << 4, packed[part + 4] >> 4 | packed[part] >> 6 << 4),
        };
        block.scales.push(scale * f32::from(of_scale));
        block.minimums.push(minimum * f32::from(of_minimum));
    }
}

fn q4_k(bytes: &[u8], block: &mut Block) {
    scales_of_eight(bytes, block);
    bytes[16..].chunks_exact(32).for_each(|bytes| nibbles(bytes, 0, block));
}

fn q5_k(bytes: &[u8], block: &mut Block) {
    scales_of_eight(bytes, block);
    let (fifth, halves) = bytes[16..].split_at(32);
    for part in 0..8 {
        let halves = &halves[part / 2 * 32..][..32];
        block.quants.extend(halves.iter().zip(fifth).map(|(byte, fifth)| {
            let half = if part % 2 == 0 { low(*byte) } else { high(*byte) };
            let bit = if fifth >> part & 1 == 1 { 16 } else { 0 };
            half + bit
        }));
    }
}

fn q6_k(bytes: &[u8], block: &mut Block) {
    let (lower, rest) = bytes.split_at(128);
    let (upper, rest) = rest.split_at(64);
    let (scales, factor) = rest.split_at(16);
    let factor = half_at(factor, 0);
    block.scales.extend(scales.iter().map(|scale| factor * f32::from(scale.cast_signed())));
    for part in 0..8 {
        let (half, quarter) = (part / 4, part % 4);
        let lower = &lower[half * 64 + quarter % 2 * 32..][..32];
        let upper = &upper[half * 32..][..32];
        block.quants.extend(lower.iter().zip(upper).map(|(lower, upper)| {
            let lower = if quarter < 2 { low(*lower) } else { high(*lower) };
            let upper = (upper >> (2 * quarter) & 3).cast_signed();
            (lower | upper << 4) - 32
        }));
    }
}
