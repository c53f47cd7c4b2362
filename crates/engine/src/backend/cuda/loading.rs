//! Weights from a file to the device: bytes go from the file to the ring of pinned memory and from there to the device, once
//! and as they are; what they have to become is made of them there (`stored.cu`).
//!
//! Never here: what a tensor is for, or values on the host.

use crate::backend::cuda::device::{Address, Device, DeviceError, Dtype};
use crate::backend::cuda::launch::{Piece, QUANTIZED_STEP, Quants};
use crate::backend::cuda::{Blocks, Cuda, Matrix};
use crate::error::LoadError;
use crate::gguf::{Layout, Stored};
use crate::quantized::Format;
use crate::raw::{Digest, Order, PART_BYTES, Raw};

/// Memory of the device where pieces lie that something is made of; given back when the model is loaded.
#[derive(Debug)]
pub(super) struct Scratch<D: Device> {
    memory: Option<D::Memory>,
    bytes: usize,
}

impl<D: Device> Default for Scratch<D> {
    fn default() -> Self {
        Self { memory: None, bytes: 0 }
    }
}

impl<D: Device> Scratch<D> {
    fn of(&mut self, device: &D, bytes: usize) -> Result<Address, DeviceError> {
        if bytes > self.bytes {
            // The old one goes first: whatever used it was asked for before, and is done before.
            self.memory = None;
            self.memory = Some(device.allocate(bytes)?);
            self.bytes = bytes;
        }
        Ok(self.memory.as_ref().map_or(0, D::address))
    }
}

/// What parts become together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Becomes {
    /// Values of the element type.
    Values,
    /// Quants with scales.
    Quants { block: usize, lowest: i8, in_byte: usize, minimums: bool },
}

/// What the device can make of these parts by itself. None: the host has to.
pub(super) fn becomes(parts: &[Raw], format: Option<Format>) -> Option<Becomes> {
    let inputs = parts.first()?.inputs;
    // The kernels count in 32 bits.
    if parts.iter().any(|part| u32::try_from(part.outputs * inputs).is_err()) {
        return None;
    }
    let layout = |part: &Raw| match &part.format.stored {
        Stored::Floats(_) => None,
        Stored::Quants(layout) => Some(*layout),
    };
    let layouts: Vec<Layout> = parts.iter().filter_map(layout).collect();
    match (layouts.as_slice(), format) {
        ([], Some(format)) if format.takes(inputs) => {
            let Format::Q8_0 = format;
            let whole = parts.iter().all(|part| part.order != Order::Columns);
            whole.then_some(Becomes::Quants { block: 32, lowest: i8::MIN, in_byte: 1, minimums: false })
        }
        ([], _) => Some(Becomes::Values),
        ([first, ..], _) if layouts.len() == parts.len() && inputs.is_multiple_of(QUANTIZED_STEP) => {
            // As `Quantized::append` has it.
            let alike = layouts.iter().all(|layout| (layout.lowest, layout.bits) == (first.lowest, first.bits));
            let (lowest, bits) = if alike { (first.lowest, first.bits) } else { (i8::MIN, 8) };
            Some(Becomes::Quants {
                block: layouts.iter().fold(first.block, |block, layout| block.min(layout.block)),
                lowest,
                in_byte: if bits == 4 { 2 } else { 1 },
                minimums: layouts.iter().any(|layout| layout.minimums),
            })
        }
        _ => None,
    }
}

/// Bytes of a piece, of as many as the device takes: whole blocks, and whole parts of the hash.
fn piece_bytes(block: usize, most: usize) -> usize {
    let both = PART_BYTES / common_divisor(PART_BYTES, block) * block;
    both * (most / both).max(1)
}

