//! The feed-forward part of a sparse layer: a router chooses a few experts for each row, and each
//! expert computes its rows together.
//!
//! Never here: a sum whose order depends on other rows. Experts take turns by number, so a row's
//! results are added in that order whatever else is in the step.

use crate::architectures;
use crate::backend::{Backend, Write};
use crate::config::{Config, layers};
use crate::decoder::Buffers;
use crate::decoder::layer::{DenseMlp, stored};
use crate::error::LoadError;
use crate::linear::Linear;
use crate::math;
use crate::weights::Weights;

pub(super) struct Experts<B: Backend> {
    router: Linear<B>,
    list: Vec<DenseMlp<B>>,
    hidden: usize,
    chosen: usize,
    normalised: bool,
}

impl<B: Backend> Experts<B> {
    pub(super) fn load(
        backend: &B,
        weights: &mut Weights,
        config: &Config,
        (prefix, row, shape): (&str, &architectures::Experts, &layers::Experts),
    ) -> Result<Self, LoadError> {
        let hidden = config.hidden;
        let router = stored(config, prefix, &row.router);
        // It is small, and what is lost there sends tokens to other experts.
        let router = weights.exactly(|weights| Linear::load(backend, weights, router, hidden, &[shape.count]))?;
        let parts = (&row.mlp_in, &row.mlp_out, shape.inner);
        let list = (0..shape.count)
            .map(|index| {
                let prefix = format!("{prefix}{}.{index}.", row.list);
                DenseMlp::load(backend, weights, config, (&prefix, parts))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { router, list, hidden, chosen: shape.chosen, normalised: shape.normalised })
    }

    /// Multiply-adds of one row.
    pub(super) fn work(&self) -> usize {
        let expert = self.list.first().map_or(0, |expert| expert.weights);
        self.hidden * self.list.len() + self.chosen * expert
    }

    pub(super) fn weights(&self) -> usize {
        self.list.iter().map(|expert| self.hidden + expert.weights).sum()
    }

    /// Adds to the hidden rows what the experts make of the normed ones.
    pub(super) fn forward(&self, backend: &B, rows: usize, room: &mut Buffers<B>) {
        let count = self.list.len();
        self.router.forward(backend, (&room.normed, rows), &mut room.routing, Write::Set);
        let scores = backend.read(&mut room.routing, rows * count);
        let groups = groups(scores, count, |scores| choose(scores, self.chosen, self.normalised));
        for (expert, rows) in self.list.iter().zip(groups).filter(|(_, rows)| !rows.is_empty()) {
            let picked: Vec<u32> = rows.iter().map(|(row, _)| *row).collect();
            backend.pick(&room.normed, &picked, self.hidden, &mut room.attended);
            let between = (&mut room.mlp_in, &mut room.inner);
            expert.forward(backend, (&room.attended, rows.len()), between, (&mut room.added, Write::Set));
            backend.add_rows(&room.added, &rows, self.hidden, &mut room.hidden);
        }
    }
}

/// For each expert its rows, ascending, with their weights.
fn groups(scores: &[f32], experts: usize, choose: impl Fn(&[f32]) -> Vec<(usize, f32)>) -> Vec<Vec<(u32, f32)>> {
    let mut groups = vec![Vec::new(); experts];
    for (row, scores) in (0..).zip(scores.chunks_exact(experts)) {
        for (expert, weight) in choose(scores) {
            groups[expert].push((row, weight));
        }
    }
    groups
}

/// The experts of the highest scores with their shares of all probability, or of theirs together
/// when these are normalised. Of equal scores the first holds.
fn choose(scores: &[f32], count: usize, normalised: bool) -> Vec<(usize, f32)> {
    let largest = math::largest(scores);
    let mut shares: Vec<(usize, f32)> = scores.iter().map(|score| math::exp(score - largest)).enumerate().collect();
    divide_by_sum(&mut shares);
    shares.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    shares.truncate(count);
    if normalised {
        divide_by_sum(&mut shares);
    }
    shares
}

fn divide_by_sum(shares: &mut [(usize, f32)]) {
    let total: f32 = shares.iter().map(|(_, share)| share).sum();
    shares.iter_mut().for_each(|(_, share)| *share /= total);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The experts in order, with their shares.
    fn check(scores: &[f32], count: usize, normalised: bool, expected: &[(usize, f32)]) {
        let chosen = choose(scores, count, normalised);
        assert_eq!(chosen.len(), expected.len());
        for ((expert, share), (expected_expert, expected_share)) in chosen.iter().zip(expected) {
            assert_eq!(expert, expected_expert);
            assert!((share - expected_share).abs() < 1e-6, "{share}");
        }
    }

    #[test]
    fn the_best_experts_are_chosen_with_their_probability() {
        let ln = f32::ln;
        check(&[ln(1.0), ln(4.0), ln(3.0), ln(2.0)], 2, false, &[(1, 0.4), (2, 0.3)]);
        check(&[ln(1.0), ln(4.0), ln(3.0), ln(2.0)], 2, true, &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
        check(&[0.0; 4], 3, false, &[(0, 0.25), (1, 0.25), (2, 0.25)]);
    }

    #[test]
    fn scores_that_are_no_numbers_still_choose() {
        assert_eq!(choose(&[f32::NAN, 1.0, f32::NAN], 2, true).len(), 2);
        assert!(choose(&[f32::NAN, 1.0], 1, false)[0].1.is_nan());
    }
}
