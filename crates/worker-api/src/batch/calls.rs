//! The calls of batches to a provider. Never here: which are made, and what follows from what they tell.

use super::held::Left;
use super::split::{Elements, RECORD_BYTES_MAX, Splitter};
use super::{Method, Request, Source};
use crate::call::{lost, refusal, was_sent};
use crate::catalog::Endpoint;
use crate::dialect::Dialect;
use crate::failure::{Fault, Kind};
use crate::http::{self, Http, Lost, Response, Trouble, Unsent};
use crate::perform::Limits;
use ::http::header::CONTENT_TYPE;
use ::http::{Method as Verb, StatusCode};
use genmill_worker::hold::Hold;
use serde_json::Value;
use std::time::Duration;
use tokio::time::timeout;
use url::Url;

/// How long a provider may be silent where nothing else is set.
const SILENCE: Duration = Duration::from_secs(60);

/// How fast a body goes out at least, in bytes a second: a request may take so much longer.
const UPLOAD_BYTES_PER_S: usize = 100_000;

/// Statuses below 500 that leave open whether the request was carried out.
const UNCLEAR: &[StatusCode] = &[StatusCode::REQUEST_TIMEOUT, StatusCode::CONFLICT];

/// A call that came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// Why.
    pub(super) fault: Fault,
    /// Whether it was carried out.
    pub(super) carried_out: CarriedOut,
}

/// Whether a call that came to nothing was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CarriedOut {
    /// Surely not.
    No,
    /// Surely not, because the hold on its batch ended before it had left.
    Late,
    /// Nobody knows.
    Perhaps,
}

/// Calls to one provider.
#[derive(Clone, Copy)]
pub(super) struct Calls<'a> {
    pub(super) http: &'a Http,
    pub(super) endpoint: &'a Endpoint,
    /// How refusals are read.
    pub(super) dialect: &'static dyn Dialect,
    pub(super) limits: Limits,
}

