//! The queue against a real Redis: every transition, the fence, and what happens when something is repeated.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::attempt::{AttemptEnd, Failure, FailureClass, FinishReason, Generation};
use genmill_core::ids::{JobId, LaneNumber, WorkerId};
use genmill_core::job::JobSpec;
use genmill_core::judge::{Policy, Verdict};
use genmill_core::model::ModelName;
use genmill_core::money::Picodollars;
use genmill_core::names::{Experiment, Tenant};
use genmill_core::request::{Input, Priority, Sampling};
use genmill_core::state::State;
use genmill_core::time::UnixMs;
use genmill_queue::{
    Beat, Booked, Ended, Enqueued, Finish, Held, Kept, Lease, ListQuery, NewJob, Options, Piece, Queue, QueueError,
    RequestId, Reservation, Tally,
};
use genmill_tests::redis_server::RedisServer;
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

const LEASE_MS: u64 = 60_000;

struct Bench {
    _redis: RedisServer,
    queue: Queue,
    lane: LaneNumber,
    next: u64,
}

fn now() -> UnixMs {
    #[expect(clippy::disallowed_methods, reason = "a test has no daemon")]
    let now = SystemTime::now();
    UnixMs(u64::try_from(now.duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap())
}

fn worker(name: &str) -> WorkerId {
    WorkerId::from_stored(name.to_owned())
}

fn spec() -> JobSpec {
    JobSpec {
        model: ModelName::parse("vllm_m").unwrap(),
        input: Input::Prompt("Hello".to_owned()),
        sampling: Sampling { max_tokens: 5, temperature: 0.0, top_p: None, top_k: None, seed: 1, stop: Vec::new() },
        labels: BTreeMap::new(),
        tenant: Tenant::default(),
        experiment: None,
        priority: Priority::Normal,
        request_id: None,
        timeout_ms: None,
        deadline: None,
    }
}

fn done(text: &str) -> Finish {
    let generation =
        Generation { text: text.to_owned(), finish_reason: FinishReason::Stop, usage: None, first_token_ms: None };
    Finish { verdict: Verdict::Succeed(generation), cost: Some(Picodollars(7)) }
}

fn failed(delay_ms: Option<u64>) -> Finish {
    let failure = Failure::new(FailureClass::Transient, "x");
    let verdict = match delay_ms {
        Some(delay_ms) => Verdict::Retry { delay_ms, failure },
        None => Verdict::Fail(failure),
    };
    Finish { verdict, cost: Some(Picodollars(2)) }
}

impl Bench {
    async fn new() -> Self {
        let redis = RedisServer::start().unwrap();
        let options = Options { url: redis.url(), namespace: "test".to_owned() };
        let queue = Queue::connect(&options).await.unwrap();
        let lane = queue.open_lane(&spec().model.lane()).await.unwrap();
        Self { _redis: redis, queue, lane, next: 0 }
    }

    async fn submit(&mut self, change: impl FnOnce(&mut JobSpec)) -> JobId {
        let mut spec = spec();
        change(&mut spec);
        self.next += 1;
        let id = JobId::new(now(), self.lane, self.next << 32);
        let stored = self.queue.enqueue(&spec.model.lane(), &[NewJob { id, spec }]).await.unwrap();
        assert_eq!(stored, [Enqueued::New]);
        id
    }

    async fn claim(&self, name: &str, free: u32) -> Vec<Lease> {
        self.queue.claim(self.lane, &worker(name), free, LEASE_MS).await.unwrap()
    }

    async fn claim_one(&self, name: &str) -> Lease {
        let mut leases = self.claim(name, 1).await;
        assert_eq!(leases.len(), 1);
        leases.pop().unwrap()
    }

    async fn claimed(&self, name: &str, free: u32) -> Vec<JobId> {
        self.claim(name, free).await.into_iter().map(|lease| lease.id).collect()
    }

    async fn finish(&self, lease: &Lease, name: &str, finish: Finish) -> Kept {
        self.try_finish(lease, name, finish).await.unwrap()
    }

    async fn try_finish(&self, lease: &Lease, name: &str, finish: Finish) -> Result<Kept, QueueError> {
        let ended = Ended { held: lease.held(), started_at: lease.started_at, finish: &finish };
        Ok(self.queue.finish(lease.id.lane(), &worker(name), &[ended]).await?[0])
    }

    /// Adds text to the attempt under a lease.
    async fn append(&self, lease: &Lease, name: &str, offset: u64, text: &str) {
        let piece = Piece { held: lease.held(), offset, text: text.to_owned() };
        self.queue.append(self.lane, &worker(name), &[piece]).await.unwrap();
    }

    /// Lets the lease of a job run out, as if its worker had died long ago.
    async fn lose(&self, lease: &Lease, name: &str) {
        let held = [Held { id: lease.id, epoch: lease.epoch }];
        self.queue.heartbeat(self.lane, &worker(name), 1, 0, &held).await.unwrap();
        self.queue.reclaim(self.lane, &Policy::default()).await.unwrap();
    }

    async fn state(&self, id: JobId) -> State {
        self.queue.get(id).await.unwrap().state
    }

    async fn ends(&self, id: JobId) -> Vec<AttemptEnd> {
        self.queue.get(id).await.unwrap().attempts.into_iter().map(|attempt| attempt.end).collect()
    }
}

#[tokio::test]
async fn a_job_lives_from_submission_to_result() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    assert_eq!(bench.state(id).await, State::Queued);
    let lease = bench.claim_one("w").await;
    assert_eq!((lease.id, lease.epoch.0, &lease.spec), (id, 1, &spec()));
    assert_eq!(bench.state(id).await, State::Running);
    assert_eq!(bench.finish(&lease, "w", done("hi")).await, Kept::Kept);
    let job = bench.queue.get(id).await.unwrap();
    assert_eq!(job.state, State::Succeeded);
    assert_eq!(job.generation.as_ref().unwrap().text, "hi");
    assert_eq!(job.cost(), Some(Picodollars(7)));
    assert_eq!(bench.ends(id).await, [AttemptEnd::Succeeded]);
    assert!(bench.claim("w", 1).await.is_empty());
}

