//! Makes one run and reports it. Run by `cargo xtask chaos`.

use clap::Parser;
use genmill_tests::chaos::Run;
use genmill_tests::chaos::report::replay;
use std::io::Write as _;
use std::process::ExitCode;

/// Runs a mill while things go wrong, and checks that its promises hold.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long things go wrong, in minutes, with the quarter of a minute in which they settle
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=600))]
    minutes: u32,
    /// What goes wrong when
    #[arg(long)]
    seed: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let Arguments { minutes, seed } = Arguments::parse();
    let run = Run { minutes, seed };
    writeln!(std::io::stderr(), "{}", replay(&run))?;
    let report = run.make().await?;
    write!(std::io::stdout(), "{report}")?;
    Ok(if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
