//! Admission: whether a request becomes a job, and with which defaults. Pure: what is known of the workers, the time
//! and a random number are arguments.

use crate::ids::WorkerId;
use crate::image::Image;
use crate::job::JobSpec;
use crate::model::{BadModelName, ModelName};
use crate::prefix::PrefixKey;
use crate::registration::{Availability, Registration, ServedModel};
use crate::request::{Invalid, Mode, Request, Sampling, TEXT_BYTES_MAX};
use crate::time::UnixMs;

/// Values for what a request leaves open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// Upper bound of generated tokens.
    pub max_tokens: u32,
    /// Sampling temperature.
    pub temperature: f64,
    /// Bound of one attempt of a remote model, in milliseconds.
    pub remote_timeout_ms: u64,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { max_tokens: 250, temperature: 0.1, remote_timeout_ms: 60_000 }
    }
}

/// Why a request does not become a job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A rule is broken.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// More text and images than a request may carry.
    #[error("the request carries {bytes} bytes of text and images; at most {max} are taken")]
    TooLarge {
        /// What it carries.
        bytes: usize,
        /// What it may carry.
        max: usize,
    },
    /// A batch is asked for where there are none.
    #[error(
        "model `{model}` cannot be asked in batches: its provider has no batch API that is known here; submit it without `mode: batch`"
    )]
    NoBatches {
        /// The model.
        model: ModelName,
    },
    /// The name is not that of a model.
    #[error(transparent)]
    Name(#[from] BadModelName),
    /// No live worker has the model in its configuration.
    #[error("model `{model}` is not listed: add it under `models:` in {section}.yaml of the model configuration folder{}", nearest.as_ref().map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default())]
    NotListed {
        /// The model.
        model: ModelName,
        /// The section that would list it.
        section: String,
        /// A listed model of similar name.
        nearest: Option<ModelName>,
    },
    /// No live worker serves this backend at all.
    #[error(
        "no live worker serves `{model}`: start `{daemon}` (or `genmill up`) with this scheduler's Redis, and list the model in its {section}.yaml"
    )]
    NoLiveWorker {
        /// The model.
        model: ModelName,
        /// The daemon to start.
        daemon: &'static str,
        /// The section that would list it.
        section: String,
    },
    /// A worker has the model listed, but no key for its provider.
    #[error(
        "no worker has the key for `{model}`: set {variable} in the environment or the .env file of genmill-worker-api and start it again"
    )]
    KeyMissing {
        /// The model.
        model: ModelName,
        /// The environment variable to set.
        variable: String,
    },
    /// A worker has the model listed, but cannot run it.
    #[error("model `{model}` is not available: {reason}")]
    Unavailable {
        /// The model.
        model: ModelName,
        /// What is missing, and what to set and where.
        reason: String,
    },
}

/// What is known of a model when a request for it comes in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The live workers that have the model in their configuration.
    pub listed: Vec<(WorkerId, ServedModel)>,
    /// True when a live worker serves the model's backend at all.
    pub backend_is_live: bool,
    /// A listed model of similar name.
    pub nearest: Option<ModelName>,
}

impl Facts {
    /// Picks what is known of `model` from the registrations of all live workers.
    #[must_use]
    pub fn about(model: &ModelName, registrations: &[Registration]) -> Self {
        let prefix = model.prefix().name;
        let of = |r: &Registration| {
            let served = r.models.iter().find(|served| served.name == *model)?;
            Some((r.worker.clone(), served.clone()))
        };
        let listed: Vec<_> = registrations.iter().filter_map(of).collect();
        let nearest = if listed.is_empty() { nearest(model, registrations) } else { None };
        let backend_is_live = registrations.iter().any(|r| r.prefixes.iter().any(|p| p == prefix));
        Self { listed, backend_is_live, nearest }
    }

    /// The workers that take jobs for the model.
    pub fn serving(&self) -> impl Iterator<Item = &WorkerId> {
        let serving = self.listed.iter().filter(|(_, served)| served.availability.takes_jobs());
        serving.map(|(worker, _)| worker)
    }

    /// The workers whose availability of the model is this one.
    pub fn that_are(&self, availability: &Availability) -> impl Iterator<Item = &WorkerId> {
        let those = self.listed.iter().filter(move |(_, served)| served.availability == *availability);
        those.map(|(worker, _)| worker)
    }

