//! Deadlines as they are typed: a point in time, or a while from now. Never here: reading the clock.

use prost_types::Timestamp;
use std::time::Duration;

/// When something is due.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum When {
    /// At that time.
    At(Timestamp),
    /// That long from now.
    In(Duration),
}

impl When {
    /// The point in time, `now` being the milliseconds since 1970-01-01 UTC.
    pub(crate) fn timestamp(self, now_unix_ms: u64) -> Timestamp {
        match self {
            Self::At(at) => at,
            Self::In(span) => {
                let span_ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
                genmill_wire::to_pb::timestamp(genmill_core::time::UnixMs(now_unix_ms).plus_ms(span_ms))
            }
        }
    }
}

/// Reads an RFC 3339 time such as `2027-01-31T18:00:00Z`, or a duration such as `10m`.
pub(crate) fn parse_when(text: &str) -> Result<When, String> {
    if let Ok(span) = parse_duration(text) {
        return Ok(When::In(span));
    }
    let bad = || format!("`{text}` is neither a time such as 2027-01-31T18:00:00Z nor a duration such as 10m or 1h30m");
    // A time without its zone could mean anything.
    let zoned = text.ends_with(['Z', 'z']) || text.get(10..).is_some_and(|rest| rest.contains(['+', '-']));
    let at = text.parse::<Timestamp>().ok().filter(|_| zoned && text.contains(['T', 't', ' ']));
    at.map(When::At).ok_or_else(bad)
}

/// Reads a duration: numbers with the units ms, s, m, h and d, such as `90s` or `1h30m`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is not a duration: write 500ms, 90s, 10m, 1h30m or 2d");
    let mut rest = text;
    let mut total_ms: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit_ms = match &rest[..unit] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        rest = &rest[unit..];
        total_ms = number.checked_mul(unit_ms).and_then(|ms| total_ms.checked_add(ms)).ok_or_else(bad)?;
    }
    if text.is_empty() { Err(bad()) } else { Ok(Duration::from_millis(total_ms)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn duration(text: &str, expect_ms: Option<u64>) {
        assert_eq!(parse_duration(text).ok(), expect_ms.map(Duration::from_millis), "{text}");
    }

    #[test]
    fn a_duration_is_numbers_with_units() {
        duration("500ms", Some(500));
        duration("90s", Some(90_000));
        duration("10m", Some(600_000));
        duration("1h30m", Some(5_400_000));
        duration("2d", Some(172_800_000));
        duration("", None);
        duration("10", None);
        duration("m", None);
        duration("10x", None);
        duration("-1s", None);
        duration("1.5h", None);
        duration("99999999999999999999d", None);
        duration("9999999999999999d", None);
    }

    fn seconds(text: &str, expect: Option<i64>) {
        let at = parse_when(text).map(|when| when.timestamp(1_000_000).seconds);
        assert_eq!(at.ok(), expect, "{text}");
    }

    #[test]
    fn a_deadline_is_a_time_or_a_while_from_now() {
        seconds("1970-01-02T00:00:00Z", Some(86_400));
        seconds("1970-01-02T01:00:00+01:00", Some(86_400));
        seconds("1970-01-01T23:00:00.5-01:00", Some(86_400));
        seconds("10s", Some(1_010));
        seconds("1970-01-02T00:00:00", None);
        seconds("1970-01-02", None);
        seconds("tomorrow", None);
        seconds("", None);
    }
}
