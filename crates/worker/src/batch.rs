//! One batch, from being full to its last result: submit, search, look, collect, close.
//!
//! Never here: which jobs go into it (`batching`), how it is submitted (`submitting`), and what follows from a refusal of all of
//! it (`refusal`).

use crate::attempt::bounded;
use crate::batches::{Arrived, Batch, Item, PerformBatches, Refusal, Stage};
use crate::batching::Batching;
use crate::hold::Moment;
use genmill_core::attempt::{Failure, FailureClass, Outcome};
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_core::judge::{Policy, RETRY_AFTER_MS_MAX, Throttle, judge};
use genmill_core::money::Cost;
use genmill_daemon::random::random_u64;
use genmill_queue::{
    Advance, BatchRecord, BatchState, Ended, Finish, Held, Kept, Member, Members, Moved, Queue, QueueError,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};

/// How many results are written down together.
const STEP: usize = 100;

/// How long a provider that fails is left alone; twice as long each further time, up to the longest.
pub(crate) const PAUSE_FIRST: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// So many times in a row a provider may not know a batch, or tell of it what is not understood. Then it is given up.
const STRANGE_MAX: u32 = 20;

/// So many times in a row what a batch left behind may not be deleted. Then it stays.
const CLEARINGS: u32 = 3;

/// What the holder of a batch and its task tell each other.
#[derive(Debug)]
pub(crate) struct Told {
    /// It takes no more jobs.
    pub(crate) full: Notify,
    /// How many of its jobs are wanted still.
    pub(crate) wanted: AtomicU64,
    /// Until when it is surely held.
    pub(crate) until: watch::Sender<Moment>,
}

impl Told {
    pub(crate) fn new(wanted: u64, until: Moment) -> Self {
        Self { full: Notify::new(), wanted: AtomicU64::new(wanted), until: watch::Sender::new(until) }
    }
}

/// A batch that this worker holds.
pub(crate) struct Driver<P> {
    pub(crate) queue: Queue,
    pub(crate) performer: Arc<P>,
    pub(crate) worker: WorkerId,
    pub(crate) lane: LaneNumber,
    pub(crate) lease_ms: u64,
    pub(crate) policy: Policy,
    pub(crate) times: Batching,
    pub(crate) record: BatchRecord,
    pub(crate) told: Arc<Told>,
    /// How often in a row a step failed.
    pub(crate) failed: u32,
}

/// What follows from a step.
pub(crate) enum Next {
    /// The next one, at once.
    Now,
    /// The same, after its usual pause.
    Later(Duration),
    /// The same, when whoever failed may have come back.
    Failed(Failure),
    /// The same, after its usual pause: it failed in a way that trouble which passes does not.
    Strange(Failure),
    /// Nothing: it is done, or somebody else holds it.
    Over,
}

