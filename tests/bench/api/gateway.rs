//! The gateways that the worker is compared with: each a process of its own, as its documentation says to start it, with
//! one process for its work. Never here: installing them (`cargo xtask bench api` does).

use crate::figures::{Figures, Goal};
use crate::load::{self, Route, until_held};
use crate::process::Process;
use crate::sample::add_times;
use crate::{Sizes, Sums};
use anyhow::{Context as _, bail, ensure};
use genmill_standin::{Options, Standin};
use genmill_tests::redis_server::free_port;
use http::{HeaderMap, HeaderName};
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::time::sleep;

/// The key of whoever calls a gateway. LiteLLM does not start without one that is hard to guess.
const KEY: &str = "sk-5d0c2f7b91e84a6f8a3be1c7d2940f6e";

/// How long one may take until it answers.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Of the calls that one answers when it has as many as it can get, the share at which it is not overloaded.
const BEARS: f64 = 0.7;

/// A gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    LiteLlm,
    Portkey,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::LiteLlm => "LiteLLM",
            Self::Portkey => "Portkey",
        }
    }

    /// Whether its answers are asked for in pieces. Portkey's gateway 1.15 fails then, in node 20.
    pub(crate) const fn streams(self) -> bool {
        matches!(self, Self::LiteLlm)
    }

    /// What its answers come as.
    const fn manner(self) -> &'static str {
        if self.streams() { "streamed" } else { "answered whole" }
    }

    /// What tells its version.
    fn version(self, folder: &Path) -> Option<String> {
        let told = match self {
            Self::LiteLlm => {
                let code = "import importlib.metadata as m; print(m.version('litellm'))";
                Command::new(folder.join("bin/python")).args(["-c", code]).output().ok()?.stdout
            }
            Self::Portkey => {
                let package = std::fs::read(folder.join("node_modules/@portkey-ai/gateway/package.json")).ok()?;
                let package: serde_json::Value = serde_json::from_slice(&package).ok()?;
                package["version"].as_str()?.into()
            }
        };
        Some(String::from_utf8_lossy(&told).trim().to_owned()).filter(|version| !version.is_empty())
    }

    /// How it is started to listen on `port`, with a configuration in `place` where it needs one.
    fn command(self, folder: &Path, place: &Path, (port, standin): (u16, &Standin)) -> anyhow::Result<Command> {
        match self {
            Self::LiteLlm => {
                let config = place.join("config.yaml");
                let model =
                    format!("{{model: openai/gpt-4o-mini, api_base: '{}', api_key: sk-peer}}", standin.base_url());
                let text = format!("model_list:\n  - model_name: gpt-4o-mini\n    litellm_params: {model}\n");
                std::fs::write(&config, text)?;
                let mut command = Command::new(folder.join("bin/litellm"));
                command.args(["--host", "127.0.0.1", "--num_workers", "1", "--port", &port.to_string(), "--config"]);
                command
                    .arg(config)
                    .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
                    .env("LITELLM_LOG", "ERROR")
                    .env("LITELLM_MASTER_KEY", KEY);
                Ok(command)
            }
            Self::Portkey => {
                let mut command = Command::new("node");
                command.arg(folder.join("node_modules/@portkey-ai/gateway/build/start-server.js"));
                command.arg(format!("--port={port}")).arg("--headless").env("NODE_ENV", "production");
                Ok(command)
            }
        }
    }

    /// The headers of a call.
    fn headers(self, standin: &Standin) -> anyhow::Result<HeaderMap> {
        let own = match self {
            Self::LiteLlm => vec![],
            Self::Portkey => {
                vec![("x-portkey-provider", "openai".to_owned()), ("x-portkey-custom-host", standin.base_url())]
            }
        };
        let all = own.into_iter().chain([("authorization", format!("Bearer {KEY}"))]);
        all.map(|(name, value)| Ok((HeaderName::from_static(name), value.parse()?))).collect()
    }
}

/// A running gateway with a stand-in behind it. It ends when this is dropped.
struct Gateway {
    process: Child,
    standin: Standin,
    route: Route,
    place: TempDir,
}

