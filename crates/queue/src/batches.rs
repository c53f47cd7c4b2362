//! Batches: jobs that went out to their provider together, and are held by a record of their own instead of leases.
//!
//! Never here: what a provider is asked, and when (the worker decides).

use crate::error::QueueError;
use crate::payload::{corrupt, decode};
use crate::queue::Queue;
use crate::work::Held;
use genmill_core::gate::KeyId;
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_core::job::JobSpec;
use genmill_core::model::ModelName;
use genmill_core::time::UnixMs;
use std::collections::HashMap;

/// How many specs are read together.
const STEP: usize = 250;

/// How far a batch is. One that is done is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchState {
    /// It is being filled, or submitted.
    Intent,
    /// Its provider has it.
    Submitted,
    /// It has ended there, and what came of it is being read.
    Collecting,
    /// All of its jobs have ended, and what it left behind is being deleted.
    Clearing,
}

impl BatchState {
    const ALL: [Self; 4] = [Self::Intent, Self::Submitted, Self::Collecting, Self::Clearing];

    const fn name(self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Submitted => "submitted",
            Self::Collecting => "collecting",
            Self::Clearing => "clearing",
        }
    }
}

/// A step of a batch, as it is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance<'a> {
    /// It takes no more jobs, and was surely not submitted.
    Full,
    /// It is about to be submitted.
    Submitting {
        /// How many items it has then.
        items: usize,
        /// Its jobs that are not among them, because they were cancelled or expired before.
        without: &'a [Held],
    },
    /// Its provider has it, under this name.
    Submitted(&'a str),
    /// It has ended there.
    Collecting,
    /// None of its jobs is wanted any more.
    Clearing,
}

impl Advance<'_> {
    /// Its state then; what is said of its submission: `0` surely none, `1` one was begun, nothing: it is beyond that; its
    /// provider's name of it, where that is new.
    const fn written(&self) -> (BatchState, &'static str, &str) {
        match self {
            Self::Full => (BatchState::Intent, "0", ""),
            Self::Submitting { .. } => (BatchState::Intent, "1", ""),
            Self::Submitted(remote) => (BatchState::Submitted, "", remote),
            Self::Collecting => (BatchState::Collecting, "", ""),
            Self::Clearing => (BatchState::Clearing, "", ""),
        }
    }
}

/// A batch that jobs are to go into.
#[derive(Clone, Copy, Debug)]
pub struct Parking<'a> {
    /// Its tag.
    pub tag: &'a str,
    /// The model of all its jobs.
    pub model: &'a ModelName,
    /// With which key it is to be submitted.
    pub key: Option<&'a KeyId>,
    /// How long the worker holds it without renewing, in milliseconds.
    pub lease_ms: u64,
    /// For how long it is filled from its beginning on, in milliseconds.
    pub fill_ms: u64,
}

/// A batch, as its record tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchRecord {
    /// Its tag.
    pub tag: String,
    /// How often it was taken over; its holder names it in every write.
    pub epoch: Epoch,
    /// How far it is.
    pub state: BatchState,
    /// The model of all its jobs.
    pub model: ModelName,
    /// With which key it was or is to be submitted.
    pub key: Option<KeyId>,
    /// When its first job went in.
    pub made_at: UnixMs,
    /// Until when it is filled.
    pub filled_until: UnixMs,
    /// It takes no more jobs.
    pub full: bool,
    /// Somebody began to submit it and did not say what came of that.
    pub tried: bool,
    /// How many items it had when it was last about to be submitted.
    pub items: Option<u64>,
    /// The provider's name of it.
    pub remote: Option<String>,
    /// How many of its jobs are wanted still.
    pub jobs: u64,
}

/// A job of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// The job, under the epoch with which it went in.
    pub held: Held,
    /// Whether what comes of it counts. Else it was cancelled, or its deadline passed: only its cost is booked.
    pub wanted: bool,
    /// What is to be done.
    pub spec: JobSpec,
    /// How many of its attempts failed before.
    pub failures: u32,
    /// When its attempt started, by the clock of Redis.
    pub started_at: UnixMs,
}

/// The jobs of a batch of which nothing has come yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Members {
    /// Those that can be read.
    pub jobs: Vec<Member>,
    /// Those that are wanted but cannot be read, with the start of their attempts.
    pub damaged: Vec<(Held, UnixMs)>,
}

/// Whether a batch moved on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// It did.
    On,
    /// Somebody else holds it.
    Lost,
    /// It is not done: jobs of it are wanted still.
    NotDone,
}

/// A batch's fields as they are stored.
type Stored = HashMap<String, String>;

