//! What a model gets of the memory for all: weights and buffers as they are, keys and values as far as it goes.
//!
//! Never here: which model gets it (that is `swap`), or how much there is.

use anyhow::Context as _;
use genmill_engine::{EngineOptions, Footprint};

/// With fewer tokens of keys and values a model is not served: few requests would fit.
const KV_TOKENS_MIN: usize = 256;

/// What a model needs of the memory, and could use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    footprint: Footprint,
    fixed_bytes: u64,
    activation_bytes: u64,
    /// Longest sequence in tokens.
    pub(crate) context_tokens: usize,
    /// Tokens of keys and values that it could use.
    wanted_tokens: usize,
}

/// How a model's memory is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) weights_bytes: u64,
    pub(crate) activation_bytes: u64,
    pub(crate) kv_bytes: u64,
    pub(crate) kv_tokens: usize,
    /// The tokens of keys and values that it could have used, where it gets fewer.
    pub(crate) short_of: Option<usize>,
}

impl Plan {
    /// All of it.
    pub(crate) const fn bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.activation_bytes).saturating_add(self.kv_bytes)
    }
}

impl Needs {
    /// Those of an engine of that size; `context_limit` as the configuration has it.
    pub(crate) fn new(footprint: Footprint, options: &EngineOptions, context_limit: Option<usize>) -> Self {
        let context_tokens = footprint.context_tokens.min(context_limit.unwrap_or(usize::MAX)).max(1);
        let all_sequences = context_tokens.saturating_mul(options.max_sequences);
        let activation_bytes = footprint.activation_bytes(options);
        Self {
            footprint,
            fixed_bytes: footprint.weights_bytes.saturating_add(activation_bytes),
            activation_bytes,
            context_tokens,
            wanted_tokens: options.kv_tokens.min(all_sequences),
        }
    }

    fn with_tokens(&self, tokens: usize) -> u64 {
        self.fixed_bytes.saturating_add(self.footprint.kv_bytes(tokens.min(self.wanted_tokens)))
    }

    /// Bytes below which it is not served.
    pub(crate) fn least_bytes(&self) -> u64 {
        self.with_tokens(self.context_tokens.min(KV_TOKENS_MIN))
    }

    /// Bytes with which its longest sequence can be computed.
    pub(crate) fn fair_bytes(&self) -> u64 {
        self.with_tokens(self.context_tokens)
    }

    /// Divides at most `bytes`. `None` when it cannot be served with so few.
    pub(crate) fn plan(&self, bytes: u64) -> Option<Plan> {
        if bytes < self.least_bytes() {
            return None;
        }
        let fits = self.footprint.kv_tokens(bytes - self.fixed_bytes);
        let kv_tokens = self.wanted_tokens.min(fits);
        Some(Plan {
            weights_bytes: self.footprint.weights_bytes,
            activation_bytes: self.activation_bytes,
            kv_bytes: self.footprint.kv_bytes(kv_tokens),
            kv_tokens,
            short_of: (kv_tokens < self.wanted_tokens).then_some(self.wanted_tokens),
        })
    }

    /// A plan as far as it can be kept once the weights are loaded and `bytes` are left for the rest: memory may have gone
    /// meanwhile. `None` when too few are.
    pub(crate) fn after_load(&self, plan: Plan, bytes: u64) -> Option<Plan> {
        let fits = self.footprint.kv_tokens(bytes.saturating_sub(self.activation_bytes));
        if fits >= plan.kv_tokens {
            return Some(plan);
        }
        (fits >= self.context_tokens.min(KV_TOKENS_MIN).min(self.wanted_tokens)).then(|| Plan {
            kv_bytes: self.footprint.kv_bytes(fits),
            kv_tokens: fits,
            short_of: Some(self.wanted_tokens),
            ..plan
        })
    }

    /// Why it can never be served with `bytes`.
    pub(crate) fn never_fits(&self, bytes: u64) -> String {
        format!(
            "it needs {} ({} of weights, {} of activations and the keys and values of {} tokens), and may take {}: set \
             gpu.memory (GPU_MAX_MEMORY) or gpu.memory_utilization higher, or gpu.step_tokens lower",
            shown(self.least_bytes()),
            shown(self.footprint.weights_bytes),
            shown(self.activation_bytes),
            self.context_tokens.min(KV_TOKENS_MIN).min(self.wanted_tokens),
            shown(bytes)
        )
    }
}

