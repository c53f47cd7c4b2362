//! Tokens that hold for a while: asked for when one is needed, kept until shortly before they end.

use crate::failure::{Fault, Kind};
use crate::http::{Http, Lost, Request, Trouble};
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_daemon::secret::Secret;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use url::Url;

/// A token is not used in the last part of its life, so that it holds for as long as a call takes to be accepted.
const SPARE_MS: u64 = 60_000;

/// How long a token may take to come.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest reply that is read, in bytes.
const REPLY_BYTES_MAX: usize = 64 * 1024;

/// What a token is asked for with.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenRequest {
    /// Where.
    pub url: Url,
    /// What proves who asks.
    pub with: With,
}

/// What proves who asks for a token.
#[derive(Clone, PartialEq, Eq)]
pub enum With {
    /// A form, posted. Some of its fields are secret.
    Form(Vec<(&'static str, String)>),
    /// Being on a machine that reaches the URL, and this header, which nobody sends by mistake. Such URLs are on no other
    /// machine, so no proxy is asked.
    Place(&'static str, &'static str),
}

impl std::fmt::Debug for With {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Form(_)) { "Form" } else { "Place" })
    }
}

impl std::fmt::Debug for TokenRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenRequest").field("host", &self.url.host_str()).finish_non_exhaustive()
    }
}

/// A reply, as everybody gives it (RFC 6749).
#[derive(Deserialize)]
struct Reply {
    access_token: String,
    expires_in: u64,
}

#[derive(Clone, Debug)]
struct Token {
    token: Secret,
    ends: UnixMs,
}

/// The tokens of all providers.
#[derive(Debug)]
pub struct Tokens {
    /// By provider and account.
    kept: Mutex<HashMap<(String, String), Token>>,
    /// One asks at a time; the others then find what it got.
    asking: Semaphore,
}

impl Default for Tokens {
    fn default() -> Self {
        Self { kept: Mutex::default(), asking: Semaphore::new(1) }
    }
}

impl Tokens {
    fn kept(&self) -> MutexGuard<'_, HashMap<(String, String), Token>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn good(&self, whose: &(String, String), now: UnixMs) -> Option<Secret> {
        let kept = self.kept();
        kept.get(whose).filter(|token| token.ends > now.plus_ms(SPARE_MS)).map(|token| token.token.clone())
    }

    /// Forgets a token that a provider did not take: another one that was got meanwhile stays.
    pub(crate) fn forget(&self, refused: &Secret) {
        self.kept().retain(|_, kept| kept.token.reveal() != refused.reveal());
    }

    /// A token for calls of `provider` by an account: the one that is kept, else a new one.
    ///
    /// # Errors
    /// What went wrong where tokens come from.
    pub async fn get(
        &self,
        provider: &str,
        account: &str,
        http: &Http,
        request: impl FnOnce(UnixMs) -> Option<TokenRequest>,
    ) -> Result<Secret, Fault> {
        let whose = (provider.to_owned(), account.to_owned());
        if let Some(token) = self.good(&whose, UnixMs(now_unix_ms())) {
            return Ok(token);
        }
        // It is never closed.
        let _asking = self.asking.acquire().await.ok();
        let now = UnixMs(now_unix_ms());
        if let Some(token) = self.good(&whose, now) {
            return Ok(token);
        }
        let Some(request) = request(now) else {
            return Err(Fault::new(Kind::Auth, provider, "has credentials that cannot sign"));
        };
        let asked = ask(provider, http, request);
        let late = || Fault::new(Kind::Timeout, provider, "gave no token in 30 s");
        let reply = timeout(PATIENCE, asked).await.map_err(|_| late())??;
        let token = Secret::new(reply.access_token);
        let ends = now.plus_ms(reply.expires_in.saturating_mul(1_000));
        self.kept().insert(whose, Token { token: token.clone(), ends });
        Ok(token)
    }
}

async fn ask(provider: &str, http: &Http, TokenRequest { url, with }: TokenRequest) -> Result<Reply, Fault> {
    let host = url.host_str().unwrap_or_default().to_owned();
    let lost = |error: Lost| {
        Fault::new(Kind::Transient, provider, &format!("got no token from {host}: {}", Trouble::of(&error)))
    };
    let request = match with {
        With::Form(form) => Request::form(url.as_str(), &form),
        With::Place(name, value) => Request::get(url.as_str()).and_then(|request| request.with(name, value)),
    };
    let mut response = http.send_unproven(request.map_err(lost)?).await.map_err(lost)?;
    let status = response.status();
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await.map_err(lost)? {
        body.extend_from_slice(&bytes[..bytes.len().min(REPLY_BYTES_MAX - body.len())]);
        if body.len() == REPLY_BYTES_MAX {
            break;
        }
    }
    if status.is_success() {
        let bad = |_| Fault::new(Kind::Transient, provider, &format!("got a reply without a token from {host}"));
        return serde_json::from_slice(&body).map_err(bad);
    }
    // What it says may quote what it was sent, so only the code is told.
    let code = serde_json::from_slice::<serde_json::Value>(&body).ok();
    let code = code.as_ref().and_then(|body| body["error"].as_str().or(body["errorCode"].as_str())).unwrap_or_default();
    let kind = if status.is_client_error() && status.as_u16() != 429 { Kind::Auth } else { Kind::Transient };
    let what = format!("got no token: {host} answered {} {code}", status.as_u16());
    Err(Fault::new(kind, provider, what.trim_end()))
}
