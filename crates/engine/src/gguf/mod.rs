//! GGUF files as a second source of weights: what stands in one is told in the words of a Hugging Face folder.
//!
//! Never here: arithmetic, and nothing of a family but its row in [`families`]. The rest of the engine sees a
//! config.json, a tokenizer.json, a tokenizer_config.json and tensors under the names that `transformers` gives them.

mod families;
mod formats;
mod header;
mod tokenizer;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde_json::Value as Json;

use crate::error::LoadError;
use crate::quantized::Rows;
use crate::raw::{Digest, Order, Source};
use families::Family;
#[cfg(any(test, feature = "cuda"))]
pub(crate) use formats::Layout;
pub(crate) use formats::{Format, Stored};
use header::{Header, Place, Value};

/// Is shown the type, the place and the hash of what was read.
type Seen<'a> = &'a mut dyn FnMut(&'static str, &Source, Digest);

/// A model in one or several GGUF files.
pub(crate) struct Gguf {
    metadata: Metadata,
    family: &'static Family,
    files: Vec<(Arc<PathBuf>, Arc<File>)>,
    /// Tensors by the names that the files have for them, with the file they are in.
    tensors: BTreeMap<String, (usize, Place)>,
    config: Json,
}

/// More parts of a model are a broken or hostile file.
const PARTS_MAX: usize = 1000;

impl Gguf {
    /// The GGUF file that a path means: itself, or the only model in a folder.
    pub(crate) fn find(path: &Path) -> Option<PathBuf> {
        let is_gguf = |path: &Path| path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
        if !path.is_dir() {
            return is_gguf(path).then(|| path.to_owned());
        }
        let mut found: Vec<PathBuf> =
            path.read_dir().ok()?.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_gguf(path)).collect();
        // Later parts come with their first one.
        found.retain(|path| Split::of(path).is_none_or(|split| split.part == 1));
        found.sort();
        match &found[..] {
            [one] if !path.join("config.json").exists() => Some(one.clone()),
            _ => None,
        }
    }

    /// Opens a file and, where it is the first of several, those that follow.
    pub(crate) fn open(path: &Path) -> Result<Self, LoadError> {
        let split = Split::of(path);
        let paths = split.as_ref().map_or_else(|| Ok(vec![path.to_owned()]), |split| split.paths(path))?;
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        let mut first = None;
        for path in paths {
            let file = File::open(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
            let header = Header::read(&path, &file)?;
            for (name, place) in header.tensors {
                if tensors.contains_key(&name) {
                    let reason = format!("tensor {name} stands in an earlier part too");
                    return Err(LoadError::Checkpoint { path, reason });
                }
                tensors.insert(name, (files.len(), place));
            }
            first.get_or_insert(Metadata { path: path.clone(), values: header.metadata });
            files.push((Arc::new(path), Arc::new(file)));
        }
        let Some(metadata) = first else {
            return Err(LoadError::NoWeights { path: path.to_owned() });
        };
        metadata.check_parts(files.len())?;
        let family = Family::of(&metadata)?;
        let mut gguf = Self { metadata, family, files, tensors, config: Json::Null };
        gguf.config = gguf.make_config()?;
        Ok(gguf)
    }

    /// The first file.
    pub(crate) fn path(&self) -> &Path {
        &self.metadata.path
    }

    /// What config.json and generation_config.json would say.
    pub(crate) fn config(&self) -> &Json {
        &self.config
    }

    /// What tokenizer.json would say.
    pub(crate) fn tokenizer(&self) -> Result<Json, LoadError> {
        tokenizer::tokenizer(&self.metadata)
    }

    /// What tokenizer_config.json would say.
    pub(crate) fn tokenizer_config(&self) -> Result<Json, LoadError> {
        tokenizer::settings(&self.metadata)
    }

    fn make_config(&self) -> Result<Json, LoadError> {
        let vocabulary = self.tensors.get("token_embd.weight").and_then(|(_, place)| place.shape.first().copied());
        let tied = !self.tensors.contains_key("output.weight");
        let divisors = match self.tensors.get("rope_freqs.weight") {
            Some((_, place)) => {
                let shape = place.shape.clone();
                Some(self.as_stored("rope_freqs.weight", &shape, &mut |_, _, _| ())?.into_values())
            }
            None => None,
        };
        families::config(&self.metadata, self.family, &families::Facts { vocabulary, tied, divisors })
    }

    /// How many values all tensors have, and the bytes that they take in memory.
    pub(crate) fn size(&self) -> (u64, u64) {
        self.tensors.values().fold((0, 0), |(values, bytes), (_, place)| {
            let count = place.shape.iter().fold(1_u64, |count, size| count.saturating_mul(*size as u64));
            (values + count, bytes + place.format.bytes_in_memory(count))
        })
    }

    /// Whether the tensor that `transformers` calls so exists.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.family.tensor(name).is_some_and(|name| self.tensors.contains_key(&name))
    }

    /// A matrix by the name that `transformers` has for it, where it lies. None where there is none of that shape, or one
    /// whose rows are not in an order with a name.
    pub(crate) fn raw(&self, name: &str, shape: [usize; 2]) -> Option<(Source, &'static Format, Order)> {
        let (file, place) = self.tensors.get(&self.family.tensor(name)?).filter(|(_, place)| place.shape == shape)?;
        let order = match self.family.interleaved_heads(name, &self.config) {
            Some(heads) => Order::Pairs(families::pairs_width(shape[0], heads)?),
            None => Order::Rows,
        };
        Some((self.source(*file, place), place.format, order))
    }

    /// The sizes of a tensor.
    #[cfg(test)]
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(&self.family.tensor(name)?).map(|(_, place)| place.shape.clone())
    }

    /// Where all tensors lie.
    pub(crate) fn sources(&self) -> Vec<Source> {
        self.tensors.values().map(|(file, place)| self.source(*file, place)).collect()
    }

    fn source(&self, file: usize, place: &Place) -> Source {
        let (path, file) = &self.files[file];
        Source::new((path, file), place.start, place.bytes)
    }

    /// A tensor by the name that `transformers` has for it, in its order of rows; it must have that shape.
    pub(crate) fn rows(&self, name: &str, shape: &[usize], seen: Seen<'_>) -> Result<Rows, LoadError> {
        let Some(stored_as) = self.family.tensor(name) else {
            return Err(LoadError::MissingTensor { path: self.path().to_owned(), tensor: name.to_owned() });
        };
        let mut rows = self.as_stored(&stored_as, shape, seen)?;
        if let (Some(heads), [outputs, ..]) = (self.family.interleaved_heads(name, &self.config), shape) {
            rows = families::halves_apart(rows, *outputs, heads);
        }
        if self.family.adds_one_to(name)
            && let Rows::Dense(values) = &mut rows
        {
            values.iter_mut().for_each(|value| *value -= 1.0);
        }
        Ok(rows)
    }

    fn as_stored(&self, name: &str, shape: &[usize], seen: Seen<'_>) -> Result<Rows, LoadError> {
        let Some((file, place)) = self.tensors.get(name) else {
            return Err(LoadError::MissingTensor { path: self.path().to_owned(), tensor: name.to_owned() });
        };
        let source = self.source(*file, place);
        if place.shape != shape {
            return Err(LoadError::Shape {
                path: source.path().to_owned(),
                tensor: name.to_owned(),
                found: place.shape.clone(),
                expected: shape.to_owned(),
            });
        }
        let (bytes, digest) = source.read()?;
        seen(place.format.name, &source, digest);
        match &place.format.stored {
            Stored::Quants(layout) => {
                let inputs = shape.last().copied().unwrap_or(1).max(1);
                let outputs = shape.iter().product::<usize>() / inputs;
                Ok(Rows::Quantized(place.format.unpack(layout, &bytes, outputs, inputs)))
            }
            Stored::Floats(dtype) => Tensor::from_raw_buffer(&bytes, *dtype, shape, &Device::Cpu)
                .and_then(|tensor| tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1())
                .map(Rows::Dense)
                .map_err(|error| LoadError::Convert {
                    path: source.path().to_owned(),
                    tensor: name.to_owned(),
                    dtype: place.format.name.to_owned(),
                    source: Box::new(error),
                }),
        }
    }
}