    /// Whether a job for `model` has a worker, and if not, why.
    ///
    /// # Errors
    /// The [`Refusal`] that tells what is missing.
    pub fn check(&self, model: &ModelName) -> Result<(), Refusal> {
        if self.serving().next().is_some() {
            return Ok(());
        }
        let section = model.prefix().section();
        Err(match self.listed.first().map(|(_, served)| &served.availability) {
            Some(Availability::KeyMissing { variable }) => {
                Refusal::KeyMissing { model: model.clone(), variable: variable.clone() }
            }
            Some(Availability::Unavailable { reason }) => {
                Refusal::Unavailable { model: model.clone(), reason: reason.clone() }
            }
            _ if self.backend_is_live => {
                Refusal::NotListed { model: model.clone(), section, nearest: self.nearest.clone() }
            }
            _ => Refusal::NoLiveWorker { model: model.clone(), daemon: model.prefix().daemon, section },
        })
    }
}

fn nearest(model: &ModelName, registrations: &[Registration]) -> Option<ModelName> {
    let names = registrations.iter().flat_map(|r| r.models.iter().map(|served| &served.name));
    let rated = names.map(|name| (strsim::jaro_winkler(model.as_str(), name.as_str()), name));
    let best = rated.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.85).then(|| best.1.clone())
}

