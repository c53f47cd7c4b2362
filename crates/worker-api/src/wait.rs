//! How long a provider asks to wait before the next call, in all the spellings that are found at large.
//!
//! Never here: whether there is a next call (`failure`), and how long a wait may be (`genmill_core::judge`).

use crate::dialect::ProviderError;
use genmill_core::time::UnixMs;
use http::HeaderMap;
use std::time::{Duration, UNIX_EPOCH};

/// Headers that have the wait itself, the most exact first, with the seconds that a bare number counts.
const WAITS: &[(&str, f64)] = &[("retry-after-ms", 0.001), ("x-ms-retry-after-ms", 0.001), ("retry-after", 1.0)];

/// Buckets that calls are taken from: what is left in one, and when it is full again. Where a name has `*`, it is
/// spelled with each of [`COUNTED`].
const BUCKETS: &[(&str, &str)] = &[
    ("x-ratelimit-remaining-*", "x-ratelimit-reset-*"),
    ("x-ratelimit-*-remaining", "x-ratelimit-*-reset"),
    ("anthropic-ratelimit-*-remaining", "anthropic-ratelimit-*-reset"),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
    ("ratelimit-remaining", "ratelimit-reset"),
];

/// What buckets count.
const COUNTED: &[&str] = &[
    "requests",
    "tokens",
    "input-tokens",
    "output-tokens",
    "tokens-minute",
    "requests-minute",
    "tokens-query",
    "requests-day",
    "tokens-day",
];

/// What stands before a wait in a message.
const PHRASES: &[&str] = &["try again in ", "try again after ", "retry after ", "retry in ", "retry again in "];

/// Units by their names, in seconds.
const UNITS: &[(&str, f64)] = &[
    ("milliseconds", 0.001),
    ("millisecond", 0.001),
    ("ms", 0.001),
    ("us", 0.000_001),
    ("µs", 0.000_001),
    ("ns", 0.000_000_001),
    ("seconds", 1.0),
    ("second", 1.0),
    ("secs", 1.0),
    ("sec", 1.0),
    ("s", 1.0),
    ("minutes", 60.0),
    ("minute", 60.0),
    ("mins", 60.0),
    ("min", 60.0),
    ("m", 60.0),
    ("hours", 3_600.0),
    ("hour", 3_600.0),
    ("h", 3_600.0),
    ("days", 86_400.0),
    ("day", 86_400.0),
    ("d", 86_400.0),
];

/// Numbers from here on are points in time: seconds since 1970, or (the larger ones) milliseconds.
const EPOCH_S_MIN: f64 = 1_000_000_000.0;
const EPOCH_MS_MIN: f64 = 100_000_000_000.0;

/// The wait that a refusal asks for, in milliseconds, rounded up: of the headers that name it, else of the body, else of
/// what the message says, else until the empty bucket is full. `None` when nothing tells.
#[must_use]
pub fn asked_ms(headers: &HeaderMap, error: &ProviderError, now: UnixMs) -> Option<u64> {
    let named = || WAITS.iter().find_map(|(name, unit_s)| value_ms(text(headers, name)?, *unit_s, now));
    let quoted = || bucket_ms(error.headers.as_deref()?, now);
    let told = named().or(error.retry_after_ms).or_else(|| said_ms(&error.message));
    told.or_else(|| bucket_ms(headers, now)).or_else(quoted)
}

/// The wait that a message tells, such as `Please try again in 1.5s` or `retry after 20 seconds`.
#[must_use]
pub fn said_ms(message: &str) -> Option<u64> {
    let message = message.to_lowercase();
    let after = |phrase: &&str| message.find(*phrase).map(|at| &message[at + phrase.len()..]);
    // A number without a unit could count anything.
    PHRASES.iter().filter_map(after).find_map(|rest| duration_ms(rest, None))
}

/// Until the buckets that are empty are full again; where none is, the call asked for more than the one that is fullest
/// last has left.
fn bucket_ms(headers: &HeaderMap, now: UnixMs) -> Option<u64> {
    let named = BUCKETS.iter().flat_map(|(left, reset)| {
        let spelled = move |counted: &&str| (left.replace('*', counted), reset.replace('*', counted));
        COUNTED.iter().map(spelled).take(if left.contains('*') { COUNTED.len() } else { 1 })
    });
    let buckets: Vec<(bool, u64)> = named
        .filter_map(|(left, reset)| {
            let empty = text(headers, &left).is_some_and(|left| left.parse() == Ok(0.0));
            Some((empty, value_ms(text(headers, &reset)?, 1.0, now)?))
        })
        .collect();
    let buckets: Vec<(bool, u64)> = buckets.into_iter().chain(combined(headers)).collect();
    let until_full = |empty_only: bool| {
        let fits = |(empty, _): &&(bool, u64)| *empty || !empty_only;
        buckets.iter().filter(fits).map(|(_, wait_ms)| *wait_ms).max()
    };
    until_full(true).or_else(|| until_full(false))
}