#[tokio::test]
async fn jobs_are_claimed_in_the_order_of_submission_and_once() {
    let mut bench = Bench::new().await;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(bench.submit(|_| ()).await);
    }
    let mut claimed = bench.claimed("a", 4).await;
    claimed.extend(bench.claimed("b", 4).await);
    claimed.extend(bench.claimed("a", 4).await);
    assert_eq!(claimed, ids);
}

#[tokio::test]
async fn enqueueing_again_changes_nothing() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    let again = NewJob { id, spec: spec() };
    let stored = bench.queue.enqueue(&spec().model.lane(), &[again]).await.unwrap();
    assert_eq!(stored, [Enqueued::Existed]);
    assert!(bench.claim("w", 1).await.is_empty());
    assert_eq!(bench.finish(&lease, "w", done("x")).await, Kept::Kept);
}

#[tokio::test]
async fn a_lost_worker_can_change_nothing_but_its_cost_is_booked() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let stale = bench.claim_one("dead").await;
    bench.lose(&stale, "dead").await;
    assert_eq!(bench.state(id).await, State::Queued);
    let fresh = bench.claim_one("alive").await;
    assert_eq!(fresh.epoch.0, 2);
    bench.append(&stale, "dead", 0, "stale").await;
    // Twice, as after an answer that got lost.
    assert_eq!(bench.finish(&stale, "dead", done("stale")).await, Kept::LeaseLost);
    assert_eq!(bench.finish(&stale, "dead", done("stale")).await, Kept::LeaseLost);
    assert_eq!(bench.state(id).await, State::Running);
    assert_eq!(bench.queue.watch(id, 0).await.unwrap().text, b"");
    assert_eq!(bench.finish(&fresh, "alive", done("fresh")).await, Kept::Kept);
    assert_eq!(bench.finish(&stale, "dead", done("stale")).await, Kept::LeaseLost);
    let job = bench.queue.get(id).await.unwrap();
    assert_eq!(job.generation.as_ref().unwrap().text, "fresh");
    assert_eq!((job.failures, job.losses), (0, 1));
    assert_eq!(job.cost(), Some(Picodollars(14)));
    assert_eq!(bench.ends(id).await, [AttemptEnd::Lost, AttemptEnd::Fenced, AttemptEnd::Succeeded]);
}

