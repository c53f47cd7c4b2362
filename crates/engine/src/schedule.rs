//! What each step computes: which sequences, and how many tokens of each.
//!
//! Never here: tensors, time. A sequence is a prompt and two numbers, of which one moves: `computed`.
//! Prefill, a chunk of it and decoding are the same thing, tokens that are known and not yet
//! computed. Admission is by reservation of prompt and maximum output, so an admitted sequence always runs to its end and
//! nothing is ever preempted. It goes by arrival, where an urgent sequence may overtake a bounded number of others; one
//! that begins as another does whose prompt is being computed waits for that, and takes its blocks.

use std::collections::VecDeque;
use std::sync::Arc;

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
    /// By rank.
    waiting: VecDeque<Waiting>,
    /// In the order of admission.
    running: Vec<Running>,
    blocks: Blocks,
    /// How many have come.
    arrivals: u64,
    /// Whether blocks are kept for those that begin alike.
    keeps_prefixes: bool,
}

/// A sequence that comes.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Its prompt, at least one token.
    pub prompt: Arc<[u32]>,
    /// Most tokens that it may add.
    pub max_tokens: usize,
    /// How many that came before it it may overtake.
    pub overtakes: u64,
    /// The logits of every token of its prompt are wanted, not only those of the last. Its slices are then bounded so that
    /// no step has more outputs than `max_sequences`, and no block of another is taken over.
    pub scored: bool,
}

#[derive(Debug)]
struct Waiting {
    id: RequestId,
    /// Its number, less what it may overtake.
    rank: u64,
    arrival: Arrival,
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
    prompt: Arc<[u32]>,
    blocks: Vec<u32>,
    /// How many of them are kept for others.
    kept: usize,
}

/// A sequence that was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The sequence.
    pub id: RequestId,
    /// Tokens of its prompt that others have computed.
    pub cached: usize,
}

/// What to compute now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The sequences admitted with this step.
    pub admitted: Vec<Admitted>,
    /// Blocks of these that several sequences had read before: no copy of what was in them counts any more.
    pub stale: Vec<u32>,
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
    pub fn new(blocks: u32, keeps_prefixes: bool) -> Self {
        let blocks = Blocks::new(blocks);
        Self { waiting: VecDeque::new(), running: Vec::new(), blocks, arrivals: 0, keeps_prefixes }
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// When even an empty pool could not hold it.
    pub fn add(&mut self, id: RequestId, arrival: Arrival) -> Result<(), NeverFits> {
        let needed = arrival.prompt.len().saturating_add(arrival.max_tokens);
        if Blocks::for_tokens(needed) > self.blocks.total() {
            return Err(NeverFits { needed, total: self.blocks.total() * BLOCK_TOKENS });
        }
        self.arrivals += 1;
        let rank = self.arrivals.saturating_sub(arrival.overtakes);
        let place = self.waiting.partition_point(|other| other.rank <= rank);
        self.waiting.insert(place, Waiting { id, rank, arrival });
        Ok(())
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
        Step { slices: slices.collect(), stale: self.blocks.stale(), admitted }
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
    /// and one more token where it sampled. Sequences that ended are to be removed afterwards. Full blocks of the prompt
    /// are kept for others from now on.
    pub fn commit(&mut self, step: &Step) {
        for slice in &step.slices {
            if let Some(sequence) = self.running.iter_mut().find(|s| s.id == slice.id) {
                sequence.computed += slice.tokens;
                sequence.known += usize::from(slice.samples);
                if self.keeps_prefixes {
                    let prompt = sequence.prompt.clone();
                    sequence.keep(&prompt, &mut self.blocks);
                }
            }
        }
    }

    /// Has a running sequence computed again from its beginning, in its blocks.
    pub fn restart(&mut self, id: RequestId) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.computed = 0;
        }
    }

    /// Takes a sequence out, waiting or running; its blocks are free at once. `tokens` are all that were computed well, by
    /// which they may be found again. Returns whether it was there.
    pub fn remove(&mut self, id: RequestId, tokens: &[u32]) -> bool {
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.running.remove(index);
            if self.keeps_prefixes {
                sequence.keep(tokens, &mut self.blocks);
            }
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

    /// Whether more than one sequence reads a block.
    #[must_use]
    pub fn is_shared(&self, block: u32) -> bool {
        self.blocks.is_shared(block)
    }

    /// How many blocks no sequence has.
    #[must_use]
    pub fn free_blocks(&self) -> usize {
        self.blocks.free()
    }

    /// Admission by rank. A sequence for which there is no room yet holds back those behind it, so a long one cannot
    /// starve; one that waits for another's prompt does not, as that takes a bounded number of steps.
    fn admit(&mut self, limits: &Limits) -> Vec<Admitted> {
        let mut admitted = Vec::new();
        let mut index = 0;
        while self.running.len() < limits.max_sequences
            && let Some(Waiting { id, arrival, .. }) = self.waiting.get(index)
        {
            let found = if self.keeps_prefixes { beginning(&self.blocks, arrival) } else { Vec::new() };
            let waits = || self.running.iter().any(|other| other.will_have_more(arrival, found.len()));
            if self.keeps_prefixes && waits() {
                index += 1;
                continue;
            }
            let needed = Blocks::for_tokens(arrival.prompt.len() + arrival.max_tokens);
            let others = self.waiting.iter().take(PINNING);
            let pinned = |blocks: &Blocks| others.flat_map(|other| beginning(blocks, &other.arrival)).collect();
            let Some(blocks) = self.blocks.take(&found, needed, pinned) else { break };
            let (kept, computed) = (found.len(), found.len() * BLOCK_TOKENS);
            admitted.push(Admitted { id: *id, cached: computed });
            self.running.push(Running {
                id: *id,
                scored: arrival.scored,
                computed,
                known: arrival.prompt.len(),
                prompt: arrival.prompt.clone(),
                blocks,
                kept,
            });
            self.waiting.remove(index);
        }
        admitted
    }
}

/// Of so many that wait, what is kept of their beginnings stays while anything else can go.
const PINNING: usize = 64;

/// Kept blocks with which a prompt begins. Its last token is left over, because something must be computed to sample.
fn beginning(blocks: &Blocks, arrival: &Arrival) -> Vec<u32> {
    match arrival.prompt.split_last() {
        Some((_, tokens)) if !arrival.scored => blocks.find(tokens),
        _ => Vec::new(),
    }
}

impl Running {
    /// Keeps the full blocks of what is computed, of which these are the first tokens.
    fn keep(&mut self, tokens: &[u32], blocks: &mut Blocks) {
        let full = self.computed.min(tokens.len()) / BLOCK_TOKENS;
        if full > self.kept {
            blocks.keep(&mut self.blocks, &tokens[..full * BLOCK_TOKENS], self.kept);
            self.kept = full;
        }
    }

    /// Whether this prompt, which is being computed, will give a sequence more blocks than it would get now.
    fn will_have_more(&self, arrival: &Arrival, found: usize) -> bool {
        if self.computed >= self.prompt.len() || arrival.scored {
            return false;
        }
        let (mine, theirs) = (self.prompt.as_chunks::<BLOCK_TOKENS>().0, &arrival.prompt[..arrival.prompt.len() - 1]);
        let alike = mine.iter().zip(theirs.as_chunks().0).take_while(|(a, b)| a == b).count();
        alike > found
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