/// Decides whether `request` becomes a job, and fills in what it leaves open. `random` becomes the seed when it has
/// none, so that every attempt of the job samples alike.
///
/// # Errors
/// The [`Refusal`] that tells what is wrong and what to do.
pub fn admit(
    request: Request,
    facts: &Facts,
    defaults: &Defaults,
    now: UnixMs,
    random: u64,
) -> Result<JobSpec, Refusal> {
    request.check(now)?;
    let images: usize = request.input.images().map(Image::bytes).sum();
    let bytes = request.input.text_bytes() + images + request.controls.text_bytes();
    if bytes > TEXT_BYTES_MAX {
        return Err(Refusal::TooLarge { bytes, max: TEXT_BYTES_MAX });
    }
    facts.check(&request.model)?;
    let max_tokens = request.max_tokens.unwrap_or(defaults.max_tokens);
    if request.controls.min_tokens.is_some_and(|min_tokens| min_tokens > max_tokens) {
        return Err(Invalid::new("min_tokens", format!("must be at most max_tokens, which is {max_tokens}")).into());
    }
    let remote = request.model.prefix().is_remote();
    let batches = facts.listed.iter().any(|(_, served)| served.availability.takes_jobs() && served.batches);
    let batch = match request.mode {
        Mode::Direct => false,
        Mode::Auto => batches && request.has_slack(now),
        Mode::Batch if batches => true,
        Mode::Batch => return Err(Refusal::NoBatches { model: request.model }),
    };
    let contexts = facts.listed.iter().filter_map(|(_, served)| served.context_tokens);
    Ok(JobSpec {
        context_tokens: contexts.max(),
        seed_given: request.seed.is_some(),
        prefix: if remote { None } else { PrefixKey::of(&request.input) },
        sampling: Sampling {
            max_tokens,
            temperature: request.temperature.unwrap_or(defaults.temperature),
            top_p: request.top_p,
            top_k: request.top_k,
            // Providers take seeds as signed integers, and JSON numbers are exact to 2^53 only.
            seed: request.seed.unwrap_or(random & ((1 << 53) - 1)),
            stop: request.stop,
            controls: request.controls,
        },
        timeout_ms: request.timeout_ms.or(remote.then_some(defaults.remote_timeout_ms)),
        model: request.model,
        input: request.input,
        labels: request.labels,
        tenant: request.tenant,
        experiment: request.experiment,
        priority: request.priority,
        request_id: request.request_id,
        deadline: request.deadline,
        not_before: request.not_before,
        redriven_from: None,
        batch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Priority;
    use crate::request::tests::request;

    fn registration(models: &[(&str, Availability)]) -> Registration {
        let served = |(name, availability): &(&str, Availability)| ServedModel {
            name: ModelName::parse(name).unwrap(),
            availability: availability.clone(),
            description: String::new(),
            context_tokens: None,
            batches: false,
        };
        Registration {
            worker: WorkerId::new("api", "host", 1),
            started_at: UnixMs(0),
            capacity: 1,
            prefixes: vec!["litellm".to_owned(), "openrouter".to_owned()],
            models: models.iter().map(served).collect(),
        }
    }

    fn admit_with(model: &str, registrations: &[Registration]) -> Result<JobSpec, Refusal> {
        let request = request(model);
        let facts = Facts::about(&request.model, registrations);
        admit(request, &facts, &Defaults::default(), UnixMs(1), u64::MAX)
    }

    fn refused(model: &str, registrations: &[Registration], says: &str) {
        let message = admit_with(model, registrations).unwrap_err().to_string();
        assert!(message.contains(says), "{message}");
    }

    #[test]
    fn what_a_request_leaves_open_is_filled_in() {
        let spec = admit_with("litellm_gpt-4", &[registration(&[("litellm_gpt-4", Availability::Ready)])]).unwrap();
        assert_eq!(spec.sampling.max_tokens, 250);
        assert!((spec.sampling.temperature - 0.1).abs() < f64::EPSILON);
        assert_eq!(spec.sampling.seed, (1 << 53) - 1);
        assert_eq!(spec.timeout_ms, Some(60_000));
    }

    #[test]
    fn no_job_is_estimated_beyond_its_models_context() {
        let mut worker = registration(&[("litellm_gpt-4", Availability::Ready)]);
        worker.models[0].context_tokens = Some(100);
        let spec = admit_with("litellm_gpt-4", &[worker]).unwrap();
        assert_eq!(spec.sampling.max_tokens, 250);
        assert_eq!(spec.estimated_tokens(), 100);
    }

    #[test]
    fn a_model_nobody_can_run_is_refused_with_the_reason() {
        let key = Availability::KeyMissing { variable: "OPENAI_API_KEY".to_owned() };
        let path = Availability::Unavailable { reason: "/models/x does not exist".to_owned() };
        let workers = [registration(&[("litellm_gpt-4", key), ("litellm_other/x", path)])];
        refused("litellm_gpt-4", &workers, "set OPENAI_API_KEY");
        refused("litellm_other/x", &workers, "/models/x does not exist");
        refused("litellm_gpt-5", &workers, "litellm_models.yaml");
        refused("litellm_gpt-5", &workers, "did you mean `litellm_gpt-4`?");
        refused("vllm_x", &workers, "no live worker serves `vllm_x`: start `genmill-worker-gpu`");
    }

    #[test]
    fn a_job_with_slack_goes_out_in_a_batch_where_there_are_any() {
        const DAY_MS: u64 = 24 * 3_600_000;
        let now = UnixMs(1_000_000);
        let batched = |batches: bool, change: &dyn Fn(&mut Request)| {
            let mut worker = registration(&[("litellm_gpt-4", Availability::Ready)]);
            worker.models[0].batches = batches;
            let mut request = request("litellm_gpt-4");
            change(&mut request);
            let facts = Facts::about(&request.model, &[worker]);
            admit(request, &facts, &Defaults::default(), now, 0).map(|spec| (spec.batch, spec.lane().to_string()))
        };
        let bulk = |wait_ms: u64| {
            move |request: &mut Request| {
                request.priority = Priority::Bulk;
                request.deadline = Some(UnixMs(now.0 + wait_ms));
            }
        };
        let (batch, direct) = ((true, "litellm:openai+batch".to_owned()), (false, "litellm:openai".to_owned()));
        assert_eq!(batched(true, &bulk(DAY_MS - 1_000)), Ok(batch.clone()), "callers count from before they submit");
        assert_eq!(batched(true, &bulk(DAY_MS / 2)), Ok(direct.clone()));
        assert_eq!(batched(true, &|request| request.priority = Priority::Bulk), Ok(direct.clone()), "no deadline");
        assert_eq!(batched(true, &|request| request.deadline = Some(UnixMs(now.0 + DAY_MS))), Ok(direct.clone()));
        assert_eq!(batched(false, &bulk(DAY_MS)), Ok(direct.clone()));
        let later = |request: &mut Request| {
            bulk(DAY_MS)(request);
            request.not_before = Some(UnixMs(now.0 + DAY_MS / 2));
        };
        assert_eq!(batched(true, &later), Ok(direct.clone()), "half a day is left when it may begin");
        let asked = |request: &mut Request| request.mode = Mode::Batch;
        assert_eq!(batched(true, &asked), Ok(batch));
        assert!(matches!(batched(false, &asked), Err(Refusal::NoBatches { .. })));
        let refused = |request: &mut Request| {
            bulk(DAY_MS)(request);
            request.mode = Mode::Direct;
        };
        assert_eq!(batched(true, &refused), Ok(direct));
    }

    #[test]
    fn one_ready_worker_is_enough() {
        let key = Availability::KeyMissing { variable: "OPENAI_API_KEY".to_owned() };
        let workers =
            [registration(&[("litellm_gpt-4", key)]), registration(&[("litellm_gpt-4", Availability::Ready)])];
        assert!(admit_with("litellm_gpt-4", &workers).is_ok());
    }
}
