//! What a refusal or a broken call means: one table from status, code and words to a kind of failure, and one from the
//! kind to what follows from it.
//!
//! Never here: how long a provider asks to wait (`wait`), how often a job is tried (`genmill_core::judge`).

use crate::dialect::ProviderError;
use genmill_core::attempt::{Failure, FailureClass};
use std::ops::RangeInclusive;

/// The longest part of a provider's message that is kept, in bytes.
const MESSAGE_BYTES_MAX: usize = 500;

/// Kinds of failure of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The key was refused, or may not do this.
    Auth,
    /// The account cannot pay, or has used up what it may use for a long time.
    Quota,
    /// The model or the address is unknown.
    NotFound,
    /// Too many calls or tokens for now.
    Throttled,
    /// The provider has too much to do.
    Overloaded,
    /// The request is wrong.
    Invalid,
    /// What was asked or answered is not allowed.
    ContentFilter,
    /// Prompt and answer are longer than the model takes.
    ContextOverflow,
    /// A passing fault of the provider or of the network.
    Transient,
    /// Nothing came for too long.
    Timeout,
    /// The answer broke off.
    Cut,
    /// The same failure came again and again, to this job alone: its class is that of the failure.
    Repeated,
    /// It needs more tokens than its provider allows in a minute: no waiting helps.
    TooLarge,
    /// The answer is longer than what is kept of one.
    TooLong,
}

/// What follows from a kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The kind.
    pub kind: Kind,
    /// Its name in configuration files.
    pub name: &'static str,
    /// The class of the job's error, which decides whether the job is tried again.
    pub class: FailureClass,
    /// What happened, for a person.
    pub says: &'static str,
    /// What a person can do about it; may be empty.
    pub advice: &'static str,
}

/// What follows from each kind of failure. Classes that are retried: throttled, overloaded, transient, timeout, cut stream;
/// the others end the job. The wait is that of `genmill_core::judge` (1 s, doubled each time), at least as long as the
/// provider asks.
pub const POLICIES: &[Policy] = &[
    policy(Kind::Auth, "auth", FailureClass::Auth, "refused the key", "check the key and what it may do"),
    policy(
        Kind::Quota,
        "quota",
        FailureClass::Quota,
        "has no quota or credit left for this key",
        "check its plan and billing",
    ),
    policy(
        Kind::NotFound,
        "not_found",
        FailureClass::NotFound,
        "does not know the model",
        "check the model's name and the provider's base_url",
    ),
    policy(Kind::Throttled, "throttled", FailureClass::Throttled, "asked to slow down", ""),
    policy(Kind::Overloaded, "overloaded", FailureClass::Overloaded, "is overloaded", ""),
    policy(Kind::Invalid, "invalid", FailureClass::Invalid, "refused the request", ""),
    policy(
        Kind::ContentFilter,
        "content_filter",
        FailureClass::ContentFilter,
        "does not allow the content",
        "a content filter refused it: change the prompt",
    ),
    policy(
        Kind::ContextOverflow,
        "context_overflow",
        FailureClass::ContextOverflow,
        "cannot hold prompt and answer",
        "shorten the prompt, lower max_tokens, or take a model with a longer context",
    ),
    policy(Kind::Transient, "transient", FailureClass::Transient, "failed", ""),
    policy(Kind::Timeout, "timeout", FailureClass::Timeout, "took too long", ""),
    policy(Kind::Cut, "cut", FailureClass::CutStream, "broke off its answer", ""),
    policy(
        Kind::Repeated,
        "repeated",
        FailureClass::Transient,
        "failed in the very same way again",
        "another try would not help: change the request",
    ),
    policy(
        Kind::TooLarge,
        "too_large",
        FailureClass::Invalid,
        "allows fewer tokens in a minute than this request needs",
        "shorten the prompt, lower max_tokens, or have the limit raised",
    ),
    policy(
        Kind::TooLong,
        "too_long",
        FailureClass::Invalid,
        "wrote more than is kept of an answer",
        "lower max_tokens, n or logprobs",
    ),
];

const fn policy(
    kind: Kind,
    name: &'static str,
    class: FailureClass,
    says: &'static str,
    advice: &'static str,
) -> Policy {
    Policy { kind, name, class, says, advice }
}

impl Kind {
    /// What follows from it.
    #[must_use]
    pub fn policy(self) -> &'static Policy {
        // A test holds that every kind has its row.
        POLICIES.iter().find(|policy| policy.kind == self).unwrap_or(&POLICIES[0])
    }
}

