//! One attempt: perform the job, judge the outcome, finish. Ends when told to.

use crate::answers::Answers;
use crate::finisher::Finisher;
use crate::perform::{Perform, Progress, Reported, Started, Task};
use crate::permits::{Gated, Permits};
use genmill_core::attempt::{Failure, FailureClass, Outcome, Performed};
use genmill_core::gate::{Observation, Signal};
use genmill_core::judge::{Policy, Throttle, judge};
use genmill_core::request::TEXT_BYTES_MAX;
use genmill_daemon::random::random_u64;
use genmill_queue::{Finish, Kept, Lease};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a performer may take to end its work when told to stop.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// What takes longer than this tells that its provider is too slow, in milliseconds; a shorter bound of a job tells nothing.
const PATIENCE_MS: u64 = 30_000;

/// Why an attempt is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The job was cancelled.
    Cancelled,
    /// The job's deadline passed.
    DeadlinePassed,
    /// The lease went to somebody else.
    LeaseLost,
    /// The worker drains and has waited long enough.
    Draining,
    /// It has not started, and another worker could start it now.
    HandBack,
    /// The attempt took longer than it may.
    TimedOut,
}

/// What an attempt needs beside the job.
pub(crate) struct Bench<P> {
    pub(crate) performer: Arc<P>,
    pub(crate) policy: Policy,
    pub(crate) reported: mpsc::Sender<Reported>,
    pub(crate) finisher: Finisher,
    pub(crate) gated: Arc<Gated>,
}

impl<P> Clone for Bench<P> {
    fn clone(&self) -> Self {
        Self {
            performer: self.performer.clone(),
            policy: self.policy,
            reported: self.reported.clone(),
            finisher: self.finisher.clone(),
            gated: self.gated.clone(),
        }
    }
}

/// Runs one attempt to its end, verdict included.
pub(crate) async fn attempt<P: Perform>(
    bench: Bench<P>,
    lease: Arc<Lease>,
    started: Started,
    told: watch::Receiver<Option<Stop>>,
) {
    let token = CancellationToken::new();
    let task = Task { id: lease.id, epoch: lease.epoch, spec: Arc::clone(&lease.spec), key: lease.key.clone() };
    let permits = Permits::new(bench.gated.clone(), lease.held());
    let answers = Answers::new(bench.gated.queue().clone());
    let progress = Progress::new(&task, started, bench.reported.clone()).with_queue(permits, answers);
    let performer = bench.performer.clone();
    // In a box, it is there once: thousands of attempts wait for answers at the same time.
    let work = Box::pin(performer.perform(task, progress, token.clone()));
    let (performed, stop) = until_stopped(work, &lease, told, &token).await;
    let performed = settle(performed, stop, &lease);
    finish(&bench, &lease, performed).await;
}

