//! What a provider tells of its limits with an answer, in all the spellings of its headers. Never here: the wait that a
//! refusal asks for (see `wait`), and what is made of it (the queue).

use genmill_core::gate::Bucket;
use http::HeaderMap;

/// How limits of calls are spelled, with `?` for each of `limit`, `remaining` and `reset`. The first that is there counts.
const REQUESTS: &[&str] = &[
    "x-ratelimit-?-requests",
    "anthropic-ratelimit-requests-?",
    "x-ratelimit-requests-?",
    "x-ratelimit-?-requests-minute",
    "x-ratelimit-?",
    "ratelimit-?",
];

/// The same for limits of tokens.
const TOKENS: &[&str] = &[
    "x-ratelimit-?-tokens",
    "anthropic-ratelimit-tokens-?",
    "anthropic-ratelimit-input-tokens-?",
    "x-ratelimit-tokens-?",
    "x-ratelimit-?-tokens-minute",
];

/// The limits that a provider tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Of calls.
    pub requests: Option<Bucket>,
    /// Of tokens.
    pub tokens: Option<Bucket>,
}

/// What headers tell. `wait_ms` reads a time: how many milliseconds from now it is.
#[must_use]
pub fn told(headers: &HeaderMap, wait_ms: impl Fn(&str) -> Option<u64>) -> Told {
    let bucket = |spellings: &[&str]| spellings.iter().find_map(|spelling| bucket(headers, spelling, &wait_ms));
    Told { requests: bucket(REQUESTS), tokens: bucket(TOKENS) }
}

fn bucket(headers: &HeaderMap, spelling: &str, wait_ms: impl Fn(&str) -> Option<u64>) -> Option<Bucket> {
    let text = |what| headers.get(spelling.replace('?', what))?.to_str().ok().map(str::trim);
    let (limit, remaining) = (text("limit").and_then(count), text("remaining").and_then(count));
    (limit.is_some() || remaining.is_some()).then(|| Bucket {
        limit,
        remaining,
        reset_ms: text("reset").and_then(wait_ms),
    })
}

/// The number that a value begins with: some name their window behind it, as in `100;w=60`. None is less than nothing.
fn count(value: &str) -> Option<u64> {
    let end = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (number, rest) = value.split_at(end);
    let number = if rest.starts_with('.') || rest.is_empty() || rest.starts_with([',', ';']) { number } else { "" };
    match value {
        debt if debt.starts_with('-') => Some(0),
        _ => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;

    fn check(rows: &[(&'static str, &str)], requests: Option<Bucket>, tokens: Option<Bucket>) {
        let headers = HeaderMap::from_iter(
            rows.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())),
        );
        let wait_ms = |value: &str| value.trim_end_matches('s').parse::<u64>().ok().map(|seconds| seconds * 1_000);
        assert_eq!(told(&headers, wait_ms), Told { requests, tokens }, "{rows:?}");
    }

    fn bucket(limit: impl Into<Option<u64>>, remaining: u64, reset_ms: impl Into<Option<u64>>) -> Option<Bucket> {
        Some(Bucket { limit: limit.into(), remaining: Some(remaining), reset_ms: reset_ms.into() })
    }

    #[test]
    fn limits_are_read_in_every_spelling() {
        let openai = [
            ("x-ratelimit-limit-requests", "60"),
            ("x-ratelimit-remaining-requests", "59"),
            ("x-ratelimit-reset-requests", "1s"),
            ("x-ratelimit-limit-tokens", "150000"),
            ("x-ratelimit-remaining-tokens", "149984"),
            ("x-ratelimit-reset-tokens", "6s"),
        ];
        check(&openai, bucket(60, 59, 1_000), bucket(150_000, 149_984, 6_000));
        let anthropic = [
            ("anthropic-ratelimit-requests-limit", "50"),
            ("anthropic-ratelimit-requests-remaining", "0"),
            ("anthropic-ratelimit-requests-reset", "7"),
            ("anthropic-ratelimit-input-tokens-remaining", "5"),
        ];
        check(&anthropic, bucket(50, 0, 7_000), bucket(None, 5, None));
        check(
            &[("x-ratelimit-remaining-tokens", "8"), ("x-ratelimit-reset-tokens", "soon")],
            None,
            bucket(None, 8, None),
        );
        check(&[("ratelimit-limit", "100;w=60"), ("ratelimit-remaining", "99")], bucket(100, 99, None), None);
        check(&[("x-ratelimit-limit", "20"), ("x-ratelimit-remaining", "-3")], bucket(20, 0, None), None);
        check(
            &[("x-ratelimit-limit-tokens-minute", "9.0"), ("x-ratelimit-remaining-tokens-minute", "1")],
            None,
            bucket(9, 1, None),
        );
        for nonsense in ["", "many", "1e9", "9999999999999999999999"] {
            check(&[("x-ratelimit-limit-requests", nonsense)], None, None);
        }
    }
}