/// A rule of [`RULES`].
#[derive(Debug)]
struct Rule {
    statuses: RangeInclusive<u16>,
    /// The provider's codes that it is about.
    codes: &'static [&'static str],
    /// Words of its message, in small letters, that it is about.
    words: &'static [&'static str],
    kind: Kind,
}

/// Codes of an account that must be paid for first. They come with 429 or 403, but no waiting helps.
const QUOTA_CODES: &[&str] = &[
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "insufficient_balance",
    "exceeded_current_quota_error",
];
const QUOTA_WORDS: &[&str] = &["credit balance is too low", "insufficient credits", "insufficient balance"];

const CONTEXT_CODES: &[&str] = &["context_length_exceeded", "string_above_max_length", "context_window_exceeded"];
const CONTEXT_WORDS: &[&str] = &[
    "maximum context length",
    "context length exceeded",
    "exceeds the context",
    "exceed context limit",
    "context window",
    "prompt is too long",
    "input is too long",
    "exceeds the maximum number of tokens",
    "`inputs` must have less than",
    "inputs tokens + max_new_tokens",
    "inputs` tokens + `max_new_tokens",
];

const FILTER_CODES: &[&str] =
    &["content_filter", "content_policy_violation", "responsibleaipolicyviolation", "moderation_blocked"];
const FILTER_WORDS: &[&str] =
    &["content management policy", "safety system", "flagged", "content policy", "moderation"];

const OVERLOAD_CODES: &[&str] =
    &["overloaded_error", "engine_overloaded_error", "engine_overloaded", "unavailable", "model_overloaded"];
const OVERLOAD_WORDS: &[&str] = &["overloaded", "at capacity", "over capacity", "no available capacity"];

/// Codes that say "slow down" where the status does not.
const THROTTLED_CODES: &[&str] =
    &["rate_limit_exceeded", "rate_limit_error", "too_many_requests", "rate_limit_reached", "throttlingexception"];

/// Codes that say the request is wrong where the status does not.
const INVALID_CODES: &[&str] = &["invalid_request_error", "invalid_argument", "validationexception"];

/// Said of a request that no waiting makes fit, in the words and with the status of one that came too early.
const TOO_LARGE_WORDS: &[&str] = &[
    "request too large for",
    "tokens must be reduced in order to run successfully",
    "reduce your message size and try again",
];

/// The code of an error that this worker makes itself of an answer that is too long.
pub(crate) const ANSWER_TOO_LONG: &str = "answer_too_long";

const MODEL_CODES: &[&str] = &["model_not_found", "deploymentnotfound", "model_not_supported"];

/// Any failure of the status.
const ANY: &[&str] = &[];

/// From status, code and words to a kind; the first that fits counts. Statuses below 300 stand for errors that came in the
/// middle of an answer and name no status of their own.
const RULES: &[Rule] = &[
    rule(0..=999, QUOTA_CODES, QUOTA_WORDS, Kind::Quota),
    rule(0..=499, FILTER_CODES, ANY, Kind::ContentFilter),
    rule(400..=403, ANY, FILTER_WORDS, Kind::ContentFilter),
    rule(0..=428, CONTEXT_CODES, CONTEXT_WORDS, Kind::ContextOverflow),
    rule(400..=404, MODEL_CODES, ANY, Kind::NotFound),
    rule(0..=429, ANY, TOO_LARGE_WORDS, Kind::TooLarge),
    rule(0..=299, &[ANSWER_TOO_LONG], ANY, Kind::TooLong),
    rule(0..=299, THROTTLED_CODES, ANY, Kind::Throttled),
    rule(0..=299, OVERLOAD_CODES, OVERLOAD_WORDS, Kind::Overloaded),
    rule(0..=299, INVALID_CODES, ANY, Kind::Invalid),
    rule(0..=299, ANY, ANY, Kind::Transient),
    rule(300..=399, ANY, ANY, Kind::Invalid),
    rule(401..=401, ANY, ANY, Kind::Auth),
    rule(402..=402, ANY, ANY, Kind::Quota),
    rule(403..=403, ANY, ANY, Kind::Auth),
    rule(404..=404, ANY, ANY, Kind::NotFound),
    rule(408..=409, ANY, ANY, Kind::Transient),
    rule(424..=425, ANY, ANY, Kind::Transient),
    rule(429..=429, ANY, ANY, Kind::Throttled),
    // Cohere: a word that its lists forbid; a call that was given up.
    rule(498..=498, ANY, ANY, Kind::ContentFilter),
    rule(499..=499, ANY, ANY, Kind::Transient),
    rule(400..=499, ANY, ANY, Kind::Invalid),
    rule(529..=529, ANY, ANY, Kind::Overloaded),
    rule(500..=599, OVERLOAD_CODES, OVERLOAD_WORDS, Kind::Overloaded),
    rule(500..=999, ANY, ANY, Kind::Transient),
];

