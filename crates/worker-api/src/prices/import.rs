//! Prices as LiteLLM publishes them: its JSON file (`model_prices_and_context_window.json`), or its columns as CSV.
//! Pure: text in, rows out.

use super::{Class, Day, Holds, Row};
use genmill_core::money::{Picodollars, Rates};
use serde_json::value::RawValue;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Where prices of a class stand: what follows the names of the fields.
const CLASSES: [(Class, &str); 4] =
    [(Class::Standard, ""), (Class::Batch, "_batches"), (Class::Priority, "_priority"), (Class::Flex, "_flex")];

/// Kinds of models that generate texts.
const MODES: [&str; 3] = ["chat", "completion", "responses"];

/// A file is none of prices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "is neither LiteLLM's JSON file of prices nor CSV with its columns (model, litellm_provider, input_cost_per_token, …)"
)]
pub struct NoPrices;

/// A model as it is written: fields by name, numbers as they stand there.
type Written = HashMap<String, String>;

/// The rows of a file, which hold from `day` on. Models without a price, or with a price of 0 for everything (which
/// stands for "unknown" as often as for "free"), are left out.
///
/// # Errors
/// [`NoPrices`] when the file is none of prices.
pub fn rows(text: &str, day: &Day) -> Result<Vec<Row>, NoPrices> {
    let models = if text.trim_start().starts_with('{') { of_json(text)? } else { of_csv(text)? };
    let mut rows: BTreeMap<(String, String, Holds), Rates> = BTreeMap::new();
    for (name, written) in &models {
        let text = |field: &str| written.get(field).map(String::as_str).unwrap_or_default();
        let mode = text("mode");
        if name == "sample_spec" || name.contains(',') || !(mode.is_empty() || MODES.contains(&mode)) {
            continue;
        }
        let (provider, model) = place(name, text("litellm_provider"));
        for (holds, mut rates) in prices(provider, written, day) {
            if provider == "fireworks_ai" {
                // It publishes this once for all models that have no price of their own for it.
                rates.cached_input.get_or_insert(Picodollars(rates.input.0 / 2));
            }
            rows.entry((provider.to_owned(), model.to_owned(), holds)).or_insert(rates);
        }
    }
    let row = |((provider, model, holds), rates)| Row { provider, model, holds, rates };
    Ok(rows.into_iter().map(row).collect())
}

fn of_json(text: &str) -> Result<Vec<(String, Written)>, NoPrices> {
    let models: BTreeMap<String, HashMap<String, Box<RawValue>>> = serde_json::from_str(text).map_err(|_| NoPrices)?;
    let fields = |fields: HashMap<String, Box<RawValue>>| {
        let bare = |value: &RawValue| value.get().trim_matches('"').to_owned();
        fields.into_iter().map(|(field, value)| (field, bare(&value))).collect()
    };
    Ok(models.into_iter().map(|(name, of)| (name, fields(of))).collect())
}

fn of_csv(text: &str) -> Result<Vec<(String, Written)>, NoPrices> {
    let mut lines = text.lines();
    let columns: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    if !["model", "litellm_provider", "input_cost_per_token"].iter().all(|name| columns.contains(name)) {
        return Err(NoPrices);
    }
    let model = |line: &str| {
        let fields: Written = columns
            .iter()
            .zip(line.split(','))
            .map(|(column, value)| ((*column).to_owned(), value.to_owned()))
            .collect();
        (fields.get("model").cloned().unwrap_or_default(), fields)
    };
    Ok(lines.filter(|line| !line.is_empty()).map(model).collect())
}

/// Whose model a name is, and what its provider calls it.
fn place<'a>(name: &'a str, provider: &'a str) -> (&'a str, &'a str) {
    // Some names have the provider with hyphens.
    let own = |(first, _): &(&str, &str)| first.replace('-', "_") == provider.replace('-', "_");
    let model = name.split_once('/').filter(own).map_or(name, |(_, model)| model);
    let families = [("vertex_ai-", "vertex_ai"), ("bedrock_converse", "bedrock"), ("cohere_chat", "cohere")];
    let family = families.iter().find(|(start, _)| provider.starts_with(start)).map(|(_, family)| *family);
    let Some(family) = family else { return (provider, model) };
    (family, model.strip_prefix(family).and_then(|rest| rest.strip_prefix('/')).unwrap_or(model))
}

