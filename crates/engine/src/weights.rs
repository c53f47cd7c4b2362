//! The one weight source: safetensors files, single or sharded, as float32 values, or a GGUF model.
//!
//! Never here: what the weights are for, or how bytes are read (`raw.rs`). Tensors are read one at a
//! time, and no more than one is held twice; a backend that takes bytes as they lie in the file gets
//! those.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::architectures::Orientation;
use crate::config::Fields;
use crate::error::LoadError;
use crate::gguf::{self, Gguf};
use crate::quantized::{Format, Rows};
use crate::raw::{Digest as Hash, Order, Raw, Source};

/// An opened checkpoint.
pub(crate) struct Weights {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to shard and place in it.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
    /// The other kind of checkpoint, in place of the files above.
    gguf: Option<Gguf>,
    /// Of what stands beside the weights.
    hash: Sha256,
    /// Of each tensor that was read, in no order but that of their labels: backends read in orders of their own.
    seen: BTreeMap<String, Hash>,
    /// Bytes that the tensors read so far have in memory.
    bytes: u64,
    /// What float projections and embeddings are brought to.
    format: Option<Format>,
}

/// One safetensors file.
struct Shard {
    path: Arc<PathBuf>,
    file: Arc<File>,
    /// Where the tensors begin, in bytes from the start of the file.
    data_start: u64,
}

/// A header longer than this is a broken or hostile file, as in the safetensors library.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The types that weights may have.
const FLOATS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];

impl Weights {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names, and
    /// reads their headers.
    pub(crate) fn open(folder: &Path) -> Result<Self, LoadError> {
        let mut weights = Self::empty(folder);
        for path in files(folder)? {
            weights.add(path)?;
        }
        Ok(weights)
    }

    /// The weights of a GGUF model.
    pub(crate) fn of_gguf(gguf: Gguf) -> Self {
        let weights = Self::empty(gguf.path());
        Self { gguf: Some(gguf), ..weights }
    }

    /// None at all: what is hashed decides nothing but a fingerprint.
    pub(crate) fn empty(path: &Path) -> Self {
        Self {
            folder: path.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            gguf: None,
            hash: Sha256::new(),
            seen: BTreeMap::new(),
            bytes: 0,
            format: None,
        }
    }

    /// From now on brings float projections and embeddings to a format, where there is one.
    pub(crate) fn quantise(&mut self, format: Option<Format>) {
        self.format = format;
    }

    /// Loads something whose values stay as they are.
    pub(crate) fn exactly<T>(&mut self, load: impl FnOnce(&mut Self) -> T) -> T {
        let format = self.format.take();
        let loaded = load(self);
        self.format = format;
        loaded
    }

    /// The GGUF model, when it is one.
    pub(crate) fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// How many values all tensors have, and the bytes that they take in memory.
    pub(crate) fn size(&self) -> (u64, u64) {
        if let Some(gguf) = &self.gguf {
            return gguf.size();
        }
        let (mut values, mut bytes) = (0_u64, 0_u64);
        for (_, place) in self.tensors.values() {
            let count = place.shape.iter().fold(1_u64, |count, size| count.saturating_mul(*size as u64));
            values = values.saturating_add(count);
            bytes = bytes.saturating_add(match (self.format, place.shape.as_slice()) {
                (Some(format), [_, width]) if format.takes(*width) => format.bytes(count),
                _ => count.saturating_mul(4),
            });
        }
        (values, bytes)
    }

