//! A worker's loop against a real Redis: what it makes of what Redis tells it, and of a Redis that is short of memory or
//! has lost something.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_client::v1;
use genmill_client::v1::watch_job_response::Event;
use genmill_core::attempt::AttemptEnd;
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::job::Job;
use genmill_core::model::ModelName;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::time::UnixMs;
use genmill_queue::{NewJob, Options, Queue};
use genmill_tests::puppet::{Puppet, worker};
use genmill_tests::redis_cluster::ask;
use genmill_tests::redis_server::RedisServer;
use genmill_tests::scheduler::Scheduler;
use genmill_tests::specs::plain;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::time::timeout;
use tokio_stream::StreamExt as _;

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(60);

struct Bench {
    puppet: Puppet,
    redis: RedisServer,
    queue: Queue,
    lane: LaneNumber,
    next: u64,
}

fn model() -> ModelName {
    ModelName::parse("vllm_m").unwrap()
}

impl Bench {
    async fn new(lease_ms: u64) -> Self {
        let redis = RedisServer::start().unwrap();
        let options = Options { url: redis.url(), namespace: "test".to_owned() };
        let queue = Queue::connect(&options).await.unwrap();
        let lane = queue.open_lane(&model().lane()).await.unwrap();
        let puppet = Puppet::start(&queue, &[model()], lease_ms).await;
        Self { puppet, redis, queue, lane, next: 0 }
    }

    async fn submit(&mut self) -> JobId {
        self.next += 1;
        let id = JobId::new(UnixMs(1), self.lane, self.next << 32);
        self.queue.enqueue(&model().lane(), &[NewJob { id, spec: plain(model()) }]).await.unwrap();
        id
    }

    fn redis<T: redis::FromRedisValue>(&self, line: &str) -> T {
        let mut words = line.split(' ');
        let mut command = redis::cmd(words.next().unwrap());
        command.arg(words.collect::<Vec<_>>());
        ask(&self.redis, &command).unwrap()
    }

    /// A number of a line of INFO, such as `calls` of `cmdstat_evalsha`; 0 while there is none.
    fn info(&self, section: &str, line: &str, field: &str) -> u64 {
        let info: redis::InfoDict = self.redis(&format!("INFO {section}"));
        let told: String = info.get(line).unwrap_or_default();
        let number = told.split(',').find_map(|part| part.strip_prefix(field)?.strip_prefix('='));
        number.map_or(0, |number| number.parse().unwrap())
    }

