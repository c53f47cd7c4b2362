//! `WatchJobs`: the jobs of a filter as they finish. A cursor is the position in each lane's stream of finished jobs.

use super::Answers;
use super::matching::{STEP, lanes, list_of, matching_ids, unfinished};
use crate::mill::{Mill, api_error};
use genmill_core::ids::{JobId, LaneNumber};
use genmill_queue::{Finished, Place};
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::from_pb::Filter;
use genmill_wire::{from_pb, to_pb, v1};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Finished jobs that may wait for a slow watcher.
const JOBS_MAX: usize = 64;

/// How many finished jobs are read in one step.
const BATCH: usize = 250;

/// How many steps are taken through lists of jobs before what has finished is told.
const STEPS_MAX: usize = 10;

/// The streams are read this often at least, in case an event was lost.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// And no more often than this, so that a fast run is read in batches.
const REST: Duration = Duration::from_millis(20);

pub(super) fn serve(mill: Mill, asked: v1::WatchJobsRequest) -> Result<Answers<v1::WatchJobsResponse>, Status> {
    let filter = from_pb::filter(asked.filter).map_err(ApiError::from)?;
    let cursor = Cursor::parse(&asked.cursor)?;
    if asked.from_now && cursor != Cursor::default() {
        let message = "from_now: cannot be set with a cursor, which says already where to begin";
        return Err(ApiError::new(Reason::InvalidRequest, message).into());
    }
    let (out, answers) = mpsc::channel(JOBS_MAX);
    let v1::WatchJobsRequest { from_now, until_idle, .. } = asked;
    let settled = BTreeMap::new();
    let watcher = Watcher { mill: mill.clone(), filter, cursor, from_now, until_idle, settled, out };
    mill.shutdown.spawn(watcher.run());
    Ok(Box::pin(ReceiverStream::new(answers)))
}

/// A position in each lane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Cursor(BTreeMap<LaneNumber, String>);

impl Cursor {
    /// Reads `LANE@POSITION,…`.
    fn parse(text: &str) -> Result<Self, ApiError> {
        let bad = || ApiError::new(Reason::InvalidRequest, "cursor: is not one that a response gave");
        let mut positions = BTreeMap::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (lane, position) = part.split_once('@').ok_or_else(bad)?;
            let (ms, sequence) = position.split_once('-').ok_or_else(bad)?;
            // Digits only, and below the largest number: nothing comes after that.
            let is_number = |text: &str| {
                text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u64>().is_ok_and(|number| number < u64::MAX)
            };
            if !is_number(ms) || !is_number(sequence) {
                return Err(bad());
            }
            positions.insert(LaneNumber(lane.parse().map_err(|_| bad())?), position.to_owned());
        }
        Ok(Self(positions))
    }
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, (lane, position)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}@{position}", lane.0)?;
        }
        Ok(())
    }
}

struct Watcher {
    mill: Mill,
    filter: Filter,
    cursor: Cursor,
    from_now: bool,
    until_idle: bool,
    /// In each lane, the place in the list up to which no job matches that is unfinished. None will any more.
    settled: BTreeMap<LaneNumber, Place>,
    out: mpsc::Sender<Result<v1::WatchJobsResponse, Status>>,
}

/// Whether no unfinished job matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Idle {
    Yes,
    No,
    /// There are more to be looked at.
    Unknown,
}

/// The watcher's caller has gone.
struct Gone;

type Step<T> = Result<Result<T, Gone>, ApiError>;

impl Watcher {
    async fn run(mut self) {
        let stop = self.mill.shutdown.token();
        let out = self.out.clone();
        let finished = self.mill.hub.any_finished();
        let ended = tokio::select! {
            ended = self.follow(finished) => ended,
            () = out.closed() => Ok(Ok(())),
            () = stop.cancelled() => {
                let message = "this scheduler stops: watch on from the last cursor, at another one or later";
                Err(ApiError::new(Reason::QueueUnavailable, message))
            }
        };
        if let Err(error) = ended {
            // Whoever has gone meanwhile needs no error.
            drop(out.try_send(Err(error.into())));
        }
    }

    async fn follow(&mut self, mut finished: watch::Receiver<()>) -> Step<()> {
        if self.from_now {
            self.skip_the_past().await?;
            // So that even a watcher that has seen no job yet can resume where it began.
            if self.send(None).await.is_err() {
                return Ok(Err(Gone));
            }
        }
        loop {
            finished.mark_unchanged();
            let lanes = lanes(&self.mill, &self.filter).await?;
            // Asked before the streams are read: a job that finishes in between is in them.
            let idle = if self.until_idle { self.is_idle(&lanes).await? } else { Idle::No };
            for lane in lanes {
                if self.drain(lane).await?.is_err() {
                    return Ok(Err(Gone));
                }
            }
            match idle {
                Idle::Yes => return Ok(Ok(())),
                Idle::No => drop(tokio::time::timeout(LOOK_EVERY, finished.changed()).await),
                Idle::Unknown => {}
            }
            tokio::time::sleep(REST).await;
        }
    }

