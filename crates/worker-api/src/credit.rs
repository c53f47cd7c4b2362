//! How much of an account's credit is left, as OpenRouter tells it. Pure: documents in, a finding out.
//!
//! An account's balance is told to management keys only; any other key is told its own limit, where it has one.

use genmill_core::money::Picodollars;
use serde::Deserialize;
use serde_json::value::RawValue;

/// Below this much, jobs may fail for lack of credit at any time.
const LOW: Amount = 1_000_000_000_000;

/// Below this much, it is time to pay in.
const WARNING: Amount = 5 * LOW;

/// Picodollars, which may be owed.
type Amount = i128;

/// What is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credit {
    /// So much, in picodollars.
    Left(i128),
    /// Nobody tells.
    Unknown,
}

/// The reply to `GET /credits`.
#[derive(Deserialize)]
struct Credits<'a> {
    #[serde(borrow)]
    data: Totals<'a>,
}

#[derive(Deserialize)]
struct Totals<'a> {
    #[serde(borrow)]
    total_credits: &'a RawValue,
    #[serde(borrow)]
    total_usage: &'a RawValue,
}

/// The reply to `GET /key`.
#[derive(Deserialize)]
struct Key<'a> {
    #[serde(borrow)]
    data: Limits<'a>,
}

#[derive(Deserialize)]
struct Limits<'a> {
    /// `null` says nothing about the account: the key has no limit of its own.
    #[serde(borrow)]
    limit_remaining: Option<&'a RawValue>,
}

/// What is left by the reply to `GET /credits`.
#[must_use]
pub fn of_account(body: &[u8]) -> Credit {
    let told = serde_json::from_slice::<Credits<'_>>(body).ok();
    let left = told.and_then(|told| Some(amount(told.data.total_credits)? - amount(told.data.total_usage)?));
    left.map_or(Credit::Unknown, Credit::Left)
}

/// What is left by the reply to `GET /key`.
#[must_use]
pub fn of_key(body: &[u8]) -> Credit {
    let told = serde_json::from_slice::<Key<'_>>(body).ok();
    told.and_then(|told| amount(told.data.limit_remaining?)).map_or(Credit::Unknown, Credit::Left)
}

/// An amount of dollars as it is written.
fn amount(written: &RawValue) -> Option<Amount> {
    let text = written.get().trim_matches('"');
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |digits| (-1, digits));
    let amount = Picodollars::parse_dollars(digits).ok()?;
    Some(sign * Amount::try_from(amount.0).ok()?)
}

impl Credit {
    /// What a person should know of it.
    ///
    /// # Errors
    /// The same, when nothing is left.
    pub fn finding(self) -> Result<String, String> {
        let Self::Left(left) = self else {
            return Ok(
                "WARNING: its credit is not known: the key has no limit, and only a management key is told the balance"
                    .to_owned(),
            );
        };
        let sign = if left < 0 { "-" } else { "" };
        let cents = left.unsigned_abs() / 10_000_000_000;
        let shown = format!("{sign}${}.{:02}", cents / 100, cents % 100);
        match left {
            ..=0 => Err(format!("its credit is used up ({shown}): pay in, or raise the limit of the key")),
            _ if left < LOW => Ok(format!("LOW: credit of {shown}: pay in now, or jobs will fail")),
            _ if left < WARNING => Ok(format!("WARNING: credit of {shown}")),
            _ => Ok(format!("credit of {shown}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(credits: &str, usage: &str) -> Result<String, String> {
        of_account(format!(r#"{{"data":{{"total_credits":{credits},"total_usage":{usage}}}}}"#).as_bytes()).finding()
    }

    #[test]
    fn what_is_left_is_judged() {
        assert_eq!(account("100.5", "25.75").unwrap(), "credit of $74.75");
        assert_eq!(account("100", "95.01").unwrap(), "WARNING: credit of $4.99");
        assert_eq!(account("10", "5").unwrap(), "credit of $5.00");
        assert_eq!(account("10", "9").unwrap(), "WARNING: credit of $1.00");
        assert_eq!(account("10", "9.005").unwrap(), "LOW: credit of $0.99: pay in now, or jobs will fail");
        assert!(account("10", "10").unwrap_err().contains("($0.00)"));
        assert!(account("10", "12.5").unwrap_err().contains("(-$2.50)"));
    }

    #[test]
    fn a_key_without_a_limit_tells_nothing() {
        let key = |left: &str| of_key(format!(r#"{{"data":{{"limit_remaining":{left}}}}}"#).as_bytes());
        assert_eq!(key("null"), Credit::Unknown);
        assert!(key("null").finding().unwrap().starts_with("WARNING: its credit is not known"));
        assert_eq!(key("0.5").finding().unwrap(), "LOW: credit of $0.50: pay in now, or jobs will fail");
        assert!(key("-1").finding().is_err());
        assert_eq!(of_key(b"oops"), Credit::Unknown);
    }
}
