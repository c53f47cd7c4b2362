//! The header of a GGUF file: its metadata and where its tensors lie.
//!
//! Never here: what a key or a tensor is for. Every length that the file states is held against the bytes that the file
//! has left before anything is made of that size.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use crate::error::LoadError;
use crate::gguf::formats::Format;

/// More tensors or metadata keys than this are a broken or hostile file.
const ENTRIES_MAX: u64 = 1 << 20;

/// More elements of one metadata array are a broken or hostile file: the largest vocabularies have 2^18.
const ELEMENTS_MAX: u64 = 1 << 23;

/// A value of the metadata. Numbers are kept as float64, which holds all that a header can sensibly say.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Number(f64),
    Flag(bool),
    Text(String),
    Numbers(Vec<f64>),
    Texts(Vec<String>),
}

/// A tensor of a file.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// How its values are stored.
    pub(crate) format: &'static Format,
    /// Its sizes, the slowest first (GGUF writes them the other way round).
    pub(crate) shape: Vec<usize>,
    /// Where it begins, in bytes from the start of the file.
    pub(crate) start: u64,
    /// How long it is in bytes.
    pub(crate) bytes: usize,
}

/// What stands before the tensors.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, Place>,
}

impl Header {
    /// Reads the header of a file.
    pub(crate) fn read(path: &Path, file: &File) -> Result<Self, LoadError> {
        let length = file.metadata().map_err(|source| LoadError::Read { path: path.to_owned(), source })?.len();
        let mut source = Source { path: path.to_owned(), input: BufReader::new(file), left: length };
        let magic = source.bytes::<4>("the magic")?;
        if &magic != b"GGUF" {
            return Err(source.broken("is not a GGUF file".to_owned()));
        }
        let version = u32::from_le_bytes(source.bytes("the version")?);
        if !matches!(version, 2 | 3) {
            return Err(source.broken(format!("is GGUF version {version}; versions 2 and 3 (little-endian) are read")));
        }
        let tensors = source.count("tensors", ENTRIES_MAX)?;
        let keys = source.count("metadata keys", ENTRIES_MAX)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = source.text("a metadata key")?;
            let value = source.value(&key)?;
            metadata.insert(key, value);
        }
        let stubs = (0..tensors).map(|_| source.stub()).collect::<Result<Vec<_>, _>>()?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Number(number)) if *number >= 1.0 && *number <= 65_536.0 && number.fract() == 0.0 => {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "just checked")]
                let alignment = *number as u64;
                alignment
            }
            Some(other) => return Err(source.broken(format!("general.alignment is {other:?}"))),
        };
        let end = source.input.stream_position().map_err(|error| source.unreadable(error))?;
        let data = end.next_multiple_of(alignment);
        let mut places = BTreeMap::new();
        for stub in stubs {
            let (name, place) = stub.place(&source, data, length)?;
            if places.insert(name.clone(), place).is_some() {
                return Err(source.broken(format!("tensor {name} is listed twice")));
            }
        }
        source.check_order(&places)?;
        Ok(Self { metadata, tensors: places })
    }
}

/// A tensor's entry as the file has it.
struct Stub {
    name: String,
    shape: Vec<u64>,
    format: u32,
    offset: u64,
}

impl Stub {
    /// The entry, checked against the file's length.
    fn place(self, source: &Source<'_>, data: u64, length: u64) -> Result<(String, Place), LoadError> {
        let Self { name, shape, format, offset } = self;
        let Some(format) = Format::find(format) else {
            let known = Format::names();
            return Err(source.broken(format!("tensor {name} has type {format}, which is not read; read are: {known}")));
        };
        let shape: Option<Vec<usize>> = shape.iter().rev().map(|size| usize::try_from(*size).ok()).collect();
        let sizes = shape.and_then(|shape| {
            let values = shape.iter().try_fold(1_usize, |values, size| values.checked_mul(*size))?;
            Some((shape, values))
        });
        let Some((shape, values)) = sizes else {
            return Err(source.broken(format!("tensor {name} has an impossible shape")));
        };
        if !shape.last().is_some_and(|width| width.is_multiple_of(format.values)) {
            return Err(source.broken(format!(
                "tensor {name} of shape {shape:?} cannot be of type {}, whose rows are multiples of {}",
                format.name, format.values
            )));
        }
        let bytes = (values / format.values).checked_mul(format.bytes);
        let place = bytes.and_then(|bytes| {
            let start = data.checked_add(offset)?;
            let end = start.checked_add(u64::try_from(bytes).ok()?)?;
            (end <= length).then_some((start, bytes))
        });
        let Some((start, bytes)) = place else {
            return Err(source.broken(format!(
                "tensor {name} of shape {shape:?} and type {} at byte {offset} of the data ends beyond the file's \
                 {length} bytes: it is truncated or damaged",
                format.name
            )));
        };
        Ok((name, Place { format, shape, start, bytes }))
    }
}

