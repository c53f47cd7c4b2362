//! Reading jobs back.

use crate::error::QueueError;
use crate::keys::Keys;
use crate::payload::{corrupt, decode, decode_all};
use crate::queue::Queue;
use genmill_core::attempt::Attempt;
use genmill_core::ids::{Epoch, JobId, WorkerId};
use genmill_core::job::Job;
use genmill_core::model::ModelName;
use genmill_core::names::{Experiment, Tenant};
use genmill_core::state::State;
use genmill_core::time::UnixMs;
use serde::Deserialize;
use std::collections::HashMap;

/// How many jobs one round trip reads.
const BATCH: usize = 250;

/// How many bytes of stored records are read together, unless a single job has more.
const STEP_BYTES_MAX: u64 = 4 * 1024 * 1024;

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

/// What filters look at: a job without its texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its id.
    pub id: JobId,
    /// Where it stands.
    pub state: State,
    /// When it reached a final state.
    pub finished_at: Option<UnixMs>,
    /// The model.
    pub model: ModelName,
    /// Who the job belongs to.
    pub tenant: Tenant,
    /// What it is part of.
    pub experiment: Option<Experiment>,
    /// Makes submission idempotent.
    pub request_id: Option<String>,
    /// The failed job that it repeats.
    pub redriven_from: Option<JobId>,
}

/// The part of a stored spec that a [`Head`] has.
#[derive(Deserialize)]
struct SpecHead {
    model: ModelName,
    tenant: Tenant,
    #[serde(default)]
    experiment: Option<Experiment>,
    #[serde(default)]
    request_id: Option<String>,
    #[serde(default)]
    redriven_from: Option<JobId>,
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

    /// Cuts `ids` into runs, each of jobs that can be read whole together without filling memory.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn steps<'a>(&self, ids: &'a [JobId]) -> Result<Vec<&'a [JobId]>, QueueError> {
        self.steps_of(ids, &[Keys::spec, Keys::result]).await
    }

    /// The same by the records with the keys `of` alone.
    async fn steps_of<'a>(
        &self,
        ids: &'a [JobId],
        of: &[fn(&Keys, JobId) -> Vec<u8>],
    ) -> Result<Vec<&'a [JobId]>, QueueError> {
        let mut steps = Vec::new();
        let mut connection = self.connection.clone();
        for batch in ids.chunks(BATCH) {
            let mut pipe = redis::pipe();
            for (id, key) in batch.iter().flat_map(|id| of.iter().map(move |key| (id, key))) {
                pipe.strlen(key(&self.keys, *id));
            }
            let bytes: Vec<u64> = pipe
                .query_async(&mut connection)
                .await
                .map_err(|source| QueueError::from_redis("measuring jobs", source))?;
            let bytes: Vec<u64> = bytes.chunks(of.len()).map(|records| records.iter().sum()).collect();
            steps.extend(cut(batch, &bytes));
        }
        Ok(steps)
    }

    /// What filters look at of many jobs, in the order given. Those that do not exist are left out.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer or a record cannot be read.
    pub async fn heads(&self, ids: &[JobId]) -> Result<Vec<Head>, QueueError> {
        let mut heads = Vec::with_capacity(ids.len());
        let mut connection = self.connection.clone();
        for step in self.steps_of(ids, &[Keys::spec]).await? {
            let mut pipe = redis::pipe();
            for id in step {
                pipe.hmget(self.keys.job(*id), &["st", "fa"]).get(self.keys.spec(*id));
            }
            let stored: Vec<redis::Value> = pipe
                .query_async(&mut connection)
                .await
                .map_err(|source| QueueError::from_redis("reading jobs", source))?;
            for (id, record) in step.iter().zip(stored.chunks(2)) {
                heads.extend(head(*id, record)?);
            }
        }
        Ok(heads)
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

/// Cuts `ids`, whose records have `bytes`, where too much would be read together.
fn cut<'a>(ids: &'a [JobId], bytes: &[u64]) -> Vec<&'a [JobId]> {
    let mut steps = Vec::new();
    let (mut from, mut sum) = (0, 0);
    for (at, bytes) in bytes.iter().enumerate() {
        sum += bytes;
        if sum > STEP_BYTES_MAX && at > from {
            steps.extend(ids.get(from..at));
            (from, sum) = (at, *bytes);
        }
    }
    steps.extend(ids.get(from..).filter(|rest| !rest.is_empty()));
    steps
}

fn head(id: JobId, record: &[redis::Value]) -> Result<Option<Head>, QueueError> {
    let bad = |problem: String| corrupt(format!("job {id}"), problem);
    type Stored = ((Option<String>, Option<u64>), Option<Vec<u8>>);
    let ((state, finished_at), spec): Stored =
        redis::from_redis_value(redis::Value::Array(record.to_vec())).map_err(|error| bad(error.to_string()))?;
    let (Some(state), Some(spec)) = (state, spec) else { return Ok(None) };
    let state = State::from_name(&state).ok_or_else(|| bad("unknown state".to_owned()))?;
    let SpecHead { model, tenant, experiment, request_id, redriven_from } = decode("spec", &spec)?;
    let finished_at = finished_at.map(UnixMs);
    Ok(Some(Head { id, state, finished_at, model, tenant, experiment, request_id, redriven_from }))
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

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_core::ids::LaneNumber;

    #[test]
    fn what_is_read_together_has_a_bound() {
        let check = |bytes: &[u64], lengths: &[usize]| {
            let ids: Vec<JobId> = (0..).map(|n| JobId::new(UnixMs(1), LaneNumber(1), n)).take(bytes.len()).collect();
            let steps = cut(&ids, bytes);
            assert_eq!(steps.concat(), ids, "{bytes:?}");
            assert_eq!(steps.iter().map(|step| step.len()).collect::<Vec<_>>(), lengths, "{bytes:?}");
        };
        const HALF: u64 = STEP_BYTES_MAX / 2;
        check(&[], &[]);
        check(&[1, 1, 1], &[3]);
        check(&[HALF, HALF, 1, HALF], &[2, 2]);
        check(&[9 * HALF, 1, 9 * HALF, 9 * HALF], &[1, 1, 1, 1]);
        check(&[0, 9 * HALF, 0], &[1, 1, 1]);
    }
}
