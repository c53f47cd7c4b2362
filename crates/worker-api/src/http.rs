//! The connections to providers. Never here: what is sent over them.

use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Url};
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
                    problem = cause(&error),
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

/// What went wrong with a connection, in words: the innermost cause, without the URL.
#[must_use]
pub fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    if std::ptr::addr_eq(cause, error) && error.is_timeout() {
        "it took too long".to_owned()
    } else {
        cause.to_string()
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
