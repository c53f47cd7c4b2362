//! Frames of `application/vnd.amazon.eventstream`: bytes in, checked frames out. Never here: what their payload means.

/// The longest frame that is taken, in bytes: the most that the format allows.
const FRAME_BYTES_MAX: usize = 24 * 1024 * 1024;

/// Lengths of the frame and of its headers, and their checksum.
const PRELUDE_BYTES: usize = 12;

/// The checksum at the end of a frame.
const CHECKSUM_BYTES: usize = 4;

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Frame {
    /// What kind of event it is; `None` for an exception.
    pub(super) event: Option<String>,
    /// What kind of exception it is.
    pub(super) exception: Option<String>,
    /// What it carries.
    pub(super) payload: Vec<u8>,
}

/// A frame is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of the stream is damaged")]
pub(super) struct Damaged;

/// Collects bytes until frames are whole.
#[derive(Debug, Default)]
pub(super) struct Frames {
    held: Vec<u8>,
}

impl Frames {
    /// Takes the next bytes and returns the frames that they complete, and whether one after them is damaged.
    pub(super) fn push(&mut self, bytes: &[u8]) -> (Vec<Frame>, Option<Damaged>) {
        self.held.extend_from_slice(bytes);
        let (mut frames, mut taken) = (Vec::new(), 0);
        let broken = loop {
            match next(&self.held[taken..]) {
                Ok(Some((frame, length))) => {
                    frames.push(frame);
                    taken += length;
                }
                Ok(None) => break None,
                Err(damaged) => break Some(damaged),
            }
        };
        self.held.drain(..taken);
        (frames, broken)
    }
}

/// The frame at the beginning of `bytes` and its length; `None` while it is not whole.
fn next(bytes: &[u8]) -> Result<Option<(Frame, usize)>, Damaged> {
    let Some(prelude) = bytes.get(..PRELUDE_BYTES) else { return Ok(None) };
    let number = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let length = |at: usize| number(at).and_then(|number| usize::try_from(number).ok()).ok_or(Damaged);
    let (total, headers) = (length(0)?, length(4)?);
    let fits = (PRELUDE_BYTES + CHECKSUM_BYTES..=FRAME_BYTES_MAX).contains(&total)
        && headers <= total - PRELUDE_BYTES - CHECKSUM_BYTES;
    if !fits || number(8) != Some(crc32(&prelude[..8])) {
        return Err(Damaged);
    }
    let Some(whole) = bytes.get(..total) else { return Ok(None) };
    let body = &whole[..total - CHECKSUM_BYTES];
    if number(total - CHECKSUM_BYTES) != Some(crc32(body)) {
        return Err(Damaged);
    }
    let mut frame = Frame { payload: body[PRELUDE_BYTES + headers..].to_vec(), ..Frame::default() };
    let mut rest = &body[PRELUDE_BYTES..PRELUDE_BYTES + headers];
    while !rest.is_empty() {
        let (name, value) = header(&mut rest).ok_or(Damaged)?;
        let value = || String::from_utf8_lossy(value).into_owned();
        match name {
            b":event-type" => frame.event = Some(value()),
            b":exception-type" | b":error-code" => frame.exception = Some(value()),
            _ => {}
        }
    }
    Ok(Some((frame, total)))
}

/// Takes a header's name and value.
fn header<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let length = usize::from(*rest.split_off_first()?);
    let name = rest.split_off(..length)?;
    let length = match rest.split_off_first()? {
        0 | 1 => 0,
        2 => 1,
        3 => 2,
        4 => 4,
        5 | 8 => 8,
        6 | 7 => usize::from(u16::from_be_bytes(rest.split_off(..2)?.try_into().ok()?)),
        9 => 16,
        _ => return None,
    };
    Some((name, rest.split_off(..length)?))
}

/// The checksum of zlib and Ethernet.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn damage_is_noticed() {
        let head = [0, 0, 0, 16, 0, 0, 0, 0];
        let mut frame = head.to_vec();
        frame.extend(crc32(&head).to_be_bytes());
        frame.extend(crc32(&frame).to_be_bytes());
        assert_eq!(Frames::default().push(&frame), (vec![Frame::default()], None));
        for at in 0..frame.len() {
            let mut damaged = frame.clone();
            damaged[at] ^= 1;
            assert_eq!(Frames::default().push(&damaged), (Vec::new(), Some(Damaged)), "at {at}");
        }
    }
}
