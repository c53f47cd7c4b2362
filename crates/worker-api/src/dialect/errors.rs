//! Errors as providers tell them, in any of the shapes that are found at large. Never here: what they mean (`classify`).

use super::ProviderError;
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
    let message = inner.as_str().or_else(|| inner["message"].as_str()).or_else(|| value["message"].as_str());
    ProviderError {
        status: code.and_then(status_of),
        code: code.map(|code| code.as_str().map_or_else(|| code.to_string(), str::to_owned)).unwrap_or_default(),
        message: message.map_or_else(|| detail(value), str::to_owned),
        retry_after_ms: None,
    }
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