fn record(tag: String, stored: &Stored) -> Result<BatchRecord, QueueError> {
    let bad = |what: &str| corrupt("batch", format!("{tag} has no {what} that can be read"));
    let text = |field: &str| stored.get(field).filter(|text| !text.is_empty());
    let number = |field: &str| text(field).and_then(|number| number.parse::<u64>().ok()).ok_or_else(|| bad(field));
    let state = text("st").and_then(|name| BatchState::ALL.into_iter().find(|state| state.name() == name));
    Ok(BatchRecord {
        epoch: Epoch(u32::try_from(number("ep")?).map_err(|_| bad("ep"))?),
        state: state.ok_or_else(|| bad("st"))?,
        model: text("md").and_then(|name| ModelName::parse(name).ok()).ok_or_else(|| bad("md"))?,
        key: text("ky").map(|key| KeyId::from_stored(key.clone())),
        made_at: UnixMs(number("cr")?),
        filled_until: UnixMs(number("sl")?),
        full: stored.contains_key("tr"),
        tried: text("tr").is_some_and(|begun| begun == "1"),
        items: number("it").ok(),
        remote: text("rm").cloned(),
        jobs: number("lv").unwrap_or(0),
        tag,
    })
}

impl Queue {
    /// Moves leased jobs of one model into a batch that `worker` fills. Tells for each whether it had the lease; `None` when
    /// the batch takes no more. May be repeated.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn park(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        parking: Parking<'_>,
        leases: &[Held],
    ) -> Result<Option<Vec<bool>>, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.park.key(self.keys.lane(lane));
        call.arg(worker.as_str()).arg(parking.tag).arg(BatchState::Intent.name()).arg(parking.model.as_str());
        call.arg(parking.key.map_or("", KeyId::as_str)).arg(parking.lease_ms).arg(parking.fill_ms);
        call.arg(WorkerId::of_batch(parking.tag).as_str());
        for held in leases {
            call.arg(held.id.as_bytes()).arg(held.epoch.0);
        }
        call.invoke_async(&mut connection).await.map_err(|source| QueueError::from_redis("filling a batch", source))
    }

    /// Renews the hold of `worker` on batches for `lease_ms`, and takes over up to `most` that nobody holds. Tells for each
    /// how many of its jobs are wanted still, `None` when it is lost. With 0 for `lease_ms` they are let go.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn hold_batches(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        lease_ms: u64,
        most: usize,
        held: &[(&str, Epoch)],
    ) -> Result<(Vec<Option<u64>>, Vec<BatchRecord>), QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.hold_batches.key(self.keys.lane(lane));
        call.arg(worker.as_str()).arg(lease_ms).arg(most);
        for (tag, epoch) in held {
            call.arg(tag).arg(epoch.0);
        }
        let (wanted, taken): (Vec<i64>, Vec<(String, Stored)>) = call
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("holding batches", source))?;
        // One that cannot be read must not hold up the others.
        let read = |(tag, stored): (String, Stored)| {
            record(tag, &stored)
                .inspect_err(|error| tracing::error!(error = error.in_full(), "left a batch alone"))
                .ok()
        };
        let taken = taken.into_iter().filter_map(read).collect();
        Ok((wanted.into_iter().map(|wanted| u64::try_from(wanted).ok()).collect(), taken))
    }

    /// Writes down how far a batch is, and holds it for another `lease_ms`.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn advance_batch(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        batch: (&str, Epoch),
        lease_ms: u64,
        advance: Advance<'_>,
    ) -> Result<Moved, QueueError> {
        let (state, begun, remote) = advance.written();
        let (items, without) = match advance {
            Advance::Submitting { items, without } => (items.to_string(), without),
            _ => (String::new(), &[] as &[Held]),
        };
        let done = if state == BatchState::Clearing { "1" } else { "0" };
        let written = [state.name(), begun, remote, done, &items];
        self.move_batch(lane, worker, batch, lease_ms, (written, without)).await
    }

    /// Ends a batch none of whose jobs is wanted any more.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn close_batch(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        batch: (&str, Epoch),
    ) -> Result<Moved, QueueError> {
        self.move_batch(lane, worker, batch, 0, (["", "", "", "1", ""], &[])).await
    }

    async fn move_batch(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        (tag, epoch): (&str, Epoch),
        lease_ms: u64,
        (written, without): ([&str; 5], &[Held]),
    ) -> Result<Moved, QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.advance_batch.key(self.keys.lane(lane));
        call.arg(worker.as_str()).arg(tag).arg(epoch.0).arg(lease_ms).arg(&written[..]);
        for held in without {
            call.arg(held.id.as_bytes());
        }
        let moved: u8 = call
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("moving a batch on", source))?;
        match moved {
            1 => Ok(Moved::On),
            0 => Ok(Moved::Lost),
            _ => Ok(Moved::NotDone),
        }
    }

    /// Moves jobs of a batch into a new one, `part`, which takes no others and was surely not submitted. Whoever looks for
    /// batches after `after_ms` takes it over. Those that are not in the batch any more are left out. May be repeated.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn part_batch(
        &self,
        lane: LaneNumber,
        worker: &WorkerId,
        (tag, epoch): (&str, Epoch),
        (part, after_ms): (&str, u64),
        jobs: &[Held],
    ) -> Result<Moved, QueueError> {
        // All in one call: a batch has at most some ten thousand, and a part that is there is whole.
        let mut connection = self.connection.clone();
        let mut call = self.scripts.part_batch.key(self.keys.lane(lane));
        call.arg(worker.as_str()).arg(tag).arg(epoch.0).arg(part).arg(after_ms).arg(BatchState::Intent.name());
        call.arg(WorkerId::of_batch(tag).as_str()).arg(WorkerId::of_batch(part).as_str());
        for held in jobs {
            call.arg(held.id.as_bytes()).arg(held.epoch.0);
        }
        let parted: bool = call
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("parting a batch", source))?;
        Ok(if parted { Moved::On } else { Moved::Lost })
    }

    /// The jobs of a batch of which nothing has come yet, without those that were purged meanwhile.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn batch_members(&self, lane: LaneNumber, tag: &str) -> Result<Members, QueueError> {
        let fail = |source| QueueError::from_redis("reading a batch", source);
        let mut connection = self.connection.clone();
        let key = self.keys.batch_jobs(lane, tag);
        let stored: Vec<(Vec<u8>, u32)> = redis::cmd("ZRANGE")
            .arg(key)
            .arg(0)
            .arg(-1)
            .arg("WITHSCORES")
            .query_async(&mut connection)
            .await
            .map_err(fail)?;
        let named =
            stored.iter().filter_map(|(id, epoch)| Some(Held { id: JobId::from_bytes(id)?, epoch: Epoch(*epoch) }));
        let named: Vec<Held> = named.collect();
        let mut members = Members::default();
        for step in named.chunks(STEP) {
            let mut pipe = redis::pipe();
            for held in step {
                pipe.hmget(self.keys.job(held.id), &["ep", "bt", "fc", "sa", &format!("k{}", held.epoch.0)]);
                pipe.get(self.keys.spec(held.id));
            }
            let stored: Vec<redis::Value> = pipe.query_async(&mut connection).await.map_err(fail)?;
            for (held, stored) in step.iter().zip(stored.chunks(2)) {
                members.add(*held, tag, stored)?;
            }
        }
        Ok(members)
    }

    /// The batches of a lane, oldest first: a look at one moment.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn batches(&self, lane: LaneNumber) -> Result<Vec<BatchRecord>, QueueError> {
        let fail = |source| QueueError::from_redis("listing batches", source);
        let mut connection = self.connection.clone();
        let key = self.keys.of_lane(lane, "batches");
        let tags: Vec<String> =
            redis::cmd("ZRANGE").arg(key).arg(0).arg(-1).query_async(&mut connection).await.map_err(fail)?;
        let mut pipe = redis::pipe();
        for tag in &tags {
            pipe.hgetall(self.keys.batch(lane, tag));
        }
        let stored: Vec<Stored> = pipe.query_async(&mut connection).await.map_err(fail)?;
        // One that ended meanwhile has no fields.
        let found = tags.into_iter().zip(stored).filter(|(_, stored)| !stored.is_empty());
        let mut batches = found.map(|(tag, stored)| record(tag, &stored)).collect::<Result<Vec<_>, _>>()?;
        batches.sort_unstable_by_key(|batch| batch.made_at);
        Ok(batches)
    }
}

/// Epoch, batch, failures, start, whether a verdict of the epoch is kept; and the spec.
type StoredMember = ((Option<u32>, Option<String>, Option<u32>, Option<u64>, Option<u8>), Option<Vec<u8>>);

impl Members {
    fn add(&mut self, held: Held, tag: &str, stored: &[redis::Value]) -> Result<(), QueueError> {
        let fail = |error: redis::ParsingError| corrupt("batch", error.to_string());
        let stored: StoredMember = redis::from_redis_value(redis::Value::Array(stored.to_vec())).map_err(fail)?;
        let ((epoch, batch, failures, started_at, kept), spec) = stored;
        let wanted = epoch == Some(held.epoch.0) && batch.as_deref() == Some(tag);
        let started_at = UnixMs(started_at.unwrap_or(0));
        match spec.map(|spec| decode("spec", &spec)) {
            _ if kept.is_some() => {}
            Some(Ok(spec)) => {
                self.jobs.push(Member { held, wanted, spec, failures: failures.unwrap_or(0), started_at });
            }
            _ if wanted => self.damaged.push((held, started_at)),
            Some(Err(_)) | None => {}
        }
        Ok(())
    }
}
