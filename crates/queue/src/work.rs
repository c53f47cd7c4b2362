//! A worker's side: claim, heartbeat, text, finish. Every write names the lease's epoch.

use crate::error::QueueError;
use crate::payload::{corrupt, decode, encode};
use crate::queue::Queue;
use crate::script::Call;
use futures_util::future::join_all;
use genmill_core::attempt::{AttemptEnd, Failure, FailureClass};
use genmill_core::gate::{Declaration, KeyId, Observation};
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_core::job::JobSpec;
use genmill_core::judge::Verdict;
use genmill_core::money::Cost;
use genmill_core::state::{State, transition};
use genmill_core::time::UnixMs;
use std::sync::Arc;

/// A job in a worker's hands, until its lease ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    /// The job.
    pub id: JobId,
    /// The lease's epoch.
    pub epoch: Epoch,
    /// What is to be done: once, whoever looks at it.
    pub spec: Arc<JobSpec>,
    /// How many of its attempts failed before.
    pub failures: u32,
    /// When this attempt started, by the clock of Redis.
    pub started_at: UnixMs,
    /// The key with which its model is to be called, where the job passed a gate.
    pub key: Option<KeyId>,
}

/// A lease as the claim script answers it: id, epoch, spec, failures, start, key or ``.
type Claimed = (Vec<u8>, u32, Vec<u8>, u32, u64, String);

impl Lease {
    /// The lease without its work.
    #[must_use]
    pub const fn held(&self) -> Held {
        Held { id: self.id, epoch: self.epoch }
    }
}

/// What a worker can take from a lane now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room<'a> {
    /// So many jobs.
    pub free: u32,
    /// And only until their estimated tokens fill this, of which the last may take more; `None`: no bound.
    pub tokens: Option<u64>,
    /// The keys with which it can call. A job that is to be called with another is left to others.
    pub keys: &'a [KeyId],
}

/// What a worker can run in a lane, and how much of it is unused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots<'a> {
    /// Jobs that it runs at once.
    pub capacity: u32,
    /// Of these, what is free.
    pub free: u32,
    /// Tokens that the free ones can hold together; `None`: no bound.
    pub tokens: Option<u64>,
    /// With which keys it calls, and within which limits; `None`: no gates bound what it runs.
    pub declared: Option<&'a Declaration>,
}

/// A lease as its holder tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The lease.
    pub held: Held,
    /// Whether work on it has begun; before, it may be handed to an idle worker.
    pub started: bool,
}

/// What became of a lease, as a heartbeat tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// Renewed.
    Ok,
    /// It belongs to somebody else now: stop, nothing of yours is kept.
    Lost,
    /// The job was cancelled: stop and finish.
    Cancel,
    /// The job's deadline passed: stop and finish.
    DeadlinePassed,
    /// Another worker could start it now: hand it back.
    HandBack,
}

/// Names a lease without its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The job.
    pub id: JobId,
    /// The lease's epoch.
    pub epoch: Epoch,
}

/// Text of a running attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Whose it is.
    pub held: Held,
    /// Bytes of the attempt's text before it.
    pub offset: u64,
    /// Whole characters.
    pub text: String,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// What follows for the job.
    pub verdict: Verdict,
    /// What the attempt cost; `None` when unknown.
    pub cost: Option<Cost>,
    /// What its call tells of the provider's limits; `None` when it made none.
    pub observation: Option<Observation>,
}

/// An attempt that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended<'a> {
    /// The lease under which it ran.
    pub held: Held,
    /// When it started, as its lease told.
    pub started_at: UnixMs,
    /// How it ended.
    pub finish: &'a Finish,
}

impl Ended<'_> {
    /// Writes it as the finish script reads it.
    fn write(&self, worker: &WorkerId, call: &mut Call<'_>) -> Result<(), QueueError> {
        let verdict = &self.finish.verdict;
        let state =
            transition(State::Running, verdict.event()).map_err(|illegal| corrupt("verdict", illegal.to_string()))?;
        let failure = verdict.failure();
        let result =
            if let Verdict::Succeed(generation) = verdict { encode("result", generation)? } else { Vec::new() };
        let delay_ms =
            if let Verdict::Retry { delay_ms, .. } | Verdict::Wait { delay_ms, .. } = verdict { *delay_ms } else { 0 };
        let told = self.finish.observation.as_ref().map(|told| pack("observation", told)).transpose()?;
        call.arg(self.held.id.as_bytes())
            .arg(self.held.epoch.0)
            .arg(worker.as_str())
            .arg(self.started_at.0)
            .arg(state.name())
            .arg(name_of(&verdict.attempt_end())?)
            .arg(self.finish.cost.map(String::from).unwrap_or_default())
            .arg(failure.map(|failure| name_of(&failure.class)).transpose()?.unwrap_or_default())
            .arg(failure.map_or("", |failure| failure.message.as_str()))
            .arg(result)
            .arg(delay_ms)
            .arg(u8::from(verdict.counts()))
            .arg(told.unwrap_or_default());
        Ok(())
    }
}

/// Whether a verdict counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It did.
    Kept,
    /// The lease was lost before: the cost is booked, nothing else.
    LeaseLost,
}

/// Whether a worker has left a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Booked {
    /// It has.
    Gone,
    /// Leases of its are still open; upkeep takes them back when they run out.
    Pending,
}

