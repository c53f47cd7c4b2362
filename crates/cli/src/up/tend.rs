//! One task for each running child: waits until it is ready, passes signals on, tells of its end.

use super::member::Role;
use super::ready::{self, Places};
use super::redis;
use std::future::Future;
use std::process::ExitStatus;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::sync::mpsc;
use tokio::time::sleep;

/// How often a starting Redis is asked whether it answers.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// What a child did.
#[derive(Debug)]
pub(crate) enum Event {
    /// It can do its work. It may say so more than once.
    Ready(Role, Places),
    /// It has ended.
    Ended(Role, std::io::Result<ExitStatus>),
}

/// A signal to pass on.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    /// Stop in good order.
    Stop,
    /// Die.
    Die,
}

/// Tends a daemon, which says itself when it is ready.
pub(crate) async fn daemon(role: Role, mut child: Child, events: mpsc::Sender<Event>, asks: mpsc::Receiver<Ask>) {
    let stdout = child.stdout.take();
    let told = events.clone();
    let listening = async move {
        if let Some(stdout) = stdout {
            listen(role, stdout, &told).await;
        }
    };
    tend(role, child, listening, events, asks).await;
}

/// Tends the private Redis, which is asked.
pub(crate) async fn private_redis(port: u16, child: Child, events: mpsc::Sender<Event>, asks: mpsc::Receiver<Ask>) {
    let pid = child.id().unwrap_or_default();
    let told = events.clone();
    let asking = async move {
        while !redis::answers(port, pid).await {
            sleep(ASK_EVERY).await;
        }
        send(&told, Event::Ready(Role::Redis, Places::default())).await;
    };
    tend(Role::Redis, child, asking, events, asks).await;
}

/// Reads what a daemon prints: its ready line is meant for us, all else is passed on to standard error.
async fn listen(role: Role, stdout: ChildStdout, events: &mpsc::Sender<Event>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match ready::parse(&line) {
            Some(places) => send(events, Event::Ready(role, places)).await,
            None => crate::output::note(&line),
        }
    }
}

async fn tend(
    role: Role,
    mut child: Child,
    listening: impl Future<Output = ()>,
    events: mpsc::Sender<Event>,
    mut asks: mpsc::Receiver<Ask>,
) {
    let mut listening = std::pin::pin!(listening);
    let mut listens = true;
    let ended = loop {
        tokio::select! {
            ended = child.wait() => break ended,
            Some(ask) = asks.recv() => pass_on(&mut child, role, ask),
            () = &mut listening, if listens => listens = false,
        }
    };
    send(&events, Event::Ended(role, ended)).await;
}

fn pass_on(child: &mut Child, role: Role, ask: Ask) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    // Without an id it has ended, and its end will be told.
    let Some(pid) = pid else { return };
    let signal = match ask {
        Ask::Stop => rustix::process::Signal::TERM,
        Ask::Die => rustix::process::Signal::KILL,
    };
    if let Err(error) = rustix::process::kill_process(pid, signal) {
        tracing::warn!(%error, member = role.name(), "cannot signal");
    }
}

async fn send(events: &mpsc::Sender<Event>, event: Event) {
    // The supervisor reads events until every child has ended, so nobody is there to miss this one.
    drop(events.send(event).await);
}
