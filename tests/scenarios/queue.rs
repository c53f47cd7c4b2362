//! The queue against a real Redis: every transition, the fence, and what happens when something is repeated. All of it
//! runs on a single server, and on a cluster in `queue_cluster.rs`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::attempt::{AttemptEnd, Failure, FailureClass, FinishReason, Generation};
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::job::JobSpec;
use genmill_core::judge::{Policy, Verdict};
use genmill_core::model::ModelName;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::names::{Experiment, Tenant};
use genmill_core::prefix::PrefixKey;
use genmill_core::request::Priority;
use genmill_core::state::State;
use genmill_core::time::UnixMs;
use genmill_queue::{
    Beat, Booked, Ended, Enqueued, Event, Finish, Head, Held, Hint, Holding, Kept, Lease, ListQuery, Listed, NewJob,
    Options, Piece, Purge, Queue, QueueError, Redrive, Redriven, RequestId, Reservation, Room, Setting, Slots, Tally,
    Which,
};
use genmill_tests::redis_cluster::{Redis, ask};
use genmill_tests::redis_server::RedisServer;
use genmill_tests::specs::{now, plain, worker};
use std::time::Duration;
use tokio::time::timeout;

const LEASE_MS: u64 = 60_000;

struct Bench {
    redis: Redis,
    queue: Queue,
    lane: LaneNumber,
    next: u64,
}

fn spec() -> JobSpec {
    plain(ModelName::parse("vllm_m").unwrap())
}

fn slots(capacity: u32) -> Slots<'static> {
    Slots { capacity, free: 0, tokens: None, declared: None }
}

fn tenant(name: &str) -> Tenant {
    Tenant::parse(name).unwrap()
}

fn experiment(name: &str) -> Experiment {
    Experiment::parse(name).unwrap()
}

fn done(text: &str) -> Finish {
    let generation = Generation::new(text.to_owned(), FinishReason::Stop);
    Finish { verdict: Verdict::Succeed(generation), cost: Some(Cost::exact(Picodollars(7))), observation: None }
}

fn failed(delay_ms: Option<u64>) -> Finish {
    let failure = Failure::new(FailureClass::Transient, "x");
    let verdict = match delay_ms {
        Some(delay_ms) => Verdict::Retry { delay_ms, failure },
        None => Verdict::Fail(failure),
    };
    Finish { verdict, cost: Some(Cost::exact(Picodollars(2))), observation: None }
}

fn held(id: JobId, lease: &Lease) -> Holding {
    Holding { held: Held { id, epoch: lease.epoch }, started: true }
}

