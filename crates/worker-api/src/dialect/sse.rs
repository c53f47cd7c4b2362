//! Server-sent events: bytes in, the data of whole events out. Never here: what the data means.

use super::{ProviderError, StreamDecoder, StreamEvent};

/// The longest event that is taken, in bytes: no provider sends a text chunk of this size.
const EVENT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// An event was longer than any may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TooLong;

/// Collects bytes until events are whole. Takes every line ending, comment lines, and data over several lines; names
/// and ids of events are passed over.
#[derive(Debug, Default)]
struct Events {
    line: Vec<u8>,
    data: Option<Vec<u8>>,
    after_return: bool,
}

impl Events {
    /// Takes the next bytes and returns the data of the events that they complete.
    fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, TooLong> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while let Some(&first) = rest.first() {
            if std::mem::take(&mut self.after_return) && first == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
                self.line.extend_from_slice(rest);
                break;
            };
            self.line.extend_from_slice(&rest[..end]);
            self.after_return = rest[end] == b'\r';
            rest = &rest[end + 1..];
            events.extend(self.end_line());
        }
        let held = self.line.len() + self.data.as_ref().map_or(0, Vec::len);
        if held > EVENT_BYTES_MAX { Err(TooLong) } else { Ok(events) }
    }

    /// The event that was not ended by an empty line before the stream ended.
    fn end(&mut self) -> Option<String> {
        if !self.line.is_empty() {
            // A line is never empty here, so it ends no event.
            drop(self.end_line());
        }
        self.data.take().map(text)
    }

    /// Takes the line that is whole now. An empty one ends the event.
    fn end_line(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return self.data.take().map(text);
        }
        let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line);
        if let Some(value) = line.strip_prefix(b"data:") {
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
                None => self.data = Some(value.to_vec()),
            }
        }
        None
    }
}

/// Reads a stream of events with `read`, which is given the data of one after the other.
pub(super) fn reading(
    read: impl FnMut(&str) -> Vec<StreamEvent> + Send + 'static,
) -> Box<dyn StreamDecoder + Send + 'static> {
    Box::new(Reading { events: Events::default(), read })
}

struct Reading<R> {
    events: Events,
    read: R,
}

impl<R: FnMut(&str) -> Vec<StreamEvent>> StreamDecoder for Reading<R> {
    fn push(&mut self, bytes: &[u8]) -> Vec<StreamEvent> {
        match self.events.push(bytes) {
            Ok(data) => data.iter().flat_map(|data| (self.read)(data)).collect(),
            Err(TooLong) => vec![StreamEvent::Error(ProviderError::saying("an event of the stream is too long"))],
        }
    }

    fn end(&mut self) -> Vec<StreamEvent> {
        self.events.end().map(|data| (self.read)(&data)).unwrap_or_default()
    }
}

fn text(data: Vec<u8>) -> String {
    String::from_utf8(data).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stream: &str, expect: &[&str]) {
        let mut whole = Events::default();
        let mut events = whole.push(stream.as_bytes()).unwrap();
        events.extend(whole.end());
        assert_eq!(events, expect);
        let mut bytewise = Events::default();
        let mut events: Vec<String> =
            stream.as_bytes().iter().flat_map(|byte| bytewise.push(std::slice::from_ref(byte)).unwrap()).collect();
        events.extend(bytewise.end());
        assert_eq!(events, expect);
    }

    #[test]
    fn an_empty_line_ends_an_event_whatever_ends_lines() {
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data: a\r\n\r\ndata: b\r\n\r\n", &["a", "b"]);
        check("data: a\r\rdata: b\r\r", &["a", "b"]);
        check("data:a\n\n\n\ndata:é", &["a", "é"]);
    }

    #[test]
    fn only_data_counts() {
        check(": PROCESSING\n\nevent: x\nid: 1\ndata: a\n\n:\n\nretry: 5\n\n", &["a"]);
        check("\u{feff}data: a\n\n", &["a"]);
    }

    #[test]
    fn data_lines_are_joined() {
        check("data: a\ndata: b\n\n", &["a\nb"]);
        check("data:\ndata:  b\n\n", &["\n b"]);
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut events = Events::default();
        assert_eq!(events.push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(TooLong));
    }
}
