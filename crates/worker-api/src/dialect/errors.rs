//! Errors as providers tell them, in any of the shapes that are found at large. Never here: what they mean (`classify`).

use super::ProviderError;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

/// An answer as JSON; `not` says what it is when it is none.
pub(super) fn json(answer: &[u8], not: &str) -> Result<Value, ProviderError> {
    serde_json::from_slice(answer).map_err(|_| ProviderError::saying(not))
}

/// What the body of a refusal says.
pub(super) fn of_body(body: &[u8]) -> ProviderError {
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => of_value(&value),
        Err(_) => ProviderError { message: plain_text(body), ..ProviderError::default() },
    }
}

/// Reads an error in any of the shapes that are found at large.
pub(super) fn of_value(value: &Value) -> ProviderError {
    let value = value.get(0).unwrap_or(value);
    let inner = ["error", "errors"].iter().find_map(|name| value.get(name)).filter(|inner| !inner.is_null());
    let inner = inner.map_or(value, |inner| inner.get(0).unwrap_or(inner));
    let code = ["code", "type", "error_type"].iter().find_map(|name| inner.get(name).filter(|code| !code.is_null()));
    // Azure's, which says more than the code where there is one.
    let code = code.or_else(|| inner["innererror"].get("code"));
    let message = inner.as_str().or_else(|| inner["message"].as_str()).or_else(|| value["message"].as_str());
    ProviderError {
        status: code.and_then(status_of),
        code: code.map(|code| code.as_str().map_or_else(|| code.to_string(), str::to_owned)).unwrap_or_default(),
        message: message.map_or_else(|| detail(value), str::to_owned),
        retry_after_ms: asked_ms(inner).or_else(|| asked_ms(value)),
        headers: quoted(&inner["metadata"]["headers"]),
    }
}

/// How long an error asks to wait, in milliseconds, rounded up: Google's `RetryInfo`, which its followers of OpenAI tell as
/// well, or a number of seconds.
fn asked_ms(error: &Value) -> Option<u64> {
    let details = error["details"].as_array().into_iter().flatten();
    let told = details.filter_map(|detail| detail["retryDelay"].as_str()?.strip_suffix('s')?.parse().ok()).next();
    let number = |name: &str| error[name].as_f64().or_else(|| error[name].as_str()?.parse().ok());
    let seconds = told.or_else(|| number("retry_after")).or_else(|| Some(number("retry_after_ms")? / 1_000.0))?;
    let wait = std::time::Duration::try_from_secs_f64(seconds).ok()?;
    u64::try_from(wait.as_micros().div_ceil(1_000)).ok()
}

/// Headers in an object.
fn quoted(headers: &Value) -> Option<Box<HeaderMap>> {
    let header = |(name, value): (&String, &Value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_str(&value).ok()?))
    };
    Some(Box::new(headers.as_object()?.iter().filter_map(header).collect()))
}

/// A code that is an HTTP status.
fn status_of(code: &Value) -> Option<u16> {
    let number = code.as_u64().or_else(|| code.as_str()?.parse().ok())?;
    u16::try_from(number).ok().filter(|status| (400..600).contains(status))
}

/// What servers built with FastAPI say: a text, or a list of places and problems. The rejected input, which they quote
/// too, is left out: it may be the prompt.
fn detail(value: &Value) -> String {
    let detail = &value["detail"];
    if let Some(text) = detail.as_str() {
        return text.to_owned();
    }
    let place = |row: &Value| row["loc"].as_array().map(|parts| parts.iter().map(word).collect::<Vec<_>>().join("."));
    let line = |row: &Value| Some(format!("{}: {}", place(row)?, row["msg"].as_str()?));
    detail.as_array().map(|rows| rows.iter().filter_map(line).collect::<Vec<_>>().join("; ")).unwrap_or_default()
}

fn word(part: &Value) -> String {
    part.as_str().map_or_else(|| part.to_string(), str::to_owned)
}

/// A body that is no JSON, unless it is a web page.
fn plain_text(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    if text.starts_with('<') { "the answer is a web page".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, retry_after_ms: Option<u64>) {
        assert_eq!(of_body(body.as_bytes()).retry_after_ms, retry_after_ms, "{body}");
    }

    #[test]
    fn what_others_said_is_read_where_it_is_quoted() {
        let openrouter = r#"{"error":{"code":429,"message":"no","metadata":{"headers":{"X-RateLimit-Remaining":"0","X-RateLimit-Reset":"1741305600000"}}}}"#;
        let error = of_body(openrouter.as_bytes());
        assert_eq!(error.headers.unwrap()["x-ratelimit-reset"], "1741305600000");
        let azure = r#"{"error":{"message":"no","code":null,"innererror":{"code":"ResponsibleAIPolicyViolation"}}}"#;
        assert_eq!(of_body(azure.as_bytes()).code, "ResponsibleAIPolicyViolation");
    }

    #[test]
    fn a_wait_is_read_wherever_an_error_has_it() {
        let google = r#"{"error":{"code":429,"message":"no","details":[{"violations":[]},{"retryDelay":"22.5s"}]}}"#;
        check(google, Some(22_500));
        check(&format!("[{google}]"), Some(22_500));
        check(r#"{"error":{"message":"no","retry_after":1.5}}"#, Some(1_500));
        check(r#"{"error":"no","retry_after":"2"}"#, Some(2_000));
        check(r#"{"message":"no","retry_after_ms":20}"#, Some(20));
        for nonsense in [r#"{"retry_after":-1}"#, r#"{"retry_after":"soon"}"#, r#"{"error":{"details":{}}}"#, "no"] {
            check(nonsense, None);
        }
    }
}
