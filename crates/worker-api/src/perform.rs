//! Performs a job: one call to its provider, its text reported as it comes.
//!
//! Never here: another try after a failure, and the bound of the whole attempt, which the worker's loop keeps.

use crate::catalog::{Catalog, Endpoint};
use crate::classify::{classify, redact, reset_ms, retry_after_ms};
use crate::collect::Collected;
use crate::dialect::{Encoded, FILLED_IN, ProviderError, StreamEvent, Streaming};
use crate::http::{Http, cause};
use crate::keys::{Keys, limits_of, observe};
use crate::limits;
use crate::prices::Prices;
use genmill_core::attempt::{Determinism, Failure, FailureClass, Generation, Outcome, Performed, Usage};
use genmill_core::gate::Declaration;
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_core::money::Picodollars;
use genmill_core::registration::ServedModel;
use genmill_core::request::Input;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_daemon::config;
use genmill_worker::perform::{Offer, Perform, Progress, Task};
use reqwest::{Response, StatusCode};
use std::time::Duration;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// The longest answer that is read, in bytes: far above what the largest models write.
const ANSWER_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The most that is read of a refusal, in bytes.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;

/// How long the usage is waited for once the text is whole. A provider that does not end its stream must not spoil the
/// answer.
const TAIL: Duration = Duration::from_secs(5);

/// In so many looks: a process that was stopped for longer than all of it finds the time over before it has read what came
/// meanwhile, and loses one look only.
const TAIL_LOOKS: u32 = 5;

/// Calls providers.
#[derive(Debug)]
pub struct Performer {
    catalog: Catalog,
    prices: Prices,
    http: Http,
    limits: Limits,
    keys: Keys,
    calls_start: u32,
    rows: Vec<config::Limit>,
}

/// How calls are made.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many to each provider are in flight at once.
    pub calls_max: u32,
    /// What becomes of parameters that a provider does not take.
    pub unsupported: Unsupported,
}

/// What becomes of parameters that a provider does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// They fail the job.
    Refuse,
    /// They are left out, which the result notes.
    LeaveOut,
}

impl Performer {
    /// A performer that calls the providers of `catalog`.
    #[must_use]
    pub fn new(catalog: Catalog, prices: Prices, http: Http, limits: Limits) -> Self {
        let keys = Keys::new(&catalog);
        Self { catalog, prices, http, limits, keys, calls_start: limits.calls_max, rows: Vec::new() }
    }

    /// The same one, which begins with so many calls of a model at once and keeps `rows`, together with all other workers.
    #[must_use]
    pub fn within(self, calls_start: u32, rows: Vec<config::Limit>) -> Self {
        Self { calls_start, rows, ..self }
    }
}

impl Perform for Performer {
    fn offers(&self) -> Vec<Offer> {
        let lanes = self.catalog.endpoints.keys();
        let capacity = self.limits.calls_max;
        lanes.map(|lane| Offer { lane: lane.clone(), capacity, tokens: None, changes: None }).collect()
    }

    fn declares(&self, lane: &Lane) -> Option<Declaration> {
        self.keys.declaration(lane, self.calls_start, limits_of(lane, &self.rows, &self.catalog))
    }

    fn models(&self) -> Vec<ServedModel> {
        self.catalog.models.clone()
    }

    async fn perform(&self, task: Task, mut progress: Progress, stop: CancellationToken) -> Performed {
        progress.started.set();
        let lane = task.spec.model.lane();
        let Some(endpoint) = self.keys.endpoint(&lane, task.key.as_ref()) else {
            let failure = Failure::new(FailureClass::Internal, format!("this worker has no provider for lane {lane}"));
            return Performed { outcome: Outcome::Failed(failure), cost: Some(Picodollars(0)), observation: None };
        };
        let unsupported = self.limits.unsupported;
        let (spec, progress, begun) = (&task.spec, &mut progress, Instant::now());
        let mut call = Call { endpoint, http: &self.http, unsupported, spec, progress, begun };
        let mut collected = Collected::new(&task.spec.sampling.stop);
        let ended = tokio::select! {
            biased;
            ended = call.make(&mut collected) => ended,
            () = stop.cancelled() => Ended::Stopped,
        };
        self.performed(endpoint, &task.spec, ended, collected)
    }
}

