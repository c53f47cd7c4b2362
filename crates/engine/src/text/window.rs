//! Decoding as a stream for tokenizers whose tokens depend on their neighbours: a leading space is
//! dropped, bytes are joined.
//!
//! Never here: what a token is (that is the tokenizer's). A window of tokens is decoded, and what
//! it adds to the text of those already given out is the next piece.

use crate::text::{Kind, Words};

#[derive(Clone, Debug, Default)]
pub(super) struct Window {
    ids: Vec<u32>,
    /// How many of `ids` were given out; they stay as the neighbours of what follows.
    given: usize,
    /// The bytes at the end that are single tokens. A run of them is text when all of it is, else
    /// each byte is a U+FFFD, so it is held until its end.
    run: Vec<u8>,
    /// Whether it can no longer become text.
    broken: bool,
}

/// A window that holds so many tokens without a whole character is given out as it is: no
/// character has that many bytes.
const WINDOW_TOKENS_MAX: usize = 32;

/// A run of so many bytes that are text is given out before its end: a script without tokens of
/// its own is written so, and its reader shall not wait for ever.
const RUN_BYTES_MAX: usize = 128;

/// How many tokens are kept of those that a text follows; one that is text would do.
const BEFORE_TOKENS: usize = 8;

impl Window {
    /// What follows these tokens.
    pub(super) fn after(ids: &[u32]) -> Self {
        let ids = ids[ids.len().saturating_sub(BEFORE_TOKENS)..].to_vec();
        Self { given: ids.len(), ids, ..Self::default() }
    }

    /// Whether what it holds is any text.
    pub(super) fn is_text(&self, words: &Words) -> bool {
        !words.decode(&self.ids).is_empty()
    }

    pub(super) fn push(&mut self, words: &Words, id: u32) -> String {
        match words.kind(id) {
            Kind::Nothing => String::new(),
            Kind::Byte(byte) => self.push_byte(words, id, byte),
            Kind::Text => self.push_text(words, id),
        }
    }

    pub(super) fn finish(&mut self, words: &Words) -> String {
        let text = words.decode(&self.ids);
        self.give(words, &text)
    }

    fn push_byte(&mut self, words: &Words, id: u32, byte: u8) -> String {
        if self.broken {
            return char::REPLACEMENT_CHARACTER.to_string();
        }
        self.ids.push(id);
        self.run.push(byte);
        match str::from_utf8(&self.run) {
            Ok(_) if self.run.len() < RUN_BYTES_MAX => return String::new(),
            Ok(_) => self.run.clear(),
            Err(error) if error.error_len().is_none() => return String::new(),
            Err(_) => self.broken = true,
        }
        let text = words.decode(&self.ids);
        self.give(words, &text)
    }

    fn push_text(&mut self, words: &Words, id: u32) -> String {
        self.run.clear();
        self.broken = false;
        self.ids.push(id);
        let open = self.ids.len() - self.given;
        let text = words.decode(&self.ids);
        if !words.byte_tokens && text.ends_with(char::REPLACEMENT_CHARACTER) && open < WINDOW_TOKENS_MAX {
            return String::new();
        }
        self.give(words, &text)
    }

