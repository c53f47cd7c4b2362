//! How answers in HTTP/1.1 are parted into heads and bodies (RFC 9112, sections 4 to 7). Pure: bytes in, bytes out.

use http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{HeaderMap, StatusCode};

/// The most headers that an answer may have.
const HEADERS_MAX: usize = 128;

/// The most that sizes with their extensions, and trailers, may take in all between two pieces of a body, in bytes.
const OVERHEAD_BYTES_MAX: u32 = 16 * 1024;

/// What comes is no HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Malformed(pub(super) &'static str);

/// What an answer begins with.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) framing: Framing,
    /// Whether the connection may serve again after the body.
    pub(super) keeps_open: bool,
}

/// Where a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// It has ended.
    Done,
    /// After so many more bytes.
    Length(u64),
    /// Where the connection ends.
    UntilClose,
    /// After the last of pieces that tell their size each. With it, what has been read since the last piece beside its
    /// size.
    Chunked(Chunk, u32),
}

/// Where the reading of pieces is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// In a size; `None` before its first digit.
    Size(Option<u64>),
    /// Behind a size.
    Extension(u64),
    /// At the end of a size's line.
    SizeEnd(u64),
    /// In a piece that has so many more bytes.
    Data(u64),
    /// Behind a piece.
    DataCr,
    DataLf,
    /// Behind the last piece, at the beginning of a line.
    Line,
    /// In a trailer.
    Trailer,
    /// At the end of all.
    LastLf,
}

/// The head that `bytes` begin with and how many of them it takes; `None` in its place for one that only says that
/// another follows. `None` when it is not whole yet.
pub(super) fn head(bytes: &[u8]) -> Result<Option<(Option<Head>, usize)>, Malformed> {
    let mut room = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut room);
    let used = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(used)) => used,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed("it sends more than 128 headers")),
        Err(_) => return Err(Malformed("its answer does not begin as one of HTTP/1.1 does")),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Malformed("it has no status"))?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Malformed("it changes to another protocol, which nobody asked for"));
    }
    if status.is_informational() {
        return Ok(Some((None, used)));
    }
    let mut headers = HeaderMap::with_capacity(parsed.headers.len());
    for header in parsed.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let value = HeaderValue::from_bytes(header.value);
        let (Ok(name), Ok(value)) = (name, value) else { return Err(Malformed("it sends a header that none can be")) };
        headers.append(name, value);
    }
    let framing = framing(status, &headers)?;
    let said = |word| says(&headers, &CONNECTION, word);
    // A body that is told in two ways may be read in two ways.
    let told_twice = headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH);
    let open = if parsed.version == Some(1) { !said("close") } else { said("keep-alive") };
    let old = parsed.version != Some(1) && headers.contains_key(TRANSFER_ENCODING);
    let keeps_open = open && !told_twice && !old && framing != Framing::UntilClose;
    Ok(Some((Some(Head { status, headers, framing, keeps_open }), used)))
}

/// Whether one of the words of a header is `word`.
fn says(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    words(headers, name).any(|said| said.eq_ignore_ascii_case(word))
}

fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(',')).map(str::trim)
}

/// Where the body ends (section 6.3).
fn framing(status: StatusCode, headers: &HeaderMap) -> Result<Framing, Malformed> {
    if matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return Ok(Framing::Done);
    }
    let mut packed: Vec<&str> = words(headers, &TRANSFER_ENCODING).collect();
    // Some say that they do nothing.
    packed.retain(|word| !word.is_empty() && !word.eq_ignore_ascii_case("identity"));
    match packed[..] {
        [] => {}
        [only] if only.eq_ignore_ascii_case("chunked") => return Ok(Framing::Chunked(Chunk::Size(None), 0)),
        [.., last] if last.eq_ignore_ascii_case("chunked") => {
            return Err(Malformed("it packs its answer in a way that nobody asked for"));
        }
        _ => return Ok(Framing::UntilClose),
    }
    if !headers.contains_key(CONTENT_LENGTH) {
        return Ok(Framing::UntilClose);
    }
    let bad = Malformed("it sends a Content-Length that is none");
    let mut lengths = words(headers, &CONTENT_LENGTH).map(|length| {
        // `parse` would take a sign.
        let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
        length.parse::<u64>().ok().filter(|_| digits).ok_or(bad)
    });
    let length = lengths.next().ok_or(bad)??;
    for other in lengths {
        if other? != length {
            return Err(Malformed("it sends two different lengths"));
        }
    }
    Ok(if length == 0 { Framing::Done } else { Framing::Length(length) })
}

impl Framing {
    /// Whether the body has ended.
    pub(super) fn is_done(self) -> bool {
        self == Self::Done
    }

    /// Takes the end of the connection.
    ///
    /// # Errors
    /// When it cuts the body.
    pub(super) fn end(&mut self) -> Result<(), Malformed> {
        match self {
            Self::Done | Self::UntilClose => {
                *self = Self::Done;
                Ok(())
            }
            Self::Length(_) | Self::Chunked(..) => Err(Malformed(CUT)),
        }
    }

