//! The blocks of keys and values: who has which.
//!
//! Never here: the keys and values themselves (a backend holds them), or any policy.

/// Tokens per block.
pub const BLOCK_TOKENS: usize = 16;

/// The pool of blocks. A block is free or lent, never both.
#[derive(Debug)]
pub struct Blocks {
    free: Vec<u32>,
    total: usize,
}

impl Blocks {
    /// A pool of so many blocks, all free.
    #[must_use]
    pub fn new(total: u32) -> Self {
        // Reversed, so that low numbers go out first.
        Self { free: (0..total).rev().collect(), total: total as usize }
    }

    /// How many blocks so many tokens fill.
    #[must_use]
    pub fn for_tokens(tokens: usize) -> usize {
        tokens.div_ceil(BLOCK_TOKENS)
    }

    /// Takes so many blocks, or none when there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(rest))
    }

    /// Gives blocks back.
    pub fn give(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks);
    }

    /// How many blocks are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// How many blocks there are.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }
}
