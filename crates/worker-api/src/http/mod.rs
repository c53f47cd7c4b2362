//! How providers are reached: connections that are kept and shared, with TLS, through proxies, proven by credentials.
//!
//! HTTP/1.1 is spoken by code of our own, so that thousands of calls can wait for their answers at once
//! (docs/decisions/0013); HTTP/2 is spoken by h2, TLS by rustls; names and proxies are hyper's.
//!
//! Never here: what is sent to providers, and what follows from what they answer.

mod connect;
mod framing;
mod http1;
mod http2;
mod message;
mod pool;
mod tasks;
mod trouble;

pub(crate) use message::Stage;
pub use message::{Lost, Request, Response};
pub use trouble::Trouble;

use crate::auth::tokens::Tokens;
use crate::catalog::Endpoint;
use crate::failure::{Fault, Kind};
use connect::Connector;
use genmill_daemon::config;
use genmill_daemon::secret::Secret;
use http::StatusCode;
use http::header::AUTHORIZATION;
use pool::Pool;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use url::Url;

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

/// The connections to all providers, shared by all calls.
#[derive(Clone, Debug)]
pub struct Http {
    pool: Arc<Pool>,
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
    /// The proxy is none.
    #[error("api.proxy is no address of a proxy: write http://HOST:PORT, or https://HOST:PORT")]
    Proxy,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Unsent {
    /// It could not be proven who calls.
    Fault(Fault),
    /// The connection failed.
    Lost(Lost),
}

impl From<Lost> for Unsent {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl Http {
    /// Makes the pool. TLS must have its cryptography by then (`genmill_daemon::tls::install`).
    ///
    /// # Errors
    /// [`HttpError`] when a setting is wrong.
    pub fn new(settings: &Settings) -> Result<Self, HttpError> {
        Ok(Self { pool: Arc::new(Pool::new(Connector::new(settings)?)), tokens: Arc::default() })
    }

    /// The tokens of all providers.
    #[must_use]
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Sends a request to a provider, proven by its credentials. Redirections are answers like others: a key is meant for
    /// the configured host alone.
    pub(crate) async fn send(&self, endpoint: &Endpoint, mut request: Request) -> Result<Response, Unsent> {
        // Whatever was put together, a key leaves for the host alone that it is bound to.
        if request.url.origin() != endpoint.base_url.origin() {
            return Err(Unsent::Fault(Fault::new(Kind::Invalid, &endpoint.name, "was to be called at another host")));
        }
        let spare = endpoint.credentials.are_exchanged().then(|| request.clone());
        self.prove(endpoint, &mut request).await?;
        let token = spare.as_ref().and_then(|_| token_of(&request));
        let response = self.send_unproven(request).await?;
        match spare {
            // A token may be taken back before its time: another one is asked for once.
            Some(mut again) if response.status() == StatusCode::UNAUTHORIZED => {
                token.iter().for_each(|token| self.tokens.forget(token));
                self.prove(endpoint, &mut again).await?;
                Ok(self.send_unproven(again).await?)
            }
            _ => Ok(response),
        }
    }

    async fn prove(&self, endpoint: &Endpoint, request: &mut Request) -> Result<(), Unsent> {
        let proven = endpoint.credentials.prove(&endpoint.name, endpoint.key_header(), request, self);
        proven.await.map_err(Unsent::Fault)
    }

    /// Sends a request as it is.
    pub(crate) async fn send_unproven(&self, request: Request) -> Result<Response, Lost> {
        self.pool.send(request).await
    }

    /// How many connections to a URL's host serve nobody.
    #[cfg(test)]
    fn idle(&self, url: &str) -> usize {
        self.pool.idle(&Url::parse(url).unwrap())
    }
}

/// The token by which a request is proven.
fn token_of(request: &Request) -> Option<Secret> {
    let told = request.headers.get(AUTHORIZATION)?.to_str().ok()?;
    told.strip_prefix("Bearer ").map(|token| Secret::new(token.to_owned()))
}

/// Whether a URL leads to this machine.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests;
