//! The one task that knows how the mill stands: starts members in order, restarts the dead, stops all in order.

use super::launch::Launch;
use super::member::{self, Death, Next, Phase, Role, STABLE_AFTER};
use super::ready::{self, Places};
use super::tend::{self, Ask, Event};
use crate::exit::WrongUsage;
use anyhow::{Context as _, anyhow, bail};
use std::process::ExitStatus;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::task::TaskTracker;

/// Each child has at most a few events under way.
const EVENTS_MAX: usize = 64;
/// A child is asked to stop, then to die.
const ASKS_MAX: usize = 4;

/// Runs a mill.
pub(crate) struct Supervisor {
    launch: Launch,
    /// How long all together may take to stop.
    stop_max: Duration,
    members: Vec<Member>,
    tasks: TaskTracker,
    told: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    /// Where the scheduler is.
    places: Places,
    mill_was_ready: bool,
}

struct Member {
    role: Role,
    phase: Phase,
    ready_since: Option<Instant>,
    deaths_in_a_row: u32,
    /// When it is started again.
    due: Option<Instant>,
    asks: Option<mpsc::Sender<Ask>>,
}

/// The signals that end the mill.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Supervisor {
    pub(crate) fn new(launch: Launch, stop_max: Duration) -> Self {
        let (told, events) = mpsc::channel(EVENTS_MAX);
        let member =
            |role| Member { role, phase: Phase::Idle, ready_since: None, deaths_in_a_row: 0, due: None, asks: None };
        let members = launch.roles().into_iter().map(member).collect();
        let tasks = TaskTracker::new();
        Self { launch, stop_max, members, tasks, told, events, places: Places::default(), mill_was_ready: false }
    }

    /// Runs until a signal comes, or the mill cannot run; then stops everything.
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        let mut signals = Signals::listen()?;
        let ended = self.keep_up(&mut signals).await;
        let stopped = self.stop(&mut signals).await;
        self.tasks.close();
        self.tasks.wait().await;
        ended.and(stopped)
    }

    async fn keep_up(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        loop {
            for role in member::to_start(&self.phases()) {
                self.start(role)?;
            }
            let due =
                self.members.iter().filter_map(|member| Some((member.due?, member.role))).min_by_key(|(at, _)| *at);
            tokio::select! {
                Some(event) = self.events.recv() => self.note(event)?,
                role = wait_until(due) => self.start(role)?,
                name = signals.next() => {
                    tracing::info!(signal = name, "stopping; once more kills");
                    return Ok(());
                }
            }
        }
    }

    fn phases(&self) -> Vec<(Role, Phase)> {
        self.members.iter().map(|member| (member.role, member.phase)).collect()
    }

    fn member(&mut self, role: Role) -> anyhow::Result<&mut Member> {
        self.members.iter_mut().find(|member| member.role == role).context("no such member")
    }

    fn start(&mut self, role: Role) -> anyhow::Result<()> {
        let child = self.launch.start(role)?;
        tracing::debug!(member = role.name(), pid = child.id(), "started");
        let (ask, asks) = mpsc::channel(ASKS_MAX);
        let told = self.told.clone();
        match (role, self.launch.redis_port()) {
            (Role::Redis, Some(port)) => drop(self.tasks.spawn(tend::private_redis(port, child, told, asks))),
            _ => drop(self.tasks.spawn(tend::daemon(role, child, told, asks))),
        }
        let member = self.member(role)?;
        member.phase = Phase::Starting;
        member.due = None;
        member.asks = Some(ask);
        Ok(())
    }

    fn note(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Ready(role, places) => self.note_ready(role, places),
            Event::Ended(role, ended) => self.note_death(role, &ended.context("cannot wait for a child")?),
        }
    }

    fn note_ready(&mut self, role: Role, places: Places) -> anyhow::Result<()> {
        let member = self.member(role)?;
        member.phase = Phase::Ready;
        member.ready_since = Some(Instant::now());
        tracing::debug!(member = role.name(), "ready");
        if role == Role::Scheduler {
            self.launch.keep_places(&places);
            self.places = places;
        }
        let all = self.members.iter().all(|member| member.phase == Phase::Ready);
        if all && !self.mill_was_ready {
            self.mill_was_ready = true;
            crate::output::line(&ready::line(&self.places, &self.launch.shown_redis_url()))?;
        }
        Ok(())
    }

    fn note_death(&mut self, role: Role, status: &ExitStatus) -> anyhow::Result<()> {
        let mill_was_ready = self.mill_was_ready;
        let member = self.member(role)?;
        member.asks = None;
        member.phase = Phase::Down;
        let ready_since = member.ready_since.take();
        let was_stable = ready_since.is_some_and(|since| since.elapsed() >= STABLE_AFTER);
        member.deaths_in_a_row = if was_stable { 1 } else { member.deaths_in_a_row + 1 };
        let death = Death { code: status.code(), in_a_row: member.deaths_in_a_row, mill_was_ready };
        match member::after(death) {
            Next::WrongConfig => {
                let told = anyhow!("{} cannot run with this configuration; what it said is above", role.name());
                Err(WrongUsage(told).into())
            }
            Next::GiveUp => bail!("{} cannot run ({status}); what it said is above", role.name()),
            Next::Restart(wait) => self.restart_later(role, *status, wait),
        }
    }

    fn restart_later(&mut self, role: Role, status: ExitStatus, wait: Duration) -> anyhow::Result<()> {
        tracing::warn!(member = role.name(), %status, "died; starting it again in {} s", wait.as_secs());
        let others_idle = self.members.iter().all(|member| member.role == Role::Redis || member.phase == Phase::Idle);
        if role == Role::Redis && others_idle {
            // Nobody knows its port yet, and that may be what it died of.
            self.launch.forget_redis_port();
        }
        self.member(role)?.due = Some(Instant::now() + wait);
        Ok(())
    }

    /// Stops all in order; kills what takes too long, or when a second signal comes.
    async fn stop(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        let deadline = Instant::now() + self.stop_max;
        loop {
            let leaving = member::to_stop(&self.phases());
            if leaving.is_empty() {
                return Ok(());
            }
            self.ask(&leaving, &Ask::Stop);
            if self.wait_for(&leaving, deadline, signals).await.is_err() {
                return self.kill().await;
            }
        }
    }

    /// Waits until all of `leaving` have ended.
    async fn wait_for(&mut self, leaving: &[Role], deadline: Instant, signals: &mut Signals) -> Result<(), TooLong> {
        while self.members.iter().any(|member| leaving.contains(&member.role) && member.phase != Phase::Gone) {
            tokio::select! {
                event = timeout_at(deadline, self.events.recv()) => self.note_leaving(event.map_err(|_| TooLong)?),
                _ = signals.next() => return Err(TooLong),
            }
        }
        Ok(())
    }

    /// While stopping, all that matters is who has ended.
    fn note_leaving(&mut self, event: Option<Event>) {
        let Some(Event::Ended(role, _)) = event else { return };
        tracing::debug!(member = role.name(), "stopped");
        if let Ok(member) = self.member(role) {
            member.phase = Phase::Gone;
            member.asks = None;
        }
    }

    fn ask(&self, roles: &[Role], ask: &Ask) {
        let asked = self.members.iter().filter(|member| roles.contains(&member.role));
        for asks in asked.filter_map(|member| member.asks.as_ref()) {
            // A child that has just ended is not there to be asked, and one with asks waiting need not be asked again.
            drop(asks.try_send(ask.clone()));
        }
    }

    async fn kill(&mut self) -> anyhow::Result<()> {
        loop {
            let alive: Vec<Role> =
                self.members.iter().filter(|member| member.asks.is_some()).map(|member| member.role).collect();
            if alive.is_empty() {
                bail!("not everything stopped in order: the rest was killed");
            }
            let names: Vec<&str> = alive.iter().map(|role| role.name()).collect();
            tracing::warn!("killing {}", names.join(", "));
            self.ask(&alive, &Ask::Die);
            let event = self.events.recv().await;
            self.note_leaving(event);
        }
    }
}

/// Waits until a member is due; for ever when none is.
async fn wait_until(due: Option<(Instant, Role)>) -> Role {
    match due {
        Some((at, role)) => {
            sleep_until(at).await;
            role
        }
        None => std::future::pending().await,
    }
}

/// Stopping in order did not work out.
#[derive(Debug)]
struct TooLong;

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = || Ok::<_, std::io::Error>((signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?));
        let (interrupt, terminate) = listen().context("cannot listen for signals")?;
        Ok(Self { interrupt, terminate })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}
