//! Failed jobs: redriving them as new ones, and removing jobs for good.

use crate::error::QueueError;
use crate::list::Listed;
use crate::payload::corrupt;
use crate::queue::Queue;
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

    /// Removes those of `jobs` that are finished, with everything stored of them; their request ids are free again.
    /// Returns how many are gone. `jobs` are listed by acceptance.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; the call may be repeated.
    pub async fn purge(&self, jobs: &[Listed]) -> Result<u64, QueueError> {
        let mut purged = 0;
        let mut by_lane: BTreeMap<LaneNumber, Vec<Listed>> = BTreeMap::new();
        for job in jobs {
            by_lane.entry(job.id.lane()).or_default().push(*job);
        }
        for (lane, jobs) in by_lane {
            for batch in jobs.chunks(BATCH) {
                purged += self.purge_batch(lane, batch).await?;
            }
        }
        Ok(purged)
    }

    async fn purge_batch(&self, lane: LaneNumber, batch: &[Listed]) -> Result<u64, QueueError> {
        let ids: Vec<JobId> = batch.iter().map(|job| job.id).collect();
        let jobs = self.get_many(&ids).await?;
        let mut call = self.scripts.purge.key(self.keys.lane(lane));
        let repeats: BTreeMap<JobId, JobId> =
            jobs.iter().filter_map(|job| Some((job.id, job.spec.redriven_from?))).collect();
        for job in batch {
            let repeated = repeats.get(&job.id).map(JobId::as_bytes);
            call.arg(job.id.as_bytes()).arg(job.place.entry()).arg(repeated.map_or(&[][..], |id| &id[..]));
        }
        let mut connection = self.connection.clone();
        let gone: Vec<u8> = call
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("purging jobs", source))?;
        let gone: Vec<JobId> = ids.into_iter().zip(gone).filter(|(_, gone)| *gone == 1).map(|(id, _)| id).collect();
        let freed = jobs.into_iter().filter(|job| gone.contains(&job.id));
        let freed: Vec<_> = freed.filter_map(|job| Some((job.spec.tenant, job.spec.request_id?))).collect();
        self.free_request_ids(&freed).await?;
        Ok(u64::try_from(gone.len()).unwrap_or(u64::MAX))
    }
}
