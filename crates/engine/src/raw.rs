//! Weights where they lie: the bytes of a tensor in a file, how they are read, and the hash that stands for them.
//!
//! Never here: what the bytes mean (`gguf::formats`), or what a backend makes of them.
//!
//! Parts of a tensor are read side by side, each straight to where it is wanted, and hashed by the thread that has just
//! read it. Reads, not a map of the file: a copy is made either way, and a file that shrinks meanwhile is an error and no
//! signal.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::LoadError;
use crate::gguf::Format;
use crate::model::open;

/// Bytes that are read and hashed at a time. The hash of a tensor is that of the hashes of its parts, so that many threads
/// can make it; another size would be another fingerprint.
pub(crate) const PART_BYTES: usize = 1 << 16;

/// The hash of a tensor.
pub(crate) type Digest = [u8; 32];

/// A tensor's bytes in a file.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    path: Arc<PathBuf>,
    file: Arc<File>,
    start: u64,
    bytes: usize,
}

impl Source {
    /// So many bytes from `start` on.
    pub(crate) fn new((path, file): (&Arc<PathBuf>, &Arc<File>), start: u64, bytes: usize) -> Self {
        Self { path: path.clone(), file: file.clone(), start, bytes }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes, with their hash.
    pub(crate) fn read(&self) -> Result<(Vec<u8>, Digest), LoadError> {
        let (mut reader, mut bytes) = (self.reader(), vec![0; self.bytes]);
        reader.next(&mut bytes)?;
        Ok((bytes, reader.finish()))
    }

    /// Reads them from the first to the last.
    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader { source: self, at: 0, parts: blake3::Hasher::new() }
    }
}

/// Reads the bytes of a tensor, and hashes them: with BLAKE3, which takes a quarter of
/// SHA-256's time (0.14 s a GB and core), about as much as the copy.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    source: &'a Source,
    at: usize,
    parts: blake3::Hasher,
}

impl Reader<'_> {
    /// The next bytes: a multiple of [`PART_BYTES`], unless they are the last ones.
    pub(crate) fn next(&mut self, into: &mut [u8]) -> Result<(), LoadError> {
        let (file, from) = (&self.source.file, self.source.start + self.at as u64);
        let read = |(index, part): (usize, &mut [u8])| -> io::Result<Digest> {
            file.read_exact_at(part, from + (index * PART_BYTES) as u64)?;
            Ok(blake3::hash(part).into())
        };
        let read: io::Result<Vec<Digest>> = into.par_chunks_mut(PART_BYTES).enumerate().map(read).collect();
        let read = read.map_err(|source| LoadError::Read { path: self.source.path().to_owned(), source })?;
        for digest in &read {
            self.parts.update(digest);
        }
        self.at += into.len();
        Ok(())
    }

    /// The hash of what was read.
    pub(crate) fn finish(self) -> Digest {
        self.parts.finalize().into()
    }
}

/// Reads and hashes all weights of a model as they are when they are loaded onto a device: in pieces of so many bytes, each
/// into the next of `rooms` such pieces of one memory, and shows them to `each`. How many bytes there were.
///
/// # Errors
/// Of files that cannot be read, or are no weights.
pub fn read_all(
    model_path: &Path,
    (piece_bytes, rooms): (usize, usize),
    each: &mut dyn FnMut(&[u8]),
) -> Result<u64, LoadError> {
    let (_, weights) = open(model_path)?;
    let piece_bytes = piece_bytes.next_multiple_of(PART_BYTES);
    let mut ring = vec![0; piece_bytes * rooms.max(1)];
    let mut turns = (0..rooms.max(1)).map(|room| room * piece_bytes).cycle();
    let mut bytes = 0;
    for source in weights.sources() {
        let (mut reader, mut left) = (source.reader(), source.bytes());
        while left > 0 {
            let piece = &mut ring[turns.next().unwrap_or(0)..][..piece_bytes.min(left)];
            reader.next(piece)?;
            each(piece);
            left -= piece.len();
        }
        bytes += source.bytes() as u64;
    }
    Ok(bytes)
}

/// A projection or an embedding, or a part of its rows, where it lies.
#[derive(Debug)]
#[cfg_attr(not(any(test, feature = "cuda")), expect(dead_code, reason = "only devices look at what lies in a file"))]
pub struct Raw {
    pub(crate) source: Source,
    pub(crate) format: &'static Format,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) order: Order,
    /// What it is called in the hash of the model, and its own hash once it was read.
    pub(crate) label: String,
    pub(crate) digest: Option<Digest>,
}

/// How the rows of a projection lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One after another.
    Rows,
    /// As columns: `inputs` rows of `outputs`.
    Columns,
    /// One after another, those of a head of so many rows as the pairs that are rotated together. They belong apart, in the
    /// first half and in the second.
    Pairs(usize),
}

impl Order {
    /// The row of which such a one is stored at `row`.
    pub(crate) const fn stored_at(self, row: usize) -> usize {
        match self {
            Self::Pairs(width) => {
                let place = row % width;
                row - place + place % (width / 2) * 2 + place / (width / 2)
            }
            Self::Rows | Self::Columns => row,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn source(bytes: &[u8], start: u64, length: usize) -> Source {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Source::new((&Arc::new(PathBuf::from("weights")), &Arc::new(file)), start, length)
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|index| u8::try_from(index * 31 % 251).unwrap()).collect()
    }

    #[test]
    fn bytes_and_hash_are_the_same_however_they_are_read() {
        for length in [0, 1, PART_BYTES, 5 * PART_BYTES + 17] {
            let all = bytes(length + 20);
            let source = source(&all, 13, length);
            let (whole, hash) = source.read().unwrap();
            assert_eq!(whole, all[13..][..length]);
            let (mut reader, mut parts) = (source.reader(), vec![0; length]);
            parts.chunks_mut(2 * PART_BYTES).for_each(|part| reader.next(part).unwrap());
            assert_eq!((parts, reader.finish()), (whole.clone(), hash));
            let each = whole.chunks(PART_BYTES).flat_map(|part| Digest::from(blake3::hash(part)));
            assert_eq!(hash, Digest::from(blake3::hash(&each.collect::<Vec<_>>())));
        }
    }

    #[test]
    fn a_file_that_has_shrunk_is_an_error() {
        let error = source(&bytes(PART_BYTES), 0, 2 * PART_BYTES).read().unwrap_err();
        assert_eq!(error.to_string(), "cannot read weights");
    }

    #[test]
    fn pairs_are_those_of_a_rotation() {
        let order = |order: Order| (0..8).map(|row| order.stored_at(row)).collect::<Vec<_>>();
        assert_eq!(order(Order::Pairs(4)), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(order(Order::Rows), [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
