//! What steps compute and how long they take: arithmetic from a model's shape, and totals of it.
//!
//! Never here: clocks, tensors. Bytes and operations are those that a step needs at least: each weight is read once, each
//! key and value once for every slice of its sequence. What caches save or kernels waste is seen by comparing them with
//! the time taken.

use std::time::Duration;

use crate::config::Config;

/// What a model costs to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights that every step reads.
    pub weight_bytes: u64,
    /// Bytes of the weights of all experts, of which a step reads those that its tokens chose.
    pub expert_bytes: u64,
    /// Experts of a layer, and how many a token chooses; 0 where there are none.
    pub experts: (u64, u64),
    /// Bytes of the keys and values of one token.
    pub kv_bytes: u64,
    /// Operations of one token's products, logits and attention aside: a multiplication and an addition are two.
    pub token_operations: u64,
    /// Operations of one token's logits.
    pub logit_operations: u64,
    /// Operations of attention between one token and one that it sees.
    pub pair_operations: u64,
}

/// The width of a model's numbers in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Bytes of all weights as they were loaded; `None`: as wide as keys and values.
    pub weights: Option<u64>,
    /// Bytes of a value of a key.
    pub kv_value: u64,
}

/// Tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The position of the first.
    pub start: usize,
    /// How many.
    pub tokens: usize,
    /// Of how many the logits are wanted.
    pub outputs: usize,
}

/// What a step reads and computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes of weights, keys and values read and written.
    pub bytes: u64,
    /// Multiplications and additions.
    pub operations: u64,
}

impl Cost {
    /// What a model of this shape costs.
    #[must_use]
    pub fn of(config: &Config, widths: Widths) -> Self {
        // Wide enough for whatever config.json may say.
        let wide = |count: usize| count as u128;
        let narrow = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
        let mlp = |inner: usize| wide(config.hidden) * wide(config.mlp_in(inner).iter().sum::<usize>() + inner);
        let queries = wide(config.heads) * wide(config.head_dim);
        let attention = wide(config.hidden) * (wide(config.qkv_width()) + queries);
        let (mut shared, mut expert, mut chosen) = (0, 0, 0);
        for layer in 0..config.layers {
            shared += attention;
            match config.experts(layer) {
                None => shared += mlp(config.inner),
                Some(experts) => {
                    shared += wide(config.hidden) * wide(experts.count);
                    expert += wide(experts.count) * mlp(experts.inner);
                    chosen += wide(experts.chosen) * mlp(experts.inner);
                }
            }
        }
        let table = wide(config.vocabulary) * wide(config.hidden);
        // An embedding of its own takes room, but a step reads a few rows of it only.
        let stored = shared + expert + table * if config.tied { 1 } else { 2 };
        let bytes_of = |weights: u128| match widths.weights {
            None => narrow(weights * u128::from(widths.kv_value)),
            Some(all) => narrow(u128::from(all) * weights / stored.max(1)),
        };
        Self {
            weight_bytes: bytes_of(shared + table),
            expert_bytes: bytes_of(expert),
            experts: config.experts.as_ref().map_or((0, 0), |experts| (experts.count as u64, experts.chosen as u64)),
            kv_bytes: narrow(
                2 * wide(config.layers) * wide(config.kv_heads * config.head_dim) * u128::from(widths.kv_value),
            ),
            token_operations: narrow(2 * (shared + chosen)),
            logit_operations: narrow(2 * table),
            // A product for the score, one for the value.
            pair_operations: narrow(4 * queries * wide(config.layers)),
        }
    }

    /// What a step of these parts needs.
    #[must_use]
    pub fn work(&self, parts: impl IntoIterator<Item = Part>) -> Work {
        let (mut all, mut tokens_of_all) = (Work::default(), 0);
        for Part { start, tokens, outputs } in parts {
            let [start, tokens, outputs] = [start, tokens, outputs].map(|n| u64::try_from(n).unwrap_or(u64::MAX));
            tokens_of_all += tokens;
            // Keys and values of all that came before are read, those of the part are written and read.
            all.bytes += self.kv_bytes * (start + 2 * tokens);
            let pairs = tokens * start + tokens * (tokens + 1) / 2;
            all.operations += tokens * self.token_operations + outputs * self.logit_operations;
            all.operations += pairs * self.pair_operations;
        }
        if tokens_of_all > 0 {
            let (count, chosen) = self.experts;
            let met = (tokens_of_all * chosen).min(count);
            all.bytes += self.weight_bytes + self.expert_bytes * met / count.max(1);
        }
        all
    }

    /// Bytes of all weights that steps may read.
    #[must_use]
    pub const fn model_bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.expert_bytes)
    }
}

/// A step that was computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Tokens of prompts.
    pub prefill_tokens: u64,
    /// Tokens that were generated before.
    pub decode_tokens: u64,
    /// Sequences that took part.
    pub sequences: u64,
    /// What it needed.
    pub work: Work,
    /// How long it took.
    pub time: Duration,
}

/// All steps of an engine since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// How many.
    pub steps: u64,
    /// Tokens of prompts that were computed.
    pub prefill_tokens: u64,
    /// Tokens that were generated and computed in their turn.
    pub decode_tokens: u64,
    /// The time of prefill: of each step, its part of the step's tokens.
    pub prefill_time: Duration,
    /// The time of decoding.
    pub decode_time: Duration,
    /// Sequences of all steps added up.
    pub sequences: u64,
    /// What all steps needed.
    pub work: Work,
    /// Tokens of the prompts that were admitted.
    pub prompt_tokens: u64,
    /// Of these, what others had computed before.
    pub cached_prompt_tokens: u64,
}

