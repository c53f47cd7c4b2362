//! The form of stored records: one byte of version, then MessagePack with named fields, compressed when large.
//!
//! Version 1 is plain, version 2 is an LZ4 block behind its length. Readers ignore fields they do not know, and fields
//! that were added later have defaults, so old records stay readable.

use crate::QueueError;
use serde::Serialize;
use serde::de::DeserializeOwned;

const PLAIN: u8 = 1;
const LZ4: u8 = 2;

/// Records above this size are compressed: below, there is little to gain.
const COMPRESS_ABOVE_BYTES: usize = 4 * 1024;

/// No record is larger: requests and results are bounded far below.
const RECORD_BYTES_MAX: usize = 256 * 1024 * 1024;

pub(crate) fn encode<T: Serialize>(what: &'static str, record: &T) -> Result<Vec<u8>, QueueError> {
    let corrupt = |error: rmp_serde::encode::Error| corrupt(what, error.to_string());
    let mut bytes = vec![PLAIN];
    record.serialize(&mut rmp_serde::Serializer::new(&mut bytes).with_struct_map()).map_err(corrupt)?;
    if bytes.len() <= COMPRESS_ABOVE_BYTES {
        return Ok(bytes);
    }
    let mut compressed = vec![LZ4];
    compressed.extend(lz4_flex::compress_prepend_size(&bytes[1..]));
    Ok(if compressed.len() < bytes.len() { compressed } else { bytes })
}

pub(crate) fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, QueueError> {
    let read = |packed: &[u8]| rmp_serde::from_slice(packed).map_err(|error| corrupt(what, error.to_string()));
    match bytes.split_first() {
        Some((&PLAIN, packed)) => read(packed),
        Some((&LZ4, compressed)) => read(&decompress(what, compressed)?),
        Some((version, _)) => Err(corrupt(what, format!("version {version} is not known: a newer genmill wrote it"))),
        None => Err(corrupt(what, "it is empty".to_owned())),
    }
}

/// Reads records that stand one behind the other, none of them compressed.
pub(crate) fn decode_all<T: DeserializeOwned>(what: &'static str, mut bytes: &[u8]) -> Result<Vec<T>, QueueError> {
    let mut records = Vec::new();
    while let Some((version, mut rest)) = bytes.split_first() {
        if *version != PLAIN {
            return Err(corrupt(what, format!("version {version} is not known: a newer genmill wrote it")));
        }
        records.push(rmp_serde::from_read(&mut rest).map_err(|error| corrupt(what, error.to_string()))?);
        bytes = rest;
    }
    Ok(records)
}

fn decompress(what: &'static str, compressed: &[u8]) -> Result<Vec<u8>, QueueError> {
    let (size, block) =
        lz4_flex::block::uncompressed_size(compressed).map_err(|error| corrupt(what, error.to_string()))?;
    if size > RECORD_BYTES_MAX {
        return Err(corrupt(what, format!("it claims to have {size} bytes")));
    }
    lz4_flex::block::decompress(block, size).map_err(|error| corrupt(what, error.to_string()))
}

pub(crate) fn corrupt(what: impl Into<String>, problem: impl Into<String>) -> QueueError {
    QueueError::Corrupt { what: what.into(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_core::attempt::{FinishReason, Generation};
    use genmill_core::image::{Image, Part};
    use genmill_core::request::{ChatMessage, Role};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(texts: Vec<String>) {
            let bytes = encode("texts", &texts).unwrap();
            prop_assert_eq!(decode::<Vec<String>>("texts", &bytes).unwrap(), texts);
        }

        #[test]
        fn records_one_behind_the_other_are_read(texts: Vec<String>) {
            let all: Vec<u8> = texts.iter().flat_map(|text| encode("text", text).unwrap()).collect();
            prop_assert_eq!(decode_all::<String>("text", &all).unwrap(), texts);
        }

        #[test]
        fn rubbish_is_an_error(bytes: Vec<u8>) {
            // Some rubbish happens to be a record; none may panic.
            drop(decode::<Vec<String>>("texts", &bytes));
            drop(decode_all::<String>("texts", &bytes));
        }
    }

    #[test]
    fn a_large_record_is_compressed() {
        let text = "again and again ".repeat(10_000);
        let bytes = encode("text", &text).unwrap();
        assert!(bytes.len() < text.len() / 10);
        assert_eq!(decode::<String>("text", &bytes).unwrap(), text);
    }

    #[test]
    fn a_generation_of_before_its_fingerprint_was_told_is_read() {
        #[derive(serde::Serialize)]
        struct Before {
            text: &'static str,
            finish_reason: &'static str,
            usage: Option<()>,
            first_token_ms: Option<u64>,
        }
        let before = Before { text: "four", finish_reason: "stop", usage: None, first_token_ms: Some(1) };
        let read: Generation = decode("generation", &encode("generation", &before).unwrap()).unwrap();
        let expect = Generation::new("four".to_owned(), FinishReason::Stop);
        assert_eq!(read, Generation { first_token_ms: Some(1), ..expect });
    }

    #[test]
    fn a_message_of_before_there_were_images_is_read_and_images_are_kept_as_bytes() {
        #[derive(serde::Serialize)]
        struct Before {
            role: &'static str,
            content: &'static str,
        }
        let before = encode("message", &Before { role: "user", content: "Hi" }).unwrap();
        let text = ChatMessage::new(Role::User, "Hi");
        assert_eq!(encode("message", &text).unwrap(), before);
        assert_eq!(decode::<ChatMessage>("message", &before).unwrap(), text);
        // Bytes above 127 would be two each in a list of numbers.
        let image = Image::of([b"\x89PNG\r\n\x1a\n", &[0xff; 1_000][..]].concat(), "").unwrap();
        let shown = ChatMessage { parts: vec![Part::Image(image)], ..ChatMessage::new(Role::User, "") };
        let bytes = encode("message", &shown).unwrap();
        assert!(bytes.len() < 1_100, "{}", bytes.len());
        assert_eq!(decode::<ChatMessage>("message", &bytes).unwrap(), shown);
    }

    #[test]
    fn a_newer_version_is_named() {
        let error = decode::<String>("text", &[9, 0]).unwrap_err();
        assert!(error.to_string().contains("version 9"), "{error}");
    }
}
