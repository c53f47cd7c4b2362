//! Performs a job: one call to its provider, or to those that answer in its place, and what came of it.
//!
//! Never here: another try after a failure, and the bound of the whole attempt, which the worker's loop keeps.

use crate::cache::Cache;
use crate::call::{Call, Ended};
use crate::catalog::{Catalog, Endpoint};
use crate::collect::Collected;
use crate::failure::{Fault, Kind};
use crate::fallbacks::{Fallback, Fallbacks};
use crate::hedge::{Hedge, Hedges, Race, Runner};
use crate::http::Http;
use crate::keys::{Keys, limits_of, observe};
use crate::limits::Told;
use crate::prices::{Class, Day, Prices};
use crate::repeats::Repeats;
use crate::settle::{call_off, settle};
use genmill_core::attempt::{Determinism, Failure, FailureClass, Generation, Outcome, Performed, Usage};
use genmill_core::gate::{Bucket, Declaration, KeyId, Observation, Signal};
use genmill_core::ids::JobId;
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::registration::ServedModel;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_daemon::config;
use genmill_worker::perform::{Offer, Perform, Progress, Task};
use genmill_worker::permits::{Leave, Permits};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Calls providers.
#[derive(Debug)]
pub struct Performer {
    pub(crate) catalog: Catalog,
    pub(crate) prices: Prices,
    pub(crate) http: Http,
    pub(crate) limits: Limits,
    fallbacks: Fallbacks,
    pub(crate) hedges: Hedges,
    cache: Option<Cache>,
    repeats: Repeats,
    pub(crate) keys: Keys,
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
    /// Whether jobs go out in batches where their providers take those.
    pub batches: bool,
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
        let keys = Keys::new(&catalog);
        // Those of other providers would take megabytes.
        let prices = prices.only(|provider| catalog.endpoints.values().any(|known| known.priced_as() == provider));
        Self {
            catalog,
            prices,
            http,
            limits,
            fallbacks: Fallbacks::default(),
            hedges: Hedges::default(),
            cache: None,
            repeats: Repeats::default(),
            keys,
            calls_start: limits.calls_max,
            rows: Vec::new(),
        }
    }

    /// The same performer with models that answer in place of others.
    #[must_use]
    pub fn with_fallbacks(self, fallbacks: Fallbacks) -> Self {
        Self { fallbacks, ..self }
    }

    /// The same performer that calls once more where no answer begins.
    #[must_use]
    pub fn with_hedges(self, hedges: Hedges) -> Self {
        Self { hedges, ..self }
    }

    /// The same performer that keeps answers for the same request, if at all.
    #[must_use]
    pub fn with_cache(self, cache: Option<Cache>) -> Self {
        Self { cache, ..self }
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
        let limits = limits_of(lane, &self.rows, &self.catalog);
        self.keys.declaration(lane, self.calls_start, limits, self.fallbacks.covered(lane))
    }

    fn models(&self) -> Vec<ServedModel> {
        let batches = |model: &ServedModel| self.batch_api(&model.name.lane()).is_some();
        self.catalog.models.iter().map(|model| ServedModel { batches: batches(model), ..model.clone() }).collect()
    }

    async fn perform(&self, task: Task, progress: Progress, stop: CancellationToken) -> Performed {
        let kept = self.cache.and_then(|cache| Some((cache, Cache::request(&task.spec)?)));
        if let Some((_, request)) = &kept
            && let Some(answer) = progress.answers.find(&task.spec.tenant, request).await
        {
            return again(answer, &progress).await;
        }
        let performed = self.ask(&task, &progress, &stop).await;
        if let Some((cache, request)) = &kept
            && let Outcome::Generated(answer) = &performed.outcome
            && Cache::is_kept(answer)
        {
            progress.answers.keep(&task.spec.tenant, request, answer, cache.bounds).await;
        }
        performed
    }
}

/// A kept answer as what came of another job. No call was made, so its permit goes back unspent.
async fn again(answer: Generation, progress: &Progress) -> Performed {
    progress.started.set();
    let texts = std::iter::once(&answer.text).chain(answer.more.iter().map(|sample| &sample.text));
    for (sample, text) in (0..).zip(texts) {
        progress.text_of(sample, text.clone()).await;
    }
    let outcome = Outcome::Generated(Generation { cached: true, first_token_ms: Some(0), ..answer });
    Performed { outcome, cost: Some(Cost::NOTHING), observation: None }
}

