//! Reading jobs back.

use crate::error::QueueError;
use crate::payload::{corrupt, decode, decode_all};
use crate::queue::Queue;
use genmill_core::attempt::Attempt;
use genmill_core::ids::{Epoch, JobId, WorkerId};
use genmill_core::job::Job;
use genmill_core::state::State;
use genmill_core::time::UnixMs;
use std::collections::HashMap;

/// How many jobs one round trip reads.
const BATCH: usize = 250;

/// Where a job's text stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// The job's state.
    pub state: State,
    /// The attempt that writes or wrote the text.
    pub epoch: Epoch,
    /// The text of the running attempt from the asked offset on, in bytes. Empty in any other state.
    pub text: Vec<u8>,
    /// How long the whole text of the running attempt is, in bytes.
    pub text_bytes: u64,
}

type StoredJob = (HashMap<String, Vec<u8>>, Option<Vec<u8>>, Option<Vec<u8>>, Option<Vec<u8>>);

impl Queue {
    /// Reads one job.
    ///
    /// # Errors
    /// [`QueueError::NoSuchJob`] when there is none.
    pub async fn get(&self, id: JobId) -> Result<Job, QueueError> {
        self.get_many(&[id]).await?.pop().ok_or(QueueError::NoSuchJob { id })
    }

    /// Reads many jobs, in the order given. Those that do not exist are left out.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer or a record cannot be read.
    pub async fn get_many(&self, ids: &[JobId]) -> Result<Vec<Job>, QueueError> {
        let mut jobs = Vec::with_capacity(ids.len());
        let mut connection = self.connection.clone();
        for batch in ids.chunks(BATCH) {
            let mut pipe = redis::pipe();
            for id in batch {
                // The hash comes first: a job that finishes between the commands shows its old state, never a final
                // state without its result.
                pipe.hgetall(self.keys.job(*id))
                    .get(self.keys.spec(*id))
                    .get(self.keys.result(*id))
                    .get(self.keys.attempts(*id));
            }
            let stored: Vec<redis::Value> = pipe
                .query_async(&mut connection)
                .await
                .map_err(|source| QueueError::from_redis("reading jobs", source))?;
            for (id, record) in batch.iter().zip(stored.chunks(4)) {
                jobs.extend(job(*id, record)?);
            }
        }
        Ok(jobs)
    }

    /// The states of many jobs, in the order given; `None` for one that does not exist.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn states(&self, ids: &[JobId]) -> Result<Vec<Option<State>>, QueueError> {
        let mut connection = self.connection.clone();
        let mut pipe = redis::pipe();
        for id in ids {
            pipe.hget(self.keys.job(*id), "st");
        }
        let states: Vec<Option<String>> = pipe
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("reading states", source))?;
        Ok(states.into_iter().map(|state| State::from_name(&state?)).collect())
    }

    /// Reads the text of a job's running attempt from byte `offset` on, with the state it is in at the same moment.
    ///
    /// # Errors
    /// [`QueueError::NoSuchJob`] when there is none.
    pub async fn watch(&self, id: JobId, offset: u64) -> Result<Watched, QueueError> {
        let mut connection = self.connection.clone();
        let start = isize::try_from(offset).unwrap_or(isize::MAX);
        type Place = (Option<String>, Option<u32>);
        let mut pipe = redis::pipe();
        pipe.hmget(self.keys.job(id), &["st", "ep"])
            .strlen(self.keys.text(id))
            .getrange(self.keys.text(id), start, -1)
            .hmget(self.keys.job(id), &["st", "ep"]);
        loop {
            let (before, text_bytes, text, after): (Place, u64, Vec<u8>, Place) = pipe
                .query_async(&mut connection)
                .await
                .map_err(|source| QueueError::from_redis("watching a job", source))?;
            // No transaction, which a cluster would not follow to another node: the text is of this place when the job
            // was there before and after.
            if before != after {
                continue;
            }
            let state = after.0.ok_or(QueueError::NoSuchJob { id })?;
            let state = State::from_name(&state).ok_or_else(|| corrupt(format!("job {id}"), "unknown state"))?;
            // Some may have been added after it was measured.
            let read_to = if text.is_empty() { 0 } else { offset + u64::try_from(text.len()).unwrap_or(0) };
            let text_bytes = text_bytes.max(read_to);
            return Ok(Watched { state, epoch: Epoch(after.1.unwrap_or(0)), text, text_bytes });
        }
    }
}

fn job(id: JobId, record: &[redis::Value]) -> Result<Option<Job>, QueueError> {
    let bad = |problem: String| corrupt(format!("job {id}"), problem);
    let tuple = redis::Value::Array(record.to_vec());
    let (fields, spec, result, attempts): StoredJob =
        redis::from_redis_value(tuple).map_err(|error| bad(error.to_string()))?;
    let (false, Some(spec)) = (fields.is_empty(), spec) else { return Ok(None) };
    let text = |name: &str| fields.get(name).and_then(|value| std::str::from_utf8(value).ok());
    let number = |name: &str| text(name).and_then(|value| value.parse::<u64>().ok());
    let count = |name: &str| number(name).and_then(|value| u32::try_from(value).ok()).unwrap_or(0);
    let state = text("st").and_then(State::from_name).ok_or_else(|| bad("unknown state".to_owned()))?;
    let attempts: Vec<Attempt> = decode_all("attempt", &attempts.unwrap_or_default())?;
    let failed = matches!(state, State::Failed | State::Delayed);
    let failure = attempts.iter().rev().find_map(|attempt| attempt.failure.clone()).filter(|_| failed);
    Ok(Some(Job {
        id,
        spec: decode("spec", &spec)?,
        state,
        epoch: Epoch(count("ep")),
        failures: count("fc"),
        losses: count("lc"),
        created_at: number("cr").map_or_else(|| id.submitted_at(), UnixMs),
        started_at: number("sa").map(UnixMs),
        finished_at: number("fa").map(UnixMs),
        not_before: number("du").map(UnixMs),
        worker: text("wk").map(|worker| WorkerId::from_stored(worker.to_owned())),
        redriven_as: fields.get("rd").and_then(|id| JobId::from_bytes(id)),
        generation: result.map(|result| decode("result", &result)).transpose()?,
        failure,
        attempts,
    }))
}