    /// Whether a tensor of that name exists.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.gguf.as_ref().map_or_else(|| self.tensors.contains_key(name), |gguf| gguf.has(name))
    }

    /// A projection or an embedding as it is stored: `outputs` rows of `inputs`, quantised where the file has it so or
    /// that was asked for.
    pub(crate) fn rows(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
        orientation: Orientation,
    ) -> Result<Rows, LoadError> {
        let before = self.bytes;
        let rows = match self.gguf {
            // GGUF has all projections in one orientation.
            Some(_) => self.rows_of_gguf(name, &[outputs, inputs]),
            None => self.projection(name, outputs, inputs, orientation).map(Rows::Dense),
        };
        let Some(format) = self.format else { return rows };
        let rows = rows?.quantised(format, outputs, inputs);
        if matches!(rows, Rows::Quantized(_)) {
            self.bytes = self.bytes.min(before + format.bytes((outputs * inputs) as u64));
        }
        Ok(rows)
    }

    /// A projection or an embedding where it lies; it counts as read when it was [`Self::took`]. None where it has to be
    /// had by [`Self::rows`], which tells what is wrong with it.
    pub(crate) fn raw(&self, name: &str, outputs: usize, inputs: usize, orientation: Orientation) -> Option<Raw> {
        let (stored, order) = match orientation {
            Orientation::OutIn => ([outputs, inputs], Order::Rows),
            Orientation::InOut => ([inputs, outputs], Order::Columns),
        };
        let (source, format, order, shape) = match &self.gguf {
            Some(gguf) => {
                let (source, format, order) = gguf.raw(name, [outputs, inputs])?;
                (source, format, order, [outputs, inputs])
            }
            None => {
                let (shard, place) = self.tensors.get(name).filter(|(_, place)| place.shape == stored)?;
                let format = gguf::Format::of_floats(DType::try_from(place.dtype).ok()?)?;
                (self.shards[*shard].source(place), format, order, stored)
            }
        };
        let label = label(name, format.name, &shape);
        Some(Raw { source, format, outputs, inputs, order, label, digest: None })
    }

    /// The outputs and inputs of a matrix.
    #[cfg(test)]
    pub(crate) fn matrix_size(&self, name: &str, orientation: Orientation) -> Option<[usize; 2]> {
        let shape = match &self.gguf {
            Some(gguf) => gguf.shape(name)?,
            None => self.tensors.get(name)?.1.shape.clone(),
        };
        match (shape.as_slice(), orientation, &self.gguf) {
            ([inputs, outputs], Orientation::InOut, None) => Some([*outputs, *inputs]),
            ([outputs, inputs], ..) => Some([*outputs, *inputs]),
            _ => None,
        }
    }

    /// Where all tensors lie, in the order of their names.
    pub(crate) fn sources(&self) -> Vec<Source> {
        match &self.gguf {
            Some(gguf) => gguf.sources(),
            None => self.tensors.values().map(|(shard, place)| self.shards[*shard].source(place)).collect(),
        }
    }

    /// Counts what was read elsewhere.
    pub(crate) fn took(&mut self, raw: Raw) {
        self.bytes += raw.source.bytes() as u64;
        self.seen.extend(raw.digest.map(|digest| (raw.label, digest)));
    }

    /// What float projections and embeddings are brought to, where there is something.
    pub(crate) fn format(&self) -> Option<Format> {
        self.format
    }

    fn rows_of_gguf(&mut self, name: &str, shape: &[usize]) -> Result<Rows, LoadError> {
        let missing = || LoadError::MissingTensor { path: self.folder.clone(), tensor: name.to_owned() };
        let gguf = self.gguf.as_ref().ok_or_else(missing)?;
        let (seen, read) = (&mut self.seen, &mut self.bytes);
        gguf.rows(name, shape, &mut |format, source, digest| {
            seen.insert(label(name, format, shape), digest);
            *read += source.bytes() as u64;
        })
    }

    /// A tensor as float32 values in row-major order; it must have that shape.
    pub(crate) fn vector(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        if self.gguf.is_some() {
            return self.rows_of_gguf(name, shape).map(Rows::into_values);
        }
        self.convert(name, shape, |tensor| tensor.flatten_all()?.to_vec1())
    }

    /// A projection as float32 values, `outputs` rows of `inputs`, however it is stored.
    fn projection(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
        orientation: Orientation,
    ) -> Result<Vec<f32>, LoadError> {
        match orientation {
            Orientation::OutIn => self.vector(name, &[outputs, inputs]),
            Orientation::InOut => {
                self.convert(name, &[inputs, outputs], |tensor| tensor.t()?.contiguous()?.flatten_all()?.to_vec1())
            }
        }
    }

    /// Adds other files that decide the output (config, tokenizer) to the hash.
    pub(crate) fn hash_bytes(&mut self, bytes: &[u8]) {
        self.hash.update(u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_le_bytes());
        self.hash.update(bytes);
    }

    /// Bytes that the tensors read so far have in memory: those of a file for what is quantised, 4 for every other value.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The hash of everything read, in hexadecimal; the same for single and sharded files.
    pub(crate) fn finish(mut self) -> String {
        for (label, digest) in std::mem::take(&mut self.seen) {
            self.hash_bytes(label.as_bytes());
            self.hash_bytes(&digest);
        }
        self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn add(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let mut file = File::open(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
        let (header, data_start, data_bytes) = header(&path, &mut file)?;
        let mut places = Vec::new();
        for (name, entry) in header {
            if name != "__metadata__" {
                let place = place(&path, &name, entry.get(), data_bytes)?;
                places.push((name, place));
            }
        }
        check_order(&path, &mut places)?;
        self.tensors.extend(places.into_iter().map(|(name, place)| (name, (self.shards.len(), place))));
        self.shards.push(Shard { path: Arc::new(path), file: Arc::new(file), data_start });
        Ok(())
    }

    fn convert(
        &mut self,
        name: &str,
        shape: &[usize],
        layout: impl FnOnce(Tensor) -> candle_core::Result<Vec<f32>>,
    ) -> Result<Vec<f32>, LoadError> {
        let Some((shard, place)) = self.tensors.get(name) else {
            return Err(LoadError::MissingTensor { path: self.folder.clone(), tensor: name.to_owned() });
        };
        let shard = &self.shards[*shard];
        if place.shape != shape {
            return Err(LoadError::Shape {
                path: shard.path.to_path_buf(),
                tensor: name.to_owned(),
                found: place.shape.clone(),
                expected: shape.to_owned(),
            });
        }
        if !FLOATS.contains(&place.dtype) {
            return Err(LoadError::Checkpoint {
                path: shard.path.to_path_buf(),
                reason: format!("tensor {name} has type {:?}; weights are F32, F16 or BF16", place.dtype),
            });
        }
        let (bytes, digest) = shard.source(place).read()?;
        self.bytes += 4 * shape.iter().product::<usize>() as u64;
        let dtype = format!("{:?}", place.dtype).to_lowercase();
        let values = || {
            let dtype = DType::try_from(place.dtype)?;
            let tensor = Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)?;
            layout(tensor.to_dtype(DType::F32)?)
        };
        let values = values().map_err(|source| LoadError::Convert {
            path: shard.path.to_path_buf(),
            tensor: name.to_owned(),
            dtype: format!("{:?}", place.dtype),
            source: Box::new(source),
        });
        self.seen.insert(label(name, &dtype, shape), digest);
        values
    }
}

