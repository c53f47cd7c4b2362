//! `ListJobs`: pages of jobs, newest first. A page token is the last place that was looked at.

use super::matching::{candidates, lanes, list_of, matching_ids};
use crate::mill::{Mill, api_error};
use genmill_core::ids::JobId;
use genmill_queue::Place;
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::{from_pb, to_pb, v1};
use std::collections::BTreeMap;
use tonic::Status;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1_000;

/// How many jobs are looked at together at least: a small page may have to skip many that do not match.
const STEP_MIN: usize = 200;

/// How large a page may get, in bytes: far below what clients take by default (4 MiB).
const PAGE_BYTES_MAX: usize = 2 * 1024 * 1024;

/// How many jobs one call looks at: a filter that matches little gives short pages, not long calls.
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
            Place::parse(token)
                .ok_or_else(|| ApiError::new(Reason::InvalidRequest, "page_token: is not one that a page gave"))?,
        ),
    };
    let lanes = lanes(mill, &filter).await?;
    let mut page = Page::new(size);
    let step = size.max(STEP_MIN);
    let mut looked_at = 0;
    let shown = if asked.whole { to_pb::job } else { to_pb::job_in_list };
    loop {
        let listed = candidates(mill, list_of(&filter), &lanes, before, step).await?;
        let places: BTreeMap<JobId, Place> = listed.iter().map(|job| (job.id, job.place)).collect();
        let ids: Vec<JobId> = listed.iter().map(|job| job.id).collect();
        let ids = matching_ids(mill, &filter, ids).await?;
        for ids in mill.queue.steps(&ids).await.map_err(api_error)? {
            // A job may have been purged meanwhile, or have moved on.
            let jobs = mill.queue.get_many(ids).await.map_err(api_error)?;
            for job in jobs.into_iter().filter(|job| filter.state.is_none_or(|state| job.state == state)) {
                let place = places.get(&job.id).copied();
                // A full page ends right behind its last job, so that the next page begins there.
                if !page.add(shown(job)) {
                    return Ok(page.end(before));
                }
                before = place;
            }
        }
        before = listed.last().map_or(before, |job| Some(job.place));
        looked_at += listed.len();
        if listed.len() < step {
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
    fn end(self, last: Option<Place>) -> v1::ListJobsResponse {
        let next_page_token = last.map(|place| place.to_string()).unwrap_or_default();
        v1::ListJobsResponse { jobs: self.jobs, next_page_token }
    }
}
