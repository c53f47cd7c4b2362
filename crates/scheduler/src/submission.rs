//! Submitting: parse, admit, reserve the request id, enqueue. One path for one job and for many.

use crate::mill::{Mill, api_error};
use futures_util::future::join_all;
use genmill_core::admit::{Refusal, admit};
use genmill_core::ids::JobId;
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_core::request::Request;
use genmill_queue::{ContentHash, Enqueued, NewJob, RequestId, Reservation, content_hash};
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::{from_pb, v1};
use std::collections::{BTreeMap, BTreeSet};

/// A job that was accepted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accepted {
    pub(crate) id: JobId,
    /// It had been submitted before.
    pub(crate) existed: bool,
}

/// What became of one request. An `Err` is for its caller alone.
pub(crate) type Answer = Result<Accepted, ApiError>;

/// A job that is to be stored, if its request id is free.
struct Wanted {
    job: NewJob,
    /// What its request id is to stand for, where it has one.
    content: Option<ContentHash>,
    /// Whether the request id, if there is one, stands for the job.
    reserved: bool,
    /// Whether the caller gave a seed, or admission drew one.
    seeded: bool,
}

impl Wanted {
    fn request_id(&self) -> &str {
        self.job.spec.request_id.as_deref().unwrap_or_default()
    }

    fn reservation(&self) -> Option<Reservation<'_>> {
        let (tenant, request_id) = (&self.job.spec.tenant, self.request_id());
        Some(Reservation { tenant, request_id, id: self.job.id, content: self.content.as_ref()? })
    }
}

/// Where a request stands on its way.
enum Plan {
    /// It is to be stored.
    Store(Box<Wanted>),
    /// It is done.
    Answer(Answer),
}

/// How often a request is tried anew whose id stood for a job that is gone.
const ROUNDS_MAX: u32 = 4;

/// How long a request id is left to a job that does not exist: it is about to be enqueued, or will be when its caller
/// tries again.
const RESERVED_MS: u64 = 60_000;

impl Mill {
    /// Submits requests and answers each, in their order.
    ///
    /// # Errors
    /// When the queue does not answer: then nothing is known of any of them, and all may be submitted again.
    pub(crate) async fn submit(&self, requests: Vec<v1::GenerationRequest>) -> Result<Vec<Answer>, ApiError> {
        let plans = join_all(requests.into_iter().map(|request| self.plan(request))).await;
        let mut plans: Vec<Plan> = plans.into_iter().collect::<Result<_, _>>()?;
        for _ in 0..ROUNDS_MAX {
            self.reserve(&mut plans).await?;
            self.enqueue(&mut plans).await?;
            if plans.iter().all(|plan| matches!(plan, Plan::Answer(_))) {
                break;
            }
        }
        let answer = |plan| match plan {
            Plan::Answer(answer) => answer,
            Plan::Store(wanted) => {
                let message =
                    format!("request_id: `{}` is being freed and taken; submit it again", wanted.request_id());
                Err(ApiError::new(Reason::QueueUnavailable, message))
            }
        };
        Ok(plans.into_iter().map(answer).collect())
    }

    async fn plan(&self, request: v1::GenerationRequest) -> Result<Plan, ApiError> {
        let request = match from_pb::request(request) {
            Ok(request) => request,
            Err(refusal) => return Ok(Plan::Answer(Err(refusal.into()))),
        };
        let content = request.request_id.is_some().then(|| content_hash(&request)).transpose().map_err(api_error)?;
        let spec = match self.admit(request.clone()).await? {
            Ok(spec) => spec,
            Err(refusal) => return self.refuse(&request, content, refusal).await,
        };
        let lane = self.queue.open_lane(&spec.lane()).await.map_err(api_error)?;
        let job = NewJob { id: JobId::new(self.now(), lane, self.random()?), spec };
        let seeded = request.seed.is_some();
        Ok(Plan::Store(Box::new(Wanted { job, reserved: content.is_none(), content, seeded })))
    }

