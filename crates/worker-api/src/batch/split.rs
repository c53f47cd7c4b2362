//! Parts results from each other as their bytes come, in bounded memory. Where the bytes are split never matters. Never
//! here: what a result says.

use super::Form;

/// The longest result that is kept, in bytes.
pub(super) const RECORD_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The lists whose elements are results.
const RESULTS: &[u8] = b"inlinedResponses";

/// How deep a document may be.
const DEPTH_MAX: usize = 1_024;

/// Parts results from each other.
#[derive(Debug)]
pub(super) enum Splitter {
    Lines(Lines),
    Elements(Elements),
}

/// The document broke off, or is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut;

impl Splitter {
    /// Of results in this form, of which none is kept that has more than `bytes_max`.
    pub(super) fn new(form: Form, bytes_max: usize) -> Self {
        match form {
            Form::Lines => Self::Lines(Lines { bytes_max, line: Record::default() }),
            Form::Elements => Self::Elements(Elements::new(bytes_max)),
        }
    }

    /// Takes the next bytes; returns the results that they complete, `None` for one that was too long.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        match self {
            Self::Lines(lines) => lines.push(bytes),
            Self::Elements(elements) => elements.push(bytes),
        }
    }

    /// What is left when no more bytes come.
    pub(super) fn end(self) -> Result<Option<Option<Vec<u8>>>, Cut> {
        match self {
            Self::Lines(mut lines) => Ok(lines.take()),
            Self::Elements(elements) => elements.into_rest().map(|_| None),
        }
    }
}

/// A result as far as it has come.
#[derive(Debug, Default)]
struct Record {
    bytes: Vec<u8>,
    too_long: bool,
}

impl Record {
    fn add(&mut self, bytes: &[u8], bytes_max: usize) {
        if self.too_long || self.bytes.len() + bytes.len() > bytes_max {
            self.too_long = true;
            self.bytes = Vec::new();
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let record = std::mem::take(self);
        (!record.too_long).then_some(record.bytes)
    }
}

/// Lines, parted by LF or CR LF.
#[derive(Debug)]
pub(super) struct Lines {
    bytes_max: usize,
    line: Record,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let mut pieces = bytes.split(|byte| *byte == b'\n');
        // There is at least one; each that another one follows ends a line.
        let mut piece = pieces.next().unwrap_or_default();
        let mut lines = Vec::new();
        for next in pieces {
            self.line.add(piece, self.bytes_max);
            lines.extend(self.take());
            piece = next;
        }
        self.line.add(piece, self.bytes_max);
        lines
    }

    /// The line, unless it is blank.
    fn take(&mut self) -> Option<Option<Vec<u8>>> {
        let line = self.line.take();
        let is_blank = line.as_ref().is_some_and(|line| line.trim_ascii().is_empty());
        (!is_blank).then_some(line)
    }
}

/// The elements of the lists of results in a JSON document. What is beside them is kept.
#[derive(Debug)]
pub(super) struct Elements {
    bytes_max: usize,
    /// Of each list and object that is open, whether it is a list of results.
    open: Vec<bool>,
    /// How many were open when the element began that is read now.
    within: Option<usize>,
    element: Record,
    /// The document without the elements.
    rest: Record,
    in_string: bool,
    escaped: bool,
    /// The string that came last, as far as it can be [`RESULTS`].
    string: Vec<u8>,
    broken: bool,
}

impl Elements {
    /// Of a document of which neither an element nor the rest is kept that has more than `bytes_max`.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            open: Vec::new(),
            within: None,
            element: Record::default(),
            rest: Record::default(),
            in_string: false,
            escaped: false,
            string: Vec::new(),
            broken: false,
        }
    }

    /// Takes the next bytes; returns the elements that they complete, `None` for one that was too long.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let (mut rest, mut elements) = (bytes, Vec::new());
        while let Some(byte) = rest.first() {
            // Most of a document is within strings.
            let plain = if self.in_string && !self.escaped { plain(rest) } else { 0 };
            if plain > 0 {
                let (text, behind) = rest.split_at(plain);
                let room = (RESULTS.len() + 1).saturating_sub(self.string.len());
                self.string.extend_from_slice(&text[..plain.min(room)]);
                let (sink, bytes_max) = self.sink();
                sink.add(text, bytes_max);
                rest = behind;
            } else {
                elements.extend(self.take(*byte));
                rest = &rest[1..];
            }
        }
        elements
    }

    /// Where the bytes go that are read now.
    fn sink(&mut self) -> (&mut Record, usize) {
        (if self.within.is_some() { &mut self.element } else { &mut self.rest }, self.bytes_max)
    }

    /// The document without the elements; `None` when that was too long.
    pub(super) fn into_rest(mut self) -> Result<Option<Vec<u8>>, Cut> {
        let whole = !self.broken && !self.in_string && self.open.is_empty();
        if whole { Ok(self.rest.take()) } else { Err(Cut) }
    }

    fn take(&mut self, byte: u8) -> Option<Option<Vec<u8>>> {
        let in_results = !self.in_string && self.within.is_none() && self.open.last() == Some(&true);
        if in_results && byte == b'{' {
            self.within = Some(self.open.len());
        }
        // Between elements there is nothing to keep.
        if self.within.is_some() || !in_results || byte == b']' {
            let (sink, bytes_max) = self.sink();
            sink.add(&[byte], bytes_max);
        }
        if self.in_string {
            self.take_in_string(byte);
            return None;
        }
        match byte {
            b'"' => {
                self.in_string = true;
                self.string.clear();
            }
            b'[' => self.begin(self.within.is_none() && self.string == RESULTS),
            b'{' => self.begin(false),
            b']' | b'}' => {
                self.broken |= self.open.pop().is_none();
                self.string.clear();
                if self.within == Some(self.open.len()) {
                    self.within = None;
                    return Some(self.element.take());
                }
            }
            b',' => self.string.clear(),
            _ => {}
        }
        None
    }

    fn begin(&mut self, of_results: bool) {
        self.broken |= self.open.len() >= DEPTH_MAX;
        if !self.broken {
            self.open.push(of_results);
        }
        self.string.clear();
    }

    fn take_in_string(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.in_string = false,
            _ if self.string.len() <= RESULTS.len() => self.string.push(byte),
            _ => {}
        }
    }
}

