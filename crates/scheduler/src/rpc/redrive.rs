//! `Redrive`: failed jobs once more, as new jobs.

use super::matching::{STEP, candidates, lanes, matching};
use crate::mill::{Mill, api_error};
use genmill_core::admit::Refusal;
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::job::{Job, JobSpec};
use genmill_core::model::ModelName;
use genmill_core::state::State;
use genmill_queue::{Enqueued, Head, NewJob, Redrive, Redriven, Which};
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::v1::redrive_request::Which as Asked;
use genmill_wire::{from_pb, v1};
use std::collections::BTreeMap;
use tonic::Status;

/// How many of the new jobs an answer names.
const NAMED_MAX: usize = 1_000;

pub(super) async fn serve(mill: &Mill, asked: v1::RedriveRequest) -> Result<v1::RedriveResponse, Status> {
    match asked.which {
        Some(Asked::JobId(id)) => Ok(one(mill, from_pb::job_id(&id)?).await?),
        Some(Asked::Filter(filter)) => Ok(all(mill, from_pb::filter(Some(filter)).map_err(ApiError::from)?).await?),
        None => Err(ApiError::new(Reason::InvalidRequest, "which: either job_id or filter must be set").into()),
    }
}

async fn one(mill: &Mill, id: JobId) -> Result<v1::RedriveResponse, ApiError> {
    let job = mill.queue.get(id).await.map_err(api_error)?;
    if job.state != State::Failed {
        let message = format!("job_id: job {id} is {}; only failed jobs can be redriven", job.state);
        return Err(ApiError::new(Reason::JobNotFailed, message));
    }
    mill.registrations.about(&job.spec.model).await?.check(&job.spec.model)?;
    let mut response = v1::RedriveResponse::default();
    redrive(mill, vec![job], &mut response).await?;
    Ok(response)
}

async fn all(mill: &Mill, filter: from_pb::Filter) -> Result<v1::RedriveResponse, ApiError> {
    if filter.state.is_some_and(|state| state != State::Failed) {
        return Err(ApiError::new(Reason::InvalidRequest, "filter.state: only failed jobs can be redriven"));
    }
    let lanes = lanes(mill, &filter).await?;
    let mut response = v1::RedriveResponse::default();
    let mut before = None;
    loop {
        let listed = candidates(mill, Which::Failed, &lanes, before, STEP).await?;
        let ids: Vec<JobId> = listed.iter().map(|job| job.id).collect();
        let heads = matching(mill, &filter, &ids).await?;
        let ids = served(mill, heads, &mut response).await?;
        for ids in mill.queue.steps(&ids).await.map_err(api_error)? {
            let jobs = mill.queue.get_many(ids).await.map_err(api_error)?;
            redrive(mill, jobs, &mut response).await?;
        }
        match listed.last() {
            Some(last) if listed.len() == STEP => before = Some(last.place),
            _ => return Ok(response),
        }
    }
}

/// Those of `jobs` whose models can be run now; the others are told as skipped, with the reason of the first.
async fn served(mill: &Mill, jobs: Vec<Head>, response: &mut v1::RedriveResponse) -> Result<Vec<JobId>, ApiError> {
    let mut refusals: BTreeMap<ModelName, Option<Refusal>> = BTreeMap::new();
    let mut served = Vec::new();
    for Head { id, model, .. } in jobs {
        if !refusals.contains_key(&model) {
            let facts = mill.registrations.about(&model).await?;
            refusals.insert(model.clone(), facts.check(&model).err());
        }
        let Some(refusal) = refusals.get(&model).and_then(Option::as_ref) else {
            served.push(id);
            continue;
        };
        if response.skipped == 0 {
            response.skipped_because = refusal.to_string();
        }
        response.skipped += 1;
    }
    Ok(served)
}

/// Redrives failed jobs. A crash half way is healed by asking again: what a job is redriven as is decided once, and
/// enqueueing twice does nothing.
async fn redrive(mill: &Mill, jobs: Vec<Job>, response: &mut v1::RedriveResponse) -> Result<(), ApiError> {
    let mut by_lane: BTreeMap<LaneNumber, Vec<Job>> = BTreeMap::new();
    let order: Vec<JobId> = jobs.iter().map(|job| job.id).collect();
    let mut redriven: BTreeMap<JobId, JobId> = BTreeMap::new();
    for job in jobs {
        by_lane.entry(job.id.lane()).or_default().push(job);
    }
    for (lane, jobs) in by_lane {
        let proposed =
            jobs.iter().map(|job| Ok(Redrive { from: job.id, to: JobId::new(mill.now(), lane, mill.random()?) }));
        let proposed: Vec<Redrive> = proposed.collect::<Result<_, ApiError>>()?;
        let decided = mill.queue.redrive(lane, &proposed).await.map_err(api_error)?;
        let mut new = Vec::new();
        for (job, decided) in jobs.into_iter().zip(decided) {
            match decided {
                Some(Redriven::As(id)) => {
                    redriven.insert(job.id, id);
                    new.push(NewJob { id, spec: again(job) });
                }
                Some(Redriven::Purged(id)) => {
                    redriven.insert(job.id, id);
                    response.redriven_before += 1;
                }
                None => {}
            }
        }
        let Some(first) = new.first() else { continue };
        for stored in mill.queue.enqueue(&first.spec.lane(), &new).await.map_err(api_error)? {
            match stored {
                Enqueued::New => response.redriven += 1,
                Enqueued::Existed => response.redriven_before += 1,
            }
        }
    }
    let names = order.iter().filter_map(|from| redriven.get(from)).map(ToString::to_string);
    response.job_ids.extend(names.take(NAMED_MAX - response.job_ids.len()));
    Ok(())
}

/// The same work once more. Its times belong to the first job, and so does its request id.
fn again(job: Job) -> JobSpec {
    JobSpec { redriven_from: Some(job.id), request_id: None, deadline: None, not_before: None, ..job.spec }
}
