//! How a daemon starts and ends: flags that all share, configuration, telemetry, runtime, exit code.

use crate::config::{self, Config};
use crate::environment::Environment;
use crate::health::CannotListen;
use crate::models::{self, ListedModel};
use crate::shutdown::{self, Shutdown};
use crate::{parent, telemetry, tls};
use anyhow::Context as _;
use rustix::process::Signal;
use std::future::Future;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The exit code of a daemon whose configuration is wrong: starting it again cannot help.
pub const EXIT_WRONG_CONFIG: u8 = 2;

/// Flags of every daemon.
#[derive(Clone, Debug, clap::Args)]
pub struct CommonArgs {
    /// Configuration file [default: genmill.toml, when there is one]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the effective configuration with secrets masked, and exit
    #[arg(long)]
    pub check_config: bool,
    /// Die with the process that starts this one
    #[arg(long, hide = true, value_name = "PID")]
    pub exit_with_parent: Option<i32>,
}

/// What a daemon gets to work with.
#[derive(Debug)]
pub struct Context {
    /// The effective configuration.
    pub config: Config,
    /// Every model that the configuration lists.
    pub models: Vec<ListedModel>,
    /// The environment, for keys whose names only the daemon knows.
    pub environment: Environment,
    /// Cancelled by SIGTERM and Ctrl-C.
    pub shutdown: Shutdown,
}

/// Everything that can be known before a daemon runs.
#[derive(Debug)]
pub struct Loaded {
    /// The effective configuration.
    pub config: Config,
    /// Every model that the configuration lists.
    pub models: Vec<ListedModel>,
    /// The environment.
    pub environment: Environment,
}

/// Reads configuration, model lists and environment.
///
/// # Errors
/// When any of them is malformed; the message names the place.
pub fn load(file: Option<&Path>) -> anyhow::Result<Loaded> {
    let environment = Environment::read(Path::new("."))?;
    // Keys may lie beside the lists of models too, in a folder that only the configuration tells.
    let folder = config::load(file, &environment)?.models.dir;
    let environment = environment.below(&folder)?;
    let config = config::load(file, &environment)?;
    let models = models::read(&config.models)?;
    Ok(Loaded { config, models, environment })
}

/// What a daemon must tell of its configuration before it runs: lines for `--check-config`, such as what it makes of the
/// models that are listed.
///
/// It fails when the daemon cannot run with this configuration.
pub type Check = fn(&Loaded) -> anyhow::Result<Vec<String>>;

/// Runs a daemon to its end: `main` until it returns, or a signal begins the shutdown, which `main` must then obey. A
/// second signal ends it at once.
pub fn daemon<F, Fut>(args: &CommonArgs, check: Check, main: F) -> ExitCode
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    if let Some(parent) = args.exit_with_parent
        && let Err(error) = parent::end_with(parent, Signal::KILL)
    {
        return fail(1, &error.into());
    }
    let checked = load(args.config.as_deref()).and_then(|loaded| {
        let told = check(&loaded)?;
        Ok((loaded, told))
    });
    let (loaded, told) = match checked {
        Ok(checked) => checked,
        Err(error) => return fail(EXIT_WRONG_CONFIG, &error),
    };
    if args.check_config {
        return match print_config(&loaded, &told) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(1, &error),
        };
    }
    if let Err(error) = telemetry::start(&loaded.config.telemetry) {
        return fail(EXIT_WRONG_CONFIG, &error.into());
    }
    tls::install();
    match block_on(loaded, main) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<CannotListen>() => fail(EXIT_WRONG_CONFIG, &error),
        Err(error) => fail(1, &error),
    }
}

/// How long tasks that block may go on after everything else has ended.
const BLOCKING_GRACE: Duration = Duration::from_secs(1);

fn block_on<F, Fut>(loaded: Loaded, main: F) -> anyhow::Result<()>
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start tokio")?;
    let ended = runtime.block_on(async {
        let Loaded { config, models, environment } = loaded;
        let shutdown = Shutdown::default();
        let hurry = CancellationToken::new();
        listen_for_signals(&shutdown, hurry.clone());
        let running = async {
            let ended = on_a_worker(main(Context { config, models, environment, shutdown: shutdown.clone() })).await;
            shutdown.finish().await;
            ended
        };
        tokio::select! {
            ended = running => ended,
            () = hurry.cancelled() => Err(anyhow::anyhow!("ended by a second signal, before everything was put away")),
        }
    });
    runtime.shutdown_timeout(BLOCKING_GRACE);
    ended
}

/// Runs on a thread of the runtime's own: whatever stays on the one that waits for the end wakes the others, and is woken
/// by them, for everything that they tell each other.
async fn on_a_worker<F: Future<Output = anyhow::Result<()>> + Send + 'static>(main: F) -> anyhow::Result<()> {
    let mut running = JoinSet::new();
    running.spawn(main);
    match running.join_next().await {
        Some(Ok(ended)) => ended,
        Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Some(Err(_)) | None => Ok(()),
    }
}

/// The first signal begins the shutdown, the second ends it.
fn listen_for_signals(shutdown: &Shutdown, hurry: CancellationToken) {
    let begun = shutdown.clone();
    // Not tracked: it waits for a second signal for as long as the shutdown takes, and ends with the runtime.
    #[expect(clippy::disallowed_methods, reason = "shutdown must not wait for the one who may cut it short")]
    drop(tokio::spawn(async move {
        for call in [Shutdown::begin, |_: &Shutdown| ()] {
            match shutdown::signal().await {
                Ok(signal) => tracing::info!(signal, "draining; a second signal ends this at once"),
                Err(error) => {
                    return tracing::error!(%error, "cannot listen for signals; end this process with SIGKILL");
                }
            }
            if begun.token().is_cancelled() {
                hurry.cancel();
            }
            call(&begun);
        }
    }));
}

/// The effective configuration for a person: secrets masked, models listed, and what the daemon makes of it.
///
/// # Errors
/// When it cannot be written as TOML, which is a defect.
pub fn show(loaded: &Loaded, told: &[String]) -> anyhow::Result<String> {
    let mut lines = vec![config::show(&loaded.config)?];
    lines.push(format!("# models listed in {}:", loaded.config.models.dir.display()));
    for model in &loaded.models {
        let path = model.path.as_ref().map(|path| format!(" at {}", path.resolved.display())).unwrap_or_default();
        lines.push(format!("#   {} ({}){path}", model.name, model.file.display()));
    }
    lines.extend(told.iter().map(|line| format!("# {line}")));
    Ok(lines.join("\n"))
}

fn print_config(loaded: &Loaded, told: &[String]) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{}", show(loaded, told)?)?;
    Ok(())
}

/// Prints the line that tells whoever started this daemon where it can be reached.
///
/// # Errors
/// When standard output is closed.
pub fn print_ready(places: &[(&str, String)]) -> std::io::Result<()> {
    let places: Vec<String> = places.iter().map(|(name, place)| format!("{name}={place}")).collect();
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready {}", places.join(" "))?;
    out.flush()
}

fn fail(code: u8, error: &anyhow::Error) -> ExitCode {
    // Telemetry may not have started yet, so this goes to standard error as it stands.
    drop(writeln!(std::io::stderr().lock(), "error: {error:#}"));
    ExitCode::from(code)
}