    fn give(&mut self, words: &Words, text: &str) -> String {
        let before = words.decode(&self.ids[..self.given]);
        let piece = match text.strip_prefix(before.as_str()) {
            Some(piece) => piece.to_owned(),
            // The new tokens changed how those before them decode, and these are given out.
            None => words.decode(&self.ids[self.given..]),
        };
        // Tokens without text (a dropped space) leave the neighbours as they are.
        if !piece.is_empty() || self.ids.len() - self.given >= WINDOW_TOKENS_MAX {
            self.ids.drain(..self.given);
            self.given = self.ids.len();
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    /// A tokenizer in the way of SentencePiece: a leading space is dropped, bytes are joined.
    fn sentence_pieces() -> Words {
        words_with(json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]}))
    }

    fn words_with(decoder: Value) -> Words {
        let tokens = ["▁This", "▁is", "▁", "a", "<0xE4>", "<0xBD>", "<0xA0>", "<s>", "<0x0A>", "<0xFF>", "<0x20>"];
        let vocabulary: serde_json::Map<_, _> =
            tokens.iter().enumerate().map(|(id, token)| (token.to_string(), id.into())).collect();
        let json = json!({
            "version": "1.0",
            "added_tokens": [{
                "id": 7, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }],
            "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": true},
        });
        Words::load(Path::new("t"), json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn tokens_that_depend_on_their_neighbours_stream_to_the_same_text() {
        let words = sentence_pieces();
        let whole: &[(&[u32], &str)] = &[
            (&[0, 1, 1, 3], "This is isa"),
            (&[7, 0, 7, 1], "This is"),
            (&[2, 1, 2, 3], " is a"),
            (&[0, 4, 5, 6, 1], "This你 is"),
            (&[0, 4, 5, 3], "This\u{FFFD}\u{FFFD}a"),
            (&[0, 4, 5], "This\u{FFFD}\u{FFFD}"),
            (&[0, 8, 1, 8], "This\n is\n"),
            (&[10, 3, 10], "a "),
            // A byte that is none of a character takes all bytes beside it along.
            (
                &[4, 5, 6, 8, 9, 8, 4, 5, 6, 3],
                "\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}a",
            ),
            (&[0, 4, 7, 5, 7, 6, 7, 1, 99, 8], "This你 is\n"),
            (&[9, 3, 4, 5, 6, 2], "\u{FFFD}a你 "),
        ];
        for (ids, expected) in whole {
            let mut stream = words.stream();
            let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
            text += &stream.finish();
            assert_eq!((text.as_str(), words.decode(ids).as_str()), (*expected, *expected));
        }
    }

    #[test]
    fn a_text_that_follows_another_keeps_its_first_space() {
        let words = sentence_pieces();
        for (before, ids, expected) in [
            (&[7, 0][..], &[1, 3][..], " isa"),
            (&[0, 3, 3, 3, 3, 3, 3, 3, 3, 3], &[2, 1], "  is"),
            (&[7], &[1, 3], " isa"),
            (&[0, 4, 5, 6], &[4, 5, 6, 1], "你 is"),
            (&[], &[1], " is"),
        ] {
            let mut stream = words.stream_after(before);
            let text: String = ids.iter().map(|id| stream.push(*id)).collect();
            assert_eq!(text + &stream.finish(), expected, "{before:?}");
        }
    }

    #[test]
    fn bytes_that_never_become_a_character_are_not_held_for_ever() {
        let words = sentence_pieces();
        let mut stream = words.stream();
        let text: String = (0..100).map(|_| stream.push(5)).collect();
        assert_eq!((text.as_str(), stream.finish().as_str()), ("\u{FFFD}".repeat(100).as_str(), ""));
    }

    #[test]
    fn bytes_that_are_characters_are_not_held_for_ever() {
        let words = sentence_pieces();
        let ids: Vec<u32> = [4, 5, 6].repeat(100);
        let mut stream = words.stream();
        let text: String = ids.iter().map(|id| stream.push(*id)).collect();
        assert!(text.chars().count() > 50, "{text}");
        assert_eq!(text + &stream.finish(), words.decode(&ids));
    }

    /// Any tokens in any order, up to the length from which bytes are no longer held.
    #[test]
    fn random_tokens_stream_to_the_text_of_all_at_once() {
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let words = [
            sentence_pieces(),
            // Gemma's, which keeps the first space.
            words_with(json!({"type": "Sequence", "decoders": [replace, bytes, fuse]})),
            // That of Llama's first conversions.
            words_with(json!({"type": "Sequence", "decoders": [bytes, metaspace]})),
            words_with(metaspace),
            words_with(json!(null)),
        ];
        let mut state = 1_u32;
        for words in words.iter().cycle().take(5000) {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 16
            };
            let ids: Vec<u32> = (0..next() % 40).map(|_| next() % 11).collect();
            let mut stream = words.stream();
            let text: String = ids.iter().map(|id| stream.push(*id)).collect();
            assert_eq!(text + &stream.finish(), words.decode(&ids), "{ids:?}");
        }
    }
}
