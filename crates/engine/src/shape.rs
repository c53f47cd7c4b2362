//! What changes logits before a token is chosen from them: biases, penalties, ends that may not come yet.
//!
//! Never here: temperature, random numbers. The order is that of vLLM's sampler (`vllm/v1/sample/sampler.py`): ends
//! held off and biases first, then the repetition penalty, then those by frequency and presence.

use std::collections::{BTreeMap, BTreeSet};

use crate::sampler::FORBIDDEN;

/// What changes the logits of a request. The default changes nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Shaping {
    /// Added to the logits of tokens, as OpenAI's `logit_bias`.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Taken from a token's logit once for each time it was generated (OpenAI).
    pub frequency_penalty: f32,
    /// Taken from a token's logit when it was generated at all (OpenAI).
    pub presence_penalty: f32,
    /// Divides a positive logit and multiplies a negative one when the token stands in the prompt or was generated
    /// (Keskar et al. 2019, "CTRL", as transformers and vLLM have it); 1 is off.
    pub repetition_penalty: f32,
    /// No end token comes before so many tokens were generated, and no stop string is looked for in their text (vLLM).
    pub min_tokens: usize,
}

impl Default for Shaping {
    fn default() -> Self {
        Self {
            logit_bias: BTreeMap::new(),
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            min_tokens: 0,
        }
    }
}

/// What changes a row's logits, token by token, for whoever changes them elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct Changes {
    /// As in [`Shaping`].
    pub repetition_penalty: f32,
    /// As in [`Shaping`].
    pub frequency_penalty: f32,
    /// As in [`Shaping`].
    pub presence_penalty: f32,
    /// Each token once.
    pub tokens: Vec<Change>,
    /// A row of the step whose token is not known here and counts as generated once more.
    pub counted: Option<u32>,
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            tokens: Vec::new(),
            counted: None,
        }
    }
}

/// A token whose logit changes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Change {
    /// The token.
    pub token: u32,
    /// What is added to its logit.
    pub bias: f32,
    /// How often it was generated, where that is penalised.
    pub count: u32,
    /// It stands in the prompt or was generated, where that is penalised.
    pub repeats: bool,
    /// It may not come.
    pub forbidden: bool,
}

/// The shaping of one sequence on its way.
#[derive(Debug)]
pub(crate) struct Shaper {
    shaping: Shaping,
    /// The tokens that would end the text.
    ends: Vec<u32>,
    /// The tokens of the prompt, where they count.
    prompt: BTreeSet<u32>,
    /// How often tokens were generated, where that counts.
    generated: BTreeMap<u32, u32>,
    /// Tokens generated so far.
    tokens: usize,
}

impl Shaper {
    /// `ends` are the tokens that would end the text.
    pub(crate) fn new(shaping: Shaping, ends: Vec<u32>, prompt: &[u32]) -> Self {
        let repeats = shaping.repetition_penalty != 1.0;
        let prompt = if repeats { prompt.iter().copied().collect() } else { BTreeSet::new() };
        Self { shaping, ends, prompt, generated: BTreeMap::new(), tokens: 0 }
    }

    /// Counts a generated token.
    pub(crate) fn count(&mut self, token: u32) {
        self.tokens += 1;
        if self.penalises() {
            *self.generated.entry(token).or_default() += 1;
        }
    }

    /// Whether the text may end with the token generated last.
    pub(crate) fn may_end(&self) -> bool {
        self.tokens > self.shaping.min_tokens
    }

    /// Whether the next token's logits stay as they are.
    pub(crate) fn is_off(&self) -> bool {
        !self.penalises() && self.shaping.logit_bias.is_empty() && !self.holds_off()
    }

    /// What [`Self::apply`] does, token by token; or will do, when one more token was generated, which only the device knows:
    /// that of row `on_its_way` of its step.
    pub(crate) fn changes(&self, on_its_way: Option<u32>) -> Changes {
        let Shaping { frequency_penalty, presence_penalty, repetition_penalty, .. } = self.shaping;
        let mut tokens: BTreeMap<u32, Change> = BTreeMap::new();
        let mut of = |token: &u32, change: &dyn Fn(&mut Change)| {
            change(tokens.entry(*token).or_insert(Change { token: *token, ..Change::default() }));
        };
        self.shaping.logit_bias.iter().for_each(|(token, bias)| of(token, &|change| change.bias = *bias));
        if repetition_penalty != 1.0 {
            self.prompt
                .iter()
                .chain(self.generated.keys())
                .for_each(|token| of(token, &|change| change.repeats = true));
        }
        self.generated.iter().for_each(|(token, count)| of(token, &|change| change.count = *count));
        if self.tokens + usize::from(on_its_way.is_some()) < self.shaping.min_tokens {
            self.ends.iter().for_each(|token| of(token, &|change| change.forbidden = true));
        }
        let tokens = tokens.into_values().collect();
        let counted = on_its_way.filter(|_| self.penalises());
        Changes { repetition_penalty, frequency_penalty, presence_penalty, tokens, counted }
    }

