//! Which connection a request takes: one that is kept, or a new one. Never here: how connections are made (`connect`) and
//! spoken over (`http1`, `http2`).

use super::connect::{Connector, New};
use super::message::{Lost, Request, Response, Stage};
use super::tasks::Tasks;
use super::{http1, http2};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, timeout};
use url::Url;

/// How long an unused connection is kept, which is less than most servers keep theirs.
const IDLE: Duration = Duration::from_secs(50);

/// Marks the connections of an origin over which no HTTP/2 is spoken.
const ALONE: &str = " alone";

/// How often unused connections are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// So many connections are opened at once to a host of which it is not known yet whether requests can share them.
const OPENING_MAX: usize = 4;

/// The connections that are kept, by the origins (scheme, host and port) that they lead to.
#[derive(Debug)]
pub(super) struct Pool {
    connector: Connector,
    kept: Mutex<Kept>,
    tasks: Tasks,
}

#[derive(Debug, Default)]
struct Kept {
    origins: HashMap<String, Origin>,
    /// Whether somebody looks for unused connections.
    swept: bool,
}

#[derive(Debug)]
struct Origin {
    /// Those of HTTP/1.1 that serve nobody, the one that served last at the end, with since when.
    idle: Vec<(http1::Connection, Instant)>,
    /// Those of HTTP/2, with since when nobody has been seen on them.
    shared: Vec<(http2::Connection, Option<Instant>)>,
    /// Closed once it is known that requests cannot share connections.
    opening: Arc<Semaphore>,
}

impl Origin {
    fn new(url: &Url) -> Self {
        let opening = Arc::new(Semaphore::new(OPENING_MAX));
        // HTTP/2 is agreed on by TLS alone.
        if url.scheme() == "http" {
            opening.close();
        }
        Self { idle: Vec::new(), shared: Vec::new(), opening }
    }

    /// A connection that can take a request now.
    fn take(&mut self) -> Option<New> {
        self.shared.retain(|(connection, _)| connection.is_open());
        if let Some((connection, unused)) = self.shared.iter_mut().find(|(connection, _)| connection.has_room()) {
            *unused = None;
            return Some(New::Http2(connection.clone()));
        }
        std::iter::from_fn(|| self.idle.pop())
            .find_map(|(mut connection, _)| connection.is_open().then_some(New::Http1(connection)))
    }

    /// Lets go of what has been unused for long.
    fn sweep(&mut self, now: Instant) {
        let long = |since: Instant| now.duration_since(since) >= IDLE;
        self.idle.retain_mut(|(connection, since)| !long(*since) && connection.is_open());
        self.shared.retain_mut(|(connection, unused)| {
            *unused = if connection.load() == 0 { Some(unused.unwrap_or(now)) } else { None };
            connection.is_open() && !unused.is_some_and(long)
        });
    }
}

impl Pool {
    pub(super) fn new(connector: Connector) -> Self {
        Self { connector, kept: Mutex::default(), tasks: Tasks::default() }
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(self: &Arc<Self>, mut request: Request) -> Result<Response, Lost> {
        // Of a request that may be called off it must be known when it leaves, which others on its connection would delay.
        let alone = request.gate.is_some();
        let mut origin = request.url.origin().ascii_serialization();
        if alone {
            origin.push_str(ALONE);
        }
        let mut again = false;
        loop {
            match self.connection(&origin, &request.url, alone).await? {
                New::Http1(connection) => {
                    let home = Home { pool: Arc::downgrade(self), origin };
                    return connection.exchange(request, home).await;
                }
                New::Http2(connection) => match connection.exchange(request).await {
                    Ok(response) => return Ok(response),
                    Err(http2::Failed { untouched: Some(untouched), .. }) if !again => request = untouched,
                    Err(http2::Failed { lost, .. }) => return Err(lost),
                },
            }
            again = true;
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn idle(&self, url: &Url) -> usize {
        self.kept().origins.get(&url.origin().ascii_serialization()).map_or(0, |origin| origin.idle.len())
    }

    fn take(&self, origin: &str) -> Option<New> {
        self.kept().origins.get_mut(origin)?.take()
    }

    async fn connection(self: &Arc<Self>, origin: &str, url: &Url, alone: bool) -> Result<New, Lost> {
        if let Some(connection) = self.take(origin) {
            return Ok(connection);
        }
        // In a box: it is large, and gone before the answer is waited for.
        Box::pin(self.open(origin, url, alone)).await
    }

    /// Opens a connection, or finds one that has been opened meanwhile.
    async fn open(self: &Arc<Self>, origin: &str, url: &Url, alone: bool) -> Result<New, Lost> {
        let opening = self.origin(origin, url, |origin| Arc::clone(&origin.opening));
        let permit: Option<SemaphorePermit<'_>> = opening.acquire().await.ok();
        if permit.is_some()
            && let Some(connection) = self.take(origin)
        {
            return Ok(connection);
        }
        let connected = timeout(self.connector.timeout, self.connector.connect(url, alone, &self.tasks)).await;
        let new = connected.unwrap_or_else(|_| {
            let what = format!("no connection within {} s", self.connector.timeout.as_secs_f64());
            Err(Lost::at(Stage::Connect, io::Error::new(io::ErrorKind::TimedOut, what)))
        })?;
        match &new {
            New::Http1(_) => opening.close(),
            New::Http2(connection) => {
                self.origin(origin, url, |kept| kept.shared.push((connection.clone(), None)));
                self.keep_swept();
            }
        }
        Ok(new)
    }

    fn origin<T>(&self, name: &str, url: &Url, with: impl FnOnce(&mut Origin) -> T) -> T {
        with(self.kept().origins.entry(name.to_owned()).or_insert_with(|| Origin::new(url)))
    }

    /// Looks for unused connections from now on, until there are none.
    fn keep_swept(self: &Arc<Self>) {
        if std::mem::replace(&mut self.kept().swept, true) {
            return;
        }
        let pool = Arc::downgrade(self);
        self.tasks.spawn(async move {
            loop {
                sleep(SWEEP_EVERY).await;
                let Some(pool) = pool.upgrade() else { return };
                let mut kept = pool.kept();
                let now = Instant::now();
                kept.origins.values_mut().for_each(|origin| origin.sweep(now));
                if kept.origins.values().all(|origin| origin.idle.is_empty() && origin.shared.is_empty()) {
                    kept.swept = false;
                    return;
                }
            }
        });
    }
}

/// Where a connection goes when it can serve again.
#[derive(Clone, Debug)]
pub(super) struct Home {
    pool: Weak<Pool>,
    origin: String,
}

impl Home {
    /// Keeps a connection for the next request.
    pub(super) fn bring(self, connection: http1::Connection) {
        let Some(pool) = self.pool.upgrade() else { return };
        if let Some(origin) = pool.kept().origins.get_mut(&self.origin) {
            origin.idle.push((connection, Instant::now()));
        }
        pool.keep_swept();
    }

    /// Does something beside, as long as connections are kept at all.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(pool) = self.pool.upgrade() {
            pool.tasks.spawn(task);
        }
    }

    #[cfg(test)]
    pub(super) fn nowhere() -> Self {
        Self { pool: Weak::new(), origin: String::new() }
    }
}
