//! `ListLanes`: every lane, with what waits and runs there.

use crate::mill::{Mill, api_error};
use futures_util::future::try_join_all;
use genmill_core::ids::LaneNumber;
use genmill_core::model::Lane;
use genmill_queue::{LaneState, Setting, Settings};
use genmill_wire::v1;
use tonic::Status;

pub(super) async fn serve(mill: &Mill) -> Result<v1::ListLanesResponse, Status> {
    let settings = mill.queue.settings().await.map_err(api_error)?;
    let lanes = mill.queue.all_lanes().await.map_err(api_error)?;
    let states = try_join_all(lanes.iter().map(|(number, _)| mill.queue.lane_state(*number))).await;
    let mut lanes: Vec<v1::Lane> = lanes
        .iter()
        .zip(states.map_err(api_error)?)
        .map(|((number, lane), state)| shown(*number, lane, state, &settings))
        .collect();
    lanes.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(v1::ListLanesResponse { lanes })
}

fn shown(number: LaneNumber, lane: &Lane, state: LaneState, settings: &Settings) -> v1::Lane {
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
    }
}
