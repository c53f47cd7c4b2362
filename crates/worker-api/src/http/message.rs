//! Requests and responses. Never here: how they travel.

use super::{http1, http2};
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Method, StatusCode};
use std::error::Error;
use std::sync::Arc;
use url::Url;

/// Who calls, for a provider's logs; some refuse callers without a name.
const AGENT: &str = concat!("genmill/", env!("CARGO_PKG_VERSION"));

/// A request, whole. In a box, since it is handed on many times.
#[derive(Clone, Debug)]
pub struct Request(Box<Parts>);

/// What a request is made of.
#[derive(Clone)]
pub struct Parts {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) gate: Option<Gate>,
}

/// Asked right before the last byte of a body leaves, without which nobody can do anything with it: whether it may.
#[derive(Clone)]
pub(crate) struct Gate(Arc<dyn Fn() -> bool + Send + Sync>);

impl Gate {
    pub(super) fn is_open(&self) -> bool {
        (self.0)()
    }
}

/// A gate was shut.
#[derive(Debug, thiserror::Error)]
#[error("called off before the last of it was sent")]
pub(super) struct Shut;

impl Request {
    /// A request for what is at `url`.
    ///
    /// # Errors
    /// When that is no URL.
    pub(crate) fn get(url: &str) -> Result<Self, Lost> {
        Self::new(Method::GET, url, Bytes::new())
    }

    /// A request that brings `body` to `url`.
    ///
    /// # Errors
    /// When that is no URL.
    pub(crate) fn post(url: &str, body: impl Into<Bytes>) -> Result<Self, Lost> {
        Self::new(Method::POST, url, body.into())
    }

    /// A request that brings the fields of a form to `url`.
    ///
    /// # Errors
    /// When that is no URL.
    pub(crate) fn form(url: &str, fields: &[(&str, String)]) -> Result<Self, Lost> {
        let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        Self::post(url, body)?.with(CONTENT_TYPE.as_str(), "application/x-www-form-urlencoded")
    }

    pub(crate) fn new(method: Method, url: &str, body: Bytes) -> Result<Self, Lost> {
        let url = Url::parse(url).map_err(|error| Lost::at(Stage::Request, error))?;
        let defaults = [(ACCEPT, HeaderValue::from_static("*/*")), (USER_AGENT, HeaderValue::from_static(AGENT))];
        Ok(Self(Box::new(Parts { method, url, headers: defaults.into_iter().collect(), body, gate: None })))
    }

    /// The same, of whose body, if it has one, the last byte leaves only if `may_leave` says so at that time.
    pub(crate) fn gated(mut self, may_leave: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.gate = Some(Gate(Arc::new(may_leave)));
        self
    }

    /// The same with one more header, or another value for it.
    ///
    /// # Errors
    /// When no header can be named or say so.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Result<Self, Lost> {
        let bad = |what: &str| Lost::at(Stage::Request, format!("the header {name:?} has {what}"));
        let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| bad("a name that none can have"))?;
        // The value is not told: it may be secret.
        let value = HeaderValue::from_str(value).map_err(|_| bad("characters that none can have"))?;
        self.headers.insert(header, value);
        Ok(self)
    }
}

impl std::ops::Deref for Request {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl std::ops::DerefMut for Request {
    fn deref_mut(&mut self) -> &mut Parts {
        &mut self.0
    }
}

impl std::fmt::Debug for Parts {
    /// Without headers, body and query, which may be secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let host = self.url.host_str();
        f.debug_struct("Parts").field("method", &self.method).field("host", &host).finish_non_exhaustive()
    }
}

/// An answer whose body is on its way.
#[derive(Debug)]
pub struct Response {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
}

/// What is on its way. Where it is dropped before its end, the provider is told by the end of the connection (HTTP/1.1) or
/// of the stream (HTTP/2).
#[derive(Debug)]
pub(super) enum Body {
    Http1(http1::Body),
    Http2(http2::Body),
}

impl Response {
    /// What the answer says of itself.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// When the connection is lost, or what comes is no HTTP.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Lost> {
        match &mut self.body {
            Body::Http1(body) => body.chunk().await,
            Body::Http2(body) => body.chunk().await,
        }
    }

    /// Reads on to the end of a body of which nothing more is wanted, for a short while and on its own, so that its
    /// connection can serve again.
    pub(crate) fn drain(self) {
        if let Body::Http1(body) = self.body {
            body.drain();
        }
    }
}

/// Where a request came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Before anything was done: it is no request.
    Request,
    /// On the way to a connection, so that the provider knows nothing of it.
    Connect,
    /// On a connection: nobody knows how much of it arrived.
    Exchange,
}

/// Why there is no (whole) answer.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct Lost {
    pub(crate) stage: Stage,
    pub(super) source: Box<dyn Error + Send + Sync>,
}

impl Lost {
    pub(super) fn at(stage: Stage, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { stage, source: source.into() }
    }

    /// The same for a future that maps errors.
    pub(super) fn exchange(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::at(Stage::Exchange, source)
    }
}
