//! The whole mill while things go wrong: processes are killed and stopped, connections are cut, delayed and half-closed,
//! and whatever was promised must hold all the same. One run is a schedule of faults (from a seed), a load, and a check
//! of everything that was written down.
//!
//! `cargo xtask chaos --minutes N --seed S` and the test `chaos` run the same. Never here: faults of machines and disks.

pub mod check;
pub mod history;
pub mod load;
pub mod member;
pub mod proxy;
pub mod report;
pub mod schedule;
pub mod world;

use anyhow::Context as _;
use check::{Evidence, FINAL_WATCH, Settings};
use genmill_client::{Client, TenantLimits, Until, v1};
use genmill_core::model::ModelName;
use history::{Event, Face, History};
use load::Load;
use report::Report;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use world::World;

/// How much of a run nothing goes wrong in: what is left is done then.
const QUIET: Duration = Duration::from_secs(15);

/// How long all jobs may take to end when nothing goes wrong any more. Far more than they need: machines are shared.
const SETTLES_WITHIN: Duration = Duration::from_secs(60);

/// How long a watch may take to tell what has ended.
const TOLD_WITHIN: Duration = Duration::from_secs(20);

/// A run to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How long it takes, in minutes.
    pub minutes: u32,
    /// What decides about everything that can be decided.
    pub seed: u64,
}

impl Run {
    /// For how long things go wrong.
    #[must_use]
    pub fn suffering(&self) -> Duration {
        Duration::from_secs(60 * u64::from(self.minutes)).saturating_sub(QUIET)
    }

    /// Makes the run. What it leaves behind stays on disk when something was found.
    ///
    /// # Errors
    /// When the mill cannot be started, or does not come back when all is healed.
    pub async fn make(self) -> anyhow::Result<Report> {
        let folder = tempfile::Builder::new().prefix("genmill-chaos-").tempdir()?;
        match self.make_in(folder.path()).await {
            Ok(report) if report.violations.is_empty() => Ok(report),
            Ok(report) => Ok(report.left_in(keep(folder))),
            Err(error) => {
                let kept = keep(folder);
                Err(error.context(format!("{}; what was written down is in {kept}", report::replay(&self))))
            }
        }
    }

    async fn make_in(self, folder: &Path) -> anyhow::Result<Report> {
        let length_ms = u64::try_from(self.suffering().as_millis())?;
        let schedule = schedule::schedule(self.seed, length_ms);
        let world = World::start(folder).await?;
        let clients = world.clients().await?;
        set_caps(&clients[0]).await?;
        let mut load = Load::start(&clients, world.history(), self.seed);
        world.suffer(&schedule, self.suffering()).await?;
        let ended = load.end(SETTLES_WITHIN).await;
        let jobs = settle(&world, &clients, &mut load).await?;
        let settings = Settings {
            calls_max: world::CALLS_MAX,
            tenant_cap: world::TENANT_CAP,
            lane_cap: world::LANE_CAP,
            retries_max: world::RETRIES_MAX,
            losses_max: world::LOSSES_MAX,
            lease_ms: world::LEASE_MS,
        };
        if !ended {
            world.history().note(Event::Trouble { what: format!("clients still wait after {SETTLES_WITHIN:?}") });
        }
        let evidence = Evidence { settings, history: world.history().entries(), jobs, calls: world.calls() };
        Ok(Report::new(self, evidence))
    }
}

/// Sets the caps of which the check knows.
async fn set_caps(client: &Client) -> anyhow::Result<()> {
    let (tenant, most) = world::TENANT_CAP;
    let limits = TenantLimits { max_running: Some(u32::try_from(most)?), weight_percent: None };
    client.set_tenant_limits(tenant, limits).await?;
    let (model, most) = world::LANE_CAP;
    let lane = ModelName::parse(model)?.lane().to_string();
    Ok(client.set_lane_limits(&lane, Some(u32::try_from(most)?)).await?)
}

fn keep(folder: TempDir) -> String {
    folder.keep().display().to_string()
}

/// Reads everything, once before the workers are gone and Redis is killed once more, and once after. Returns the jobs as
/// they are then.
async fn settle(world: &World, clients: &[Client], load: &mut Load) -> anyhow::Result<BTreeMap<String, v1::Job>> {
    let [first, .., last] = clients else { anyhow::bail!("there are two schedulers") };
    let history = world.history();
    // A job that never ends is for the check to name.
    if let Ok(Err(error)) = timeout(TOLD_WITHIN, tell_all(first, history)).await {
        history.note(Event::Trouble { what: format!("the final watch: {error:#}") });
    }
    list_all(last, history).await?;
    let acknowledged = |history: &History| {
        let evidence = Evidence { history: history.entries(), ..Evidence::default() };
        evidence.acknowledged().into_iter().map(str::to_owned).collect::<Vec<String>>()
    };
    let ids = acknowledged(history);
    load.witness(ids.len(), TOLD_WITHIN).await;
    world.end_workers().await?;
    world.restart_redis().await?;
    read_all(last, &ids).await
}

/// One more watch of all jobs, from the beginning until all have ended.
async fn tell_all(client: &Client, history: &History) -> anyhow::Result<()> {
    let (watch, all) = (|| FINAL_WATCH.to_owned(), String::new);
    history.note(Event::Watching { watch: watch(), tenant: all(), experiment: all() });
    let mut finished = Box::pin(client.watch_jobs(v1::JobFilter::default(), String::new(), Until::Idle));
    while let Some(told) = finished.try_next().await? {
        let face = Face::of(&told.job);
        history.note(Event::Told { watch: watch(), job: told.job.id, face });
    }
    Ok(())
}

async fn list_all(client: &Client, history: &History) -> anyhow::Result<()> {
    let jobs = loop {
        match client.list(v1::JobFilter::default()).collect::<Result<Vec<v1::Job>, _>>().await {
            // A scheduler may have yet to find out that Redis is back.
            Err(error) if error.is_passing() => sleep(Duration::from_millis(100)).await,
            listed => break listed.context("listing all jobs")?,
        }
    };
    for job in jobs {
        let state = job.state().as_str_name().to_owned();
        history.note(Event::Listed { job: job.id, state });
    }
    Ok(())
}

/// Reads jobs one by one. One that is not there is left out.
async fn read_all(client: &Client, ids: &[String]) -> anyhow::Result<BTreeMap<String, v1::Job>> {
    let mut jobs = BTreeMap::new();
    for id in ids {
        let job = loop {
            match client.get(id).await {
                // Redis was killed a moment ago.
                Err(error) if error.is_passing() => sleep(Duration::from_millis(100)).await,
                Err(genmill_client::Error::NotFound { .. }) => break None,
                read => break Some(read?),
            }
        };
        jobs.extend(job.map(|job| (id.clone(), job)));
    }
    Ok(jobs)
}