impl Queue {
    /// Leases jobs of `lane` to `worker` for `lease_ms` milliseconds, as many as there is room for.
    ///
    /// # Errors
    /// [`QueueError`]. A job that was leased when the answer got lost is reclaimed after its lease.
    pub async fn claim(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        room: Room<'_>,
        lease_ms: u64,
    ) -> Result<Vec<Lease>, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.claim.key(self.keys.lane(lane));
        let claimed: Vec<Claimed> = call
            .arg(worker.as_str())
            .arg(room.free)
            .arg(or_empty(room.tokens))
            .arg(lease_ms)
            .arg(room.keys.iter().map(KeyId::as_str).collect::<Vec<_>>().join(","))
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("claiming jobs", source))?;
        let mut leases = Vec::with_capacity(claimed.len());
        let mut damaged = Vec::new();
        for (id, epoch, spec, failures, started, key) in claimed {
            let Some(id) = JobId::from_bytes(&id) else {
                tracing::error!(lane = lane.0, "an entry of the stream names no job");
                continue;
            };
            let (epoch, started_at) = (Epoch(epoch), UnixMs(started));
            let key = (!key.is_empty()).then(|| KeyId::from_stored(key));
            match decode("spec", &spec) {
                Ok(spec) => leases.push(Lease { id, epoch, spec: Arc::new(spec), failures, started_at, key }),
                Err(error) => damaged.push((Held { id, epoch }, started_at, error)),
            }
        }
        join_all(damaged.into_iter().map(|(held, started_at, error)| self.fail(worker, held, started_at, error))).await;
        Ok(leases)
    }

    /// Ends a job whose record is damaged. Should that fail, it is tried again after the lease: it must not cost the jobs
    /// beside it theirs.
    async fn fail(&self, worker: &WorkerId, held: Held, started_at: UnixMs, damage: QueueError) {
        let failure = Failure::new(FailureClass::Internal, damage.to_string());
        let finish = Finish { verdict: Verdict::Fail(failure), cost: Some(Cost::NOTHING), observation: None };
        let ended = Ended { held, started_at, finish: &finish };
        if let Err(error) = self.finish(held.id.lane(), worker, &[ended]).await {
            tracing::error!(job = %held.id, %damage, error = error.in_full(), "cannot end a damaged job");
        }
    }

    /// Renews the leases that `worker` holds in `lane`, and says what it can run there.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn heartbeat(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        slots: Slots<'_>,
        lease_ms: u64,
        leases: &[Holding],
    ) -> Result<Vec<Beat>, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.heartbeat.key(self.keys.lane(lane));
        call.arg(worker.as_str()).arg(lease_ms).arg(slots.capacity).arg(slots.free).arg(or_empty(slots.tokens));
        call.arg(slots.declared.map(|declared| pack("declaration", declared)).transpose()?.unwrap_or_default());
        for Holding { held, started } in leases {
            call.arg(held.id.as_bytes()).arg(held.epoch.0).arg(u8::from(*started));
        }
        let answer: Vec<String> = call
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("renewing leases", source))?;
        let beat = |code: String| match code.as_str() {
            "o" => Ok(Beat::Ok),
            "l" => Ok(Beat::Lost),
            "c" => Ok(Beat::Cancel),
            "d" => Ok(Beat::DeadlinePassed),
            "h" => Ok(Beat::HandBack),
            other => Err(corrupt("heartbeat", format!("`{other}` is no answer"))),
        };
        answer.into_iter().map(beat).collect()
    }

    /// Adds text to running attempts, and tells how many bytes of each attempt's text are stored then; `None` where the
    /// lease was lost. A piece that would leave a gap or stand there twice is dropped: what is missing is to be sent from
    /// where the stored text ends.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer. Then a piece may or may not have been added; it may be sent again.
    pub async fn append(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        pieces: &[Piece],
    ) -> Result<Vec<Option<u64>>, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.append.key(self.keys.lane(lane));
        call.arg(worker.as_str());
        for piece in pieces {
            call.arg(piece.held.id.as_bytes()).arg(piece.held.epoch.0).arg(piece.offset).arg(&piece.text);
        }
        let stored: Vec<i64> =
            call.invoke_async(&mut connection).await.map_err(|source| QueueError::from_redis("adding text", source))?;
        Ok(stored.into_iter().map(|bytes| u64::try_from(bytes).ok()).collect())
    }

    /// Ends attempts of one lane together. May be repeated until it is answered.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn finish(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        ended: &[Ended<'_>],
    ) -> Result<Vec<Kept>, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.finish.key(self.keys.lane(lane));
        call.arg(name_of(&AttemptEnd::Fenced)?);
        for ended in ended {
            ended.write(worker, &mut call)?;
        }
        let kept: Vec<u8> = call
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("finishing jobs", source))?;
        Ok(kept.into_iter().map(|kept| if kept == 1 { Kept::Kept } else { Kept::LeaseLost }).collect())
    }

    /// Takes `worker` out of `lane` when it stops.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn leave(&self, lane: LaneNumber, worker: &WorkerId) -> Result<Booked, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.leave.key(self.keys.lane(lane));
        let gone: u8 = call
            .arg(worker.as_str())
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("leaving a lane", source))?;
        Ok(if gone == 1 { Booked::Gone } else { Booked::Pending })
    }
}

/// A number as scripts take it.
pub(crate) fn or_empty(number: Option<u64>) -> String {
    number.map(|number| number.to_string()).unwrap_or_default()
}

/// A value as scripts unpack it.
pub(crate) fn pack<T: serde::Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, QueueError> {
    rmp_serde::to_vec_named(value).map_err(|error| corrupt(what, error.to_string()))
}

/// The name under which serde stores a unit variant, for scripts that store it themselves.
pub(crate) fn name_of<T: serde::Serialize>(variant: &T) -> Result<String, QueueError> {
    let packed = rmp_serde::to_vec(variant).map_err(|error| corrupt("name", error.to_string()))?;
    rmp_serde::from_slice(&packed).map_err(|error| corrupt("name", error.to_string()))
}
