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

use crate::exit::{Ending, WrongUsage};
use crate::output;
use anyhow::{Context as _, ensure};
use clap::builder::NonEmptyStringValueParser;
use genmill_daemon::config::{self, Config};
use genmill_daemon::environment::Environment;
use genmill_daemon::run::Loaded;
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
    #[arg(long, value_name = "HOST:PORT", value_parser = NonEmptyStringValueParser::new())]
    listen: Option<String>,
    /// Use this Redis instead of a private one: redis://HOST:PORT, or redis+cluster://HOST:PORT,HOST:PORT
    #[arg(long, value_name = "URL", value_parser = NonEmptyStringValueParser::new())]
    redis: Option<String>,
    /// Print the effective configuration with secrets masked, and the models that it lists, and exit
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
  genmill up --redis redis://10.0.0.5:6379

Exit codes: 0 stopped in order, 1 something broke, 2 wrong usage or configuration.";

pub(crate) async fn run(args: Args) -> anyhow::Result<Ending> {
    let environment = Environment::read(Path::new(".")).map_err(|error| WrongUsage(error.into()))?;
    let loaded = load(&args, &environment).map_err(WrongUsage)?;
    if args.check_config {
        output::line(&genmill_daemon::run::show(&loaded, &[])?)?;
        return Ok(Ending::Done);
    }
    telemetry::start(&loaded.config.telemetry)?;
    let launch = prepare(&args, &loaded.config).await?;
    Supervisor::new(launch, member::stop_max(&loaded.config)).run().await?;
    Ok(Ending::Done)
}

/// What the daemons will see, flags included; reading it here tells what is wrong before anything is started.
fn load(args: &Args, environment: &Environment) -> anyhow::Result<Loaded> {
    // As the daemons are told of them, so that they are checked by the same rules.
    let flags = [(launch::LISTEN, &args.listen), (launch::REDIS_URL, &args.redis)];
    let flags = flags.into_iter().filter_map(|(name, flag)| Some((name, flag.as_deref()?)));
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let environment: Environment = environment.iter().chain(flags).map(owned).collect();
    let mut config = config::load(args.config.as_deref(), &environment)?;
    if let Some(folder) = &args.models {
        ensure!(folder.is_dir(), "--models {}: there is no such folder", folder.display());
        config.models.dir.clone_from(folder);
    }
    let models = models::read(&config.models)?;
    Ok(Loaded { config, models, environment })
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        up: Args,
    }

    /// Reads `up` with a configuration file of its own, and variables that flags override.
    fn check(file: &str, flags: &[&str]) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("genmill.toml");
        std::fs::write(&path, file).unwrap();
        let line = ["up", "--config", path.to_str().unwrap()].into_iter().chain(flags.iter().copied());
        let variables = [(launch::LISTEN, "a:1"), (launch::REDIS_URL, "redis://a")];
        let environment = variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let loaded = load(&Line::try_parse_from(line).unwrap().up, &environment);
        loaded.map(|loaded| loaded.config).map_err(|error| format!("{error:#}"))
    }

    fn refused(file: &str, flags: &[&str], says: &str) {
        let error = check(file, flags).unwrap_err();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn flags_win() {
        let config = check("[redis]\nurl = \"redis://f\"", &["--listen", "b:0", "--redis", "redis://b:2"]).unwrap();
        assert_eq!(config.scheduler.listen, "b:0");
        assert_eq!(config.redis.url.as_deref(), Some("redis://b:2"));
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_is_started() {
        refused("", &["--listen", "nonsense"], "`nonsense` is not of the form HOST:PORT");
        refused("", &["--listen", "host:99999"], "`host:99999` is not of the form HOST:PORT");
        refused("", &["--redis", "nonsense"], "redis.url");
        refused("", &["--models", "/no/such/dir"], "--models /no/such/dir: there is no such folder");
        refused("[scheduler]\nlissten = \"x\"", &[], "did you mean `listen`?");
        assert!(check("[models]\ndir = \"/no/such/dir\"", &[]).is_ok(), "a folder of the configuration may be missing");
    }
}
