//! What every dialect must do, on replies in `recorded/` that have the shape of those of its provider.

use super::{DIALECTS, Dialect, StreamEvent, Streaming};
use crate::fixture::{rich, with_images};
use crate::providers::{Provider, Table};
use proptest::prelude::*;
use serde_json::Value;
use std::path::Path;

fn recorded(file: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dialect/recorded").join(file)).unwrap()
}

/// A provider that speaks a dialect: the one of its name, else the first.
pub(super) fn provider(table: &Table, dialect: &str) -> Provider {
    let own = table.find(dialect).filter(|row| row.dialect == dialect);
    let speaks = |row: &&Provider| {
        row.dialect == dialect || row.models.iter().any(|models| models.dialect.as_deref() == Some(dialect))
    };
    let first = || table.names().filter_map(|name| table.find(name)).find(speaks);
    own.or_else(first).unwrap().clone()
}

fn decoded(dialect: &dyn Dialect, pieces: &[&[u8]]) -> Vec<StreamEvent> {
    let mut decoder = dialect.decoder();
    let mut events: Vec<StreamEvent> = pieces.iter().flat_map(|piece| decoder.push(piece)).collect();
    events.extend(decoder.end());
    events
}

#[test]
fn what_is_sent() {
    let table = Table::embedded().unwrap();
    for (name, dialect) in DIALECTS {
        let (spec, provider) = (rich(), provider(&table, name));
        let encoded = dialect.encode(&spec, "the-model", &provider, Streaming::On);
        // Whether a map keeps its order depends on what else is built.
        let mut body: Value = serde_json::from_str(&encoded.body).unwrap();
        body.sort_all_objects();
        let body = serde_json::to_string_pretty(&body).unwrap();
        let (path, headers, left_out) = (encoded.path, encoded.headers, encoded.left_out);
        insta::assert_snapshot!(format!("sent_{name}"), format!("{path}\n{headers:?}\nleft out {left_out:?}\n{body}"));
        let whole = dialect.encode(&spec, "the-model", &provider, Streaming::Off);
        let body: Value = serde_json::from_str(&whole.body).unwrap();
        assert!(body["stream"].as_bool() != Some(true) && !whole.path.contains("stream"), "{name} streams unasked");
    }
}

#[test]
fn what_is_sent_of_images() {
    let table = Table::embedded().unwrap();
    let mut told = Vec::new();
    for (name, dialect) in DIALECTS {
        for urls in [&[][..], &["https://example.com/a.webp", "https://example.com/b"]] {
            let encoded = dialect.encode(&with_images(urls), "the-model", &provider(&table, name), Streaming::Off);
            let mut body: Value = serde_json::from_str(&encoded.body).unwrap();
            body.sort_all_objects();
            let asked = ["messages", "input", "contents", "inputs"].iter().find_map(|field| body.get(field)).unwrap();
            told.push(format!("{name}, {} URLs, left out {:?}\n{asked}\n", urls.len(), encoded.left_out));
        }
    }
    insta::assert_snapshot!(told.concat());
}

#[test]
fn what_is_understood() {
    for (name, dialect) in DIALECTS {
        let reply = dialect.decode(&recorded(&format!("{name}.json"))).unwrap();
        insta::assert_debug_snapshot!(format!("whole_{name}"), reply);
        let events = decoded(*dialect, &[&recorded(&format!("{name}.stream"))]);
        insta::assert_debug_snapshot!(format!("stream_{name}"), events);
    }
}

#[test]
fn where_bytes_are_split_never_matters() {
    for (name, dialect) in DIALECTS {
        let stream = recorded(&format!("{name}.stream"));
        let whole = decoded(*dialect, &[&stream]);
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(decoded(*dialect, &bytes), whole, "{name}, byte by byte");
        for at in 0..stream.len() {
            assert_eq!(decoded(*dialect, &[&stream[..at], &stream[at..]]), whole, "{name}, split at {at}");
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes: Vec<u8>, text: String) {
        for (_, dialect) in DIALECTS {
            for bytes in [&bytes[..], text.as_bytes()] {
                decoded(*dialect, &[b"data: ", bytes, b"\n\n"]);
                drop(dialect.decode(bytes));
                dialect.decode_error(bytes);
            }
        }
    }

    #[test]
    fn a_reply_cut_anywhere_is_no_reply_and_a_stream_cut_anywhere_does_not_panic(cut: prop::sample::Index) {
        for (name, dialect) in DIALECTS {
            let whole = recorded(&format!("{name}.json"));
            let text = whole.trim_ascii_end();
            prop_assert!(dialect.decode(&text[..cut.index(text.len())]).is_err(), "{name}");
            let stream = recorded(&format!("{name}.stream"));
            decoded(*dialect, &[&stream[..cut.index(stream.len())]]);
        }
    }
}
