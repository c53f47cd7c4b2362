//! What operators set while the queue runs: pauses, caps, weights. The registry knows the newest value of each; lanes get
//! copies, with the version of the change, so that scripts find them in their own slot. A copy may be applied twice and
//! in any order, by whoever opens a lane, changes a setting, or does upkeep.

use crate::error::QueueError;
use crate::payload::corrupt;
use crate::queue::Queue;
use genmill_core::ids::LaneNumber;
use genmill_core::names::{Experiment, Tenant};
use std::collections::{BTreeMap, HashMap};

/// Something that can be set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// No job of the lane starts.
    PauseLane(LaneNumber),
    /// No job of the experiment starts, in any lane.
    PauseExperiment(Experiment),
    /// No job of the tenant starts, in any lane.
    PauseTenant(Tenant),
    /// So many jobs of the lane run at once, at most.
    LaneCap(LaneNumber),
    /// So many jobs of the tenant run at once in each lane, at most.
    TenantCap(Tenant),
    /// The tenant's share where tenants compete, in percent of the usual one.
    TenantWeight(Tenant),
}

impl Setting {
    /// The name in the registry.
    fn name(&self) -> String {
        match self {
            Self::PauseLane(lane) => format!("pause/lane/{}", lane.0),
            Self::PauseExperiment(name) => format!("pause/experiment/{name}"),
            Self::PauseTenant(name) => format!("pause/tenant/{name}"),
            Self::LaneCap(lane) => format!("cap/lane/{}", lane.0),
            Self::TenantCap(name) => format!("cap/tenant/{name}"),
            Self::TenantWeight(name) => format!("weight/tenant/{name}"),
        }
    }

    fn parse(name: &str) -> Option<Self> {
        let (what, of) = name.rsplit_once('/')?;
        let lane = || of.parse().ok().map(LaneNumber);
        match what {
            "pause/lane" => lane().map(Self::PauseLane),
            "pause/experiment" => Experiment::parse(of).ok().map(Self::PauseExperiment),
            "pause/tenant" => Tenant::parse(of).ok().map(Self::PauseTenant),
            "cap/lane" => lane().map(Self::LaneCap),
            "cap/tenant" => Tenant::parse(of).ok().map(Self::TenantCap),
            "weight/tenant" => Tenant::parse(of).ok().map(Self::TenantWeight),
            _ => None,
        }
    }

    /// The name in `lane`; `None` where it means nothing there.
    fn name_in(&self, lane: LaneNumber) -> Option<String> {
        match self {
            Self::PauseLane(of) => (*of == lane).then(|| "pause/lane".to_owned()),
            Self::LaneCap(of) => (*of == lane).then(|| "cap/lane".to_owned()),
            Self::PauseExperiment(_) | Self::PauseTenant(_) | Self::TenantCap(_) | Self::TenantWeight(_) => {
                Some(self.name())
            }
        }
    }
}

/// The newest value of every setting that was ever made, with the version of its change; `None` when it was taken back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<Setting, (u64, Option<u64>)>);

impl Settings {
    /// What is in effect.
    pub fn in_effect(&self) -> impl Iterator<Item = (&Setting, u64)> {
        self.0.iter().filter_map(|(setting, (_, value))| Some((setting, (*value)?)))
    }

    /// The value of `setting`, when it is in effect.
    #[must_use]
    pub fn get(&self, setting: &Setting) -> Option<u64> {
        self.0.get(setting).and_then(|(_, value)| *value)
    }
}

impl Queue {
    /// Sets `setting` to `value`, or takes it back with `None`, in the registry and in every lane. A pause has the
    /// value 1.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer; upkeep then applies what was set. May be repeated.
    pub async fn set(&self, setting: &Setting, value: Option<u64>) -> Result<(), QueueError> {
        let mut connection = self.connection.clone();
        let mut call = self.scripts.set.key(self.keys.settings());
        let version: u64 = call
            .arg(setting.name())
            .arg(crate::work::or_empty(value))
            .invoke_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("changing a setting", source))?;
        let changed = Settings(BTreeMap::from([(setting.clone(), (version, value))]));
        for (lane, _) in self.all_lanes().await? {
            self.apply(lane, &changed).await?;
        }
        Ok(())
    }

    /// Every setting.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer or a setting cannot be read.
    pub async fn settings(&self) -> Result<Settings, QueueError> {
        let mut connection = self.connection.clone();
        let stored: HashMap<String, String> = redis::cmd("HGETALL")
            .arg(self.keys.settings())
            .query_async(&mut connection)
            .await
            .map_err(|source| QueueError::from_redis("reading settings", source))?;
        let mut settings = BTreeMap::new();
        for (name, stored) in stored.iter().filter(|(name, _)| *name != "#") {
            let bad = || corrupt("setting", format!("`{name}` is `{stored}`"));
            let (version, value) = stored.split_once(':').ok_or_else(bad)?;
            let value = if value.is_empty() { None } else { Some(value.parse().map_err(|_| bad())?) };
            let setting = Setting::parse(name).ok_or_else(bad)?;
            settings.insert(setting, (version.parse().map_err(|_| bad())?, value));
        }
        Ok(Settings(settings))
    }

    /// Applies settings to `lane`, where they are newer than what it has. Returns how many were.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn apply(&self, lane: LaneNumber, settings: &Settings) -> Result<u32, QueueError> {
        let mut call = self.scripts.apply.key(self.keys.lane(lane));
        let mut any = false;
        for (setting, (version, value)) in &settings.0 {
            let Some(name) = setting.name_in(lane) else { continue };
            any = true;
            call.arg(name).arg(version).arg(crate::work::or_empty(*value));
        }
        if !any {
            return Ok(0);
        }
        let mut connection = self.connection.clone();
        call.invoke_async(&mut connection).await.map_err(|source| QueueError::from_redis("applying settings", source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_found_by_its_name() {
        let (experiment, tenant) = (Experiment::parse("e").unwrap(), Tenant::parse("t").unwrap());
        for setting in [
            Setting::PauseLane(LaneNumber(7)),
            Setting::PauseExperiment(experiment),
            Setting::PauseTenant(tenant.clone()),
            Setting::LaneCap(LaneNumber(7)),
            Setting::TenantCap(tenant.clone()),
            Setting::TenantWeight(tenant),
        ] {
            assert_eq!(Setting::parse(&setting.name()), Some(setting));
        }
        assert_eq!(Setting::parse("pause/other/x"), None);
    }
}
