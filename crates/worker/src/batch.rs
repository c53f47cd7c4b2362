//! One batch, from being full to its last result: submit, search, look, collect, close.
//!
//! Never here: which jobs go into it (`batching`).

use crate::attempt::bounded;
use crate::batches::{Arrived, Batch, Found, Item, PerformBatches, Stage, Unsubmitted};
use crate::batching::Batching;
use genmill_core::attempt::{Failure, FailureClass, Outcome};
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_core::judge::{Policy, Throttle, judge};
use genmill_core::money::Cost;
use genmill_daemon::random::random_u64;
use genmill_queue::{BatchRecord, BatchState, Ended, Finish, Held, Kept, Member, Members, Moved, Queue, QueueError};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout_at};

/// How many results are written down together.
const STEP: usize = 100;

/// How long a provider that fails is left alone; twice as long each further time, up to the longest.
const PAUSE_FIRST: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// A search is repeated so often until it is believed that a batch is not there.
const SEARCHES: u32 = 3;

/// What the holder of a batch and its task tell each other.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// It takes no more jobs.
    pub(crate) full: Notify,
    /// How many of its jobs are wanted still.
    pub(crate) wanted: AtomicU64,
}

/// A batch that this worker holds.
pub(crate) struct Driver<P> {
    pub(crate) queue: Queue,
    pub(crate) performer: Arc<P>,
    pub(crate) worker: WorkerId,
    pub(crate) lane: LaneNumber,
    pub(crate) policy: Policy,
    pub(crate) times: Batching,
    pub(crate) record: BatchRecord,
    pub(crate) told: Arc<Told>,
}

/// What follows from a step.
enum Next {
    /// The next one, at once.
    Now,
    /// The same, after its usual pause.
    Later(Duration),
    /// The same, when whoever failed may have come back.
    Failed(Failure),
    /// Nothing: it is done, or somebody else holds it.
    Over,
}

impl<P: PerformBatches> Driver<P> {
    /// Does with it whatever is next, until it is done or lost. May be dropped between any two answers: whoever takes over
    /// goes on from what is written down.
    pub(crate) async fn run(mut self, filled_until: Instant) {
        if self.record.state == BatchState::Intent && !self.record.tried {
            // Whichever comes first.
            drop(timeout_at(filled_until, self.told.full.notified()).await);
        }
        let (mut failed, mut searches, mut cancelled) = (0, 0, false);
        loop {
            let next = match self.record.state {
                BatchState::Intent if self.record.tried => self.search(&mut searches).await,
                BatchState::Intent => self.submit().await,
                BatchState::Submitted => self.look(&mut cancelled).await,
                BatchState::Collecting => self.collect().await,
            };
            let pause = match next {
                Ok(Next::Over) => return,
                Ok(Next::Now) => {
                    failed = 0;
                    continue;
                }
                Ok(Next::Later(pause)) => {
                    failed = 0;
                    pause
                }
                Ok(Next::Failed(failure)) => {
                    let (tag, model, message) = (&self.record.tag, &self.record.model, &failure.message);
                    tracing::warn!(tag, %model, class = ?failure.class, message, "a batch cannot go on; trying again");
                    let asked = failure.retry_after_ms.map(Duration::from_millis).unwrap_or_default();
                    failed += 1;
                    (PAUSE_FIRST * 2_u32.saturating_pow(failed - 1)).min(PAUSE_MAX).max(asked)
                }
                Err(error) => {
                    tracing::warn!(
                        tag = self.record.tag,
                        error = error.in_full(),
                        "a batch cannot go on; trying again"
                    );
                    PAUSE_FIRST
                }
            };
            sleep(pause).await;
        }
    }

    /// Submits it. That it is about to be is written down first, so that nobody ever submits it a second time unseen.
    async fn submit(&mut self) -> Result<Next, QueueError> {
        if self.advance(BatchState::Intent, true, None).await? == Moved::Lost {
            return Ok(Next::Over);
        }
        self.record.tried = true;
        let members = self.members().await?;
        let wanted: Vec<Member> = members.jobs.into_iter().filter(|member| member.wanted).collect();
        if wanted.is_empty() {
            return self.close().await;
        }
        let (tag, model, jobs) = (&self.record.tag, &self.record.model, wanted.len());
        let batch = self.batch(&wanted);
        match self.performer.submit(&batch).await {
            Ok(remote) => {
                tracing::info!(tag, %model, jobs, remote, "submitted a batch");
                self.is_submitted(remote).await
            }
            Err(Unsubmitted::Refused(failure)) => {
                tracing::warn!(tag, %model, jobs, class = ?failure.class, message = failure.loggable(), "a batch was refused");
                self.fail(wanted, &failure, Some(Cost::NOTHING)).await
            }
            Err(Unsubmitted::Unclear(failure)) => Ok(Next::Failed(failure)),
        }
    }