    fn penalises(&self) -> bool {
        let Shaping { frequency_penalty, presence_penalty, repetition_penalty, .. } = self.shaping;
        frequency_penalty != 0.0 || presence_penalty != 0.0 || repetition_penalty != 1.0
    }

    fn holds_off(&self) -> bool {
        self.tokens < self.shaping.min_tokens
    }

    /// Changes the logits of the next token.
    pub(crate) fn apply(&self, logits: &mut [f32]) {
        let Shaping { frequency_penalty, presence_penalty, repetition_penalty, .. } = self.shaping;
        for (token, bias) in &self.shaping.logit_bias {
            change(logits, *token, |logit| logit + bias);
        }
        if repetition_penalty != 1.0 {
            let seen = self.prompt.iter().chain(self.generated.keys().filter(|token| !self.prompt.contains(*token)));
            for token in seen {
                let penalised =
                    |logit| if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
                change(logits, *token, penalised);
            }
        }
        for (token, count) in &self.generated {
            #[expect(clippy::cast_precision_loss, reason = "a context has fewer than 2^24 tokens")]
            let count = *count as f32;
            change(logits, *token, |logit| logit - frequency_penalty * count - presence_penalty);
        }
        if self.holds_off() {
            for token in &self.ends {
                change(logits, *token, |_| FORBIDDEN);
            }
        }
    }
}

