//! A Redis Cluster: what its url says, pipelines over several slots, and where to listen.
//!
//! The library finds the node of a command and follows a slot that moved. It sends a pipeline to one node only, and a
//! transaction to where its slot was, so pipelines are taken apart here and nothing uses transactions.

use crate::connection::{RESPONSE_TIMEOUT, bad_url};
use crate::error::QueueError;
use futures_util::FutureExt as _;
use futures_util::future::try_join_all;
use redis::aio::ConnectionLike;
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{Route, RoutingInfo, SingleNodeRoutingInfo, Slot, SlotAddr};
use redis::{Arg, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo as _};
use redis::{InfoDict, Pipeline, RedisError, RedisFuture, RedisResult, Value};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// How long a node may take to be connected to. While the library looks for a node that does not answer, commands to all
/// others wait, so this is far below the length of a lease.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a command is sent again: after a slot that moved, or to a node that was connected to anew. No more, since
/// callers try again themselves, and wait for a lane whose node is gone as little as for a single server.
const RETRIES: u32 = 4;

/// The wait before a command is sent again, in milliseconds: at random between the first and the second.
const RETRY_WAIT_MS: (u64, u64) = (20, 200);

/// The commands that only read, of those that are sent in pipelines.
const READS: [&str; 10] =
    ["GET", "GETRANGE", "HGET", "HGETALL", "HMGET", "LRANGE", "STRLEN", "XLEN", "XREVRANGE", "ZCARD"];

/// A connection to all nodes that are masters.
#[derive(Clone)]
pub(crate) struct Cluster {
    commands: ClusterConnection,
    /// The nodes that the url names.
    named: Arc<[ConnectionInfo]>,
}

/// The nodes that the url of a cluster names, each as a url of its own; `None` for the url of a single server.
pub(crate) fn nodes(url: &str) -> Option<Vec<String>> {
    let (scheme, rest) = url.split_once("://")?;
    let scheme = scheme.strip_suffix("+cluster")?;
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (user, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
    Some(hosts.split(',').map(|host| format!("{scheme}://{user}{host}{path}")).collect())
}

/// The url of the cluster that the node at `address` is part of, without a password.
pub(crate) fn url_of(address: &ConnectionAddr) -> String {
    let scheme = if matches!(address, ConnectionAddr::TcpTls { .. }) { "rediss" } else { "redis" };
    format!("{scheme}+cluster://{address}")
}

impl Cluster {
    pub(crate) async fn connect(nodes: &[String]) -> Result<Self, QueueError> {
        let named = nodes.iter().map(|node| node.as_str().into_connection_info()).collect::<RedisResult<Arc<_>>>();
        let named = named.map_err(|source| bad_url(&source))?;
        let client = ClusterClientBuilder::new(named.iter().cloned())
            .connection_timeout(CONNECTION_TIMEOUT)
            .response_timeout(RESPONSE_TIMEOUT)
            .retries(RETRIES)
            .min_retry_wait(RETRY_WAIT_MS.0)
            .max_retry_wait(RETRY_WAIT_MS.1)
            .build()
            .map_err(|source| bad_url(&source))?;
        match client.get_async_connection().await {
            Ok(commands) => Ok(Self { commands, named }),
            Err(error) if error.detail().is_some_and(|detail| detail.contains("cluster support disabled")) => {
                let problem = "it is a single server, not a cluster: write redis:// in its url".to_owned();
                Err(QueueError::Unsuitable { problem })
            }
            Err(source) => Err(QueueError::from_redis("connecting", source)),
        }
    }

    /// What every master with slots says about itself.
    pub(crate) async fn info(&mut self) -> RedisResult<Vec<InfoDict>> {
        let told: HashMap<String, InfoDict> = redis::cmd("INFO").query_async(&mut self.commands).await?;
        // The library leaves out the nodes that it could not connect to.
        let state: String = redis::cmd("CLUSTER").arg("INFO").query_async(&mut self.commands).await?;
        let masters = InfoDict::new(&state).get::<usize>("cluster_size").unwrap_or(0);
        if told.len() < masters {
            let detail = format!("{} of {masters} answer", told.len());
            return Err((ErrorKind::ClusterConnectionNotFound, "a master of the cluster is away", detail).into());
        }
        Ok(told.into_values().collect())
    }

    /// A node to listen at: messages reach all of them. That is the one that publishes on `channel`, or any other while
    /// it is away; after every other failure one that the url names, in case what nodes say of themselves is of no use.
    pub(crate) async fn any_node(&mut self, channel: &str, failures: u32) -> RedisResult<redis::Client> {
        let named = usize::try_from(failures / 2).unwrap_or(0) % self.named.len();
        let named = self.named.get(named).ok_or((ErrorKind::InvalidClientConfig, "the url names no node"))?;
        if failures % 2 == 1 {
            return redis::Client::open(named.clone());
        }
        let route = Route::with_key(channel, SlotAddr::Master);
        let ask = redis::cmd("CLUSTER").arg("NODES").to_owned();
        let routing = RoutingInfo::SingleNode(SingleNodeRoutingInfo::SpecificNode(route));
        let told: String = redis::from_redis_value(self.commands.route_command(ask, routing).await?)?;
        redis::Client::open(named.clone().set_addr(address_of_itself(&told, named.addr())))
    }

    /// Sends a pipeline, all slots at the same time. Answers are in its order.
    ///
    /// Reads of one slot are sent together and done in order. Anything else goes one by one: while a slot moves, the
    /// library would send all of them after the one that has moved already, and what is still at its old place would be
    /// written twice.
    async fn send(&self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        if pipeline.is_transaction() {
            return Err((ErrorKind::Client, "a cluster takes scripts, not transactions").into());
        }
        if !pipeline.cmd_iter().all(|command| READS.iter().any(|read| argument(command, 0) == Some(read.as_bytes()))) {
            let each = pipeline.cmd_iter().map(async |command| self.commands.clone().req_packed_command(command).await);
            return try_join_all(each).await;
        }
        let answers = try_join_all(by_slot(pipeline)?.into_iter().map(async |(slot, (places, part))| {
            let (route, length) = (Some(Route::with_slot(slot, SlotAddr::Master)), part.len());
            let answers = self.commands.clone().route_pipeline(part, 0, length, route.into()).await?;
            Ok::<_, RedisError>(places.into_iter().zip(answers))
        }));
        let mut answers: Vec<(usize, Value)> = answers.await?.into_iter().flatten().collect();
        answers.sort_unstable_by_key(|(place, _)| *place);
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    }
}

impl ConnectionLike for Cluster {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        self.commands.req_packed_command(cmd)
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        _: usize,
        _: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.send(pipeline).boxed()
    }

    fn get_db(&self) -> i64 {
        self.commands.get_db()
    }
}