impl Shard {
    fn source(&self, place: &TensorInfo) -> Source {
        let (start, end) = place.data_offsets;
        let from = self.data_start + u64::try_from(start).unwrap_or(u64::MAX);
        Source::new((&self.path, &self.file), from, end - start)
    }
}

/// What a tensor is called in the hash of a model, by its type and its sizes in the file.
fn label(name: &str, dtype: &str, shape: &[usize]) -> String {
    format!("{name} {dtype}{shape:?}")
}

/// The weight files of a folder, in a fixed order.
fn files(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let single = folder.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Err(LoadError::NoWeights { path: folder.to_owned() });
    }
    let fields = Fields::read(index)?;
    let Some(map) = fields.get("weight_map").and_then(Value::as_object) else {
        return Err(fields.wrong("weight_map", "is not an object"));
    };
    let mut names: Vec<&str> = Vec::new();
    for value in map.values() {
        // Only plain names: an index must not reach outside of its folder.
        match value.as_str().filter(|name| !name.contains(['/', '\\']) && *name != "..") {
            Some(name) => names.push(name),
            None => return Err(fields.wrong("weight_map", format!("has {value}, not a file name"))),
        }
    }
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// The entries of a header, whose values are taken apart one by one: all of them at once would need many times the
/// memory that the header has.
type Entries = BTreeMap<String, Box<RawValue>>;

/// The header of a safetensors file: its entries, where the data begins and how long it is.
fn header(path: &Path, file: &mut File) -> Result<(Entries, u64, u64), LoadError> {
    let read = |source| LoadError::Read { path: path.to_owned(), source };
    let broken = |reason: String| LoadError::Checkpoint { path: path.to_owned(), reason };
    let length = file.metadata().map_err(read)?.len();
    let mut prefix = [0; 8];
    if length < 8 {
        return Err(broken(format!("has {length} bytes, too few for a safetensors file")));
    }
    file.read_exact(&mut prefix).map_err(read)?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > HEADER_BYTES_MAX || header_bytes > length - 8 {
        return Err(broken(format!("states a header of {header_bytes} bytes in a file of {length}")));
    }
    let mut text = vec![0; usize::try_from(header_bytes).unwrap_or(0)];
    file.read_exact(&mut text).map_err(read)?;
    let entries = serde_json::from_slice(&text).map_err(|source| LoadError::Json { path: path.to_owned(), source })?;
    Ok((entries, 8 + header_bytes, length - 8 - header_bytes))
}

/// One entry of a header, checked against the file's length and its own shape.
fn place(path: &Path, name: &str, entry: &str, data_bytes: u64) -> Result<TensorInfo, LoadError> {
    let broken = |reason: String| LoadError::Checkpoint { path: path.to_owned(), reason };
    let place: TensorInfo = serde_json::from_str(entry)
        .map_err(|source| broken(format!("tensor {name} has a malformed entry ({source})")))?;
    let (start, end) = place.data_offsets;
    let fits = start <= end && u64::try_from(end).is_ok_and(|end| end <= data_bytes);
    if !fits {
        return Err(broken(format!(
            "tensor {name} ends at byte {end} of the data, but the file holds only {data_bytes}: \
             it is truncated or damaged"
        )));
    }
    let bits = place.shape.iter().try_fold(place.dtype.bitsize(), |bits, size| bits.checked_mul(*size));
    if bits != (end - start).checked_mul(8) {
        return Err(broken(format!(
            "tensor {name} of shape {:?} and type {:?} has {} bytes",
            place.shape,
            place.dtype,
            end - start
        )));
    }
    Ok(place)
}

/// Tensors that share bytes are a damaged file, or one that would fill the memory many times over.
fn check_order(path: &Path, places: &mut [(String, TensorInfo)]) -> Result<(), LoadError> {
    places.sort_by_key(|(_, place)| place.data_offsets);
    let overlap = places.windows(2).find(|pair| pair[1].1.data_offsets.0 < pair[0].1.data_offsets.1);
    match overlap {
        Some([(one, _), (other, _)]) => Err(LoadError::Checkpoint {
            path: path.to_owned(),
            reason: format!("tensors {one} and {other} overlap: it is damaged"),
        }),
        _ => Ok(()),
    }
}
