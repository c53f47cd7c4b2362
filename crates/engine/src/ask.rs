//! What is asked of a backend that chooses tokens itself, for a row of logits.
//!
//! Never here: how a token is chosen.

use crate::sampler::{NotFinite, Sampling, Scored};
use crate::shape::Changes;

/// An id with this bit stands for the token that the step before chose, for the output whose number is in the other bits.
pub const CHOSEN_BEFORE: u32 = 1 << 31;

/// What is asked for a row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// How a token is chosen.
    pub sampling: Sampling,
    /// The position of the token that follows the row.
    pub position: u32,
    /// That token, where it is known already: then none is chosen.
    pub known: Option<u32>,
    /// What changes the logits before a token is chosen.
    pub changes: Changes,
    /// A bit for each token that may come, 32 to a word, where not all may.
    pub allowed: Option<Vec<u32>>,
    /// The token's log probability is wanted, and those of so many of the best.
    pub logprobs: Option<usize>,
}

impl Ask {
    /// Nothing is asked for a row.
    #[must_use]
    pub fn nothing() -> Self {
        let sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, sample: 0 };
        Self { sampling, position: 0, known: Some(0), changes: Changes::default(), allowed: None, logprobs: None }
    }

    /// Whether the logits change before a token is chosen from them.
    #[must_use]
    pub fn shapes(&self) -> bool {
        let Changes { tokens, counted, .. } = &self.changes;
        self.known.is_none() && (!tokens.is_empty() || counted.is_some() || self.allowed.is_some())
    }
}

/// The answer: the token, with log probabilities where they were asked for.
pub type Chosen = Result<Scored, NotFinite>;
