//! The rules that a request's parameters keep. Never here: its length, which depends on the tokens of its prompt.

use crate::engine::{EngineOptions, Prompt, Request, SubmitError};

/// Checks what can be checked without the prompt's tokens; `vocabulary` is how many tokens the model knows.
pub(super) fn parameters(request: &Request, options: &EngineOptions, vocabulary: usize) -> Result<(), SubmitError> {
    sampling(request)?;
    shaping(request, vocabulary)?;
    let most = options.places();
    rule("samples", (1..=most).contains(&request.samples), || {
        format!("is {}; this engine has room for 1 to {most}", request.samples)
    })?;
    for (parameter, asked) in [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)] {
        let most = Request::LOGPROBS_MAX;
        rule(parameter, asked.is_none_or(|top| top <= most), || format!("asks for more than the {most} best tokens"))?;
    }
    let echoes = !request.echo || matches!(request.prompt, Prompt::Text(_));
    rule("echo", echoes, || "needs a prompt that is text".to_owned())
}

fn sampling(request: &Request) -> Result<(), SubmitError> {
    let Request { max_tokens, temperature, top_p, min_p, stop, .. } = request;
    rule("max_tokens", *max_tokens > 0, || "is 0; it must be at least 1".to_owned())?;
    rule("temperature", temperature.is_finite() && *temperature >= 0.0, || {
        format!("is {temperature}; it must be 0 or more")
    })?;
    rule("top_p", *top_p > 0.0 && *top_p <= 1.0, || format!("is {top_p}; it must be above 0 and at most 1"))?;
    rule("min_p", (0.0..=1.0).contains(min_p), || format!("is {min_p}; it must be 0 to 1"))?;
    rule("stop", !stop.iter().any(String::is_empty), || "has an empty string".to_owned())
}

fn shaping(request: &Request, vocabulary: usize) -> Result<(), SubmitError> {
    let shaping = &request.shaping;
    for (parameter, penalty) in
        [("frequency_penalty", shaping.frequency_penalty), ("presence_penalty", shaping.presence_penalty)]
    {
        rule(parameter, penalty.is_finite(), || format!("is {penalty}; it must be a number"))?;
    }
    let penalty = shaping.repetition_penalty;
    rule("repetition_penalty", penalty.is_finite() && penalty > 0.0, || format!("is {penalty}; it must be above 0"))?;
    let free = request.form.is_none() || shaping.min_tokens == 0 && !request.ignore_end;
    rule("form", free, || "tells where the text ends, so it cannot go with min_tokens or ignore_end".to_owned())?;
    rule("min_tokens", shaping.min_tokens <= request.max_tokens, || {
        format!("is {}, more than max_tokens {}", shaping.min_tokens, request.max_tokens)
    })?;
    rule("logit_bias", shaping.logit_bias.values().all(|bias| bias.is_finite()), || {
        "has a bias that is no number".to_owned()
    })?;
    let unknown = |token: &&u32| **token as usize >= vocabulary;
    for (parameter, unknown) in [
        ("logit_bias", shaping.logit_bias.keys().find(unknown)),
        ("stop_tokens", request.stop_tokens.iter().find(unknown)),
    ] {
        rule(parameter, unknown.is_none(), || {
            format!("names token {}; the model knows {vocabulary}", unknown.copied().unwrap_or_default())
        })?;
    }
    Ok(())
}

fn rule(parameter: &'static str, kept: bool, reason: impl FnOnce() -> String) -> Result<(), SubmitError> {
    if kept { Ok(()) } else { Err(SubmitError::Parameter { parameter, reason: reason() }) }
}
