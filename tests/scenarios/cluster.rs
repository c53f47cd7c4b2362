//! What only a cluster can do to a queue: a url that does not fit, one unsuitable node, one node that is away, and a
//! slot that moves. That all else is as on a single server is told by `queue_cluster.rs` and `queue_model.rs`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, v1};
use genmill_core::attempt::{Failure, FailureClass, FinishReason, Generation};
use genmill_core::ids::{JobId, LaneNumber, WorkerId};
use genmill_core::judge::Verdict;
use genmill_core::model::ModelName;
use genmill_core::names::Tenant;
use genmill_core::state::State;
use genmill_core::time::UnixMs;
use genmill_queue::{
    Ended, Event, Finish, Hint, Holding, Kept, Lease, NewJob, Options, Queue, QueueError, RequestId, Reservation, Room,
    Slots,
};
use genmill_tests::daemons::Start;
use genmill_tests::puppet::Puppet;
use genmill_tests::redis_cluster::{RedisCluster, ask, cluster};
use genmill_tests::redis_server::RedisServer;
use genmill_tests::scheduler::Scheduler;
use genmill_tests::specs::plain;
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::time::timeout;
use tokio_stream::StreamExt as _;

const LEASE_MS: u64 = 60_000;

/// A lease that a node outlasts while it hangs.
const HUNG_LEASE: Duration = Duration::from_secs(3);

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(60);

/// A lane on each node, in the order of nodes.
struct Bench {
    redis: RedisCluster,
    queue: Queue,
    lanes: Vec<(LaneNumber, ModelName)>,
    next: u64,
}

async fn connect(url: String) -> Result<Queue, QueueError> {
    Queue::connect(&Options { url, namespace: "test".to_owned() }).await
}

async fn refused(url: String, says: &str) {
    let error = connect(url).await.unwrap_err();
    assert!(matches!(error, QueueError::Unsuitable { .. }), "{error:?}");
    assert!(error.to_string().contains(says), "{error}");
}

fn worker() -> WorkerId {
    WorkerId::from_stored("w".to_owned())
}

fn succeed() -> Verdict {
    let text = "x".to_owned();
    Verdict::Succeed(Generation::new(text, FinishReason::Stop))
}

impl Bench {
    async fn new() -> Self {
        let redis = RedisCluster::start().unwrap();
        let queue = connect(redis.url()).await.unwrap();
        let mut lanes = BTreeMap::new();
        for n in 0..8 {
            let model = ModelName::parse(&format!("vllm_m{n}")).unwrap();
            let lane = queue.open_lane(&model.lane()).await.unwrap();
            lanes.entry(redis.slot_of(&format!("{{{}}}", lane.0)).unwrap().1).or_insert((lane, model));
        }
        assert_eq!(lanes.len(), redis.nodes().len());
        Self { redis, queue, lanes: lanes.into_values().collect(), next: 0 }
    }

    fn job(&mut self, place: usize) -> NewJob {
        let (lane, model) = &self.lanes[place];
        self.next += 1;
        NewJob { id: JobId::new(UnixMs(1), *lane, self.next << 32), spec: plain(model.clone()) }
    }

    async fn enqueue(&self, job: &NewJob) -> Result<JobId, QueueError> {
        self.queue.enqueue(&job.spec.model.lane(), std::slice::from_ref(job)).await.map(|_| job.id)
    }

    async fn submit(&mut self, place: usize) -> JobId {
        let job = self.job(place);
        self.enqueue(&job).await.unwrap()
    }

    async fn claim(&self, place: usize) -> Result<Vec<Lease>, QueueError> {
        self.queue.claim(self.lanes[place].0, &worker(), Room { free: 100, tokens: None, keys: &[] }, LEASE_MS).await
    }

    async fn finish(&self, lease: &Lease, verdict: Verdict) -> Result<Kept, QueueError> {
        let finish = Finish { verdict, cost: None, observation: None };
        let ended = Ended { held: lease.held(), started_at: lease.started_at, finish: &finish };
        Ok(self.queue.finish(lease.id.lane(), &worker(), &[ended]).await?[0])
    }

