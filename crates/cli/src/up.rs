//! `genmill up`: a whole mill on this machine. Starts the daemons and, when none is configured, a Redis, as processes.
//!
//! Never here: anything that the daemons do themselves.

mod data_folder;
mod launch;
mod member;
mod ready;
mod redis;
mod supervise;
mod tend;

use crate::exit::Ending;
use crate::output;
use anyhow::{Context as _, ensure};
use genmill_daemon::config::{self, Config};
use genmill_daemon::environment::Environment;
use genmill_daemon::{models, telemetry};
use launch::Launch;
use std::path::{Path, PathBuf};
use supervise::Supervisor;

/// Run a whole mill on this machine: scheduler, workers and, when none is configured, a Redis
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Configuration file [default: genmill.toml, when there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder of the model configuration, such as vllm_models.yaml [default: ./configs]
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Where the private Redis keeps its data
    #[arg(long, value_name = "DIR", default_value = "genmill-data")]
    data_dir: PathBuf,
    /// Where gRPC is served; port 0 picks a free one [default: 127.0.0.1:50051]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Use this Redis instead of a private one
    #[arg(long, value_name = "URL")]
    redis: Option<String>,
    /// Print the effective configuration with secrets masked, and exit
    #[arg(long)]
    check_config: bool,
}

const EXAMPLES: &str = "\
When jobs can be taken, one line is printed: ready grpc=HOST:PORT http=HOST:PORT redis=URL
Logs go to standard error. http serves /healthz and /readyz. Ctrl-C or SIGTERM drains and stops everything; a second
Ctrl-C kills. The next `up` with the same --data-dir goes on with the same jobs.

Examples:
  genmill up --models examples/tictactoe/models
  genmill up --listen 127.0.0.1:0 --data-dir /var/lib/genmill
  genmill up --redis redis://10.0.0.5:6379";

pub(crate) async fn run(args: Args) -> anyhow::Result<Ending> {
    let config = effective_config(&args)?;
    if args.check_config {
        output::part(&config::show(&config)?)?;
        return Ok(Ending::Done);
    }
    telemetry::start(&config.telemetry)?;
    let launch = prepare(&args, &config).await?;
    Supervisor::new(launch).run().await?;
    Ok(Ending::Done)
}

/// What the daemons will see, flags included; reading it here tells what is wrong before anything is started.
fn effective_config(args: &Args) -> anyhow::Result<Config> {
    let environment = Environment::read(Path::new("."))?;
    let mut config = config::load(args.config.as_deref(), &environment)?;
    if let Some(folder) = &args.models {
        ensure!(folder.is_dir(), "--models {}: there is no such folder", folder.display());
        config.models.dir.clone_from(folder);
    }
    if let Some(listen) = &args.listen {
        config.scheduler.listen.clone_from(listen);
    }
    if let Some(url) = &args.redis {
        config.redis.url = Some(url.clone());
    }
    models::read(&config.models)?;
    Ok(config)
}

async fn prepare(args: &Args, config: &Config) -> anyhow::Result<Launch> {
    let redis = match &config.redis.url {
        Some(url) => launch::Redis::Configured { url: url.clone() },
        None => {
            let program = redis::find_program().await?;
            let folder = data_folder::DataFolder::take(&args.data_dir).await?;
            launch::Redis::Private { program, folder, port: None }
        }
    };
    let own_binary = std::env::current_exe().context("cannot find out where this program lies")?;
    Ok(Launch {
        own_binary,
        config_file: args.config.clone(),
        models: config.models.dir.clone(),
        listen: config.scheduler.listen.clone(),
        http_listen: config.scheduler.http_listen.clone(),
        redis,
    })
}