impl Bench {
    async fn new() -> Self {
        let redis = Redis::start_for(env!("CARGO_CRATE_NAME")).unwrap();
        let options = Options { url: redis.url(), namespace: "test".to_owned() };
        let queue = Queue::connect(&options).await.unwrap();
        let lane = queue.open_lane(&spec().model.lane()).await.unwrap();
        Self { redis, queue, lane, next: 0 }
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
        let room = Room { free, tokens: None, keys: &[] };
        self.queue.claim(self.lane, &worker(name), room, LEASE_MS).await.unwrap()
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

    /// Adds text to the attempt under a lease. Returns how much of it is stored.
    async fn append(&self, lease: &Lease, name: &str, offset: u64, text: &str) -> Option<u64> {
        let piece = Piece { held: lease.held(), offset, text: text.to_owned() };
        self.queue.append(self.lane, &worker(name), &[piece]).await.unwrap()[0]
    }

    /// Lets the lease of a job run out, as if its worker had died long ago.
    async fn lose(&self, lease: &Lease, name: &str) {
        self.queue.heartbeat(self.lane, &worker(name), slots(1), 0, &[held(lease.id, lease)]).await.unwrap();
        self.queue.reclaim(self.lane, &Policy::default(), 0).await.unwrap();
    }

    /// Makes all that waits as old as if it had been submitted `ms` earlier.
    fn age_backlogs(&self, ms: i64) {
        for node in self.redis.nodes() {
            let backlogs: Vec<String> = ask(node, redis::cmd("KEYS").arg("test:{*}:b:*")).unwrap();
            for backlog in backlogs {
                let list = redis::cmd("ZRANGE").arg(&backlog).arg(0).arg(-1).arg("WITHSCORES").to_owned();
                let waiting: Vec<(Vec<u8>, i64)> = ask(node, &list).unwrap();
                let mut older = redis::cmd("ZADD");
                older.arg(&backlog);
                for (job, created) in waiting {
                    older.arg(created - ms).arg(job);
                }
                ask::<()>(node, &older).unwrap();
            }
        }
    }

    /// What filters look at of all listed jobs, newest first.
    async fn listed(&self) -> (Vec<Listed>, Vec<Head>) {
        let query = ListQuery { lanes: &[self.lane], which: Which::All, before: None, limit: 9 };
        let listed = self.queue.list(query).await.unwrap();
        let ids: Vec<JobId> = listed.iter().map(|job| job.id).collect();
        (listed, self.queue.heads(&ids).await.unwrap())
    }

    /// Purges the newest `count` jobs.
    async fn purge(&self, count: usize) -> u64 {
        let (listed, heads) = self.listed().await;
        let jobs = listed.iter().zip(&heads).map(|(listed, head)| Purge { place: listed.place, head });
        self.queue.purge(&jobs.take(count).collect::<Vec<_>>()).await.unwrap()
    }

    async fn reserve(&self, id: JobId, content: u8) -> RequestId {
        let tenant = Tenant::default();
        let reservation = Reservation { tenant: &tenant, request_id: "r", id, content: &[content; 16] };
        self.queue.reserve_request_ids(&[reservation]).await.unwrap()[0]
    }

    async fn enqueue(&self, id: JobId) -> Enqueued {
        let job = NewJob { id, spec: JobSpec { request_id: Some("r".to_owned()), ..spec() } };
        self.queue.enqueue(&spec().model.lane(), &[job]).await.unwrap()[0]
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
    assert_eq!((lease.id, lease.epoch.0, &*lease.spec), (id, 1, &spec()));
    assert_eq!(bench.state(id).await, State::Running);
    assert_eq!(bench.finish(&lease, "w", done("hi")).await, Kept::Kept);
    let job = bench.queue.get(id).await.unwrap();
    assert_eq!(job.state, State::Succeeded);
    assert_eq!(job.generation.as_ref().unwrap().text, "hi");
    assert_eq!(job.cost(), Some(Cost::exact(Picodollars(7))));
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
    assert_eq!(bench.append(&stale, "dead", 0, "stale").await, None);
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
    assert_eq!(job.cost(), Some(Cost::exact(Picodollars(14))));
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
    assert_eq!((job.state, job.failures, job.cost()), (State::Failed, 2, Some(Cost::exact(Picodollars(4)))));
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
    bench.finish(&lease, "leaving", Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    assert_eq!(bench.queue.leave(bench.lane, &worker("leaving")).await.unwrap(), Booked::Gone);
    assert_eq!(bench.claimed("w", 2).await, [first, second]);
    let job = bench.queue.get(first).await.unwrap();
    assert_eq!((job.failures, job.losses), (0, 0));
}

#[tokio::test]
async fn waiting_jobs_are_cancelled_at_once() {
    let mut bench = Bench::new().await;
    let in_stream = bench.submit(|_| ()).await;
    bench.queue.heartbeat(bench.lane, &worker("w"), slots(1), LEASE_MS, &[]).await.unwrap();
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
    let held = [held(id, &lease)];
    let beat = async || bench.queue.heartbeat(bench.lane, &worker("w"), slots(1), LEASE_MS, &held).await.unwrap();
    assert_eq!(beat().await, [Beat::Ok]);
    bench.queue.cancel(bench.lane, &[id]).await.unwrap();
    assert_eq!(beat().await, [Beat::Cancel]);
    bench.finish(&lease, "w", Finish { verdict: Verdict::Cancel, cost: None, observation: None }).await;
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

    for how in [failed(Some(0)), Finish { verdict: Verdict::HandBack, cost: None, observation: None }] {
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
    let held = [held(running, &lease)];
    let beats = bench.queue.heartbeat(bench.lane, &worker("w"), slots(1), LEASE_MS, &held).await.unwrap();
    assert_eq!(beats, [Beat::DeadlinePassed]);
    bench.finish(&lease, "w", Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    assert_eq!(bench.state(running).await, State::Expired);
    assert_eq!(bench.claimed("w", 5).await, [unhurried]);
}

#[tokio::test]
async fn text_is_read_from_any_offset_and_a_new_attempt_voids_it() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    // Again, as after an answer that got lost, and one whose predecessor is missing: neither is added.
    for (offset, text, stored) in [(0, "Grüße", 7), (0, "Grüße", 7), (99, "!", 7), (7, " an alle", 15)] {
        assert_eq!(bench.append(&lease, "w", offset, text).await, Some(stored));
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
async fn asking_for_nothing_finds_nothing() {
    let queue = Bench::new().await.queue;
    assert_eq!(queue.states(&[]).await.unwrap(), []);
    assert_eq!(queue.get_many(&[]).await.unwrap(), []);
    assert_eq!(queue.open_jobs(&[], None).await.unwrap(), 0);
    assert_eq!(queue.reserve_request_ids(&[]).await.unwrap(), []);
    let query = ListQuery { lanes: &[], which: Which::All, before: None, limit: 1 };
    assert_eq!(queue.list(query).await.unwrap(), []);
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
    let experiment = experiment("e");
    let mut ids = Vec::new();
    for index in 0..6 {
        let experiment = (index % 2 == 0).then(|| experiment.clone());
        ids.push(bench.submit(|spec| spec.experiment = experiment).await);
    }
    ids.reverse();
    let lanes = [bench.lane];
    let list =
        async |which, before, limit| bench.queue.list(ListQuery { lanes: &lanes, which, before, limit }).await.unwrap();
    let of = |listed: &[Listed]| listed.iter().map(|job| job.id).collect::<Vec<_>>();
    let page = list(Which::All, None, 4).await;
    assert_eq!(of(&page), ids[..4]);
    assert_eq!(of(&list(Which::All, Some(page[3].place), 4).await), ids[4..]);
    assert_eq!(list(Which::Of(&experiment), None, 10).await.len(), 3);
    assert_eq!(bench.queue.open_jobs(&lanes, Some(&experiment)).await.unwrap(), 3);
}

#[tokio::test]
async fn lists_of_several_lanes_are_one_list_page_by_page() {
    let bench = Bench::new().await;
    let other = ModelName::parse("vllm_other").unwrap();
    let lanes = [bench.lane, bench.queue.open_lane(&other.lane()).await.unwrap()];
    let mut all = Vec::new();
    for n in 0..9 {
        let mut spec = spec();
        if n % 2 == 0 {
            spec.model = other.clone();
        }
        let id = JobId::new(now(), lanes[n % 2], n as u64);
        bench.queue.enqueue(&spec.model.lane(), &[NewJob { id, spec }]).await.unwrap();
        all.push(id);
    }
    let mut seen = Vec::new();
    let mut before = None;
    loop {
        let query = ListQuery { lanes: &lanes, which: Which::All, before, limit: 2 };
        let page = bench.queue.list(query).await.unwrap();
        seen.extend(page.iter().map(|job| job.id));
        let Some(last) = page.last() else { break };
        before = Some(last.place);
    }
    let sorted = |mut ids: Vec<JobId>| {
        ids.sort_unstable();
        ids
    };
    assert_eq!(sorted(seen), sorted(all), "every job once");
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
async fn what_another_version_has_stored_is_not_touched() {
    let bench = Bench::new().await;
    let options = Options { url: bench.redis.url(), namespace: "test".to_owned() };
    Queue::connect(&options).await.unwrap();
    let mut forget = redis::cmd("DEL");
    forget.arg("test:{registry}:layout");
    assert!(bench.redis.nodes().iter().any(|node| ask(node, &forget).is_ok_and(|gone: u8| gone == 1)));
    let error = Queue::connect(&options).await.unwrap_err();
    assert!(matches!(error, QueueError::Unsuitable { .. }));
    assert!(error.to_string().contains("number 1, this program reads number 2"), "{error}");
}

#[tokio::test]
async fn hints_and_events_come_back_however_busy_their_listeners_are() {
    let mut bench = Bench::new().await;
    let mut hints = bench.queue.hints(&[bench.lane]).await.unwrap();
    let mut events = bench.queue.events().await.unwrap();
    // Whoever listens beside much else gives up and listens again all the time.
    let glance = Duration::from_millis(20);
    bench.redis.kill().unwrap();
    for _ in 0..10 {
        assert!(timeout(glance, hints.next()).await.is_err());
        assert!(timeout(glance, events.next()).await.is_err());
    }
    bench.redis.restart().unwrap();
    let mut missed = (None, None);
    let both = async {
        while missed != (Some(Hint::Missed), Some(Event::Missed)) {
            missed.0 = missed.0.or(timeout(glance, hints.next()).await.ok());
            missed.1 = missed.1.or(timeout(glance, events.next()).await.ok());
        }
    };
    timeout(Duration::from_secs(60), both).await.unwrap();
    // The first call may find the broken connection.
    while bench.queue.all_lanes().await.is_err() {
        tokio::task::yield_now().await;
    }
    bench.submit(|_| ()).await;
    assert_eq!(hints.next().await, Hint::Work(bench.lane));
}

#[tokio::test]
async fn nothing_is_lost_when_redis_is_killed_and_comes_back() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench.redis.kill().unwrap();
    bench.redis.restart().unwrap();
    // The first call may find the broken connection; every call may be repeated.
    let mut kept = bench.try_finish(&lease, "w", done("x")).await;
    while kept.as_ref().is_err_and(QueueError::is_passing) {
        tokio::task::yield_now().await;
        kept = bench.try_finish(&lease, "w", done("x")).await;
    }
    assert_eq!(kept.unwrap(), Kept::Kept);
    assert_eq!(bench.ends(id).await, [AttemptEnd::Succeeded]);
}

#[tokio::test]
async fn a_paused_lane_starts_nothing_until_it_is_resumed() {
    let mut bench = Bench::new().await;
    bench.submit(|_| ()).await;
    bench.queue.heartbeat(bench.lane, &worker("w"), slots(1), LEASE_MS, &[]).await.unwrap();
    let pause = Setting::PauseLane(bench.lane);
    bench.queue.set(&pause, Some(1)).await.unwrap();
    bench.submit(|_| ()).await;
    assert!(bench.claim("w", 5).await.is_empty());
    bench.queue.set(&pause, None).await.unwrap();
    assert_eq!(bench.claim("w", 5).await.len(), 2);
}

#[tokio::test]
async fn a_paused_tenant_or_experiment_starts_nothing_and_the_others_go_on() {
    for pause in [Setting::PauseTenant(tenant("t")), Setting::PauseExperiment(experiment("e"))] {
        let mut bench = Bench::new().await;
        let theirs = |spec: &mut JobSpec| (spec.tenant, spec.experiment) = (tenant("t"), Some(experiment("e")));
        // One lies in the stream already when the pause comes.
        bench.queue.heartbeat(bench.lane, &worker("w"), slots(1), LEASE_MS, &[]).await.unwrap();
        let first = bench.submit(theirs).await;
        let others = bench.submit(|_| ()).await;
        bench.queue.set(&pause, Some(1)).await.unwrap();
        let second = bench.submit(theirs).await;
        let late = bench.submit(|_| ()).await;
        assert_eq!(bench.claimed("w", 9).await, [others, late]);
        assert!(bench.claimed("w", 9).await.is_empty());
        bench.queue.set(&pause, None).await.unwrap();
        assert_eq!(bench.claimed("w", 9).await, [first, second]);
    }
}

#[tokio::test]
async fn a_pause_holds_in_lanes_that_are_opened_later() {
    let bench = Bench::new().await;
    bench.queue.set(&Setting::PauseTenant(Tenant::default()), Some(1)).await.unwrap();
    let mut spec = spec();
    spec.model = ModelName::parse("vllm_new").unwrap();
    let lane = bench.queue.open_lane(&spec.model.lane()).await.unwrap();
    let id = JobId::new(now(), lane, 1);
    bench.queue.enqueue(&spec.model.lane(), &[NewJob { id, spec }]).await.unwrap();
    let room = Room { free: 1, tokens: None, keys: &[] };
    assert!(bench.queue.claim(lane, &worker("w"), room, LEASE_MS).await.unwrap().is_empty());
}

#[tokio::test]
async fn caps_bound_what_runs_at_once() {
    let mut bench = Bench::new().await;
    bench.queue.set(&Setting::TenantCap(tenant("t")), Some(2)).await.unwrap();
    for _ in 0..5 {
        bench.submit(|spec| spec.tenant = tenant("t")).await;
    }
    let other = bench.submit(|_| ()).await;
    let running = bench.claim("w", 9).await;
    assert_eq!(running.len(), 3, "two of the tenant with the cap, and the other one");
    assert!(running.iter().any(|lease| lease.id == other));
    let theirs: Vec<&Lease> = running.iter().filter(|lease| lease.id != other).collect();
    bench.finish(theirs[0], "w", done("x")).await;
    let next = bench.claim("w", 9).await;
    assert_eq!(next.len(), 1);
    // A lost worker frees its place, and so does a cancelled job that waits in the stream.
    bench.lose(&next[0], "w").await;
    assert_eq!(bench.claim("w", 9).await.len(), 1);

    bench.queue.set(&Setting::LaneCap(bench.lane), Some(1)).await.unwrap();
    bench.queue.set(&Setting::TenantCap(tenant("t")), None).await.unwrap();
    assert!(bench.claim("w", 9).await.is_empty(), "three run, which is more than the new cap");
    bench.queue.set(&Setting::LaneCap(bench.lane), Some(4)).await.unwrap();
    assert_eq!(bench.claim("w", 9).await.len(), 1);
}

#[tokio::test]
async fn a_cap_that_is_lowered_holds_for_what_was_fed_already() {
    let mut bench = Bench::new().await;
    bench.queue.heartbeat(bench.lane, &worker("w"), slots(5), LEASE_MS, &[]).await.unwrap();
    for _ in 0..8 {
        bench.submit(|_| ()).await;
    }
    bench.queue.set(&Setting::TenantCap(Tenant::default()), Some(3)).await.unwrap();
    assert_eq!(bench.claim("w", 9).await.len(), 3);
}

/// How many of the next `count` jobs belong to the tenant `a`, which competes with `b`.
async fn share_of_a(bench: &Bench, count: u32) -> usize {
    let claimed = bench.claim("w", count).await;
    claimed.iter().filter(|lease| lease.spec.tenant == tenant("a")).count()
}

#[tokio::test]
async fn tenants_share_by_weight_and_by_tokens() {
    let mut bench = Bench::new().await;
    bench.queue.set(&Setting::TenantWeight(tenant("a")), Some(300)).await.unwrap();
    for name in ["a", "b"] {
        for _ in 0..100 {
            bench.submit(|spec| spec.tenant = tenant(name)).await;
        }
    }
    let share = share_of_a(&bench, 80).await;
    assert!((58..=62).contains(&share), "three quarters of 80, but {share}");

    let mut bench = Bench::new().await;
    for (name, tokens) in [("a", 10), ("b", 90)] {
        for _ in 0..100 {
            bench.submit(|spec| (spec.tenant, spec.sampling.max_tokens) = (tenant(name), tokens)).await;
        }
    }
    let share = share_of_a(&bench, 50).await;
    assert!(share >= 44, "nine short jobs for each long one, but {share} of 50");
}

#[tokio::test]
async fn experiments_of_a_tenant_share_its_share() {
    let mut bench = Bench::new().await;
    for name in ["large", "small"] {
        for _ in 0..if name == "large" { 100 } else { 10 } {
            bench.submit(|spec| (spec.tenant, spec.experiment) = (tenant("a"), Some(experiment(name)))).await;
        }
    }
    for _ in 0..100 {
        bench.submit(|spec| spec.tenant = tenant("b")).await;
    }
    let claimed = bench.claim("w", 44).await;
    let count = |wanted: &dyn Fn(&JobSpec) -> bool| claimed.iter().filter(|lease| wanted(&lease.spec)).count();
    assert!((21..=23).contains(&count(&|spec| spec.tenant == tenant("b"))), "two experiments are one tenant");
    assert_eq!(count(&|spec| spec.experiment == Some(experiment("small"))), 10, "half of the tenant's half");
}

#[tokio::test]
async fn one_that_comes_back_has_not_saved_up_anything() {
    let mut bench = Bench::new().await;
    for _ in 0..50 {
        bench.submit(|spec| spec.tenant = tenant("b")).await;
    }
    // One at a time, each long: what it used up stands when it comes back.
    let mut ran = 0;
    for _ in 0..10 {
        bench.submit(|spec| (spec.tenant, spec.sampling.max_tokens) = (tenant("a"), 100)).await;
        ran += share_of_a(&bench, 2).await;
    }
    assert!(ran <= 2, "a long job is worth many short ones, but {ran} ran beside 18");
}

#[tokio::test]
async fn jobs_with_the_same_prefix_go_together_longest_first() {
    let mut bench = Bench::new().await;
    let mut grouped = Vec::new();
    for tokens in [10, 1_000, 100] {
        let prefix = Some(PrefixKey(7));
        grouped.push(bench.submit(|spec| (spec.prefix, spec.sampling.max_tokens) = (prefix, tokens)).await);
        bench.submit(|_| ()).await;
    }
    let claimed = bench.claimed("w", 9).await;
    let longest_first = [grouped[1], grouped[2], grouped[0]];
    assert!(claimed.windows(3).any(|next| next == longest_first), "{claimed:?}");
    // Waiting in a group, cancelled and handed back.
    let again = bench.submit(|spec| spec.prefix = Some(PrefixKey(7))).await;
    let cancelled = bench.submit(|spec| spec.prefix = Some(PrefixKey(7))).await;
    bench.queue.cancel(bench.lane, &[cancelled]).await.unwrap();
    let lease = bench.claim_one("w").await;
    assert_eq!(lease.id, again);
    bench.finish(&lease, "w", Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    assert_eq!(bench.claimed("w", 9).await, [again]);
}

#[tokio::test]
async fn groups_that_start_together_are_not_mixed() {
    let mut bench = Bench::new().await;
    let mut jobs = Vec::new();
    for n in 0..30 {
        let mut spec = spec();
        spec.prefix = Some(PrefixKey((n % 3) << 32));
        jobs.push(NewJob { id: JobId::new(now(), bench.lane, n << 32), spec });
    }
    bench.queue.enqueue(&spec().model.lane(), &jobs).await.unwrap();
    let mut order: Vec<_> = bench.claim("w", 30).await.into_iter().map(|lease| lease.spec.prefix).collect();
    assert_eq!(order.len(), 30);
    order.dedup();
    assert_eq!(order.len(), 3, "{order:?}");
    // Where a job stood, it waits again.
    bench.submit(|spec| spec.prefix = Some(PrefixKey(1 << 32))).await;
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    bench.queue.cancel(bench.lane, &[lease.id]).await.unwrap();
    assert!(bench.claim("w", 1).await.is_empty());
}

#[tokio::test]
async fn while_workers_are_busy_nothing_is_ahead_of_what_is_urgent() {
    let mut bench = Bench::new().await;
    for _ in 0..40 {
        bench.submit(|spec| spec.priority = Priority::Bulk).await;
    }
    bench.queue.heartbeat(bench.lane, &worker("w"), Slots { free: 4, ..slots(4) }, LEASE_MS, &[]).await.unwrap();
    let running = bench.claim("w", 4).await;
    let urgent = bench.submit(|spec| spec.priority = Priority::Interactive).await;
    assert_eq!(bench.queue.lane_state(bench.lane).await.unwrap().look_ahead, 0);
    bench.finish(&running[0], "w", done("x")).await;
    // What came free was fed at once, and for the bulk jobs it is not the turn.
    assert_eq!(bench.queue.lane_state(bench.lane).await.unwrap().look_ahead, 1);
    assert_eq!(bench.claimed("w", 1).await, [urgent]);
}

#[tokio::test]
async fn a_worker_gets_no_more_than_its_tokens_hold() {
    let mut bench = Bench::new().await;
    for _ in 0..9 {
        bench.submit(|spec| spec.sampling.max_tokens = 99).await;
    }
    let claim = async |tokens| {
        let room = Room { free: 9, tokens: Some(tokens), keys: &[] };
        bench.queue.claim(bench.lane, &worker("w"), room, LEASE_MS).await.unwrap().len()
    };
    assert_eq!(claim(0).await, 0);
    assert_eq!(claim(1).await, 1, "the last one may take more");
    assert_eq!(claim(300).await, 3);
    assert_eq!(claim(10_000).await, 5);
}

#[tokio::test]
async fn no_attempt_starts_before_its_time() {
    let mut bench = Bench::new().await;
    let later = bench.submit(|spec| spec.not_before = Some(now().plus_ms(3_600_000))).await;
    let past = bench.submit(|spec| spec.not_before = Some(UnixMs(1))).await;
    assert_eq!(bench.queue.promote(bench.lane).await.unwrap(), 0);
    assert_eq!(bench.claimed("w", 9).await, [past]);
    let job = bench.queue.get(later).await.unwrap();
    assert_eq!(job.state, State::Delayed);
    assert!(job.not_before.is_some());
    bench.queue.cancel(bench.lane, &[later]).await.unwrap();
    assert_eq!(bench.state(later).await, State::Cancelled);
}

#[tokio::test]
async fn an_attempt_that_cannot_be_ended_costs_the_others_nothing() {
    let mut bench = Bench::new().await;
    bench.submit(|_| ()).await;
    bench.submit(|_| ()).await;
    let leases = bench.claim("w", 2).await;
    let key = format!("test:{{{}}}:dead", bench.lane.0);
    let mut set = redis::cmd("SET");
    set.arg(&key).arg("no list");
    assert!(bench.redis.nodes().iter().any(|node| ask::<()>(node, &set).is_ok()));
    let finishes = [failed(None), done("x")];
    let ended: Vec<Ended<'_>> = leases
        .iter()
        .zip(&finishes)
        .map(|(lease, finish)| Ended { held: lease.held(), started_at: lease.started_at, finish })
        .collect();
    assert!(bench.queue.finish(bench.lane, &worker("w"), &ended).await.is_err());
    let job = bench.queue.get(leases[1].id).await.unwrap();
    assert_eq!((job.state, job.attempts.len()), (State::Succeeded, 1));
    assert_eq!(job.generation.unwrap().text, "x");
}

#[tokio::test]
async fn what_has_not_started_is_handed_to_an_idle_worker() {
    let mut bench = Bench::new().await;
    let first = bench.submit(|_| ()).await;
    let second = bench.submit(|_| ()).await;
    let leases = bench.claim("busy", 2).await;
    let beat = async |started: bool| {
        let held: Vec<Holding> =
            leases.iter().map(|lease| Holding { held: lease.held(), started: started || lease.id == first }).collect();
        bench.queue.heartbeat(bench.lane, &worker("busy"), slots(2), LEASE_MS, &held).await.unwrap()
    };
    assert_eq!(beat(false).await, [Beat::Ok, Beat::Ok], "nobody is idle");
    let idle = Slots { capacity: 2, free: 2, tokens: None, declared: None };
    bench.queue.heartbeat(bench.lane, &worker("idle"), idle, LEASE_MS, &[]).await.unwrap();
    assert_eq!(beat(true).await, [Beat::Ok, Beat::Ok], "both have started");
    let small = Slots { tokens: Some(1), ..idle };
    bench.queue.heartbeat(bench.lane, &worker("idle"), small, LEASE_MS, &[]).await.unwrap();
    assert_eq!(beat(false).await, [Beat::Ok, Beat::Ok], "it has no room for the tokens");
    bench.queue.heartbeat(bench.lane, &worker("idle"), idle, LEASE_MS, &[]).await.unwrap();
    assert_eq!(beat(false).await, [Beat::Ok, Beat::HandBack]);
    bench.finish(&leases[1], "busy", Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    assert_eq!(bench.claimed("idle", 2).await, [second]);
}

#[tokio::test]
async fn leases_are_left_alone_for_a_while_after_nobody_could_look() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench.queue.heartbeat(bench.lane, &worker("w"), slots(1), 0, &[held(id, &lease)]).await.unwrap();
    // Any scheduler, also one that has just started.
    for _ in 0..2 {
        assert_eq!(bench.queue.reclaim(bench.lane, &Policy::default(), 60_000).await.unwrap(), 0);
    }
    assert_eq!(bench.finish(&lease, "w", done("x")).await, Kept::Kept);
}

#[tokio::test]
async fn a_worker_that_leaves_with_a_lease_is_gone_when_that_is_taken_back() {
    let mut bench = Bench::new().await;
    bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    assert_eq!(bench.queue.leave(bench.lane, &worker("w")).await.unwrap(), Booked::Pending);
    assert_eq!(bench.queue.lane_state(bench.lane).await.unwrap().capacity, 0);
    // Its heartbeat would bring it back, so the lease is let run out by the job's next worker.
    bench.finish(&lease, "w", Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    bench.queue.reclaim(bench.lane, &Policy::default(), 0).await.unwrap();
    assert_eq!(bench.queue.leave(bench.lane, &worker("w")).await.unwrap(), Booked::Gone);
    assert_eq!(bench.claim("other", 1).await.len(), 1);
}

#[tokio::test]
async fn a_failed_job_is_redriven_once() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let waiting = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", failed(None)).await;
    let to = |n| JobId::new(now(), bench.lane, n);
    let (first, second, third) = (to(91), to(92), to(93));
    let redrive = async |jobs: &[Redrive]| bench.queue.redrive(bench.lane, jobs).await.unwrap();
    let decided = redrive(&[Redrive { from: id, to: first }, Redrive { from: waiting, to: third }]).await;
    assert_eq!(decided, [Some(Redriven::As(first)), None]);
    assert_eq!(redrive(&[Redrive { from: id, to: second }]).await, [Some(Redriven::As(first))]);
    assert_eq!(bench.queue.get(id).await.unwrap().redriven_as, Some(first));
    let query = ListQuery { lanes: &[bench.lane], which: Which::Failed, before: None, limit: 9 };
    let failed = bench.queue.list(query).await.unwrap();
    assert_eq!(failed.iter().map(|job| job.id).collect::<Vec<_>>(), [id]);
}

#[tokio::test]
async fn a_purged_job_does_not_come_back_by_redriving_what_it_repeats() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", failed(None)).await;
    let copy = bench.submit(|spec| spec.redriven_from = Some(id)).await;
    let redrive = [Redrive { from: id, to: copy }];
    assert_eq!(bench.queue.redrive(bench.lane, &redrive).await.unwrap(), [Some(Redriven::As(copy))]);
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", done("x")).await;
    assert_eq!(bench.purge(1).await, 1);
    assert_eq!(bench.queue.redrive(bench.lane, &redrive).await.unwrap(), [Some(Redriven::Purged(copy))]);
    // What is repeated may have been purged before: then nothing of it comes back either.
    let gone = JobId::new(now(), bench.lane, 99);
    bench.submit(|spec| spec.redriven_from = Some(gone)).await;
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", done("x")).await;
    assert_eq!(bench.purge(1).await, 1);
    assert!(matches!(bench.queue.get(gone).await, Err(QueueError::NoSuchJob { .. })));
}

#[tokio::test]
async fn a_job_that_two_purge_is_counted_once_and_a_request_id_taken_since_is_kept() {
    let bench = Bench::new().await;
    let [first, second] = [1, 2].map(|n| JobId::new(now(), bench.lane, n));
    assert_eq!((bench.reserve(first, 1).await, bench.enqueue(first).await), (RequestId::Fresh, Enqueued::New));
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", done("x")).await;
    // Both have read it before either removes it.
    let (listed, heads) = bench.listed().await;
    let job = [Purge { place: listed[0].place, head: &heads[0] }];
    assert_eq!(bench.queue.purge(&job).await.unwrap(), 1);
    assert_eq!((bench.reserve(second, 1).await, bench.enqueue(second).await), (RequestId::Fresh, Enqueued::New));
    assert_eq!(bench.queue.purge(&job).await.unwrap(), 0);
    assert_eq!(bench.reserve(first, 1).await, RequestId::Same(second));
    assert_eq!(bench.state(second).await, State::Queued);
    // Freed only by whoever names the job that it stands for.
    for (names, then) in [(first, RequestId::Other(second)), (second, RequestId::Fresh)] {
        bench.queue.free_request_ids(&[(&Tenant::default(), "r", names)]).await.unwrap();
        assert_eq!(bench.reserve(first, 2).await, then);
    }
}

#[tokio::test]
async fn what_is_gone_is_not_enqueued_by_whoever_was_late() {
    let bench = Bench::new().await;
    let [purged, buried] = [1, 2].map(|n| JobId::new(now(), bench.lane, n));
    assert!(bench.queue.bury(buried).await.unwrap());
    assert_eq!(bench.enqueue(purged).await, Enqueued::New);
    assert!(!bench.queue.bury(purged).await.unwrap());
    let lease = bench.claim_one("w").await;
    bench.finish(&lease, "w", done("x")).await;
    assert_eq!(bench.purge(1).await, 1);
    for id in [purged, buried] {
        assert_eq!(bench.enqueue(id).await, Enqueued::Existed);
        assert!(matches!(bench.queue.get(id).await, Err(QueueError::NoSuchJob { .. })));
        assert!(bench.queue.bury(id).await.unwrap());
    }
    assert_eq!(bench.queue.states(&[purged, buried]).await.unwrap(), [None, None]);
    assert!(bench.queue.heads(&[purged, buried]).await.unwrap().is_empty());
    assert!(bench.claim("w", 9).await.is_empty());
}

#[tokio::test]
async fn finished_jobs_are_purged_with_all_that_is_stored_of_them() {
    let mut bench = Bench::new().await;
    let mut finished = Vec::new();
    for how in [done("x"), failed(None)] {
        let id = bench.submit(|spec| spec.experiment = Some(experiment("e"))).await;
        let lease = bench.claim_one("w").await;
        bench.finish(&lease, "w", how).await;
        finished.push(id);
    }
    let waiting = bench.submit(|spec| spec.experiment = Some(experiment("e"))).await;
    let lanes = [bench.lane];
    let experiment = experiment("e");
    let list =
        async |which| bench.queue.list(ListQuery { lanes: &lanes, which, before: None, limit: 9 }).await.unwrap();
    assert_eq!(bench.purge(9).await, 2);
    for which in [Which::All, Which::Of(&experiment)] {
        assert_eq!(list(which).await.iter().map(|job| job.id).collect::<Vec<_>>(), [waiting]);
    }
    assert!(list(Which::Failed).await.is_empty());
    for id in finished {
        assert!(matches!(bench.queue.get(id).await, Err(QueueError::NoSuchJob { .. })));
    }
    assert_eq!(bench.state(waiting).await, State::Queued);
    // An experiment of which nothing is left leaves nothing behind.
    let streams = || -> usize {
        let of_node = |node| ask::<Vec<String>>(node, redis::cmd("KEYS").arg("test:{*}:x:*")).unwrap().len();
        bench.redis.nodes().iter().map(of_node).sum()
    };
    assert_eq!(streams(), 1);
    bench.queue.cancel(bench.lane, &[waiting]).await.unwrap();
    assert_eq!(bench.purge(9).await, 1);
    assert_eq!(streams(), 0);
}

/// How many of the next `count` jobs are bulk ones.
async fn share_of_bulk(bench: &Bench, count: u32) -> usize {
    let claimed = bench.claim("w", count).await;
    claimed.iter().filter(|lease| lease.spec.priority == Priority::Bulk).count()
}

async fn submit_bulk_and_interactive(bench: &mut Bench) {
    for (priority, count) in [(Priority::Bulk, 30), (Priority::Interactive, 200)] {
        for _ in 0..count {
            bench.submit(|spec| spec.priority = priority).await;
        }
    }
}

#[tokio::test]
async fn what_waits_long_weighs_more() {
    let mut bench = Bench::new().await;
    submit_bulk_and_interactive(&mut bench).await;
    assert!(share_of_bulk(&bench, 40).await <= 2, "one in a hundred");

    let mut bench = Bench::new().await;
    submit_bulk_and_interactive(&mut bench).await;
    bench.age_backlogs(8 * 60_000);
    let share = share_of_bulk(&bench, 40).await;
    assert!((18..=22).contains(&share), "after eight minutes bulk weighs as much as anything, but got {share} of 40");
}

#[tokio::test]
async fn a_large_charge_is_halved_while_a_job_waits() {
    let mut bench = Bench::new().await;
    submit_bulk_and_interactive(&mut bench).await;
    assert_eq!(share_of_bulk(&bench, 10).await, 1);
    assert_eq!(share_of_bulk(&bench, 50).await, 0, "the one that ran is to be paid for by a hundred others");
    bench.age_backlogs(60_000);
    assert!(bench.queue.age(bench.lane).await.unwrap() > 0);
    assert_eq!(bench.queue.age(bench.lane).await.unwrap(), 0, "once in a while");
    assert_eq!(share_of_bulk(&bench, 30).await, 1);
}

#[tokio::test]
async fn a_damaged_record_costs_no_other_job_its_lease() {
    let mut bench = Bench::new().await;
    let damaged = bench.submit(|_| ()).await;
    let whole = bench.submit(|_| ()).await;
    let lane = bench.lane.0;
    let spec = [format!("test:{{{lane}}}:s:").as_bytes(), damaged.as_bytes()].concat();
    // Without its list of failed jobs, the damaged one cannot even be failed. Of a cluster, one node has the lane.
    for key in [spec, format!("test:{{{lane}}}:dead").into_bytes()] {
        let mut set = redis::cmd("SET");
        set.arg(key).arg("nonsense");
        let written = bench.redis.nodes().iter().filter(|node| ask::<()>(node, &set).is_ok()).count();
        assert_eq!(written, 1);
    }
    assert_eq!(bench.claimed("w", 2).await, [whole]);
}

async fn refuses(queue: &Queue, job: &NewJob, lease: &Lease, words: &str) {
    let finish = done("x");
    let ended = [Ended { held: lease.held(), started_at: lease.started_at, finish: &finish }];
    let errors = [
        queue.enqueue(&job.spec.model.lane(), std::slice::from_ref(job)).await.unwrap_err(),
        queue.finish(lease.id.lane(), &worker("w"), &ended).await.unwrap_err(),
    ];
    for error in errors {
        assert!(error.is_passing() && error.in_full().contains(words), "{error:?}");
    }
}

#[tokio::test]
async fn a_redis_that_is_short_of_something_is_away_for_now() {
    let mut bench = Bench::new().await;
    let id = bench.submit(|_| ()).await;
    let lease = bench.claim_one("w").await;
    let job = NewJob { id: JobId::new(now(), bench.lane, 7), spec: spec() };
    let set = |name: &str, value: &str| {
        for node in bench.redis.nodes() {
            ask::<()>(node, redis::cmd("CONFIG").arg("SET").arg(name).arg(value)).unwrap();
        }
    };
    set("maxmemory", "1");
    refuses(&bench.queue, &job, &lease, "OOM").await;
    set("maxmemory", "0");
    set("min-replicas-to-write", "1");
    refuses(&bench.queue, &job, &lease, "NOREPLICAS").await;
    set("min-replicas-to-write", "0");
    assert_eq!(bench.finish(&lease, "w", done("x")).await, Kept::Kept);
    assert_eq!(bench.ends(id).await, [AttemptEnd::Succeeded]);
}

#[tokio::test]
async fn a_redis_that_still_loads_its_data_is_away_for_now() {
    // It looks up from loading every 1,024 commands, each of which is made to take half a millisecond.
    let mut redis = RedisServer::start_with(&["--key-load-delay", "500"]).unwrap();
    let options = Options { url: redis.url(), namespace: "test".to_owned() };
    let queue = Queue::connect(&options).await.unwrap();
    let client = redis::Client::open(redis.url()).unwrap();
    let mut fill = redis::pipe();
    for n in 0..4_000 {
        fill.set(n, n).ignore();
    }
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    fill.query_async::<()>(&mut connection).await.unwrap();
    let restarted = tokio::task::spawn_blocking(move || redis.kill_and_restart().map(|()| redis));
    let mut loading = 0;
    let id = JobId::new(now(), LaneNumber(1), 1);
    // A transaction is refused as a whole, a single command by itself; neither is an error of what was asked.
    while !restarted.is_finished() {
        for error in [queue.watch(id, 0).await.err(), queue.get(id).await.err()].into_iter().flatten() {
            assert!(error.is_passing() || matches!(error, QueueError::NoSuchJob { .. }), "{error:?}");
            loading += usize::from(format!("{error:?}").contains("oading"));
        }
        tokio::task::yield_now().await;
    }
    assert!(loading > 0, "nothing was asked while it loaded");
    drop(restarted.await.unwrap().unwrap());
}
