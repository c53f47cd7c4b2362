//! Money as integers, and the price of a call. Never here: price tables (they are data of the API worker).

use crate::attempt::{Usage, UsageDetails};
use serde::{Deserialize, Serialize};

/// An exact amount in picodollars (10^-12 US dollars), the unit of prices, attempts and the ledger.
///
/// Nearly all published prices per token are whole multiples of it. Stored as a decimal string, because no stored
/// number type holds it everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Picodollars(pub u128);

/// What something cost. Stored as the decimal string of its amount, behind a `~` when that is estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cost {
    /// How much.
    pub amount: Picodollars,
    /// The provider did not tell: it follows from tokens that were counted here.
    pub estimated: bool,
}

impl Cost {
    /// Nothing.
    pub const NOTHING: Self = Self::exact(Picodollars(0));

    /// What was billed.
    #[must_use]
    pub const fn exact(amount: Picodollars) -> Self {
        Self { amount, estimated: false }
    }

    /// About what was billed.
    #[must_use]
    pub const fn estimated(amount: Picodollars) -> Self {
        Self { amount, estimated: true }
    }

    /// The sum, which is estimated when a part of it is.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { amount: self.amount.plus(other.amount), estimated: self.estimated || other.estimated }
    }
}

impl TryFrom<String> for Cost {
    type Error = BadAmount;
    fn try_from(text: String) -> Result<Self, BadAmount> {
        match text.strip_prefix('~') {
            Some(amount) => amount.to_owned().try_into().map(Self::estimated),
            None => text.try_into().map(Self::exact),
        }
    }
}

impl From<Cost> for String {
    fn from(cost: Cost) -> Self {
        let amount = Self::from(cost.amount);
        if cost.estimated { format!("~{amount}") } else { amount }
    }
}

/// An amount in nanodollars (10^-9 US dollars), the unit of counters and of the API. Rounded up from picodollars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanodollars(pub u64);

/// Why a text is not an amount of money.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an amount of money: write a decimal number of at least 0, such as 0.25 or 1e-06")]
pub struct BadAmount {
    /// What was given, shortened.
    pub text: String,
}

impl Picodollars {
    /// The sum; stays at the largest amount instead of overflowing.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// This amount `count` times; stays at the largest amount instead of overflowing.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self(self.0.saturating_mul(u128::from(count)))
    }

    /// The amount in nanodollars, rounded up, at most [`u64::MAX`].
    #[must_use]
    pub fn to_nanodollars(self) -> Nanodollars {
        Nanodollars(u64::try_from(self.0.div_ceil(1_000)).unwrap_or(u64::MAX))
    }

    /// Reads an amount of dollars written as a decimal number, with or without an exponent: `3`, `0.25`, `1.5e-07`.
    /// What lies below a picodollar is rounded to the nearest, half up. No floating point is involved.
    ///
    /// # Errors
    /// [`BadAmount`] when `text` is no such number, is negative, or is above 10^20 dollars.
    pub fn parse_dollars(text: &str) -> Result<Self, BadAmount> {
        parse_scaled(text.trim(), 12).map(Self).ok_or_else(|| BadAmount { text: text.chars().take(40).collect() })
    }
}

/// `text` times 10^`scale`, rounded half up to a whole number.
fn parse_scaled(text: &str, scale: i32) -> Option<u128> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits: String = [whole, fraction].concat();
    if digits.is_empty() || digits.len() > 40 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let shift = scale.checked_add(exponent)?.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    let power = 10_u128.checked_pow(shift.unsigned_abs());
    let value: u128 = digits.parse().ok()?;
    match (shift >= 0, power) {
        (true, Some(power)) => value.checked_mul(power).filter(|v| *v <= 10_u128.pow(32)),
        (true, None) => (value == 0).then_some(0),
        (false, Some(power)) => Some(value.checked_add(power / 2)? / power),
        (false, None) => Some(0),
    }
}

impl TryFrom<String> for Picodollars {
    type Error = BadAmount;
    fn try_from(text: String) -> Result<Self, BadAmount> {
        text.parse().map(Self).map_err(|_| BadAmount { text: text.chars().take(40).collect() })
    }
}

impl From<Picodollars> for String {
    fn from(amount: Picodollars) -> Self {
        amount.0.to_string()
    }
}

impl std::fmt::Display for Nanodollars {
    /// As dollars with all nine decimals that are not trailing zeros, at least two: `$0.10`, `$0.000875`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let decimals = format!("{:09}", self.0 % 1_000_000_000);
        let kept = decimals.trim_end_matches('0').len().max(2);
        write!(f, "${}.{}", self.0 / 1_000_000_000, &decimals[..kept])
    }
}

/// What one token costs, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// A token of the prompt.
    pub input: Picodollars,
    /// A generated token.
    pub output: Picodollars,
    /// A token of the prompt that came from the provider's cache; `None`: as any other token of the prompt.
    pub cached_input: Option<Picodollars>,
    /// A token of the prompt that the provider wrote to its cache; `None`: as any other token of the prompt.
    pub cache_write: Option<Picodollars>,
    /// A token of what the model thought; `None`: as any other generated token.
    pub reasoning: Option<Picodollars>,
}

/// What `usage`, of which `details` are parts, costs at `rates`: the sum of tokens times price, exact.
#[must_use]
pub fn price(usage: &Usage, details: &UsageDetails, rates: &Rates) -> Picodollars {
    let cached = usage.cached_prompt_tokens.min(usage.prompt_tokens);
    let written = details.cache_write_tokens.min(usage.prompt_tokens - cached);
    let fresh = usage.prompt_tokens - cached - written;
    let cached = rates.cached_input.unwrap_or(rates.input).times(cached);
    let written = rates.cache_write.unwrap_or(rates.input).times(written);
    let thought = details.reasoning_tokens.min(usage.completion_tokens);
    let said = rates.output.times(usage.completion_tokens - thought);
    let thought = rates.reasoning.unwrap_or(rates.output).times(thought);
    rates.input.times(fresh).plus(cached).plus(written).plus(said).plus(thought)
}

