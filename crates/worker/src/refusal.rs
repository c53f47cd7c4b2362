//! What follows from the refusal of a whole batch: which of its jobs it is about, and where the others go. Never here: how a
//! provider words it.

use crate::batch::{Driver, Next};
use crate::batches::{PerformBatches, Refusal};
use genmill_core::attempt::{Failure, FailureClass, Outcome};
use genmill_core::ids::{Epoch, JobId};
use genmill_core::judge::RETRY_AFTER_MS_MAX;
use genmill_core::money::Cost;
use genmill_queue::{Advance, BatchState, Held, Member, Moved, QueueError};
use std::collections::HashMap;
use std::time::Duration;

/// So many times in a row a batch is tried to be submitted to a provider that fails. Then its jobs have failed.
const TRIES_MAX: u32 = 12;

/// What came of a batch that its provider has no room for is asked anew after so many pauses between two looks.
const ROOM_POLLS: u32 = 10;

/// Whom the refusal of a batch is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum About {
    /// All of its jobs, or its only one.
    All,
    /// Those that the provider named.
    Named,
    /// Some that it did not name: each half of the batch goes by itself, so that the others do not fail with them.
    Some,
}

/// Whom a refusal is about. `named` is how many of its `jobs` the provider named.
pub(crate) const fn about(class: FailureClass, jobs: usize, named: usize) -> About {
    match class {
        _ if named > 0 => About::Named,
        // These say what is wrong with a request. All others are of the account, the model or the provider.
        FailureClass::Invalid | FailureClass::ContextOverflow | FailureClass::ContentFilter if jobs > 1 => About::Some,
        _ => About::All,
    }
}

/// The tag of a batch that begins with a job, and whose jobs were parted from `parent`. A job is under each epoch in one
/// line of batches only, in which every parting counts, so nobody has used it.
pub(crate) fn tag_of(first: Held, parent: Option<&str>) -> String {
    let id: String = first.id.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let last = parent.and_then(|tag| u32::from_str_radix(tag.get(32..36)?, 16).ok());
    let partings = parent.map_or(0, |_| last.unwrap_or(0).wrapping_add(1) & 0xffff);
    format!("{id}{partings:04x}{:04x}", first.epoch.0 & 0xffff)
}

impl<P: PerformBatches> Driver<P> {
    /// It was refused, and surely not made, or made in vain.
    pub(crate) async fn refused(&mut self, wanted: Vec<Member>, refusal: Refusal) -> Result<Next, QueueError> {
        let Refusal { failure, named } = refusal;
        let class = failure.class;
        let waits = class == FailureClass::Throttled;
        if self.record.state == BatchState::Intent && class.is_retried() && (waits || self.failed < TRIES_MAX) {
            self.record.tried = false;
            return Ok(match self.advance(Advance::Full).await? {
                Moved::Lost => Next::Over,
                Moved::On | Moved::NotDone => Next::Failed(failure),
            });
        }
        let held: Vec<Held> = wanted.iter().map(|member| member.held).collect();
        if waits {
            // Its tag is used up: it is another batch that is submitted when there may be room.
            let asked = Duration::from_millis(failure.retry_after_ms.unwrap_or(0).min(RETRY_AFTER_MS_MAX));
            return self.go_on_as(&[&held], asked.max(self.times.poll * ROOM_POLLS)).await;
        }
        let named: HashMap<(JobId, Epoch), Failure> = named.into_iter().collect();
        let is_named = |held: &Held| named.contains_key(&(held.id, held.epoch));
        match about(class, held.len(), held.iter().filter(|held| is_named(held)).count()) {
            About::All => self.fail(wanted, &failure, Some(Cost::NOTHING)).await,
            About::Some => {
                let (first, second) = held.split_at(held.len() / 2);
                self.go_on_as(&[first, second], Duration::ZERO).await
            }
            About::Named => {
                let (bad, others): (Vec<Member>, Vec<Member>) =
                    wanted.into_iter().partition(|member| is_named(&member.held));
                let said =
                    |member: &Member| named.get(&(member.held.id, member.held.epoch)).unwrap_or(&failure).clone();
                self.end(bad, |member| Outcome::Failed(said(member)), Some(Cost::NOTHING)).await?;
                let others: Vec<Held> = others.iter().map(|member| member.held).collect();
                self.go_on_as(&[&others], Duration::ZERO).await
            }
        }
    }

    /// Ends it, with each of these parts going on as a batch of its own.
    async fn go_on_as(&mut self, parts: &[&[Held]], after: Duration) -> Result<Next, QueueError> {
        for part in parts {
            if self.part(part, after).await? == Moved::Lost {
                return Ok(Next::Over);
            }
        }
        self.ended().await
    }

    /// Moves some of its jobs into a batch of their own.
    pub(crate) async fn part(&self, jobs: &[Held], after: Duration) -> Result<Moved, QueueError> {
        let Some(first) = jobs.first() else { return Ok(Moved::On) };
        let (tag, part) = (&self.record.tag, tag_of(*first, Some(&self.record.tag)));
        tracing::info!(tag, part, jobs = jobs.len(), "moved jobs of a batch into another one");
        let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        self.queue.part_batch(self.lane, &self.worker, (tag, self.record.epoch), (&part, after_ms), jobs).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_core::ids::LaneNumber;
    use genmill_core::time::UnixMs;

    #[test]
    fn one_bad_job_does_not_fail_the_others() {
        let check =
            |class, jobs, named, expect| assert_eq!(about(class, jobs, named), expect, "{class:?} {jobs} {named}");
        check(FailureClass::Invalid, 9, 0, About::Some);
        check(FailureClass::ContentFilter, 2, 0, About::Some);
        check(FailureClass::ContextOverflow, 2, 0, About::Some);
        check(FailureClass::Invalid, 1, 0, About::All);
        check(FailureClass::Invalid, 9, 1, About::Named);
        check(FailureClass::Transient, 9, 2, About::Named);
        for class in [FailureClass::Auth, FailureClass::Quota, FailureClass::NotFound, FailureClass::Transient] {
            check(class, 9, 0, About::All);
        }
    }

    #[test]
    fn a_tag_is_never_used_again() {
        let held = |place, epoch| Held { id: JobId::new(UnixMs(1), LaneNumber(2), place), epoch: Epoch(epoch) };
        let first = tag_of(held(7, 1), None);
        let again = tag_of(held(7, 1), Some(&first));
        let third = tag_of(held(7, 1), Some(&again));
        let tags = [first, again, third, tag_of(held(8, 1), Some("?")), tag_of(held(7, 2), None)];
        for (at, tag) in tags.iter().enumerate() {
            assert!(tag.len() == 40 && tag.bytes().all(|byte| byte.is_ascii_hexdigit()), "{tag}");
            assert!(!tags[..at].contains(tag), "{tag}");
        }
    }
}
