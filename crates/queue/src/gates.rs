//! The gates of a lane: what bounds the calls of remote models, which models are held back, and permits for calls beside
//! those for which jobs are fed.

use crate::error::QueueError;
use crate::payload::corrupt;
use crate::queue::Queue;
use crate::work::pack;
use genmill_core::gate::{KeyId, Observation};
use genmill_core::ids::LaneNumber;
use genmill_core::model::ModelName;
use genmill_core::time::UnixMs;

/// When something may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opens {
    /// It may now.
    Now,
    /// At a time.
    At(UnixMs),
    /// When a call ends.
    AfterCall,
}

/// What holds calls back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldBy {
    /// The provider asked to slow down.
    Throttled,
    /// It failed too often in a row: it is left alone for a while, then tried with one call.
    Failing,
    /// The calls of a minute are used up.
    Requests,
    /// The tokens of a minute are used up.
    Tokens,
    /// As many calls as may be are in flight.
    Calls,
}

/// How a gate stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateState {
    /// The key.
    pub key: KeyId,
    /// The model with its prefix; empty: all models of the key.
    pub model: String,
    /// Jobs that hold a permit: they are on their way to a worker, or run.
    pub in_flight: u64,
    /// The most of them; `None`: no bound.
    pub window: Option<u64>,
    /// When a small job may pass.
    pub opens: Opens,
    /// What it waits for until then.
    pub held_by: Option<HeldBy>,
}

/// A model whose jobs wait because no key has room for them, or that its provider keeps from being called with any key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBack {
    /// The model with its prefix.
    pub model: String,
    /// Until when, as far as is known now.
    pub until: Opens,
    /// Why.
    pub held_by: HeldBy,
}

/// The gates of a lane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gates {
    /// Every gate that was passed lately.
    pub gates: Vec<GateState>,
    /// What is held back.
    pub held_back: Vec<HeldBack>,
}

/// A call beside the one for which a job was fed: to another model, or the same again.
#[derive(Clone, Copy, Debug)]
pub struct SideCall<'a> {
    /// A name for it that no other call has.
    pub name: &'a str,
    /// The model, which must be of the lane that is asked.
    pub model: &'a ModelName,
    /// Its estimated tokens.
    pub tokens: u64,
    /// The keys that the caller has.
    pub keys: &'a [KeyId],
    /// When its permit ends by itself, in milliseconds: the caller may be lost.
    pub ttl_ms: u64,
}

/// A permit for a call, to be settled when it has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Permit {
    lane: LaneNumber,
    lent: Vec<u8>,
    /// The key to be used.
    pub key: KeyId,
}

/// Whether a call may be made.
#[derive(Debug, PartialEq, Eq)]
pub enum Passage {
    /// It may, with this permit.
    Permitted(Permit),
    /// It may: the lane has no gates.
    Free,
    /// Not now.
    Held {
        /// Until when, as far as is known.
        until: Opens,
        /// Why.
        held_by: HeldBy,
    },
}

/// A gate as the script answers it: key, model, permits, window, opening, reason.
type Gate = (String, String, u64, String, String, String);

impl Queue {
    /// How the gates of `lane` stand: a look at one moment.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn gates(&self, lane: LaneNumber) -> Result<Gates, QueueError> {
        let call = self.scripts.gates.key(self.keys.lane(lane));
        let (gates, held): (Vec<Gate>, Vec<(String, String, String)>) = call
            .invoke_async(&mut self.connection.clone())
            .await
            .map_err(|source| QueueError::from_redis("looking at the gates of a lane", source))?;
        let gate = |(key, model, in_flight, window, at, why): Gate| {
            let window = if window.is_empty() { None } else { Some(window.parse().map_err(|_| unknown(&window))?) };
            let (opens, held_by) = (opens(&at)?, held_by(&why)?);
            Ok(GateState { key: KeyId::from_stored(key), model, in_flight, window, opens, held_by })
        };
        let held_back = |(model, at, why): (String, String, String)| {
            let held_by = held_by(&why)?.unwrap_or(HeldBy::Calls);
            Ok(HeldBack { model, until: opens(&at)?, held_by })
        };
        Ok(Gates {
            gates: gates.into_iter().map(gate).collect::<Result<_, QueueError>>()?,
            held_back: held.into_iter().map(held_back).collect::<Result<_, QueueError>>()?,
        })
    }
}

impl Queue {
    /// Asks for a permit for a call beside a job's own. Such a call does not wait in the queue.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer. A permit whose answer got lost ends by itself.
    pub async fn permit(&self, lane: LaneNumber, call: &SideCall<'_>) -> Result<Passage, QueueError> {
        let mut script = self.scripts.permit.key(self.keys.lane(lane));
        let keys: Vec<&str> = call.keys.iter().map(KeyId::as_str).collect();
        let answer: Vec<Vec<u8>> = script
            .arg(call.name)
            .arg(call.model.as_str())
            .arg(call.tokens)
            .arg(keys.join(","))
            .arg(call.ttl_ms)
            .invoke_async(&mut self.connection.clone())
            .await
            .map_err(|source| QueueError::from_redis("asking for a permit", source))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match &answer[..] {
            [] => Ok(Passage::Free),
            [_, at, why] => {
                let held_by = held_by(&text(why))?.unwrap_or(HeldBy::Calls);
                Ok(Passage::Held { until: opens(&text(at))?, held_by })
            }
            [lent, key] => {
                Ok(Passage::Permitted(Permit { lane, lent: lent.clone(), key: KeyId::from_stored(text(key)) }))
            }
            _ => Err(unknown("of another length")),
        }
    }

    /// Ends a permit, with what its call tells; `None` when it was not made. May be repeated.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn settle(&self, permit: &Permit, observation: Option<&Observation>) -> Result<(), QueueError> {
        let mut script = self.scripts.settle_permit.key(self.keys.lane(permit.lane));
        let told = observation.map(|told| pack("observation", told)).transpose()?;
        script
            .arg(&permit.lent)
            .arg(told.unwrap_or_default())
            .invoke_async(&mut self.connection.clone())
            .await
            .map_err(|source| QueueError::from_redis("settling a permit", source))
    }
}

fn unknown(word: &str) -> QueueError {
    corrupt("gate", format!("`{word}` is no answer"))
}

fn opens(at: &str) -> Result<Opens, QueueError> {
    match at {
        "0" => Ok(Opens::Now),
        "" => Ok(Opens::AfterCall),
        at => at.parse().map(|at| Opens::At(UnixMs(at))).map_err(|_| unknown(at)),
    }
}

fn held_by(why: &str) -> Result<Option<HeldBy>, QueueError> {
    match why {
        "" => Ok(None),
        "throttled" => Ok(Some(HeldBy::Throttled)),
        "failing" => Ok(Some(HeldBy::Failing)),
        "requests" => Ok(Some(HeldBy::Requests)),
        "tokens" => Ok(Some(HeldBy::Tokens)),
        "calls" => Ok(Some(HeldBy::Calls)),
        other => Err(unknown(other)),
    }
}
