//! `CancelJobs`: every unfinished job of a filter.

use super::matching::{STEP, candidates, lanes, list_of, unfinished};
use crate::mill::{Mill, api_error};
use genmill_core::ids::JobId;
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::from_pb::Filter;
use genmill_wire::{from_pb, v1};
use std::collections::BTreeMap;
use tonic::Status;

pub(super) async fn serve(mill: &Mill, asked: v1::CancelJobsRequest) -> Result<v1::CancelJobsResponse, Status> {
    let filter = from_pb::filter(asked.filter).map_err(ApiError::from)?;
    if filter == Filter::default() {
        let message = "filter: at least one field must be set; all jobs are not cancelled by accident";
        return Err(ApiError::new(Reason::InvalidRequest, message).into());
    }
    let lanes = lanes(mill, &filter).await?;
    let mut response = v1::CancelJobsResponse::default();
    let mut before = None;
    loop {
        let listed = candidates(mill, list_of(&filter), &lanes, before, STEP).await?;
        let mut by_lane: BTreeMap<_, Vec<JobId>> = BTreeMap::new();
        for id in unfinished(mill, &filter, &listed).await? {
            by_lane.entry(id.lane()).or_default().push(id);
        }
        for (lane, ids) in by_lane {
            let tally = mill.queue.cancel(lane, &ids).await.map_err(api_error)?;
            response.cancelled += tally.cancelled;
            response.cancelling += tally.cancelling;
        }
        match listed.last() {
            Some(last) if listed.len() == STEP => before = Some(last.place),
            _ => return Ok(response),
        }
    }
}
