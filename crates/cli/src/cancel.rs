//! `genmill cancel`: one job, or all of a filter.

use crate::exit::Ending;
use crate::list::FilterArgs;
use crate::{output, show};
use genmill_client::{Client, v1};
use genmill_core::ids::JobId;

/// Cancel a job, or every unfinished job of a filter
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["id", "state", "model", "experiment", "tenant"]))]
pub(crate) struct Args {
    /// The job's id
    #[arg(value_parser = JobId::parse, conflicts_with_all = ["state", "model", "experiment", "tenant"])]
    id: Option<JobId>,
    #[command(flatten)]
    filter: FilterArgs,
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let client = Client::connect(server).await?;
    let told = match args.id {
        Some(id) => describe(&client.cancel(&id.to_string()).await?),
        None => {
            let v1::CancelJobsResponse { cancelled, cancelling } = client.cancel_all(args.filter.into()).await?;
            format!("{cancelled} cancelled, {cancelling} running and told to stop")
        }
    };
    output::line(&told)?;
    Ok(Ending::Done)
}

fn describe(job: &v1::Job) -> String {
    match job.state() {
        v1::JobState::Running => format!("{} is running; its worker is told to stop", job.id),
        state => format!("{} {}", job.id, show::state(state)),
    }
}
