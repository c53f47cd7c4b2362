//! The connections to providers. Never here: what is sent over them.

use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Url};
use std::error::Error;
use std::time::Duration;

/// How long an unused connection is kept, which is less than most servers keep theirs.
const IDLE: Duration = Duration::from_secs(50);

/// Pools of connections, shared by all calls.
#[derive(Clone, Debug)]
pub struct Http {
    outside: Client,
    /// Servers on this machine: never through a proxy.
    loopback: Client,
}

impl Http {
    /// Makes the pools. TLS must have its cryptography by then (`genmill_daemon::tls::install`).
    ///
    /// # Errors
    /// When the settings of the system's proxy are malformed.
    pub fn new(connect_timeout: Duration) -> reqwest::Result<Self> {
        // Redirections are not followed: a key is meant for the configured host alone.
        let base =
            || Client::builder().connect_timeout(connect_timeout).pool_idle_timeout(IDLE).redirect(Policy::none());
        match base().build() {
            Ok(outside) => Ok(Self { outside, loopback: base().no_proxy().build()? }),
            Err(error) => {
                tracing::warn!(
                    problem = %Trouble::of(&error),
                    "providers on https cannot be reached; is the package ca-certificates installed?"
                );
                let bare = |builder: ClientBuilder| builder.tls_certs_only([]).build();
                Ok(Self { outside: bare(base())?, loopback: bare(base().no_proxy())? })
            }
        }
    }

    /// The pool for a URL.
    #[must_use]
    pub fn client(&self, url: &Url) -> &Client {
        if is_loopback(url) { &self.loopback } else { &self.outside }
    }
}

/// Whether a URL leads to this machine.
fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// What went wrong with a connection, for a person: the innermost cause without the URL, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    cause: String,
    advice: &'static str,
}

/// What causes say that a person can do something about, in small letters.
const ADVICE: &[(&[&str], &str)] = &[
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
    pub fn of(error: &reqwest::Error) -> Self {
        let chain: Vec<String> =
            std::iter::successors(Some(error as &(dyn Error + 'static)), |error| (*error).source())
                .map(ToString::to_string)
                .collect();
        let cause = match chain.last() {
            Some(_) if chain.len() == 1 && error.is_timeout() => "it took too long".to_owned(),
            Some(cause) => cause.clone(),
            None => String::new(),
        };
        // The outermost text has the URL, whose words mean nothing here.
        let told = chain.get(1..).unwrap_or_default().join(" ").to_lowercase();
        let known = ADVICE.iter().find(|(signs, _)| signs.iter().any(|sign| told.contains(sign)));
        Self { cause, advice: known.map_or("", |(_, advice)| *advice) }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.cause)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, ": {}", self.advice) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url: &str, loopback: bool) {
        assert_eq!(is_loopback(&Url::parse(url).unwrap()), loopback, "{url}");
    }

    #[test]
    fn this_machine_is_told_from_others() {
        check("http://localhost:1234/v1", true);
        check("http://127.0.0.2", true);
        check("http://[::1]:80/", true);
        check("https://api.openai.com/v1", false);
        check("http://localhost.example.com", false);
    }
}
