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
use std::collections::BTreeMap;

/// A job that was accepted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accepted {
    pub(crate) id: JobId,
    /// It had been submitted before.
    pub(crate) existed: bool,
}

/// What became of one request. An `Err` is for its caller alone.
pub(crate) type Answer = Result<Accepted, ApiError>;

/// A job that is to be stored if its request id is free.
#[derive(Clone)]
struct Wanted {
    job: NewJob,
    content: ContentHash,
    /// Whether the caller gave a seed, or admission drew one.
    seeded: bool,
}

/// Where a request stands on its way.
enum Plan {
    /// It has a request id, which is to be reserved.
    Reserve(Box<Wanted>),
    /// It is to be stored.
    Enqueue(Box<NewJob>),
    /// It is done.
    Answer(Answer),
}

impl Mill {
    /// Submits requests and answers each, in their order.
    ///
    /// # Errors
    /// When the queue does not answer: then nothing is known of any of them, and all may be submitted again.
    pub(crate) async fn submit(&self, requests: Vec<v1::GenerationRequest>) -> Result<Vec<Answer>, ApiError> {
        let plans = join_all(requests.into_iter().map(|request| self.plan(request))).await;
        let mut plans: Vec<Plan> = plans.into_iter().collect::<Result<_, _>>()?;
        self.reserve(&mut plans).await?;
        self.enqueue(&mut plans).await?;
        let answer = |plan| match plan {
            Plan::Answer(answer) => answer,
            Plan::Reserve(_) | Plan::Enqueue(_) => Err(ApiError::new(Reason::Internal, "the job was not stored")),
        };
        Ok(plans.into_iter().map(answer).collect())
    }

    async fn plan(&self, request: v1::GenerationRequest) -> Result<Plan, ApiError> {
        let request = match from_pb::request(request) {
            Ok(request) => request,
            Err(refusal) => return Ok(Plan::Answer(Err(refusal.into()))),
        };
        let lane = request.model.lane();
        let content = request.request_id.is_some().then(|| content_hash(&request)).transpose().map_err(api_error)?;
        let spec = match self.admit(request.clone()).await? {
            Ok(spec) => spec,
            Err(refusal) => return self.refuse(&request, content, refusal).await,
        };
        let lane = self.queue.open_lane(&lane).await.map_err(api_error)?;
        let job = NewJob { id: JobId::new(self.now(), lane, self.random()?), spec };
        Ok(match content {
            Some(content) => Plan::Reserve(Box::new(Wanted { job, content, seeded: request.seed.is_some() })),
            None => Plan::Enqueue(Box::new(job)),
        })
    }

    async fn admit(&self, request: Request) -> Result<Result<JobSpec, Refusal>, ApiError> {
        let facts = self.registrations.about(&request.model).await.map_err(api_error)?;
        Ok(admit(request, &facts, &self.defaults, self.now(), self.random()?))
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
        let wanted = |plan: &Plan| match plan {
            Plan::Reserve(wanted) => Some(wanted.clone()),
            Plan::Enqueue(_) | Plan::Answer(_) => None,
        };
        let wanted: Vec<(usize, Box<Wanted>)> =
            plans.iter().enumerate().filter_map(|(index, plan)| Some((index, wanted(plan)?))).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let reservations: Vec<Reservation<'_>> = wanted
            .iter()
            .map(|(_, wanted)| Reservation {
                tenant: &wanted.job.spec.tenant,
                request_id: wanted.job.spec.request_id.as_deref().unwrap_or_default(),
                id: wanted.job.id,
                content: &wanted.content,
            })
            .collect();
        let reserved = self.queue.reserve_request_ids(&reservations).await.map_err(api_error)?;
        for ((index, wanted), reserved) in wanted.into_iter().zip(reserved) {
            plans[index] = match reserved {
                RequestId::Fresh => Plan::Enqueue(Box::new(wanted.job)),
                // Enqueueing what exists does nothing; what was lost between reserving and enqueueing is made good.
                RequestId::Same(id) => Plan::Enqueue(Box::new(NewJob { id, ..wanted.job })),
                RequestId::Other(earlier) => Plan::Answer(Err(self.reused(&wanted, earlier).await?)),
            };
        }
        Ok(())
    }

    /// Stores all jobs, those of a lane together.
    async fn enqueue(&self, plans: &mut [Plan]) -> Result<(), ApiError> {
        let mut by_lane: BTreeMap<Lane, Vec<(usize, NewJob)>> = BTreeMap::new();
        for (index, plan) in plans.iter().enumerate() {
            if let Plan::Enqueue(job) = plan {
                by_lane.entry(job.spec.model.lane()).or_default().push((index, NewJob::clone(job)));
            }
        }
        for (lane, jobs) in by_lane {
            let (indices, jobs): (Vec<usize>, Vec<NewJob>) = jobs.into_iter().unzip();
            let stored = self.queue.enqueue(&lane, &jobs).await.map_err(api_error)?;
            for ((index, job), stored) in indices.into_iter().zip(jobs).zip(stored) {
                plans[index] = Plan::Answer(Ok(Accepted { id: job.id, existed: stored == Enqueued::Existed }));
            }
        }
        Ok(())
    }

    /// Tells that a request id stands for an earlier job, and what is different there.
    async fn reused(&self, wanted: &Wanted, earlier: JobId) -> Result<ApiError, ApiError> {
        let spec = &wanted.job.spec;
        let request_id = spec.request_id.as_deref().unwrap_or_default();
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
