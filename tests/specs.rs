//! What scenarios of the queue start from: jobs, workers, the time.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::controls::Controls;
use genmill_core::ids::WorkerId;
use genmill_core::job::JobSpec;
use genmill_core::model::ModelName;
use genmill_core::names::Tenant;
use genmill_core::request::{Input, Priority, Sampling};
use genmill_core::time::UnixMs;
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

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

/// The time by this machine's clock.
#[must_use]
pub fn now() -> UnixMs {
    #[expect(clippy::disallowed_methods, reason = "a test has no daemon")]
    let now = SystemTime::now();
    UnixMs(u64::try_from(now.duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap())
}

/// The worker of a name.
#[must_use]
pub fn worker(name: &str) -> WorkerId {
    WorkerId::from_stored(name.to_owned())
}
