//! `genmill list`: jobs, newest first. Also the filter that `cancel`, `redrive` and `purge` share.

use crate::exit::Ending;
use crate::table::{self, Column};
use crate::{output, show};
use futures_util::{StreamExt as _, TryStreamExt as _};
use genmill_client::{Client, v1};
use genmill_core::state::State;

/// List jobs, newest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    filter: FilterArgs,
    /// At most so many jobs
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Print each job as one line of JSON, without prompt, text and attempts
    #[arg(long)]
    json: bool,
    /// With --json: whole jobs, with prompt, text and the history of their attempts
    #[arg(long, requires = "json")]
    whole: bool,
}

/// Which jobs.
#[derive(Debug, clap::Args)]
pub(crate) struct FilterArgs {
    /// Only jobs in this state
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(State::ALL.map(State::name)))]
    state: Option<String>,
    #[command(flatten)]
    rest: FilterRest,
}

/// Which jobs, whatever their state.
#[derive(Debug, clap::Args)]
pub(crate) struct FilterRest {
    /// Only jobs of this model
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Only jobs of this experiment
    #[arg(long, value_name = "NAME")]
    experiment: Option<String>,
    /// Only jobs of this tenant
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
}

impl From<FilterArgs> for v1::JobFilter {
    fn from(args: FilterArgs) -> Self {
        let state = args.state.as_deref().and_then(State::from_name);
        let state = state.map_or(v1::JobState::Unspecified, genmill_wire::to_pb::state).into();
        Self { state, ..args.rest.into() }
    }
}

impl From<FilterRest> for v1::JobFilter {
    fn from(args: FilterRest) -> Self {
        Self {
            state: v1::JobState::Unspecified.into(),
            model: args.model.unwrap_or_default(),
            experiment: args.experiment.unwrap_or_default(),
            tenant: args.tenant.unwrap_or_default(),
        }
    }
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let client = Client::connect(server).await?;
    let filter = args.filter.into();
    let jobs = if args.whole { client.list_whole(filter).left_stream() } else { client.list(filter).right_stream() };
    let mut jobs = std::pin::pin!(jobs.take(args.limit));
    let mut rows = Vec::new();
    while let Some(job) = jobs.try_next().await? {
        if args.json {
            output::job_json(&job)?;
        } else {
            rows.push(row(&job));
        }
    }
    if !args.json {
        table::print(COLUMNS, rows, "no jobs")?;
    }
    Ok(Ending::Done)
}

const COLUMNS: [Column; 7] = [
    Column::Text("id"),
    Column::Text("state"),
    Column::Text("model"),
    Column::Text("experiment"),
    Column::Text("created"),
    Column::Number("attempts"),
    Column::Number("cost"),
];

fn row(job: &v1::Job) -> [String; 7] {
    let request = job.request.as_ref();
    let model = request.map_or("", |request| &request.model);
    let experiment = request.map_or("", |request| &request.experiment);
    [
        job.id.clone(),
        show::state(job.state()),
        model.to_owned(),
        if experiment.is_empty() { show::NOTHING.to_owned() } else { experiment.to_owned() },
        show::time(job.created_at.as_ref()),
        job.attempts.to_string(),
        show::cost_of(job),
    ]
}