impl Performer {
    /// Asks the job's model, and those that answer in its place.
    async fn ask(&self, task: &Task, progress: &Progress, stop: &CancellationToken) -> Performed {
        let begun = Instant::now();
        let hedge = self.hedges.of(&task.spec.model);
        let own = Attempt { job: task.id, spec: &task.spec, key: task.key.as_ref(), hedge, begun, stop };
        let is_spared = task.key.as_ref().is_some_and(KeyId::is_spared);
        let mut tried = if is_spared { held_back(&task.spec) } else { self.attempt(own, progress).await };
        let mut observation = if is_spared { None } else { tried.performed.observation };
        // In boxes: few jobs come there, and all would keep room for it.
        if !is_spared && tried.failed.is_some_and(is_of_key) {
            (tried, observation) = Box::pin(self.with_other_keys(own, tried, progress)).await;
        }
        let helps = |fallback: &&Fallback| is_spared || tried.failed.is_some_and(|kind| fallback.helps(kind));
        let performed = match self.fallbacks.of(&task.spec.model).filter(helps) {
            Some(fallback) => Box::pin(self.ask_others(task, fallback, tried, begun, progress, stop)).await,
            None => tried.performed,
        };
        // The job's own permit is for its own model; the others have theirs.
        Performed { observation, ..performed }
    }

    /// Asks the models that answer in place of the job's own, after that was `tried`.
    async fn ask_others(
        &self,
        task: &Task,
        fallback: &Fallback,
        mut tried: Tried,
        begun: Instant,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Performed {
        let mut spent = tried.performed.cost;
        let (mut first, mut answers) = (None, None);
        for next in &fallback.to {
            // How one of them fails is no reason to leave out those that come after it.
            if tried.failed.is_none() || stop.is_cancelled() {
                break;
            }
            let spec = JobSpec { model: next.clone(), ..(*task.spec).clone() };
            let Some(leave) = self.leave(&spec, &progress.permits).await else { continue };
            tracing::warn!(job = %task.id, model = %task.spec.model, kind = ?tried.failed, %next, "failed: asking another model");
            let key = leave.key.as_ref();
            let other = Attempt { job: task.id, spec: &spec, key, hedge: None, begun, stop };
            let failed = std::mem::replace(&mut tried, self.attempt(other, progress).await);
            leave.settle(tried.performed.observation.as_ref()).await;
            spent = spent.zip(tried.performed.cost).map(|(spent, cost)| spent.plus(cost));
            first.get_or_insert(failed.performed.outcome);
            answers = Some(next);
        }
        let mut outcome = tried.performed.outcome;
        if let (Outcome::Generated(generation), Some(model)) = (&mut outcome, answers) {
            generation.answered_by = Some(model.clone());
        }
        let outcome = match first {
            Some(first) => in_all(first, outcome),
            None => outcome,
        };
        Performed { outcome, cost: spent, observation: None }
    }

    /// Asks a model with other keys than that for which the job has its permit, as long as the provider refuses the key
    /// itself. With what came of it comes what the call that was `tried` tells: the permit is for that.
    async fn with_other_keys(
        &self,
        own: Attempt<'_>,
        mut tried: Tried,
        progress: &Progress,
    ) -> (Tried, Option<Observation>) {
        let observation = tried.performed.observation;
        let lane = own.spec.model.lane();
        let mut keys = self.keys.of(&lane).unwrap_or_default();
        let mut refused = own.key.or(self.keys.first(&lane)).cloned();
        let mut leaves = Vec::new();
        while tried.failed.is_some_and(is_of_key) && !own.stop.is_cancelled() {
            keys.retain(|key| Some(key) != refused.as_ref());
            if keys.is_empty() {
                break;
            }
            let Some(leave) = progress.permits.ask(own.spec, &keys).await else {
                tried.performed.outcome = another_time(tried.performed.outcome);
                tried.failed = Some(Kind::Transient);
                break;
            };
            tracing::warn!(job = %own.job, model = %own.spec.model, kind = ?tried.failed, "refused: asking with another key");
            refused = leave.key.clone().or_else(|| keys.first().cloned());
            let next = Attempt { key: refused.as_ref(), hedge: None, ..own };
            let spent = tried.performed.cost;
            tried = self.attempt(next, progress).await;
            leaves.push((leave, tried.performed.observation));
            tried.performed.cost = spent.zip(tried.performed.cost).map(|(spent, cost)| spent.plus(cost));
        }
        // A key that is refused where another one is not is left alone for a while; where all are, jobs are to fail.
        let is_refused = tried.failed.is_some_and(is_of_key);
        let last = leaves.pop();
        for (leave, told) in leaves {
            leave.settle(if is_refused { told } else { spared(told) }.as_ref()).await;
        }
        if let Some((leave, told)) = last {
            leave.settle(told.as_ref()).await;
        }
        (tried, if is_refused { observation } else { spared(observation) })
    }
}

/// How long a job waits whose model is held back, when none of those that answer in its place has room.
const HELD_BACK_MS: u64 = 10_000;

/// What comes of a model that is held back and asked nothing.
fn held_back(spec: &JobSpec) -> Tried {
    let message = format!("{} is held back, as its provider asked to slow down or fails", spec.model);
    let failure = Failure::new(FailureClass::Throttled, message).retry_after_ms(Some(HELD_BACK_MS));
    let performed = Performed { outcome: Outcome::Failed(failure), cost: Some(Cost::NOTHING), observation: None };
    Tried { performed, failed: Some(Kind::Throttled) }
}

/// Whether a failure is that of a key, which another one may not have.
const fn is_of_key(kind: Kind) -> bool {
    matches!(kind, Kind::Auth | Kind::Quota)
}

/// How long a key is left alone that was refused.
const SPARED_MS: u64 = 60_000;

/// What a call tells whose key is to be left alone.
fn spared(told: Option<Observation>) -> Option<Observation> {
    let spared = |told| Observation { signal: Signal::Throttled, retry_after_ms: Some(SPARED_MS), ..told };
    told.map(spared)
}

/// The end of a call whose key was refused while no other one has room: the job is tried again.
fn another_time(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Failed(failure) => {
            let with = |message: &str| format!("{message}; no other key has room now");
            let unquoted = Some(with(failure.loggable()));
            Outcome::Failed(Failure::new(FailureClass::Transient, with(&failure.message)).unquoted(unquoted))
        }
        other => other,
    }
}