    /// Adds to `out` what `bytes` have of the body; how many of them were used, which is all but for what comes after
    /// the body's end.
    pub(super) fn decode(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<usize, Malformed> {
        let mut rest = bytes;
        while !rest.is_empty() && !self.is_done() {
            *self = match *self {
                Self::Done => Self::Done,
                Self::UntilClose => {
                    out.extend_from_slice(rest);
                    rest = &[];
                    Self::UntilClose
                }
                Self::Length(left) => match copy(left, &mut rest, out) {
                    0 => Self::Done,
                    left => Self::Length(left),
                },
                Self::Chunked(Chunk::Data(left), overhead) => match copy(left, &mut rest, out) {
                    0 => Self::Chunked(Chunk::DataCr, 0),
                    left => Self::Chunked(Chunk::Data(left), overhead),
                },
                Self::Chunked(chunk, overhead) => {
                    let (byte, behind) = (rest[0], &rest[1..]);
                    rest = behind;
                    if overhead == OVERHEAD_BYTES_MAX {
                        return Err(Malformed("it sends more than 16 KiB that are none of its answer"));
                    }
                    chunk.after(byte)?.map_or(Self::Done, |chunk| Self::Chunked(chunk, overhead + 1))
                }
            };
        }
        Ok(bytes.len() - rest.len())
    }
}

/// What is said of a connection that ends before its answer does.
const CUT: &str = "it closed the connection before the answer was whole";

/// Moves up to `left` bytes; how many are left then.
fn copy(left: u64, from: &mut &[u8], out: &mut Vec<u8>) -> u64 {
    let count = usize::try_from(left).map_or(from.len(), |left| left.min(from.len()));
    out.extend_from_slice(&from[..count]);
    *from = &from[count..];
    left - count as u64
}

impl Chunk {
    /// Where the reading is after `byte`; `None` when that was the last one. Data is not read so.
    fn after(self, byte: u8) -> Result<Option<Self>, Malformed> {
        let next = match (self, byte) {
            (Self::Size(size), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).map(u64::from).unwrap_or_default();
                let size = size.unwrap_or_default().checked_mul(16).and_then(|size| size.checked_add(digit));
                Self::Size(Some(size.ok_or(Malformed("it sends a piece of more bytes than there are"))?))
            }
            (Self::Size(Some(size)), b';' | b' ' | b'\t') => Self::Extension(size),
            (Self::Size(Some(size)) | Self::Extension(size), b'\r') => Self::SizeEnd(size),
            (Self::Extension(_), b'\n') => return Err(Malformed(BAD_SIZE)),
            (Self::Extension(size), _) => Self::Extension(size),
            (Self::SizeEnd(0), b'\n') => Self::Line,
            (Self::SizeEnd(size), b'\n') => Self::Data(size),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size(None),
            (Self::Line, b'\r') => Self::LastLf,
            (Self::Trailer, b'\n') => Self::Line,
            (Self::Line | Self::Trailer, _) => Self::Trailer,
            (Self::LastLf, b'\n') => return Ok(None),
            (Self::Data(_) | Self::DataCr | Self::DataLf, _) => {
                return Err(Malformed("a piece of its answer is longer than it said"));
            }
            (Self::Size(_) | Self::SizeEnd(_) | Self::LastLf, _) => return Err(Malformed(BAD_SIZE)),
        };
        Ok(Some(next))
    }
}

