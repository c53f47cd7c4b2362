//! `ListLanes`: every lane, with what waits and runs there.

use crate::mill::{Mill, api_error};
use futures_util::future::join_all;
use genmill_core::ids::LaneNumber;
use genmill_core::model::{Lane, Prefix};
use genmill_queue::{
    BatchRecord, BatchState, Gates, HeldBack, HeldBy, LaneState, Opens, QueueError, Setting, Settings,
};
use genmill_wire::error::ApiError;
use genmill_wire::to_pb::timestamp;
use genmill_wire::v1;
use tonic::Status;

pub(super) async fn serve(mill: &Mill) -> Result<v1::ListLanesResponse, Status> {
    let settings = mill.queue.settings().await.map_err(api_error)?;
    let states = states(mill).await?;
    let held = join_all(states.iter().map(|(number, lane, state)| held_back(mill, *number, lane, *state))).await;
    let batches = join_all(states.iter().map(|(number, lane, state)| batches(mill, *number, lane, *state))).await;
    let shown = |(((number, lane, state), held), batches): ((_, Vec<HeldBack>), Vec<BatchRecord>)| v1::Lane {
        held_back: held.into_iter().map(told).collect(),
        batches: batches.into_iter().map(batch).collect(),
        ..shown(number, &lane, state, &settings)
    };
    let mut lanes: Vec<v1::Lane> = states.into_iter().zip(held).zip(batches).map(shown).collect();
    lanes.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(v1::ListLanesResponse { lanes })
}

/// What is held back in a lane, where anything can be.
async fn held_back(mill: &Mill, number: LaneNumber, lane: &Lane, state: Option<LaneState>) -> Vec<HeldBack> {
    let is_remote = Prefix::find(&lane.prefix).is_some_and(Prefix::is_remote);
    if !is_remote || state.is_none() {
        return Vec::new();
    }
    let gates = mill.queue.gates(number).await.unwrap_or_else(|error| {
        tracing::warn!(error = error.in_full(), lane = number.0, "cannot look at what is held back");
        Gates::default()
    });
    let mut held = gates.held_back;
    held.sort_unstable_by(|a, b| a.model.cmp(&b.model));
    held
}

/// The batches of a lane, where it can have any.
async fn batches(mill: &Mill, number: LaneNumber, lane: &Lane, state: Option<LaneState>) -> Vec<BatchRecord> {
    if !lane.is_batch() || state.is_none() {
        return Vec::new();
    }
    mill.queue.batches(number).await.unwrap_or_else(|error| {
        tracing::warn!(error = error.in_full(), lane = number.0, "cannot look at its batches");
        Vec::new()
    })
}

fn batch(batch: BatchRecord) -> v1::Batch {
    let state = match batch.state {
        BatchState::Intent => v1::BatchState::Intent,
        BatchState::Submitted => v1::BatchState::Submitted,
        BatchState::Collecting => v1::BatchState::Collecting,
        BatchState::Clearing => v1::BatchState::Clearing,
    };
    v1::Batch {
        tag: batch.tag,
        model: batch.model.into(),
        state: state.into(),
        jobs: batch.jobs,
        provider_batch: batch.remote.unwrap_or_default(),
        created_at: Some(timestamp(batch.made_at)),
    }
}

fn told(held: HeldBack) -> v1::HeldBack {
    let reason = match held.held_by {
        HeldBy::Throttled => v1::HeldBackReason::Throttled,
        HeldBy::Failing => v1::HeldBackReason::Failing,
        HeldBy::Requests => v1::HeldBackReason::Requests,
        HeldBy::Tokens => v1::HeldBackReason::Tokens,
        HeldBy::Calls => v1::HeldBackReason::Calls,
    };
    let until = if let Opens::At(at) = held.until { Some(timestamp(at)) } else { None };
    v1::HeldBack { model: held.model, reason: reason.into(), until }
}

/// How each lane stands; `None` while the node of Redis that has it is away.
pub(super) async fn states(mill: &Mill) -> Result<Vec<(LaneNumber, Lane, Option<LaneState>)>, ApiError> {
    let lanes = mill.queue.all_lanes().await.map_err(api_error)?;
    let states = join_all(lanes.iter().map(|(number, _)| mill.queue.lane_state(*number))).await;
    let known = |((number, lane), state): ((LaneNumber, Lane), Result<LaneState, QueueError>)| match state {
        Ok(state) => Ok((number, lane, Some(state))),
        Err(error) if error.is_passing() => Ok((number, lane, None)),
        Err(error) => Err(api_error(error)),
    };
    lanes.into_iter().zip(states).map(known).collect()
}

fn shown(number: LaneNumber, lane: &Lane, state: Option<LaneState>, settings: &Settings) -> v1::Lane {
    let away = state.is_none();
    let state = state.unwrap_or_default();
    v1::Lane {
        name: lane.to_string(),
        queued: state.queued,
        delayed: state.delayed,
        running: state.running,
        failed: state.failed,
        capacity: state.capacity,
        look_ahead: state.look_ahead,
        paused: settings.get(&Setting::PauseLane(number)).is_some(),
        max_running: settings.get(&Setting::LaneCap(number)).and_then(|cap| u32::try_from(cap).ok()),
        away,
        held_back: Vec::new(),
        batches: Vec::new(),
    }
}