/// A name such as `model-00002-of-00005.gguf`.
#[derive(Debug, PartialEq, Eq)]
struct Split {
    stem: String,
    part: usize,
    parts: usize,
}

impl Split {
    fn of(path: &Path) -> Option<Self> {
        let (rest, parts) = path.file_stem()?.to_str()?.rsplit_once("-of-")?;
        let (stem, part) = rest.rsplit_once('-')?;
        let number = |digits: &str| (digits.len() == 5).then(|| digits.parse().ok()).flatten();
        Some(Self { stem: stem.to_owned(), part: number(part)?, parts: number(parts)? })
    }

    /// All parts in order, whichever of them was named.
    fn paths(&self, path: &Path) -> Result<Vec<PathBuf>, LoadError> {
        let Self { stem, parts, .. } = self;
        if !(1..=PARTS_MAX).contains(parts) {
            let reason = format!("is named as one of {parts} parts; at most {PARTS_MAX} are read");
            return Err(LoadError::Checkpoint { path: path.to_owned(), reason });
        }
        Ok((1..=*parts).map(|part| path.with_file_name(format!("{stem}-{part:05}-of-{parts:05}.gguf"))).collect())
    }
}

/// The metadata of a model, with the file it came from, so that every complaint names both.
struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    fn wrong(&self, key: &str, reason: impl Into<String>) -> LoadError {
        LoadError::Field { path: self.path.clone(), field: key.to_owned(), reason: reason.into() }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "is not a string")),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "is not true or false")),
        }
    }

    /// A number; of a list with one for each layer, that which all of them have.
    fn number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Number(number)) => Ok(Some(*number)),
            Some(Value::Numbers(all)) if !all.is_empty() && all.iter().all(|number| *number == all[0]) => {
                Ok(Some(all[0]))
            }
            Some(Value::Numbers(_)) => Err(self.wrong(key, "differs between layers, which is not supported")),
            Some(_) => Err(self.wrong(key, "is not a number")),
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "just checked")]
    fn whole(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let Some(number) = self.number(key)? else { return Ok(None) };
        if number >= 0.0 && number <= f64::from(u32::MAX) && number.fract() == 0.0 {
            Ok(Some(number as u32))
        } else {
            Err(self.wrong(key, format!("is {number}, not a whole number")))
        }
    }

    fn texts(&self, key: &str) -> Result<Option<&[String]>, LoadError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            // An empty list may have any type.
            Some(Value::Numbers(none)) if none.is_empty() => Ok(Some(&[])),
            Some(_) => Err(self.wrong(key, "is not a list of strings")),
        }
    }

    fn numbers(&self, key: &str) -> Result<Option<&[f64]>, LoadError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Numbers(numbers)) => Ok(Some(numbers)),
            Some(_) => Err(self.wrong(key, "is not a list of numbers")),
        }
    }

    /// A renamed part, or a part without its siblings, would be a model with holes.
    fn check_parts(&self, found: usize) -> Result<(), LoadError> {
        match self.whole("split.count")?.and_then(|count| usize::try_from(count).ok()) {
            Some(count) if count > 1 && count != found => Err(self.wrong(
                "split.count",
                format!(
                    "is {count}, but {found} of these files are there: keep all parts in one folder under their \
                     names, such as model-00001-of-{count:05}.gguf"
                ),
            )),
            _ => Ok(()),
        }
    }
}