    /// Looks whether it was submitted by somebody who could not say so.
    async fn search(&mut self, searches: &mut u32) -> Result<Next, QueueError> {
        let members = self.members().await?;
        let found = match self.performer.find(&self.batch(&members.jobs)).await {
            Ok(found) => found,
            Err(failure) => return Ok(Next::Failed(failure)),
        };
        let (tag, model) = (&self.record.tag, &self.record.model);
        match found {
            Found::Here(remote) => {
                tracing::info!(tag, %model, remote, "found a batch that was submitted before");
                self.is_submitted(remote).await
            }
            Found::NotYet => Ok(Next::Later(self.times.poll)),
            // A call that was on its way when its worker ended may still arrive.
            Found::NotThere if *searches < SEARCHES => {
                *searches += 1;
                Ok(Next::Later(self.times.settle / SEARCHES))
            }
            Found::NotThere => {
                *searches = 0;
                self.record.tried = false;
                match self.advance(BatchState::Intent, false, None).await? {
                    Moved::Lost => Ok(Next::Over),
                    Moved::On | Moved::NotDone => Ok(Next::Now),
                }
            }
            Found::Never(why) => {
                let message = format!(
                    "nobody can tell whether batch {tag} was submitted, so it is not submitted again: {why}. Look for it at \
                     the provider; `genmill redrive` submits its jobs anew"
                );
                tracing::error!(tag, %model, message, "stopped a batch");
                let wanted = members.jobs.into_iter().filter(|member| member.wanted).collect();
                self.fail(wanted, &Failure::new(FailureClass::Internal, message), None).await
            }
        }
    }

    async fn is_submitted(&mut self, remote: String) -> Result<Next, QueueError> {
        // Until this is written down it would have to be searched for.
        loop {
            match self.advance(BatchState::Submitted, false, Some(&remote)).await {
                Ok(Moved::Lost) => return Ok(Next::Over),
                Ok(Moved::On | Moved::NotDone) => break,
                Err(error) if error.is_passing() => {
                    tracing::warn!(
                        tag = self.record.tag,
                        error = error.in_full(),
                        "cannot write a batch down; trying again"
                    );
                    sleep(Duration::from_secs(1)).await;
                }
                Err(error) => return Err(error),
            }
        }
        self.record.state = BatchState::Submitted;
        self.record.remote = Some(remote);
        Ok(Next::Later(self.times.poll))
    }

    async fn look(&mut self, cancelled: &mut bool) -> Result<Next, QueueError> {
        let (batch, remote) = (self.batch(&[]), self.remote());
        let stage = match self.performer.look(&batch, &remote).await {
            Ok(stage) => stage,
            Err(failure) => return Ok(Next::Failed(failure)),
        };
        let (tag, model) = (&self.record.tag, &self.record.model);
        match stage {
            Stage::Works if self.told.wanted.load(Ordering::Relaxed) == 0 && !*cancelled => {
                tracing::info!(tag, %model, remote, "none of its jobs is wanted any more: cancelling a batch");
                *cancelled = true;
                Ok(match self.performer.cancel(&batch, &remote).await {
                    Ok(()) => Next::Later(self.times.poll),
                    Err(failure) => Next::Failed(failure),
                })
            }
            Stage::Works => Ok(Next::Later(self.times.poll)),
            Stage::Ended => match self.advance(BatchState::Collecting, false, Some(&remote)).await? {
                Moved::Lost => Ok(Next::Over),
                Moved::On | Moved::NotDone => {
                    self.record.state = BatchState::Collecting;
                    Ok(Next::Now)
                }
            },
            Stage::Refused(failure) => {
                tracing::warn!(tag, %model, remote, class = ?failure.class, message = failure.loggable(), "a batch was refused");
                let wanted = self.members().await?.jobs.into_iter().filter(|member| member.wanted).collect();
                self.fail(wanted, &failure, Some(Cost::NOTHING)).await
            }
        }
    }

