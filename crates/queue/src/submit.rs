//! Taking jobs in: idempotency first, then storage, backlog and feed in one script.

use crate::error::QueueError;
use crate::payload::{corrupt, encode};
use crate::queue::Queue;
use crate::work::or_empty;
use futures_util::future::try_join_all;
use genmill_core::ids::JobId;
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_core::names::Tenant;
use genmill_core::request::Request;
use sha2::{Digest as _, Sha256};

/// The sha-256 of a request's content, cut to 16 bytes: what tells "the same again" from "another one".
pub type ContentHash = [u8; 16];

/// The hash of what a request asks for: all of it but the request id itself.
///
/// # Errors
/// [`QueueError::Corrupt`] when the request cannot be written, which is a defect.
pub fn content_hash(request: &Request) -> Result<ContentHash, QueueError> {
    let content = Request { request_id: None, ..request.clone() };
    let digest = Sha256::digest(encode("request", &content)?);
    let mut hash = ContentHash::default();
    hash.copy_from_slice(&digest[..16]);
    Ok(hash)
}

/// What a request id stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestId {
    /// It was free; it stands for the given job now.
    Fresh,
    /// The same content was submitted before as this job.
    Same(JobId),
    /// Other content was submitted before as this job.
    Other(JobId),
}

/// A request id that is to stand for a job.
#[derive(Clone, Copy, Debug)]
pub struct Reservation<'a> {
    /// Whose request id it is.
    pub tenant: &'a Tenant,
    /// The request id.
    pub request_id: &'a str,
    /// The job.
    pub id: JobId,
    /// What the request asks for.
    pub content: &'a ContentHash,
}

/// What stands for a request id in its tenant's keys: long ones cost no more than short ones.
type RequestHash = [u8; 12];

fn request_hash(request_id: &str) -> RequestHash {
    let mut hash = RequestHash::default();
    hash.copy_from_slice(&Sha256::digest(request_id)[..12]);
    hash
}

impl Reservation<'_> {
    fn value(&self) -> Vec<u8> {
        [self.id.as_bytes().as_slice(), self.content].concat()
    }

    fn judge(&self, stored: &[u8]) -> Result<RequestId, QueueError> {
        if stored == self.value() {
            return Ok(RequestId::Fresh);
        }
        let (id, content) = stored.split_at_checked(16).unwrap_or((stored, &[]));
        let id = JobId::from_bytes(id).ok_or_else(|| corrupt("request id", "it names no job"))?;
        Ok(if content == self.content { RequestId::Same(id) } else { RequestId::Other(id) })
    }
}

/// A job to be enqueued.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id.
    pub id: JobId,
    /// What is to be done.
    pub spec: JobSpec,
}

/// Whether a job was new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enqueued {
    /// It was stored.
    New,
    /// It was there already, and is left as it was; or it was purged just now, and stays away.
    Existed,
}