    /// Delays a job, and waits until it was promoted and can be claimed again.
    async fn promoted(&self, place: usize, lease: &Lease) -> Lease {
        let failure = Failure::new(FailureClass::Transient, "x");
        self.finish(lease, Verdict::Retry { delay_ms: 0, failure }).await.unwrap();
        let claiming = async {
            loop {
                if let Some(lease) = self.claim(place).await.unwrap().pop() {
                    return lease;
                }
            }
        };
        timeout(WITHIN, claiming).await.unwrap()
    }

    /// The node at which somebody listens.
    fn listened_at(&self, what: &str) -> usize {
        let listens = |node: &RedisServer| {
            let told: Vec<redis::Value> = ask(node, redis::cmd("PUBSUB").arg(what)).unwrap_or_default();
            let patterns: u64 = ask(node, redis::cmd("PUBSUB").arg("NUMPAT")).unwrap();
            !told.is_empty() || patterns > 0
        };
        self.redis.nodes().iter().position(listens).unwrap()
    }
}

/// Repeats what is refused for now.
async fn until_done<T>(mut what: impl AsyncFnMut() -> Result<T, QueueError>) -> T {
    let repeating = async {
        loop {
            match what().await {
                Ok(done) => return done,
                Err(error) => assert!(error.is_passing(), "{error:?}"),
            }
        }
    };
    timeout(WITHIN, repeating).await.unwrap()
}

#[tokio::test]
async fn a_url_that_does_not_fit_is_refused_with_what_to_write() {
    let redis = RedisCluster::start().unwrap();
    let [first, second, _] = redis.nodes() else { unreachable!() };
    let one = format!("redis+cluster://127.0.0.1:{}", second.port());
    refused(second.url(), &format!("write {one} in its url")).await;
    connect(one).await.unwrap();
    // A node that is away is no harm as long as another one is named that is not.
    connect(format!("redis+cluster://127.0.0.1:1,127.0.0.1:{}", first.port())).await.unwrap();
    let server = RedisServer::start().unwrap();
    refused(format!("redis+cluster://127.0.0.1:{}", server.port()), "a single server, not a cluster").await;
    refused("redis+cluster://".to_owned(), "redis+cluster://HOST:PORT,HOST:PORT").await;
}

#[tokio::test]
async fn every_master_is_looked_at_before_use() {
    let mut redis = RedisCluster::start().unwrap();
    let policy = redis::cmd("CONFIG").arg("SET").arg("maxmemory-policy").to_owned();
    ask::<()>(&redis.nodes()[2], policy.clone().arg("allkeys-lru")).unwrap();
    refused(redis.url(), "maxmemory-policy noeviction").await;
    ask::<()>(&redis.nodes()[2], policy.clone().arg("noeviction")).unwrap();
    connect(redis.url()).await.unwrap();
    redis.kill(2).unwrap();
    let error = connect(redis.url()).await.unwrap_err();
    assert!(error.is_passing(), "{error:?}");
}

#[tokio::test]
async fn a_node_that_is_away_holds_up_its_own_lanes_only() {
    let mut bench = Bench::new().await;
    let ids = [bench.submit(0).await, bench.submit(1).await];
    bench.redis.kill(0).unwrap();
    for _ in 0..3 {
        let error = bench.claim(0).await.unwrap_err();
        assert!(error.is_passing(), "{error:?}");
        assert!(bench.queue.watch(ids[0], 0).await.unwrap_err().is_passing());
        assert!(bench.queue.get_many(&ids).await.unwrap_err().is_passing());
    }
    let leases = bench.claim(1).await.unwrap();
    assert_eq!(bench.finish(&leases[0], succeed()).await.unwrap(), Kept::Kept);
    assert_eq!(bench.queue.get(ids[1]).await.unwrap().state, State::Succeeded);
    bench.redis.restart(0).unwrap();
    let leases = until_done(async || bench.claim(0).await).await;
    assert_eq!(until_done(async || bench.finish(&leases[0], succeed()).await).await, Kept::Kept);
    assert_eq!(bench.queue.states(&ids).await.unwrap(), [Some(State::Succeeded); 2]);
}