impl Performer {
    fn performed(&self, endpoint: &Endpoint, spec: &JobSpec, ended: Ended, collected: Collected) -> Performed {
        let priced_as = endpoint.provider.priced_as.as_deref().unwrap_or(&endpoint.name);
        let rates = self.prices.rates(priced_as, spec.model.backend_name());
        let cost = collected.cost(rates.as_ref());
        // What is refused takes no tokens.
        let usage = if matches!(ended, Ended::Refused(_)) { Some(Usage::default()) } else { collected.usage() };
        let told = collected.told();
        let (outcome, cost) = match ended {
            Ended::Refused(failure) => (Outcome::Failed(failure), Some(Picodollars(0))),
            Ended::Answered | Ended::Broken(_) | Ended::Stopped if collected.is_whole() => {
                let seeded = endpoint.dialect.sends_seed(spec.model.backend_name(), &endpoint.provider);
                let determinism = Some(if seeded { Determinism::Seeded } else { Determinism::None });
                let generation = Generation { determinism, ..collected.into_generation() };
                (Outcome::Generated(generation), cost)
            }
            Ended::Broken(failure) => (Outcome::Failed(failure), cost),
            Ended::Answered => (Outcome::Failed(cut_off(&endpoint.name)), cost),
            Ended::Stopped => (Outcome::HandedBack, cost),
        };
        let observation = Some(observe(&outcome, usage, told));
        Performed { outcome, cost, observation }
    }
}

/// How a call ended.
#[derive(Debug)]
enum Ended {
    /// The provider said all it had to say.
    Answered,
    /// Nothing was generated, so nothing is billed.
    Refused(Failure),
    /// It failed after something may have been generated.
    Broken(Failure),
    /// It was told to stop.
    Stopped,
}

fn cut_off(provider: &str) -> Failure {
    Failure::new(FailureClass::Transient, format!("{provider} ended the connection before the answer was whole"))
}

/// One call.
struct Call<'a> {
    endpoint: &'a Endpoint,
    http: &'a Http,
    unsupported: Unsupported,
    spec: &'a JobSpec,
    progress: &'a mut Progress,
    begun: Instant,
}

