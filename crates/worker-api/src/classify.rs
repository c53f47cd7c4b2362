//! What a provider's refusal or a broken call means: one table from status and code to a class of failure, and the wait
//! that the provider asks for. Never here: what follows from a class (`genmill_core::judge`).

use crate::dialect::ProviderError;
use genmill_core::attempt::{Failure, FailureClass};
use genmill_core::time::UnixMs;
use http::HeaderMap;
use std::ops::RangeInclusive;
use std::time::{Duration, UNIX_EPOCH};

/// The longest part of a provider's message that is kept, in bytes.
const MESSAGE_BYTES_MAX: usize = 500;

/// A rule of [`RULES`].
#[derive(Debug)]
struct Rule {
    statuses: RangeInclusive<u16>,
    /// The provider's codes that it is about; empty: all.
    codes: &'static [&'static str],
    class: FailureClass,
    /// What a person can do about it; may be empty.
    advice: &'static str,
}

/// Codes of an account that must be paid for first. They come with 429 or 403, but no waiting helps.
const QUOTA_CODES: &[&str] =
    &["insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"];

/// Codes that say "slow down" where the status does not.
const THROTTLED_CODES: &[&str] = &["rate_limit_exceeded", "rate_limit_error", "too_many_requests", "overloaded_error"];

/// Codes that say the request is wrong where the status does not.
const INVALID_CODES: &[&str] = &["invalid_request_error", "context_length_exceeded", "content_filter"];

/// From status and code to a class; the first that fits counts. Statuses below 300 stand for errors that came in the
/// middle of an answer and name no status of their own.
const RULES: &[Rule] = &[
    rule(0..=999, QUOTA_CODES, FailureClass::Auth, "the account has no quota left: check its plan and billing"),
    rule(0..=299, THROTTLED_CODES, FailureClass::Throttled, ""),
    rule(0..=299, INVALID_CODES, FailureClass::Invalid, ""),
    rule(0..=299, &[], FailureClass::Transient, ""),
    rule(300..=399, &[], FailureClass::Invalid, "redirections are not followed: correct the provider's base_url"),
    rule(401..=401, &[], FailureClass::Auth, "the key was refused: check it"),
    rule(402..=402, &[], FailureClass::Invalid, "the account has no credit left"),
    rule(403..=403, &[], FailureClass::Auth, "the key may not do this"),
    rule(404..=404, &[], FailureClass::NotFound, "check the model's name and the provider's base_url"),
    rule(408..=408, &[], FailureClass::Transient, ""),
    rule(425..=425, &[], FailureClass::Transient, ""),
    rule(429..=429, &[], FailureClass::Throttled, ""),
    rule(400..=499, &[], FailureClass::Invalid, ""),
    rule(529..=529, &[], FailureClass::Throttled, ""),
    rule(500..=999, &[], FailureClass::Transient, ""),
];

const fn rule(
    statuses: RangeInclusive<u16>,
    codes: &'static [&'static str],
    class: FailureClass,
    advice: &'static str,
) -> Rule {
    Rule { statuses, codes, class, advice }
}

/// What a provider's error means. `status` is that of the HTTP reply; one that the error names itself counts more.
#[must_use]
pub fn classify(provider: &str, status: u16, error: &ProviderError) -> Failure {
    let status = error.status.unwrap_or(status);
    let fits = |rule: &&Rule| {
        rule.statuses.contains(&status) && (rule.codes.is_empty() || rule.codes.contains(&error.code.as_str()))
    };
    let found = RULES.iter().find(fits);
    let class = found.map_or(FailureClass::Transient, |rule| rule.class);
    Failure::new(class, message(provider, status, error, found.map_or("", |rule| rule.advice)))
}

fn message(provider: &str, status: u16, error: &ProviderError, advice: &str) -> String {
    let mut message = match status {
        300.. => format!("{provider} answered {status}"),
        _ => format!("{provider} failed while it answered"),
    };
    // A code that only repeats the status says nothing.
    if !error.code.is_empty() && error.code != status.to_string() {
        message = format!("{message} ({})", shortened(&error.code));
    }
    for part in [shortened(&error.message), advice] {
        if !part.is_empty() {
            message = format!("{message}: {part}");
        }
    }
    message
}

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)]
}

/// The same error without any of `hidden`: providers quote keys and prompts.
#[must_use]
pub fn redact<'a>(error: ProviderError, hidden: impl Iterator<Item = &'a str>) -> ProviderError {
    // Words as short as this are no secret, and replacing them would make the message unreadable.
    let hidden = hidden.filter(|hidden| hidden.len() >= 8);
    let message = hidden.fold(error.message, |message, hidden| message.replace(hidden, "[…]"));
    ProviderError { message, ..error }
}

/// How long the provider asks to wait, in milliseconds: `retry-after-ms`, or `retry-after` as seconds or as a date.
#[must_use]
pub fn retry_after_ms(headers: &HeaderMap, now: UnixMs) -> Option<u64> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let milliseconds = ["retry-after-ms", "x-ms-retry-after-ms"].iter().find_map(|name| header(name));
    let wait = milliseconds.and_then(|value| whole_ms(value, 0.001)).or_else(|| {
        let value = header("retry-after")?;
        whole_ms(value, 1.0).or_else(|| until_ms(value, now))
    })?;
    Some(wait)
}

