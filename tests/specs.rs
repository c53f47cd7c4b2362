//! Jobs that scenarios start from.

use genmill_core::controls::Controls;
use genmill_core::job::JobSpec;
use genmill_core::model::ModelName;
use genmill_core::names::Tenant;
use genmill_core::request::{Input, Priority, Sampling};
use std::collections::BTreeMap;

/// A job of `model` with a short prompt and nothing special.
#[must_use]
pub fn plain(model: ModelName) -> JobSpec {
    JobSpec {
        model,
        input: Input::Prompt("Hello".to_owned()),
        sampling: Sampling {
            max_tokens: 5,
            temperature: 0.0,
            top_p: None,
            top_k: None,
            seed: 1,
            stop: Vec::new(),
            controls: Controls::default(),
        },
        labels: BTreeMap::new(),
        tenant: Tenant::default(),
        experiment: None,
        priority: Priority::Normal,
        request_id: None,
        timeout_ms: None,
        deadline: None,
        not_before: None,
        context_tokens: None,
        prefix: None,
        seed_given: false,
        redriven_from: None,
        batch: false,
    }
}