const fn common_divisor(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl<D: Device> Cuda<D> {
    /// Takes parts over that become this.
    pub(super) fn load(&self, parts: &mut [Raw], becomes: Becomes) -> Result<Matrix<D>, LoadError> {
        let inputs = parts.first().map_or(0, |part| part.inputs);
        let outputs: usize = parts.iter().map(|part| part.outputs).sum();
        let room = |bytes| self.weight_room(bytes);
        let count = outputs * inputs;
        let matrix = match becomes {
            Becomes::Values => Matrix { memory: room(2 * count), outputs, inputs, quantized: None },
            Becomes::Quants { block, lowest, in_byte, minimums } => {
                let (scales, minimums) = (room(4 * count / block), minimums.then(|| room(4 * count / block)).flatten());
                let blocks = Blocks { scales, minimums, block, lowest, in_byte };
                Matrix { memory: room(count / in_byte), outputs, inputs, quantized: Some(blocks) }
            }
        };
        let mut above = 0;
        for part in parts {
            part.digest = Some(self.load_part(part, &matrix, above)?);
            above += part.outputs;
        }
        Ok(matrix)
    }

    /// Makes a part the rows of a matrix that are below so many others.
    fn load_part(&self, part: &Raw, matrix: &Matrix<D>, above: usize) -> Result<Digest, LoadError> {
        let mut reader = part.source.reader();
        let piece = piece_bytes(part.format.bytes, self.device().fill_bytes_max());
        let mut broken = None;
        let mut at = 0;
        while at < part.source.bytes() && broken.is_none() {
            let bytes = piece.min(part.source.bytes() - at);
            let mut read = |room: &mut [u8]| broken = reader.next(room).err();
            let done = self.heed(|| self.load_piece(part, (matrix, above), (at, bytes), &mut read));
            if done.is_none() {
                // The device's fault is told by whoever asks it for more.
                break;
            }
            at += bytes;
        }
        broken.map_or_else(|| Ok(reader.finish()), Err)
    }

    fn load_piece(
        &self,
        raw: &Raw,
        (matrix, above): (&Matrix<D>, usize),
        (at, bytes): (usize, usize),
        read: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), DeviceError> {
        let values = |bytes: usize| bytes / raw.format.bytes * raw.format.values;
        let (above, first, count) = (above * raw.inputs, values(at), values(bytes));
        let out = matrix.at() + 2 * above as Address;
        if matrix.quantized.is_none() && raw.order == Order::Rows && raw.format.is(self.kernels.dtype) {
            return self.device().fill(out + at as Address, bytes, read);
        }
        let mut scratch = self.scratch();
        let (at, size) = (scratch.of(self.device(), bytes)?, [raw.outputs, raw.inputs]);
        let piece = Piece { at, format: raw.format, order: raw.order, size, first, count };
        self.device().fill(piece.at, bytes, read)?;
        match (matrix.quants(), &raw.format.stored) {
            (None, _) => self.kernels.convert(&piece, out),
            (Some(quants), Stored::Floats(_)) => self.kernels.quantize(&piece, &quants.below(above)),
            (Some(quants), Stored::Quants(_)) => self.kernels.unpack(&piece, &quants.below(above)),
        }
    }
}

impl Quants {
    /// Those that follow so many values.
    fn below(self, values: usize) -> Self {
        let blocks = (4 * values / self.block) as Address;
        Self {
            quants: self.quants + (values / self.in_byte) as Address,
            scales: self.scales + blocks,
            minimums: if self.minimums == 0 { 0 } else { self.minimums + blocks },
            ..self
        }
    }
}

impl crate::gguf::Format {
    fn is(&self, dtype: Dtype) -> bool {
        self.name == dtype.suffix()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use super::*;
    use crate::architectures::Orientation;
    use crate::backend::Backend as _;
    use crate::backend::cpu::Cpu;
    use crate::backend::cuda::emulator::Emulator;
    use crate::decoder::tests::fixtures;
    use crate::model::open;
    use crate::quantized::Rows;
    use crate::raw::Source;
    use crate::weights::Weights;
    use crate::{Model, ModelPaths};

    fn files() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf");
        let ggufs = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let ggufs = ggufs.filter(|path| path.extension().is_some_and(|end| end == "gguf"));
        ggufs.chain(fixtures()).collect()
    }

    /// All bytes of a matrix.
    fn bytes(cuda: &Cuda<Emulator>, matrix: &Matrix<Emulator>) -> Vec<Vec<u8>> {
        let count = matrix.outputs * matrix.inputs;
        let read = |at: Address, bytes: usize| {
            let mut read = vec![0; if at == 0 { 0 } else { bytes }];
            cuda.device().read(at, &mut read).unwrap();
            read
        };
        match matrix.quants() {
            None => vec![read(matrix.at(), 2 * count)],
            Some(quants) => vec![
                read(quants.quants, count / quants.in_byte),
                read(quants.scales, 4 * count / quants.block),
                read(quants.minimums, 4 * count / quants.block),
            ],
        }
    }

    /// Weights that go as they lie and weights that go by way of the host are the same on the device. Whether they went.
    fn check(
        weights: &mut Weights,
        cuda: &Cuda<Emulator>,
        (names, orientation): (&[&str], Orientation),
        format: Option<Format>,
    ) -> bool {
        weights.quantise(format);
        let sizes: Vec<[usize; 2]> = names.iter().map(|name| weights.matrix_size(name, orientation).unwrap()).collect();
        let inputs = sizes[0][1];
        let parts =
            names.iter().zip(&sizes).map(|(name, [outputs, inputs])| weights.raw(name, *outputs, *inputs, orientation));
        let Some(mut parts) = parts.collect::<Option<Vec<_>>>() else { return false };
        if !cuda.takes(&parts, format) {
            return false;
        }
        let stored = cuda.stored(&mut parts, format).unwrap();
        let rows = names
            .iter()
            .zip(&sizes)
            .map(|(name, [outputs, _])| weights.rows(name, *outputs, inputs, orientation).unwrap());
        let rows = rows.reduce(Rows::append).unwrap();
        let by_way_of_the_host = rows.into_matrix(cuda, sizes.iter().map(|[outputs, _]| outputs).sum(), inputs);
        assert_eq!(cuda.fault(), None);
        let [found, expected] = [&stored, &by_way_of_the_host].map(|matrix| bytes(cuda, matrix));
        assert!(found == expected, "{names:?} {format:?}");
        true
    }

    #[test]
    fn weights_of_all_formats_become_what_the_host_would_make_of_them() {
        let Some(device) = Emulator::start() else { return };
        let mut went = 0;
        for path in files() {
            let (config, mut weights) = open(&path).unwrap();
            let orientation = config.architecture.orientation;
            let attention = |part| format!("model.layers.0.self_attn.{part}.weight");
            let joined = ["q_proj", "k_proj", "v_proj"].map(attention);
            let joined: Vec<&str> = joined.iter().map(String::as_str).collect();
            let lists: [&[&str]; 5] = [
                &["model.embed_tokens.weight"],
                &["model.layers.1.mlp.down_proj.weight"],
                &["h.0.attn.c_attn.weight"],
                &["transformer.h.0.attn.c_attn.weight"],
                &joined,
            ];
            for names in lists {
                if names.iter().any(|name| !weights.has(name)) {
                    continue;
                }
                for dtype in [Dtype::Bf16, Dtype::F16] {
                    let cuda = Cuda::new(device.clone(), dtype);
                    for format in [None, Some(Format::Q8_0)] {
                        went += usize::from(check(&mut weights, &cuda, (names, orientation), format));
                    }
                }
            }
        }
        assert!(went > 200, "{went}");
    }

    #[test]
    fn pieces_are_whole_blocks_and_whole_parts_of_the_hash() {
        // What the ring of a GPU takes at once.
        let most = 16 << 20;
        for block in [2, 4, 18, 20, 22, 24, 34, 144, 176, 210] {
            let bytes = piece_bytes(block, most);
            assert!(bytes.is_multiple_of(block) && bytes.is_multiple_of(PART_BYTES), "{block}");
            assert!(bytes <= most && bytes > most / 2, "{block}");
        }
    }

    /// Weights of several pieces, read from a file.
    #[test]
    fn pieces_come_to_their_places() {
        let Some(device) = Emulator::start() else { return };
        let (cuda, size) = (Cuda::new(device, Dtype::Bf16), [1400, 512]);
        let values: Vec<f32> =
            (0..size[0] * size[1]).map(|index| (index * 7919 % 4001) as f32 / 4001.0 - 0.5).collect();
        let halves: Vec<u8> = values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &halves).unwrap();
        let (path, file) = (Arc::new(PathBuf::from("weights")), Arc::new(file));
        let matrix = |order, becomes| {
            let [outputs, inputs] = size;
            let source = Source::new((&path, &file), 0, halves.len());
            let format = crate::gguf::Format::find(1).unwrap();
            let raw = Raw { source, format, outputs, inputs, order, label: String::new(), digest: None };
            bytes(&cuda, &cuda.load(&mut [raw], becomes).unwrap())
        };
        let half = |value: f32| half::bf16::from_f32(half::f16::from_f32(value).to_f32()).to_le_bytes();
        let expected: Vec<u8> = values.iter().flat_map(|value| half(*value)).collect();
        assert!(matrix(Order::Rows, Becomes::Values) == [expected]);
        let column = |index: usize| values[index % size[1] * size[0] + index / size[1]];
        let expected: Vec<u8> = (0..values.len()).flat_map(|index| half(column(index))).collect();
        assert!(matrix(Order::Columns, Becomes::Values) == [expected]);
        let quants = Becomes::Quants { block: 32, lowest: i8::MIN, in_byte: 1, minimums: false };
        let widened = values.iter().map(|value| half::f16::from_f32(*value).to_f32()).collect();
        let rows = Rows::Dense(widened).quantised(Format::Q8_0, size[0], size[1]);
        let expected = bytes(&cuda, &rows.into_matrix(&cuda, size[0], size[1]));
        assert!(matrix(Order::Rows, quants) == expected);
    }

    #[test]
    fn the_hash_of_a_model_is_the_same_on_both_backends() {
        let Some(device) = Emulator::start() else { return };
        for path in files() {
            let paths = ModelPaths { model_path: path.clone(), tokenizer_path: None };
            let on_cpu = Model::on(&paths, ("float32", None), || Cpu::new(1));
            let on_gpu = Model::on(&paths, ("bfloat16", None), || Ok(Cuda::new(device.clone(), Dtype::Bf16)));
            let (Ok(on_cpu), Ok(on_gpu)) = (on_cpu, on_gpu) else { continue };
            let hash = |model: &Model| model.card().fingerprint().model.clone();
            assert_eq!(hash(&on_cpu), hash(&on_gpu), "{}", path.display());
        }
    }
}