/// The buckets of a header that has all of them: `"minute";r=0;t=2, "day";r=5;t=90` or, as it was in earlier drafts of the
/// same (draft-ietf-httpapi-ratelimit-headers), `limit=5, remaining=0, reset=2`.
fn combined(headers: &HeaderMap) -> Vec<(bool, u64)> {
    let lines = headers.get_all("ratelimit").into_iter().filter_map(|value| value.to_str().ok());
    let bucket = |item: &str, between: char| {
        let value = |names: [&str; 2]| {
            let parts = item.split(between).filter_map(|part| part.trim().split_once('='));
            parts.filter(|(name, _)| names.contains(name)).find_map(|(_, value)| value.parse::<f64>().ok())
        };
        Some((value(["r", "remaining"]) == Some(0.0), whole_ms(value(["t", "reset"])?)?))
    };
    let of_line = |line: &str| match line.contains(';') {
        true => line.split(',').filter_map(|item| bucket(item, ';')).collect::<Vec<_>>(),
        false => bucket(line, ',').into_iter().collect(),
    };
    lines.flat_map(of_line).collect()
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// A time of a rate limit, in milliseconds from now: seconds, a duration, or a point in time.
#[must_use]
pub fn time_ms(value: &str, now: UnixMs) -> Option<u64> {
    value_ms(value, 1.0, now)
}

/// A header's value: a number of units or a point in time, a duration such as `1m30s`, an HTTP date, an RFC 3339 time.
fn value_ms(value: &str, unit_s: f64, now: UnixMs) -> Option<u64> {
    if let Ok(number) = value.parse::<f64>() {
        return match number {
            EPOCH_MS_MIN.. => until_ms(whole_ms(number * 0.001)?, now),
            EPOCH_S_MIN.. => until_ms(whole_ms(number)?, now),
            _ => whole_ms(number * unit_s),
        };
    }
    duration_ms(value, Some(unit_s)).or_else(|| {
        let date = httpdate::parse_http_date(value).ok().or_else(|| humantime::parse_rfc3339_weak(value).ok())?;
        until_ms(u64::try_from(date.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok()?, now)
    })
}

/// The milliseconds until a point in time; 0 when it has passed.
fn until_ms(at_ms: u64, now: UnixMs) -> Option<u64> {
    Some(UnixMs(at_ms).ms_since(now))
}

/// The duration that a text begins with: numbers with units, such as `1m30s`, `1.36s`, `20 seconds` or `1h 5min`. A number
/// without a unit is one of `bare_s` seconds when it ends the text.
fn duration_ms(text: &str, bare_s: Option<f64>) -> Option<u64> {
    let mut rest = text.trim_start();
    let mut total_s = None;
    loop {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let Ok(number) = rest[..end].trim_end_matches('.').parse::<f64>() else { break };
        let after = rest[end..].trim_start();
        let word = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
        let unit = UNITS.iter().find(|(name, _)| *name == &after[..word]).map(|(_, unit_s)| *unit_s);
        let unit = unit.or_else(|| bare_s.filter(|_| after.is_empty()))?;
        total_s = Some(total_s.unwrap_or(0.0) + number * unit);
        rest = after[word..].trim_start();
    }
    whole_ms(total_s?)
}

/// Seconds in milliseconds, rounded up.
fn whole_ms(seconds: f64) -> Option<u64> {
    let wait = Duration::try_from_secs_f64(seconds).ok()?;
    u64::try_from(wait.as_micros().div_ceil(1_000)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;
    use proptest::prelude::*;

    /// 1994-11-06 08:49:30 UTC.
    const NOW: UnixMs = UnixMs(784_111_770_000);

    fn headers(rows: &[(&'static str, &str)]) -> HeaderMap {
        HeaderMap::from_iter(rows.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())))
    }

    fn check(rows: &[(&'static str, &str)], expect: Option<u64>) {
        assert_eq!(asked_ms(&headers(rows), &ProviderError::default(), NOW), expect, "{rows:?}");
    }

    #[test]
    fn a_wait_is_read_in_every_spelling() {
        check(&[("retry-after", "2")], Some(2_000));
        check(&[("retry-after", "0.25")], Some(250));
        check(&[("retry-after", "1.0001")], Some(1_001));
        check(&[("retry-after", "30s")], Some(30_000));
        check(&[("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")], Some(7_000));
        check(&[("retry-after", "Sun, 06 Nov 1994 08:49:00 GMT")], Some(0));
        check(&[("retry-after-ms", "1500")], Some(1_500));
        check(&[("x-ms-retry-after-ms", "20")], Some(20));
        check(&[("retry-after", "9"), ("retry-after-ms", "1500")], Some(1_500));
        for nonsense in ["", "-1", "soon", "NaN", "inf", "1e300", "s", "1.2.3s", "5 apples"] {
            check(&[("retry-after", nonsense)], None);
        }
    }

    #[test]
    fn a_bucket_is_waited_for_until_it_is_full() {
        let openai = [("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "1m30s")];
        check(&openai, Some(90_000));
        check(&[("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "1.36s")], Some(1_360));
        check(&[("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "120ms")], Some(120));
        check(&[("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "6m0s")], Some(360_000));
        let anthropic = [
            ("anthropic-ratelimit-tokens-remaining", "0"),
            ("anthropic-ratelimit-tokens-reset", "1994-11-06T08:49:42Z"),
        ];
        check(&anthropic, Some(12_000));
        check(&[("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "784111775000")], Some(5_000));
        check(&[("ratelimit-remaining", "0"), ("ratelimit-reset", "45")], Some(45_000));
        check(&[("x-ratelimit-tokens-remaining", "0"), ("x-ratelimit-tokens-reset", "3")], Some(3_000));
        check(&[("ratelimit", "\"default\";r=0;t=2")], Some(2_000));
        check(&[("ratelimit", "\"minute\";r=0;t=7, \"day\";r=5;t=90")], Some(7_000));
        check(&[("ratelimit", "limit=5, remaining=0, reset=2")], Some(2_000));
        check(&[("ratelimit", "soon")], None);
    }

    #[test]
    fn a_point_in_time_may_be_a_number() {
        let at = |now, value: &str| asked_ms(&headers(&[("x-ratelimit-reset", value)]), &ProviderError::default(), now);
        assert_eq!(at(UnixMs(1_700_000_000_000), "1700000060"), Some(60_000));
        assert_eq!(at(UnixMs(1_700_000_000_000), "1700000060500"), Some(60_500));
        assert_eq!(at(UnixMs(1_700_000_000_000), "1600000000"), Some(0));
    }

    #[test]
    fn the_empty_bucket_counts_and_else_the_slowest() {
        let both = |requests| {
            [
                ("x-ratelimit-remaining-requests", requests),
                ("x-ratelimit-reset-requests", "2s"),
                ("x-ratelimit-remaining-tokens", "10"),
                ("x-ratelimit-reset-tokens", "7s"),
            ]
        };
        check(&both("0"), Some(2_000));
        check(&both("1"), Some(7_000));
    }

    #[test]
    fn a_message_may_tell_the_wait() {
        let check = |message: &str, expect| assert_eq!(said_ms(message), expect, "{message}");
        check("Rate limit reached. Please try again in 1.5s. Visit https://x", Some(1_500));
        check("Please try again in 6m0.5s.", Some(360_500));
        check("try again in 257ms", Some(257));
        check("Please retry after 20 seconds.", Some(20_000));
        check("Please retry in 59.2s", Some(59_200));
        check("Try again in 1 minute, or pay", Some(60_000));
        check("Please try again in 1h 5min", Some(3_900_000));
        check("try again in a moment", None);
        check("try again in 5", None);
        check("retry after", None);
    }

    #[test]
    fn the_body_counts_before_the_message_and_after_the_headers() {
        let error = ProviderError {
            retry_after_ms: Some(5),
            message: "try again in 9s".to_owned(),
            ..ProviderError::default()
        };
        assert_eq!(asked_ms(&headers(&[("retry-after", "1")]), &error, NOW), Some(1_000));
        assert_eq!(asked_ms(&headers(&[("x-ratelimit-reset-tokens", "1s")]), &error, NOW), Some(5));
        let error = ProviderError {
            headers: Some(Box::new(headers(&[("x-ratelimit-reset", "3")]))),
            ..ProviderError::default()
        };
        assert_eq!(asked_ms(&HeaderMap::new(), &error, NOW), Some(3_000));
    }

    proptest! {
        #[test]
        fn a_wait_without_a_number_is_none(text: String) {
            let waits = [said_ms(&format!("try again in {text}")), value_ms(&text, 1.0, NOW)];
            prop_assert!(waits == [None; 2] || text.contains(|c: char| c.is_ascii_digit()));
        }
    }
}