impl<P: PerformBatches> Driver<P> {
    /// Does with it whatever is next, until it is done or lost. May be dropped between any two answers: whoever takes over
    /// goes on from what is written down.
    pub(crate) async fn run(mut self, filled_until: Instant) {
        if self.record.state == BatchState::Intent && !self.record.full {
            // Whichever comes first.
            drop(timeout_at(filled_until, self.told.full.notified()).await);
        }
        let (mut searches, mut cancelled) = (0, false);
        loop {
            let next = match self.record.state {
                BatchState::Intent if self.record.tried => self.search(&mut searches).await,
                BatchState::Intent => self.submit().await,
                BatchState::Submitted => self.look(&mut cancelled).await,
                BatchState::Collecting => self.collect().await,
                BatchState::Clearing => self.clear().await,
            };
            let pause = match next {
                Ok(Next::Over) => return,
                Ok(Next::Now) => {
                    self.failed = 0;
                    continue;
                }
                Ok(Next::Later(pause)) => {
                    self.failed = 0;
                    pause
                }
                Ok(Next::Failed(failure)) => {
                    self.note(&failure);
                    pause_after(self.failed, &failure)
                }
                Ok(Next::Strange(failure)) => {
                    self.note(&failure);
                    self.times.poll
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

    fn note(&mut self, failure: &Failure) {
        let (tag, model, message) = (&self.record.tag, &self.record.model, &failure.message);
        tracing::warn!(tag, %model, class = ?failure.class, message, "a batch cannot go on; trying again");
        self.failed += 1;
    }

    async fn look(&mut self, cancelled: &mut bool) -> Result<Next, QueueError> {
        let (batch, remote) = (self.batch(&[]), self.remote());
        let stage = match self.performer.look(&batch, &remote).await {
            Ok(stage) => stage,
            Err(failure) => return self.strange(failure).await,
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
            Stage::Ended => match self.advance(Advance::Collecting).await? {
                Moved::Lost => Ok(Next::Over),
                Moved::On | Moved::NotDone => {
                    self.record.state = BatchState::Collecting;
                    Ok(Next::Now)
                }
            },
            Stage::Refused(refusal) => {
                let Refusal { failure, named } = &refusal;
                let message = failure.loggable();
                tracing::warn!(tag, %model, remote, class = ?failure.class, message, named = named.len(), "a batch was refused");
                let wanted = self.wanted().await?;
                self.refused(wanted, refusal).await
            }
        }
    }

    /// It could not be looked at, or read. What will never be is given up after some time.
    async fn strange(&mut self, failure: Failure) -> Result<Next, QueueError> {
        if !matches!(failure.class, FailureClass::NotFound | FailureClass::Invalid) {
            return Ok(Next::Failed(failure));
        }
        if self.failed < STRANGE_MAX {
            return Ok(Next::Strange(failure));
        }
        let message = format!(
            "what came of batch {} cannot be read, which may have been paid for: {}. `genmill redrive` submits its jobs anew",
            self.remote(),
            failure.message
        );
        tracing::error!(tag = self.record.tag, model = %self.record.model, message, "gave a batch up");
        self.give_up(message).await
    }

    /// Fails all of its jobs, at a cost that nobody knows.
    pub(crate) async fn give_up(&mut self, message: String) -> Result<Next, QueueError> {
        let wanted = self.wanted().await?;
        self.fail(wanted, &Failure::new(FailureClass::Internal, message), None).await
    }

    /// Writes down what came of its jobs. Those of which nothing was told wait for another batch; nobody is to blame.
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
            return self.strange(failure).await;
        }
        let missing = self.wanted().await?;
        let (tag, model) = (&self.record.tag, &self.record.model);
        tracing::info!(tag, %model, results = count, missing = missing.len(), "read the results of a batch");
        self.end(missing, |_| Outcome::HandedBack, Some(Cost::NOTHING)).await?;
        self.ended().await
    }

    /// What follows when none of its jobs is wanted any more.
    pub(crate) async fn ended(&mut self) -> Result<Next, QueueError> {
        if self.record.remote.is_none() {
            return self.close().await;
        }
        match self.advance(Advance::Clearing).await? {
            Moved::Lost => Ok(Next::Over),
            // Whatever could not be ended is tried again.
            Moved::NotDone => Ok(Next::Later(PAUSE_FIRST)),
            Moved::On => {
                self.record.state = BatchState::Clearing;
                Ok(Next::Now)
            }
        }
    }

    /// Deletes what it has left at its provider, as far as that goes.
    async fn clear(&mut self) -> Result<Next, QueueError> {
        let (batch, remote) = (self.batch(&[]), self.remote());
        match self.performer.clear(&batch, &remote).await {
            Err(failure) if failure.class.is_retried() && self.failed < CLEARINGS => return Ok(Next::Failed(failure)),
            Err(failure) => {
                let (tag, model, message) = (&self.record.tag, &self.record.model, &failure.message);
                tracing::warn!(tag, %model, remote, class = ?failure.class, message, "the files of a batch stay at its provider");
            }
            Ok(()) => {}
        }
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
    pub(crate) async fn end(
        &self,
        members: Vec<Member>,
        outcome: impl Fn(&Member) -> Outcome,
        cost: Option<Cost>,
    ) -> Result<(), QueueError> {
        let ended =
            |member: &Member| (member.held, member.started_at, self.judged(outcome(member), member.failures, cost));
        self.finish(&members.iter().map(ended).collect::<Vec<_>>()).await
    }

    pub(crate) async fn fail(
        &mut self,
        members: Vec<Member>,
        failure: &Failure,
        cost: Option<Cost>,
    ) -> Result<Next, QueueError> {
        self.end(members, |_| Outcome::Failed(failure.clone()), cost).await?;
        self.ended().await
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
    pub(crate) async fn members(&self) -> Result<Members, QueueError> {
        let mut members = self.queue.batch_members(self.lane, &self.record.tag).await?;
        let failure = Failure::new(FailureClass::Internal, "the stored job cannot be read");
        let ended = members
            .damaged
            .drain(..)
            .map(|(held, started_at)| (held, started_at, self.judged(Outcome::Failed(failure.clone()), 0, None)));
        self.finish(&ended.collect::<Vec<_>>()).await?;
        Ok(members)
    }

    /// Its jobs that are wanted.
    pub(crate) async fn wanted(&self) -> Result<Vec<Member>, QueueError> {
        Ok(self.members().await?.jobs.into_iter().filter(|member| member.wanted).collect())
    }

    pub(crate) async fn close(&self) -> Result<Next, QueueError> {
        match self.queue.close_batch(self.lane, &self.worker, (&self.record.tag, self.record.epoch)).await? {
            Moved::On | Moved::Lost => Ok(Next::Over),
            // Whatever could not be ended is tried again.
            Moved::NotDone => Ok(Next::Later(PAUSE_FIRST)),
        }
    }

    pub(crate) async fn advance(&self, advance: Advance<'_>) -> Result<Moved, QueueError> {
        let batch = (self.record.tag.as_str(), self.record.epoch);
        let until = Moment::now().later(self.lease_ms);
        let moved = self.queue.advance_batch(self.lane, &self.worker, batch, self.lease_ms, advance).await?;
        if moved == Moved::On {
            self.told.until.send_replace(until);
        }
        Ok(moved)
    }

    pub(crate) fn remote(&self) -> String {
        self.record.remote.clone().unwrap_or_default()
    }

    pub(crate) fn batch(&self, members: &[Member]) -> Batch {
        let BatchRecord { tag, model, key, made_at, items, .. } = &self.record;
        let item = |member: &Member| Item { id: member.held.id, epoch: member.held.epoch, spec: member.spec.clone() };
        Batch {
            tag: tag.clone(),
            model: model.clone(),
            key: key.clone(),
            since: *made_at,
            submitted: *items,
            items: members.iter().map(item).collect(),
        }
    }
}

/// How long a batch is left alone after so many failures in a row.
fn pause_after(failed: u32, failure: &Failure) -> Duration {
    let asked = Duration::from_millis(failure.retry_after_ms.unwrap_or(0).min(RETRY_AFTER_MS_MAX));
    (PAUSE_FIRST * 2_u32.saturating_pow(failed.saturating_sub(1).min(16))).min(PAUSE_MAX).max(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_that_fails_is_left_alone_for_longer_each_time_and_as_long_as_it_asks() {
        let check = |failed, asked_ms, expect_s| {
            let failure = Failure::new(FailureClass::Transient, "x").retry_after_ms(asked_ms);
            assert_eq!(pause_after(failed, &failure), Duration::from_secs(expect_s), "{failed} {asked_ms:?}");
        };
        check(1, None, 2);
        check(2, None, 4);
        check(8, None, 256);
        check(9, None, 300);
        check(u32::MAX, None, 300);
        check(1, Some(60_000), 60);
        check(1, Some(u64::MAX), 24 * 3_600);
        check(9, Some(1), 300);
    }
}