impl Gateway {
    /// Starts one, and waits until it answers.
    async fn start(kind: Kind, folder: &Path) -> anyhow::Result<Self> {
        let (place, port) = (tempfile::tempdir()?, free_port()?);
        let standin = Standin::start(Options::default()).await?;
        let mut command = kind.command(folder, place.path(), (port, &standin))?;
        let log = File::create(place.path().join("log"))?;
        command.current_dir(place.path()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().context("it cannot be started")?;
        let url = format!("http://127.0.0.1:{port}/v1/chat/completions");
        let route = Route {
            http: load::client()?,
            url,
            headers: kind.headers(&standin)?,
            model: "gpt-4o-mini".to_owned(),
            streams: kind.streams(),
        };
        let mut gateway = Self { process, standin, route, place };
        let begun = Instant::now();
        while let Err(error) = gateway.route.call(0, "").await {
            if gateway.process.try_wait()?.is_some() || begun.elapsed() > READY_WITHIN {
                bail!("it does not answer ({error:#}): {}", gateway.last_words());
            }
            sleep(Duration::from_millis(200)).await;
        }
        Ok(gateway)
    }

    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.place.path().join("log")).unwrap_or_default();
        text.trim().lines().last().unwrap_or("it said nothing").to_owned()
    }

    fn process(&self) -> Process {
        Process(self.process.id())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.process.kill().and_then(|()| self.process.wait()));
    }
}

/// Measures a gateway under the load that the worker had.
pub(crate) async fn measure(figures: &mut Figures, sizes: Sizes, kind: Kind, folder: &Path) -> anyhow::Result<Sums> {
    let version = kind.version(folder).context("it is not installed there")?;
    let gateway = Gateway::start(kind, folder).await?;
    figures.heading(&format!("{} {version}, {} calls at once", kind.name(), load::AT_ONCE))?;
    gateway.route.saturate(sizes.saturated / 5).await?;
    let before = gateway.process().cpu_ms()?;
    let (calls, took) = gateway.route.saturate(sizes.saturated).await?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let count = calls as f64;
    let cpu_ms = (gateway.process().cpu_ms()? - before) / count;
    let rate = count / took.as_secs_f64();
    figures.add(&format!("CPU of a call, {}", kind.manner()), cpu_ms, "ms", Goal::Nothing)?;
    figures.add("calls", rate, "calls/s", Goal::Nothing)?;
    let added_ms = pace(figures, &gateway, sizes, rate).await?;
    drop(gateway);
    let resident_mb = hold(figures, sizes, kind, folder).await?;
    Ok(Sums { cpu_ms: [cpu_ms; 2], resident_mb, added_ms })
}

/// At the worker's pace, or the highest that it bears.
async fn pace(figures: &mut Figures, gateway: &Gateway, sizes: Sizes, rate: f64) -> anyhow::Result<f64> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive number of calls")]
    let bears = (rate * BEARS) as u64 / 10 * 10;
    let pace = sizes.pace.min(bears).max(10);
    let first = 1 << 32;
    let seen = gateway.route.pace(pace, sizes.seconds, first).await?;
    let added = seen.added(&gateway.standin, first + pace);
    let most = if pace < sizes.pace { ", the most it bears" } else { "" };
    add_times(figures, &format!("added to a call, {pace}/s{most}"), added, Goal::Nothing)
}

/// The memory of one whose calls are held.
async fn hold(figures: &mut Figures, sizes: Sizes, kind: Kind, folder: &Path) -> anyhow::Result<f64> {
    let gateway = Gateway::start(kind, folder).await?;
    figures.add("resident before", gateway.process().resident_mb()?, "MB", Goal::Nothing)?;
    let calls = gateway.route.hold(sizes.held);
    let held = until_held(&gateway.standin, sizes.held).await;
    ensure!(held > 0, "no call came to the stand-in: {}", gateway.last_words());
    let resident_mb = gateway.process().resident_mb()?;
    figures.add(&format!("resident, {held} calls in flight"), resident_mb, "MB", Goal::Nothing)?;
    let failed = calls.join_all().await.into_iter().filter(Result::is_err).count();
    if failed > 0 {
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        figures.add("of them failed", failed as f64, "calls", Goal::Nothing)?;
    }
    figures.add("the most resident, until all are answered", gateway.process().peak_mb()?, "MB", Goal::Nothing)?;
    Ok(resident_mb)
}
