//! What each step computes: which sequences, and how many tokens of each.
//!
//! Never here: tokens, tensors, time. A sequence is three numbers, of which one moves: `computed`.
//! Prefill, a chunk of it and decoding are the same thing, tokens that are known and not yet
//! computed. Admission is first come, first served by reservation of prompt and maximum output,
//! so an admitted sequence always runs to its end and nothing is ever preempted.

use std::collections::VecDeque;

use crate::engine::RequestId;
use crate::kv::{BLOCK_TOKENS, Blocks};

/// The bounds of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens in a step. At least `max_sequences`, so that every decoding sequence advances
    /// in every step.
    pub step_tokens: usize,
    /// Most sequences at a time.
    pub max_sequences: usize,
}

/// A request that no empty pool could hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("needs {needed} KV tokens (prompt and max_tokens), the pool has {total}")]
pub struct NeverFits {
    /// Tokens to reserve.
    pub needed: usize,
    /// Tokens of the whole pool.
    pub total: usize,
}

/// Which sequences run, which wait, and who has which blocks.
#[derive(Debug)]
pub struct Schedule {
    waiting: VecDeque<Waiting>,
    /// In the order of admission.
    running: Vec<Running>,
    blocks: Blocks,
}

#[derive(Debug)]
struct Waiting {
    id: RequestId,
    prompt_tokens: usize,
    max_tokens: usize,
    scored: bool,
}

#[derive(Debug)]
struct Running {
    id: RequestId,
    /// The logits of every token of its prompt are wanted, not only those of the last.
    scored: bool,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// Tokens that exist: the prompt and what was sampled.
    known: usize,
    blocks: Vec<u32>,
}

/// What to compute now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The sequences admitted with this step.
    pub admitted: Vec<RequestId>,
    /// At most one slice of each sequence.
    pub slices: Vec<Slice>,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub id: RequestId,
    /// The position of the first token.
    pub start: usize,
    /// How many tokens, at least 1.
    pub tokens: usize,
    /// Whether the last token is the last one known, so that the next can be sampled from it.
    pub samples: bool,
    /// Of how many of its last tokens the logits are wanted.
    pub outputs: usize,
}

impl Step {
    /// Tokens of all slices.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.slices.iter().map(|slice| slice.tokens).sum()
    }
}

impl Schedule {
    /// A schedule over a pool of so many blocks.
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        Self { waiting: VecDeque::new(), running: Vec::new(), blocks: Blocks::new(blocks) }
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// When even an empty pool could not hold it.
    pub fn add(&mut self, id: RequestId, prompt_tokens: usize, max_tokens: usize) -> Result<(), NeverFits> {
        let needed = prompt_tokens.saturating_add(max_tokens);
        if Blocks::for_tokens(needed) > self.blocks.total() {
            return Err(NeverFits { needed, total: self.blocks.total() * BLOCK_TOKENS });
        }
        self.waiting.push_back(Waiting { id, prompt_tokens, max_tokens, scored: false });
        Ok(())
    }

    /// The logits of all of a waiting sequence's tokens are wanted. Its slices are then bounded so that no step has
    /// more outputs than `max_sequences`.
    pub fn score(&mut self, id: RequestId) {
        if let Some(sequence) = self.waiting.iter_mut().find(|sequence| sequence.id == id) {
            sequence.scored = true;
        }
    }

    /// Admits what fits and chooses the next step: every sequence that needs one token gets it,
    /// what is left of the budget goes to longer ones in the order of admission.
    pub fn next(&mut self, limits: &Limits) -> Step {
        let admitted = self.admit(limits);
        let mut budget = limits.step_tokens;
        // Every sequence may want one row of logits; what is left is for prompts of which all are wanted.
        let mut outputs = limits.max_sequences.saturating_sub(self.running.len());
        let mut shares = vec![0; self.running.len()];
        for pass in [Pass::Single, Pass::Longer] {
            for (sequence, share) in self.running.iter().zip(&mut shares) {
                let open = sequence.known - sequence.computed;
                if pass.takes(open) {
                    *share = open.min(budget);
                    if sequence.scored {
                        *share = (*share).min(outputs + 1);
                        outputs -= share.saturating_sub(1);
                    }
                    budget -= *share;
                }
            }
        }
        let slices = self.running.iter().zip(shares).filter(|(_, tokens)| *tokens > 0);
        let slices = slices.map(|(sequence, tokens)| {
            let samples = sequence.computed + tokens == sequence.known;
            let outputs = if sequence.scored { tokens } else { usize::from(samples) };
            Slice { id: sequence.id, start: sequence.computed, tokens, samples, outputs }
        });
        Step { admitted, slices: slices.collect() }
    }

    /// Whether a step has all sequences that there are, running or waiting: then nobody waits for its end.
    #[must_use]
    pub fn runs_only(&self, step: &Step) -> bool {
        self.waiting.is_empty() && step.slices.len() == self.running.len()
    }

    /// Records that so many more tokens of a sequence are known: they follow what was sampled, and are yet to be computed.
    pub fn extend(&mut self, id: RequestId, tokens: usize) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.known += tokens;
        }
    }

    /// Records that a sequence took so many more tokens after its slice of a step, each computed from the one before.
    pub fn commit_ahead(&mut self, id: RequestId, tokens: usize) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.computed += tokens;
            sequence.known += tokens;
        }
    }

    /// Records that a step was computed: each slice's sequence has that much more in the cache,
    /// and one more token where it sampled. Sequences that ended are to be removed afterwards.
    pub fn commit(&mut self, step: &Step) {
        for slice in &step.slices {
            if let Some(sequence) = self.running.iter_mut().find(|s| s.id == slice.id) {
                sequence.computed += slice.tokens;
                sequence.known += usize::from(slice.samples);
            }
        }
    }

    /// Takes a sequence out, waiting or running; its blocks are free at once. Returns whether it
    /// was there.
    pub fn remove(&mut self, id: RequestId) -> bool {
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = self.running.remove(index);
            self.blocks.give(sequence.blocks);
            return true;
        }
        let index = self.waiting.iter().position(|sequence| sequence.id == id);
        index.and_then(|index| self.waiting.remove(index)).is_some()
    }

    /// The block table of a running sequence.
    #[must_use]
    pub fn table(&self, id: RequestId) -> &[u32] {
        self.running.iter().find(|sequence| sequence.id == id).map_or(&[], |found| &found.blocks)
    }

    /// Whether nothing runs and nothing waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// How many blocks are free.
    #[must_use]
    pub fn free_blocks(&self) -> usize {
        self.blocks.free()
    }

    /// Admission in order; a sequence that does not fit yet holds back those behind it, so a long
    /// one cannot starve.
    fn admit(&mut self, limits: &Limits) -> Vec<RequestId> {
        let mut admitted = Vec::new();
        while self.running.len() < limits.max_sequences
            && let Some(first) = self.waiting.front()
            && let Some(blocks) = self.blocks.take(Blocks::for_tokens(first.prompt_tokens + first.max_tokens))
        {
            let (id, known, scored) = (first.id, first.prompt_tokens, first.scored);
            self.waiting.pop_front();
            self.running.push(Running { id, scored, computed: 0, known, blocks });
            admitted.push(id);
        }
        admitted
    }
}

/// Which sequences a pass over the budget serves.
#[derive(Clone, Copy)]
enum Pass {
    Single,
    Longer,
}

impl Pass {
    fn takes(self, open: usize) -> bool {
        match self {
            Self::Single => open == 1,
            Self::Longer => open > 1,
        }
    }
}
