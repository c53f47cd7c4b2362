//! New connections: names looked up, proxies asked, TLS agreed on. Never here: which connection a request takes (`pool`).

use super::message::{Lost, Stage};
use super::tasks::Tasks;
use super::{HttpError, Settings, http1, http2, is_loopback};
use crate::guard::{Guarded, forbidden_host};
use http::header::HeaderValue;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use rustls::client::ClientConfig;
use rustls::{ConfigBuilder, RootCertStore, WantsVerifier};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use rustls_platform_verifier::Verifier;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tower_service::Service;
use url::Url;

/// How long a connection is silent before it is asked whether its other end is still there.
const PROBE_AFTER: Duration = Duration::from_secs(15);

/// So many questions without an answer end it.
const PROBES: u32 = 3;

/// Makes connections.
#[derive(Debug)]
pub(super) struct Connector {
    tcp: HttpConnector<Guarded>,
    /// For providers.
    tls: Arc<ClientConfig>,
    /// For providers, of whom no HTTP/2 is wanted.
    http1_tls: Arc<ClientConfig>,
    /// For proxies, which are spoken to in HTTP/1.1.
    proxy_tls: Arc<ClientConfig>,
    proxies: Matcher,
    pub(super) timeout: Duration,
}

/// A new connection.
pub(super) enum New {
    Http1(http1::Connection),
    Http2(http2::Connection),
}

/// The proxy cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the proxy cannot be used")]
struct ProxyError(#[source] Box<dyn Error + Send + Sync>);

impl Connector {
    pub(super) fn new(settings: &Settings) -> Result<Self, HttpError> {
        let proxies = match &settings.proxy {
            Some(proxy) => Matcher::builder().all(proxy.as_str()).build(),
            None => Matcher::from_env(),
        };
        let example = http::Uri::from_static("https://example.com");
        if settings.proxy.is_some() && !proxies.intercept(&example).is_some_and(|proxy| is_http(&proxy)) {
            return Err(HttpError::Proxy);
        }
        let mut tcp = HttpConnector::new_with_resolver(Guarded);
        // TLS is put over it.
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(settings.connect_timeout));
        tcp.set_keepalive(Some(PROBE_AFTER));
        tcp.set_keepalive_interval(Some(PROBE_AFTER));
        tcp.set_keepalive_retries(Some(PROBES));
        let mut tls = trust(settings.ca_file.as_deref())?.with_no_client_auth();
        let proxy_tls = Arc::new(tls.clone());
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let http1_tls = Arc::new(tls.clone());
        tls.alpn_protocols.insert(0, b"h2".to_vec());
        Ok(Self { tcp, tls: Arc::new(tls), http1_tls, proxy_tls, proxies, timeout: settings.connect_timeout })
    }

    /// Connects to where `url` leads; `alone`: to speak HTTP/1.1 there.
    pub(super) async fn connect(&self, url: &Url, alone: bool, tasks: &Tasks) -> Result<New, Lost> {
        let tls = if alone { &self.http1_tls } else { &self.tls };
        let lost = |error: Box<dyn Error + Send + Sync>| Lost::at(Stage::Connect, error);
        let uri: http::Uri = url.as_str().parse().map_err(|error| Lost::at(Stage::Request, error))?;
        // Servers on this machine, and those that tell it its own secrets, are never called through a proxy.
        let direct = is_loopback(url) || forbidden_host(url).is_some();
        let proxy = if direct { None } else { self.proxies.intercept(&uri) };
        let Some(proxy) = proxy else {
            return agreed(https(self.tcp.clone(), tls, uri).await.map_err(lost)?, None, tasks).await;
        };
        if !is_http(&proxy) {
            return Err(lost(ProxyError("it is none of HTTP".into()).into()));
        }
        let to_proxy = HttpsConnector::from((self.tcp.clone(), Arc::clone(&self.proxy_tls)));
        let authorization = proxy.basic_auth().cloned();
        if uri.scheme() == Some(&http::uri::Scheme::HTTP) {
            let stream = call(to_proxy, proxy.uri().clone()).await;
            return agreed(stream.map_err(|error| lost(ProxyError(error).into()))?, Some(authorization), tasks).await;
        }
        let tunnel = Tunnel::new(proxy.uri().clone(), to_proxy);
        let tunnel = authorization.into_iter().fold(tunnel, Tunnel::with_auth);
        agreed(https(tunnel, tls, uri).await.map_err(lost)?, None, tasks).await
    }
}

/// Whether a proxy is spoken to in HTTP.
fn is_http(proxy: &Intercept) -> bool {
    matches!(proxy.uri().scheme_str(), Some("http" | "https"))
}

async fn https<C>(
    inner: C,
    tls: &Arc<ClientConfig>,
    uri: http::Uri,
) -> Result<MaybeHttpsStream<C::Response>, Box<dyn Error + Send + Sync>>
where
    C: Service<http::Uri, Future: Send + 'static, Error: Into<Box<dyn Error + Send + Sync>>>,
    C::Response: Connection + hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    call(HttpsConnector::from((inner, Arc::clone(tls))), uri).await
}

/// Calls a service as soon as it is ready.
async fn call<S: Service<http::Uri>>(mut service: S, uri: http::Uri) -> Result<S::Response, S::Error> {
    std::future::poll_fn(|cx| service.poll_ready(cx)).await?;
    service.call(uri).await
}

/// Begins to speak as was agreed on. `via`: a proxy that requests are told whole, with what proves to it who calls.
async fn agreed<T>(stream: MaybeHttpsStream<T>, via: Option<Option<HeaderValue>>, tasks: &Tasks) -> Result<New, Lost>
where
    T: Connection + hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    if stream.connected().is_negotiated_h2() {
        return http2::Connection::begin(TokioIo::new(stream), tasks).await.map(New::Http2);
    }
    // Unwrapped, since a connection without TLS would keep room for it.
    let wire: Box<dyn http1::Wire> = match stream {
        MaybeHttpsStream::Http(plain) => Box::new(TokioIo::new(plain)),
        MaybeHttpsStream::Https(tls) => Box::new(TokioIo::new(tls)),
    };
    Ok(New::Http1(http1::Connection::new(wire, via)))
}

/// Whose certificates are trusted: those of the system and of `file`.
fn trust(file: Option<&Path>) -> Result<ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, HttpError> {
    let extra = file.map(certificates).transpose()?.unwrap_or_default();
    let builder: ConfigBuilder<ClientConfig, WantsVerifier> = ClientConfig::builder();
    let provider = Arc::clone(builder.crypto_provider());
    match Verifier::new_with_extra_roots(extra.clone(), provider) {
        Ok(verifier) => Ok(builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))),
        Err(problem) => {
            tracing::warn!(
                %problem,
                "providers on https cannot be reached; is the package ca-certificates installed?"
            );
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(extra);
            Ok(builder.with_root_certificates(roots))
        }
    }
}

/// The certificates of a file.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, HttpError> {
    let bad = |source: Box<dyn Error + Send + Sync>| HttpError::CaFile { file: file.to_owned(), source };
    let text = std::fs::read(file).map_err(|error| bad(error.into()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| bad(error.into()))?;
    if found.is_empty() { Err(bad("there is no certificate in it".into())) } else { Ok(found) }
}