impl Queue {
    /// Makes each request id stand for its job, unless it stands for one already.
    ///
    /// A crash after this and before [`Self::enqueue`] is healed by the caller's next try: the id stays the same, and
    /// enqueueing it twice does nothing.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; the call may be repeated.
    pub async fn reserve_request_ids(&self, reservations: &[Reservation<'_>]) -> Result<Vec<RequestId>, QueueError> {
        loop {
            // One that was taken and then freed is tried again: now it is free, or somebody else has it.
            if let Some(reserved) = self.try_to_reserve(reservations).await? {
                return Ok(reserved);
            }
        }
    }

    /// The same; nothing where a request id was freed between two looks at it.
    async fn try_to_reserve(&self, reservations: &[Reservation<'_>]) -> Result<Option<Vec<RequestId>>, QueueError> {
        let mut connection = self.connection.clone();
        let fail = |source| QueueError::from_redis("reserving request ids", source);
        let place = |reservation: &Reservation<'_>| {
            let hash = request_hash(reservation.request_id);
            (self.keys.request_ids(reservation.tenant, &hash), hash)
        };
        let mut reserve = redis::pipe();
        for reservation in reservations {
            let (key, hash) = place(reservation);
            reserve.hset_nx(key, &hash, reservation.value());
        }
        let free: Vec<bool> = reserve.query_async(&mut connection).await.map_err(fail)?;
        // Few are taken.
        let mut read = redis::pipe();
        for (reservation, _) in reservations.iter().zip(&free).filter(|(_, free)| !**free) {
            let (key, hash) = place(reservation);
            read.hget(key, &hash);
        }
        let taken: Vec<Option<Vec<u8>>> = read.query_async(&mut connection).await.map_err(fail)?;
        let Some(taken) = taken.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let mut taken = taken.into_iter();
        let judge = |(reservation, free): (&Reservation<'_>, bool)| {
            if free { Ok(RequestId::Fresh) } else { reservation.judge(&taken.next().unwrap_or_default()) }
        };
        reservations.iter().zip(free).map(judge).collect::<Result<_, _>>().map(Some)
    }

    /// The job that `request_id` of `tenant` stands for, when it was submitted with the same content.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn find_request_id(
        &self,
        tenant: &Tenant,
        request_id: &str,
        content: &ContentHash,
    ) -> Result<Option<JobId>, QueueError> {
        let mut connection = self.connection.clone();
        let name = request_hash(request_id);
        let stored: Option<Vec<u8>> = redis::cmd("HGET")
            .arg(self.keys.request_ids(tenant, &name))
            .arg(&name)
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("looking up a request id", source))?;
        let same = |stored: Vec<u8>| {
            let (id, hash) = stored.split_at_checked(16)?;
            JobId::from_bytes(id).filter(|_| hash == content)
        };
        Ok(stored.and_then(same))
    }

    /// Frees each of a tenant's request ids, unless it stands for another job than the given one by now.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; the call may be repeated.
    pub async fn free_request_ids(&self, stood_for: &[(&Tenant, &str, JobId)]) -> Result<(), QueueError> {
        let free = async |(tenant, request_id, id): &(&Tenant, &str, JobId)| {
            let hash = request_hash(request_id);
            let mut call = self.scripts.free_request_id.key(self.keys.request_ids(tenant, &hash));
            call.arg(&hash).arg(id.as_bytes());
            call.invoke_async::<()>(&mut self.connection.clone()).await
        };
        let freed = try_join_all(stood_for.iter().map(free)).await;
        freed.map(drop).map_err(|source| QueueError::from_redis("freeing request ids", source))
    }

    /// Makes sure that a job which does not exist is not stored later either, by whoever reserved a request id for it
    /// and was held up since. False when it exists.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; the call may be repeated.
    pub async fn bury(&self, id: JobId) -> Result<bool, QueueError> {
        let mut call = self.scripts.bury.key(self.keys.lane(id.lane()));
        let buried: Vec<bool> = call
            .arg(id.as_bytes())
            .invoke_async(&mut self.connection.clone())
            .await
            .map_err(|source| QueueError::from_redis("looking for a job", source))?;
        Ok(buried == [true])
    }

    /// Stores `jobs`, all of the lane `lane`, and feeds them to its workers. A job that exists is left alone, and one
    /// that was purged or buried within the last ten minutes stays away: it is told as existing.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; the call may be repeated.
    pub async fn enqueue(&self, lane: &Lane, jobs: &[NewJob]) -> Result<Vec<Enqueued>, QueueError> {
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let number = self.open_lane(lane).await?;
        let mut call = self.scripts.enqueue.key(self.keys.lane(number));
        for job in jobs {
            let spec = &job.spec;
            call.arg(job.id.as_bytes())
                .arg(encode("spec", spec)?)
                .arg(format!("{}/{}", spec.priority.code(), spec.tenant))
                .arg(spec.priority.weight())
                .arg(spec.tenant.as_str())
                .arg(spec.experiment.as_ref().map_or("", |name| name.as_str()))
                .arg(split(spec))
                .arg(spec.estimated_tokens())
                .arg(or_empty(spec.deadline.map(|at| at.0)))
                .arg(or_empty(spec.not_before.map(|at| at.0)))
                .arg(or_empty(spec.prefix.map(|prefix| prefix.0)))
                .arg(&order(spec));
        }
        let mut connection = self.connection.clone();
        let stored: Vec<u8> =
            call.invoke_async(&mut connection).await.map_err(|source| QueueError::from_redis("enqueueing", source))?;
        Ok(stored.into_iter().map(|new| if new == 1 { Enqueued::New } else { Enqueued::Existed }).collect())
    }
}

/// What splits the jobs of an experiment: remote models wait apart, so that a throttled one cannot fill the look-ahead.
fn split(spec: &JobSpec) -> &str {
    if spec.model.prefix().is_remote() { spec.model.as_str() } else { "" }
}

/// The order among jobs of prefix groups that started together, smallest first: by prefix, and with the same one by the
/// bound of output, in halved steps, longest first, because what takes longest should not begin last.
fn order(spec: &JobSpec) -> [u8; 5] {
    let [a, b, c, d, ..] = spec.prefix.map_or(0, |prefix| prefix.0).to_be_bytes();
    let halvings = spec.sampling.max_tokens.leading_zeros();
    [a, b, c, d, u8::try_from(halvings).unwrap_or(u8::MAX)]
}