const fn rule(
    statuses: RangeInclusive<u16>,
    codes: &'static [&'static str],
    words: &'static [&'static str],
    kind: Kind,
) -> Rule {
    Rule { statuses, codes, words, kind }
}

impl Rule {
    fn fits(&self, status: u16, code: &str, message: &str) -> bool {
        let says = self.codes.contains(&code) || self.words.iter().any(|word| message.contains(word));
        self.statuses.contains(&status) && (says || (self.codes.is_empty() && self.words.is_empty()))
    }
}

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of failure.
    pub kind: Kind,
    /// What happened and what to do about it, for a person.
    pub message: String,
    /// How long the provider asks to wait, in milliseconds.
    pub asked_ms: Option<u64>,
    /// What tells this failure from others of the same job: set where coming again the same would be no chance.
    pub mark: Option<String>,
    /// The kind of a failure that ends the job because it came again.
    pub again: Option<Kind>,
    /// The message without what the provider said, where it said anything: that may quote the prompt.
    pub unquoted: Option<String>,
}

impl Fault {
    /// A failure that the worker saw itself; `what` happened to a call of `provider`.
    #[must_use]
    pub fn new(kind: Kind, provider: &str, what: &str) -> Self {
        Self {
            kind,
            message: joined(format!("{provider} {what}"), "", kind),
            asked_ms: None,
            mark: None,
            again: None,
            unquoted: None,
        }
    }

    /// The same failure with what tells it from others.
    #[must_use]
    pub fn marked(self, mark: String) -> Self {
        Self { mark: Some(mark), ..self }
    }

    /// The same failure with the wait that the provider asks for.
    #[must_use]
    pub fn asked_ms(self, asked_ms: Option<u64>) -> Self {
        Self { asked_ms, ..self }
    }

    /// The same failure as one that ends the job, because it came again.
    #[must_use]
    pub fn repeated(self) -> Self {
        let policy = Kind::Repeated.policy();
        let with = |message: String| format!("{message}; it {}: {}", policy.says, policy.advice);
        let (message, unquoted) = (with(self.message), self.unquoted.map(with));
        Self { kind: Kind::Repeated, message, asked_ms: None, mark: None, again: Some(self.kind), unquoted }
    }

    /// The same failure as one of a request that is larger than all that may be asked for in a minute.
    #[must_use]
    pub fn too_large(self, tokens: u64, limit: u64) -> Self {
        let policy = Kind::TooLarge.policy();
        let with = |message: String| {
            format!("{message}; it {}, {tokens} (estimated) and not {limit}: {}", policy.says, policy.advice)
        };
        let (message, unquoted) = (with(self.message), self.unquoted.map(with));
        Self { kind: Kind::TooLarge, message, asked_ms: None, mark: None, again: None, unquoted }
    }

    /// The failure as the queue takes it.
    #[must_use]
    pub fn into_failure(self) -> Failure {
        let class = self.again.unwrap_or(self.kind).policy().class;
        let failure = Failure::new(class, self.message).retry_after_ms(self.asked_ms).unquoted(self.unquoted);
        if self.again.is_some() { failure.lasting() } else { failure }
    }
}

/// What a provider's error means. `status` is that of the HTTP reply; one that the error names itself counts more.
#[must_use]
pub fn classify(provider: &str, status: u16, error: &ProviderError) -> Fault {
    let status = error.status.unwrap_or(status);
    let (code, message) = (error.code.to_lowercase(), error.message.to_lowercase());
    let found = RULES.iter().find(|rule| rule.fits(status, &code, &message));
    let kind = found.map_or(Kind::Transient, |rule| rule.kind);
    let headline = headline(provider, status, error, kind);
    let unquoted = (!error.message.is_empty()).then(|| joined(headline.clone(), "", kind));
    let told = joined(headline, &error.message, kind);
    // Servers that are down say the same of every call; one that says what broke may have met it in this one.
    let own = kind == Kind::Transient && (status < 300 || status == 500) && !error.message.is_empty();
    let mark = own.then(|| format!("{status} {code} {}", without_digits(&message)));
    Fault { kind, message: told, asked_ms: None, mark, again: None, unquoted }
}

