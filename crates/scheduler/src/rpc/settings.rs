//! Pauses and limits: `PauseLane` to `ListSettings`. What a setting does is the queue's; here its names are read.

use crate::mill::{Mill, api_error};
use genmill_core::ids::LaneNumber;
use genmill_core::names::{Experiment, Tenant};
use genmill_queue::Setting;
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::{from_pb, v1};
use std::collections::BTreeMap;
use tonic::Status;

/// The largest weight of a tenant, in percent of the usual one.
const WEIGHT_PERCENT_MAX: u32 = 10_000;

/// What a pause is set to, and what ends it.
const PAUSED: Option<u64> = Some(1);
const RESUMED: Option<u64> = None;

pub(super) async fn pause_lane(mill: &Mill, name: &str) -> Result<(), Status> {
    set(mill, Setting::PauseLane(lane(mill, name).await?), PAUSED).await
}

pub(super) async fn resume_lane(mill: &Mill, name: &str) -> Result<(), Status> {
    set(mill, Setting::PauseLane(lane(mill, name).await?), RESUMED).await
}

pub(super) async fn pause_experiment(mill: &Mill, name: &str) -> Result<(), Status> {
    set(mill, Setting::PauseExperiment(experiment(name)?), PAUSED).await
}

pub(super) async fn resume_experiment(mill: &Mill, name: &str) -> Result<(), Status> {
    set(mill, Setting::PauseExperiment(experiment(name)?), RESUMED).await
}

pub(super) async fn pause_tenant(mill: &Mill, name: &str) -> Result<(), Status> {
    set(mill, Setting::PauseTenant(tenant(name)?), PAUSED).await
}

pub(super) async fn resume_tenant(mill: &Mill, name: &str) -> Result<(), Status> {
    set(mill, Setting::PauseTenant(tenant(name)?), RESUMED).await
}

pub(super) async fn set_lane_limits(mill: &Mill, asked: v1::SetLaneLimitsRequest) -> Result<(), Status> {
    let number = lane(mill, &asked.lane).await?;
    check("max_running", asked.max_running, u32::MAX)?;
    set(mill, Setting::LaneCap(number), asked.max_running.map(u64::from)).await
}

pub(super) async fn set_tenant_limits(mill: &Mill, asked: v1::SetTenantLimitsRequest) -> Result<(), Status> {
    let name = tenant(&asked.tenant)?;
    check("max_running", asked.max_running, u32::MAX)?;
    check("weight_percent", asked.weight_percent, WEIGHT_PERCENT_MAX)?;
    set(mill, Setting::TenantCap(name.clone()), asked.max_running.map(u64::from)).await?;
    set(mill, Setting::TenantWeight(name), asked.weight_percent.map(u64::from)).await
}

pub(super) async fn list(mill: &Mill) -> Result<v1::ListSettingsResponse, Status> {
    let settings = mill.queue.settings().await.map_err(api_error)?;
    let mut tenants: BTreeMap<Tenant, v1::TenantSettings> = BTreeMap::new();
    let mut response = v1::ListSettingsResponse::default();
    for (setting, value) in settings.in_effect() {
        let mut of = |name: &Tenant, change: fn(&mut v1::TenantSettings, Option<u32>)| {
            let blank = || v1::TenantSettings { tenant: name.to_string(), ..v1::TenantSettings::default() };
            change(tenants.entry(name.clone()).or_insert_with(blank), u32::try_from(value).ok());
        };
        match setting {
            Setting::PauseExperiment(name) => response.paused_experiments.push(name.to_string()),
            Setting::PauseTenant(name) => of(name, |tenant, _| tenant.paused = true),
            Setting::TenantCap(name) => of(name, |tenant, cap| tenant.max_running = cap),
            Setting::TenantWeight(name) => of(name, |tenant, weight| tenant.weight_percent = weight),
            // These stand with their lanes.
            Setting::PauseLane(_) | Setting::LaneCap(_) => {}
        }
    }
    response.tenants = tenants.into_values().collect();
    Ok(response)
}

async fn set(mill: &Mill, setting: Setting, value: Option<u64>) -> Result<(), Status> {
    tracing::info!(?setting, ?value, "set");
    Ok(mill.queue.set(&setting, value).await.map_err(api_error)?)
}

/// The lane of that name, which must have been opened by a worker or a job.
async fn lane(mill: &Mill, name: &str) -> Result<LaneNumber, ApiError> {
    let lanes = mill.queue.all_lanes().await.map_err(api_error)?;
    let found = lanes.iter().find(|(_, lane)| lane.to_string() == name);
    found.map(|(number, _)| *number).ok_or_else(|| {
        let names: Vec<String> = lanes.iter().map(|(_, lane)| lane.to_string()).collect();
        let known = if names.is_empty() { "there are none yet".to_owned() } else { names.join(", ") };
        ApiError::new(Reason::LaneNotFound, format!("lane: no lane is called `{name}`; lanes: {known}"))
    })
}

fn experiment(name: &str) -> Result<Experiment, ApiError> {
    from_pb::experiment(name)?.ok_or_else(|| missing("experiment"))
}

fn tenant(name: &str) -> Result<Tenant, ApiError> {
    from_pb::tenant(name)?.ok_or_else(|| missing("tenant"))
}

fn missing(field: &str) -> ApiError {
    ApiError::new(Reason::InvalidRequest, format!("{field}: must be set"))
}

fn check(field: &str, value: Option<u32>, max: u32) -> Result<(), ApiError> {
    match value {
        Some(value) if value == 0 || value > max => {
            let message = format!("{field}: must be 1 to {max}; leave it out to lift the limit");
            Err(ApiError::new(Reason::InvalidRequest, message))
        }
        _ => Ok(()),
    }
}
