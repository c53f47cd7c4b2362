//! Which jobs a filter means.

use crate::mill::{Mill, api_error};
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::job::Job;
use genmill_queue::ListQuery;
use genmill_wire::error::ApiError;
use genmill_wire::from_pb::Filter;

/// How many ids are looked at in one step.
pub(super) const STEP: usize = 1_000;

pub(super) fn matches(filter: &Filter, job: &Job) -> bool {
    filter.state.is_none_or(|state| job.state == state) && matches_spec(filter, job)
}

/// All of the filter but the state.
pub(super) fn matches_spec(filter: &Filter, job: &Job) -> bool {
    let spec = &job.spec;
    filter.model.as_ref().is_none_or(|model| spec.model == *model)
        && filter.experiment.as_ref().is_none_or(|name| spec.experiment.as_ref() == Some(name))
        && filter.tenant.as_ref().is_none_or(|tenant| spec.tenant == *tenant)
}

/// The lanes in which jobs of the filter can be.
pub(super) async fn lanes(mill: &Mill, filter: &Filter) -> Result<Vec<LaneNumber>, ApiError> {
    let wanted = filter.model.as_ref().map(genmill_core::model::ModelName::lane);
    let all = mill.queue.all_lanes().await.map_err(api_error)?;
    let wanted = all.into_iter().filter(|(_, lane)| wanted.as_ref().is_none_or(|wanted| lane == wanted));
    Ok(wanted.map(|(number, _)| number).collect())
}

/// The next ids in which jobs of the filter can be, newest first.
pub(super) async fn candidates(
    mill: &Mill,
    filter: &Filter,
    lanes: &[LaneNumber],
    before: Option<JobId>,
    limit: usize,
) -> Result<Vec<JobId>, ApiError> {
    let query = ListQuery { lanes, experiment: filter.experiment.as_ref(), before, limit };
    mill.queue.list(query).await.map_err(api_error)
}

/// Those of `ids` that are unfinished and match the filter.
pub(super) async fn unfinished(mill: &Mill, filter: &Filter, ids: &[JobId]) -> Result<Vec<JobId>, ApiError> {
    let states = mill.queue.states(ids).await.map_err(api_error)?;
    let wanted =
        |state: genmill_core::state::State| !state.is_final() && filter.state.is_none_or(|wanted| state == wanted);
    let open = ids.iter().zip(states).filter(|(_, state)| state.is_some_and(wanted));
    let open: Vec<JobId> = open.map(|(id, _)| *id).collect();
    if filter.tenant.is_none() && filter.model.is_none() {
        return Ok(open);
    }
    let jobs = mill.queue.get_many(&open).await.map_err(api_error)?;
    Ok(jobs.into_iter().filter(|job| matches_spec(filter, job)).map(|job| job.id).collect())
}