impl Totals {
    /// Adds those of another engine.
    pub fn join(&mut self, other: &Self) {
        self.steps += other.steps;
        self.prefill_tokens += other.prefill_tokens;
        self.decode_tokens += other.decode_tokens;
        self.prefill_time += other.prefill_time;
        self.decode_time += other.decode_time;
        self.sequences += other.sequences;
        self.work.bytes += other.work.bytes;
        self.work.operations += other.work.operations;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_prompt_tokens += other.cached_prompt_tokens;
    }

    /// Adds a step.
    pub fn add(&mut self, step: &Measured) {
        self.steps += 1;
        self.prefill_tokens += step.prefill_tokens;
        self.decode_tokens += step.decode_tokens;
        self.sequences += step.sequences;
        self.work.bytes += step.work.bytes;
        self.work.operations += step.work.operations;
        let tokens = step.prefill_tokens + step.decode_tokens;
        let prefill = step.time.mul_f64(ratio(step.prefill_tokens, tokens));
        self.prefill_time += prefill;
        self.decode_time += step.time.saturating_sub(prefill);
    }

    /// The time of all steps.
    #[must_use]
    pub fn busy(&self) -> Duration {
        self.prefill_time + self.decode_time
    }

    /// Tokens of prompts computed in a second of prefill.
    #[must_use]
    pub fn prefill_tokens_per_s(&self) -> f64 {
        per_s(self.prefill_tokens, self.prefill_time)
    }

    /// Tokens generated in a second of decoding.
    #[must_use]
    pub fn decode_tokens_per_s(&self) -> f64 {
        per_s(self.decode_tokens, self.decode_time)
    }

    /// Sequences in a step, on average.
    #[must_use]
    pub fn sequences_per_step(&self) -> f64 {
        ratio(self.sequences, self.steps)
    }

    /// The part of the prompts' tokens that others had computed before, 0 to 1.
    #[must_use]
    pub fn prefix_hits(&self) -> f64 {
        ratio(self.cached_prompt_tokens, self.prompt_tokens)
    }

    /// Bytes needed in a second of steps.
    #[must_use]
    pub fn bytes_per_s(&self) -> f64 {
        per_s(self.work.bytes, self.busy())
    }

    /// Operations needed in a second of steps.
    #[must_use]
    pub fn operations_per_s(&self) -> f64 {
        per_s(self.work.operations, self.busy())
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn per_s(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn cost(family: &str) -> Cost {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
        Cost::of(&Config::read(&folder).unwrap(), Widths { weights: None, kv_value: 4 })
    }

    const fn part(start: usize, tokens: usize) -> Part {
        Part { start, tokens, outputs: 1 }
    }

    #[test]
    fn a_prompt_needs_the_same_operations_in_one_part_or_in_chunks() {
        let cost = cost("qwen2");
        let whole = cost.work([Part { start: 0, tokens: 96, outputs: 0 }]);
        let chunks = (0..3).map(|n| cost.work([Part { start: 32 * n, tokens: 32, outputs: 0 }]));
        let operations: u64 = chunks.clone().map(|work| work.operations).sum();
        assert_eq!(operations, whole.operations);
        // But each chunk reads the weights, and what came before it.
        let bytes: u64 = chunks.map(|work| work.bytes).sum();
        assert_eq!(bytes, whole.bytes + 2 * cost.weight_bytes + cost.kv_bytes * (32 + 64));
    }

    #[test]
    fn sequences_of_one_step_share_the_weights() {
        let cost = cost("llama3");
        let (one, four) = (cost.work([part(10, 1)]), cost.work([part(10, 1); 4]));
        assert_eq!(four.operations, 4 * one.operations);
        assert_eq!(4 * one.bytes - four.bytes, 3 * cost.weight_bytes);
        assert_eq!(cost.work([]), Work::default());
    }

    #[test]
    fn a_step_reads_the_experts_that_its_tokens_can_choose() {
        let cost = cost("mixtral");
        let (count, chosen) = cost.experts;
        assert!(chosen < count);
        let read = |tokens: usize| {
            cost.work([Part { start: 0, tokens, outputs: 0 }]).bytes
                - cost.weight_bytes
                - cost.kv_bytes * 2 * u64::try_from(tokens).unwrap()
        };
        assert_eq!(read(1), cost.expert_bytes * chosen / count);
        assert_eq!(read(64), cost.expert_bytes);
    }

    #[test]
    fn weights_have_the_bytes_that_were_loaded() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen2");
        let config = Config::read(&folder).unwrap();
        assert!(config.tied);
        let loaded = Cost::of(&config, Widths { weights: Some(1_000), kv_value: 4 });
        assert_eq!(loaded.model_bytes(), 1_000);
    }

    #[test]
    fn time_is_shared_by_tokens() {
        let mut totals = Totals::default();
        let time = Duration::from_secs(4);
        totals.add(&Measured { prefill_tokens: 30, decode_tokens: 10, sequences: 11, time, ..Measured::default() });
        totals.add(&Measured { decode_tokens: 10, sequences: 10, time: Duration::from_secs(1), ..Measured::default() });
        assert_eq!((totals.prefill_time, totals.decode_time), (Duration::from_secs(3), Duration::from_secs(2)));
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        close(totals.prefill_tokens_per_s(), 10.0);
        close(totals.decode_tokens_per_s(), 10.0);
        close(totals.sequences_per_step(), 10.5);
        close(totals.prefix_hits(), 0.0);
        close(Totals::default().bytes_per_s(), 0.0);
    }
}
