//! What the sampler is told of the rows of a step, as sampler.cu reads it.
//!
//! Never here: how a token is chosen.

use crate::ask::Ask;
use crate::shape::Change;

/// Stands for no token, no mask, and no log probabilities.
pub(crate) const NONE: u32 = u32::MAX;

/// A row of the sampler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SamplerRow {
    pub(crate) seed: u64,
    pub(crate) sample: u32,
    pub(crate) position: u32,
    /// 0 takes the best token.
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    /// 0 considers all.
    pub(crate) top_k: u32,
    pub(crate) repetition: f32,
    pub(crate) frequency: f32,
    pub(crate) presence: f32,
    /// Its part of the entries.
    pub(crate) entries: [u32; 2],
    /// The first word of its mask, or [`NONE`].
    pub(crate) mask: u32,
    /// How many best tokens are told with their log probabilities, or [`NONE`].
    pub(crate) logprobs: u32,
    /// A token that is scored and not chosen, or [`NONE`].
    pub(crate) known: u32,
    /// Its number among the rows whose logits change, or [`NONE`].
    pub(crate) shaped: u32,
    /// A row of the step whose token counts as generated once more, or [`NONE`].
    pub(crate) counted: u32,
}

impl SamplerRow {
    /// The struct of sampler.cu.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.seed.to_le_bytes().to_vec();
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        bytes.extend([self.sample, self.position].map(u32::to_le_bytes).concat());
        bytes.extend(floats(&[self.temperature, self.top_p, self.min_p]));
        bytes.extend(self.top_k.to_le_bytes());
        bytes.extend(floats(&[self.repetition, self.frequency, self.presence]));
        let [first, end] = self.entries;
        let rest = [first, end, self.mask, self.logprobs, self.known, self.shaped, self.counted];
        bytes.extend(rest.map(u32::to_le_bytes).concat());
        bytes
    }
}

/// The struct of sampler.cu.
pub(crate) fn entry_bytes(change: &Change) -> Vec<u8> {
    let Change { token, bias, count, repeats, forbidden } = *change;
    let flags = u32::from(repeats) | u32::from(forbidden) << 1;
    [token, bias.to_bits(), count, flags].map(u32::to_le_bytes).concat()
}

/// Rows that are sampled with one launch.
#[derive(Debug, Default)]
pub(crate) struct Sampled {
    pub(crate) rows: Vec<SamplerRow>,
    pub(crate) entries: Vec<Change>,
    pub(crate) masks: Vec<u32>,
    /// Rows whose logits change.
    pub(crate) shaped: usize,
}

/// The rows of a step, in order. Of those that change their logits so many go with one launch at most, and with so many
/// entries unless a single row has more: so the memory for them has a bound.
pub(crate) fn sampled(asks: &[Ask], shaped_max: usize, entries_max: usize) -> Vec<Sampled> {
    let mut launches: Vec<Sampled> = Vec::new();
    for ask in asks {
        let (shapes, entries) = (ask.shapes(), ask.changes.tokens.len());
        let full = |launch: &Sampled| {
            shapes && launch.shaped > 0 && (launch.shaped == shaped_max || launch.entries.len() + entries > entries_max)
        };
        if launches.last().is_none_or(full) {
            launches.push(Sampled::default());
        }
        if let Some(launch) = launches.last_mut() {
            launch.push(ask);
        }
    }
    launches
}

impl Sampled {
    fn push(&mut self, ask: &Ask) {
        let narrow = |number: usize| u32::try_from(number).unwrap_or(NONE);
        let Ask { sampling, position, known, changes, allowed, logprobs } = ask;
        let mut row = SamplerRow {
            seed: sampling.seed,
            sample: sampling.sample,
            position: *position,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            // More than there are tokens is as good as all.
            top_k: u32::try_from(sampling.top_k).unwrap_or(0),
            repetition: changes.repetition_penalty,
            frequency: changes.frequency_penalty,
            presence: changes.presence_penalty,
            entries: [0, 0],
            mask: NONE,
            logprobs: logprobs.map_or(NONE, narrow),
            known: known.unwrap_or(NONE),
            shaped: NONE,
            counted: changes.counted.unwrap_or(NONE),
        };
        if ask.shapes() {
            row.shaped = narrow(self.shaped);
            self.shaped += 1;
            let first = self.entries.len();
            self.entries.extend(&changes.tokens);
            row.entries = [first, self.entries.len()].map(narrow);
            if let Some(mask) = allowed {
                row.mask = narrow(self.masks.len());
                self.masks.extend(mask);
            }
        }
        self.rows.push(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Changes;

    fn ask(entries: u32, masked: bool) -> Ask {
        let tokens = (0..entries).map(|token| Change { token, ..Change::default() }).collect();
        let changes = Changes { tokens, ..Changes::default() };
        Ask { known: None, changes, allowed: masked.then(|| vec![3, 4]), ..Ask::nothing() }
    }

    #[test]
    fn launches_keep_within_the_memory_for_changes() {
        let asks =
            [ask(0, false), ask(2, false), ask(0, true), ask(0, false), ask(9, true), ask(1, false), ask(2, false)];
        let shape = |launch: &Sampled| (launch.rows.len(), launch.shaped, launch.entries.len(), launch.masks.len());
        let launches = sampled(&asks, 2, 6);
        // One row alone has more entries than there may be, and goes alone.
        assert_eq!(launches.iter().map(shape).collect::<Vec<_>>(), [(4, 2, 2, 2), (1, 1, 9, 2), (2, 2, 3, 0)]);
        let rows: Vec<_> = launches[0].rows.iter().map(|row| (row.shaped, row.entries, row.mask)).collect();
        assert_eq!(rows, [(NONE, [0, 0], NONE), (0, [0, 2], NONE), (1, [2, 2], 0), (NONE, [0, 0], NONE)]);
    }

    #[test]
    fn a_token_that_is_known_changes_nothing() {
        let known = Ask { known: Some(7), ..ask(3, true) };
        let [launch] = sampled(&[known], 1, 1).try_into().unwrap();
        assert_eq!((launch.rows[0].known, launch.rows[0].shaped, launch.entries.len()), (7, NONE, 0));
    }
}
