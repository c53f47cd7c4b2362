//! A job as it is read back: what was admitted, where it stands, what came of it.

use crate::attempt::{Attempt, AttemptEnd, Failure, Generation};
use crate::ids::{Epoch, JobId, WorkerId};
use crate::image::Image;
use crate::model::{Lane, ModelName};
use crate::money::Cost;
use crate::names::{Experiment, Tenant};
use crate::prefix::PrefixKey;
use crate::request::{Input, Priority, Sampling};
use crate::state::State;
use crate::time::UnixMs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is to be done, with nothing left open: a retry does exactly the same again. What is usually unset is not stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// The model.
    pub model: ModelName,
    /// What is to be continued or answered.
    pub input: Input,
    /// How tokens are picked.
    pub sampling: Sampling,
    /// Free key-value pairs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Who the job belongs to.
    pub tenant: Tenant,
    /// What it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experiment: Option<Experiment>,
    /// Which jobs go first.
    pub priority: Priority,
    /// Makes submission idempotent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// Bound of one attempt, in milliseconds; `None`: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// When the job expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<UnixMs>,
    /// No attempt starts earlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<UnixMs>,
    /// What the model can hold of prompt and output together, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<u64>,
    /// What its prompt begins with, for a local model and where that is worth sharing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<PrefixKey>,
    /// Its seed is the caller's own; else it was drawn.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub seed_given: bool,
    /// The failed job that it repeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redriven_from: Option<JobId>,
    /// It goes to its provider in a batch.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub batch: bool,
}

impl JobSpec {
    /// Where it waits.
    #[must_use]
    pub fn lane(&self) -> Lane {
        let lane = self.model.lane();
        if self.batch { lane.batch() } else { lane }
    }

    /// The work it asks for in tokens, for fairness: a guess of the input at 4 bytes a token and [`Image::TOKENS`] an image,
    /// plus the bound of output; no more than the model can hold for each sample.
    #[must_use]
    pub fn estimated_tokens(&self) -> u64 {
        let images = u64::try_from(self.input.images().count()).unwrap_or(u64::MAX).saturating_mul(Image::TOKENS);
        let input = (u64::try_from(self.input.text_bytes()).unwrap_or(u64::MAX) / 4).saturating_add(images);
        let asked = input.saturating_add(u64::from(self.sampling.max_tokens)).max(1);
        let sample = self.context_tokens.map_or(asked, |context| asked.min(context.max(1)));
        sample.saturating_mul(u64::from(self.sampling.controls.samples().max(1)))
    }

    /// How many bytes of text and images it carries.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let images: usize = self.input.images().map(Image::bytes).sum();
        self.input.text_bytes() + images + self.sampling.controls.text_bytes()
    }

    /// The fields in which two specs differ, as the API names them. What admission chose for `self` (the seed, when the
    /// caller gave none) is the caller's to compare.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let (a, b) = (&self.sampling, &other.sampling);
        let fields = [
            ("model", self.model == other.model),
            ("input", self.input == other.input),
            ("max_tokens", a.max_tokens == b.max_tokens),
            ("temperature", a.temperature.to_bits() == b.temperature.to_bits()),
            ("top_p", a.top_p == b.top_p),
            ("top_k", a.top_k == b.top_k),
            ("seed", a.seed == b.seed),
            ("stop", a.stop == b.stop),
            ("sampling controls, structured_output or tools", a.controls == b.controls),
            ("labels", self.labels == other.labels),
            ("experiment", self.experiment == other.experiment),
            ("priority", self.priority == other.priority),
            ("timeout_ms", self.timeout_ms == other.timeout_ms),
            ("deadline", self.deadline == other.deadline),
            ("not_before", self.not_before == other.not_before),
            ("mode", self.batch == other.batch),
        ];
        fields.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }
}

/// A job with everything known about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// What is to be done.
    pub spec: JobSpec,
    /// Where it stands.
    pub state: State,
    /// How many leases it has had: attempts started.
    pub epoch: Epoch,
    /// Attempts that ended in an error of the job, its model or its provider.
    pub failures: u32,
    /// Attempts that were lost with their worker.
    pub losses: u32,
    /// When it was accepted.
    pub created_at: UnixMs,
    /// When its newest attempt started.
    pub started_at: Option<UnixMs>,
    /// When it reached a final state.
    pub finished_at: Option<UnixMs>,
    /// When its next attempt may start; set while it is delayed.
    pub not_before: Option<UnixMs>,
    /// The worker of the newest attempt.
    pub worker: Option<WorkerId>,
    /// The job that repeats it, once it was redriven.
    pub redriven_as: Option<JobId>,
    /// What it produced.
    pub generation: Option<Generation>,
    /// Why its newest failed attempt failed; kept in a final state only when that is `Failed`.
    pub failure: Option<Failure>,
    /// Every attempt that has ended, oldest first.
    pub attempts: Vec<Attempt>,
}

impl Job {
    /// What all its attempts together cost; `None` when none has ended or the cost of one is unknown. A lost attempt
    /// whose worker came back later stands in the ledger twice: only the later line knows its cost.
    #[must_use]
    pub fn cost(&self) -> Option<Cost> {
        let reported = |epoch| self.attempts.iter().any(|a| a.epoch == epoch && a.end == AttemptEnd::Fenced);
        let counted = self.attempts.iter().filter(|a| a.end != AttemptEnd::Lost || !reported(a.epoch));
        counted.map(|attempt| attempt.cost).reduce(|sum, cost| Some(sum?.plus(cost?))).flatten()
    }
}
