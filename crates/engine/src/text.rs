//! Between text and tokens: encoding, decoding as a stream, stop strings.
//!
//! Never here: chat templates, logits. The pieces that a stream gives out, joined, are the text:
//! what the tokenizer would decode from all tokens at once, cut before a stop string.

pub(crate) mod pairs;
mod window;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use genmill_grammar::{Tokenize, Vocabulary};
use tokenizers::normalizers::{self, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{DecoderWrapper, Tokenizer};

use crate::error::LoadError;
use window::Window;

/// A tokenizer as tokenizer.json describes it.
#[derive(Clone, Debug)]
pub struct Words {
    tokenizer: Arc<Tokenizer>,
    /// What tokens stand for, when they are byte strings in the alphabet of GPT-2, which decode one
    /// by one.
    bytes: Option<Arc<TokenBytes>>,
    /// Whether tokens such as `<0x0A>` are single bytes.
    byte_tokens: bool,
}

/// What a token does to a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing: a special token, or one that the tokenizer does not know.
    Nothing,
    /// It is one byte.
    Byte(u8),
    /// It is some text, perhaps of no length.
    Text,
}

/// Ids from here on are a mistake in a tokenizer's file: no model has so many logits.
const IDS_MAX: u32 = 1 << 24;

/// The bytes of every token.
#[derive(Debug)]
struct TokenBytes {
    /// Those of all tokens, by id.
    all: Vec<u8>,
    /// Where those of each token end.
    ends: Vec<usize>,
}

impl TokenBytes {
    fn new(tokenizer: &Tokenizer) -> Self {
        let last = tokenizer.get_vocab(true).into_values().filter(|id| *id < IDS_MAX).max();
        let mut table = Self { all: Vec::new(), ends: Vec::new() };
        for id in 0..last.map_or(0, |last| last + 1) {
            table.all.extend(bytes(tokenizer, id));
            table.ends.push(table.all.len());
        }
        table
    }

    /// The bytes of one token; nothing for special or unknown tokens.
    fn of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.all[start..*end]
    }
}

/// The bytes of one token of a byte-level tokenizer. As the tokenizers library has it, a token with
/// a character outside of the alphabet stands for itself.
fn bytes(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let Some(token) = tokenizer.id_to_token(id) else { return Vec::new() };
    if tokenizer.get_added_vocabulary().is_special_token(&token) {
        return Vec::new();
    }
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| token.into_bytes())
}

/// The tokenizer could not encode a text.
#[derive(Debug, thiserror::Error)]
#[error("cannot tokenise the prompt")]
pub struct EncodeError {
    /// What the tokenizers library said.
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Whether the tokenizer's post-processor adds its special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// For raw prompts.
    Add,
    /// For rendered chats, whose template writes them.
    Leave,
}

impl Words {
    /// Loads a tokenizer from the bytes of its file; `path` is for messages.
    ///
    /// # Errors
    /// When the bytes are no tokenizer.
    pub fn load(path: &Path, bytes: &[u8]) -> Result<Self, LoadError> {
        let wrong = |source| LoadError::Tokenizer { path: path.to_owned(), source };
        let mut tokenizer = caught(|| Tokenizer::from_bytes(bytes)).map_err(wrong)?;
        // A prompt is never cut or filled up behind its sender's back; transformers does neither
        // unless asked.
        tokenizer.with_truncation(None).map_err(wrong)?;
        tokenizer.with_padding(None);
        // A post-processor that adds a token which is not there panics whatever the text is.
        caught(|| tokenizer.encode_fast("", true)).map_err(wrong)?;
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let bytes = byte_level.then(|| Arc::new(TokenBytes::new(&tokenizer)));
        let byte_tokens = tokenizer.get_decoder().is_some_and(has_byte_tokens);
        Ok(Self { tokenizer: Arc::new(tokenizer), bytes, byte_tokens })
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// When the tokenizer has no token for some part of it.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, EncodeError> {
        caught(|| self.tokenizer.encode_fast(text, special == Special::Add))
            .map(|encoding| encoding.get_ids().to_owned())
            .map_err(|source| EncodeError { source })
    }

    /// The token of exactly that name.
    #[must_use]
    pub fn token(&self, name: &str) -> Option<u32> {
        self.tokenizer.token_to_id(name)
    }

    /// What a token stands for by itself: its text, or the name of a special one. Bytes that are no character by
    /// themselves are U+FFFD.
    #[must_use]
    pub fn text_of(&self, id: u32) -> String {
        if let Some(table) = &self.bytes
            && !table.of(id).is_empty()
        {
            return String::from_utf8_lossy(table.of(id)).into_owned();
        }
        self.tokenizer.decode(&[id], false).unwrap_or_default()
    }

