//! Many watchers at one scheduler.

use futures_util::future::join_all;
use genmill_client::v1::watch_job_response::Event;
use genmill_client::v1::{JobState, WatchJobRequest};
use genmill_core::attempt::{FinishReason, Generation};
use genmill_core::ids::{JobId, WorkerId};
use genmill_core::judge::Verdict;
use genmill_core::model::ModelName;
use genmill_core::time::UnixMs;
use genmill_queue::{Ended, Finish, NewJob, Options, Queue, Room};
use genmill_tests::redis_cluster::ask;
use genmill_tests::redis_server::RedisServer;
use genmill_tests::scheduler::Scheduler;
use genmill_tests::specs::plain;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;

const WATCHERS: usize = 10_000;
const CONNECTIONS: usize = 4;
const JOBS: u64 = 100;

/// How long anything may take that has to happen. Generous: test machines are shared.
const WITHIN: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_watchers_share_the_connections_of_their_scheduler() {
    let redis = RedisServer::start().unwrap();
    let queue = Queue::connect(&Options { url: redis.url(), namespace: "test".to_owned() }).await.unwrap();
    let model = ModelName::parse("vllm_m").unwrap();
    let lane = queue.open_lane(&model.lane()).await.unwrap();
    let job = |n: u64| NewJob { id: JobId::new(UnixMs(1), lane, n << 32), spec: plain(model.clone()) };
    let jobs: Vec<NewJob> = (0..JOBS).map(job).collect();
    queue.enqueue(&model.lane(), &jobs).await.unwrap();
    let scheduler = Scheduler::start(&redis.url());
    let clients = join_all((0..CONNECTIONS).map(|_| scheduler.connect())).await;
    let connected = || {
        let info: redis::InfoDict = ask(&redis, redis::cmd("INFO").arg("clients")).unwrap();
        info.get::<usize>("connected_clients").unwrap()
    };
    let alone = connected();

    let mut opening = JoinSet::new();
    for (client, job) in clients.iter().cycle().zip(jobs.iter().cycle()).take(WATCHERS) {
        let (mut client, id) = (client.clone(), job.id.to_string());
        opening.spawn(async move {
            let asked = WatchJobRequest { job_id: id.clone(), epoch: 0, offset: 0, more_offsets: Vec::new() };
            (id, client.watch_job(asked).await.unwrap().into_inner())
        });
    }
    let watching = timeout(WITHIN, opening.join_all()).await.unwrap();
    assert_eq!((watching.len(), connected()), (WATCHERS, alone));

    let worker = WorkerId::from_stored("w".to_owned());
    let leases = queue.claim(lane, &worker, Room { free: 100, tokens: None, keys: &[] }, 60_000).await.unwrap();
    let generation = Generation::new("hi".to_owned(), FinishReason::Stop);
    let finish = Finish { verdict: Verdict::Succeed(generation), cost: None, observation: None };
    let ended: Vec<Ended<'_>> = leases
        .iter()
        .map(|lease| Ended { held: lease.held(), started_at: lease.started_at, finish: &finish })
        .collect();
    assert_eq!(queue.finish(lane, &worker, &ended).await.unwrap().len(), jobs.len());
    let told = join_all(watching.into_iter().map(async |(id, events)| {
        let events: Vec<Event> = events.map(|event| event.unwrap().event.unwrap()).collect().await;
        let [Event::Text(delta), Event::Job(job)] = events.as_slice() else { return false };
        (delta.text.as_str(), job.state(), &job.id) == ("hi", JobState::Succeeded, &id)
    }));
    assert!(timeout(WITHIN, told).await.unwrap().into_iter().all(|told| told));
    assert_eq!(connected(), alone);
}
