//! `ListJobs`: pages of jobs, newest first. A page token is the last id that was looked at.

use super::matching::{candidates, lanes, matches};
use crate::mill::{Mill, api_error};
use genmill_core::ids::JobId;
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::{from_pb, to_pb, v1};
use tonic::Status;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1_000;

/// How many ids are looked at together at least: a small page may have to skip many that do not match.
const STEP_MIN: usize = 200;

/// How large a page may get, in bytes: far below what clients take by default (4 MiB).
const PAGE_BYTES_MAX: usize = 2 * 1024 * 1024;

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
            JobId::parse(token)
                .map_err(|_| ApiError::new(Reason::InvalidRequest, "page_token: is not one that a page gave"))?,
        ),
    };
    let lanes = lanes(mill, &filter).await?;
    let mut page = Page::new(size);
    let step = size.max(STEP_MIN);
    let mut looked_at = 0;
    loop {
        let ids = candidates(mill, &filter, &lanes, before, step).await?;
        for job in mill.queue.get_many(&ids).await.map_err(api_error)? {
            let (id, wanted) = (job.id, matches(&filter, &job));
            // A full page ends right behind its last job, so that the next page begins there.
            if wanted && !page.add(to_pb::job_in_list(job)) {
                return Ok(page.end(before));
            }
            before = Some(id);
        }
        before = ids.last().copied().or(before);
        looked_at += ids.len();
        if ids.len() < step {
            return Ok(page.end(None));
        }
        if looked_at >= LOOKED_AT_MAX {
            return Ok(page.end(before));
        }
    }
}

/// A page that fills up.
struct Page {
    size: usize,
    bytes: usize,
    jobs: Vec<v1::Job>,
}

impl Page {
    const fn new(size: usize) -> Self {
        Self { size, bytes: 0, jobs: Vec::new() }
    }

    /// Adds a job; false when there is no room for it.
    fn add(&mut self, job: v1::Job) -> bool {
        let bytes = prost::Message::encoded_len(&job);
        if self.jobs.len() == self.size || (!self.jobs.is_empty() && self.bytes + bytes > PAGE_BYTES_MAX) {
            return false;
        }
        self.bytes += bytes;
        self.jobs.push(job);
        true
    }

    /// The page; the next one begins behind `last`, if there may be one.
    fn end(self, last: Option<JobId>) -> v1::ListJobsResponse {
        let next_page_token = last.map(|id| id.to_string()).unwrap_or_default();
        v1::ListJobsResponse { jobs: self.jobs, next_page_token }
    }
}