#[tokio::test]
async fn a_lane_is_looked_after_while_the_node_of_another_is_away() {
    let mut bench = Bench::new().await;
    let _scheduler = Scheduler::start(&bench.redis.url());
    assert!(bench.lanes[0].0 < bench.lanes[2].0, "the lane that is away comes first");
    let id = bench.submit(2).await;
    let lease = bench.claim(2).await.unwrap().remove(0);
    let lease = bench.promoted(2, &lease).await;
    bench.redis.kill(0).unwrap();
    let held = [Holding { held: bench.promoted(2, &lease).await.held(), started: true }];
    let slots = Slots { capacity: 1, free: 0, tokens: None, declared: None };
    bench.queue.heartbeat(bench.lanes[2].0, &worker(), slots, 0, &held).await.unwrap();
    timeout(WITHIN, async { while bench.queue.get(id).await.unwrap().losses == 0 {} }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_hangs_holds_up_its_own_lanes_only() {
    let mut bench = Bench::new().await;
    let _scheduler = Scheduler::start(&bench.redis.url());
    let models: Vec<ModelName> = bench.lanes.iter().map(|(_, model)| model.clone()).collect();
    let mut puppet = Puppet::start(&bench.queue, &models, HUNG_LEASE.as_millis().try_into().unwrap()).await;
    let mut long = Vec::new();
    for place in 0..3 {
        long.push((bench.submit(place).await, puppet.asked().await));
    }
    bench.redis.nodes()[0].signal(Signal::STOP).unwrap();
    let begun = Instant::now();
    let mut ids = Vec::new();
    // Longer than a lease, and than a command waits for its answer.
    while begun.elapsed() < 5 * HUNG_LEASE {
        for place in [1, 2] {
            ids.push(bench.submit(place).await);
            puppet.asked().await.succeed("x");
            let ending =
                async { while bench.queue.get(ids[ids.len() - 1]).await.unwrap().state != State::Succeeded {} };
            timeout(HUNG_LEASE, ending).await.unwrap();
        }
    }
    bench.redis.nodes()[0].signal(Signal::CONT).unwrap();
    let (first, _) = long[0];
    for (id, asked) in long {
        ids.push(id);
        asked.succeed("x");
    }
    // It may run again, where its lease was not renewed.
    let ending = async {
        while !bench.queue.get(first).await.is_ok_and(|job| job.state.is_final()) {
            puppet.asked_already().into_iter().for_each(|asked| asked.succeed("x"));
            tokio::task::yield_now().await;
        }
    };
    timeout(WITHIN, ending).await.unwrap();
    puppet.stop().await;
    for job in bench.queue.get_many(&ids).await.unwrap() {
        assert_eq!(job.state, State::Succeeded);
        assert!(job.id == first || (job.losses, job.attempts.len()) == (0, 1), "{job:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_are_listed_while_the_node_of_some_is_away() {
    let mut bench = Bench::new().await;
    let folder = tempfile::tempdir().unwrap();
    let scheduler = Start::new("genmill-scheduler", folder.path()).unwrap().env("GENMILL__REDIS__NAMESPACE", "test");
    let scheduler = scheduler.env("GENMILL__REDIS__URL", &bench.redis.url());
    let scheduler = scheduler.env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0").until_ready().unwrap();
    let server = format!("http://{}", scheduler.place("grpc"));
    let client = Client::connect(&server).await.unwrap();
    for place in 0..3 {
        bench.submit(place).await;
    }
    // Not the one that has the registry.
    let node = (bench.redis.slot_of("{registry}").unwrap().1 + 1) % 3;
    let name = |place: usize| bench.lanes[place].1.lane().to_string();
    let names = [0, 1, 2].map(name);
    bench.redis.kill(node).unwrap();
    let lanes = client.list_lanes().await.unwrap();
    for (place, name) in names.iter().enumerate() {
        let lane = lanes.iter().find(|lane| lane.name == *name).unwrap();
        assert_eq!((lane.away, lane.queued), if place == node { (true, 0) } else { (false, 1) }, "{lane:?}");
    }
    let shown = Start::new("genmill", folder.path()).unwrap().args(&["lanes", "--server", &server]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let away = shown.lines().find(|line| line.starts_with("away for now")).unwrap();
    for (place, name) in names.iter().enumerate() {
        let counts = shown.lines().find_map(|line| line.strip_prefix(name.as_str())).unwrap();
        assert_eq!((away.contains(name), counts.contains('1')), (place == node, place != node), "{shown}");
    }
    let listed = client.list(v1::JobFilter::default()).collect::<Vec<_>>().await;
    let error = listed[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("lanes that are away for now") && error.contains(&names[node]), "{error}");
    bench.redis.restart(node).unwrap();
    let whole = async {
        while !client.list_lanes().await.is_ok_and(|lanes| lanes.iter().all(|lane| !lane.away)) {}
        while client.list(v1::JobFilter::default()).filter_map(Result::ok).collect::<Vec<_>>().await.len() < 3 {}
    };
    timeout(WITHIN, whole).await.unwrap();
}

#[tokio::test]
async fn hints_and_events_come_from_another_node_when_theirs_dies() {
    let mut bench = Bench::new().await;
    let lanes: Vec<LaneNumber> = bench.lanes.iter().map(|(lane, _)| *lane).collect();
    let mut hints = bench.queue.hints(&lanes).await.unwrap();
    let away = bench.listened_at("CHANNELS");
    let place = (away + 1) % 3;
    bench.redis.kill(away).unwrap();
    let next = timeout(WITHIN, hints.next()).await.unwrap();
    assert_eq!(next, Hint::Missed);
    bench.submit(place).await;
    let next = timeout(WITHIN, hints.next()).await.unwrap();
    assert_eq!(next, Hint::Work(lanes[place]));
    bench.redis.restart(away).unwrap();
    drop(hints);

    let mut events = bench.queue.events().await.unwrap();
    let away = bench.listened_at("NUMPAT");
    let place = (away + 1) % 3;
    bench.redis.kill(away).unwrap();
    let next = timeout(WITHIN, events.next()).await.unwrap();
    assert_eq!(next, Event::Missed);
    let id = bench.submit(place).await;
    let leases = bench.claim(place).await.unwrap();
    assert_eq!(leases.last().unwrap().id, id);
    let told = async { while events.next().await != Event::Text(id) {} };
    timeout(WITHIN, told).await.unwrap();
}

/// A slot on its way from one node to another, as `redis-cli --cluster reshard` moves it.
struct Move<'a> {
    redis: &'a RedisCluster,
    slot: u16,
    from: &'a RedisServer,
    to: &'a RedisServer,
}

impl<'a> Move<'a> {
    fn begin(redis: &'a RedisCluster, slot: u16, from: usize, to: usize) -> Self {
        let (from, to) = (&redis.nodes()[from], &redis.nodes()[to]);
        let id = |node| ask::<String>(node, &cluster("MYID")).unwrap();
        ask::<()>(to, cluster("SETSLOT").arg(slot).arg("IMPORTING").arg(id(from))).unwrap();
        ask::<()>(from, cluster("SETSLOT").arg(slot).arg("MIGRATING").arg(id(to))).unwrap();
        Self { redis, slot, from, to }
    }

    /// Moves up to `most` keys; returns how many.
    fn keys(&self, most: usize) -> usize {
        let keys: Vec<Vec<u8>> = ask(self.from, cluster("GETKEYSINSLOT").arg(self.slot).arg(most)).unwrap();
        for key in &keys {
            let mut migrate = redis::cmd("MIGRATE");
            ask::<()>(self.from, migrate.arg("127.0.0.1").arg(self.to.port()).arg(key).arg(0).arg(10_000)).unwrap();
        }
        keys.len()
    }

    fn end(self) {
        while self.keys(1_000) > 0 {}
        let id = ask::<String>(self.to, &cluster("MYID")).unwrap();
        for node in [self.to, self.from].into_iter().chain(self.redis.nodes()) {
            ask::<()>(node, cluster("SETSLOT").arg(self.slot).arg("NODE").arg(&id)).unwrap();
        }
    }
}

#[tokio::test]
async fn a_lane_waits_while_its_slot_moves_and_is_whole_afterwards() {
    let mut bench = Bench::new().await;
    let mut ids = BTreeSet::new();
    for _ in 0..5 {
        ids.insert(bench.submit(0).await);
    }
    let leases = bench.claim(0).await.unwrap();
    assert_eq!(leases.len(), ids.len());
    let new = bench.job(0);
    let (slot, from) = bench.redis.slot_of(&format!("{{{}}}", bench.lanes[0].0.0)).unwrap();
    let moving = Move::begin(&bench.redis, slot, from, 2);
    for keys in [0, 1, 7] {
        moving.keys(keys);
        for tried in [
            bench.claim(0).await.map(|_| ()),
            bench.finish(&leases[0], succeed()).await.map(|_| ()),
            bench.enqueue(&new).await.map(|_| ()),
            bench.queue.watch(leases[0].id, 0).await.map(|_| ()),
        ] {
            assert!(tried.as_ref().is_err_and(QueueError::is_passing), "{tried:?}");
        }
        // Of what is read, all or nothing is found.
        if let Ok(found) = bench.queue.get_many(&ids.iter().copied().collect::<Vec<_>>()).await {
            assert_eq!(found.len(), ids.len());
        }
    }
    moving.end();
    ids.insert(until_done(async || bench.enqueue(&new).await).await);
    let mut finished = BTreeSet::new();
    for lease in leases.into_iter().chain(until_done(async || bench.claim(0).await).await) {
        assert_eq!(bench.finish(&lease, succeed()).await.unwrap(), Kept::Kept);
        assert!(finished.insert(lease.id));
    }
    assert_eq!(finished, ids);
    assert_eq!(bench.queue.open_jobs(&[bench.lanes[0].0], None).await.unwrap(), 0);
}

#[tokio::test]
async fn a_request_id_stands_for_one_job_while_its_slot_moves() {
    let mut bench = Bench::new().await;
    let tenant = Tenant::default();
    let mut reservations = |names: std::ops::Range<u32>| -> Vec<(String, JobId)> {
        names.map(|name| (format!("r{name}"), bench.job(0).id)).collect()
    };
    let (old, again) = (reservations(0..10), reservations(0..20));
    let reserve = async |wanted: &[(String, JobId)]| {
        let mut reservations = Vec::new();
        for (request_id, id) in wanted {
            reservations.push(Reservation { tenant: &tenant, request_id, id: *id, content: &[1; 16] });
        }
        bench.queue.reserve_request_ids(&reservations).await
    };
    assert_eq!(reserve(&old).await.unwrap(), [RequestId::Fresh; 10]);
    let known = old.iter().map(|(_, id)| RequestId::Same(*id));
    let expect: Vec<RequestId> = known.chain([RequestId::Fresh; 10]).collect();
    let (slot, from) = bench.redis.slot_of(&format!("{{T:{tenant}}}")).unwrap();
    let moving = Move::begin(&bench.redis, slot, from, (from + 1) % 3);
    for keys in [0, 1, 5] {
        moving.keys(keys);
        match reserve(&again).await {
            Ok(found) => assert_eq!(found, expect),
            Err(error) => assert!(error.is_passing(), "{error:?}"),
        }
    }
    moving.end();
    assert_eq!(until_done(async || reserve(&again).await).await, expect);
}