/// The file being read, which knows how much is left of it.
struct Source<'a> {
    path: PathBuf,
    input: BufReader<&'a File>,
    left: u64,
}

impl Source<'_> {
    fn broken(&self, reason: String) -> LoadError {
        LoadError::Checkpoint { path: self.path.clone(), reason }
    }

    /// Tensors that share bytes are a damaged file, or one that would fill the memory many times over.
    fn check_order(&self, places: &BTreeMap<String, Place>) -> Result<(), LoadError> {
        let mut order: Vec<_> = places.iter().map(|(name, place)| (place.start, place.bytes as u64, name)).collect();
        order.sort_unstable();
        match order.windows(2).find(|pair| pair[1].0 < pair[0].0 + pair[0].1) {
            Some([(.., one), (.., other)]) => {
                Err(self.broken(format!("tensors {one} and {other} overlap: it is damaged")))
            }
            _ => Ok(()),
        }
    }

    fn unreadable(&self, source: std::io::Error) -> LoadError {
        LoadError::Read { path: self.path.clone(), source }
    }

    /// Sets aside so many bytes of what is left.
    fn take(&mut self, bytes: u64, what: &str) -> Result<(), LoadError> {
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.broken(format!(
                "states {bytes} bytes for {what}, but only {} are left: it is truncated or damaged",
                self.left
            ))),
        }
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], LoadError> {
        self.take(N as u64, what)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|error| self.unreadable(error))?;
        Ok(bytes)
    }

    fn count(&mut self, what: &str, most: u64) -> Result<u64, LoadError> {
        let count = u64::from_le_bytes(self.bytes(what)?);
        if count > most || count > self.left {
            return Err(self.broken(format!("states {count} {what}: it is truncated or damaged")));
        }
        Ok(count)
    }

    fn text(&mut self, what: &str) -> Result<String, LoadError> {
        let length = u64::from_le_bytes(self.bytes(what)?);
        self.take(length, what)?;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.input.read_exact(&mut bytes).map_err(|error| self.unreadable(error))?;
        // Vocabularies hold tokens that are no characters by themselves.
        Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn value(&mut self, key: &str) -> Result<Value, LoadError> {
        let kind = u32::from_le_bytes(self.bytes(key)?);
        match kind {
            7 => Ok(Value::Flag(self.bytes::<1>(key)? != [0])),
            8 => self.text(key).map(Value::Text),
            9 => {
                let kind = u32::from_le_bytes(self.bytes(key)?);
                let count = self.count(&format!("elements of {key}"), ELEMENTS_MAX)?;
                match kind {
                    8 => (0..count).map(|_| self.text(key)).collect::<Result<_, _>>().map(Value::Texts),
                    _ => (0..count).map(|_| self.number(key, kind)).collect::<Result<_, _>>().map(Value::Numbers),
                }
            }
            _ => self.number(key, kind).map(Value::Number),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "no number of a header that is used is beyond 2^53")]
    fn number(&mut self, key: &str, kind: u32) -> Result<f64, LoadError> {
        Ok(match kind {
            0 | 7 => f64::from(u8::from_le_bytes(self.bytes(key)?)),
            1 => f64::from(i8::from_le_bytes(self.bytes(key)?)),
            2 => f64::from(u16::from_le_bytes(self.bytes(key)?)),
            3 => f64::from(i16::from_le_bytes(self.bytes(key)?)),
            4 => f64::from(u32::from_le_bytes(self.bytes(key)?)),
            5 => f64::from(i32::from_le_bytes(self.bytes(key)?)),
            6 => f64::from(f32::from_le_bytes(self.bytes(key)?)),
            10 => u64::from_le_bytes(self.bytes(key)?) as f64,
            11 => i64::from_le_bytes(self.bytes(key)?) as f64,
            12 => f64::from_le_bytes(self.bytes(key)?),
            _ => return Err(self.broken(format!("{key} has a value of unknown type {kind}"))),
        })
    }

    fn stub(&mut self) -> Result<Stub, LoadError> {
        let name = self.text("a tensor's name")?;
        let sizes = u32::from_le_bytes(self.bytes(&name)?);
        if !(1..=4).contains(&sizes) {
            return Err(self.broken(format!("tensor {name} has {sizes} dimensions")));
        }
        let shape = (0..sizes).map(|_| self.bytes(&name).map(u64::from_le_bytes)).collect::<Result<_, _>>()?;
        let format = u32::from_le_bytes(self.bytes(&name)?);
        let offset = u64::from_le_bytes(self.bytes(&name)?);
        Ok(Stub { name, shape, format, offset })
    }
}