/// The prices of a model: for each class, and above each threshold.
fn prices(provider: &str, written: &Written, day: &Day) -> Vec<(Holds, Rates)> {
    let mut found = Vec::new();
    let tiers = tiers(written);
    for (class, behind) in CLASSES {
        // Prices that a tier does not have for itself are those below all thresholds.
        let mut base = None;
        for above in thresholds(written).into_iter().filter(|_| tiers.is_empty() || class != Class::Standard) {
            let tier = if above == 0 { String::new() } else { format!("_above_{}k_tokens", above / 1_000) };
            // The thresholds of a class stand before or behind its name.
            let price = |field: &str| {
                let names = [format!("{field}{tier}{behind}"), format!("{field}{behind}{tier}")];
                names.iter().find_map(|name| Picodollars::parse_dollars(written.get(name)?).ok())
            };
            let Some(rates) = rates(price, base.as_ref()) else { continue };
            base.get_or_insert(rates);
            found.push((Holds { from: day.clone(), class, above: first_above(provider, above) }, rates));
        }
    }
    for (above, tier) in tiers {
        let price = |field: &str| Picodollars::parse_dollars(tier.get(field)?.get()).ok();
        found.extend(rates(price, None).map(|rates| {
            let holds = Holds { from: day.clone(), class: Class::Standard, above };
            (holds, rates)
        }));
    }
    found.retain(|(_, rates)| rates.input.0 + rates.output.0 > 0);
    found
}

/// What `price` has for each kind of token, by the name of its field; what it has not of the cache is as in `base`.
fn rates(price: impl Fn(&str) -> Option<Picodollars>, base: Option<&Rates>) -> Option<Rates> {
    let cached = price("cache_read_input_token_cost").or_else(|| price("input_cost_per_token_cache_hit"));
    let output = price("output_cost_per_token")?;
    Some(Rates {
        input: price("input_cost_per_token")?,
        output,
        cached_input: cached.or_else(|| base?.cached_input),
        cache_write: price("cache_creation_input_token_cost").or_else(|| base?.cache_write),
        reasoning: price("output_cost_per_reasoning_token").filter(|reasoning| *reasoning != output),
    })
}

/// The most tokens of a prompt that are below a threshold: at xAI the threshold itself is above it.
fn first_above(provider: &str, threshold: u64) -> u64 {
    if provider == "xai" { threshold.saturating_sub(1) } else { threshold }
}

/// Prices that are told as a list, each with the range of prompts for which it holds.
fn tiers(written: &Written) -> Vec<(u64, HashMap<String, Box<RawValue>>)> {
    let listed = written.get("tiered_pricing").map(String::as_str).unwrap_or_default();
    let listed: Vec<HashMap<String, Box<RawValue>>> = serde_json::from_str(listed).unwrap_or_default();
    let from = |tier: &HashMap<String, Box<RawValue>>| {
        let range: [f64; 2] = serde_json::from_str(tier.get("range")?.get()).ok()?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of tokens")]
        (range[0] >= 0.0).then(|| range[0] as u64)
    };
    listed.into_iter().filter_map(|tier| Some((from(&tier)?, tier))).collect()
}

