//! Limits that the stand-in keeps, and how it tells of them. Never here: HTTP.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How limits are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `x-ratelimit-remaining-requests: 7`, `x-ratelimit-reset-requests: 1.5s`; a refusal says when to come again in words.
    OpenAi,
    /// `anthropic-ratelimit-requests-remaining: 7`, `…-reset:` and a time; a refusal comes with `retry-after`.
    Anthropic,
    /// `ratelimit-remaining: 7`, `ratelimit-reset: 2`, of calls only; a refusal comes with `retry-after-ms`.
    Plain,
}

/// Limits of a model and a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How they are told.
    pub style: Style,
    /// Calls in the window.
    pub requests: u32,
    /// Tokens in the window, of prompts and bounds of output.
    pub tokens: u32,
    /// The window in milliseconds: how long an empty bucket takes to be full.
    pub window_ms: u32,
}

impl Rate {
    /// Reads `STYLE:REQUESTS:TOKENS:WINDOW_MS`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let style = match parts.next()? {
            "openai" => Style::OpenAi,
            "anthropic" => Style::Anthropic,
            "plain" => Style::Plain,
            _ => return None,
        };
        let mut number = || parts.next()?.parse::<u32>().ok().filter(|number| *number > 0);
        Some(Self { style, requests: number()?, tokens: number()?, window_ms: number()? })
    }
}

/// What is left of limits, by key and model.
#[derive(Debug, Default)]
pub(crate) struct Limits(Mutex<BTreeMap<String, Left>>);

#[derive(Debug)]
struct Left {
    requests: f64,
    tokens: f64,
    at: Instant,
}

/// What a limit says to a call.
#[derive(Debug, PartialEq)]
pub(crate) struct Said {
    /// Why it is refused.
    pub(crate) refused: Option<String>,
    /// What every answer tells.
    pub(crate) headers: Vec<(String, String)>,
}

impl Limits {
    /// Asks for a call of so many tokens.
    pub(crate) fn ask(&self, who: &str, rate: &Rate, tokens: usize) -> Said {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (requests_max, tokens_max) = (f64::from(rate.requests), f64::from(rate.tokens));
        let full = || Left { requests: requests_max, tokens: tokens_max, at: Instant::now() };
        let left = all.entry(who.to_owned()).or_insert_with(full);
        let windows = left.at.elapsed().as_secs_f64() * 1_000.0 / f64::from(rate.window_ms);
        left.at = Instant::now();
        left.requests = (left.requests + windows * requests_max).min(requests_max);
        left.tokens = (left.tokens + windows * tokens_max).min(tokens_max);
        let wanted = f64::from(u32::try_from(tokens).unwrap_or(u32::MAX));
        let window_s = f64::from(rate.window_ms) / 1_000.0;
        let missing = ((1.0 - left.requests) / requests_max).max((wanted - left.tokens) / tokens_max);
        let refused = (missing > 0.0).then_some(missing * window_s);
        if refused.is_none() {
            (left.requests, left.tokens) = (left.requests - 1.0, left.tokens - wanted);
        }
        let mut headers = told(rate, left, window_s);
        let refused = refused.map(|wait_s| {
            headers.extend(asked(rate.style, wait_s));
            match rate.style {
                Style::OpenAi if wanted > tokens_max => format!(
                    "Request too large for this model on tokens per min (TPM): Limit {tokens_max}, Requested {wanted}. \
                     The input or output tokens must be reduced in order to run successfully."
                ),
                Style::OpenAi => format!("Rate limit reached. Please try again in {wait_s:.3}s."),
                Style::Anthropic | Style::Plain => "This request would exceed your rate limit.".to_owned(),
            }
        });
        Said { refused, headers }
    }
}

fn told(rate: &Rate, left: &Left, window_s: f64) -> Vec<(String, String)> {
    let row = |what: &str, limit: u32, left: f64| {
        let full_in_s = (1.0 - left / f64::from(limit)) * window_s;
        let (names, reset) = match rate.style {
            Style::OpenAi => (
                ["limit", "remaining", "reset"].map(|name| format!("x-ratelimit-{name}-{what}")),
                format!("{full_in_s:.3}s"),
            ),
            Style::Anthropic => (
                ["limit", "remaining", "reset"].map(|name| format!("anthropic-ratelimit-{what}-{name}")),
                time(full_in_s),
            ),
            Style::Plain => {
                (["limit", "remaining", "reset"].map(|name| format!("ratelimit-{name}")), format!("{full_in_s:.3}"))
            }
        };
        let [limit_name, left_name, reset_name] = names;
        [(limit_name, limit.to_string()), (left_name, format!("{}", left.floor())), (reset_name, reset)]
    };
    let tokens = (rate.style != Style::Plain).then(|| row("tokens", rate.tokens, left.tokens));
    row("requests", rate.requests, left.requests).into_iter().chain(tokens.into_iter().flatten()).collect()
}

/// How a refusal asks to come again.
fn asked(style: Style, wait_s: f64) -> Option<(String, String)> {
    match style {
        Style::OpenAi => None,
        Style::Anthropic => Some(("retry-after".to_owned(), format!("{wait_s:.3}"))),
        Style::Plain => Some(("retry-after-ms".to_owned(), format!("{:.0}", wait_s * 1_000.0))),
    }
}

fn time(in_s: f64) -> String {
    #[expect(clippy::disallowed_methods, reason = "a stand-in has no daemon")]
    let at = SystemTime::now() + Duration::from_secs_f64(in_s.max(0.0));
    humantime::format_rfc3339_millis(at).to_string()
}
