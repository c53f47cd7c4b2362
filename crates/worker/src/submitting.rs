//! How a batch gets to its provider: what is prepared, what is written down before the call that makes it, and the search for
//! one that may have been made. Never here: what follows from a refusal (`refusal`), and what comes of it there (`batch`).

use crate::batch::{Driver, Next, PAUSE_FIRST};
use crate::batches::{Found, PerformBatches, Refusal, Unsubmitted};
use crate::hold::Hold;
use genmill_queue::{Advance, BatchState, Held, Member, Moved, QueueError};
use std::time::Duration;
use tokio::time::sleep;

/// A search is repeated so often until it is believed that a batch is not there.
const SEARCHES: u32 = 3;

impl<P: PerformBatches> Driver<P> {
    /// Submits it. That it is about to be is written down first, so that nobody ever submits it a second time unseen.
    pub(crate) async fn submit(&mut self) -> Result<Next, QueueError> {
        if self.advance(Advance::Full).await? == Moved::Lost {
            return Ok(Next::Over);
        }
        let (wanted, unwanted): (Vec<Member>, Vec<Member>) =
            self.members().await?.jobs.into_iter().partition(|member| member.wanted);
        if wanted.is_empty() {
            return self.close().await;
        }
        let batch = self.batch(&wanted);
        let prepared = match self.performer.prepare(&batch).await {
            Ok(prepared) => prepared,
            Err(refusal) => return self.refused(wanted, refusal).await,
        };
        let left: Vec<Held> = prepared.left.into_iter().map(|(id, epoch)| Held { id, epoch }).collect();
        let items = prepared.items;
        let unwanted: Vec<Held> = unwanted.iter().map(|member| member.held).collect();
        // Before it is submitted: no job must wait for a batch that it is not in, or have a part in what that costs.
        if self.part(&left, Duration::ZERO).await? == Moved::Lost
            || self.advance(Advance::Submitting { items, without: &unwanted }).await? == Moved::Lost
        {
            return Ok(Next::Over);
        }
        self.record.tried = true;
        self.record.items = u64::try_from(items).ok();
        let jobs = wanted.len() - left.len();
        let hold = Hold::new(self.told.until.subscribe(), self.lease_ms / 3);
        let made = self.performer.create(&batch, prepared.ready, &hold).await;
        let (tag, model) = (&self.record.tag, &self.record.model);
        match made {
            Ok(remote) => {
                tracing::info!(tag, %model, jobs, remote, "submitted a batch");
                self.is_submitted(remote).await
            }
            Err(Unsubmitted::Refused(refusal)) => {
                let Refusal { failure, named } = &refusal;
                let message = failure.loggable();
                tracing::warn!(tag, %model, jobs, class = ?failure.class, message, named = named.len(), "a batch was refused");
                let wanted = wanted.into_iter().filter(|member| !left.contains(&member.held)).collect();
                self.refused(wanted, refusal).await
            }
            Err(Unsubmitted::Late) => {
                tracing::warn!(tag, %model, "did not submit a batch: the hold on it did not last");
                self.record.tried = false;
                Ok(Next::Later(PAUSE_FIRST))
            }
            Err(Unsubmitted::Unclear(failure)) => Ok(Next::Failed(failure)),
        }
    }

    /// Looks whether it was submitted by somebody who could not say so.
    pub(crate) async fn search(&mut self, searches: &mut u32) -> Result<Next, QueueError> {
        let members = self.members().await?;
        let others = self.queue.batches(self.lane).await?.into_iter().filter_map(|batch| batch.remote);
        let others: Vec<String> = others.collect();
        let found = match self.performer.find(&self.batch(&members.jobs), &others).await {
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
                // That it was surely not submitted is written down with its next try.
                self.record.tried = false;
                Ok(Next::Now)
            }
            Found::Never(why) => {
                let message = format!(
                    "nobody can tell whether batch {tag} was submitted, so it is not submitted again: {why}. Look for it at \
                     the provider; `genmill redrive` submits its jobs anew"
                );
                tracing::error!(tag, %model, message, "stopped a batch");
                self.give_up(message).await
            }
        }
    }

    async fn is_submitted(&mut self, remote: String) -> Result<Next, QueueError> {
        // Until this is written down it would have to be searched for.
        loop {
            match self.advance(Advance::Submitted(&remote)).await {
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
}
