//! One call to a provider: sent, read, and what became of it. Never here: whether it may go out now (the lane's gates), and
//! what follows from how it ended (`perform`).

use crate::catalog::Endpoint;
use crate::collect::Collected;
use crate::dialect::{Dialect, Encoded, FILLED_IN, NEVER_LEFT_OUT, ProviderError, StreamEvent, Streaming};
use crate::failure::{Fault, Kind, classify, redact};
use crate::hedge::{Race, Runner};
use crate::http::{Http, Lost, Request, Response, Stage, Trouble, Unsent};
use crate::limits;
use crate::perform::{Limits, Unsupported};
use crate::wait::{asked_ms, time_ms};
use genmill_core::image::Source;
use genmill_core::job::JobSpec;
use genmill_core::request::{ChatMessage, Input};
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_worker::perform::Progress;
use http::HeaderMap;
use http::StatusCode;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// The longest answer that is read, in bytes: far above what the largest models write.
const ANSWER_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The most bytes of a stream, of which little is kept: some providers send hundreds with each token.
const STREAM_BYTES_MAX: usize = 512 * 1024 * 1024;

/// The most that is read of a refusal, in bytes.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;

/// How long the usage is waited for once the text is whole. A provider that does not end its stream must not spoil the
/// answer.
const TAIL: Duration = Duration::from_secs(5);

/// A wait for bytes is parted into so many looks: a process that was stopped for longer than all of it finds the time
/// over before it has read what came meanwhile, and loses one look only.
const LOOKS: u32 = 5;

/// How long an answer that is not there yet is left alone.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Stands for no limit.
const FOREVER: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How a call ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The provider said all it had to say.
    Answered,
    /// Nothing was generated, so nothing is billed.
    Refused(Fault),
    /// It failed after something may have been generated.
    Broken(Fault),
    /// It was told to stop.
    Stopped,
}

impl Ended {
    /// The same end after something may have been generated.
    fn into_broken(self) -> Self {
        if let Self::Refused(fault) = self { Self::Broken(fault) } else { self }
    }
}

/// One call.
pub(crate) struct Call<'a> {
    pub(crate) endpoint: &'a Endpoint,
    /// How the model is spoken to.
    pub(crate) dialect: &'static dyn Dialect,
    pub(crate) http: &'a Http,
    pub(crate) limits: Limits,
    pub(crate) spec: &'a JobSpec,
    pub(crate) progress: &'a Progress,
    /// Another call that may be made for the same, of which only one is to be heard.
    pub(crate) race: Option<(&'a Race, Runner)>,
    /// When the attempt began.
    pub(crate) begun: Instant,
}

