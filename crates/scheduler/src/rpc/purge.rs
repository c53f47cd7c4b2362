//! `Purge`: finished jobs, removed for good.

use super::matching::{STEP, candidates, lanes, matching};
use crate::mill::{Mill, api_error};
use genmill_core::ids::JobId;
use genmill_queue::{Head, Place, Purge, Which};
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::from_pb::Filter;
use genmill_wire::{from_pb, v1};
use std::collections::BTreeMap;
use tonic::Status;

pub(super) async fn serve(mill: &Mill, asked: v1::PurgeRequest) -> Result<v1::PurgeResponse, Status> {
    let filter = from_pb::filter(asked.filter).map_err(ApiError::from)?;
    let before = asked.finished_before.map(|at| from_pb::unix_ms("finished_before", &at));
    let finished_before = before.transpose().map_err(ApiError::from)?;
    if filter == Filter::default() && finished_before.is_none() {
        let message = "filter: at least one field must be set, or finished_before; all jobs are not purged by accident";
        return Err(ApiError::new(Reason::InvalidRequest, message).into());
    }
    if let Some(state) = filter.state.filter(|state| !state.is_final()) {
        let message = format!("filter.state: {state} jobs are not finished; cancel them first");
        return Err(ApiError::new(Reason::InvalidRequest, message).into());
    }
    let wanted = |job: &Head| {
        job.state.is_final() && finished_before.is_none_or(|before| job.finished_at.is_some_and(|at| at < before))
    };
    // Jobs are removed from the lists of all and of their experiment at the place where they stand in both.
    let which = filter.experiment.as_ref().map_or(Which::All, Which::Of);
    let lanes = lanes(mill, &filter).await?;
    let mut response = v1::PurgeResponse::default();
    let mut before = None;
    loop {
        let listed = candidates(mill, which, &lanes, before, STEP).await?;
        let ids: Vec<JobId> = listed.iter().map(|job| job.id).collect();
        let heads = matching(mill, &filter, &ids).await?;
        let places: BTreeMap<JobId, Place> = listed.iter().map(|job| (job.id, job.place)).collect();
        let chosen = heads.iter().filter(|job| wanted(job));
        let chosen: Vec<Purge<'_>> =
            chosen.filter_map(|head| Some(Purge { place: *places.get(&head.id)?, head })).collect();
        response.purged += mill.queue.purge(&chosen).await.map_err(api_error)?;
        match listed.last() {
            Some(last) if listed.len() == STEP => before = Some(last.place),
            _ => return Ok(response),
        }
    }
}
