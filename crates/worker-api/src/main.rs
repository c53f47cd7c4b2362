//! The API worker daemon: read the tables, serve, drain.

use anyhow::Context as _;
use clap::Parser;
use genmill_core::model::PREFIXES;
use genmill_core::registration::Availability;
use genmill_daemon::run::{CommonArgs, Context, Loaded, daemon};
use genmill_worker::answers::Bounds;
use genmill_worker::{Batching, Kind, serve_batches};
use genmill_worker_api::cache::Cache;
use genmill_worker_api::catalog::Catalog;
use genmill_worker_api::fallbacks::Fallbacks;
use genmill_worker_api::hedge::Hedges;
use genmill_worker_api::http::{Http, Settings};
use genmill_worker_api::inspect;
use genmill_worker_api::perform::{Limits, Performer, Unsupported};
use genmill_worker_api::prices::{Prices, command};
use genmill_worker_api::providers::Table;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Calls remote providers for jobs whose models are listed in litellm_models.yaml and openrouter_models.yaml.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "Keys come from the environment or .env (here or beside the lists of models), such as OPENAI_API_KEY; \
    rows of providers.toml beside the lists add providers or change known ones. Everything \
    else is set in genmill.toml or by GENMILL__SECTION__KEY variables. --check-config shows what is in effect."
)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Tell what is known of providers, and whether they can be reached
    Providers(inspect::Args),
    /// Tell what models cost, and take over published prices
    Prices(command::Args),
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.command {
        None => daemon(&args.common, check, run),
        Some(Command::Providers(command)) => inspect::run(&command, args.common.config.as_deref()),
        Some(Command::Prices(command)) => command::run(&command, args.common.config.as_deref()),
    }
}

/// What is made of the listed models: where each would be called, and what is missing.
fn check(loaded: &Loaded) -> anyhow::Result<Vec<String>> {
    let table = Table::read(&loaded.config.models.dir)?;
    let catalog = Catalog::new(&loaded.models, &table, &loaded.config.providers, &loaded.environment)?;
    Fallbacks::new(&loaded.config.api.fallbacks)?;
    Hedges::new(&loaded.config.api.hedging)?;
    Ok(catalog.models.iter().map(|model| catalog.describe(model)).collect())
}

async fn run(context: Context) -> anyhow::Result<()> {
    let performer = Arc::new(performer(&context)?);
    let prefixes = PREFIXES.iter().filter(|prefix| prefix.is_remote()).map(|prefix| prefix.name.to_owned());
    let api = &context.config.api;
    let ms = Duration::from_millis;
    let times = Batching { fill: ms(api.batch_fill_ms), poll: ms(api.batch_poll_ms), settle: ms(api.batch_settle_ms) };
    serve_batches(context, Kind { name: "api", prefixes: prefixes.collect() }, performer, times).await
}

fn performer(context: &Context) -> anyhow::Result<Performer> {
    let table = Table::read(&context.config.models.dir)?;
    let catalog = Catalog::new(&context.models, &table, &context.config.providers, &context.environment)?;
    for model in catalog.models.iter().filter(|model| model.availability != Availability::Ready) {
        tracing::warn!(model = %model.name, missing = ?model.availability, "listed, but cannot be served");
    }
    let api = &context.config.api;
    let unsupported = if api.drop_params { Unsupported::LeaveOut } else { Unsupported::Refuse };
    let limit = |ms: u64| (ms > 0).then(|| Duration::from_millis(ms));
    let (first_byte, idle) = (limit(api.first_byte_timeout_ms), limit(api.idle_timeout_ms));
    let limits = Limits { calls_max: api.calls_max, unsupported, batches: api.batches, first_byte, idle };
    let http = Http::new(&Settings::of(api)).context("cannot set up HTTP")?;
    let fallbacks = Fallbacks::new(&api.fallbacks)?;
    let hedges = Hedges::new(&api.hedging)?;
    let others = fallbacks.models().chain(hedges.models());
    for model in others.filter(|model| !catalog.endpoints.contains_key(&model.lane())) {
        tracing::warn!(%model, "is to answer in place of another, but no listed model of its provider can be called");
    }
    let performer = Performer::new(catalog, Prices::read(&context.config.models.dir)?, http, limits);
    let bounds = Bounds { ttl_ms: api.cache_ttl_ms, bytes_max: api.cache_bytes_max };
    let performer = performer.with_fallbacks(fallbacks).with_hedges(hedges);
    let performer = performer.with_cache((bounds.ttl_ms > 0).then_some(Cache { bounds }));
    Ok(performer.within(api.calls_start, context.config.limits.clone()))
}
