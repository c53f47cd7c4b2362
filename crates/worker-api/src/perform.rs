//! Performs a job: one call to its provider, once its circuit lets it pass, and what came of it.
//!
//! Never here: another try after a failure, and the bound of the whole attempt, which the worker's loop keeps.

use crate::breaker;
use crate::call::{Call, Ended};
use crate::catalog::{Catalog, Endpoint};
use crate::collect::Collected;
use crate::failure::{Fault, Health, Kind};
use crate::gates::{Gates, Passage, patience};
use crate::http::Http;
use crate::prices::{Class, Day, Prices};
use crate::repeats::Repeats;
use crate::settle::settle;
use genmill_core::attempt::{Determinism, Failure, FailureClass, Generation, Outcome, Performed};
use genmill_core::ids::JobId;
use genmill_core::job::JobSpec;
use genmill_core::money::Picodollars;
use genmill_core::registration::ServedModel;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_worker::perform::{Offer, Perform, Progress, Task};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A job waits in the worker's hands for so long at most until its provider may be called, and never for more than half
/// of what its attempt may take. Then the queue has it back, as if it had never been taken.
const HELD_MAX: Duration = Duration::from_secs(30);

/// A job that has to wait for longer than this waits in the queue, until the time is known to have come.
const HANDED_BACK_MAX: Duration = Duration::from_secs(10 * 60);

/// Calls providers.
#[derive(Debug)]
pub struct Performer {
    catalog: Catalog,
    prices: Prices,
    http: Http,
    limits: Limits,
    gates: Gates,
    repeats: Repeats,
}

/// How calls are made.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many to each provider are in flight at once.
    pub calls_max: u32,
    /// What becomes of parameters that a provider does not take.
    pub unsupported: Unsupported,
    /// How long the first byte of an answer may take, from the call on; `None`: as long as the attempt.
    pub first_byte: Option<Duration>,
    /// How long may pass between two pieces of an answer; `None`: as long as the attempt.
    pub idle: Option<Duration>,
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
        Self { catalog, prices, http, limits, gates: Gates::default(), repeats: Repeats::default() }
    }
}

impl Perform for Performer {
    fn offers(&self) -> Vec<Offer> {
        let lanes = self.catalog.endpoints.keys();
        let capacity = self.limits.calls_max;
        lanes.map(|lane| Offer { lane: lane.clone(), capacity, tokens: None, changes: None }).collect()
    }

    fn models(&self) -> Vec<ServedModel> {
        self.catalog.models.clone()
    }

    fn metrics(&self) -> String {
        self.gates.metrics()
    }

    async fn perform(&self, task: Task, mut progress: Progress, stop: CancellationToken) -> Performed {
        let lane = task.spec.model.lane();
        let Some(endpoint) = self.catalog.endpoints.get(&lane) else {
            let failure = Failure::new(FailureClass::Internal, format!("this worker has no provider for lane {lane}"));
            return Performed { outcome: Outcome::Failed(failure), cost: Some(Picodollars(0)) };
        };
        let (spec, begun) = (&task.spec, Instant::now());
        let gate = self.gates.of(&endpoint.name, spec.model.backend_name());
        let passage = tokio::select! {
            biased;
            () = stop.cancelled() => Err(None),
            passage = gate.pass(patience(held_max(spec))) => passage,
        };
        let passage = match passage {
            Ok(passage) => passage,
            Err(until) => return waits(&endpoint.name, until),
        };
        progress.started.set();
        let (http, limits, progress) = (&self.http, self.limits, &mut progress);
        let dialect = endpoint.dialect(spec.model.backend_name());
        let mut call = Call { endpoint, dialect, http, limits, spec, progress, begun };
        let mut collected = Collected::new(&spec.sampling.stop);
        let ended = tokio::select! {
            biased;
            ended = call.make(&mut collected) => ended,
            () = stop.cancelled() => Ended::Stopped,
        };
        let ended = self.judged(task.id, ended, passage);
        let cost = self.cost(endpoint, spec, &ended, &collected).await;
        performed(endpoint, spec, ended, collected, cost)
    }
}