    /// Puts the cursor behind everything that has finished. Lanes that come later are watched from their beginning.
    async fn skip_the_past(&mut self) -> Result<(), ApiError> {
        for lane in lanes(&self.mill, &self.filter).await? {
            let position = self.mill.queue.last_finished(lane).await.map_err(api_error)?;
            self.cursor.0.extend(position.map(|position| (lane, position)));
        }
        Ok(())
    }

    /// Sends what has finished in `lane` since the cursor.
    async fn drain(&mut self, lane: LaneNumber) -> Step<()> {
        loop {
            let position = self.cursor.0.get(&lane).map(String::as_str);
            let batch = self.mill.queue.finished(lane, position, BATCH).await.map_err(api_error)?;
            let Some(last) = batch.last() else { return Ok(Ok(())) };
            let (last, full) = (last.position.clone(), batch.len() == BATCH);
            let sent = self.send_matching(lane, &batch).await?;
            let skipped = self.cursor.0.insert(lane, last.clone()) != Some(last);
            let Ok(()) = sent else { return Ok(Err(Gone)) };
            // So that resuming does not read again what does not match.
            if skipped && self.send(None).await.is_err() {
                return Ok(Err(Gone));
            }
            if !full {
                return Ok(Ok(()));
            }
        }
    }

    async fn send_matching(&mut self, lane: LaneNumber, batch: &[Finished]) -> Step<()> {
        let experiment = self.filter.experiment.as_ref().map(|name| name.as_str().to_owned());
        let wanted = batch.iter().filter(|finished| experiment.is_none() || finished.experiment == experiment);
        let positions: BTreeMap<JobId, &str> =
            wanted.clone().map(|finished| (finished.id, finished.position.as_str())).collect();
        let ids: Vec<JobId> = wanted.map(|finished| finished.id).collect();
        let rest = Filter { experiment: None, ..self.filter.clone() };
        let ids = matching_ids(&self.mill, &rest, ids).await?;
        for ids in self.mill.queue.steps(&ids).await.map_err(api_error)? {
            for job in self.mill.queue.get_many(ids).await.map_err(api_error)? {
                let Some(position) = positions.get(&job.id) else { continue };
                self.cursor.0.insert(lane, (*position).to_owned());
                if self.send(Some(to_pb::job(job))).await.is_err() {
                    return Ok(Err(Gone));
                }
            }
        }
        Ok(Ok(()))
    }

    async fn send(&self, job: Option<v1::Job>) -> Result<(), Gone> {
        let response = v1::WatchJobsResponse { job, cursor: self.cursor.to_string() };
        self.out.send(Ok(response)).await.map_err(|_| Gone)
    }

    /// Whether no unfinished job matches. Counters answer for a lane or an experiment; for a model or tenant within
    /// them jobs are looked at, oldest first, until one is found. What lies before it need not be looked at again.
    async fn is_idle(&mut self, lanes: &[LaneNumber]) -> Result<Idle, ApiError> {
        let open = self.mill.queue.open_jobs(lanes, self.filter.experiment.as_ref()).await.map_err(api_error)?;
        if open == 0 {
            return Ok(Idle::Yes);
        }
        if self.filter.tenant.is_none() && self.filter.model.is_none() {
            return Ok(Idle::No);
        }
        let filter = Filter { state: None, ..self.filter.clone() };
        let mut steps = 0;
        for lane in lanes {
            // Mostly it is the same job that still runs.
            let mut limit = 1;
            loop {
                let (which, after) = (list_of(&filter), self.settled.get(lane).copied());
                let listed = self.mill.queue.list_after(*lane, which, after, limit).await.map_err(api_error)?;
                let open = unfinished(&self.mill, &filter, &listed).await?;
                let found = open.first().and_then(|open| listed.iter().position(|job| job.id == *open));
                let settled = &listed[..found.unwrap_or(listed.len())];
                self.settled.extend(settled.last().map(|job| (*lane, job.place)));
                if found.is_some() {
                    return Ok(Idle::No);
                }
                if listed.len() < limit {
                    break;
                }
                if steps == STEPS_MAX {
                    return Ok(Idle::Unknown);
                }
                (limit, steps) = (STEP, steps + 1);
            }
        }
        Ok(Idle::Yes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_as_it_went() {
        for text in ["", "1@5-0", "1@5-0,7@12-3"] {
            assert_eq!(Cursor::parse(text).unwrap().to_string(), text);
        }
        for text in ["x", "1@", "1@5", "70000@5-0", "1@a-b", "1@-", "1@+5-0", "1@18446744073709551615-0"] {
            assert!(Cursor::parse(text).is_err(), "{text}");
        }
    }
}