/// The numbers of tokens above which other prices hold; 0 first.
fn thresholds(written: &Written) -> BTreeSet<u64> {
    let of = |name: &String| {
        let (_, rest) = name.strip_prefix("input_cost_per_token")?.split_once("_above_")?;
        rest.split_once("k_tokens")?.0.parse::<u64>().ok()?.checked_mul(1_000)
    };
    written.keys().filter_map(of).chain([0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        rows(text, &Day::parse("2026-11-12").unwrap()).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_column_becomes_a_row() {
        let json = r#"{
            "sample_spec": {"litellm_provider": "one of", "mode": "chat", "input_cost_per_token": 1, "output_cost_per_token": 1},
            "gemini/gemini-x": {
                "litellm_provider": "gemini", "mode": "chat",
                "input_cost_per_token": 1.25e-06, "output_cost_per_token": 1e-05, "cache_read_input_token_cost": 1.25e-07,
                "input_cost_per_token_above_200k_tokens": 2.5e-06, "output_cost_per_token_above_200k_tokens": 1.5e-05,
                "input_cost_per_token_batches": 6.25e-07, "output_cost_per_token_batches": 5e-06,
                "input_cost_per_token_priority": 2.5e-06, "output_cost_per_token_priority": 2e-05,
                "input_cost_per_token_above_200k_tokens_priority": 5e-06,
                "output_cost_per_token_above_200k_tokens_priority": 3e-05,
                "input_cost_per_token_flex": 6.25e-07, "output_cost_per_token_flex": 5e-06
            },
            "text-embedding": {"litellm_provider": "openai", "mode": "embedding", "input_cost_per_token": 1e-07, "output_cost_per_token": 0},
            "free": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 0, "output_cost_per_token": 0}
        }"#;
        assert_eq!(
            lines(json),
            [
                "gemini,gemini-x,1250000,10000000,125000,,2026-11-12,,",
                "gemini,gemini-x,2500000,15000000,125000,,2026-11-12,200000,",
                "gemini,gemini-x,625000,5000000,,,2026-11-12,,batch",
                "gemini,gemini-x,2500000,20000000,,,2026-11-12,,priority",
                "gemini,gemini-x,5000000,30000000,,,2026-11-12,200000,priority",
                "gemini,gemini-x,625000,5000000,,,2026-11-12,,flex",
            ]
        );
    }

    #[test]
    fn a_tier_has_the_prices_that_it_does_not_change_and_may_stand_in_a_list() {
        let json = r#"{
            "xai/grok-x": {
                "litellm_provider": "xai", "mode": "chat", "input_cost_per_token": 2e-06, "output_cost_per_token": 4e-06,
                "cache_read_input_token_cost": 1e-06, "output_cost_per_reasoning_token": 3e-06,
                "input_cost_per_token_above_128k_tokens": 4e-06, "output_cost_per_token_above_128k_tokens": 8e-06
            },
            "dashscope/qwen-x": {"litellm_provider": "dashscope", "mode": "chat", "tiered_pricing": [
                {"input_cost_per_token": 5e-08, "output_cost_per_token": 4e-07, "range": [0, 256000.0]},
                {"input_cost_per_token": 2.5e-07, "output_cost_per_token": 2e-06, "range": [256000.0, 1000000.0]}
            ]}
        }"#;
        assert_eq!(
            lines(json),
            [
                "dashscope,qwen-x,50000,400000,,,2026-11-12,,",
                "dashscope,qwen-x,250000,2000000,,,2026-11-12,256000,",
                "xai,grok-x,2000000,4000000,1000000,,2026-11-12,,,3000000",
                "xai,grok-x,4000000,8000000,1000000,,2026-11-12,127999,",
            ]
        );
    }

    #[test]
    fn families_of_a_provider_are_one() {
        let csv = "model,litellm_provider,mode,input_cost_per_token,output_cost_per_token\n\
                   claude-x,vertex_ai-anthropic_models,chat,3e-06,1.5e-05\n\
                   vertex_ai/meta/llama,vertex_ai-llama_models,chat,1e-06,1e-06\n\
                   a.claude-v1:0,bedrock_converse,chat,1e-06,1e-06\ncommand-r,cohere_chat,chat,1e-06,1e-06\n";
        let places: Vec<String> =
            lines(csv).iter().map(|line| line.split(",1000000,").next().unwrap().to_owned()).collect();
        let claude = "vertex_ai,claude-x,3000000,15000000,,,2026-11-12,,";
        assert_eq!(places, ["bedrock,a.claude-v1:0", "cohere,command-r", claude, "vertex_ai,meta/llama"]);
    }

    #[test]
    fn what_is_no_file_of_prices_is_told() {
        for text in ["", "{", "[]", "a,b\n1,2", "<html>"] {
            assert_eq!(rows(text, &Day::default()), Err(NoPrices), "{text}");
        }
    }
}
