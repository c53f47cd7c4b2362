//! `ListJobs`: pages of jobs, newest first. A page token is the last id that was looked at.

use super::matching::{candidates, lanes, matches};
use crate::mill::{Mill, api_error};
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::{from_pb, to_pb, v1};
use tonic::Status;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1_000;

/// How many ids one call looks at: a filter that matches little gives short pages, not long calls.
const LOOKED_AT_MAX: usize = 10_000;

pub(super) async fn serve(mill: &Mill, asked: v1::ListJobsRequest) -> Result<v1::ListJobsResponse, Status> {
    let filter = from_pb::filter(asked.filter).map_err(ApiError::from)?;
    let size = match usize::try_from(asked.page_size).unwrap_or(usize::MAX) {
        0 => PAGE_DEFAULT,
        size if size <= PAGE_MAX => size,
        size => {
            let message = format!("page_size: {size} is more than {PAGE_MAX}");
            return Err(ApiError::new(Reason::InvalidRequest, message).into());
        }
    };
    let mut before = match asked.page_token.as_str() {
        "" => None,
        token => Some(
            genmill_core::ids::JobId::parse(token)
                .map_err(|_| ApiError::new(Reason::InvalidRequest, "page_token: is not one that a page gave"))?,
        ),
    };
    let lanes = lanes(mill, &filter).await?;
    let mut jobs = Vec::new();
    let mut looked_at = 0;
    loop {
        let ids = candidates(mill, &filter, &lanes, before, size).await?;
        let more = ids.len() == size;
        looked_at += ids.len();
        for job in mill.queue.get_many(&ids).await.map_err(api_error)? {
            if matches(&filter, &job) {
                jobs.push(job);
            }
            // A full page ends right behind its last job, so that the next page begins there.
            if jobs.len() == size {
                break;
            }
        }
        before = if jobs.len() == size { jobs.last().map(|job| job.id) } else { ids.last().copied().or(before) };
        if jobs.len() == size || !more || looked_at >= LOOKED_AT_MAX {
            let more = more || jobs.len() == size && ids.last().copied() != before;
            let token = before.filter(|_| more).map(|id| id.to_string()).unwrap_or_default();
            let jobs = jobs.into_iter().map(to_pb::job_in_list).collect();
            return Ok(v1::ListJobsResponse { jobs, next_page_token: token });
        }
    }
}