/// What happened, with status and code.
fn headline(provider: &str, status: u16, error: &ProviderError, kind: Kind) -> String {
    let says = if status < 300 && kind == Kind::Transient { "failed while it answered" } else { kind.policy().says };
    // A code that only repeats the status says nothing.
    let code = Some(shortened(&error.code)).filter(|code| !code.is_empty() && *code != status.to_string());
    let status = (status >= 300).then(|| format!("HTTP {status}"));
    let shown: Vec<&str> = status.as_deref().into_iter().chain(code).collect();
    if shown.is_empty() { format!("{provider} {says}") } else { format!("{provider} {says} ({})", shown.join(", ")) }
}

/// What happened, what the provider said of it, and what to do.
fn joined(what: String, said: &str, kind: Kind) -> String {
    let mut message = what;
    for part in [shortened(said), kind.policy().advice] {
        if !part.is_empty() {
            message = format!("{message}: {part}");
        }
    }
    message
}

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)]
}

/// Without what differs from call to call: ids and counts.
fn without_digits(text: &str) -> String {
    let word = |word: &&str| !word.contains(|c: char| c.is_ascii_digit());
    text.split_whitespace().filter(word).collect::<Vec<_>>().join(" ")
}

/// The same error without any of `hidden`: providers quote keys and prompts.
#[must_use]
pub fn redact<'a>(error: ProviderError, hidden: impl Iterator<Item = &'a str>) -> ProviderError {
    // Words as short as this are no secret, and replacing them would make the message unreadable.
    let hidden = hidden.filter(|hidden| hidden.len() >= 8);
    let message = hidden.fold(error.message, |message, hidden| message.replace(hidden, "[…]"));
    ProviderError { message, ..error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &str, message: &str) -> ProviderError {
        ProviderError { code: code.to_owned(), message: message.to_owned(), ..ProviderError::default() }
    }

    fn check(status: u16, code: &str, kind: Kind) {
        assert_eq!(classify("groq", status, &error(code, "no")).kind, kind, "{status} {code}");
    }

    fn check_said(status: u16, message: &str, kind: Kind) {
        assert_eq!(classify("groq", status, &error("", message)).kind, kind, "{status} {message}");
    }

    #[test]
    fn every_kind_has_its_row() {
        // One name for each, so that a new one is not forgotten here.
        let kinds = [
            Kind::Auth,
            Kind::Quota,
            Kind::NotFound,
            Kind::Throttled,
            Kind::Overloaded,
            Kind::Invalid,
            Kind::ContentFilter,
            Kind::ContextOverflow,
            Kind::Transient,
            Kind::Timeout,
            Kind::Cut,
            Kind::Repeated,
            Kind::TooLarge,
            Kind::TooLong,
        ];
        assert_eq!(kinds.map(|kind| kind.policy().kind), kinds);
        assert_eq!(POLICIES.len(), kinds.len());
        let retried = kinds.into_iter().filter(|kind| *kind != Kind::Repeated && kind.policy().class.is_retried());
        let expect = [Kind::Throttled, Kind::Overloaded, Kind::Transient, Kind::Timeout, Kind::Cut];
        assert_eq!(retried.collect::<Vec<_>>(), expect);
    }

    #[test]
    fn a_wrong_request_is_told_from_one_that_does_not_fit_or_is_not_allowed() {
        for status in [301, 400, 405, 413, 422, 451] {
            check(status, "", Kind::Invalid);
        }
        check(404, "model_not_found", Kind::NotFound);
        check(400, "DeploymentNotFound", Kind::NotFound);
        check(400, "context_length_exceeded", Kind::ContextOverflow);
        check_said(400, "prompt is too long: 250000 tokens > 200000 maximum", Kind::ContextOverflow);
        check_said(400, "This model's maximum context length is 8192 tokens.", Kind::ContextOverflow);
        check_said(
            400,
            "The input token count (2) exceeds the maximum number of tokens allowed (1).",
            Kind::ContextOverflow,
        );
        check_said(
            422,
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096",
            Kind::ContextOverflow,
        );
        check(400, "content_filter", Kind::ContentFilter);
        check_said(
            400,
            "The response was filtered due to Azure OpenAI's content management policy",
            Kind::ContentFilter,
        );
        check_said(403, "Your chosen model requires moderation and your input was flagged", Kind::ContentFilter);
        check(498, "", Kind::ContentFilter);
    }

    #[test]
    fn a_refused_key_or_an_empty_account_is_not_retried() {
        check(401, "invalid_api_key", Kind::Auth);
        check(403, "", Kind::Auth);
        check(402, "", Kind::Quota);
        check(429, "insufficient_quota", Kind::Quota);
        check(200, "insufficient_quota", Kind::Quota);
        check_said(400, "Your credit balance is too low to access the Anthropic API.", Kind::Quota);
    }

    #[test]
    fn a_request_that_no_waiting_makes_fit_is_told_from_one_that_came_too_early() {
        for (status, said) in [
            (
                429,
                "Request too large for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Requested 41234. The input or output tokens must be reduced in order to run successfully.",
            ),
            (
                413,
                "Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 9000, please reduce your message size and try again.",
            ),
        ] {
            let fault = classify("groq", status, &error("rate_limit_exceeded", said));
            assert_eq!((fault.kind, fault.into_failure().class), (Kind::TooLarge, FailureClass::Invalid), "{said}");
        }
        let early = "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000, Requested 4000.";
        check_said(429, early, Kind::Throttled);
    }

    #[test]
    fn what_passes_is_retried() {
        check(429, "rate_limit_exceeded", Kind::Throttled);
        check_said(429, "Too many tokens, please wait before trying again.", Kind::Throttled);
        check(529, "overloaded_error", Kind::Overloaded);
        check(503, "UNAVAILABLE", Kind::Overloaded);
        check_said(503, "The model is currently overloaded.", Kind::Overloaded);
        for status in [408, 409, 424, 425, 499, 500, 502, 503, 504, 524, 599] {
            check(status, "", Kind::Transient);
        }
    }

    #[test]
    fn an_error_within_an_answer_is_told_by_its_code() {
        check(200, "", Kind::Transient);
        check(200, "server_error", Kind::Transient);
        check(200, "rate_limit_exceeded", Kind::Throttled);
        check(200, "overloaded_error", Kind::Overloaded);
        check(200, "context_length_exceeded", Kind::ContextOverflow);
        check(200, "invalid_request_error", Kind::Invalid);
        let own = ProviderError { status: Some(403), ..error("403", "no") };
        assert_eq!(classify("openrouter", 200, &own).kind, Kind::Auth);
    }

    #[test]
    fn the_message_tells_a_person_what_happened_and_what_to_do() {
        let said = |status, code: &str| classify("groq", status, &error(code, "no")).message;
        assert_eq!(said(429, "rate_limit_exceeded"), "groq asked to slow down (HTTP 429, rate_limit_exceeded): no");
        assert_eq!(
            said(402, "402"),
            "groq has no quota or credit left for this key (HTTP 402): no: check its plan and billing"
        );
        assert_eq!(said(200, "server_error"), "groq failed while it answered (server_error): no");
        let long = error("", &"é".repeat(10_000));
        assert!(classify("groq", 500, &long).message.len() < 600);
        let again = classify("groq", 500, &error("", "no")).repeated();
        assert!(again.message.starts_with("groq failed (HTTP 500): no; it failed in the very same way again: "));
        let failure = again.into_failure();
        assert_eq!((failure.class, failure.is_retried()), (FailureClass::Transient, false));
        let cut = Fault::new(Kind::Cut, "groq", "broke off").repeated().into_failure();
        assert_eq!((cut.class, cut.is_retried()), (FailureClass::CutStream, false));
    }

    #[test]
    fn only_what_may_lie_in_the_request_is_told_from_other_failures() {
        let mark = |status, message: &str| classify("x", status, &error("", message)).mark;
        assert!(mark(500, "assertion failed").is_some());
        assert_eq!(mark(500, "request 4f1a broke"), mark(500, "request 77c2 broke"));
        assert_ne!(mark(500, "a"), mark(500, "b"));
        assert_eq!(
            [mark(500, ""), mark(503, "down"), mark(429, "slow"), mark(502, "bad gateway")],
            [const { None }; 4]
        );
    }

    #[test]
    fn what_a_provider_says_is_told_to_the_caller_and_not_to_the_log() {
        let failure = |fault: Fault| {
            let failure = fault.into_failure();
            (failure.message.contains("secret"), failure.loggable().to_owned())
        };
        let fault = || classify("groq", 500, &error("server_error", "cannot read 'my secret'"));
        let failed = "groq failed (HTTP 500, server_error)".to_owned();
        assert_eq!(failure(fault()), (true, failed.clone()));
        let (told, logged) = failure(fault().repeated());
        assert!(told && logged.starts_with(&failed) && !logged.contains("secret"), "{logged}");
        let own = Fault::new(Kind::Transient, "groq", "cannot be connected to").into_failure();
        assert_eq!(own.loggable(), own.message);
    }

    #[test]
    fn keys_and_prompts_are_cut_out() {
        let error = error("", "bad key sk-0123456789 for 'a b'");
        assert_eq!(redact(error, ["sk-0123456789", "a b"].into_iter()).message, "bad key […] for 'a b'");
    }
}