impl Calls<'_> {
    /// Makes a call whose answer is a JSON document, from which lists of results are left out. What a refusal quotes of
    /// what was `said` is cut out.
    pub(super) async fn json(&self, request: Request, said: &[&str]) -> Result<Value, Failed> {
        self.told(self.send(request, said, None).await?).await
    }

    /// The same for a call that leaves under a hold only.
    pub(super) async fn json_under(&self, hold: &Hold, request: Request, said: &[&str]) -> Result<Value, Failed> {
        self.told(self.send(request, said, Some(hold)).await?).await
    }

    /// Makes a call of whose answer only the status counts.
    pub(super) async fn done(&self, request: Request) -> Result<(), Fault> {
        self.send(request, &[], None).await.map(drop).map_err(|failed| failed.fault)
    }

    async fn told(&self, response: Response) -> Result<Value, Failed> {
        let unclear = |fault| Failed { fault, carried_out: CarriedOut::Perhaps };
        let mut document = Elements::new(RECORD_BYTES_MAX);
        self.read(response, |bytes| drop(document.push(bytes))).await.map_err(unclear)?;
        let strange = || unclear(self.fault(Kind::Transient, "answered with something that is no JSON"));
        let rest = document.into_rest().ok().flatten().ok_or_else(strange)?;
        serde_json::from_slice(&rest).map_err(|_| strange())
    }

    /// Opens results.
    pub(super) async fn results(&self, source: &Source) -> Result<Results<'_>, Fault> {
        let response = self.send(Request::get(source.at.clone()), &[], None).await.map_err(|failed| failed.fault)?;
        Ok(Results {
            calls: self,
            response: Some(response),
            splitter: Some(Splitter::new(source.form, RECORD_BYTES_MAX)),
        })
    }

    /// The answer to a request, when it is a success.
    async fn send(&self, request: Request, said: &[&str], hold: Option<&Hold>) -> Result<Response, Failed> {
        let undone = |fault| Failed { fault, carried_out: CarriedOut::No };
        let url = self.url(&request.path).map_err(undone)?;
        let size = u32::try_from(request.body.len() / UPLOAD_BYTES_PER_S).unwrap_or(u32::MAX);
        let patience = self.limits.first_byte.unwrap_or(SILENCE).saturating_add(Duration::from_secs(size.into()));
        let left = Left::default();
        let perhaps = || match hold {
            Some(hold) if !left.is_so() && !hold.lasts() => CarriedOut::Late,
            Some(_) if !left.is_so() => CarriedOut::No,
            _ => CarriedOut::Perhaps,
        };
        let call = self.call(request, &url).map_err(|error| undone(lost(self.endpoint, &error)))?;
        let call = hold.iter().fold(call, |call, hold| call.gated(left.under(hold)));
        let response = match timeout(patience, self.http.send(self.endpoint, call)).await {
            Ok(Ok(response)) => response,
            Ok(Err(Unsent::Fault(fault))) => return Err(undone(fault)),
            Ok(Err(Unsent::Lost(error))) => {
                let carried_out = if was_sent(&error) { perhaps() } else { CarriedOut::No };
                return Err(Failed { fault: lost(self.endpoint, &error), carried_out });
            }
            Err(_) => {
                let what = format!("sent nothing for {} s", patience.as_secs());
                return Err(Failed { fault: self.fault(Kind::Timeout, &what), carried_out: perhaps() });
            }
        };
        let status = response.status();
        tracing::debug!(provider = self.endpoint.name, status = status.as_u16(), "answered about a batch");
        if status.is_success() {
            return Ok(response);
        }
        let fault = refusal(self.endpoint, self.dialect, said, self.silence(), response).await;
        let unclear = status.is_server_error() || UNCLEAR.contains(&status);
        Err(Failed { fault, carried_out: if unclear { perhaps() } else { CarriedOut::No } })
    }

    /// A request as it is sent.
    fn call(&self, request: Request, url: &Url) -> Result<http::Request, Lost> {
        let method = match request.method {
            Method::Get => Verb::GET,
            Method::Post => Verb::POST,
            Method::Delete => Verb::DELETE,
        };
        // Nothing is no JSON.
        let kind = (!request.body.is_empty()).then_some((CONTENT_TYPE.as_str(), request.content_type.as_str()));
        let headers = self.endpoint.provider.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let call = http::Request::new(method, url.as_str(), request.body.into())?;
        kind.into_iter().chain(headers).try_fold(call, |call, (name, value)| call.with(name, value))
    }

    /// The address of a path below the base URL, or of a whole URL at the same host.
    fn url(&self, at: &str) -> Result<Url, Fault> {
        let base = &self.endpoint.base_url;
        let url = if at.starts_with('/') {
            Url::parse(&format!("{}{at}", base.as_str().trim_end_matches('/')))
        } else {
            Url::parse(at)
        };
        // The key is for this host alone.
        let url = url.ok().filter(|url| url.origin() == base.origin());
        url.ok_or_else(|| self.fault(Kind::Invalid, "names results at another host, where they are not read"))
    }

    async fn read(&self, mut response: Response, mut take: impl FnMut(&[u8])) -> Result<(), Fault> {
        while let Some(bytes) = self.chunk(&mut response).await? {
            take(&bytes);
        }
        Ok(())
    }

    async fn chunk(&self, response: &mut Response) -> Result<Option<bytes::Bytes>, Fault> {
        let silence = self.silence();
        match timeout(silence, response.chunk()).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) => {
                Err(self.fault(Kind::Cut, &format!("broke off what it told of a batch: {}", Trouble::of(&error))))
            }
            Err(_) => Err(self.fault(Kind::Timeout, &format!("sent nothing more for {} s", silence.as_secs()))),
        }
    }

    fn silence(&self) -> Duration {
        self.limits.idle.unwrap_or(SILENCE)
    }

    pub(super) fn fault(&self, kind: Kind, what: &str) -> Fault {
        Fault::new(kind, &self.endpoint.name, what)
    }
}

/// Results on their way.
pub(super) struct Results<'a> {
    calls: &'a Calls<'a>,
    response: Option<Response>,
    splitter: Option<Splitter>,
}

impl Results<'_> {
    /// The results that come next, `None` for each that is too long; no more after the last ones.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Option<Vec<u8>>>>, Fault> {
        let (Some(response), Some(splitter)) = (&mut self.response, &mut self.splitter) else { return Ok(None) };
        if let Some(bytes) = self.calls.chunk(response).await? {
            return Ok(Some(splitter.push(&bytes)));
        }
        self.response = None;
        let Some(splitter) = self.splitter.take() else { return Ok(None) };
        let cut = |_| self.calls.fault(Kind::Cut, "ended the results of a batch before they were whole");
        splitter.end().map(|last| Some(last.into_iter().collect())).map_err(cut)
    }
}
