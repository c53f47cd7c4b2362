//! The worst step, computed once before the first request: memory is taken and weights are laid out while nobody waits,
//! and what would break there breaks at the start.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::ask::Ask;
use crate::backend::Batch;
use crate::decoder::Forward;
use crate::engine::Request;
use crate::kv::BLOCK_TOKENS;
use crate::sampler::Sampling;
use crate::schedule::Limits;
use crate::shape::{Change, Changes};

/// Runs it.
///
/// # Errors
/// With the words of a panic.
pub(super) fn dry_run(forward: &mut dyn Forward, limits: &Limits, blocks: u32, context: usize) -> Result<(), String> {
    let mut batch = worst(limits, blocks, context);
    let pool = forward.pool();
    let vocabulary = forward.vocabulary();
    let mut compute = || {
        if forward.chooses() {
            let outputs = batch.outputs.len();
            forward.start(&mut batch);
            forward.choose(&vec![ask(vocabulary); outputs]);
            forward.chosen();
        } else {
            forward.forward(&batch);
        }
    };
    let computed = catch_unwind(AssertUnwindSafe(|| match &pool {
        Some(pool) => pool.install(compute),
        None => compute(),
    }));
    // The keys and values of no sequence.
    forward.forget(&batch.tables);
    computed.map_err(|panic| {
        let words =
            panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        words.unwrap_or("a panic without words").to_owned()
    })
}

/// Whatever can be asked for a row.
fn ask(vocabulary: usize) -> Ask {
    let sampling = Sampling { temperature: 1.0, top_k: 2, top_p: 0.9, min_p: 0.1, seed: 0, sample: 0 };
    let changes = Changes { tokens: vec![Change { bias: 1.0, ..Change::default() }], ..Changes::default() };
    let allowed = Some(vec![u32::MAX; vocabulary.div_ceil(32)]);
    Ask { sampling, position: 0, known: None, changes, allowed, logprobs: Some(Request::LOGPROBS_MAX) }
}

/// As many sequences as there may be, each with a token, and one with the longest chunk.
fn worst(limits: &Limits, blocks: u32, context: usize) -> Batch {
    let mut batch = Batch::default();
    let mut free = 0..blocks;
    let others = limits.max_sequences.min(blocks as usize).saturating_sub(1);
    let longest = limits.step_tokens.saturating_sub(others).min(context);
    let longest = longest.min((blocks as usize - others) * BLOCK_TOKENS).max(1);
    for tokens in std::iter::once(longest).chain(std::iter::repeat_n(1, others)) {
        let table: Vec<u32> = free.by_ref().take(tokens.div_ceil(BLOCK_TOKENS)).collect();
        batch.push(&vec![0; tokens], 0, tokens, &table);
        batch.share(|_| false);
        batch.want_logits();
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check((step_tokens, max_sequences): (usize, usize), blocks: u32, context: usize, expect: (usize, usize)) {
        let batch = worst(&Limits { step_tokens, max_sequences }, blocks, context);
        assert_eq!((batch.rows(), batch.outputs.len()), expect);
        assert!(batch.tables.iter().all(|block| *block < blocks));
        let mut tables = batch.tables.clone();
        tables.dedup();
        assert_eq!(tables.len(), batch.tables.len(), "no block twice");
    }

    #[test]
    fn the_worst_step_is_as_large_as_any_can_be() {
        check((512, 32), 4096, 4096, (512, 32));
        check((512, 32), 4096, 100, (131, 32));
        check((512, 32), 34, 4096, (31 + 3 * 16, 32));
        check((512, 32), 4, 4096, (3 + 16, 4));
        check((1, 1), 1, 1, (1, 1));
    }
}
