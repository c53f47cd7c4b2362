//! `genmill lanes`: what waits and runs where, and what is paused or limited.

use crate::exit::Ending;
use crate::table::{self, Column};
use crate::{output, show};
use genmill_client::{Client, v1};

/// List the lanes, with what waits and runs there, and what is paused or limited
#[derive(Debug, clap::Args)]
#[command(after_help = MEANING)]
pub(crate) struct Args {
    /// Print each lane as one line of JSON, and one more with what is set for experiments and tenants, if anything is
    #[arg(long)]
    json: bool,
}

const MEANING: &str = "\
A lane is a local model (vllm:NAME) or a remote provider (litellm:openai; litellm:openai+batch has what
goes out in batches, whose jobs count as running). LIMIT is the most jobs
that run there at once: `genmill limit` sets it, without one the workers' capacity bounds it.";

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let client = Client::connect(server).await?;
    let mut lanes = client.list_lanes().await?;
    lanes.retain(is_told);
    let settings = client.list_settings().await?;
    if args.json {
        for lane in &lanes {
            output::line(&genmill_wire::json::to_json("Lane", lane)?)?;
        }
        if settings != v1::ListSettingsResponse::default() {
            output::line(&genmill_wire::json::to_json("ListSettingsResponse", &settings)?)?;
        }
        return Ok(Ending::Done);
    }
    let nothing = "no lanes yet: they come with the workers that serve them";
    table::print(COLUMNS, lanes.iter().map(row).collect(), nothing)?;
    for lane in &lanes {
        for held in &lane.held_back {
            output::line(&format!("\n{}", held_back(held)))?;
        }
    }
    for batch in lanes.iter().flat_map(|lane| &lane.batches) {
        output::line(&format!("\n{}", in_batch(batch)))?;
    }
    let away: Vec<&str> = lanes.iter().filter(|lane| lane.away).map(|lane| lane.name.as_str()).collect();
    if !away.is_empty() {
        output::line(&format!("\naway for now, with their node of Redis: {}", away.join(", ")))?;
    }
    if !settings.paused_experiments.is_empty() {
        output::line(&format!("\npaused experiments: {}", settings.paused_experiments.join(", ")))?;
    }
    if !settings.tenants.is_empty() {
        output::line(&format!(
            "\n{}",
            table::render(TENANT_COLUMNS, settings.tenants.iter().map(tenant_row).collect())
        ))?;
    }
    Ok(Ending::Done)
}

const COLUMNS: [Column; 8] = [
    Column::Text("lane"),
    Column::Text("paused"),
    Column::Number("queued"),
    Column::Number("delayed"),
    Column::Number("running"),
    Column::Number("capacity"),
    Column::Number("limit"),
    Column::Number("failed"),
];

/// Whether there is anything to be said of a lane: most that are for batches stay empty.
fn is_told(lane: &v1::Lane) -> bool {
    let is_empty = lane.queued + lane.delayed + lane.running + lane.failed == 0;
    let is_plain = !lane.paused && !lane.away && lane.max_running.is_none();
    !(lane.name.ends_with("+batch") && is_empty && is_plain)
}

fn row(lane: &v1::Lane) -> [String; 8] {
    let count = |number: u64| if lane.away { show::NOTHING.to_owned() } else { number.to_string() };
    [
        lane.name.clone(),
        yes_or_nothing(lane.paused),
        count(lane.queued),
        count(lane.delayed),
        count(lane.running),
        count(lane.capacity),
        number_or_nothing(lane.max_running),
        count(lane.failed),
    ]
}

/// Why a model waits, and until when.
fn held_back(held: &v1::HeldBack) -> String {
    let why = match held.reason() {
        v1::HeldBackReason::Throttled => "its provider asked to slow down",
        v1::HeldBackReason::Failing => "its provider failed too often in a row",
        v1::HeldBackReason::Requests => "the calls of a minute are used up",
        v1::HeldBackReason::Tokens => "the tokens of a minute are used up",
        v1::HeldBackReason::Calls => "as many calls as may be are in flight",
        v1::HeldBackReason::Unspecified => "of an unknown reason",
    };
    let until = held.until.as_ref().map_or_else(|| "a call ends".to_owned(), |at| show::time(Some(at)));
    format!("{} is held back until {until}: {why}", held.model)
}

/// How far a batch is.
fn in_batch(batch: &v1::Batch) -> String {
    let since = show::time(batch.created_at.as_ref());
    let (model, tag, jobs) = (&batch.model, &batch.tag, batch.jobs);
    let stage = match batch.state() {
        v1::BatchState::Intent => "is being filled or submitted".to_owned(),
        v1::BatchState::Submitted => format!("is at the provider as {}", batch.provider_batch),
        v1::BatchState::Collecting => format!("has ended as {}, results are being read", batch.provider_batch),
        v1::BatchState::Clearing => format!("is done as {}, its files are being deleted", batch.provider_batch),
        v1::BatchState::Unspecified => "is in an unknown state".to_owned(),
    };
    format!("batch {tag} of {model} since {since}, {jobs} of its jobs wanted still: {stage}")
}

const TENANT_COLUMNS: [Column; 4] =
    [Column::Text("tenant"), Column::Text("paused"), Column::Number("limit"), Column::Number("weight")];

fn tenant_row(settings: &v1::TenantSettings) -> [String; 4] {
    [
        settings.tenant.clone(),
        yes_or_nothing(settings.paused),
        number_or_nothing(settings.max_running),
        format!("{} %", settings.weight_percent.unwrap_or(100)),
    ]
}

fn yes_or_nothing(is: bool) -> String {
    if is { "yes" } else { show::NOTHING }.to_owned()
}

fn number_or_nothing(number: Option<u32>) -> String {
    number.map_or_else(|| show::NOTHING.to_owned(), |number| number.to_string())
}