impl Performer {
    /// Tells the circuit how a call ended, and whether the same failure has come too often.
    fn judged(&self, job: JobId, ended: Ended, passage: Passage) -> Ended {
        let fault = match &ended {
            Ended::Answered => {
                passage.came(breaker::Came::Told(Health::Works, None));
                return ended;
            }
            // It is given up by itself.
            Ended::Stopped => return ended,
            Ended::Refused(fault) | Ended::Broken(fault) => fault,
        };
        let asked = fault.asked_ms.map(Duration::from_millis);
        passage.came(breaker::Came::Told(fault.kind.policy().health, asked));
        if !fault.mark.as_ref().is_some_and(|mark| self.repeats.ends(job, mark)) {
            return ended;
        }
        match ended {
            Ended::Refused(fault) => Ended::Refused(fault.repeated()),
            Ended::Broken(fault) => Ended::Broken(fault.repeated()),
            Ended::Answered | Ended::Stopped => ended,
        }
    }

    /// What a call cost: by its answer, else by the record that its provider keeps of it. Never an estimate.
    async fn cost(
        &self,
        endpoint: &Endpoint,
        spec: &JobSpec,
        ended: &Ended,
        collected: &Collected,
    ) -> Option<Picodollars> {
        if matches!(ended, Ended::Refused(_)) {
            return Some(Picodollars(0));
        }
        let priced_as = endpoint.provider.priced_as.as_deref().unwrap_or(&endpoint.name);
        let (day, prompt) = (Day::of(UnixMs(now_unix_ms())), collected.prompt_tokens());
        let rates = self.prices.rates(priced_as, spec.model.backend_name(), Class::Standard, &day, prompt);
        match collected.cost(rates.as_ref()) {
            Some(cost) => Some(cost),
            None => settle(&self.http, endpoint, collected.id()).await,
        }
    }
}

fn performed(
    endpoint: &Endpoint,
    spec: &JobSpec,
    ended: Ended,
    collected: Collected,
    cost: Option<Picodollars>,
) -> Performed {
    let outcome = match ended {
        Ended::Refused(fault) => Outcome::Failed(fault.into_failure()),
        Ended::Broken(mut fault) if !collected.is_whole() => {
            if let (None, Some(tokens)) = (cost, collected.estimated_tokens()) {
                let spent =
                    format!("; about {tokens} tokens had come by then (estimated), and what they cost is not known");
                fault.message.push_str(&spent);
            }
            Outcome::Failed(fault.into_failure())
        }
        Ended::Stopped if !collected.is_whole() => Outcome::HandedBack,
        Ended::Answered | Ended::Broken(_) | Ended::Stopped => {
            let model = spec.model.backend_name();
            let seeded = endpoint.dialect(model).sends_seed(model, &endpoint.provider);
            let determinism = Some(if seeded { Determinism::Seeded } else { Determinism::None });
            Outcome::Generated(Generation { determinism, ..collected.into_generation() })
        }
    };
    Performed { outcome, cost }
}

/// How long a job may wait in the worker's hands.
fn held_max(spec: &JobSpec) -> Duration {
    spec.timeout_ms.map_or(HELD_MAX, |ms| Duration::from_millis(ms / 2).min(HELD_MAX))
}

/// What becomes of a job whose provider may not be called until some time, as far as that is known. Nothing was spent.
fn waits(provider: &str, until: Option<Instant>) -> Performed {
    let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
    let outcome = if left > HANDED_BACK_MAX {
        let what = format!("asked not to be called for {} min more", left.as_secs().div_ceil(60));
        let asked_ms = u64::try_from(left.as_millis()).ok();
        Outcome::Failed(Fault::new(Kind::Throttled, provider, &what).asked_ms(asked_ms).into_failure())
    } else {
        Outcome::HandedBack
    };
    Performed { outcome, cost: Some(Picodollars(0)) }
}

#[cfg(test)]
mod tests;