/// What becomes of a job whose model ended as `first` tells, and the last of its fallbacks as `last`: an answer counts,
/// else whatever lets the job be tried again. One that is throttled in its place does not: the job would wait at the gate
/// of its own model, which is open, and the next time the other one is not asked.
pub(crate) fn in_all(first: Outcome, last: Outcome) -> Outcome {
    match (first, last) {
        (Outcome::Failed(first), Outcome::Failed(last)) => {
            let helps = last.is_retried() && last.class != FailureClass::Throttled;
            let (told, other) = if helps && !first.is_retried() { (last, first) } else { (first, last) };
            let both = |told: &str, other: &str| format!("{told}; and another model: {other}");
            let unquoted = both(told.loggable(), other.loggable());
            let failure = Failure::new(told.class, both(&told.message, &other.message));
            let failure = failure.retry_after_ms(told.retry_after_ms).unquoted(Some(unquoted));
            Outcome::Failed(if told.is_lasting { failure.lasting() } else { failure })
        }
        (first @ Outcome::Failed(_), Outcome::HandedBack) => first,
        (_, last) => last,
    }
}

/// What is to be tried.
#[derive(Clone, Copy)]
pub(crate) struct Attempt<'a> {
    pub(crate) job: JobId,
    pub(crate) spec: &'a JobSpec,
    /// The key for which the queue has given a permit; `None`: any, its lane has no gates.
    key: Option<&'a KeyId>,
    /// When it is called once more.
    hedge: Option<&'a Hedge>,
    /// When the job's attempt began.
    pub(crate) begun: Instant,
    pub(crate) stop: &'a CancellationToken,
}