/// A time of a rate limit, in milliseconds from now: a number of seconds, or a duration such as `6s`, `1m30s`, `120ms`.
#[must_use]
pub fn reset_ms(value: &str) -> Option<u64> {
    const UNITS: [(&str, f64); 4] = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3_600.0)];
    let (mut rest, mut sum_ms) = (value, 0);
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, after) = rest.split_at(number);
        let unit = if after.is_empty() {
            Some(("", 1.0))
        } else {
            UNITS.into_iter().find(|(name, _)| after.starts_with(name))
        };
        let (name, unit_s) = unit?;
        sum_ms += whole_ms(number, unit_s)?;
        rest = &after[name.len()..];
    }
    (!value.is_empty()).then_some(sum_ms)
}

/// A number of units of so many seconds, in milliseconds, rounded up.
fn whole_ms(value: &str, unit_s: f64) -> Option<u64> {
    let seconds: f64 = value.parse().ok()?;
    let wait = Duration::try_from_secs_f64(seconds * unit_s).ok()?;
    u64::try_from(wait.as_micros().div_ceil(1_000)).ok()
}

/// The milliseconds until an HTTP date; 0 when it has passed.
fn until_ms(value: &str, now: UnixMs) -> Option<u64> {
    let date = httpdate::parse_http_date(value).ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(UnixMs(u64::try_from(date.as_millis()).ok()?).ms_since(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &str) -> ProviderError {
        ProviderError { code: code.to_owned(), message: "no".to_owned(), ..ProviderError::default() }
    }

    fn check(status: u16, code: &str, class: FailureClass) {
        assert_eq!(classify("groq", status, &error(code)).class, class, "{status} {code}");
    }

    #[test]
    fn a_wrong_request_is_not_retried() {
        for status in [400, 402, 405, 409, 413, 422, 451] {
            check(status, "", FailureClass::Invalid);
        }
        check(301, "", FailureClass::Invalid);
        check(404, "model_not_found", FailureClass::NotFound);
    }

    #[test]
    fn a_refused_key_or_an_empty_account_is_not_retried() {
        check(401, "invalid_api_key", FailureClass::Auth);
        check(403, "", FailureClass::Auth);
        check(429, "insufficient_quota", FailureClass::Auth);
        check(200, "insufficient_quota", FailureClass::Auth);
    }

    #[test]
    fn what_passes_is_retried() {
        check(429, "rate_limit_exceeded", FailureClass::Throttled);
        check(529, "overloaded_error", FailureClass::Throttled);
        for status in [408, 425, 500, 502, 503, 504, 524, 599] {
            check(status, "", FailureClass::Transient);
        }
    }

    #[test]
    fn an_error_within_an_answer_is_told_by_its_code() {
        check(200, "", FailureClass::Transient);
        check(200, "server_error", FailureClass::Transient);
        check(200, "rate_limit_exceeded", FailureClass::Throttled);
        check(200, "context_length_exceeded", FailureClass::Invalid);
        let own = ProviderError { status: Some(403), ..error("403") };
        assert_eq!(classify("openrouter", 200, &own).class, FailureClass::Auth);
    }

    #[test]
    fn the_message_names_provider_status_and_what_it_said() {
        let said = |status, code: &str| classify("groq", status, &error(code)).message;
        assert_eq!(said(429, "rate_limit_exceeded"), "groq answered 429 (rate_limit_exceeded): no");
        assert_eq!(said(402, "402"), "groq answered 402: no: the account has no credit left");
        assert_eq!(said(200, "server_error"), "groq failed while it answered (server_error): no");
        let long = ProviderError { message: "é".repeat(10_000), ..error("") };
        assert!(classify("groq", 500, &long).message.len() < 600);
    }

    #[test]
    fn keys_and_prompts_are_cut_out() {
        let error = ProviderError { message: "bad key sk-0123456789 for 'a b'".to_owned(), ..error("") };
        assert_eq!(redact(error, ["sk-0123456789", "a b"].into_iter()).message, "bad key […] for 'a b'");
    }

    #[test]
    fn the_time_of_a_limit_is_read() {
        for (value, expect) in [("6s", 6_000), ("1m30s", 90_000), ("1.36s", 1_360), ("120ms", 120), ("7", 7_000)] {
            assert_eq!(reset_ms(value), Some(expect), "{value}");
        }
        assert_eq!(reset_ms("6m0s"), Some(360_000));
        for nonsense in ["", "soon", "-1s", "s", "1x", "2026-11-21T00:00:00Z"] {
            assert_eq!(reset_ms(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_wait_is_read_in_every_spelling() {
        let check = |name: &'static str, value: &str, expect: Option<u64>| {
            let headers = HeaderMap::from_iter([(http::HeaderName::from_static(name), value.parse().unwrap())]);
            assert_eq!(retry_after_ms(&headers, UnixMs(784_111_770_000)), expect, "{name}: {value}");
        };
        check("retry-after", "2", Some(2_000));
        check("retry-after", "0.25", Some(250));
        check("retry-after", "1.0001", Some(1_001));
        check("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT", Some(7_000));
        check("retry-after", "Sun, 06 Nov 1994 08:49:00 GMT", Some(0));
        check("retry-after-ms", "1500", Some(1_500));
        check("x-ms-retry-after-ms", "20", Some(20));
        for nonsense in ["", "-1", "soon", "NaN", "inf", "1e300"] {
            check("retry-after", nonsense, None);
        }
    }
}