/// A finite logit stays one, however large what is asked for is.
fn change(logits: &mut [f32], token: u32, change: impl FnOnce(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token as usize).filter(|logit| logit.is_finite()) {
        *logit = change(*logit).clamp(FORBIDDEN, f32::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::{Sampling, Workspace, score};
    use proptest::prelude::*;

    fn shaped(shaping: &Shaping, prompt: &[u32], generated: &[u32], logits: &[f32]) -> Vec<f32> {
        let mut shaper = Shaper::new(shaping.clone(), vec![0, 1], prompt);
        generated.iter().for_each(|token| shaper.count(*token));
        let mut out = logits.to_vec();
        if !shaper.is_off() {
            shaper.apply(&mut out);
        }
        out
    }

    /// The rules of OpenAI's and transformers' documentation, token by token in float64.
    fn reference(shaping: &Shaping, prompt: &[u32], generated: &[u32], logits: &[f32]) -> Vec<f64> {
        let shape = |(token, logit): (u32, &f32)| {
            if generated.len() < shaping.min_tokens && token < 2 {
                return f64::from(FORBIDDEN);
            }
            let count = generated.iter().filter(|one| **one == token).count();
            let mut logit = f64::from(*logit) + f64::from(shaping.logit_bias.get(&token).copied().unwrap_or(0.0));
            if count > 0 || prompt.contains(&token) {
                let penalty = f64::from(shaping.repetition_penalty);
                logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
            }
            logit -= f64::from(shaping.frequency_penalty) * f64::from(u32::try_from(count).unwrap());
            logit - if count > 0 { f64::from(shaping.presence_penalty) } else { 0.0 }
        };
        (0..).zip(logits).map(shape).collect()
    }

    /// Log probabilities by the definition.
    fn log_softmax(logits: &[f64]) -> Vec<f64> {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        logits.iter().map(|logit| logit - largest - sum.ln()).collect()
    }

    fn shaping() -> impl Strategy<Value = Shaping> {
        let bias = proptest::collection::btree_map(0_u32..40, -100.0_f32..100.0, 0..5);
        (bias, -2.0_f32..2.0, -2.0_f32..2.0, 0.1_f32..2.0, 0_usize..6).prop_map(
            |(logit_bias, frequency_penalty, presence_penalty, repetition_penalty, min_tokens)| Shaping {
                logit_bias,
                frequency_penalty,
                presence_penalty,
                repetition_penalty,
                min_tokens,
            },
        )
    }

    proptest! {
        #[test]
        fn logits_are_shaped_as_the_rules_say(
            shaping in shaping(),
            prompt in proptest::collection::vec(0_u32..40, 0..8),
            generated in proptest::collection::vec(0_u32..40, 0..8),
            logits in proptest::collection::vec(-20.0_f32..20.0, 40),
        ) {
            let expected = reference(&shaping, &prompt, &generated, &logits);
            for (found, expected) in shaped(&shaping, &prompt, &generated, &logits).into_iter().zip(expected) {
                prop_assert!((f64::from(found) - expected).abs() <= 1e-4 * expected.abs().max(1.0), "{found} {expected}");
            }
        }

        /// A draw is among the tokens that min_p leaves, and every token left can be drawn.
        #[test]
        fn min_p_leaves_what_the_definition_leaves(
            logits in proptest::collection::vec(-4.0_f32..4.0, 2..200),
            min_p in 0.01_f32..1.0,
            temperature in 0.3_f32..2.0,
            top_p in 0.3_f32..=1.0,
            seed: u64,
        ) {
            let scaled: Vec<f64> = logits.iter().map(|logit| f64::from(*logit) / f64::from(temperature)).collect();
            let probabilities: Vec<f64> = log_softmax(&scaled).into_iter().map(f64::exp).collect();
            let best = probabilities.iter().copied().fold(0.0, f64::max);
            let sampling = Sampling { temperature, top_k: 0, top_p, min_p, seed, sample: 0 };
            let mut workspace = Workspace::default();
            for position in 0..20 {
                let token = sampling.choose(&logits, position, &mut workspace).unwrap();
                prop_assert!(probabilities[token as usize] >= f64::from(min_p) * best * (1.0 - 1e-4));
            }
        }

        #[test]
        fn log_probabilities_are_those_of_the_definition(
            logits in proptest::collection::vec(-30.0_f32..30.0, 1..700),
            top in 0_usize..12,
        ) {
            let expected = log_softmax(&logits.iter().copied().map(f64::from).collect::<Vec<_>>());
            let token = u32::try_from(logits.len() / 2).unwrap();
            let scored = score(&logits, token, top, &mut Workspace::default()).unwrap();
            prop_assert!((f64::from(scored.logprob) - expected[token as usize]).abs() < 1e-4);
            prop_assert_eq!(scored.top.len(), top.min(logits.len()));
            let mut order: Vec<u32> = (0..).take(logits.len()).collect();
            order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
            for ((found, logprob), wanted) in scored.top.iter().zip(order) {
                prop_assert_eq!(*found, wanted);
                prop_assert!((f64::from(*logprob) - expected[wanted as usize]).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn shaping_to_the_limits_leaves_numbers() {
        let sampling = Sampling { temperature: 0.7, top_k: 0, top_p: 0.9, min_p: 0.0, seed: 3, sample: 0 };
        let mut workspace = Workspace::default();
        for (bias, penalty, repetition) in [(3e38, -3e38, 1e-38), (-3e38, 3e38, 3e38), (3e38, 3e38, 1e-38)] {
            let shaping = Shaping {
                logit_bias: BTreeMap::from([(2, bias), (3, -bias)]),
                frequency_penalty: penalty,
                presence_penalty: penalty,
                repetition_penalty: repetition,
                min_tokens: 0,
            };
            let logits = shaped(&shaping, &[1, 2], &[2, 2, 3, 0, 0, 0], &[5.0, -3.0, 2.0, 0.5, 1.0]);
            assert!(logits.iter().all(|logit| logit.is_finite()), "{logits:?}");
            assert!((0..50).all(|position| sampling.choose(&logits, position, &mut workspace).is_ok()));
        }
        // What was none before stays none.
        let shaping = Shaping { logit_bias: BTreeMap::from([(0, 1.0)]), ..Shaping::default() };
        assert!(shaped(&shaping, &[], &[], &[f32::NAN])[0].is_nan());
        assert_eq!(shaped(&shaping, &[], &[], &[f32::INFINITY]), [f32::INFINITY]);
    }

    #[test]
    fn a_forbidden_token_is_never_drawn_however_hot() {
        let shaping = Shaping { min_tokens: 1, ..Shaping::default() };
        let logits = shaped(&shaping, &[], &[], &[50.0, 50.0, 0.0, -80.0]);
        let sampling = Sampling { temperature: 100.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 3, sample: 0 };
        let mut workspace = Workspace::default();
        assert!((0..200).all(|position| sampling.choose(&logits, position, &mut workspace).unwrap() >= 2));
        let greedy = Sampling { temperature: 0.0, ..sampling };
        assert_eq!(greedy.choose(&logits, 0, &mut workspace), Ok(2));
    }
}