fn argument(command: &Cmd, index: usize) -> Option<&[u8]> {
    if let Arg::Simple(argument) = command.args_iter().nth(index)? { Some(argument) } else { None }
}

/// The commands of each slot and their places in `pipeline`. A command's key is its first argument.
fn by_slot(pipeline: &Pipeline) -> RedisResult<HashMap<Slot, (Vec<usize>, Pipeline)>> {
    let mut parts: HashMap<Slot, (Vec<usize>, Pipeline)> = HashMap::new();
    for (place, command) in pipeline.cmd_iter().enumerate() {
        let key = argument(command, 1).ok_or((ErrorKind::Client, "a command without a key belongs to no slot"))?;
        let (places, part) = parts.entry(Slot::for_key(key)).or_default();
        places.push(place);
        part.add_command(command.clone());
    }
    Ok(parts)
}

/// The address of the node that answered CLUSTER NODES: `ID IP:PORT@BUS[,NAME…] FLAGS…` in the line flagged `myself`. A
/// name is preferred, as certificates have it; what is missing is as in `asked`.
fn address_of_itself(told: &str, asked: &ConnectionAddr) -> ConnectionAddr {
    let fields = told.lines().map(|line| line.split(' ')).find_map(|mut fields| {
        let place = fields.nth(1)?;
        fields.next()?.split(',').any(|flag| flag == "myself").then_some(place)
    });
    let (place, names) = fields.map(|place| place.split_once(',').unwrap_or((place, ""))).unwrap_or_default();
    let (ip, port) = place.split('@').next().and_then(|place| place.rsplit_once(':')).unwrap_or_default();
    let name = names.split(',').next().filter(|name| !name.is_empty() && !name.contains('='));
    let mut address = asked.clone();
    if let ConnectionAddr::Tcp(host, number) | ConnectionAddr::TcpTls { host, port: number, .. } = &mut address {
        if let Some(known) = name.or(Some(ip)).filter(|known| !known.is_empty()) {
            known.clone_into(host);
        }
        *number = port.parse().unwrap_or(*number);
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_told_by_its_url() {
        let check = |url: &str, expect: Option<&[&str]>| {
            let expect = expect.map(|nodes| nodes.iter().map(|node| (*node).to_owned()).collect::<Vec<_>>());
            assert_eq!(nodes(url), expect, "{url}");
        };
        check("redis://a:1", None);
        check("nonsense", None);
        check("redis+cluster://a:1", Some(&["redis://a:1"]));
        check(
            "rediss+cluster://u:p@a:1,[::1]:2,c",
            Some(&["rediss://u:p@a:1", "rediss://u:p@[::1]:2", "rediss://u:p@c"]),
        );
        check(
            "redis+cluster://a:1,b:2/0?protocol=resp3",
            Some(&["redis://a:1/0?protocol=resp3", "redis://b:2/0?protocol=resp3"]),
        );
    }

    #[test]
    fn the_node_that_answers_tells_its_address() {
        let asked = ConnectionAddr::Tcp("given".to_owned(), 1);
        let check = |told: &str, host: &str, port: u16| {
            let told = format!("07c3 10.0.0.9:30004@31004 slave 67ed 0 1 4 connected\n{told}\n");
            assert_eq!(address_of_itself(&told, &asked), ConnectionAddr::Tcp(host.to_owned(), port), "{told}");
        };
        check("67ed 127.0.0.1:30002@31002 myself,master - 0 0 2 connected 0-5460", "127.0.0.1", 30002);
        check("67ed 127.0.0.1:30002@31002,r2.example master,myself - 0 0 2 connected", "r2.example", 30002);
        check("67ed 127.0.0.1:30002@31002,,shard-id=69b myself,master - 0 0 2 connected", "127.0.0.1", 30002);
        check("67ed ::1:30002@31002 myself,master - 0 0 2 connected", "::1", 30002);
        check("67ed :30002@31002 myself,master - 0 0 2 connected", "given", 30002);
        check("67ed 10.0.0.7:30002@31002 master - 0 0 2 connected", "given", 1);
    }

    #[test]
    fn a_pipeline_is_taken_apart_by_slot() {
        let mut pipeline = redis::pipe();
        pipeline.get("{1}:a").get("{2}:b").hget("{1}:c", "{2}");
        let mut parts: Vec<(Vec<usize>, usize)> =
            by_slot(&pipeline).unwrap().into_values().map(|(places, part)| (places, part.len())).collect();
        parts.sort();
        assert_eq!(parts, [(vec![0, 2], 2), (vec![1], 1)]);
        assert!(by_slot(redis::pipe().cmd("PING")).is_err());
    }
}