/// What `engine_us` microseconds of an engine cost at `per_hour`, rounded up to a picodollar.
#[must_use]
pub fn price_of_engine_time(engine_us: u64, per_hour: Picodollars) -> Picodollars {
    Picodollars(per_hour.times(engine_us).0.div_ceil(3_600_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_stored_with_its_mark_and_one_without_is_exact() {
        for (stored, cost) in [("7", Cost::exact(Picodollars(7))), ("~7", Cost::estimated(Picodollars(7)))] {
            assert_eq!(Cost::try_from(stored.to_owned()).unwrap(), cost);
            assert_eq!(String::from(cost), stored);
        }
        for bad in ["", "~", "~~7", "7~", "-7"] {
            assert!(Cost::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        let sum = Cost::exact(Picodollars(1)).plus(Cost::estimated(Picodollars(2)));
        assert_eq!(sum, Cost::estimated(Picodollars(3)));
    }
    use proptest::prelude::*;

    fn dollars(text: &str) -> Picodollars {
        Picodollars::parse_dollars(text).unwrap()
    }

    fn check(usage: (u64, u64, u64), rates: (&str, &str, &str), expect: &str) {
        let usage = Usage { prompt_tokens: usage.0, cached_prompt_tokens: usage.1, completion_tokens: usage.2 };
        let cached_input = (!rates.1.is_empty()).then(|| dollars(rates.1));
        let rates = Rates {
            input: dollars(rates.0),
            cached_input,
            output: dollars(rates.2),
            cache_write: None,
            reasoning: None,
        };
        assert_eq!(price(&usage, &UsageDetails::default(), &rates), dollars(expect));
    }

    #[test]
    fn a_call_costs_the_sum_of_tokens_times_price() {
        // 100 calls of 500 + 500 tokens at $0.001 and $0.03 per 1,000 tokens.
        check((50_000, 0, 50_000), ("1e-06", "", "1e-06"), "0.10");
        check((50_000, 0, 50_000), ("3e-05", "", "3e-05"), "3.00");
        check((1_000, 0, 500), ("2.5e-07", "", "1.25e-06"), "0.000875");
        check((1_000, 400, 0), ("1e-06", "1e-07", "0"), "0.00064");
        check((1_000, 400, 0), ("1e-06", "", "0"), "0.001");
    }

    #[test]
    fn tokens_written_to_a_cache_have_a_price_of_their_own() {
        let usage = Usage { prompt_tokens: 12_307, cached_prompt_tokens: 0, completion_tokens: 550 };
        let (input, output, cache_write) = (dollars("3e-06"), dollars("1.5e-05"), Some(dollars("3.75e-06")));
        let rates = Rates { input, output, cached_input: None, cache_write, reasoning: None };
        let details = UsageDetails { cache_write_tokens: 12_304, reasoning_tokens: 500 };
        assert_eq!(price(&usage, &details, &rates), dollars("0.054399"));
    }

    #[test]
    fn tokens_of_thought_have_a_price_of_their_own() {
        let usage = Usage { prompt_tokens: 0, cached_prompt_tokens: 0, completion_tokens: 550 };
        let (input, output, reasoning) = (dollars("2e-06"), dollars("8e-06"), Some(dollars("3e-06")));
        let rates = Rates { input, output, cached_input: None, cache_write: None, reasoning };
        let costs = |reasoning_tokens| price(&usage, &UsageDetails { cache_write_tokens: 0, reasoning_tokens }, &rates);
        assert_eq!([costs(0), costs(500), costs(900)], [dollars("0.0044"), dollars("0.0019"), dollars("0.00165")]);
    }

    #[test]
    fn engine_time_is_rounded_up() {
        assert_eq!(price_of_engine_time(3_600_000_000, dollars("2")), dollars("2"));
        assert_eq!(price_of_engine_time(1, Picodollars(1)), Picodollars(1));
        assert_eq!(price_of_engine_time(0, dollars("2")), Picodollars(0));
    }

    #[test]
    fn amounts_are_read_without_floating_point() {
        for (text, picodollars) in [
            ("1", 1_000_000_000_000),
            ("0.25", 250_000_000_000),
            ("1e-06", 1_000_000),
            ("1.5E-07", 150_000),
            ("2.9999900000000002e-06", 2_999_990),
            ("1.41953125e-07", 141_953),
            (".5", 500_000_000_000),
            ("0e99", 0),
            ("1e-99", 0),
        ] {
            assert_eq!(dollars(text), Picodollars(picodollars), "{text}");
        }
        for text in ["", "-1", "+1", "1.2.3", "abc", "1e", "1e99", "NaN", "inf", "."] {
            assert!(Picodollars::parse_dollars(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nanodollars_are_rounded_up_and_shown_as_dollars() {
        assert_eq!(Picodollars(1).to_nanodollars(), Nanodollars(1));
        assert_eq!(Nanodollars(875_000).to_string(), "$0.000875");
        assert_eq!(Nanodollars(100_000_000).to_string(), "$0.10");
        assert_eq!(Nanodollars(0).to_string(), "$0.00");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[-+0-9.eE]{0,50}") {
            drop(Picodollars::parse_dollars(&text));
        }

        #[test]
        fn a_stored_amount_comes_back(amount: u128) {
            let text = String::from(Picodollars(amount));
            prop_assert_eq!(Picodollars::try_from(text), Ok(Picodollars(amount)));
        }
    }
}
