//! `genmill pause` and `genmill resume`: lanes, experiments, tenants.

use crate::exit::Ending;
use crate::output;
use genmill_client::{Client, Pausable};

/// Let no job of a lane, an experiment or a tenant start until it is resumed; what runs goes on
#[derive(Debug, clap::Args)]
pub(crate) struct PauseArgs {
    #[command(subcommand)]
    what: What,
}

/// End a pause
#[derive(Debug, clap::Args)]
pub(crate) struct ResumeArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// A lane, such as vllm:NAME or litellm:openai; `genmill lanes` lists them
    Lane {
        /// Its name
        name: String,
    },
    /// An experiment, in all lanes
    Experiment {
        /// Its name
        name: String,
    },
    /// A tenant, in all lanes
    Tenant {
        /// Its name
        name: String,
    },
}

impl From<What> for Pausable {
    fn from(what: What) -> Self {
        match what {
            What::Lane { name } => Self::Lane(name),
            What::Experiment { name } => Self::Experiment(name),
            What::Tenant { name } => Self::Tenant(name),
        }
    }
}

pub(crate) async fn pause(args: PauseArgs, server: &str) -> anyhow::Result<Ending> {
    let told = format!("{} is paused", describe(&args.what));
    Client::connect(server).await?.pause(args.what.into()).await?;
    output::line(&told)?;
    Ok(Ending::Done)
}

pub(crate) async fn resume(args: ResumeArgs, server: &str) -> anyhow::Result<Ending> {
    let told = format!("{} is resumed", describe(&args.what));
    Client::connect(server).await?.resume(args.what.into()).await?;
    output::line(&told)?;
    Ok(Ending::Done)
}

fn describe(what: &What) -> String {
    match what {
        What::Lane { name } => format!("lane {name}"),
        What::Experiment { name } => format!("experiment {name}"),
        What::Tenant { name } => format!("tenant {name}"),
    }
}
