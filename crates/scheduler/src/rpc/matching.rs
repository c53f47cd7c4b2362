//! Which jobs a filter means.

use super::list_lanes::states;
use crate::mill::{Mill, api_error};
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::state::State;
use genmill_queue::{Head, ListQuery, Listed, Place, Which};
use genmill_wire::error::ApiError;
use genmill_wire::from_pb::Filter;

/// How many jobs are looked at in one step.
pub(super) const STEP: usize = 1_000;

fn matches(filter: &Filter, job: &Head) -> bool {
    filter.state.is_none_or(|state| job.state == state)
        && filter.model.as_ref().is_none_or(|model| job.model == *model)
        && filter.experiment.as_ref().is_none_or(|name| job.experiment.as_ref() == Some(name))
        && filter.tenant.as_ref().is_none_or(|tenant| job.tenant == *tenant)
}

/// Those of `ids` that match the filter, in their order.
pub(super) async fn matching(mill: &Mill, filter: &Filter, ids: &[JobId]) -> Result<Vec<Head>, ApiError> {
    let heads = mill.queue.heads(ids).await.map_err(api_error)?;
    Ok(heads.into_iter().filter(|job| matches(filter, job)).collect())
}

/// The same, where nothing but their ids is needed.
pub(super) async fn matching_ids(mill: &Mill, filter: &Filter, ids: Vec<JobId>) -> Result<Vec<JobId>, ApiError> {
    if *filter == Filter::default() {
        return Ok(ids);
    }
    Ok(matching(mill, filter, &ids).await?.into_iter().map(|job| job.id).collect())
}

/// The lanes in which jobs of the filter can be.
pub(super) async fn lanes(mill: &Mill, filter: &Filter) -> Result<Vec<LaneNumber>, ApiError> {
    let wanted = filter.model.as_ref().map(genmill_core::model::ModelName::lane);
    let all = mill.queue.all_lanes().await.map_err(api_error)?;
    let wanted = all.into_iter().filter(|(_, lane)| wanted.as_ref().is_none_or(|wanted| lane == wanted));
    Ok(wanted.map(|(number, _)| number).collect())
}

/// The shortest list that has all jobs of the filter.
pub(super) fn list_of(filter: &Filter) -> Which<'_> {
    match (filter.state, &filter.experiment) {
        (Some(State::Failed), _) => Which::Failed,
        (_, Some(experiment)) => Which::Of(experiment),
        (_, None) => Which::All,
    }
}

/// The next jobs of a list, newest first.
pub(super) async fn candidates(
    mill: &Mill,
    which: Which<'_>,
    lanes: &[LaneNumber],
    before: Option<Place>,
    limit: usize,
) -> Result<Vec<Listed>, ApiError> {
    match mill.queue.list(ListQuery { lanes, which, before, limit }).await {
        Err(error) if error.is_passing() => Err(naming_lanes(mill, lanes, api_error(error)).await),
        listed => listed.map_err(api_error),
    }
}

/// An error of asking `lanes`, with the names of those that are away while others answer.
async fn naming_lanes(mill: &Mill, lanes: &[LaneNumber], error: ApiError) -> ApiError {
    let Ok(states) = states(mill).await else { return error };
    let away = states.into_iter().filter(|(number, _, state)| state.is_none() && lanes.contains(number));
    let away: Vec<String> = away.map(|(_, lane, _)| lane.to_string()).collect();
    match away.join(", ") {
        away if away.is_empty() => error,
        away => ApiError { message: format!("{}; lanes that are away for now: {away}", error.message), ..error },
    }
}

/// Those of `listed` that are unfinished and match the filter.
pub(super) async fn unfinished(mill: &Mill, filter: &Filter, listed: &[Listed]) -> Result<Vec<JobId>, ApiError> {
    let ids: Vec<JobId> = listed.iter().map(|job| job.id).collect();
    let states = mill.queue.states(&ids).await.map_err(api_error)?;
    let wanted = |state: State| !state.is_final() && filter.state.is_none_or(|wanted| state == wanted);
    let open = ids.iter().zip(states).filter(|(_, state)| state.is_some_and(wanted));
    let open: Vec<JobId> = open.map(|(id, _)| *id).collect();
    matching_ids(mill, &Filter { state: None, ..filter.clone() }, open).await
}
