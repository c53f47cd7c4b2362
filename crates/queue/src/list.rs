//! Finding jobs: pages by id, finished jobs in order, cancelling.

use crate::error::QueueError;
use crate::keys::Which;
use crate::payload::corrupt;
use crate::queue::Queue;
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::names::Experiment;

/// Which jobs to list.
#[derive(Clone, Copy, Debug)]
pub struct ListQuery<'a> {
    /// The lanes to look in.
    pub lanes: &'a [LaneNumber],
    /// Which of their jobs.
    pub which: Which<'a>,
    /// Only jobs before this place.
    pub before: Option<Place>,
    /// At most so many.
    pub limit: usize,
}

/// A place in the lists of jobs of all lanes: when the job was put there by the clock of Redis, a count within that
/// millisecond, and the lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    ms: u64,
    count: u64,
    lane: LaneNumber,
}

impl Place {
    fn in_lane(lane: LaneNumber, entry: &str) -> Option<Self> {
        let (ms, count) = entry.split_once('-')?;
        Some(Self { ms: ms.parse().ok()?, count: count.parse().ok()?, lane })
    }

    /// The place that its text names.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (lane, entry) = text.split_once('@')?;
        Self::in_lane(LaneNumber(lane.parse().ok()?), entry)
    }

    /// Where to begin in `lane`, going back: entries at the same time stand in the order of their lanes.
    fn start_in(self, lane: LaneNumber) -> String {
        let exclusive = if lane < self.lane { "" } else { "(" };
        format!("{exclusive}{}", self.entry())
    }

    pub(crate) fn entry(self) -> String {
        format!("{}-{}", self.ms, self.count)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}-{}", self.lane.0, self.ms, self.count)
    }
}

/// A job in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Where it stands there.
    pub place: Place,
    /// The job.
    pub id: JobId,
}

impl Listed {
    fn in_lane(lane: LaneNumber, entry: &redis::streams::StreamId) -> Option<Self> {
        let id = entry.get::<Vec<u8>>("j").and_then(|id| JobId::from_bytes(&id))?;
        Some(Self { place: Place::in_lane(lane, &entry.id)?, id })
    }
}

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
    /// Lists jobs, newest first. Fewer than asked for: there are no more.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn list(&self, query: ListQuery<'_>) -> Result<Vec<Listed>, QueueError> {
        let mut connection = self.connection.clone();
        let mut pipe = redis::pipe();
        for lane in query.lanes {
            pipe.cmd("XREVRANGE")
                .arg(self.keys.listed(*lane, query.which))
                .arg(query.before.map_or_else(|| "+".to_owned(), |place| place.start_in(*lane)))
                .arg("-")
                .arg("COUNT")
                .arg(query.limit);
        }
        let found: Vec<redis::streams::StreamRangeReply> =
            pipe.query_async(&mut connection).await.map_err(|source| QueueError::from_redis("listing jobs", source))?;
        let mut listed = Vec::new();
        for (lane, entries) in query.lanes.iter().zip(found) {
            listed.extend(entries.ids.iter().filter_map(|entry| Listed::in_lane(*lane, entry)));
        }
        listed.sort_unstable_by_key(|job| std::cmp::Reverse(job.place));
        listed.truncate(query.limit);
        Ok(listed)
    }

    /// Lists up to `limit` jobs of `lane` that stand after `after` (`None`: the first ones), oldest first.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn list_after(
        &self,
        lane: LaneNumber,
        which: Which<'_>,
        after: Option<Place>,
        limit: usize,
    ) -> Result<Vec<Listed>, QueueError> {
        let mut connection = self.connection.clone();
        let entries: redis::streams::StreamRangeReply = redis::cmd("XRANGE")
            .arg(self.keys.listed(lane, which))
            .arg(after.map_or_else(|| "-".to_owned(), |place| format!("({}", place.entry())))
            .arg("+")
            .arg("COUNT")
            .arg(limit)
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("listing jobs", source))?;
        Ok(entries.ids.iter().filter_map(|entry| Listed::in_lane(lane, entry)).collect())
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

    /// The position of the job of `lane` that finished last; `None` when none has.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn last_finished(&self, lane: LaneNumber) -> Result<Option<String>, QueueError> {
        let mut connection = self.connection.clone();
        let newest: redis::streams::StreamRangeReply = redis::cmd("XREVRANGE")
            .arg(self.keys.done(lane))
            .arg("+")
            .arg("-")
            .arg("COUNT")
            .arg(1)
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("reading finished jobs", source))?;
        Ok(newest.ids.into_iter().next().map(|entry| entry.id))
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
