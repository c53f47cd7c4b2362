//! The keys of each lane's provider, what is declared of them to the queue, and what a call tells of their limits. Never
//! here: which job uses which key (the queue decides).

use crate::catalog::{Catalog, Endpoint};
use crate::limits::Told;
use genmill_core::attempt::{FailureClass, Outcome, Usage};
use genmill_core::gate::{Covered, Declaration, KeyId, Limit, Observation, Signal};
use genmill_core::model::Lane;
use genmill_daemon::config;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

/// The endpoints of each lane, one for each key. A provider that serves without keys has one all the same.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    lanes: BTreeMap<Lane, Vec<(KeyId, Endpoint)>>,
}

impl Keys {
    pub(crate) fn new(catalog: &Catalog) -> Self {
        let endpoints = catalog.endpoints.iter();
        Self { lanes: endpoints.map(|(lane, endpoint)| (lane.clone(), with_each_key(endpoint))).collect() }
    }

    /// Where a job of `lane` is called with `key`; with any, when it came without one.
    pub(crate) fn endpoint(&self, lane: &Lane, key: Option<&KeyId>) -> Option<&Endpoint> {
        let mut endpoints = self.lanes.get(lane)?.iter();
        endpoints.find(|(id, _)| key.is_none_or(|key| key == id)).map(|(_, endpoint)| endpoint)
    }

    /// The first key of a lane.
    pub(crate) fn first(&self, lane: &Lane) -> Option<&KeyId> {
        self.lanes.get(lane)?.first().map(|(key, _)| key)
    }

    /// The keys of a lane; `None` when it cannot be called at all.
    pub(crate) fn of(&self, lane: &Lane) -> Option<Vec<KeyId>> {
        Some(self.lanes.get(lane)?.iter().map(|(id, _)| id.clone()).collect())
    }

    /// What is declared of a lane.
    pub(crate) fn declaration(
        &self,
        lane: &Lane,
        start: u32,
        limits: Vec<Limit>,
        covered: Covered,
    ) -> Option<Declaration> {
        Some(Declaration { keys: self.of(lane)?, start, limits, covered })
    }
}

fn with_each_key(endpoint: &Endpoint) -> Vec<(KeyId, Endpoint)> {
    let mut keyed: Vec<(KeyId, Endpoint)> = Vec::new();
    let more = endpoint.more_keys.iter().map(|key| endpoint.credentials.with_key(key));
    for credentials in std::iter::once(endpoint.credentials.clone()).chain(more) {
        let id = KeyId::from_hash(&Sha256::digest(credentials.account()));
        if keyed.iter().all(|(known, _)| *known != id) {
            keyed.push((id, Endpoint { credentials, more_keys: Vec::new(), ..endpoint.clone() }));
        }
    }
    keyed
}

/// The rows that are about a lane. One that names a model which is not listed is left out.
pub(crate) fn limits_of(lane: &Lane, rows: &[config::Limit], catalog: &Catalog) -> Vec<Limit> {
    let model_of = |row: &config::Limit| {
        let Some(wanted) = &row.model else { return Some(String::new()) };
        let models = catalog.models.iter().map(|model| &model.name).filter(|name| name.lane() == *lane);
        let is_it = |name: &&genmill_core::model::ModelName| name.as_str() == wanted || name.backend_name() == wanted;
        models.into_iter().find(is_it).map(|name| name.as_str().to_owned())
    };
    let limit = |row: &config::Limit| {
        let (requests, tokens, concurrency) = (row.requests_per_minute, row.tokens_per_minute, row.concurrency);
        Some(Limit { model: model_of(row)?, requests, tokens, concurrency })
    };
    rows.iter().filter(|row| row.provider == lane.route).filter_map(limit).collect()
}

/// What a call that was made tells: its outcome, its tokens, and the limits that its provider told so many ms ago.
pub(crate) fn observe(outcome: &Outcome, usage: Option<Usage>, (told, age_ms): (Told, u64)) -> Observation {
    let limits = Observation { requests: told.requests, tokens: told.tokens, age_ms, ..Observation::default() };
    let used_tokens = usage.map(|usage| usage.prompt_tokens + usage.completion_tokens);
    let Outcome::Failed(failure) = outcome else {
        let signal = if matches!(outcome, Outcome::Generated(_)) { Signal::Answered } else { Signal::GivenUp };
        return Observation { signal, used_tokens, ..limits };
    };
    let signal = match failure.class {
        // It is the request's, and not its provider's.
        _ if failure.is_lasting => Signal::Answered,
        FailureClass::Throttled => Signal::Throttled,
        FailureClass::Transient | FailureClass::Timeout | FailureClass::Overloaded | FailureClass::CutStream => {
            Signal::Overloaded
        }
        FailureClass::Invalid
        | FailureClass::Auth
        | FailureClass::NotFound
        | FailureClass::Poison
        | FailureClass::Internal
        | FailureClass::Quota
        | FailureClass::ContentFilter
        | FailureClass::ContextOverflow => Signal::Answered,
    };
    Observation { signal, used_tokens, retry_after_ms: failure.retry_after_ms, ..limits }
}
