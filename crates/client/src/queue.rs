//! What operators do with the queue: lanes, pauses, limits, failed jobs.

use crate::{Client, Error, v1};

/// What can be paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pausable {
    /// A lane, by its name, such as `vllm:qwen2.5-0.5b` or `litellm:openai`.
    Lane(String),
    /// An experiment, in all lanes.
    Experiment(String),
    /// A tenant, in all lanes.
    Tenant(String),
}

/// Limits of a tenant; what is `None` is lifted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TenantLimits {
    /// At most so many of its jobs run at once in each lane.
    pub max_running: Option<u32>,
    /// Its share where tenants compete, in percent of the usual one.
    pub weight_percent: Option<u32>,
}

impl Client {
    /// Every lane, with what waits and runs there, sorted by name.
    ///
    /// # Errors
    /// Only when the server cannot be asked.
    pub async fn list_lanes(&self) -> Result<Vec<v1::Lane>, Error> {
        Ok(self.answer(self.queue().list_lanes(v1::ListLanesRequest {}).await)?.lanes)
    }

    /// Lets no job of it start until it is resumed. What runs goes on.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such lane, [`Error::Refused`] for what is no name.
    pub async fn pause(&self, what: Pausable) -> Result<(), Error> {
        let mut queue = self.queue();
        match what {
            Pausable::Lane(lane) => {
                self.answer(queue.pause_lane(v1::PauseLaneRequest { lane }).await)?;
            }
            Pausable::Experiment(experiment) => {
                self.answer(queue.pause_experiment(v1::PauseExperimentRequest { experiment }).await)?;
            }
            Pausable::Tenant(tenant) => {
                self.answer(queue.pause_tenant(v1::PauseTenantRequest { tenant }).await)?;
            }
        }
        Ok(())
    }

    /// Ends a pause.
    ///
    /// # Errors
    /// Those of [`Self::pause`].
    pub async fn resume(&self, what: Pausable) -> Result<(), Error> {
        let mut queue = self.queue();
        match what {
            Pausable::Lane(lane) => {
                self.answer(queue.resume_lane(v1::ResumeLaneRequest { lane }).await)?;
            }
            Pausable::Experiment(experiment) => {
                self.answer(queue.resume_experiment(v1::ResumeExperimentRequest { experiment }).await)?;
            }
            Pausable::Tenant(tenant) => {
                self.answer(queue.resume_tenant(v1::ResumeTenantRequest { tenant }).await)?;
            }
        }
        Ok(())
    }

    /// Sets how many jobs of a lane run at once, at most; `None` lifts the limit.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such lane, [`Error::Refused`] for a limit of 0.
    pub async fn set_lane_limits(&self, lane: &str, max_running: Option<u32>) -> Result<(), Error> {
        let request = v1::SetLaneLimitsRequest { lane: lane.to_owned(), max_running };
        self.answer(self.queue().set_lane_limits(request).await).map(drop)
    }

    /// Sets the limits of a tenant, all of them.
    ///
    /// # Errors
    /// [`Error::Refused`] when one is out of range.
    pub async fn set_tenant_limits(&self, tenant: &str, limits: TenantLimits) -> Result<(), Error> {
        let TenantLimits { max_running, weight_percent } = limits;
        let request = v1::SetTenantLimitsRequest { tenant: tenant.to_owned(), max_running, weight_percent };
        self.answer(self.queue().set_tenant_limits(request).await).map(drop)
    }

    /// The pauses and limits of experiments and tenants that are in effect.
    ///
    /// # Errors
    /// Only when the server cannot be asked.
    pub async fn list_settings(&self) -> Result<v1::ListSettingsResponse, Error> {
        self.answer(self.queue().list_settings(v1::ListSettingsRequest {}).await)
    }

    /// Submits a failed job again and returns the new job's id; asked again, the same id.
    ///
    /// # Errors
    /// [`Error::NotFound`] when no job has the id, [`Error::Refused`] when it has not failed or nobody serves its model.
    pub async fn redrive(&self, job_id: &str) -> Result<String, Error> {
        let which = v1::redrive_request::Which::JobId(job_id.to_owned());
        let answer = self.answer(self.queue().redrive(v1::RedriveRequest { which: Some(which) }).await)?;
        let id = answer.job_ids.into_iter().next();
        id.ok_or(Error::Protocol { problem: "an answer that must name a job names none" })
    }

    /// Submits every failed job that matches `filter` again, each once; those whose model nobody serves are skipped.
    ///
    /// # Errors
    /// [`Error::Refused`] when the filter is wrong.
    pub async fn redrive_all(&self, filter: v1::JobFilter) -> Result<v1::RedriveResponse, Error> {
        let which = v1::redrive_request::Which::Filter(filter);
        self.answer(self.queue().redrive(v1::RedriveRequest { which: Some(which) }).await)
    }

    /// Removes finished jobs for good and returns how many.
    ///
    /// # Errors
    /// [`Error::Refused`] when neither a field of the filter nor a time is set.
    pub async fn purge(
        &self,
        filter: v1::JobFilter,
        finished_before: Option<prost_types::Timestamp>,
    ) -> Result<u64, Error> {
        let request = v1::PurgeRequest { filter: Some(filter), finished_before };
        Ok(self.answer(self.queue().purge(request).await)?.purged)
    }
}