    /// Writes down what came of its jobs. Those of which nothing came wait for another batch; nobody is to blame.
    async fn collect(&mut self) -> Result<Next, QueueError> {
        let members = self.members().await?.jobs;
        let (batch, remote) = (self.batch(&members), self.remote());
        let known: HashMap<(JobId, Epoch), Member> =
            members.into_iter().map(|member| ((member.held.id, member.held.epoch), member)).collect();
        let (sender, mut results) = mpsc::channel(STEP);
        let written = async {
            let (mut arrived, mut count) = (Vec::with_capacity(STEP), 0);
            while results.recv_many(&mut arrived, STEP).await > 0 {
                count += arrived.len();
                self.arrive(&known, arrived.drain(..)).await?;
            }
            Ok(count)
        };
        let (read, written) = tokio::join!(self.performer.collect(&batch, &remote, sender), written);
        let count = written?;
        if let Err(failure) = read {
            return Ok(Next::Failed(failure));
        }
        let missing: Vec<Member> = self.members().await?.jobs.into_iter().filter(|member| member.wanted).collect();
        let (tag, model) = (&self.record.tag, &self.record.model);
        tracing::info!(tag, %model, results = count, missing = missing.len(), "read the results of a batch");
        self.end(missing, |_| Outcome::HandedBack, Some(Cost::NOTHING)).await?;
        self.close().await
    }

    async fn arrive(
        &self,
        known: &HashMap<(JobId, Epoch), Member>,
        arrived: impl Iterator<Item = Arrived>,
    ) -> Result<(), QueueError> {
        let finishes = arrived.filter_map(|Arrived { id, epoch, performed }| {
            let member = known.get(&(id, epoch))?;
            Some((
                member.held,
                member.started_at,
                self.judged(bounded(performed.outcome), member.failures, performed.cost),
            ))
        });
        self.finish(&finishes.collect::<Vec<_>>()).await
    }

    /// Ends jobs, all alike.
    async fn end(
        &self,
        members: Vec<Member>,
        outcome: impl Fn(&Member) -> Outcome,
        cost: Option<Cost>,
    ) -> Result<(), QueueError> {
        let ended =
            |member: &Member| (member.held, member.started_at, self.judged(outcome(member), member.failures, cost));
        self.finish(&members.iter().map(ended).collect::<Vec<_>>()).await
    }

    async fn fail(&self, members: Vec<Member>, failure: &Failure, cost: Option<Cost>) -> Result<Next, QueueError> {
        self.end(members, |_| Outcome::Failed(failure.clone()), cost).await?;
        self.close().await
    }

    fn judged(&self, outcome: Outcome, failures: u32, cost: Option<Cost>) -> Finish {
        // Without random numbers retries are not spread, which is no reason to stop.
        let verdict = judge(outcome, failures, &self.policy, Throttle::Delay, random_u64().unwrap_or_default());
        Finish { verdict, cost, observation: None }
    }

    async fn finish(&self, finishes: &[(Held, genmill_core::time::UnixMs, Finish)]) -> Result<(), QueueError> {
        for step in finishes.chunks(STEP) {
            let ended: Vec<Ended<'_>> = step
                .iter()
                .map(|(held, started_at, finish)| Ended { held: *held, started_at: *started_at, finish })
                .collect();
            let kept = self.queue.finish(self.lane, &WorkerId::of_batch(&self.record.tag), &ended).await?;
            for (ended, _) in ended.iter().zip(kept).filter(|(_, kept)| *kept == Kept::LeaseLost) {
                tracing::debug!(job = %ended.held.id, "came for a job that does not want it any more; its cost is booked");
            }
        }
        Ok(())
    }

    /// Its jobs. Those that cannot be read are ended.
    async fn members(&self) -> Result<Members, QueueError> {
        let mut members = self.queue.batch_members(self.lane, &self.record.tag).await?;
        let failure = Failure::new(FailureClass::Internal, "the stored job cannot be read");
        let ended = members
            .damaged
            .drain(..)
            .map(|(held, started_at)| (held, started_at, self.judged(Outcome::Failed(failure.clone()), 0, None)));
        self.finish(&ended.collect::<Vec<_>>()).await?;
        Ok(members)
    }

    async fn close(&self) -> Result<Next, QueueError> {
        match self.queue.close_batch(self.lane, &self.worker, (&self.record.tag, self.record.epoch)).await? {
            Moved::On | Moved::Lost => Ok(Next::Over),
            // Whatever could not be ended is tried again.
            Moved::NotDone => Ok(Next::Later(PAUSE_FIRST)),
        }
    }

    async fn advance(&self, state: BatchState, tried: bool, remote: Option<&str>) -> Result<Moved, QueueError> {
        let batch = (self.record.tag.as_str(), self.record.epoch);
        self.queue.advance_batch(self.lane, &self.worker, batch, state, tried, remote).await
    }

    fn remote(&self) -> String {
        self.record.remote.clone().unwrap_or_default()
    }

    fn batch(&self, members: &[Member]) -> Batch {
        let BatchRecord { tag, model, key, made_at, .. } = &self.record;
        let item = |member: &Member| Item { id: member.held.id, epoch: member.held.epoch, spec: member.spec.clone() };
        Batch {
            tag: tag.clone(),
            model: model.clone(),
            key: key.clone(),
            since: *made_at,
            items: members.iter().map(item).collect(),
        }
    }
}
