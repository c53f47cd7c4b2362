//! Values that several tests start from.

use genmill_core::controls::Controls;
use genmill_core::job::JobSpec;
use genmill_core::model::ModelName;
use genmill_core::names::Tenant;
use genmill_core::request::{ChatMessage, Input, Priority, Role, Sampling};
use std::collections::BTreeMap;

/// A job with a plain prompt and nothing special.
pub(crate) fn spec(model: &str, prompt: &str) -> JobSpec {
    JobSpec {
        model: ModelName::parse(model).unwrap(),
        input: Input::Prompt(prompt.to_owned()),
        sampling: Sampling {
            max_tokens: 250,
            temperature: 0.1,
            top_p: None,
            top_k: None,
            seed: 7,
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
        redriven_from: None,
    }
}

/// A conversation.
pub(crate) fn messages(messages: &[(Role, &str)]) -> Input {
    let message = |(role, content): &(Role, &str)| ChatMessage::new(*role, *content);
    Input::Messages(messages.iter().map(message).collect())
}