    async fn ended(&self, id: JobId) -> Job {
        let ending = async {
            loop {
                let job = self.queue.get(id).await.unwrap();
                if job.state.is_final() {
                    return job;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(WITHIN, ending).await.expect("the job does not end")
    }

    /// Waits until the running attempt's text is `whole` for whoever watches.
    async fn shown(&self, id: JobId, whole: &str) {
        let showing = async { while self.queue.watch(id, 0).await.unwrap().text != whole.as_bytes() {} };
        timeout(WITHIN, showing).await.expect("the text is not shown");
    }
}

#[tokio::test]
async fn a_result_is_kept_that_comes_while_redis_is_out_of_memory() {
    let mut bench = Bench::new(1_200).await;
    let _scheduler = Scheduler::start(&bench.redis.url());
    let id = bench.submit().await;
    let asked = bench.puppet.asked().await;
    let lease_has_run_out = |bench: &Bench| {
        let (seconds, us): (u64, u64) = bench.redis("TIME");
        let now = seconds * 1_000 + us / 1_000;
        bench.redis::<u64>(&format!("ZCOUNT test:{{{}}}:leases 0 {now}", bench.lane.0)) == 1
    };
    let refusals = |bench: &Bench| bench.info("errorstats", "errorstat_OOM", "count");
    bench.redis::<()>("CONFIG SET maxmemory 1");
    asked.succeed("dear");
    while !lease_has_run_out(&bench) {
        tokio::task::yield_now().await;
    }
    // Upkeep has tried to take the job back, too.
    let before = refusals(&bench);
    while refusals(&bench) < before + 10 {
        tokio::task::yield_now().await;
    }
    bench.redis::<()>("CONFIG SET maxmemory 0");
    let job = bench.ended(id).await;
    assert_eq!(job.generation.as_ref().unwrap().text, "dear");
    assert_eq!(job.attempts.iter().map(|attempt| attempt.end).collect::<Vec<_>>(), [AttemptEnd::Succeeded]);
    assert_eq!(job.cost(), Some(Cost::exact(Picodollars(7))));
    bench.puppet.stop().await;
}

#[tokio::test]
async fn a_caller_is_told_that_redis_is_out_of_memory() {
    let bench = Bench::new(60_000).await;
    let scheduler = Scheduler::start(&bench.redis.url());
    bench.redis::<()>("CONFIG SET maxmemory 1");
    let told = async || {
        let request = Some(genmill_client::Request::new("vllm_m").prompt("x").into());
        let status = scheduler.connect().await.submit_job(v1::SubmitJobRequest { request }).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(status.message().contains("OOM"), "{status:?}");
    };
    told().await;
    // In the end, no worker could register again: that is no reason to refuse the request.
    bench.redis::<()>("DEL test:{registry}:workers");
    let refusals = |bench: &Bench| bench.info("errorstats", "errorstat_OOM", "count");
    while refusals(&bench) < 30 {
        told().await;
    }
}

#[tokio::test]
async fn text_that_redis_did_not_take_is_shown_once_it_does() {
    let mut bench = Bench::new(60_000).await;
    let id = bench.submit().await;
    let asked = bench.puppet.asked().await;
    asked.progress.text("Grüße".to_owned()).await;
    bench.shown(id, "Grüße").await;
    bench.redis::<()>("CONFIG SET maxmemory 1");
    asked.progress.text(" an alle".to_owned()).await;
    while bench.info("errorstats", "errorstat_OOM", "count") == 0 {
        tokio::task::yield_now().await;
    }
    bench.redis::<()>("CONFIG SET maxmemory 0");
    bench.shown(id, "Grüße an alle").await;
}

#[tokio::test]
async fn a_watch_goes_on_when_redis_has_lost_the_end_of_the_text() {
    let mut bench = Bench::new(60_000).await;
    let scheduler = Scheduler::start(&bench.redis.url());
    let mut client = scheduler.connect().await;
    let id = bench.submit().await;
    let asked = bench.puppet.asked().await;
    let mut watch = async |offset| {
        let asked = v1::WatchJobRequest { job_id: id.to_string(), epoch: 1, offset, more_offsets: Vec::new() };
        client.watch_job(asked).await.unwrap().into_inner()
    };
    let mut early = watch(0).await;
    asked.progress.text("Grüße an alle".to_owned()).await;
    let next = async |events: &mut tonic::Streaming<v1::WatchJobResponse>| {
        let event = timeout(WITHIN, events.next()).await.unwrap().unwrap().unwrap().event.unwrap();
        let Event::Text(delta) = event else { panic!("{event:?}") };
        (delta.offset, delta.text)
    };
    assert_eq!(next(&mut early).await, (0, "Grüße an alle".to_owned()));
    // As a Redis that was killed and had not yet written its last second.
    let key = [format!("test:{{{}}}:t:", bench.lane.0).as_bytes(), id.as_bytes()].concat();
    ask::<()>(&bench.redis, redis::cmd("SET").arg(key).arg("Gr")).unwrap();
    let mut late = watch(15).await;
    asked.progress.text("!".to_owned()).await;
    for events in [&mut early, &mut late] {
        assert_eq!(next(events).await, (15, "!".to_owned()));
    }
    bench.shown(id, "Grüße an alle!").await;
    asked.succeed("Grüße an alle!");
    for events in [&mut early, &mut late] {
        let last = timeout(WITHIN, events.next()).await.unwrap().unwrap().unwrap().event.unwrap();
        assert!(matches!(last, Event::Job(_)), "{last:?}");
    }
}

#[tokio::test]
async fn a_storm_of_cancels_costs_few_heartbeats() {
    let mut bench = Bench::new(60_000).await;
    let id = bench.submit().await;
    let _asked = bench.puppet.asked().await;
    let client = redis::Client::open(bench.redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let calls = |bench: &Bench| bench.info("commandstats", "cmdstat_evalsha", "calls");
    let (before, begun) = (calls(&bench), Instant::now());
    for _ in 0..2_000 {
        let mut hint = redis::cmd("PUBLISH");
        hint.arg(format!("test:{{{}}}:hints", bench.lane.0)).arg("c").exec_async(&mut connection).await.unwrap();
    }
    bench.queue.cancel(bench.lane, &[id]).await.unwrap();
    bench.ended(id).await;
    let (cost, ms) = (calls(&bench) - before, begun.elapsed().as_millis());
    // One in 20 ms, and what else goes on.
    assert!(u128::from(cost) < 20 + ms / 15, "{cost} calls in {ms} ms");
    bench.puppet.stop().await;
}

#[tokio::test]
async fn a_worker_that_drains_has_no_free_places() {
    let mut bench = Bench::new(60_000).await;
    let id = bench.submit().await;
    let asked = bench.puppet.asked().await;
    let free = |bench: &Bench| {
        let slots: HashMap<String, String> = bench.redis(&format!("HGETALL test:{{{}}}:slots", bench.lane.0));
        slots[worker().as_str()].split(':').nth(2).map(str::to_owned).unwrap()
    };
    assert_ne!(free(&bench), "0");
    bench.puppet.begin_to_stop();
    let draining = async {
        while free(&bench) != "0" {
            tokio::task::yield_now().await;
        }
    };
    timeout(WITHIN, draining).await.expect("it still says that it has free places");
    asked.succeed("x");
    assert_eq!(bench.ended(id).await.attempts.len(), 1);
    bench.puppet.stop().await;
}
