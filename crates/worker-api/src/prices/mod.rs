//! The table of prices: `prices.csv`, and below it a file of the user's own. Never here: the arithmetic
//! (`genmill_core::money`).

pub mod command;
pub mod import;

use genmill_core::money::{Picodollars, Rates};
use genmill_core::time::UnixMs;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// The file with a user's own prices, in the folder of the model lists.
pub const OWN_FILE: &str = "prices.csv";

/// The columns of a file; the last five may be missing.
const COLUMNS: [&str; 10] =
    ["provider", "model", "input", "output", "cached_input", "cache_write", "from", "above", "class", "reasoning"];

/// The columns that a file must have.
const COLUMNS_MIN: usize = 5;

/// A day, such as `2026-11-12`. Days are compared as texts. The empty one comes before all others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Day(String);

impl Day {
    /// The day of a point in time, by UTC.
    #[must_use]
    pub fn of(at: UnixMs) -> Self {
        let at = UNIX_EPOCH.checked_add(Duration::from_millis(at.0)).unwrap_or(UNIX_EPOCH);
        Self(humantime::format_rfc3339_seconds(at).to_string()[..10].to_owned())
    }

    /// Reads `2026-11-12`, or nothing.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_day = || humantime::parse_rfc3339(&format!("{text}T00:00:00Z")).is_ok();
        (text.is_empty() || is_day()).then(|| Self(text.to_owned()))
    }
}

impl std::fmt::Display for Day {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// How fast an answer is wanted, which has its price.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Class {
    /// As usual.
    #[default]
    Standard,
    /// Within a day, through a batch.
    Batch,
    /// Before others.
    Priority,
    /// When there is room.
    Flex,
}

impl Class {
    const ALL: [Self; 4] = [Self::Standard, Self::Batch, Self::Priority, Self::Flex];

    /// Its name in files; the usual one has none.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Standard => "",
            Self::Batch => "batch",
            Self::Priority => "priority",
            Self::Flex => "flex",
        }
    }

    /// The class that an answer names as its tier of service; `None`: the usual one.
    #[must_use]
    pub fn of_tier(name: &str) -> Option<Self> {
        [Self::Priority, Self::Flex].into_iter().find(|class| class.name() == name)
    }
}

/// For which calls of a model a price holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Holds {
    /// From this day on, until a later one takes its place.
    pub from: Day,
    /// How fast the answer is wanted.
    pub class: Class,
    /// With more tokens in the prompt than this.
    pub above: u64,
}

/// A row of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The provider.
    pub provider: String,
    /// Its name for the model.
    pub model: String,
    /// When it holds.
    pub holds: Holds,
    /// What a token costs.
    pub rates: Rates,
}

/// Prices by provider and model.
#[derive(Clone, Debug, Default)]
pub struct Prices(BTreeMap<(String, String), BTreeMap<Holds, Rates>>);

/// Why a table cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BadPrices {
    /// A line is malformed.
    #[error(
        "{place}, line {line}: not `provider,model,input,output,cached_input[,cache_write,from,above,class,reasoning]`"
    )]
    Line {
        /// The file.
        place: String,
        /// The line, from 1.
        line: usize,
    },
    /// The user's file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Prices {
    /// The table that this worker was built with.
    ///
    /// # Errors
    /// [`BadPrices`] when the file is malformed, which a test rules out.
    pub fn embedded() -> Result<Self, BadPrices> {
        Ok(Self::default().with(parse(include_str!("../prices.csv"), "the table of prices")?))
    }

    /// The table that this worker was built with, and over it the rows of `folder`'s [`OWN_FILE`] when there is one.
    ///
    /// # Errors
    /// [`BadPrices`] when that file cannot be read, or is malformed.
    pub fn read(folder: &Path) -> Result<Self, BadPrices> {
        let path = folder.join(OWN_FILE);
        match std::fs::read_to_string(&path) {
            Ok(own) => Ok(Self::embedded()?.with(parse(&own, &path.display().to_string())?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::embedded(),
            Err(source) => Err(BadPrices::Unreadable { path, source }),
        }
    }

    /// The table with further rows, which win over those that hold for the same.
    #[must_use]
    pub fn with(mut self, rows: Vec<Row>) -> Self {
        for Row { provider, model, holds, rates } in rows {
            self.0.entry((provider, model)).or_default().insert(holds, rates);
        }
        self
    }

    /// The table without the rows of providers that are not `wanted`.
    #[must_use]
    pub fn only(mut self, wanted: impl Fn(&str) -> bool) -> Self {
        self.0.retain(|(provider, _), _| wanted(provider));
        self
    }

    /// What a token of a call costs that has `prompt_tokens` and is made on `day`; `None` when nobody published it.
    #[must_use]
    pub fn rates(&self, provider: &str, model: &str, class: Class, day: &Day, prompt_tokens: u64) -> Option<Rates> {
        let rows = self.rows(provider, model)?;
        let newest =
            rows.keys().filter(|holds| holds.class == class && holds.from <= *day).map(|holds| &holds.from).max()?;
        let fits = |holds: &&Holds| {
            holds.class == class && holds.from == *newest && (holds.above == 0 || prompt_tokens > holds.above)
        };
        let tier = rows.keys().filter(fits).max_by_key(|holds| holds.above)?;
        rows.get(tier).copied()
    }

    /// Whether a price of a class is known of any model of a provider. Where none is, its tiers have one price.
    #[must_use]
    pub fn has(&self, provider: &str, class: Class) -> bool {
        let of = self.0.range((provider.to_owned(), String::new())..).take_while(|((name, _), _)| name == provider);
        of.flat_map(|(_, rows)| rows.keys()).any(|holds| holds.class == class)
    }

    /// All prices of a model.
    #[must_use]
    pub fn rows(&self, provider: &str, model: &str) -> Option<&BTreeMap<Holds, Rates>> {
        self.0.get(&(provider.to_owned(), model.to_owned()))
    }

    /// Every model with its prices, by provider and name.
    pub fn models(&self) -> impl Iterator<Item = (&str, &str, &BTreeMap<Holds, Rates>)> {
        self.0.iter().map(|((provider, model), rows)| (provider.as_str(), model.as_str(), rows))
    }
}

/// Reads the lines of a file; those that begin with `#` are remarks, the first other one names the columns.
fn parse(text: &str, place: &str) -> Result<Vec<Row>, BadPrices> {
    let bad = |index: usize| BadPrices::Line { place: place.to_owned(), line: index + 1 };
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with('#') && !line.is_empty());
    let Some((index, header)) = lines.next() else { return Ok(Vec::new()) };
    let columns: Vec<&str> = header.split(',').collect();
    if columns.len() < COLUMNS_MIN || columns.len() > COLUMNS.len() || columns[..] != COLUMNS[..columns.len()] {
        return Err(bad(index));
    }
    lines.map(|(index, line)| row(line).ok_or_else(|| bad(index))).collect()
}