/// What is said of a piece whose size cannot be read.
const BAD_SIZE: &str = "it sends a piece of its answer without a size";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(bytes: &[u8]) -> Head {
        let (head, used) = head(bytes).unwrap().unwrap();
        assert_eq!(used, bytes.len());
        head.unwrap()
    }

    fn of(lines: &str) -> Result<Head, Malformed> {
        let bytes = format!("HTTP/1.1 200 OK\r\n{lines}\r\n");
        head(bytes.as_bytes()).map(|found| found.unwrap().0.unwrap())
    }

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let bytes = b"HTTP/1.1 429 Slow down\r\nRetry-After: 3\r\nx-a: 1\r\nX-A: 2\r\ncontent-length: 5\r\n\r\n";
        for cut in 0..bytes.len() {
            assert!(head(&bytes[..cut]).unwrap().is_none(), "{cut}");
        }
        let found = whole(bytes);
        assert_eq!(found.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(found.headers["retry-after"], "3");
        assert_eq!(found.headers.get_all("x-a").iter().count(), 2);
        assert_eq!(found.framing, Framing::Length(5));
        assert!(found.keeps_open);
        assert!(head(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1").unwrap().unwrap().0.is_none());
        assert_eq!(head(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n").unwrap().unwrap().1, 37);
        for bad in
            ["<html>", "HTTP/1.1 x\r\n", "HTTP/1.1 200 OK\r\na b: c\r\n\r\n", "HTTP/1.1 101 Other\r\n\r\n", "{\"a\":1}"]
        {
            assert!(head(bad.as_bytes()).is_err(), "{bad}");
        }
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
        assert!(head(many.as_bytes()).is_err());
    }

    #[test]
    fn the_end_of_a_body_is_known_by_its_head() {
        let chunked = Framing::Chunked(Chunk::Size(None), 0);
        let check = |lines: &str, framing, keeps_open| {
            let found = of(lines).unwrap();
            assert_eq!((found.framing, found.keeps_open), (framing, keeps_open), "{lines}");
        };
        check("content-length: 5\r\n", Framing::Length(5), true);
        check("content-length: 5, 5\r\n", Framing::Length(5), true);
        check("content-length: 0\r\n", Framing::Done, true);
        check("content-length: 5\r\nconnection: Close\r\n", Framing::Length(5), false);
        check("transfer-encoding: Chunked\r\n", chunked, true);
        check("transfer-encoding: chunked\r\ncontent-length: 5\r\n", chunked, false);
        check("transfer-encoding: gzip\r\n", Framing::UntilClose, false);
        check("transfer-encoding: identity\r\ncontent-length: 5\r\n", Framing::Length(5), false);
        check("transfer-encoding: chunked,\r\n", chunked, true);
        check("", Framing::UntilClose, false);
        for bad in
            ["content-length: -1\r\n", "content-length: +1\r\n", "content-length: 1, 2\r\n", "content-length: \r\n"]
        {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert!(of("content-length: 99999999999999999999\r\n").is_err());
        assert!(of("transfer-encoding: gzip, chunked\r\n").is_err());
        let old = |lines: &str| whole(format!("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n{lines}\r\n").as_bytes());
        assert!(!old("").keeps_open && old("connection: keep-alive\r\n").keeps_open);
        assert_eq!(whole(b"HTTP/1.1 204 No Content\r\n\r\n").framing, Framing::Done);
    }

    /// What bytes say that come in pieces of `sizes`; with it, what came after the end.
    fn decoded(bytes: &[u8], sizes: &[usize]) -> Result<(Vec<u8>, Vec<u8>, bool), Malformed> {
        let mut framing = Framing::Chunked(Chunk::Size(None), 0);
        let (mut out, mut behind, mut rest) = (Vec::new(), Vec::new(), bytes);
        for size in sizes.iter().copied().chain(std::iter::repeat(usize::MAX)) {
            if rest.is_empty() {
                break;
            }
            let (piece, more) = rest.split_at(size.min(rest.len()));
            let used = framing.decode(piece, &mut out)?;
            behind.extend_from_slice(&piece[used..]);
            rest = more;
        }
        Ok((out, behind, framing.is_done()))
    }

    #[test]
    fn pieces_are_joined() {
        let all = |bytes: &str| {
            decoded(bytes.as_bytes(), &[])
                .map(|(out, behind, done)| (String::from_utf8(out).unwrap(), String::from_utf8(behind).unwrap(), done))
        };
        let is = |text: &str, behind: &str, done| Ok((text.to_owned(), behind.to_owned(), done));
        assert_eq!(all("3\r\nabc\r\n0A ;x=\"y\"\r\n0123456789\r\n0\r\n\r\n"), is("abc0123456789", "", true));
        assert_eq!(all("1\r\na\r\n0\r\nx: y\r\nz: w\r\n\r\nHTTP"), is("a", "HTTP", true));
        assert_eq!(all("5\r\nab"), is("ab", "", false));
        for bad in ["\r\n", "x\r\n", "1\nab", "1\r\nab\r\n", "1\r\na\n", "1;\n", "11111111111111111\r\n", "0\r\n\rx"] {
            assert!(all(bad).is_err(), "{bad}");
        }
        assert!(all(&format!("1;{}", "x".repeat(20_000))).is_err());
        assert!(all(&format!("0\r\n{}", "a: b\r\n".repeat(4_000))).is_err());
    }

    #[test]
    fn the_end_of_a_connection_ends_a_body_or_cuts_it() {
        let ends = |mut framing: Framing| framing.end().is_ok();
        assert!(ends(Framing::UntilClose) && ends(Framing::Done));
        assert!(!ends(Framing::Length(1)) && !ends(Framing::Chunked(Chunk::Line, 0)));
    }

    proptest! {
        #[test]
        fn any_split_decodes_to_the_same(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8),
            sizes in prop::collection::vec(1_usize..9, 0..200),
        ) {
            let mut bytes = Vec::new();
            for piece in &pieces {
                bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                bytes.extend_from_slice(piece);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\nmore");
            prop_assert_eq!(decoded(&bytes, &sizes).unwrap(), (pieces.concat(), b"more".to_vec(), true));
        }

        #[test]
        fn rubbish_is_refused_or_read_the_same_in_any_split(
            bytes in prop::collection::vec(prop::sample::select(b"01fF;x \t\r\n:-".to_vec()), 0..60),
            sizes in prop::collection::vec(1_usize..5, 0..60),
        ) {
            prop_assert_eq!(decoded(&bytes, &sizes), decoded(&bytes, &[]));
            drop(head(&bytes));
        }
    }
}
