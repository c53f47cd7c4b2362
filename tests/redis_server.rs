//! A `redis-server` process of a test's own, on a free port, ended with the test.

use crate::daemons::{send, wait};
use anyhow::{Context as _, bail};
use rustix::process::Signal;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A running Redis. Its data is on disk until it is dropped, so it can be killed and started again.
#[derive(Debug)]
pub struct RedisServer {
    folder: TempDir,
    port: u16,
    settings: Vec<String>,
    process: Child,
}

/// A port that is free now. Somebody else may take it before it is used; starting is then tried again.
///
/// # Errors
/// When loopback has no free port.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn spawn(folder: &TempDir, port: u16, settings: &[String]) -> anyhow::Result<Child> {
    Command::new("redis-server")
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always"])
        .args(["--port", &port.to_string()])
        .arg("--dir")
        .arg(folder.path())
        .args(settings)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start redis-server: `cargo xtask test` installs it")
}

impl RedisServer {
    /// Starts a Redis with an append-only file, synced always: one that is killed must have what it acknowledged, and
    /// synced every second it may hold writes back for up to two.
    ///
    /// # Errors
    /// When redis-server is not installed or does not answer.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(&[])
    }

    /// Starts a Redis with further settings, such as `["--maxmemory-policy", "allkeys-lru"]`.
    ///
    /// # Errors
    /// When redis-server is not installed or does not answer.
    pub fn start_with(settings: &[&str]) -> anyhow::Result<Self> {
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        for _ in 0..5 {
            let folder = tempfile::tempdir()?;
            let port = free_port()?;
            let process = spawn(&folder, port, &settings)?;
            let mut server = Self { folder, port, settings: settings.clone(), process };
            if server.wait_until_it_answers()? {
                return Ok(server);
            }
            // Somebody else took the port: try another.
        }
        bail!("redis-server did not start on any of five ports")
    }

    /// The URL to connect to.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Kills it without warning and starts it again on the same data.
    ///
    /// # Errors
    /// When it does not answer again.
    pub fn kill_and_restart(&mut self) -> anyhow::Result<()> {
        self.kill()?;
        self.restart()
    }

    /// Kills it without warning.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        send(&self.process, signal)
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// When the system refuses to tell.
    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.process.try_wait()?.is_some())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end within `patience`.
    pub fn wait(&mut self, patience: Duration) -> anyhow::Result<()> {
        wait(&mut self.process, patience).map(drop)
    }

    /// Starts it again on its data, after it was killed.
    ///
    /// # Errors
    /// When it does not answer again.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.process = spawn(&self.folder, self.port, &self.settings)?;
        if !self.wait_until_it_answers()? {
            bail!("redis-server did not come back");
        }
        Ok(())
    }

    /// False when it has exited.
    fn wait_until_it_answers(&mut self) -> anyhow::Result<bool> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if self.process.try_wait()?.is_some() {
                return Ok(false);
            }
            if answers(self.port) {
                return Ok(true);
            }
            pause(Duration::from_millis(20));
        }
        bail!("redis-server does not answer")
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // It may have been killed by the test already.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn answers(port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut connection = TcpStream::connect(("127.0.0.1", port))?;
        connection.set_read_timeout(Some(Duration::from_secs(1)))?;
        connection.write_all(b"PING\r\n")?;
        let mut answer = [0; 5];
        connection.read_exact(&mut answer)?;
        Ok(&answer == b"+PONG")
    };
    ask().unwrap_or(false)
}

/// Waits between two looks at a process that cannot tell when it is ready.
pub(crate) fn pause(time: Duration) {
    std::thread::park_timeout(time);
}