#[tokio::test]
async fn finishing_again_is_kept_once() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    for _ in 0..3 {
        assert_eq!(bench.finish(&lease, "w", done("x")).await, Kept::Kept);
    }
    assert_eq!(bench.ends(id).await, [AttemptEnd::Succeeded]);
    let finished = bench.queue.finished(bench.lane, None, 10).await.unwrap();
    assert_eq!(finished.len(), 1);
}

#[tokio::test]
async fn a_failed_attempt_is_delayed_then_tried_again() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", failed(Some(3_600_000))).await;
    let job = bench.queue.get(id).await.unwrap();
    assert_eq!((job.state, job.failures), (State::Delayed, 1));
    assert_eq!(job.failure.unwrap().class, FailureClass::Transient);
    assert_eq!(bench.queue.promote(bench.lane).await.unwrap(), 0);

    let other = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    assert_eq!(lease.id, other);
    bench.finish(&lease, "w", failed(Some(0))).await;
    assert_eq!(bench.queue.promote(bench.lane).await.unwrap(), 1);
    let again = bench.claim_one("w").await;
    assert_eq!((again.id, again.epoch.0, again.failures), (other, 2, 1));
    bench.finish(&again, "w", failed(None)).await;
    let job = bench.queue.get(other).await.unwrap();
    assert_eq!((job.state, job.failures, job.cost()), (State::Failed, 2, Some(Picodollars(4))));
}

#[tokio::test]
async fn a_job_that_loses_its_workers_is_poison() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    for _ in 0..3 {
        let lease = bench.claim_one("w").await;
        bench.lose(&lease, "w").await;
    }
    let job = bench.queue.get(id).await.unwrap();
    assert_eq!((job.state, job.losses, job.failures), (State::Failed, 3, 0));
    assert_eq!(job.failure.unwrap().class, FailureClass::Poison);
    assert!(bench.claim("w", 1).await.is_empty());
}

#[tokio::test]
async fn a_handed_back_job_keeps_its_place() {
    let mut bench = Bench::new().await;
    let first = bench.submit(|_| ()).await;
    let second = bench.submit(|_| ()).await;
    let lease = bench.claim_one("leaving").await;
    bench.finish(&lease, "leaving", Finish { verdict: Verdict::HandBack, cost: None }).await;
    assert_eq!(bench.queue.leave(bench.lane, &worker("leaving")).await.unwrap(), Booked::Gone);
    assert_eq!(bench.claimed("w", 2).await, [first, second]);
    let job = bench.queue.get(first).await.unwrap();
    assert_eq!((job.failures, job.losses), (0, 0));
}

#[tokio::test]
async fn waiting_jobs_are_cancelled_at_once() {
    let mut bench = Bench::new().await;
    let in_stream = bench.submit(|_| ()).await;
    bench.queue.heartbeat(bench.lane, &worker("w"), 1, LEASE_MS, &[]).await.unwrap();
    let in_backlog = bench.submit(|_| ()).await;
    let delayed = bench.submit(|_| ()).await;
    for id in [in_stream, in_backlog] {
        let tally = bench.queue.cancel(bench.lane, &[id]).await.unwrap();
        assert_eq!(tally, Tally { cancelled: 1, cancelling: 0 });
    }
    let lease = bench.claim_one("w").await;
    assert_eq!(lease.id, delayed);
    bench.finish(&lease, "w", failed(Some(0))).await;
    bench.queue.cancel(bench.lane, &[delayed]).await.unwrap();
    assert_eq!(bench.queue.promote(bench.lane).await.unwrap(), 0);
    for id in [in_stream, in_backlog, delayed] {
        assert_eq!(bench.state(id).await, State::Cancelled);
    }
    assert!(bench.claim("w", 5).await.is_empty());
    let again = bench.queue.cancel(bench.lane, &[delayed]).await.unwrap();
    assert_eq!(again, Tally::default());
    assert_eq!(bench.queue.open_jobs(&[bench.lane], None).await.unwrap(), 0);
}

