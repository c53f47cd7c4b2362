//! A Redis Cluster of a test's own: three masters as processes on free ports, without replicas.

use crate::redis_server::{RedisServer, free_port, pause};
use anyhow::{Context as _, bail, ensure};
use redis::{Cmd, FromRedisValue, InfoDict};
use std::time::{Duration, Instant};

/// The slots that each master has.
const SLOTS: [(u16, u16); 3] = [(0, 5460), (5461, 10922), (10923, 16383)];

/// How long the masters may take to find each other. They take at least two seconds, however idle the machine.
const JOINED_WITHIN: Duration = Duration::from_secs(60);

/// A running cluster. Its nodes can be killed and started again on their data.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<RedisServer>,
}

/// What a suite runs on that runs on both kinds of Redis.
#[derive(Debug)]
pub enum Redis {
    /// One server.
    Server(RedisServer),
    /// A cluster.
    Cluster(RedisCluster),
}

/// Sends a command to one node, wherever its slot is.
///
/// # Errors
/// When the node does not answer, or refuses.
pub fn ask<T: FromRedisValue>(node: &RedisServer, command: &Cmd) -> anyhow::Result<T> {
    let mut connection = redis::Client::open(node.url())?.get_connection()?;
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(command.query(&mut connection)?)
}

/// A subcommand of CLUSTER.
#[must_use]
pub fn cluster(subcommand: &str) -> Cmd {
    let mut command = redis::cmd("CLUSTER");
    command.arg(subcommand);
    command
}

impl RedisCluster {
    /// Starts three masters, and waits until they serve all slots together.
    ///
    /// # Errors
    /// When redis-server is not installed, or the nodes do not find each other.
    pub fn start() -> anyhow::Result<Self> {
        let nodes = SLOTS.iter().map(|_| start_node()).collect::<anyhow::Result<Vec<_>>>()?;
        for (node, (first, last)) in nodes.iter().zip(SLOTS) {
            ask::<()>(node, cluster("ADDSLOTSRANGE").arg(first).arg(last))?;
            // Different from the start, so that no two masters have to settle whose word counts.
            ask::<()>(node, cluster("SET-CONFIG-EPOCH").arg(first + 1))?;
        }
        // Each meets each: waiting for word to get around takes seconds.
        for other in &nodes {
            let (_, bus): (String, u16) = ask(other, redis::cmd("CONFIG").arg("GET").arg("cluster-port"))?;
            for node in nodes.iter().filter(|node| node.port() != other.port()) {
                ask::<()>(node, cluster("MEET").arg("127.0.0.1").arg(other.port()).arg(bus))?;
            }
        }
        let started = Self { nodes };
        started.wait_until_joined()?;
        Ok(started)
    }

    /// The URL to connect to, with all nodes.
    #[must_use]
    pub fn url(&self) -> String {
        let nodes: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis+cluster://{}", nodes.join(","))
    }

    /// The nodes, in the order of the slots that they had at the start.
    #[must_use]
    pub fn nodes(&self) -> &[RedisServer] {
        &self.nodes
    }

    /// The slot of `key`, and the place among the nodes of the one that had it at the start.
    ///
    /// # Errors
    /// When a node does not answer.
    pub fn slot_of(&self, key: &str) -> anyhow::Result<(u16, usize)> {
        let first = self.nodes.first().context("there are three nodes")?;
        let slot = ask(first, cluster("KEYSLOT").arg(key))?;
        let place = SLOTS.iter().position(|(first, last)| (*first..=*last).contains(&slot));
        Ok((slot, place.context("all slots are taken")?))
    }

    /// Kills a node without warning.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(&mut self, place: usize) -> anyhow::Result<()> {
        self.nodes.get_mut(place).context("there are three nodes")?.kill()
    }

    /// Starts a killed node again, and waits until the cluster has it back.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart(&mut self, place: usize) -> anyhow::Result<()> {
        self.nodes.get_mut(place).context("there are three nodes")?.restart()?;
        self.wait_until_joined()
    }

    fn wait_until_joined(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + JOINED_WITHIN;
        for node in &self.nodes {
            while !is_joined(node)? {
                ensure!(Instant::now() < deadline, "the nodes of the cluster did not find each other");
                pause(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

/// Starts a node that knows no other yet. One node that is away must not stop the others.
fn start_node() -> anyhow::Result<RedisServer> {
    for _ in 0..5 {
        let bus = free_port()?.to_string();
        let settings =
            [["--cluster-enabled", "yes"], ["--cluster-port", &bus], ["--cluster-require-full-coverage", "no"]];
        // Somebody else may have taken the port of the bus: try another.
        if let Ok(node) = RedisServer::start_with(&settings.concat()) {
            return Ok(node);
        }
    }
    bail!("no node of a cluster could be started")
}

/// Whether a node knows all the others, and serves.
fn is_joined(node: &RedisServer) -> anyhow::Result<bool> {
    let state = InfoDict::new(&ask::<String>(node, &cluster("INFO"))?);
    let nodes: String = ask(node, &cluster("NODES"))?;
    let unsettled = ["handshake", "fail", "noaddr", "disconnected"].iter().any(|flag| nodes.contains(flag));
    let serves = state.get::<String>("cluster_state").as_deref() == Some("ok");
    Ok(serves && state.get("cluster_size") == Some(SLOTS.len()) && !unsettled)
}

impl Redis {
    /// Starts a server, or a cluster for the tests of a crate whose name ends in `_cluster`.
    ///
    /// # Errors
    /// When redis-server is not installed or does not answer.
    pub fn start_for(crate_name: &str) -> anyhow::Result<Self> {
        if crate_name.ends_with("_cluster") {
            return Ok(Self::Cluster(RedisCluster::start()?));
        }
        Ok(Self::Server(RedisServer::start()?))
    }

    /// Its processes.
    #[must_use]
    pub fn nodes(&self) -> &[RedisServer] {
        match self {
            Self::Server(server) => std::slice::from_ref(server),
            Self::Cluster(cluster) => cluster.nodes(),
        }
    }

    /// The URL to connect to.
    #[must_use]
    pub fn url(&self) -> String {
        match self {
            Self::Server(server) => server.url(),
            Self::Cluster(cluster) => cluster.url(),
        }
    }

    /// Kills all of it without warning.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Server(server) => server.kill(),
            Self::Cluster(cluster) => cluster.nodes.iter_mut().try_for_each(RedisServer::kill),
        }
    }

    /// Starts it again on its data, after it was killed.
    ///
    /// # Errors
    /// When it does not answer again.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Server(server) => server.restart(),
            Self::Cluster(cluster) => {
                cluster.nodes.iter_mut().try_for_each(RedisServer::restart)?;
                cluster.wait_until_joined()
            }
        }
    }
}
