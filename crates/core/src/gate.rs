//! What bounds calls of remote models: limits that are configured, and what calls tell of those that the provider keeps.
//!
//! A gate bounds the calls with one key for one model; another may bound those for all models of a key. Never here: when
//! a gate opens (the queue's scripts decide), and how providers spell it (`worker-api`).

use serde::{Deserialize, Serialize};

/// Tells keys of a provider apart: a short hash of the secret, never the secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(String);

impl KeyId {
    /// The id that begins `hash` in hexadecimal digits: 12 of them.
    #[must_use]
    pub fn from_hash(hash: &[u8]) -> Self {
        Self(hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect())
    }

    /// An id as it was stored.
    #[must_use]
    pub const fn from_stored(id: String) -> Self {
        Self(id)
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands in place of a key where a job is not to be asked of its own model, which is held back, but of those that
    /// answer in its place.
    #[must_use]
    pub fn spared() -> Self {
        Self(SPARED.to_owned())
    }

    /// Whether the job's own model is held back.
    #[must_use]
    pub fn is_spared(&self) -> bool {
        self.0 == SPARED
    }
}

/// No key has this id. The queue's scripts know it.
const SPARED: &str = "~";

/// What is configured for the calls with each key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// The model with its prefix; empty: all models of the lane together.
    pub model: String,
    /// Calls in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Tokens in a minute, of prompts and answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Calls at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
}

/// What a worker says of the keys with which it calls the models of a lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declaration {
    /// The keys that it has.
    pub keys: Vec<KeyId>,
    /// How many calls with a key for a model are made at once before anything is known of its limits.
    pub start: u32,
    /// What is configured.
    pub limits: Vec<Limit>,
    /// The models for which others answer.
    #[serde(default, skip_serializing_if = "Covered::is_none")]
    pub covered: Covered,
}

/// Models for which others answer while they are held back, by what holds them back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Covered {
    /// While their provider asks to slow down.
    pub throttled: Vec<String>,
    /// While their provider fails.
    pub failing: Vec<String>,
}

impl Covered {
    /// True when there are none.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.throttled.is_empty() && self.failing.is_empty()
    }
}

impl Declaration {
    /// With which keys jobs are claimed.
    #[must_use]
    pub fn claims_with(&self) -> Vec<KeyId> {
        self.keys.iter().cloned().chain((!self.covered.is_none()).then(KeyId::spared)).collect()
    }
}

/// How a call ended, as far as it tells about its provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// The provider answered; be it that the request was wrong.
    Answered,
    /// It asked to slow down.
    Throttled,
    /// It failed, took too long, or could not be reached.
    Overloaded,
    /// The call was given up by the caller.
    #[default]
    GivenUp,
}

/// What a provider tells of one of its limits. Whatever it does not tell is unset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// What it holds when full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// What is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining: Option<u64>,
    /// How long until it is full, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reset_ms: Option<u64>,
}

/// What a call that was made tells about the limits of its provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// How it ended.
    pub signal: Signal,
    /// How long the provider asked to wait, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// Its limit of calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Bucket>,
    /// Its limit of tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Bucket>,
    /// The tokens that it took, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_tokens: Option<u64>,
    /// How long ago the provider told its limits, in milliseconds.
    #[serde(default)]
    pub age_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_id_is_short_and_the_same_for_the_same_hash() {
        assert_eq!(KeyId::from_hash(&[0, 255, 16, 1, 2, 3, 4, 5]).as_str(), "00ff10010203");
    }
}
