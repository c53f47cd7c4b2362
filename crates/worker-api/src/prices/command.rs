//! `genmill prices`: what models cost, what another table says of it, and taking that over.

use super::{Class, Day, Holds, OWN_FILE, Prices, Row, import};
use anyhow::Context as _;
use genmill_core::model::ModelName;
use genmill_core::money::{Picodollars, Rates};
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_daemon::run::load;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// So many changes are shown.
const SHOWN_MAX: usize = 200;

/// What is asked of the table.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show what a model costs, by day, context and class, in dollars per million tokens
    Show {
        /// The model, such as litellm_gpt-4o, or a part of its name
        model: String,
    },
    /// Tell what a published table says otherwise
    Diff(From),
    /// Take over what a published table says otherwise, as prices that hold from a day on
    Update(From),
}

#[derive(Debug, clap::Args)]
struct From {
    /// LiteLLM's model_prices_and_context_window.json, or CSV with its columns
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// The day from which its prices hold [default: today]
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = |text: &str| Day::parse(text).ok_or("is no day such as 2026-11-12"))]
    day: Option<Day>,
}

/// Runs a command. The exit code is 1 when nothing is known, 2 when a file is wrong.
#[must_use]
pub fn run(args: &Args, config: Option<&Path>) -> ExitCode {
    crate::inspect::print(told(args, config))
}

fn told(args: &Args, config: Option<&Path>) -> anyhow::Result<(Vec<String>, ExitCode)> {
    let folder = load(config)?.config.models.dir;
    let prices = Prices::read(&folder)?;
    let (from, writes) = match &args.command {
        Command::Show { model } => return Ok(show(&prices, model)),
        Command::Diff(from) => (from, false),
        Command::Update(from) => (from, true),
    };
    let day = from.day.clone().unwrap_or_else(|| Day::of(UnixMs(now_unix_ms())));
    let text = std::fs::read_to_string(&from.from).with_context(|| format!("cannot read {}", from.from.display()))?;
    let rows = import::rows(&text, &day).with_context(|| from.from.display().to_string())?;
    let changes = changes(&prices, rows, &day);
    let mut lines: Vec<String> = changes.iter().take(SHOWN_MAX).map(|change| change.line.clone()).collect();
    let left = changes.len() - lines.len();
    lines.extend((left > 0).then(|| format!("… and {left} more")));
    let new = changes.iter().filter(|change| change.is_new).count();
    let from = if day == Day::default() { String::new() } else { format!(" from {day} on") };
    lines.push(format!("{new} prices are new, {} are others{from}", changes.len() - new));
    if writes && !changes.is_empty() {
        let path = folder.join(OWN_FILE);
        append(&path, changes.into_iter().map(|change| change.row))?;
        lines.push(format!("written to {}; workers take it over when they start", path.display()));
    }
    Ok((lines, ExitCode::SUCCESS))
}

/// A price that another table has otherwise.
#[derive(Debug)]
struct Change {
    row: Row,
    is_new: bool,
    line: String,
}

/// What `rows` say otherwise of prices on `day`. What they do not name keeps its price: a retired model has one still.
fn changes(prices: &Prices, rows: Vec<Row>, day: &Day) -> Vec<Change> {
    let mut models: BTreeMap<(String, String, Class), Vec<Row>> = BTreeMap::new();
    for row in rows {
        models.entry((row.provider.clone(), row.model.clone(), row.holds.class)).or_default().push(row);
    }
    let mut changes = Vec::new();
    for ((provider, model, class), rows) in models {
        let known = |row: &Row| prices.rates(&provider, &model, class, day, row.holds.above.saturating_add(1));
        // Tiers of a day are one price: if one differs, all are taken over.
        if rows.iter().all(|row| known(row) == Some(row.rates)) {
            continue;
        }
        for row in rows {
            let before = known(&row);
            let what = format!("{provider} {model}{}", when(&row.holds));
            let line = match before {
                Some(before) => format!("~ {what}: {} -> {}", dollars(&before), dollars(&row.rates)),
                None => format!("+ {what}: {}", dollars(&row.rates)),
            };
            changes.push(Change { row, is_new: before.is_none(), line });
        }
    }
    changes
}

