//! Submitting: parse, admit, reserve the request id, enqueue. One path for one job and for many.

use crate::mill::{Mill, api_error};
use futures_util::future::join_all;
use genmill_core::admit::{Refusal, admit};
use genmill_core::ids::JobId;
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_core::request::Request;
use genmill_queue::{ContentHash, Enqueued, NewJob, RequestId, content_hash};
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

/// What is to be done for one request.
enum Plan {
    Enqueue(Box<NewJob>),
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
        let mut by_lane: BTreeMap<Lane, Vec<usize>> = BTreeMap::new();
        for (index, plan) in plans.iter().enumerate() {
            if let Plan::Enqueue(job) = plan {
                by_lane.entry(job.spec.model.lane()).or_default().push(index);
            }
        }
        for (lane, indices) in by_lane {
            let job = |index: &usize| match &plans[*index] {
                Plan::Enqueue(job) => Some(NewJob::clone(job)),
                Plan::Answer(_) => None,
            };
            let jobs: Vec<NewJob> = indices.iter().filter_map(job).collect();
            let stored = self.queue.enqueue(&lane, &jobs).await.map_err(api_error)?;
            for ((index, job), stored) in indices.into_iter().zip(jobs).zip(stored) {
                let accepted = Accepted { id: job.id, existed: stored == Enqueued::Existed };
                plans[index] = Plan::Answer(Ok(accepted));
            }
        }
        let unanswered = || Err(ApiError::new(Reason::Internal, "the job was not stored"));
        Ok(plans.into_iter().map(|plan| if let Plan::Answer(answer) = plan { answer } else { unanswered() }).collect())
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
        let id = JobId::new(self.now(), lane, self.random()?);
        match (spec.request_id.clone(), content) {
            (Some(request_id), Some(content)) => self.reserve(spec, &request_id, id, &content).await,
            _ => Ok(Plan::Enqueue(Box::new(NewJob { id, spec }))),
        }
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

    async fn reserve(
        &self,
        spec: JobSpec,
        request_id: &str,
        id: JobId,
        content: &ContentHash,
    ) -> Result<Plan, ApiError> {
        let reserved = self.queue.reserve_request_id(&spec.tenant, request_id, id, content).await;
        Ok(match reserved.map_err(api_error)? {
            RequestId::Fresh => Plan::Enqueue(Box::new(NewJob { id, spec })),
            // Enqueueing what exists does nothing; what was lost between reserving and enqueueing is made good.
            RequestId::Same(id) => Plan::Enqueue(Box::new(NewJob { id, spec })),
            RequestId::Other(earlier) => {
                let message = format!(
                    "request_id: `{request_id}` of tenant `{}` was used with other content for job {earlier}; use \
                     another request_id for another request",
                    spec.tenant
                );
                Plan::Answer(Err(ApiError::new(Reason::RequestIdReused, message)))
            }
        })
    }
}