impl Call<'_> {
    pub(crate) async fn make(&mut self, collected: &mut Collected) -> Ended {
        let endpoint = self.endpoint;
        let streaming = if endpoint.provider.streaming { Streaming::On } else { Streaming::Off };
        let model = self.spec.model.backend_name();
        let encoded = self.dialect.encode(self.spec, model, &endpoint.provider, streaming);
        if let Some(fault) = unsupported(endpoint, self.spec, self.limits.unsupported, &encoded.left_out) {
            return Ended::Refused(fault);
        }
        collected.left_out(&encoded.left_out);
        let first_byte = Instant::now() + self.limits.first_byte.unwrap_or(FOREVER);
        let response = match timeout_at(first_byte, self.send(encoded)).await {
            Ok(Ok(response)) => response,
            Ok(Err(Unsent::Lost(error))) => return self.unreachable(&error, collected),
            Ok(Err(Unsent::Fault(fault))) => return Ended::Refused(fault),
            Err(_) => return self.silent(),
        };
        let now = UnixMs(now_unix_ms());
        collected.limits(limits::told(response.headers(), |value| time_ms(value, now)));
        tracing::debug!(provider = endpoint.name, model, status = response.status().as_u16(), "answered");
        if !response.status().is_success() {
            return self.refused(response).await;
        }
        let kind = response.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_owned();
        if kind == "text/html" {
            return Ended::Broken(self.fault(Kind::Transient, "answered with a web page"));
        }
        let mut body = Body::new(response, first_byte, self.limits);
        let begins = match body.peek().await {
            Ok(begins) => begins,
            Err(came) => return self.gone_wrong(came, collected),
        };
        // What an answer is, it says by how it begins: not all servers name it rightly, and it is paid for.
        let streams = match begins {
            Some(b'{' | b'[') if !self.dialect.streams_json() => false,
            Some(b'a'..=b'z' | b':') => true,
            // A server that does not say what it sends sends what was asked for.
            _ => kind != "application/json" && streaming == Streaming::On,
        };
        let ended = if streams {
            body.bytes_max = STREAM_BYTES_MAX;
            self.read_stream(&mut body, collected).await
        } else {
            self.read_whole(&mut body, collected).await
        };
        if matches!(ended, Ended::Answered) {
            body.response.drain();
        }
        ended
    }

    async fn send(&self, encoded: Encoded) -> Result<Response, Unsent> {
        let endpoint = self.endpoint;
        let url = format!("{}{}", endpoint.base_url.as_str().trim_end_matches('/'), encoded.path);
        let request = Request::post(&url, encoded.body)?;
        let request = encoded.headers.iter().try_fold(request, |request, (name, value)| request.with(name, value))?;
        self.http.send(endpoint, request).await
    }

    fn fault(&self, kind: Kind, what: &str) -> Fault {
        Fault::new(kind, &self.endpoint.name, what)
    }

    /// Nothing came within the limit for the first byte.
    fn silent(&self) -> Ended {
        let limit_s = self.limits.first_byte.unwrap_or(FOREVER).as_secs_f64();
        Ended::Broken(self.fault(Kind::Timeout, &format!("sent nothing for {limit_s} s (api.first_byte_timeout_ms)")))
    }

    fn unreachable(&self, error: &Lost, collected: &Collected) -> Ended {
        let fault = lost(self.endpoint, error);
        if was_sent(error) { self.cut(fault, collected) } else { Ended::Refused(fault) }
    }

    /// The failure of an answer that broke off: told from others by where it did.
    fn cut(&self, fault: Fault, collected: &Collected) -> Ended {
        Ended::Broken(fault.marked(format!("cut after {}", collected.bytes())))
    }

    fn told(&self, status: StatusCode, error: ProviderError) -> Fault {
        told(self.endpoint, status.as_u16(), error, &said(self.spec))
    }

    async fn refused(&self, response: Response) -> Ended {
        let idle = self.limits.idle.unwrap_or(FOREVER);
        Ended::Refused(refusal(self.endpoint, self.dialect, &said(self.spec), idle, response).await)
    }

    async fn read_whole(&mut self, body: &mut Body, collected: &mut Collected) -> Ended {
        let mut whole = match body.rest().await {
            Ok(whole) => whole,
            Err(came) => return self.gone_wrong(came, collected),
        };
        while let Some(pending) = self.dialect.pending(&whole) {
            collected.goes_on(pending.cancel);
            sleep(LOOK_AGAIN).await;
            // In a box: few dialects do so, and every call would keep room for it.
            whole = match Box::pin(self.look_again(&pending.look, collected)).await {
                Ok(whole) => whole,
                Err(ended) => return ended,
            };
        }
        collected.goes_on(None);
        match self.dialect.decode(&whole) {
            Ok(reply) => {
                self.lead().await;
                let texts = collected.take_reply(reply, self.elapsed_ms());
                self.report(texts).await;
                Ended::Answered
            }
            Err(error) => Ended::Broken(self.told(body.response.status(), error)),
        }
    }

    /// The answer that is to be found at `url` by now.
    async fn look_again(&self, url: &str, collected: &Collected) -> Result<Vec<u8>, Ended> {
        let request = Request::get(url).map_err(|error| self.unreachable(&error, collected).into_broken())?;
        let first_byte = Instant::now() + self.limits.first_byte.unwrap_or(FOREVER);
        let response = match timeout_at(first_byte, self.http.send(self.endpoint, request)).await {
            Ok(Ok(response)) => response,
            // Whatever went out is billed.
            Ok(Err(Unsent::Lost(error))) => return Err(self.unreachable(&error, collected).into_broken()),
            Ok(Err(Unsent::Fault(fault))) => return Err(Ended::Broken(fault)),
            Err(_) => return Err(self.silent()),
        };
        if !response.status().is_success() {
            return Err(self.refused(response).await.into_broken());
        }
        let mut body = Body::new(response, first_byte, self.limits);
        body.rest().await.map_err(|came| self.gone_wrong(came, collected))
    }

    async fn read_stream(&mut self, body: &mut Body, collected: &mut Collected) -> Ended {
        let mut decoder = self.dialect.decoder();
        while !collected.is_done() {
            let patience = if collected.is_whole() { TAIL } else { body.idle() };
            let events = match body.chunk(patience).await {
                Came::Bytes(bytes) => decoder.push(&bytes),
                Came::End => {
                    self.take(decoder.end(), collected).await;
                    collected.ended();
                    break;
                }
                // The text is there: whatever else was to come is done without.
                Came::Nothing if collected.is_whole() => break,
                other => return self.gone_wrong(other, collected),
            };
            self.take(events, collected).await;
        }
        match collected.error() {
            Some(error) => Ended::Broken(self.told(body.response.status(), error.clone())),
            None if collected.is_whole() => Ended::Answered,
            None => self.cut(self.fault(Kind::Cut, "ended the connection before the answer was whole"), collected),
        }
    }

    fn gone_wrong(&self, came: Came, collected: &Collected) -> Ended {
        match came {
            Came::Lost(error) => self.unreachable(&error, collected),
            Came::TooMuch => {
                Ended::Broken(self.fault(Kind::Invalid, "sent more than the 32 MiB that an answer may have"))
            }
            Came::NotEvenTheFirst => self.silent(),
            Came::Nothing | Came::Bytes(_) | Came::End => {
                let limit_s = self.limits.idle.unwrap_or(FOREVER).as_secs_f64();
                let what = format!("sent nothing more for {limit_s} s (api.idle_timeout_ms)");
                Ended::Broken(self.fault(Kind::Timeout, &what))
            }
        }
    }

    /// Goes on unless another call is heard in place of this one.
    async fn lead(&self) {
        if let Some((race, runner)) = self.race {
            race.lead(runner).await;
        }
    }

    async fn take(&mut self, events: Vec<StreamEvent>, collected: &mut Collected) {
        for event in events {
            if event.is_heard() {
                self.lead().await;
            }
            let texts = collected.take(event, self.elapsed_ms());
            self.report(texts).await;
        }
    }

    async fn report(&mut self, texts: Vec<(u32, String)>) {
        for (sample, text) in texts {
            self.progress.text_of(sample, text).await;
        }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The failure of a request with parameters that the provider does not take, unless they are to be left out.
pub(crate) fn unsupported(
    endpoint: &Endpoint,
    spec: &JobSpec,
    unsupported: Unsupported,
    left_out: &[&str],
) -> Option<Fault> {
    let model = spec.model.backend_name();
    if let Some((name, advice)) = NEVER_LEFT_OUT.iter().find(|(name, _)| left_out.contains(name)) {
        let what = format!("does not take {name} for {model}: {advice}");
        return Some(Fault::new(Kind::Invalid, &endpoint.name, &what));
    }
    let wanted: Vec<&str> = left_out.iter().filter(|name| !FILLED_IN.contains(name)).copied().collect();
    if wanted.is_empty() || unsupported == Unsupported::LeaveOut {
        return None;
    }
    let what = format!(
        "does not take {} for {model}: leave it out of the request, or set drop_params = true under [api]",
        wanted.join(", "),
    );
    Some(Fault::new(Kind::Invalid, &endpoint.name, &what))
}

/// What a request says, which nobody else is to read.
pub(crate) fn said(spec: &JobSpec) -> Vec<&str> {
    let urls = spec.input.images().filter_map(|image| match &image.source {
        Source::Url(url) => Some(url.as_str()),
        Source::Data(_) => None,
    });
    let texts: Vec<&str> = match &spec.input {
        Input::Prompt(prompt) => vec![prompt],
        Input::Messages(messages) => messages.iter().flat_map(ChatMessage::texts).collect(),
    };
    texts.into_iter().chain(urls).collect()
}

/// The failure that a provider's error stands for. What it quotes of the key and of what was `said` is cut out.
pub(crate) fn told(endpoint: &Endpoint, status: u16, error: ProviderError, said: &[&str]) -> Fault {
    let hidden = endpoint.credentials.secret().into_iter().chain(said.iter().copied());
    classify(&endpoint.name, status, &redact(error, hidden))
}

/// Whether what the connection failed for may have reached the provider.
pub(crate) fn was_sent(error: &Lost) -> bool {
    error.stage == Stage::Exchange
}

/// The failure of a connection.
pub(crate) fn lost(endpoint: &Endpoint, error: &Lost) -> Fault {
    let host = endpoint.base_url.host_str().unwrap_or_default();
    let (kind, what) = match error.stage {
        Stage::Request => (Kind::Invalid, "cannot be asked at"),
        Stage::Connect => (Kind::Transient, "cannot be connected to at"),
        Stage::Exchange => (Kind::Cut, "lost the connection to"),
    };
    Fault::new(kind, &endpoint.name, &format!("{what} {host}: {}", Trouble::of(error)))
}

/// The failure that an answer without success stands for.
pub(crate) async fn refusal(
    endpoint: &Endpoint,
    dialect: &dyn Dialect,
    said: &[&str],
    idle: Duration,
    mut response: Response,
) -> Fault {
    let mut body = Vec::new();
    // What does not come in time is done without: the status tells most.
    while let Ok(Ok(Some(bytes))) = timeout(idle, response.chunk()).await {
        body.extend_from_slice(&bytes[..bytes.len().min(REFUSAL_BYTES_MAX - body.len())]);
        if body.len() == REFUSAL_BYTES_MAX {
            break;
        }
    }
    let error = dialect.decode_error(&body);
    let asked_ms = asked_ms(response.headers(), &error, UnixMs(now_unix_ms()));
    let mut fault = told(endpoint, response.status().as_u16(), error, said);
    let is_retried = fault.kind.policy().class.is_retried();
    match may_try_again(response.headers()) {
        Some(false) if is_retried => {
            fault.kind = Kind::Invalid;
            fault.message.push_str("; it asks not to be called again (x-should-retry: false)");
        }
        Some(true) if !is_retried => {
            fault.kind = Kind::Transient;
            fault.message.push_str("; it asks to be called again (x-should-retry: true)");
        }
        _ => {}
    }
    fault.asked_ms(asked_ms)
}

/// Whether a provider wants another try; `None` when it does not say.
fn may_try_again(headers: &HeaderMap) -> Option<bool> {
    headers.get("x-should-retry")?.to_str().ok()?.to_ascii_lowercase().parse().ok()
}

/// What came of waiting for bytes.
#[derive(Debug)]
enum Came {
    Bytes(bytes::Bytes),
    /// There are no more.
    End,
    Lost(Lost),
    /// More than an answer may have.
    TooMuch,
    /// Nothing in time.
    Nothing,
    /// Nothing in time, nor before.
    NotEvenTheFirst,
}

/// The body of an answer.
struct Body {
    response: Response,
    /// By when its first byte has to come.
    first_byte: Instant,
    limits: Limits,
    /// How many bytes have come.
    read: usize,
    /// How many may come.
    bytes_max: usize,
    /// What has been looked at but not taken.
    ahead: Option<bytes::Bytes>,
}

impl Body {
    const fn new(response: Response, first_byte: Instant, limits: Limits) -> Self {
        Self { response, first_byte, limits, read: 0, bytes_max: ANSWER_BYTES_MAX, ahead: None }
    }

    /// What it begins with, but for blanks and marks of byte order; `None` when that cannot be told from the first bytes.
    async fn peek(&mut self) -> Result<Option<u8>, Came> {
        match self.chunk(self.idle()).await {
            Came::Bytes(bytes) => {
                let begins =
                    bytes.iter().copied().find(|byte| !byte.is_ascii_whitespace() && !b"\xef\xbb\xbf".contains(byte));
                self.ahead = Some(bytes);
                Ok(begins)
            }
            Came::End => Ok(None),
            other => Err(other),
        }
    }

    /// All that is left.
    async fn rest(&mut self) -> Result<Vec<u8>, Came> {
        let mut rest = Vec::new();
        loop {
            match self.chunk(self.idle()).await {
                Came::Bytes(bytes) => rest.extend_from_slice(&bytes),
                Came::End => return Ok(rest),
                other => return Err(other),
            }
        }
    }

    /// How long may pass between two pieces.
    fn idle(&self) -> Duration {
        self.limits.idle.unwrap_or(FOREVER)
    }

    /// The next bytes, which are waited for as long as `patience`, or if they are the first as long as those may take.
    async fn chunk(&mut self, patience: Duration) -> Came {
        if let Some(bytes) = self.ahead.take() {
            return Came::Bytes(bytes);
        }
        let first = self.read == 0;
        let patience = if first { self.first_byte.saturating_duration_since(Instant::now()) } else { patience };
        for _ in 0..LOOKS {
            match timeout(patience / LOOKS, self.response.chunk()).await {
                Ok(Ok(Some(bytes))) if self.read + bytes.len() > self.bytes_max => return Came::TooMuch,
                Ok(Ok(Some(bytes))) => {
                    self.read += bytes.len();
                    return Came::Bytes(bytes);
                }
                Ok(Ok(None)) => return Came::End,
                Ok(Err(error)) => return Came::Lost(error),
                Err(_) => {}
            }
        }
        if first { Came::NotEvenTheFirst } else { Came::Nothing }
    }
}