#[tokio::test]
async fn the_worker_of_a_running_job_is_told_of_its_cancelling() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    let held = [Held { id, epoch: lease.epoch }];
    let beat = async || bench.queue.heartbeat(bench.lane, &worker("w"), 1, LEASE_MS, &held).await.unwrap();
    assert_eq!(beat().await, [Beat::Ok]);
    bench.queue.cancel(bench.lane, &[id]).await.unwrap();
    assert_eq!(beat().await, [Beat::Cancel]);
    bench.finish(&lease, "w", Finish { verdict: Verdict::Cancel, cost: None }).await;
    assert_eq!(bench.state(id).await, State::Cancelled);
    assert_eq!(beat().await, [Beat::Lost]);
}

#[tokio::test]
async fn a_finished_result_wins_over_a_late_cancel_and_a_lost_worker_does_not_save_a_cancelled_job() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench.queue.cancel(bench.lane, &[id]).await.unwrap();
    bench.finish(&lease, "w", done("x")).await;
    assert_eq!(bench.state(id).await, State::Succeeded);

    for how in [failed(Some(0)), Finish { verdict: Verdict::HandBack, cost: None }] {
        let id = bench.submit(|_| ()).await;
        let lease = bench.claim_one("w").await;
        bench.queue.cancel(bench.lane, &[id]).await.unwrap();
        bench.finish(&lease, "w", how).await;
        assert_eq!(bench.state(id).await, State::Cancelled);
    }
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench.queue.cancel(bench.lane, &[id]).await.unwrap();
    bench.lose(&lease, "w").await;
    assert_eq!(bench.state(id).await, State::Cancelled);
}

#[tokio::test]
async fn a_deadline_ends_waiting_jobs_and_tells_workers_of_running_ones() {
    let mut bench = Bench::new().await;
    let passed = Some(UnixMs(1));
    let running = bench.submit(|spec| spec.deadline = passed).await;
    let lease = bench.claim_one("w").await;
    let waiting = bench.submit(|spec| spec.deadline = passed).await;
    let unhurried = bench.submit(|spec| spec.deadline = Some(now().plus_ms(3_600_000))).await;
    bench.queue.expire(bench.lane).await.unwrap();
    assert_eq!(bench.state(waiting).await, State::Expired);
    assert_eq!(bench.state(unhurried).await, State::Queued);
    let held = [Held { id: running, epoch: lease.epoch }];
    let beats = bench.queue.heartbeat(bench.lane, &worker("w"), 1, LEASE_MS, &held).await.unwrap();
    assert_eq!(beats, [Beat::DeadlinePassed]);
    bench.finish(&lease, "w", Finish { verdict: Verdict::HandBack, cost: None }).await;
    assert_eq!(bench.state(running).await, State::Expired);
    assert_eq!(bench.claimed("w", 5).await, [unhurried]);
}

#[tokio::test]
async fn text_is_read_from_any_offset_and_a_new_attempt_voids_it() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    // Again, as after an answer that got lost, and one whose predecessor is missing: neither is added.
    for (offset, text) in [(0, "Grüße"), (0, "Grüße"), (99, "!"), (7, " an alle")] {
        bench.append(&lease, "w", offset, text).await;
    }
    let watched = bench.queue.watch(id, 7).await.unwrap();
    assert_eq!((watched.text.as_slice(), watched.text_bytes), (b" an alle".as_slice(), 15));
    assert_eq!(bench.queue.watch(id, 99).await.unwrap().text, b"");
    bench.lose(&lease, "w").await;
    bench.claim_one("w").await;
    let watched = bench.queue.watch(id, 0).await.unwrap();
    assert_eq!((watched.epoch.0, watched.text.as_slice()), (2, b"".as_slice()));
}