/// A call that has ended.
pub(crate) struct Ran<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) spec: &'a JobSpec,
    pub(crate) ended: Ended,
    pub(crate) collected: Collected,
}

/// What came of asking a model.
pub(crate) struct Tried {
    pub(crate) performed: Performed,
    /// Why there is no answer, and nothing of one that anybody has seen.
    pub(crate) failed: Option<Kind>,
}

impl Performer {
    /// Leave to ask a model beside the job's own, where this worker serves it and its gates have room.
    async fn leave(&self, spec: &JobSpec, permits: &Permits) -> Option<Leave> {
        permits.ask(spec, &self.keys.of(&spec.model.lane())?).await
    }

    /// Asks one model.
    async fn attempt(&self, attempt: Attempt<'_>, progress: &Progress) -> Tried {
        let Attempt { job, spec, key, hedge, begun, stop } = attempt;
        let lane = spec.model.lane();
        let Some(endpoint) = self.keys.endpoint(&lane, key) else {
            let failure = Failure::new(FailureClass::Internal, format!("this worker has no provider for lane {lane}"));
            let performed =
                Performed { outcome: Outcome::Failed(failure), cost: Some(Cost::NOTHING), observation: None };
            return Tried { performed, failed: Some(Kind::NotFound) };
        };
        if stop.is_cancelled() {
            let performed = Performed { outcome: Outcome::HandedBack, cost: Some(Cost::NOTHING), observation: None };
            return Tried { performed, failed: None };
        }
        progress.started.set();
        if let Some(hedge) = hedge {
            return Box::pin(self.hedged(&attempt, endpoint, hedge, progress)).await;
        }
        let mut collected = Collected::new(&spec.sampling.stop).of_samples(spec.sampling.controls.samples());
        let ended = tokio::select! {
            biased;
            ended = self.call(endpoint, spec, begun, progress, None, &mut collected) => ended,
            () = stop.cancelled() => Ended::Stopped,
        };
        self.concluded(job, Ran { endpoint, spec, ended, collected }).await
    }

    /// Makes one call.
    pub(crate) async fn call(
        &self,
        endpoint: &Endpoint,
        spec: &JobSpec,
        begun: Instant,
        progress: &Progress,
        race: Option<(&Race, Runner)>,
        collected: &mut Collected,
    ) -> Ended {
        let (http, limits, dialect) = (&self.http, self.limits, endpoint.dialect(spec.model.backend_name()));
        Call { endpoint, dialect, http, limits, spec, progress, race, begun }.make(collected).await
    }

    /// What came of a call.
    pub(crate) async fn concluded(&self, job: JobId, ran: Ran<'_>) -> Tried {
        let Ran { endpoint, spec, ended, collected } = ran;
        if let Some(url) = collected.cancel() {
            // In a box, as it is rare.
            Box::pin(call_off(&self.http, endpoint, url)).await;
        }
        let ended = self.judged(job, spec, collected.told().0, ended);
        let failed = match &ended {
            // What was shown already cannot be taken back within an attempt.
            Ended::Refused(fault) | Ended::Broken(fault) if collected.bytes() == 0 => Some(fault.kind),
            Ended::Refused(_) | Ended::Broken(_) | Ended::Answered | Ended::Stopped => None,
        };
        let cost = self.cost(endpoint, spec, &ended, &collected).await;
        Tried { performed: performed(ended, collected, cost), failed }
    }

    /// The same end, unless the same failure has come too often.
    fn judged(&self, job: JobId, spec: &JobSpec, told: Told, ended: Ended) -> Ended {
        let ended = match ended {
            Ended::Refused(fault) if fault.kind == Kind::Throttled => {
                Ended::Refused(self.throttled(job, spec, told, fault))
            }
            other => other,
        };
        let (Ended::Refused(fault) | Ended::Broken(fault)) = &ended else { return ended };
        if !fault.mark.as_ref().is_some_and(|mark| self.repeats.ends(job, mark)) {
            return ended;
        }
        match ended {
            Ended::Refused(fault) => Ended::Refused(fault.repeated()),
            Ended::Broken(fault) => Ended::Broken(fault.repeated()),
            Ended::Answered | Ended::Stopped => ended,
        }
    }

