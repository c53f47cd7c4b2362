//! `genmill purge`: finished jobs, removed for good.

use crate::exit::Ending;
use crate::list::FilterRest;
use crate::output;
use crate::when::parse_duration;
use clap::builder::PossibleValuesParser;
use genmill_client::{Client, v1};
use genmill_core::state::State;
use genmill_core::time::UnixMs;
use std::time::Duration;

/// Remove finished jobs for good, with their results and request ids; unfinished ones stay
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["state", "model", "experiment", "tenant", "older_than"]))]
pub(crate) struct Args {
    /// Only jobs in this state
    #[arg(long, value_parser = PossibleValuesParser::new(State::ALL.into_iter().filter(|state| state.is_final()).map(State::name)))]
    state: Option<String>,
    #[command(flatten)]
    filter: FilterRest,
    /// Only jobs that finished longer ago than this, such as 12h or 7d
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    older_than: Option<Duration>,
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let state = args.state.as_deref().and_then(State::from_name);
    let state = state.map_or(v1::JobState::Unspecified, genmill_wire::to_pb::state).into();
    let before = args.older_than.map(|age| {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let now_unix_ms = genmill_daemon::clock::now_unix_ms();
        genmill_wire::to_pb::timestamp(UnixMs(now_unix_ms.saturating_sub(age_ms)))
    });
    let filter = v1::JobFilter { state, ..args.filter.into() };
    let purged = Client::connect(server).await?.purge(filter, before).await?;
    output::line(&format!("{purged} purged"))?;
    Ok(Ending::Done)
}