fn row(line: &str) -> Option<Row> {
    let fields: Vec<&str> = line.split(',').collect();
    if fields.len() < COLUMNS_MIN || fields.len() > COLUMNS.len() {
        return None;
    }
    let field = |index: usize| fields.get(index).copied().unwrap_or_default();
    let amount = |index: usize| field(index).parse().map(Picodollars).ok();
    let optional = |index: usize| if field(index).is_empty() { Some(None) } else { amount(index).map(Some) };
    let above = if field(7).is_empty() { 0 } else { field(7).parse().ok()? };
    let class = Class::ALL.into_iter().find(|class| class.name() == field(8))?;
    Some(Row {
        provider: field(0).to_owned(),
        model: field(1).to_owned(),
        holds: Holds { from: Day::parse(field(6))?, class, above },
        rates: Rates {
            input: amount(2)?,
            output: amount(3)?,
            cached_input: optional(4)?,
            cache_write: optional(5)?,
            reasoning: optional(9)?,
        },
    })
}

impl std::fmt::Display for Row {
    /// As a line of a file.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let optional = |amount: Option<Picodollars>| amount.map(|amount| amount.0.to_string()).unwrap_or_default();
        let Self { provider, model, holds, rates } = self;
        let above = if holds.above == 0 { String::new() } else { holds.above.to_string() };
        let (cached, written) = (optional(rates.cached_input), optional(rates.cache_write));
        let (input, output) = (rates.input.0, rates.output.0);
        write!(
            f,
            "{provider},{model},{input},{output},{cached},{written},{},{above},{}",
            holds.from,
            holds.class.name()
        )?;
        // Few have one, and a column at the end may be missing.
        rates.reasoning.map_or(Ok(()), |reasoning| write!(f, ",{}", reasoning.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn day(text: &str) -> Day {
        Day::parse(text).unwrap()
    }

    fn check(provider: &str, model: &str, expect: Option<(&str, &str, Option<&str>)>) {
        let dollars = |text: &str| Picodollars::parse_dollars(text).unwrap();
        let expect = expect.map(|(input, output, cached)| Rates {
            input: dollars(input),
            output: dollars(output),
            cached_input: cached.map(dollars),
            cache_write: None,
            reasoning: None,
        });
        let rates = Prices::embedded().unwrap().rates(provider, model, Class::Standard, &day("2026-11-12"), 1);
        assert_eq!(rates, expect);
    }

    #[test]
    fn a_class_that_a_provider_has_no_price_for_is_told() {
        let prices = Prices::default().with(vec![row("p,m,1,1,,,,,").unwrap(), row("q,m,1,1,,,,,flex").unwrap()]);
        let has = |provider, class| prices.has(provider, class);
        assert!(has("p", Class::Standard) && has("q", Class::Flex));
        assert!(!has("p", Class::Flex) && !has("q", Class::Priority) && !has("o", Class::Standard));
    }

    #[test]
    fn published_prices_are_known() {
        check("openai", "gpt-4", Some(("3e-05", "6e-05", None)));
        check("openai", "gpt-4o", Some(("2.5e-06", "1e-05", Some("1.25e-06"))));
        check("groq", "openai/gpt-oss-20b", Some(("7.5e-08", "3e-07", Some("3.75e-08"))));
    }

    #[test]
    fn published_thresholds_and_classes_are_known() {
        let prices = Prices::embedded().unwrap();
        let input = |provider, model, class, tokens| {
            prices.rates(provider, model, class, &day("2026-11-12"), tokens).map(|rates| rates.input.0)
        };
        let gemini = |class, tokens| input("gemini", "gemini-2.5-pro", class, tokens);
        assert_eq!(
            (gemini(Class::Standard, 200_000), gemini(Class::Standard, 200_001)),
            (Some(1_250_000), Some(2_500_000))
        );
        assert_eq!((gemini(Class::Batch, 1), gemini(Class::Batch, 200_001)), (Some(625_000), Some(1_250_000)));
        assert_eq!((gemini(Class::Priority, 1), gemini(Class::Flex, 1)), (Some(2_250_000), Some(625_000)));
        assert_eq!(input("openai", "gpt-5", Class::Flex, 1), Some(625_000));
    }

    #[test]
    fn rows_of_other_providers_can_be_left_out() {
        let prices = Prices::embedded().unwrap().only(|provider| provider == "openai");
        assert!(prices.rows("openai", "gpt-4").is_some());
        assert!(prices.models().all(|(provider, _, _)| provider == "openai"));
    }

    #[test]
    fn an_unknown_price_is_none() {
        check("openai", "no-such-model", None);
        check("groq", "gpt-4", None);
        check("ollama", "llama3", None);
    }

    /// The input price of a call.
    fn input(prices: &Prices, class: Class, day: &str, prompt_tokens: u64) -> Option<u128> {
        prices.rates("p", "m", class, &Day::parse(day).unwrap(), prompt_tokens).map(|rates| rates.input.0)
    }

    #[test]
    fn a_price_holds_from_its_day_for_its_class_and_above_its_threshold() {
        let file = "provider,model,input,output,cached_input,cache_write,from,above,class\np,m,1,1,,,,,\n\
                    p,m,10,1,,,2026-01-01,,\np,m,20,1,,,2026-01-01,200000,\np,m,5,1,,,2026-01-01,,batch\n\
                    p,m,11,1,,,2026-06-01,,";
        let prices = Prices::default().with(parse(file, "x").unwrap());
        let standard = |day: &str, tokens| input(&prices, Class::Standard, day, tokens);
        assert_eq!(standard("2025-12-31", 300_000), Some(1), "an older price has no tiers");
        assert_eq!(standard("2026-01-01", 200_000), Some(10));
        assert_eq!(standard("2026-01-01", 200_001), Some(20));
        assert_eq!(standard("2026-06-01", 300_000), Some(11), "nor has a newer one");
        assert_eq!(input(&prices, Class::Batch, "2026-12-01", 1), Some(5));
        assert_eq!(input(&prices, Class::Batch, "2025-12-01", 1), None);
        assert_eq!(input(&prices, Class::Priority, "2026-12-01", 1), None);
    }

    #[test]
    fn a_malformed_line_is_named() {
        let check = |text: &str, expect: &str| {
            let told = parse(text, "x.csv").unwrap_err().to_string();
            assert!(told.starts_with(expect), "{told}");
        };
        let head = "provider,model,input,output,cached_input,cache_write,from,above,class";
        check("# x\nmodel,provider\na,b", "x.csv, line 2:");
        for line in ["a,b,1", "a,b,x,1,,", "a,b,1,1,,,soon,,", "a,b,1,1,,,,,fast", "a,b,1,1,,,,,,,,"] {
            check(&format!("{head}\na,b,1,1,,\n{line}"), "x.csv, line 3:");
        }
    }

    #[test]
    fn an_own_file_wins() {
        let folder = std::env::temp_dir().join(format!("genmill-prices-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(OWN_FILE), "provider,model,input,output,cached_input\nopenai,gpt-4,7,8,\n").unwrap();
        let rates = Prices::read(&folder).unwrap().rates("openai", "gpt-4", Class::Standard, &day("2026-11-12"), 1);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(rates.unwrap().input, Picodollars(7));
    }

    proptest! {
        #[test]
        fn a_row_is_read_as_it_was_written(input: u64, cached: Option<u64>, above: u32, batch: bool) {
            let holds = Holds {
                from: day("2026-11-12"),
                class: if batch { Class::Batch } else { Class::Standard },
                above: u64::from(above),
            };
            let amount = |amount: u64| Picodollars(u128::from(amount));
            let rates = Rates {
                input: amount(input),
                output: amount(1),
                cached_input: cached.map(amount),
                cache_write: None,
                reasoning: cached.map(amount),
            };
            let written = Row { provider: "p".to_owned(), model: "m/x".to_owned(), holds, rates };
            prop_assert_eq!(row(&written.to_string()), Some(written));
        }
    }
}