    /// The tokens as grammars see them: the bytes of each of the model's `count`, which ends with `end`.
    pub(crate) fn vocabulary(&self, count: usize, end: u32) -> Vocabulary {
        let bytes = |id| match &self.bytes {
            Some(table) => table.of(id).to_vec(),
            None => self.piece(id),
        };
        let tokens = (0..).map(bytes).take(count).collect();
        let tokenizer = if self.bytes.is_some() { Some(Arc::clone(&self.tokenizer)) } else { self.of_middles() };
        let tokenize = |tokenizer: Arc<Tokenizer>| -> Tokenize {
            Box::new(move |text| {
                let encoding = caught(|| tokenizer.encode_fast(text, false));
                encoding.map(|encoding| encoding.get_ids().to_owned()).unwrap_or_default()
            })
        };
        Vocabulary { tokens, end, tokenize: tokenizer.map(tokenize) }
    }

    /// The tokenizer without the space that it puts before a text, for what stands in the middle of one; `None` when it
    /// does more to a text than spaces to `\u{2581}`.
    fn of_middles(&self) -> Option<Arc<Tokenizer>> {
        let mut tokenizer = (*self.tokenizer).clone();
        let normalizers = match tokenizer.get_normalizer() {
            None => Vec::new(),
            Some(NormalizerWrapper::Sequence(sequence)) => sequence.as_ref().to_vec(),
            Some(one) => vec![one.clone()],
        };
        let kept: Vec<_> =
            normalizers.into_iter().filter(|one| !matches!(one, NormalizerWrapper::Prepend(_))).collect();
        let only_spaces = kept.iter().all(|one| matches!(one, NormalizerWrapper::Replace(_)));
        tokenizer.with_normalizer(Some(normalizers::Sequence::new(kept))).ok()?;
        let splits = match tokenizer.get_pre_tokenizer().cloned() {
            None => true,
            Some(PreTokenizerWrapper::Metaspace(mut spaces)) => {
                spaces.prepend_scheme = PrependScheme::Never;
                tokenizer.with_pre_tokenizer(Some(spaces));
                true
            }
            Some(PreTokenizerWrapper::Split(_)) => true,
            Some(_) => false,
        };
        (self.byte_tokens && only_spaces && splits).then(|| Arc::new(tokenizer))
    }

    /// The bytes of one token of a tokenizer in the way of SentencePiece; none for special or unknown tokens.
    fn piece(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.tokenizer.id_to_token(id) else { return Vec::new() };
        if self.tokenizer.get_added_vocabulary().is_special_token(&token) {
            return Vec::new();
        }
        let byte = token.strip_prefix("<0x").and_then(|rest| u8::from_str_radix(rest.strip_suffix('>')?, 16).ok());
        byte.map_or_else(|| token.replace('\u{2581}', " ").into_bytes(), |byte| vec![byte])
    }

    /// A stream that decodes tokens which follow others: the first keeps the space that it begins with.
    #[must_use]
    pub fn stream_after(&self, ids: &[u32]) -> TokenStream {
        match self.stream() {
            TokenStream(Mode::Window(words, _)) => {
                // Special tokens alone are no text; then any other goes before.
                let window = Window::after(ids);
                let window = match window.is_text(&words) {
                    true => window,
                    false => Window::after(&self.encode("a", Special::Leave).unwrap_or_default()),
                };
                TokenStream(Mode::Window(words, window))
            }
            whole => whole,
        }
    }

    /// A stream that decodes tokens as they come.
    #[must_use]
    pub fn stream(&self) -> TokenStream {
        match &self.bytes {
            Some(table) => TokenStream(Mode::Bytes(Arc::clone(table), Utf8Stream::default())),
            None => TokenStream(Mode::Window(self.clone(), Window::default())),
        }
    }

    fn kind(&self, id: u32) -> Kind {
        let Some(token) = self.tokenizer.id_to_token(id) else { return Kind::Nothing };
        if self.tokenizer.get_added_vocabulary().is_special_token(&token) {
            return Kind::Nothing;
        }
        match token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
            Some(digits) if self.byte_tokens && digits.len() == 2 => {
                u8::from_str_radix(digits, 16).map_or(Kind::Text, Kind::Byte)
            }
            _ => Kind::Text,
        }
    }

    fn decode(&self, ids: &[u32]) -> String {
        // The decoders that tokenizer.json can name do not fail.
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }
}

/// What the tokenizers library answers; a panic over a broken tokenizer is an error too.
fn caught<T>(ask: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(ask)).unwrap_or_else(|_| Err("the tokenizers library panicked".into()))
}