/// Bytes for people.
pub(crate) fn shown(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.iter().find(|(_, size)| bytes >= *size) {
        Some((unit, size)) => format!("{}.{} {unit}", bytes / size, bytes % size * 10 / size),
        None => format!("{bytes} B"),
    }
}

/// A part of so many bytes.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a part of a number of bytes, rounded"
)]
pub(crate) fn part(bytes: u64, part: f64) -> u64 {
    (bytes as f64 * part) as u64
}

/// Reads an amount of memory such as `24GiB`, `500 MB` or `1.5g`; units without an `i` are powers of 1,000 but for single
/// letters.
///
/// # Errors
/// When it is none.
pub(crate) fn parse_bytes(text: &str) -> anyhow::Result<u64> {
    let text = text.trim();
    let split = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let size: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        _ => anyhow::bail!("`{text}` is no amount of memory: write a number with KiB, MiB, GiB, KB, MB or GB"),
    };
    let number: f64 = number.parse().with_context(|| format!("`{text}` is no amount of memory"))?;
    let bytes = part(size, number);
    anyhow::ensure!(bytes > 0, "`{text}` is no memory at all");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_engine::LoadOptions;
    use std::path::Path;

    fn needs(kv_tokens: usize, context_limit: Option<usize>) -> Needs {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/qwen2");
        let footprint = Footprint::read(&folder, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap();
        Needs::new(footprint, &EngineOptions { kv_tokens, ..EngineOptions::default() }, context_limit)
    }

    #[test]
    fn what_is_left_after_weights_and_buffers_goes_to_keys_and_values() {
        let needs = needs(4096, None);
        let plan = needs.plan(u64::MAX).unwrap();
        assert_eq!((plan.kv_tokens, plan.short_of), (4096, None), "no more than wanted");
        assert_eq!(plan.bytes(), needs.fixed_bytes + needs.footprint.kv_bytes(4096));
        let short = needs.plan(needs.fixed_bytes + needs.footprint.kv_bytes(1000) + 1).unwrap();
        assert_eq!((short.kv_tokens, short.short_of), (1008, Some(4096)), "whole blocks, and it is told");
        assert!(short.bytes() <= plan.bytes());
    }

    #[test]
    fn what_can_never_fit_is_told_with_the_numbers() {
        let needs = needs(65_536, None);
        assert_eq!(needs.plan(needs.least_bytes()).map(|plan| plan.kv_tokens), Some(256));
        assert_eq!(needs.plan(needs.least_bytes() - 1), None);
        let reason = needs.never_fits(1000);
        assert!(
            reason.contains("1000 B") && reason.contains("of weights") && reason.contains("256 tokens"),
            "{reason}"
        );
    }

    #[test]
    fn what_went_while_weights_were_loaded_leaves_fewer_blocks() {
        let needs = needs(4096, None);
        let plan = needs.plan(u64::MAX).unwrap();
        let left = |tokens| needs.activation_bytes + needs.footprint.kv_bytes(tokens);
        assert_eq!(needs.after_load(plan, left(4096)), Some(plan));
        let short = needs.after_load(plan, left(1000)).unwrap();
        assert_eq!((short.kv_tokens, short.short_of), (1008, Some(4096)));
        assert_eq!(short.kv_bytes, needs.footprint.kv_bytes(1008));
        assert_eq!(needs.after_load(plan, left(256)).map(|plan| plan.kv_tokens), Some(256));
        assert_eq!(needs.after_load(plan, left(256) - 1), None);
        assert_eq!(needs.after_load(plan, 0), None);
    }

    #[test]
    fn nothing_is_taken_that_could_not_be_used() {
        let needs = needs(1_000_000, Some(64));
        assert_eq!(needs.plan(u64::MAX).map(|plan| plan.kv_tokens), Some(32 * 64), "all sequences at their longest");
        assert!(needs.least_bytes() <= needs.fair_bytes());
    }

    #[test]
    fn amounts_of_memory_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            ("1.5 g", 3 << 29),
            ("500MB", 500_000_000),
            ("7", 7),
            ("2k", 2048),
            ("1TB", 1_000_000_000_000),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GiB", "-1GB", "1 apple", "0", "1.2.3G"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert_eq!(
            (shown(3 << 29), shown(5), shown(10 << 20)),
            ("1.5 GiB".to_owned(), "5 B".to_owned(), "10.0 MiB".to_owned())
        );
    }
}