    async fn admit(&self, request: Request) -> Result<Result<JobSpec, Refusal>, ApiError> {
        let facts = self.registrations.about(&request.model).await?;
        match admit(request, &facts, &self.defaults, self.now(), self.random()?) {
            Ok(spec) => Ok(self.forms.check(&spec).await?.map(|()| spec).map_err(Refusal::Invalid)),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// A request that was accepted once stays accepted, even when nobody could serve it now.
    async fn refuse(
        &self,
        request: &Request,
        content: Option<ContentHash>,
        refusal: Refusal,
    ) -> Result<Plan, ApiError> {
        if let (Some(request_id), Some(content)) = (&request.request_id, content) {
            let found = self.queue.find_request_id(&request.tenant, request_id, &content).await.map_err(api_error)?;
            if let Some(id) = found
                && self.queue.states(&[id]).await.map_err(api_error)? != [None]
            {
                return Ok(Plan::Answer(Ok(Accepted { id, existed: true })));
            }
        }
        Ok(Plan::Answer(Err(refusal.into())))
    }

    /// Reserves all request ids in one round trip.
    async fn reserve(&self, plans: &mut [Plan]) -> Result<(), ApiError> {
        let open = |plan: &&mut Plan| matches!(plan, Plan::Store(wanted) if !wanted.reserved);
        let mut open: Vec<&mut Plan> = plans.iter_mut().filter(open).collect();
        let mut reservations = Vec::new();
        for plan in &open {
            if let Plan::Store(wanted) = &**plan {
                reservations.extend(wanted.reservation());
            }
        }
        let reserved = self.queue.reserve_request_ids(&reservations).await.map_err(api_error)?;
        for (plan, reserved) in open.iter_mut().zip(reserved) {
            let Plan::Store(wanted) = &mut **plan else { continue };
            match reserved {
                RequestId::Fresh => wanted.reserved = true,
                // Enqueueing what exists does nothing; what was lost between reserving and enqueueing is made good.
                RequestId::Same(id) => {
                    wanted.reserved = true;
                    self.becomes(&mut wanted.job, id).await?;
                }
                RequestId::Other(earlier) if self.is_gone(earlier).await? => self.free(wanted, earlier).await?,
                RequestId::Other(earlier) => **plan = Plan::Answer(Err(self.reused(wanted, earlier).await?)),
            }
        }
        Ok(())
    }

    /// Makes the same job of one that was submitted before. Whether it has slack may have been answered otherwise then.
    async fn becomes(&self, job: &mut NewJob, id: JobId) -> Result<(), ApiError> {
        if job.id.lane() != id.lane() {
            let batch = self.queue.open_lane(&job.spec.model.lane().batch()).await.map_err(api_error)?;
            job.spec.batch = id.lane() == batch;
        }
        job.id = id;
        Ok(())
    }

    /// Whether a job for which a request id stands does not exist and never will.
    async fn is_gone(&self, id: JobId) -> Result<bool, ApiError> {
        let exists = self.queue.states(&[id]).await.map_err(api_error)? != [None];
        if exists || self.now().ms_since(id.submitted_at()) < RESERVED_MS {
            return Ok(false);
        }
        // Whoever was held up all this time before enqueueing it finds it gone, and asks for the request id anew.
        self.queue.bury(id).await.map_err(api_error)
    }

    /// Frees the request id from a job that is gone: in the next round it may stand for another.
    async fn free(&self, wanted: &mut Wanted, gone: JobId) -> Result<(), ApiError> {
        let stood_for = (&wanted.job.spec.tenant, wanted.request_id(), gone);
        self.queue.free_request_ids(&[stood_for]).await.map_err(api_error)?;
        wanted.reserved = wanted.content.is_none();
        wanted.job.id = JobId::new(self.now(), wanted.job.id.lane(), self.random()?);
        Ok(())
    }

    /// Stores all jobs, those of a lane together.
    async fn enqueue(&self, plans: &mut [Plan]) -> Result<(), ApiError> {
        let mut by_lane: BTreeMap<Lane, Vec<(&mut Plan, NewJob)>> = BTreeMap::new();
        for plan in plans {
            if let Plan::Store(wanted) = plan
                && wanted.reserved
            {
                let job = wanted.job.clone();
                by_lane.entry(job.spec.lane()).or_default().push((plan, job));
            }
        }
        for (lane, jobs) in by_lane {
            let (plans, jobs): (Vec<&mut Plan>, Vec<NewJob>) = jobs.into_iter().unzip();
            let stored = self.queue.enqueue(&lane, &jobs).await.map_err(api_error)?;
            let existed = jobs.iter().zip(&stored).filter(|(_, stored)| **stored == Enqueued::Existed);
            let old: Vec<JobId> = existed.map(|(job, _)| job.id).collect();
            let live = self.queue.states(&old).await.map_err(api_error)?;
            let gone: BTreeSet<JobId> =
                old.into_iter().zip(live).filter(|(_, state)| state.is_none()).map(|(id, _)| id).collect();
            for ((plan, job), stored) in plans.into_iter().zip(jobs).zip(stored) {
                match plan {
                    // It was purged after its request id was looked up.
                    Plan::Store(wanted) if gone.contains(&job.id) => self.free(wanted, job.id).await?,
                    plan => *plan = Plan::Answer(Ok(Accepted { id: job.id, existed: stored == Enqueued::Existed })),
                }
            }
        }
        Ok(())
    }

    /// Tells that a request id stands for an earlier job, and what is different there.
    async fn reused(&self, wanted: &Wanted, earlier: JobId) -> Result<ApiError, ApiError> {
        let spec = &wanted.job.spec;
        let request_id = wanted.request_id();
        let stored = self.queue.get_many(&[earlier]).await.map_err(api_error)?;
        let mut differs = stored.first().map(|job| job.spec.differences(spec)).unwrap_or_default();
        // A drawn seed always differs; it is only to blame when nothing else is.
        if !wanted.seeded && differs.len() > 1 {
            differs.retain(|field| *field != "seed");
        }
        let differs = if differs.is_empty() { "what is left to defaults".to_owned() } else { differs.join(",") };
        let message = format!(
            "request_id: `{request_id}` of tenant `{}` was used for job {earlier}, which differs in: {differs}; use \
             another request_id for another request",
            spec.tenant
        );
        Ok(ApiError::new(Reason::RequestIdReused, message).with("job_id", earlier.to_string()).with("differs", differs))
    }
}
