//! `genmill redrive`: failed jobs once more.

use crate::exit::Ending;
use crate::list::FilterRest;
use crate::output;
use genmill_client::{Client, v1};
use genmill_core::ids::JobId;

/// Submit a failed job again as a new one, or every failed job of a filter; each once, however often this is asked
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["id", "all", "model", "experiment", "tenant"]))]
#[command(after_help = "`genmill list --state failed` lists failed jobs, with --json --whole their whole history.")]
pub(crate) struct Args {
    /// The failed job's id; prints the new one's
    #[arg(value_parser = JobId::parse, conflicts_with_all = ["all", "model", "experiment", "tenant"])]
    id: Option<JobId>,
    /// Every failed job
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: FilterRest,
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let client = Client::connect(server).await?;
    let told = match args.id {
        Some(id) => client.redrive(&id.to_string()).await?,
        None => {
            let told = client.redrive_all(args.filter.into()).await?;
            let v1::RedriveResponse { redriven, redriven_before, skipped, skipped_because, .. } = told;
            let counts = format!("{redriven} redriven, {redriven_before} had been before");
            match skipped {
                0 => counts,
                _ => format!("{counts}, {skipped} skipped: {skipped_because}"),
            }
        }
    };
    output::line(&told)?;
    Ok(Ending::Done)
}