fn has_byte_tokens(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(has_byte_tokens),
        _ => false,
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable bytes are themselves, the
/// others follow from U+0100 on, in order (`bytes_to_unicode` of GPT-2's encoder.py).
fn byte_of(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Decodes tokens as they come. The pieces never split a character; bytes that never become one
/// come out as U+FFFD.
#[derive(Clone, Debug)]
pub struct TokenStream(Mode);

#[derive(Clone, Debug)]
enum Mode {
    Bytes(Arc<TokenBytes>, Utf8Stream),
    Window(Words, Window),
}

impl TokenStream {
    /// The text that this token completes, perhaps none.
    pub fn push(&mut self, id: u32) -> String {
        match &mut self.0 {
            Mode::Bytes(table, stream) => stream.push(table.of(id)),
            Mode::Window(words, window) => window.push(words, id),
        }
    }

    /// The text still held back at the end.
    pub fn finish(&mut self) -> String {
        match &mut self.0 {
            Mode::Bytes(_, stream) => stream.finish(),
            Mode::Window(words, window) => window.finish(words),
        }
    }
}

/// Bytes to characters, as `String::from_utf8_lossy` would convert all of them at once.
#[derive(Clone, Debug, Default)]
struct Utf8Stream {
    /// The beginning of a character, at most 3 bytes.
    open: Vec<u8>,
}

impl Utf8Stream {
    fn push(&mut self, bytes: &[u8]) -> String {
        if self.open.is_empty()
            && let Ok(text) = str::from_utf8(bytes)
        {
            return text.to_owned();
        }
        self.open.extend_from_slice(bytes);
        let mut text = String::new();
        let mut taken = 0;
        for chunk in self.open.utf8_chunks() {
            text.push_str(chunk.valid());
            taken += chunk.valid().len();
            let invalid = chunk.invalid();
            if taken + invalid.len() == self.open.len() && may_go_on(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                taken += invalid.len();
            }
        }
        self.open.drain(..taken);
        text
    }

    fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.open).into_owned();
        self.open.clear();
        rest
    }
}

/// Whether these bytes are the beginning of a character.
fn may_go_on(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Cuts a text before the first stop string, whichever is complete first. Text that may be the
/// beginning of one is held back until it is known.
#[derive(Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text became.
#[derive(Debug, PartialEq, Eq)]
pub enum Cut {
    /// The text that is certain.
    Open(String),
    /// The last text: a stop string followed it.
    Stopped(String),
}

impl StopStrings {
    /// Stops at any of these; empty ones are ignored.
    #[must_use]
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, held: String::new() }
    }

    /// Whether there are none, so that all text is certain at once.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Cut {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop)?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = found.min() {
            self.held.truncate(start);
            return Cut::Stopped(std::mem::take(&mut self.held));
        }
        let open = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - open);
        Cut::Open(std::mem::replace(&mut self.held, rest))
    }

    /// The text held back at the end: no stop string came of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length in bytes of the longest end of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(length, _)| length).rfind(|length| text.ends_with(&stop[..*length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_any_pieces_give_the_lossy_text() {
        let samples: &[&[u8]] = &[
            "grüße 你好 🚀".as_bytes(),
            b"\xE4\xBD\xE4\xBD\xA0\xFF\xF0\x9F\x9A",
            b"\xF0\x80\x80a\xC3",
            b"\xED\xA0\x80\x80",
        ];
        for bytes in samples {
            for size in 1..=bytes.len() {
                let mut stream = Utf8Stream::default();
                let mut text: String = bytes.chunks(size).map(|part| stream.push(part)).collect();
                text += &stream.finish();
                assert_eq!(text, String::from_utf8_lossy(bytes), "pieces of {size}");
            }
        }
    }

    #[test]
    fn the_alphabet_of_gpt2_covers_every_byte_once() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ')), (Some(b' '), Some(b'\n')));
    }

    /// Pieces of any size give the same text.
    fn check_stops(stops: &[&str], text: &str, expected: &str) {
        let letters: Vec<char> = text.chars().collect();
        for size in 1..=letters.len() {
            let mut stream = StopStrings::new(stops.iter().map(ToString::to_string).collect());
            let mut out = String::new();
            let stopped = letters.chunks(size).any(|part| match stream.push(&part.iter().collect::<String>()) {
                Cut::Open(piece) => {
                    out += &piece;
                    false
                }
                Cut::Stopped(piece) => {
                    out += &piece;
                    true
                }
            });
            out += &stream.finish();
            assert_eq!((out.as_str(), stopped), (expected, expected != text), "size {size}");
        }
    }

    #[test]
    fn a_stop_string_across_borders_is_cut() {
        check_stops(&["END"], "one EN two END three", "one EN two ");
        check_stops(&["aab"], "aaab", "a");
        check_stops(&["\n\n"], "a\nb\n\nc", "a\nb");
        check_stops(&["你好"], "so 你你好", "so 你");
    }

    #[test]
    fn the_stop_string_that_ends_first_counts() {
        check_stops(&["abcd", "c"], "xabcd", "xab");
        check_stops(&["bc", "abc"], "xabc", "x");
    }

    #[test]
    fn a_beginning_of_a_stop_string_is_given_out_at_the_end() {
        check_stops(&["END"], "the EN", "the EN");
        check_stops(&[""], "text", "text");
    }
}