/// Drives the work until it ends or is told to stop.
async fn until_stopped(
    mut work: Pin<Box<impl Future<Output = Performed>>>,
    lease: &Lease,
    mut told: watch::Receiver<Option<Stop>>,
    token: &CancellationToken,
) -> (Option<Performed>, Option<Stop>) {
    let now = Instant::now();
    let timeout = lease.spec.timeout_ms.map(|ms| now + Duration::from_millis(ms));
    // By the clock of Redis, in which both are told.
    let left_ms = lease.spec.deadline.map(|deadline| deadline.ms_since(lease.started_at));
    let deadline = left_ms.map(|ms| now + Duration::from_millis(ms));
    let stop = loop {
        tokio::select! {
            performed = &mut work => return (Some(performed), None),
            () = until(timeout) => break Stop::TimedOut,
            () = until(deadline) => break Stop::DeadlinePassed,
            // The sender lives as long as the loop that would tell; without it nobody can.
            Ok(why) = told.wait_for(Option::is_some) => if let Some(why) = *why { break why },
        }
    };
    token.cancel();
    let performed = tokio::time::timeout(STOP_GRACE, work).await.ok();
    (performed, Some(stop))
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// What is to be judged: a finished generation always counts, otherwise the reason for stopping does.
fn settle(performed: Option<Performed>, stop: Option<Stop>, lease: &Lease) -> Performed {
    let cost = performed.as_ref().and_then(|performed| performed.cost);
    // One that did not end in time may well have made its call.
    let observation =
        performed.as_ref().map_or_else(|| Some(Observation::default()), |performed| performed.observation);
    let observation = match stop {
        Some(Stop::TimedOut) if lease.spec.timeout_ms >= Some(PATIENCE_MS) => observation.map(too_slow),
        _ => observation,
    };
    let outcome = match (performed.map(|performed| bounded(performed.outcome)), stop) {
        (Some(Outcome::Generated(generation)), _) => Outcome::Generated(generation),
        (Some(Outcome::Failed(failure)), None) => Outcome::Failed(failure),
        (Some(outcome), None) => outcome,
        (_, Some(Stop::Cancelled)) => Outcome::Cancelled,
        (_, Some(Stop::DeadlinePassed)) => Outcome::DeadlinePassed,
        (_, Some(Stop::TimedOut)) => {
            let ms = lease.spec.timeout_ms.unwrap_or_default();
            Outcome::Failed(Failure::new(FailureClass::Timeout, format!("the attempt took longer than {ms} ms")))
        }
        (_, Some(Stop::LeaseLost | Stop::Draining | Stop::HandBack)) | (None, None) => Outcome::HandedBack,
    };
    Performed { outcome, cost, observation }
}

/// An outcome, unless it is larger than what is kept.
pub(crate) fn bounded(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Generated(generation) if generation.bytes() > TEXT_BYTES_MAX => {
            let bytes = generation.bytes();
            let message = format!(
                "the result has {bytes} bytes; at most {TEXT_BYTES_MAX} are kept: lower max_tokens, n or logprobs"
            );
            Outcome::Failed(Failure::new(FailureClass::Invalid, message))
        }
        outcome => outcome,
    }
}

/// What a call tells that was given up because it took too long.
fn too_slow(observation: Observation) -> Observation {
    match observation.signal {
        Signal::GivenUp => Observation { signal: Signal::Overloaded, ..observation },
        Signal::Answered | Signal::Throttled | Signal::Overloaded => observation,
    }
}

/// Judges what was performed and finishes the job, for as long as it takes Redis to answer: until somebody else has the
/// job, the result still counts.
pub(crate) async fn finish<P>(bench: &Bench<P>, lease: &Lease, performed: Performed) {
    // Without random numbers retries are not spread, which is no reason to stop.
    let random = random_u64().unwrap_or_default();
    let gated = lease.key.as_ref().is_some_and(|key| !key.is_spared());
    let throttle = if gated { Throttle::Gate } else { Throttle::Delay };
    let verdict = judge(performed.outcome, lease.failures, &bench.policy, throttle, random);
    let event = verdict.event();
    if let Some(failure) = verdict.failure() {
        tracing::warn!(job = %lease.id, class = ?failure.class, message = failure.loggable(), ?event, "attempt failed");
    }
    let finish = Arc::new(Finish { verdict, cost: performed.cost, observation: performed.observation });
    let mut wait = Duration::from_millis(50);
    loop {
        match bench.finisher.finish(lease, &finish).await {
            Ok(Kept::Kept) => return tracing::debug!(job = %lease.id, ?event, "finished"),
            Ok(Kept::LeaseLost) => return tracing::warn!(job = %lease.id, ?event, "the lease was lost before"),
            Err(error) if error.passing => {
                tracing::warn!(job = %lease.id, %error, "cannot finish; trying again");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(2));
            }
            Err(error) => {
                return tracing::error!(job = %lease.id, %error, "cannot finish; the job runs again after its lease");
            }
        }
    }
}