/// Adds rows to a file, which is whole at any time.
fn append(path: &Path, rows: impl Iterator<Item = Row>) -> anyhow::Result<()> {
    let before = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => format!("{}\n", super::COLUMNS.join(",")),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    // Lines may have fewer columns than others, but not more than the header names.
    let header = super::COLUMNS.join(",");
    let mut text: String = before
        .lines()
        .map(|line| if line.starts_with("provider,model,") { format!("{header}\n") } else { format!("{line}\n") })
        .collect();
    text.extend(rows.map(|row| format!("{row}\n")));
    let beside = path.with_extension("csv.new");
    let written = std::fs::File::create(&beside).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.and_then(|()| std::fs::rename(&beside, path)).with_context(|| format!("cannot write {}", path.display()))
}

fn show(prices: &Prices, name: &str) -> (Vec<String>, ExitCode) {
    let exact = ModelName::parse(name).ok().map(|name| (name.lane().route, name.backend_name().to_owned()));
    let fits = |provider: &str, model: &str| match &exact {
        Some((of, called)) => of == provider && called == model,
        None => model.contains(name) || provider == name,
    };
    let found = prices.models().filter(|(provider, model, _)| fits(provider, model));
    let rows = found.flat_map(|(provider, model, rows)| {
        rows.iter().map(move |(holds, rates)| format!("{provider} {model}{}: {}", when(holds), dollars(rates)))
    });
    let lines: Vec<String> = rows.collect();
    if lines.is_empty() {
        let line =
            format!("no price is known of `{name}`: what its calls cost stays unknown, unless its provider tells it");
        return (vec![line], ExitCode::FAILURE);
    }
    let head = "in dollars per million tokens".to_owned();
    (std::iter::once(head).chain(lines).collect(), ExitCode::SUCCESS)
}

/// When a price holds, as far as that is not always.
fn when(holds: &Holds) -> String {
    let class = holds.class.name();
    let mut when = if class.is_empty() { String::new() } else { format!(", {class}") };
    if holds.above > 0 {
        when = format!("{when}, above {} prompt tokens", holds.above);
    }
    if holds.from != Day::default() {
        when = format!("{when}, from {}", holds.from);
    }
    when
}

fn dollars(rates: &Rates) -> String {
    let cached = rates.cached_input.map(|price| format!(", cached {}", per_million(price)));
    let written = rates.cache_write.map(|price| format!(", cache write {}", per_million(price)));
    let (input, output) = (per_million(rates.input), per_million(rates.output));
    format!("input {input}, output {output}{}{}", cached.unwrap_or_default(), written.unwrap_or_default())
}

/// A price of a token as dollars per million of them: `2.5`.
fn per_million(price: Picodollars) -> String {
    let (whole, rest) = (price.0 / 1_000_000, price.0 % 1_000_000);
    format!("{whole}.{rest:06}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_shown_to_the_last_digit() {
        let check = |price, expect: &str| assert_eq!(per_million(Picodollars(price)), expect);
        check(2_500_000, "2.5");
        check(75_001, "0.075001");
        check(30_000_000, "30");
        check(0, "0");
    }

    #[test]
    fn only_what_differs_is_taken_over_and_tiers_together() {
        let day = Day::parse("2026-12-01").unwrap();
        let row = |model: &str, input, above| Row {
            provider: "p".to_owned(),
            model: model.to_owned(),
            holds: Holds { from: day.clone(), class: Class::Standard, above },
            rates: Rates {
                input: Picodollars(input),
                output: Picodollars(9),
                cached_input: None,
                cache_write: None,
                reasoning: None,
            },
        };
        let old = |model, input| {
            let row = row(model, input, 0);
            Row { holds: Holds::default(), ..row }
        };
        let prices = Prices::default().with(vec![old("same", 1), old("dearer", 1), old("retired", 1)]);
        let published = vec![row("same", 1, 0), row("dearer", 2, 0), row("dearer", 4, 200_000), row("new", 3, 0)];
        let changes = changes(&prices, published, &day);
        let told: Vec<&str> = changes.iter().map(|change| change.line.as_str()).collect();
        assert_eq!(
            told,
            [
                "~ p dearer, from 2026-12-01: input 0.000001, output 0.000009 -> input 0.000002, output 0.000009",
                "~ p dearer, above 200000 prompt tokens, from 2026-12-01: input 0.000001, output 0.000009 -> input \
                 0.000004, output 0.000009",
                "+ p new, from 2026-12-01: input 0.000003, output 0.000009",
            ]
        );
        let after = prices.with(changes.into_iter().map(|change| change.row).collect());
        let input = |model, tokens| after.rates("p", model, Class::Standard, &day, tokens).map(|rates| rates.input.0);
        assert_eq!((input("dearer", 300_000), input("retired", 1), input("same", 1)), (Some(4), Some(1), Some(1)));
    }
}
