//! The jobs of a run, numbered: all prompts of the first model, then all of the second. Pure.

use super::file::{Experiment, Prompt};
use genmill_client::v1;
use sha2::{Digest as _, Sha256};
use std::path::PathBuf;

/// An experiment and the id of its run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) experiment: Experiment,
    pub(crate) run: String,
}

impl Plan {
    pub(crate) fn new(experiment: Experiment, run: String) -> Self {
        Self { experiment, run }
    }

    /// How many jobs there are.
    pub(crate) fn jobs(&self) -> usize {
        self.experiment.models.len() * self.experiment.prompts.len()
    }

    /// The number of the model of job `index`, and its prompt.
    pub(crate) fn job(&self, index: usize) -> (usize, &Prompt) {
        let prompts = &self.experiment.prompts;
        (index / prompts.len(), &prompts[index % prompts.len()])
    }

    /// The model of job `index`.
    pub(crate) fn model(&self, index: usize) -> &str {
        &self.experiment.models[self.job(index).0]
    }

    /// Job `index` for people.
    pub(crate) fn label(&self, index: usize) -> String {
        format!("{}, prompt {}", self.model(index), self.job(index).1.id)
    }

    /// The request of job `index`.
    pub(crate) fn request(&self, index: usize) -> v1::GenerationRequest {
        v1::GenerationRequest {
            model: self.model(index).to_owned(),
            input: Some(self.job(index).1.input.clone()),
            request_id: self.request_id(index),
            ..self.experiment.request.clone()
        }
    }

    /// The id that makes job `index` the same job when the same run is submitted again. Model names and prompt ids may
    /// be long, so they are hashed.
    pub(crate) fn request_id(&self, index: usize) -> String {
        let mut hash = Sha256::new();
        for part in [self.model(index), &self.job(index).1.id] {
            hash.update(part.len().to_be_bytes());
            hash.update(part);
        }
        let digest = hash.finalize();
        let digest: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        format!("{}/{}/{digest}", self.experiment.name, self.run)
    }

    /// Which jobs the server is asked about.
    pub(crate) fn filter(&self) -> v1::JobFilter {
        let tenant = self.experiment.request.tenant.clone();
        v1::JobFilter { experiment: self.experiment.name.clone(), tenant, ..v1::JobFilter::default() }
    }

    /// Where results go unless told otherwise.
    pub(crate) fn default_out(&self) -> PathBuf {
        PathBuf::from("results").join(format!("{}-{}.jsonl", self.experiment.name, self.run))
    }

    /// What is about to run.
    pub(crate) fn describe(&self) -> String {
        let (models, prompts) = (self.experiment.models.len(), self.experiment.prompts.len());
        format!("{}, run {}: {models} models x {prompts} prompts", self.experiment.name, self.run)
    }
}

/// The id of a new run: the time for people, a random part so that no two are the same.
pub(crate) fn run_id(now_unix_ms: u64, random: u64) -> String {
    let now = genmill_wire::to_pb::timestamp(genmill_core::time::UnixMs(now_unix_ms / 1_000 * 1_000)).to_string();
    let digits: String = now.chars().filter(|c| c.is_ascii_digit() || *c == 'T').collect();
    format!("{}-{:04x}", digits.replace('T', "-"), random & 0xffff)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::HashSet;

    pub(crate) fn sample() -> Plan {
        Plan::new(super::super::file::tests::sample(), "r".to_owned())
    }

    #[test]
    fn every_model_gets_every_prompt() {
        let plan = sample();
        assert_eq!(plan.jobs(), 6);
        let labels: Vec<String> = (0..6).map(|index| plan.label(index)).collect();
        assert_eq!(labels[0], "vllm_a, prompt two");
        assert_eq!(labels[4], "hf_b, prompt 2");
        assert_eq!(plan.request(4).model, "hf_b");
        assert_eq!(plan.request(4).max_tokens, Some(5));
    }

    #[test]
    fn a_request_id_tells_run_model_and_prompt() {
        let plan = sample();
        let ids: HashSet<String> = (0..6).map(|index| plan.request_id(index)).collect();
        assert_eq!(ids.len(), 6);
        assert_eq!(plan.request_id(3), sample().request_id(3), "it is the same in every process");
        let other = Plan { run: "s".to_owned(), ..plan };
        assert!(!ids.contains(&other.request_id(0)));
        assert!(ids.iter().all(|id| id.len() <= 256));
    }

    #[test]
    fn a_new_run_is_named_by_its_time() {
        assert_eq!(run_id(86_400_123, 0xfffa_bcd1), "19700102-000000-bcd1");
    }
}
