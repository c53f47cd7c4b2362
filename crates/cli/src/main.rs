//! The `genmill` command: submit jobs, follow them, run experiments, and run a whole mill on one machine.
//!
//! One file per subcommand, one line per subcommand in [`Command`]. Never here: Redis commands, or anything that the
//! server decides.

mod cancel;
mod documents;
mod exec_with_parent;
mod exit;
mod experiment;
mod get;
mod images;
mod lanes;
mod limit;
mod list;
mod messages;
mod models;
mod output;
mod pause;
mod providers;
mod purge;
mod redrive;
mod show;
mod submit;
mod table;
mod up;
mod watch;
mod when;

use clap::Parser;
use exit::Ending;
use std::process::ExitCode;

/// Runs LLM generation jobs: local and remote models behind one queue.
#[derive(Debug, Parser)]
#[command(name = "genmill", version, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    /// The server to talk to
    #[arg(long, global = true, env = "GENMILL_SERVER", value_name = "URL", default_value = "http://127.0.0.1:50051")]
    server: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Submit(Box<submit::Args>),
    Get(get::Args),
    Watch(watch::Args),
    Cancel(cancel::Args),
    List(list::Args),
    Redrive(redrive::Args),
    Purge(purge::Args),
    Models(models::Args),
    Providers(providers::Args),
    Prices(providers::PricesArgs),
    Lanes(lanes::Args),
    Pause(pause::PauseArgs),
    Resume(pause::ResumeArgs),
    Limit(limit::Args),
    Experiment(experiment::Args),
    Up(up::Args),
    #[command(hide = true)]
    ExecWithParent(exec_with_parent::Args),
}

const EXAMPLES: &str = "\
Examples:
  genmill up --models ./configs                  start a mill on this machine
  genmill models                                 what can be asked for
  genmill providers list --ready                 which remote providers have what they need
  genmill submit --model vllm_x --prompt 'Hi'    ask, wait, print the answer
  genmill experiment run experiment.yaml         models x prompts, as a table

Exit codes: 0 done, 1 the job failed or was refused, 2 wrong usage, also in a file,
3 server not reachable.";

fn main() -> ExitCode {
    // Children that are to die with this process are tied to this thread, so everything runs on it.
    match run(Cli::parse()) {
        Ok(ending) => ending.code(),
        Err(error) => exit::report(&error),
    }
}

fn run(cli: Cli) -> anyhow::Result<Ending> {
    if let Command::ExecWithParent(args) = cli.command {
        return exec_with_parent::run(args);
    }
    if let Command::Providers(args) = cli.command {
        return providers::run(args);
    }
    if let Command::Prices(args) = cli.command {
        return providers::run_prices(args);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run_command(cli.command, &cli.server))
}

async fn run_command(command: Command, server: &str) -> anyhow::Result<Ending> {
    match command {
        Command::Submit(args) => submit::run(*args, server).await,
        Command::Get(args) => get::run(args, server).await,
        Command::Watch(args) => watch::run(args, server).await,
        Command::Cancel(args) => cancel::run(args, server).await,
        Command::List(args) => list::run(args, server).await,
        Command::Redrive(args) => redrive::run(args, server).await,
        Command::Purge(args) => purge::run(args, server).await,
        Command::Lanes(args) => lanes::run(args, server).await,
        Command::Pause(args) => pause::pause(args, server).await,
        Command::Resume(args) => pause::resume(args, server).await,
        Command::Limit(args) => limit::run(args, server).await,
        Command::Models(args) => models::run(args, server).await,
        Command::Experiment(args) => experiment::run(args, server).await,
        Command::Up(args) => up::run(args).await,
        Command::Providers(args) => providers::run(args),
        Command::Prices(args) => providers::run_prices(args),
        Command::ExecWithParent(args) => exec_with_parent::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_usage_is_told_by_clap() {
        for line in [
            "genmill submit --model vllm_x",
            "genmill submit --model vllm_x --prompt a --messages-file b",
            "genmill submit --model vllm_x --prompt a --stream --no-wait",
            "genmill submit --model vllm_x --prompt a --priority soon",
            "genmill submit --model vllm_x --prompt a --label ab",
            "genmill submit --model vllm_x --prompt a --deadline tomorrow",
            "genmill get nope",
            "genmill watch nope",
            "genmill cancel nope",
            "genmill cancel",
            "genmill cancel x --model vllm_x",
            "genmill list --state done",
            "genmill redrive",
            "genmill redrive nope",
            "genmill redrive --state failed",
            "genmill purge",
            "genmill purge --state running",
            "genmill purge --older-than yesterday",
            "genmill pause",
            "genmill pause lane",
            "genmill limit lane vllm:x --max-running 0",
            "genmill limit tenant t --weight-percent 10001",
            "genmill up --redis=",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
