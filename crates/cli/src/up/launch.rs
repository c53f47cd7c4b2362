//! How each member is started: program, arguments, environment.

use super::data_folder::DataFolder;
use super::member::Role;
use super::ready::Places;
use super::redis;
use anyhow::Context as _;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::process::{Child, Command};

/// By these the daemons are told what flags and this mill decide.
pub(crate) const REDIS_URL: &str = "GENMILL__REDIS__URL";
pub(crate) const LISTEN: &str = "GENMILL__SCHEDULER__LISTEN";

/// Everything that is needed to start members.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) own_binary: PathBuf,
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) models: PathBuf,
    pub(crate) listen: String,
    pub(crate) http_listen: String,
    pub(crate) redis: Redis,
}

/// Where the queue is kept.
#[derive(Debug)]
pub(crate) enum Redis {
    /// In a Redis that somebody else runs.
    Configured { url: String },
    /// In one of our own.
    Private {
        program: &'static str,
        folder: DataFolder,
        /// Picked at the start, and kept once it has answered, because everybody knows it then.
        port: Option<u16>,
    },
}

impl Launch {
    /// The members of this mill.
    pub(crate) fn roles(&self) -> Vec<Role> {
        let private = matches!(self.redis, Redis::Private { .. });
        Role::ALL.into_iter().filter(|role| *role != Role::Redis || private).collect()
    }

    /// The queue's address, which the daemons are given.
    fn redis_url(&self) -> String {
        match &self.redis {
            Redis::Configured { url } => url.clone(),
            Redis::Private { port, .. } => redis::url(port.unwrap_or_default()),
        }
    }

    /// The queue's address without its password.
    pub(crate) fn shown_redis_url(&self) -> String {
        genmill_daemon::secret::mask_url(&self.redis_url())
    }

    /// The port of the private Redis.
    pub(crate) fn redis_port(&self) -> Option<u16> {
        match &self.redis {
            Redis::Configured { .. } => None,
            Redis::Private { port, .. } => *port,
        }
    }

    /// Has the private Redis take another port at its next start.
    pub(crate) fn forget_redis_port(&mut self) {
        if let Redis::Private { port, .. } = &mut self.redis {
            *port = None;
        }
    }

    /// Has the scheduler come back at the same place when it is started again.
    pub(crate) fn keep_places(&mut self, places: &Places) {
        self.listen.clone_from(&places.grpc);
        self.http_listen.clone_from(&places.http);
    }

    /// Starts a member. It must be called on the main thread: children that are to die with this process are tied to
    /// the thread that started them.
    pub(crate) fn start(&mut self, role: Role) -> anyhow::Result<Child> {
        let mut command = match role {
            Role::Redis => self.redis_command()?,
            Role::Scheduler | Role::WorkerGpu | Role::WorkerApi => self.daemon_command(role),
        };
        // Its own process group, so that Ctrl-C reaches only this process, which then stops all in order.
        command.process_group(0).kill_on_drop(true);
        command.spawn().map_err(|error| match error.kind() {
            ErrorKind::NotFound => anyhow::anyhow!(
                "{} lies neither beside {} nor in PATH: build it with `cargo build --release --workspace`",
                role.name(),
                self.own_binary.display()
            ),
            _ => anyhow::Error::new(error).context(format!("cannot start {}", role.name())),
        })
    }

    /// Redis, through a subcommand of this program that ties it to this process.
    fn redis_command(&mut self) -> anyhow::Result<Command> {
        let Redis::Private { program, folder, port } = &mut self.redis else {
            anyhow::bail!("a configured Redis is not ours to start");
        };
        let port = *port.insert(port.map_or_else(redis::free_port, Ok)?);
        let lock = folder.share_lock().context("cannot share the lock of the data folder")?;
        let mut command = Command::new(&self.own_binary);
        command
            .args(["exec-with-parent", "--parent", &std::process::id().to_string(), "--", program])
            .args(redis::arguments(port, &folder.redis()))
            // Redis reads nothing; as its input it holds the lock of the folder for as long as it lives.
            .stdin(lock)
            .stdout(stderr_again()?);
        Ok(command)
    }

    fn daemon_command(&self, role: Role) -> Command {
        let beside = self.own_binary.with_file_name(role.name());
        let mut command = Command::new(if beside.is_file() { beside } else { PathBuf::from(role.name()) });
        if let Some(file) = &self.config_file {
            command.arg("--config").arg(file);
        }
        command
            .args(["--exit-with-parent", &std::process::id().to_string()])
            .env(REDIS_URL, self.redis_url())
            .env("GENMILL__MODELS__DIR", &self.models)
            .env(LISTEN, &self.listen)
            .env("GENMILL__SCHEDULER__HTTP_LISTEN", &self.http_listen)
            // There are two workers on this machine, so a fixed port cannot serve both.
            .env("GENMILL__WORKER__HTTP_LISTEN", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }
}

/// Our standard error, as somebody's standard output.
fn stderr_again() -> anyhow::Result<Stdio> {
    let own = std::io::stderr().as_fd().try_clone_to_owned().context("cannot duplicate standard error")?;
    Ok(Stdio::from(own))
}