impl Call<'_> {
    async fn make(&mut self, collected: &mut Collected) -> Ended {
        let endpoint = self.endpoint;
        let streaming = if endpoint.provider.streaming { Streaming::On } else { Streaming::Off };
        let model = self.spec.model.backend_name();
        let encoded = endpoint.dialect.encode(self.spec, model, &endpoint.provider, streaming);
        if let Some(refused) = self.refuse_unsupported(&encoded.left_out) {
            return refused;
        }
        collected.left_out(&encoded.left_out);
        let response = match self.send(encoded).await {
            Ok(response) => response,
            Err(error) => return self.unreachable(&error),
        };
        collected.limits(limits::told(response.headers(), reset_ms));
        tracing::debug!(provider = endpoint.name, model, status = response.status().as_u16(), "answered");
        if !response.status().is_success() {
            return self.refused(response).await;
        }
        let kind = response.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        match kind.unwrap_or_default().split(';').next().unwrap_or_default().trim() {
            "text/html" => Ended::Broken(self.failure(FailureClass::Transient, "answered with a web page")),
            "application/json" => self.read_whole(response, collected).await,
            // A server that does not say what it sends sends what was asked for.
            _ if streaming == Streaming::On => self.read_stream(response, collected).await,
            _ => self.read_whole(response, collected).await,
        }
    }

    /// The failure of a request with parameters that the provider does not take, unless they are to be left out.
    fn refuse_unsupported(&self, left_out: &[&str]) -> Option<Ended> {
        let wanted: Vec<&str> = left_out.iter().filter(|name| !FILLED_IN.contains(name)).copied().collect();
        if wanted.is_empty() || self.unsupported == Unsupported::LeaveOut {
            return None;
        }
        let what = format!(
            "does not take {} for {}: leave it out of the request, or set drop_params = true under [api]",
            wanted.join(", "),
            self.spec.model.backend_name()
        );
        Some(Ended::Refused(self.failure(FailureClass::Invalid, &what)))
    }

    async fn send(&self, encoded: Encoded) -> reqwest::Result<Response> {
        let endpoint = self.endpoint;
        let url = format!("{}{}", endpoint.base_url.as_str().trim_end_matches('/'), encoded.path);
        let mut request = self.http.client(&endpoint.base_url).post(url).body(encoded.body);
        for (name, value) in encoded.headers {
            request = request.header(name, value);
        }
        endpoint.with_key(request).send().await
    }

    fn failure(&self, class: FailureClass, what: &str) -> Failure {
        Failure::new(class, format!("{} {what}", self.endpoint.name))
    }

    fn unreachable(&self, error: &reqwest::Error) -> Ended {
        let host = self.endpoint.base_url.host_str().unwrap_or_default();
        let failure =
            |class, what: &str| Failure::new(class, format!("{}: {what} {host}: {}", self.endpoint.name, cause(error)));
        if error.is_builder() {
            return Ended::Refused(failure(FailureClass::Invalid, "cannot make a request to"));
        }
        if error.is_connect() {
            return Ended::Refused(failure(FailureClass::Transient, "cannot connect to"));
        }
        Ended::Broken(failure(FailureClass::Transient, "lost the connection to"))
    }

    /// The failure that a provider's error stands for. What it quotes of key and prompt is cut out.
    fn told(&self, status: StatusCode, error: ProviderError) -> Failure {
        let key = self.endpoint.key.as_ref().map(|key| key.reveal());
        let said: Vec<&str> = match &self.spec.input {
            Input::Prompt(prompt) => vec![prompt],
            Input::Messages(messages) => messages.iter().map(|message| message.content.as_str()).collect(),
        };
        classify(&self.endpoint.name, status.as_u16(), &redact(error, key.into_iter().chain(said)))
    }

    async fn refused(&self, mut response: Response) -> Ended {
        let status = response.status();
        let wait = retry_after_ms(response.headers(), UnixMs(now_unix_ms()));
        let mut body = Vec::new();
        while let Ok(Some(bytes)) = response.chunk().await {
            body.extend_from_slice(&bytes[..bytes.len().min(REFUSAL_BYTES_MAX - body.len())]);
            if body.len() == REFUSAL_BYTES_MAX {
                break;
            }
        }
        let error = self.endpoint.dialect.decode_error(&body);
        let wait = wait.or(error.retry_after_ms);
        Ended::Refused(self.told(status, error).retry_after_ms(wait))
    }

    async fn read_whole(&mut self, mut response: Response, collected: &mut Collected) -> Ended {
        let status = response.status();
        let mut body = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(bytes)) if body.len() + bytes.len() > ANSWER_BYTES_MAX => return self.too_long(),
                Ok(Some(bytes)) => body.extend_from_slice(&bytes),
                Ok(None) => break,
                Err(error) => return self.unreachable(&error),
            }
        }
        match self.endpoint.dialect.decode(&body) {
            Ok(reply) => {
                let text = collected.take_reply(reply, self.elapsed_ms());
                self.progress.text(text).await;
                Ended::Answered
            }
            Err(error) => Ended::Broken(self.told(status, error)),
        }
    }

    async fn read_stream(&mut self, mut response: Response, collected: &mut Collected) -> Ended {
        let status = response.status();
        let mut decoder = self.endpoint.dialect.decoder();
        let (mut read, mut looks) = (0_usize, 0);
        while !collected.is_done() {
            let patience = if collected.is_whole() { TAIL / TAIL_LOOKS } else { Duration::MAX };
            let events = match timeout(patience, response.chunk()).await {
                Ok(Ok(Some(bytes))) => {
                    read += bytes.len();
                    decoder.push(&bytes)
                }
                Ok(Ok(None)) => {
                    self.take(decoder.end(), collected).await;
                    break;
                }
                Ok(Err(error)) => return self.unreachable(&error),
                Err(_) if looks + 1 < TAIL_LOOKS => {
                    looks += 1;
                    continue;
                }
                Err(_) => break,
            };
            if read > ANSWER_BYTES_MAX {
                return self.too_long();
            }
            self.take(events, collected).await;
        }
        match collected.error() {
            Some(error) => Ended::Broken(self.told(status, error.clone())),
            None => Ended::Answered,
        }
    }

    async fn take(&mut self, events: Vec<StreamEvent>, collected: &mut Collected) {
        for event in events {
            if let Some(text) = collected.take(event, self.elapsed_ms()) {
                self.progress.text(text).await;
            }
        }
    }

    fn too_long(&self) -> Ended {
        Ended::Broken(self.failure(FailureClass::Invalid, "sent more than the 32 MiB that an answer may have"))
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests;
