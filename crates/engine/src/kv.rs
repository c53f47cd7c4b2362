//! The blocks of keys and values: who has which, and which are kept because somebody may come with the same beginning.
//!
//! Never here: the keys and values themselves (a backend holds them), or who is admitted.
//!
//! A block whose 16 tokens are computed may be kept under its tokens and the kept block before it. Both are compared, not
//! only hashed: a wrong block would be a wrong answer. Kept blocks are immutable and may be read by many sequences. When
//! room is short, those go that nobody reads: first what was never shared, the least lately used first, always from the
//! ends of the chains, so that a beginning that is shared stays. Beginnings that somebody waits for are pinned: they go when
//! nothing else is left.

use std::collections::{BTreeSet, HashMap, HashSet};

/// Tokens per block.
pub const BLOCK_TOKENS: usize = 16;

/// The tokens of a full block.
type Tokens = [u32; BLOCK_TOKENS];

/// The pool of blocks. A block is free, kept, or lent; a kept one may be lent to many.
#[derive(Debug)]
pub struct Blocks {
    free: Vec<u32>,
    states: Vec<State>,
    /// Kept blocks, by the kept block before them and their tokens.
    kept: HashMap<(Option<u32>, Tokens), u32>,
    /// Kept blocks that nobody reads, in the order in which they go.
    idle: BTreeSet<(bool, u64, u32)>,
    /// Counts uses, as a clock.
    uses: u64,
    /// Blocks lent anew that several sequences had read before.
    stale: Vec<u32>,
}

/// What is known of a block.
#[derive(Clone, Debug, Default)]
struct State {
    /// Sequences that have it in their tables.
    readers: u32,
    /// Under what it is kept.
    name: Option<(Option<u32>, Tokens)>,
    /// Whether somebody found it after it was kept.
    shared: bool,
    /// Whether several have read it since it was lent.
    copied: bool,
    used: u64,
}

impl Blocks {
    /// A pool of so many blocks, all free.
    #[must_use]
    pub fn new(total: u32) -> Self {
        // Reversed, so that low numbers go out first.
        let free = (0..total).rev().collect();
        let states = vec![State::default(); total as usize];
        Self { free, states, kept: HashMap::new(), idle: BTreeSet::new(), uses: 0, stale: Vec::new() }
    }

    /// How many blocks so many tokens fill.
    #[must_use]
    pub fn for_tokens(tokens: usize) -> usize {
        tokens.div_ceil(BLOCK_TOKENS)
    }

    /// The kept blocks with which these tokens begin.
    #[must_use]
    pub fn find(&self, tokens: &[u32]) -> Vec<u32> {
        let mut found = Vec::new();
        for tokens in tokens.as_chunks().0 {
            match self.kept.get(&(found.last().copied(), *tokens)) {
                Some(block) => found.push(*block),
                None => break,
            }
        }
        found
    }

    /// A table of `count` blocks that begins with these, which [`Self::find`] found just now. None when there is no room.
    /// `pinned` is asked for whole beginnings that shall stay, where something has to go.
    pub fn take(
        &mut self,
        found: &[u32],
        count: usize,
        pinned: impl FnOnce(&Self) -> HashSet<u32>,
    ) -> Option<Vec<u32>> {
        let fresh = count.checked_sub(found.len())?;
        let idle = found.iter().filter(|block| self.state(**block).readers == 0).count();
        if fresh > self.free() - idle {
            return None;
        }
        for block in found {
            self.rest(*block, false);
            self.state_mut(*block).shared = true;
            self.add_reader(*block);
        }
        let mut table = found.to_vec();
        let pinned = if fresh > self.free.len() { pinned(self) } else { HashSet::new() };
        for _ in 0..fresh {
            let block = self.free.pop().or_else(|| self.evict(&pinned))?;
            let state = self.state_mut(block);
            state.readers = 1;
            if std::mem::take(&mut state.copied) {
                self.stale.push(block);
            }
            table.push(block);
        }
        Some(table)
    }

    /// Keeps the full blocks of a table whose tokens are computed. Where the same is kept already, that takes the block's
    /// place in the table. `from` is how many of them were kept before.
    pub fn keep(&mut self, table: &mut [u32], tokens: &[u32], from: usize) {
        for (index, tokens) in tokens.as_chunks().0.iter().enumerate().skip(from) {
            let before = index.checked_sub(1).map(|before| table[before]);
            let block = table[index];
            match self.kept.get(&(before, *tokens)).copied() {
                Some(same) if same != block => {
                    self.rest(same, false);
                    self.add_reader(same);
                    self.state_mut(block).readers = 0;
                    self.free.push(block);
                    table[index] = same;
                }
                Some(_) => {}
                None => {
                    self.kept.insert((before, *tokens), block);
                    let state = self.state_mut(block);
                    state.name = Some((before, *tokens));
                    state.shared = false;
                }
            }
        }
    }

    /// Gives a table back. What of it is kept stays until room is short.
    pub fn give(&mut self, table: Vec<u32>) {
        // From the end, so that beginnings count as used later and go later.
        for block in table.into_iter().rev() {
            let state = self.state_mut(block);
            state.readers -= 1;
            match (state.readers, state.name) {
                (0, None) => self.free.push(block),
                (0, Some(_)) => self.rest(block, true),
                _ => {}
            }
        }
    }

    /// Blocks lent since the last call that several sequences had read before.
    pub fn stale(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.stale)
    }

    /// Whether more than one sequence reads a block.
    #[must_use]
    pub fn is_shared(&self, block: u32) -> bool {
        self.state(block).readers > 1
    }

    /// How many blocks nobody has.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// How many blocks there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.states.len()
    }

    fn add_reader(&mut self, block: u32) {
        let state = self.state_mut(block);
        state.readers += 1;
        state.copied |= state.readers > 1;
    }

    /// Puts a kept block among those that nobody reads, or takes it out.
    fn rest(&mut self, block: u32, rests: bool) {
        self.uses += 1;
        let uses = self.uses;
        let state = self.state_mut(block);
        let place = (state.shared, state.used, block);
        if rests {
            state.used = uses;
            let place = (state.shared, uses, block);
            self.idle.insert(place);
        } else if state.readers == 0 {
            self.idle.remove(&place);
        }
    }

    /// The block that is missed least. No other begins with it: whoever reads a block reads those before it, which
    /// therefore rest later and are shared as often; and what is pinned is pinned from its beginning.
    fn evict(&mut self, pinned: &HashSet<u32>) -> Option<u32> {
        let free = self.idle.iter().find(|(_, _, block)| !pinned.contains(block));
        let place = *free.or_else(|| self.idle.first())?;
        self.idle.remove(&place);
        let (_, _, block) = place;
        if let Some(name) = self.state_mut(block).name.take() {
            self.kept.remove(&name);
        }
        Some(block)
    }

    fn state(&self, block: u32) -> &State {
        &self.states[block as usize]
    }

    fn state_mut(&mut self, block: u32) -> &mut State {
        &mut self.states[block as usize]
    }
}
