//! Failed jobs: redriving them as new ones, and removing jobs for good.

use crate::error::QueueError;
use crate::list::Place;
use crate::payload::corrupt;
use crate::queue::Queue;
use crate::read::Head;
use genmill_core::ids::{JobId, LaneNumber};
use std::collections::BTreeMap;

/// How many jobs one script handles at most, so that Redis is never held up for long.
const BATCH: usize = 200;

/// A failed job and the one that it may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redrive {
    /// The failed job.
    pub from: JobId,
    /// What it becomes, unless it was redriven before. In the same lane.
    pub to: JobId,
}

/// A finished job that is to be removed.
#[derive(Clone, Copy, Debug)]
pub struct Purge<'a> {
    /// Where it stands in the list of all jobs, or in that of its experiment, which is the same.
    pub place: Place,
    /// The job.
    pub head: &'a Head,
}

/// What a failed job is redriven as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redriven {
    /// This job, which is to be enqueued: that may be repeated.
    As(JobId),
    /// This job, which has been purged since.
    Purged(JobId),
}

impl Redriven {
    fn parse(answer: &[u8]) -> Option<Self> {
        match answer.split_at_checked(16)? {
            (id, []) => JobId::from_bytes(id).map(Self::As),
            (id, _) => JobId::from_bytes(id).map(Self::Purged),
        }
    }
}

impl Queue {
    /// Decides as which job each failed one of `lane` is redriven: as the proposed one, or as the one that was decided
    /// before. `None` for a job that has not failed. May be repeated.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn redrive(&self, lane: LaneNumber, jobs: &[Redrive]) -> Result<Vec<Option<Redriven>>, QueueError> {
        let mut decided = Vec::with_capacity(jobs.len());
        let mut connection = self.connection.clone();
        for batch in jobs.chunks(BATCH) {
            let mut call = self.scripts.redrive.key(self.keys.lane(lane));
            for job in batch {
                call.arg(job.from.as_bytes()).arg(job.to.as_bytes());
            }
            let answers: Vec<Vec<u8>> = call
                .invoke_async(&mut connection)
                .await
                .map_err(|source| QueueError::from_redis("redriving jobs", source))?;
            for answer in answers {
                let known = || Redriven::parse(&answer).ok_or_else(|| corrupt("redriven job", "it names no job"));
                decided.push(if answer.is_empty() { None } else { Some(known()?) });
            }
        }
        Ok(decided)
    }

    /// Removes those of `jobs` that are finished, with what is stored of them but their places among finished ones;
    /// their request ids are free again. Returns how many this call removed. A crash on the way may leave a request id
    /// that stands for a job which is gone: whoever submits it next sees that.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; the call may be repeated.
    pub async fn purge(&self, jobs: &[Purge<'_>]) -> Result<u64, QueueError> {
        let mut purged = 0;
        let mut by_lane: BTreeMap<LaneNumber, Vec<Purge<'_>>> = BTreeMap::new();
        for job in jobs {
            by_lane.entry(job.head.id.lane()).or_default().push(*job);
        }
        for (lane, jobs) in by_lane {
            for batch in jobs.chunks(BATCH) {
                purged += self.purge_batch(lane, batch).await?;
            }
        }
        Ok(purged)
    }

    async fn purge_batch(&self, lane: LaneNumber, batch: &[Purge<'_>]) -> Result<u64, QueueError> {
        let mut call = self.scripts.purge.key(self.keys.lane(lane));
        for Purge { place, head } in batch {
            let repeated = head.redriven_from.as_ref().map(JobId::as_bytes);
            call.arg(head.id.as_bytes()).arg(place.entry()).arg(repeated.map_or(&[][..], |id| &id[..]));
        }
        let removed: Vec<bool> = call
            .invoke_async(&mut self.connection.clone())
            .await
            .map_err(|source| QueueError::from_redis("purging jobs", source))?;
        let removed = batch.iter().zip(removed).filter(|(_, removed)| *removed).map(|(job, _)| job.head);
        let stood_for: Vec<_> =
            removed.clone().filter_map(|job| Some((&job.tenant, job.request_id.as_deref()?, job.id))).collect();
        // Whoever met one of them before the job went cannot enqueue it again, so none stands for a job that lives.
        self.free_request_ids(&stood_for).await?;
        Ok(u64::try_from(removed.count()).unwrap_or(u64::MAX))
    }
}