    /// The same failure, unless the job is larger than the limit of which its provider tells that much is left, so that
    /// others are not to blame. What is larger is estimated, so it is let go a few times, but not for ever.
    fn throttled(&self, job: JobId, spec: &JobSpec, told: Told, fault: Fault) -> Fault {
        let tokens = spec.estimated_tokens();
        let too_small = |bucket: Bucket| {
            let (limit, left) = (bucket.limit?, bucket.remaining?);
            (tokens > limit && left.saturating_mul(2) >= limit).then_some(limit)
        };
        let Some(limit) = told.tokens.and_then(too_small) else { return fault };
        // No other job has this mark.
        if self.repeats.ends(job, &format!("{job} is too large")) { fault.too_large(tokens, limit) } else { fault }
    }

    /// What a call cost: by its answer, else by the record that its provider keeps of it, else, when it did not end by
    /// itself, about by what had come until then.
    async fn cost(&self, endpoint: &Endpoint, spec: &JobSpec, ended: &Ended, collected: &Collected) -> Option<Cost> {
        if matches!(ended, Ended::Refused(_)) {
            return Some(Cost::NOTHING);
        }
        let whole = collected.is_whole() && collected.usage().is_some();
        let cut_short = !matches!(ended, Ended::Answered) && !whole;
        let recorded = match collected.billed() {
            Some(billed) => Some(billed),
            // An answer that told its tokens told all that its provider knows.
            None if whole => None,
            // In a box, as it is rare.
            None => Box::pin(settle(&self.http, endpoint, collected.id())).await,
        };
        if let Some(cost) = recorded {
            return Some(Cost::exact(cost));
        }
        let prompt_bytes = spec.input.text_bytes() + spec.sampling.controls.text_bytes();
        let usage = if cut_short { collected.estimated_usage(prompt_bytes) } else { collected.usage()? };
        let has_price = |class| self.prices.has(endpoint.priced_as(), class);
        let class = Some(collected.class()).filter(|class| has_price(*class)).unwrap_or_default();
        let amount = self.priced(endpoint, spec, class, collected, &usage);
        amount.map(|amount| Cost { amount, estimated: cut_short })
    }

    /// What `usage` of a call costs today at the prices of a class, as far as they are known.
    pub(crate) fn priced(
        &self,
        endpoint: &Endpoint,
        spec: &JobSpec,
        class: Class,
        collected: &Collected,
        usage: &Usage,
    ) -> Option<Picodollars> {
        let day = Day::of(UnixMs(now_unix_ms()));
        let rates =
            self.prices.rates(endpoint.priced_as(), spec.model.backend_name(), class, &day, usage.prompt_tokens);
        collected.priced(usage, rates.as_ref())
    }
}

pub(crate) fn performed(ended: Ended, collected: Collected, cost: Option<Cost>) -> Performed {
    // What is refused takes no tokens.
    let usage = if matches!(ended, Ended::Refused(_)) { Some(Usage::default()) } else { collected.usage() };
    let told = collected.told();
    let outcome = match ended {
        Ended::Refused(fault) => Outcome::Failed(fault.into_failure()),
        Ended::Broken(mut fault) if !collected.is_whole() => {
            let tokens = collected.estimated_usage(0).completion_tokens;
            if tokens > 0 && cost.is_none_or(|cost| cost.estimated) {
                let known = if cost.is_none() { ", and what they cost is not known" } else { "" };
                fault.message = format!("{}; about {tokens} tokens had come by then (estimated){known}", fault.message);
            }
            Outcome::Failed(fault.into_failure())
        }
        Ended::Stopped if !collected.is_whole() => Outcome::HandedBack,
        Ended::Answered | Ended::Broken(_) | Ended::Stopped => {
            let generation = collected.into_generation();
            let seeded = generation.left_out.iter().all(|parameter| parameter != "seed");
            let determinism = Some(if seeded { Determinism::Seeded } else { Determinism::None });
            Outcome::Generated(Generation { determinism, ..generation })
        }
    };
    let observation = Some(observe(&outcome, usage, told));
    Performed { outcome, cost, observation }
}

#[cfg(test)]
mod tests;
