//! What went wrong with a connection, for a person. Never here: what follows from it (`failure`).

use super::Lost;
use std::error::Error;

/// What went wrong with a connection, for a person: the innermost cause, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    cause: String,
    advice: &'static str,
}

/// What causes say that a person can do something about, in small letters.
const ADVICE: &[(&[&str], &str)] = &[
    (&["never called"], "check base_url"),
    (
        &["dns error", "failed to lookup address", "name or service not known", "no such host"],
        "its name has no address: check base_url, the network and its name server (DNS)",
    ),
    (
        &["unknownissuer", "unknown issuer", "self-signed", "unknownca", "unknown ca"],
        "its certificate is of an authority that is not known here: name that in api.ca_file",
    ),
    (
        &["certificate", "notvalidforname", "expired"],
        "its certificate is not good: check base_url and this machine's clock",
    ),
    (&["corrupt message", "invalidcontenttype", "wrong version", "tls"], "it does not speak TLS there: check base_url"),
    (&["proxy", "tunnel"], "the proxy refuses: check HTTPS_PROXY and NO_PROXY, or api.proxy"),
    (&["connection refused"], "nothing listens there: check base_url, and that the server runs"),
];

impl Trouble {
    /// What went wrong.
    #[must_use]
    pub fn of(lost: &Lost) -> Self {
        let outermost: &(dyn Error + 'static) = &*lost.source;
        let chain: Vec<String> =
            std::iter::successors(Some(outermost), |error| (*error).source()).map(ToString::to_string).collect();
        let told = chain.join(" ").to_lowercase();
        let known = ADVICE.iter().find(|(signs, _)| signs.iter().any(|sign| told.contains(sign)));
        Self { cause: chain.last().cloned().unwrap_or_default(), advice: known.map_or("", |(_, advice)| *advice) }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.cause)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, ": {}", self.advice) }
    }
}
