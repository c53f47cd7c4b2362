//! The connections to providers. Never here: what is sent over them.

use crate::auth::tokens::Tokens;
use crate::catalog::Endpoint;
use crate::failure::{Fault, Kind};
use crate::guard::Guarded;
use genmill_daemon::config;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, ClientBuilder, Proxy, Request, RequestBuilder, Response, StatusCode, Url};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long an unused connection is kept, which is less than most servers keep theirs.
const IDLE: Duration = Duration::from_secs(50);

/// How connections are made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// Through what connections to other machines go; `None`: through what `HTTPS_PROXY` and the like name.
    pub proxy: Option<String>,
    /// A file of certificates (PEM) that are trusted beside those of the system.
    pub ca_file: Option<PathBuf>,
}

impl Settings {
    /// The settings of a configuration.
    #[must_use]
    pub fn of(api: &config::Api) -> Self {
        let connect_timeout = Duration::from_millis(api.connect_timeout_ms);
        Self { connect_timeout, proxy: api.proxy.clone(), ca_file: api.ca_file.clone() }
    }
}

/// Pools of connections, shared by all calls.
#[derive(Clone, Debug)]
pub struct Http {
    outside: Client,
    /// Servers on this machine: never through a proxy.
    loopback: Client,
    tokens: Arc<Tokens>,
}

/// Why connections cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The file of certificates is none.
    #[error("api.ca_file: cannot read certificates (PEM) from {}", file.display())]
    CaFile {
        /// The file.
        file: PathBuf,
        /// Why, when it cannot be read at all.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The proxy is none, or that of the system is malformed.
    #[error("api.proxy, or a variable such as HTTPS_PROXY, is no address of a proxy")]
    Proxy(#[source] reqwest::Error),
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Unsent {
    /// It could not be proven who calls.
    Fault(Fault),
    /// The connection failed.
    Lost(reqwest::Error),
}

impl Http {
    /// Makes the pools. TLS must have its cryptography by then (`genmill_daemon::tls::install`).
    ///
    /// # Errors
    /// [`HttpError`] when a setting is wrong.
    pub fn new(settings: &Settings) -> Result<Self, HttpError> {
        let certificates = settings.ca_file.as_deref().map(certificates).transpose()?.unwrap_or_default();
        let proxy = settings.proxy.as_deref().map(Proxy::all).transpose().map_err(HttpError::Proxy)?;
        // Redirections are not followed: a key is meant for the configured host alone.
        let base = || {
            let builder = Client::builder().connect_timeout(settings.connect_timeout).pool_idle_timeout(IDLE);
            let builder = builder.redirect(Policy::none()).dns_resolver(Guarded);
            if certificates.is_empty() { builder } else { builder.tls_certs_merge(certificates.clone()) }
        };
        let outside = || proxy.clone().into_iter().fold(base(), ClientBuilder::proxy);
        let made = |outside, loopback| Self { outside, loopback, tokens: Arc::default() };
        match outside().build() {
            Ok(client) => Ok(made(client, base().no_proxy().build().map_err(HttpError::Proxy)?)),
            Err(error) => {
                tracing::warn!(
                    problem = %Trouble::of(&error),
                    "providers on https cannot be reached; is the package ca-certificates installed?"
                );
                let bare = |builder: ClientBuilder| {
                    builder.tls_certs_only(certificates.clone()).build().map_err(HttpError::Proxy)
                };
                Ok(made(bare(outside())?, bare(base().no_proxy())?))
            }
        }
    }

    /// The tokens of all providers.
    #[must_use]
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Sends a request to a provider, proven by its credentials.
    pub(crate) async fn send(&self, endpoint: &Endpoint, request: RequestBuilder) -> Result<Response, Unsent> {
        let request = request.build().map_err(Unsent::Lost)?;
        // Whatever was put together, a key leaves for the host alone that it is bound to.
        if request.url().origin() != endpoint.base_url.origin() {
            return Err(Unsent::Fault(Fault::new(Kind::Invalid, &endpoint.name, "was to be called at another host")));
        }
        let spare = request.try_clone().filter(|_| endpoint.credentials.are_exchanged());
        let response = self.execute(endpoint, request).await?;
        match spare {
            // A token may be taken back before its time: another one is asked for once.
            Some(again) if response.status() == StatusCode::UNAUTHORIZED => {
                self.tokens.forget(&endpoint.name);
                self.execute(endpoint, again).await
            }
            _ => Ok(response),
        }
    }

    async fn execute(&self, endpoint: &Endpoint, mut request: Request) -> Result<Response, Unsent> {
        let proven = endpoint.credentials.prove(&endpoint.name, endpoint.key_header(), &mut request, self);
        proven.await.map_err(Unsent::Fault)?;
        self.client(&endpoint.base_url).execute(request).await.map_err(Unsent::Lost)
    }

    /// The pool for a URL.
    #[must_use]
    pub fn client(&self, url: &Url) -> &Client {
        if is_loopback(url) { &self.loopback } else { &self.outside }
    }
}

/// The certificates of a file.
fn certificates(file: &Path) -> Result<Vec<Certificate>, HttpError> {
    let bad = |source: Box<dyn Error + Send + Sync>| HttpError::CaFile { file: file.to_owned(), source };
    let text = std::fs::read(file).map_err(|error| bad(error.into()))?;
    let found = Certificate::from_pem_bundle(&text).map_err(|error| bad(error.into()))?;
    if found.is_empty() { Err(bad("there is no certificate in it".into())) } else { Ok(found) }
}

/// Whether a URL leads to this machine.
pub(crate) fn is_loopback(url: &Url) -> bool {
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
