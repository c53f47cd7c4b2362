//! The table of prices, `prices.csv`. Never here: the arithmetic (`genmill_core::money`).

use genmill_core::money::{Picodollars, Rates};
use std::collections::HashMap;

/// Prices by provider and model.
#[derive(Clone, Debug)]
pub struct Prices(HashMap<(&'static str, &'static str), Rates>);

/// Why the table cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("prices.csv, line {line}: not `provider,model,input,output,cached_input,cache_write`")]
pub struct BadPrice {
    line: usize,
}

impl Prices {
    /// The table that this worker was built with.
    ///
    /// # Errors
    /// [`BadPrice`] when the file is malformed, which a test rules out.
    pub fn embedded() -> Result<Self, BadPrice> {
        Self::parse(include_str!("prices.csv"))
    }

    fn parse(text: &'static str) -> Result<Self, BadPrice> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with('#'));
        let rows = lines.skip(1).map(|(index, line)| row(line).ok_or(BadPrice { line: index + 1 }));
        rows.collect::<Result<_, _>>().map(Self)
    }

    /// What a token of a provider's model costs; `None` when nobody published it.
    #[must_use]
    pub fn rates(&self, provider: &str, model: &str) -> Option<Rates> {
        self.0.get(&(provider, model)).copied()
    }
}

fn row(line: &'static str) -> Option<((&'static str, &'static str), Rates)> {
    let fields: Vec<&str> = line.split(',').collect();
    let [provider, model, input, output, cached, written] = fields[..] else { return None };
    let amount = |field: &str| field.parse().map(Picodollars).ok();
    let optional = |field: &str| if field.is_empty() { Some(None) } else { amount(field).map(Some) };
    let (cached_input, cache_write) = (optional(cached)?, optional(written)?);
    Some(((provider, model), Rates { input: amount(input)?, output: amount(output)?, cached_input, cache_write }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(provider: &str, model: &str, expect: Option<(&str, &str, Option<&str>)>) {
        let dollars = |text: &str| Picodollars::parse_dollars(text).unwrap();
        let expect = expect.map(|(input, output, cached)| Rates {
            input: dollars(input),
            output: dollars(output),
            cached_input: cached.map(dollars),
            cache_write: None,
        });
        assert_eq!(Prices::embedded().unwrap().rates(provider, model), expect);
    }

    #[test]
    fn published_prices_are_known() {
        check("openai", "gpt-4", Some(("3e-05", "6e-05", None)));
        check("openai", "gpt-4o", Some(("2.5e-06", "1e-05", Some("1.25e-06"))));
        check("groq", "openai/gpt-oss-20b", Some(("7.5e-08", "3e-07", Some("3.75e-08"))));
    }

    #[test]
    fn an_unknown_price_is_none() {
        check("openai", "no-such-model", None);
        check("groq", "gpt-4", None);
        check("ollama", "llama3", None);
    }

    #[test]
    fn a_malformed_row_is_named() {
        assert_eq!(Prices::parse("# x\nheader\na,b,1,2,,\na,b,1").unwrap_err(), BadPrice { line: 4 });
    }
}