#[tokio::test]
async fn a_request_id_stands_for_one_job() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let other = bench.submit(|_| ()).await;
    let tenant = Tenant::default();
    let reserve = async |tenant: &Tenant, id, content: u8| {
        let content = [content; 16];
        let reservation = Reservation { tenant, request_id: "r", id, content: &content };
        bench.queue.reserve_request_ids(&[reservation]).await.unwrap()[0]
    };
    assert_eq!(reserve(&tenant, id, 1).await, RequestId::Fresh);
    assert_eq!(reserve(&tenant, other, 1).await, RequestId::Same(id));
    assert_eq!(reserve(&tenant, other, 2).await, RequestId::Other(id));
    assert_eq!(reserve(&Tenant::parse("else").unwrap(), other, 2).await, RequestId::Fresh);
    assert_eq!(bench.queue.find_request_id(&tenant, "r", &[1; 16]).await.unwrap(), Some(id));
    assert_eq!(bench.queue.find_request_id(&tenant, "r", &[2; 16]).await.unwrap(), None);
}

#[tokio::test]
async fn a_bulk_run_does_not_starve_a_small_tenant() {
    let mut bench = Bench::new().await;
    for _ in 0..200 {
        bench.submit(|spec| spec.tenant = Tenant::parse("bulk").unwrap()).await;
    }
    let small = bench.submit(|spec| spec.tenant = Tenant::parse("small").unwrap()).await;
    let claimed = bench.claimed("w", 10).await;
    assert!(claimed.contains(&small), "the small tenant's job is among the next ten");
}

#[tokio::test]
async fn jobs_are_listed_newest_first_by_page_and_experiment() {
    let mut bench = Bench::new().await;
    let experiment = Experiment::parse("e").unwrap();
    let mut ids = Vec::new();
    for index in 0..6 {
        let experiment = (index % 2 == 0).then(|| experiment.clone());
        ids.push(bench.submit(|spec| spec.experiment = experiment).await);
    }
    ids.sort_unstable();
    ids.reverse();
    let lanes = [bench.lane];
    let list = async |experiment, before, limit| {
        bench.queue.list(ListQuery { lanes: &lanes, experiment, before, limit }).await.unwrap()
    };
    assert_eq!(list(None, None, 4).await, ids[..4]);
    assert_eq!(list(None, Some(ids[3]), 4).await, ids[4..]);
    assert_eq!(list(Some(&experiment), None, 10).await.len(), 3);
    assert_eq!(bench.queue.open_jobs(&lanes, Some(&experiment)).await.unwrap(), 3);
}

#[tokio::test]
async fn finished_jobs_are_read_in_order_from_any_position() {
    let mut bench = Bench::new().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        bench.submit(|_| ()).await;
        let lease = bench.claim_one("w").await;
        bench.finish(&lease, "w", done("x")).await;
        ids.push(lease.id);
    }
    let first = bench.queue.finished(bench.lane, None, 2).await.unwrap();
    let rest = bench.queue.finished(bench.lane, Some(&first[1].position), 10).await.unwrap();
    let all: Vec<JobId> = first.iter().chain(&rest).map(|finished| finished.id).collect();
    assert_eq!(all, ids);
}

#[tokio::test]
async fn a_redis_that_may_evict_jobs_is_refused() {
    let redis = RedisServer::start_with(&["--maxmemory-policy", "allkeys-lru"]).unwrap();
    let options = Options { url: redis.url(), namespace: "test".to_owned() };
    let error = Queue::connect(&options).await.unwrap_err();
    assert!(matches!(error, QueueError::Unsuitable { .. }));
    assert!(error.to_string().contains("maxmemory-policy noeviction"), "{error}");
}

#[tokio::test]
async fn nothing_is_lost_when_redis_is_killed_and_comes_back() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench._redis.kill_and_restart().unwrap();
    // The first call may find the broken connection; every call may be repeated.
    let mut kept = bench.try_finish(&lease, "w", done("x")).await;
    while kept.as_ref().is_err_and(QueueError::is_passing) {
        tokio::task::yield_now().await;
        kept = bench.try_finish(&lease, "w", done("x")).await;
    }
    assert_eq!(kept.unwrap(), Kept::Kept);
    assert_eq!(bench.ends(id).await, [AttemptEnd::Succeeded]);
}
