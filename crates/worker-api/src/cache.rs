//! Which answers serve again for the very same request, and what of a request decides its answer. Pure. Never here: where
//! they are kept (`genmill-queue`).

use genmill_core::attempt::{FinishReason, Generation};
use genmill_core::job::JobSpec;
use genmill_core::request::Sampling;
use genmill_worker::answers::Bounds;
use sha2::{Digest as _, Sha256};

/// Changes with what is hashed.
const VERSION: u8 = 1;

/// Keeps answers.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    /// For how long, and how many.
    pub bounds: Bounds,
}

impl Cache {
    /// The hash of what decides the answer to a job; `None` when it may be another one each time: its temperature is above 0,
    /// and its caller has set no seed.
    #[must_use]
    pub fn request(spec: &JobSpec) -> Option<[u8; 32]> {
        let seed = spec.seed_given.then_some(spec.sampling.seed);
        if spec.sampling.temperature > 0.0 && seed.is_none() {
            return None;
        }
        // A seed that was drawn differs each time.
        let sampling = Sampling { seed: seed.unwrap_or_default(), ..spec.sampling.clone() };
        let decides = serde_json::to_vec(&(VERSION, &spec.model, &spec.input, seed.is_some(), sampling)).ok()?;
        Some(Sha256::digest(decides).into())
    }

    /// Whether an answer is what the model asked for would say again.
    #[must_use]
    pub const fn is_kept(answer: &Generation) -> bool {
        let whole = matches!(answer.finish_reason, FinishReason::Stop | FinishReason::Length | FinishReason::ToolCalls);
        whole && answer.answered_by.is_none() && !answer.cached
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::spec;
    use genmill_core::model::ModelName;

    fn request(change: impl Fn(&mut JobSpec)) -> Option<[u8; 32]> {
        let mut spec = spec("litellm_gpt-4o", "hi");
        (spec.sampling.temperature, spec.seed_given) = (0.0, false);
        change(&mut spec);
        Cache::request(&spec)
    }

    #[test]
    fn only_what_can_be_had_again_is_kept() {
        assert!(request(|_| ()).is_some());
        assert!(request(|spec| spec.sampling.temperature = 0.1).is_none());
        assert!(request(|spec| (spec.sampling.temperature, spec.seed_given) = (0.1, true)).is_some());
    }

    #[test]
    fn whatever_decides_the_answer_is_hashed_and_nothing_else() {
        let plain = request(|_| ());
        assert_eq!(request(|spec| spec.sampling.seed = 99), plain, "a drawn seed");
        assert_eq!(request(|spec| spec.timeout_ms = Some(1)), plain);
        let others = [
            request(|spec| spec.model = ModelName::parse("litellm_gpt-4").unwrap()),
            request(|spec| spec.input = genmill_core::request::Input::Prompt("ho".to_owned())),
            request(|spec| spec.sampling.max_tokens += 1),
            request(|spec| spec.sampling.stop.push("x".to_owned())),
            request(|spec| spec.sampling.controls.logprobs = Some(1)),
            request(|spec| (spec.seed_given, spec.sampling.seed) = (true, 0)),
            request(|spec| (spec.seed_given, spec.sampling.seed) = (true, 1)),
        ];
        let all: std::collections::BTreeSet<_> = others.iter().chain([&plain]).collect();
        assert_eq!(all.len(), others.len() + 1);
    }

    #[test]
    fn what_was_withheld_or_came_from_elsewhere_is_not_kept() {
        let kept = |reason, change: fn(&mut Generation)| {
            let mut answer = Generation::new("x".to_owned(), reason);
            change(&mut answer);
            Cache::is_kept(&answer)
        };
        assert!(kept(FinishReason::Stop, |_| ()) && kept(FinishReason::Length, |_| ()));
        assert!(!kept(FinishReason::ContentFilter, |_| ()) && !kept(FinishReason::Unknown, |_| ()));
        assert!(!kept(FinishReason::Stop, |answer| answer.answered_by = ModelName::parse("litellm_x").ok()));
        assert!(!kept(FinishReason::Stop, |answer| answer.cached = true));
    }
}
