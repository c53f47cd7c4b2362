//! Finding jobs: pages by id, finished jobs in order, cancelling.

use crate::error::QueueError;
use crate::payload::corrupt;
use crate::queue::Queue;
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::names::Experiment;

/// Which ids to list.
#[derive(Clone, Copy, Debug)]
pub struct ListQuery<'a> {
    /// The lanes to look in.
    pub lanes: &'a [LaneNumber],
    /// Only jobs of this experiment.
    pub experiment: Option<&'a Experiment>,
    /// Only jobs older than this one.
    pub before: Option<JobId>,
    /// At most so many.
    pub limit: usize,
}

/// A page of ids, newest first. Fewer than asked for: there are no more.
pub type Listed = Vec<JobId>;

/// An entry of a lane's stream of finished jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// The position in the stream, to resume after.
    pub position: String,
    /// The job.
    pub id: JobId,
    /// The experiment it is part of.
    pub experiment: Option<String>,
}

/// What became of jobs that were to be cancelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Waited, and are cancelled now.
    pub cancelled: u64,
    /// Run; their workers will be told.
    pub cancelling: u64,
}

impl Queue {
    /// Lists ids, newest first.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn list(&self, query: ListQuery<'_>) -> Result<Listed, QueueError> {
        let mut connection = self.connection.clone();
        let top: Vec<u8> = match query.before {
            Some(id) => [b"(".as_slice(), id.as_bytes()].concat(),
            None => b"+".to_vec(),
        };
        let mut pipe = redis::pipe();
        for lane in query.lanes {
            pipe.cmd("ZRANGE")
                .arg(self.keys.jobs(*lane, query.experiment))
                .arg(&top)
                .arg("-")
                .arg("BYLEX")
                .arg("REV")
                .arg("LIMIT")
                .arg(0)
                .arg(query.limit);
        }
        let found: Vec<Vec<Vec<u8>>> =
            pipe.query_async(&mut connection).await.map_err(|source| QueueError::from_redis("listing jobs", source))?;
        let mut ids: Vec<JobId> = found.iter().flatten().filter_map(|id| JobId::from_bytes(id)).collect();
        ids.sort_unstable_by(|a, b| b.cmp(a));
        ids.truncate(query.limit);
        Ok(ids)
    }

    /// How many jobs of `lanes` are unfinished, those of `experiment` only when one is given.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn open_jobs(&self, lanes: &[LaneNumber], experiment: Option<&Experiment>) -> Result<u64, QueueError> {
        let mut connection = self.connection.clone();
        let mut pipe = redis::pipe();
        for lane in lanes {
            pipe.hget(self.keys.open(*lane), experiment.map_or("", |name| name.as_str()));
        }
        let open: Vec<Option<u64>> = pipe
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("counting jobs", source))?;
        Ok(open.into_iter().flatten().sum())
    }

    /// Reads up to `limit` jobs of `lane` that finished after `position` (`None`: the first ones ever).
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer or `position` is none.
    pub async fn finished(
        &self,
        lane: LaneNumber,
        position: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Finished>, QueueError> {
        let mut connection = self.connection.clone();
        let entries: redis::streams::StreamRangeReply = redis::cmd("XRANGE")
            .arg(self.keys.done(lane))
            .arg(position.map_or_else(|| "-".to_owned(), |position| format!("({position}")))
            .arg("+")
            .arg("COUNT")
            .arg(limit)
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("reading finished jobs", source))?;
        let finished = |entry: redis::streams::StreamId| {
            let id = entry.get::<Vec<u8>>("j").and_then(|id| JobId::from_bytes(&id));
            let id = id.ok_or_else(|| corrupt("stream of finished jobs", "an entry names no job"))?;
            Ok(Finished { id, experiment: entry.get("x"), position: entry.id })
        };
        entries.ids.into_iter().map(finished).collect()
    }

    /// Cancels unfinished jobs, all of one lane.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; the call may be repeated.
    pub async fn cancel(&self, lane: LaneNumber, ids: &[JobId]) -> Result<Tally, QueueError> {
        let mut tally = Tally::default();
        let mut connection = self.connection.clone();
        for batch in ids.chunks(200) {
            let mut call = self.scripts.cancel.key(self.keys.lane(lane));
            for id in batch {
                call.arg(id.as_bytes());
            }
            let answer: Vec<String> = call
                .invoke_async(&mut connection)
                .await
                .map_err(|source| QueueError::from_redis("cancelling jobs", source))?;
            for code in answer {
                match code.as_str() {
                    "c" => tally.cancelled += 1,
                    "r" => tally.cancelling += 1,
                    _ => {}
                }
            }
        }
        Ok(tally)
    }
}