/// How many bytes of a string come before its end, or before one that stands for another.
fn plain(bytes: &[u8]) -> usize {
    bytes.iter().position(|byte| matches!(byte, b'"' | b'\\')).unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What comes of bytes in these pieces, of results of at most 64 bytes.
    fn split(form: Form, pieces: &[&[u8]]) -> (Vec<Option<String>>, bool) {
        let mut splitter = Splitter::new(form, 64);
        let mut records: Vec<Option<Vec<u8>>> = pieces.iter().flat_map(|piece| splitter.push(piece)).collect();
        let end = splitter.end();
        let whole = end.is_ok();
        records.extend(end.ok().flatten());
        let text = |record: Option<Vec<u8>>| record.map(|record| String::from_utf8(record).unwrap());
        (records.into_iter().map(text).collect(), whole)
    }

    fn check(form: Form, document: &str, expect: &[Option<&str>], whole: bool) {
        let expect: Vec<Option<String>> = expect.iter().map(|record| record.map(str::to_owned)).collect();
        assert_eq!(split(form, &[document.as_bytes()]), (expect.clone(), whole), "{document}");
        let bytes: Vec<&[u8]> = document.as_bytes().chunks(1).collect();
        assert_eq!(split(form, &bytes), (expect, whole), "{document}, byte by byte");
    }

    #[test]
    fn lines_are_parted_and_the_last_one_may_lack_its_end() {
        check(Form::Lines, "", &[], true);
        check(Form::Lines, "a\nb\n", &[Some("a"), Some("b")], true);
        check(Form::Lines, "a\n\n \r\nb", &[Some("a"), Some("b")], true);
        let long = "x".repeat(65);
        check(Form::Lines, &format!("{long}\nb\n{long}"), &[None, Some("b"), None], true);
    }

    #[test]
    fn elements_are_those_of_lists_of_results() {
        let document = r#"{"a": [{"b": 1}], "inlinedResponses": {"inlinedResponses": [{"c": "]}\"["}, {"inlinedResponses": [{}]} ]}}"#;
        check(Form::Elements, document, &[Some(r#"{"c": "]}\"["}"#), Some(r#"{"inlinedResponses": [{}]}"#)], true);
        check(Form::Elements, r#"{"inlinedResponses":[{"a":1},{"b":"#, &[Some(r#"{"a":1}"#)], false);
        check(Form::Elements, r#"["inlinedResponses",[{"a":1}]]"#, &[], true);
        check(Form::Elements, "]", &[], false);
        let long = format!(r#"{{"inlinedResponses":[{{"a":"{}"}},{{}}]}}"#, "x".repeat(65));
        check(Form::Elements, &long, &[None, Some("{}")], true);
    }

    #[test]
    fn what_is_beside_the_elements_is_kept() {
        let mut elements = Elements::new(1_000);
        elements.push(br#"{"name":"x","r":{"inlinedResponses":[{"a":[1,{}]} , {"b":2}]},"done":true}"#);
        let rest = elements.into_rest().unwrap().unwrap();
        assert_eq!(String::from_utf8(rest).unwrap(), r#"{"name":"x","r":{"inlinedResponses":[]},"done":true}"#);
    }

    #[test]
    fn no_document_is_deeper_than_it_may_be() {
        let mut elements = Elements::new(10_000);
        elements.push(&[b'['; 5_000]);
        assert!(elements.open.len() <= DEPTH_MAX);
        assert_eq!(elements.into_rest(), Err(Cut));
    }

    proptest! {
        #[test]
        fn where_bytes_are_split_never_matters(bytes in "[\\[\\]{}\",:\n\r\\\\a]{0,200}", at: prop::sample::Index, lines: bool) {
            let form = if lines { Form::Lines } else { Form::Elements };
            let document = format!("{{\"inlinedResponses\":[{bytes}");
            let (a, b) = document.as_bytes().split_at(at.index(document.len()));
            prop_assert_eq!(split(form, &[a, b]), split(form, &[document.as_bytes()]));
        }
    }
}
