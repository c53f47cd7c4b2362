//! Gates on a real Redis: what bounds the calls of remote models, shared by all workers.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::attempt::{Failure, FailureClass, FinishReason, Generation};
use genmill_core::gate::{Bucket, Covered, Declaration, KeyId, Limit, Observation, Signal};
use genmill_core::ids::{JobId, LaneNumber};
use genmill_core::job::JobSpec;
use genmill_core::judge::{Policy, Verdict};
use genmill_core::model::ModelName;
use genmill_core::names::Experiment;
use genmill_core::state::State;
use genmill_queue::{
    Ended, Finish, GateState, HeldBack, HeldBy, Holding, Kept, Lease, NewJob, Opens, Options, Passage, Queue, Room,
    SideCall, Slots,
};
use genmill_tests::dice::Dice;
use genmill_tests::redis_cluster::ask;
use genmill_tests::redis_server::RedisServer;
use genmill_tests::specs::{now, plain, worker};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tokio::time::timeout;

const LEASE_MS: u64 = 60_000;
const WITHIN: Duration = Duration::from_secs(60);
const A: &str = "litellm_p/a";
const B: &str = "litellm_p/b";
/// The estimated tokens of a job.
const TOKENS: u64 = 6;

struct Bench {
    _redis: RedisServer,
    queue: Queue,
    lane: LaneNumber,
    next: u64,
}

fn spec(model: &str) -> JobSpec {
    plain(ModelName::parse(model).unwrap())
}

fn key(name: &str) -> KeyId {
    KeyId::from_stored(name.to_owned())
}

/// A worker's keys, with so many calls at once at first.
fn declare(keys: &[&str], start: u32, limits: Vec<Limit>) -> Declaration {
    Declaration { keys: keys.iter().map(|name| key(name)).collect(), start, limits, covered: Covered::default() }
}

fn limit(model: &str) -> Limit {
    Limit { model: model.to_owned(), ..Limit::default() }
}

fn answered() -> Finish {
    let observation = Observation { signal: Signal::Answered, ..Observation::default() };
    told(observation)
}

fn told(observation: Observation) -> Finish {
    let generation = Generation::new("x".to_owned(), FinishReason::Stop);
    Finish { verdict: Verdict::Succeed(generation), cost: None, observation: Some(observation) }
}

fn throttled(retry_after_ms: Option<u64>) -> Finish {
    let failure = Failure::new(FailureClass::Throttled, "x");
    let observation = Observation { signal: Signal::Throttled, retry_after_ms, ..Observation::default() };
    Finish { verdict: Verdict::Wait { delay_ms: 0, failure }, cost: None, observation: Some(observation) }
}

fn overloaded() -> Finish {
    let failure = Failure::new(FailureClass::Transient, "x");
    let observation = Observation { signal: Signal::Overloaded, ..Observation::default() };
    Finish { verdict: Verdict::Fail(failure), cost: None, observation: Some(observation) }
}

impl Bench {
    async fn new() -> Self {
        let redis = RedisServer::start().unwrap();
        let options = Options { url: redis.url(), namespace: "test".to_owned() };
        let queue = Queue::connect(&options).await.unwrap();
        let lane = queue.open_lane(&spec(A).model.lane()).await.unwrap();
        Self { _redis: redis, queue, lane, next: 0 }
    }

    async fn submit(&mut self, model: &str, count: u64) -> Vec<JobId> {
        self.submit_of(model, count, None).await
    }

    async fn submit_of(&mut self, model: &str, count: u64, experiment: Option<&str>) -> Vec<JobId> {
        let experiment = experiment.map(|name| Experiment::parse(name).unwrap());
        self.submit_like(&JobSpec { experiment, ..spec(model) }, count).await
    }

    /// Jobs of about so many tokens.
    async fn submit_sized(&mut self, count: u64, experiment: &str, tokens: u32) -> Vec<JobId> {
        let mut spec = JobSpec { experiment: Some(Experiment::parse(experiment).unwrap()), ..spec(A) };
        spec.sampling.max_tokens = tokens;
        self.submit_like(&spec, count).await
    }

    async fn submit_like(&mut self, spec: &JobSpec, count: u64) -> Vec<JobId> {
        let mut jobs = Vec::new();
        for _ in 0..count {
            self.next += 1;
            let spec = spec.clone();
            jobs.push(NewJob { id: JobId::new(now(), self.lane, self.next << 32), spec });
        }
        self.queue.enqueue(&spec.model.lane(), &jobs).await.unwrap();
        jobs.into_iter().map(|job| job.id).collect()
    }

    /// A worker says what it has. It has so many places, all of them in use: only its claims feed.
    async fn beat(&self, name: &str, capacity: u32, declared: &Declaration) {
        let slots = Slots { capacity, free: 0, tokens: None, declared: Some(declared) };
        self.queue.heartbeat(self.lane, &worker(name), slots, LEASE_MS, &[]).await.unwrap();
    }

    async fn claim(&self, name: &str, free: u32, keys: &[&str]) -> Vec<Lease> {
        let keys: Vec<KeyId> = keys.iter().map(|name| key(name)).collect();
        let room = Room { free, tokens: None, keys: &keys };
        let leases = self.queue.claim(self.lane, &worker(name), room, LEASE_MS).await.unwrap();
        assert!(leases.iter().all(|lease| lease.key.as_ref().is_some_and(|key| keys.contains(key))), "{leases:?}");
        leases
    }

    /// Claims until a job comes.
    async fn claim_soon(&self, name: &str, keys: &[&str]) -> Lease {
        let claiming = async {
            loop {
                if let Some(lease) = self.claim(name, 1, keys).await.pop() {
                    return lease;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(WITHIN, claiming).await.unwrap()
    }

    async fn finish(&self, lease: &Lease, name: &str, finish: &Finish) {
        let ended = Ended { held: lease.held(), started_at: lease.started_at, finish };
        assert_eq!(self.queue.finish(self.lane, &worker(name), &[ended]).await.unwrap(), [Kept::Kept]);
    }

    async fn finish_all(&self, leases: &[Lease], name: &str, finish: &Finish) {
        let ended: Vec<Ended<'_>> =
            leases.iter().map(|lease| Ended { held: lease.held(), started_at: lease.started_at, finish }).collect();
        self.queue.finish(self.lane, &worker(name), &ended).await.unwrap();
    }

    async fn gate(&self, name: &str, model: &str) -> GateState {
        let gates = self.queue.gates(self.lane).await.unwrap().gates;
        gates.into_iter().find(|gate| gate.key == key(name) && gate.model == model).unwrap()
    }

    async fn held_back(&self) -> Vec<HeldBack> {
        self.queue.gates(self.lane).await.unwrap().held_back
    }
}

fn count(leases: &[Lease], model: &str) -> usize {
    leases.iter().filter(|lease| lease.spec.model.as_str() == model).count()
}

#[tokio::test]
async fn a_model_without_room_waits_and_others_go_on() {
    let mut bench = Bench::new().await;
    bench.beat("w", 0, &declare(&["k"], 2, Vec::new())).await;
    bench.submit(A, 5).await;
    bench.submit(B, 1).await;
    let leases = bench.claim("w", 10, &["k"]).await;
    assert_eq!((count(&leases, A), count(&leases, B)), (2, 1));
    let held = HeldBack { model: A.to_owned(), until: Opens::AfterCall, held_by: HeldBy::Calls };
    assert_eq!(bench.held_back().await, [held]);
    assert_eq!(bench.gate("k", A).await.in_flight, 2);
    // An answer makes room for its own place and one more.
    let first = leases.iter().find(|lease| lease.spec.model.as_str() == A).unwrap();
    bench.finish(first, "w", &answered()).await;
    assert_eq!(bench.gate("k", A).await.window, Some(3));
    assert_eq!(count(&bench.claim("w", 10, &["k"]).await, A), 2);
}

#[tokio::test]
async fn several_keys_are_used_by_their_room() {
    let mut bench = Bench::new().await;
    let concurrency = |most| Limit { concurrency: Some(most), ..limit(A) };
    bench.beat("w", 0, &declare(&["k", "l"], 4, vec![concurrency(3)])).await;
    bench.submit(A, 9).await;
    let leases = bench.claim("w", 4, &["k", "l"]).await;
    let with = |leases: &[Lease], name: &str| leases.iter().filter(|lease| lease.key == Some(key(name))).count();
    assert_eq!((with(&leases, "k"), with(&leases, "l")), (2, 2));
    // What one has left is used while the other asks to wait.
    let k: Vec<Lease> = leases.iter().filter(|lease| lease.key == Some(key("k"))).cloned().collect();
    bench.finish_all(&k, "w", &throttled(Some(60_000))).await;
    let more = bench.claim("w", 4, &["k", "l"]).await;
    assert_eq!((with(&more, "k"), with(&more, "l")), (0, 1));
    let until = bench.held_back().await;
    assert!(matches!(&until[..], [HeldBack { until: Opens::At(_), held_by: HeldBy::Throttled, .. }]), "{until:?}");
}

#[tokio::test]
async fn a_throttled_job_waits_behind_its_gate_and_has_not_failed() {
    let mut bench = Bench::new().await;
    bench.beat("w", 0, &declare(&["k"], 9, Vec::new())).await;
    let ids = bench.submit(A, 3).await;
    let leases = bench.claim("w", 9, &["k"]).await;
    let begun = Instant::now();
    // Calls that began before the window shrank do not shrink it again.
    bench.finish_all(&leases, "w", &throttled(Some(400))).await;
    assert_eq!(bench.gate("k", A).await.window, Some(2));
    assert_eq!(bench.gate("k", A).await.in_flight, 0);
    for id in &ids {
        let job = bench.queue.get(*id).await.unwrap();
        assert_eq!((job.state, job.failures, job.attempts.len()), (State::Queued, 0, 1));
    }
    assert!(bench.claim("w", 9, &["k"]).await.is_empty());
    let lease = bench.claim_soon("w", &["k"]).await;
    assert!(begun.elapsed() >= Duration::from_millis(400));
    // It keeps its place.
    assert_eq!((lease.id, lease.failures), (ids[0], 0));
}

#[tokio::test]
async fn what_is_throttled_without_being_told_for_how_long_waits_longer_every_time() {
    let mut bench = Bench::new().await;
    bench.beat("w", 0, &declare(&["k"], 9, Vec::new())).await;
    bench.submit(A, 1).await;
    for (least, most) in [(1_000, 2_000), (2_000, 4_000)] {
        let lease = bench.claim_soon("w", &["k"]).await;
        bench.finish(&lease, "w", &throttled(None)).await;
        let Opens::At(at) = bench.gate("k", A).await.opens else { panic!("it is open") };
        assert!((1..=most).contains(&at.ms_since(now())), "{least}");
        // Redis and this test have one clock.
        assert!(at.ms_since(lease.started_at) >= least);
    }
}

#[tokio::test]
async fn jobs_go_to_whoever_answers_in_place_of_a_model_that_is_held_back() {
    let mut bench = Bench::new().await;
    let covered = Covered { throttled: vec![A.to_owned()], failing: Vec::new() };
    let knows = Declaration { covered, ..declare(&["k"], 9, Vec::new()) };
    assert_eq!(knows.claims_with(), [key("k"), KeyId::spared()]);
    bench.beat("knows", 0, &knows).await;
    bench.beat("other", 0, &declare(&["k"], 9, Vec::new())).await;
    bench.submit(A, 3).await;
    bench.submit(B, 2).await;
    let leases = bench.claim("other", 5, &["k"]).await;
    bench.finish_all(&leases, "other", &throttled(Some(60_000))).await;
    assert!(bench.claim("other", 5, &["k"]).await.is_empty(), "it does not know who answers");
    // Of the other model nobody answers in its place.
    let spared = bench.claim("knows", 5, &["k", "~"]).await;
    assert_eq!((count(&spared, A), count(&spared, B)), (3, 0));
    assert!(spared.iter().all(|lease| lease.key.as_ref().is_some_and(KeyId::is_spared)));
    assert_eq!(bench.gate("k", A).await.in_flight, 0);
    bench.finish_all(&spared, "knows", &answered()).await;
    let gate = bench.gate("k", A).await;
    assert_eq!(
        (gate.in_flight, matches!(gate.opens, Opens::At(_))),
        (0, true),
        "it has learnt nothing of its own model"
    );
}

#[tokio::test]
async fn a_provider_that_says_at_once_time_after_time_is_asked_ever_less() {
    let mut bench = Bench::new().await;
    bench.beat("w", 0, &declare(&["k"], 9, Vec::new())).await;
    bench.submit(A, 1).await;
    for least in [0, 50, 100, 200] {
        let lease = bench.claim_soon("w", &["k"]).await;
        bench.finish(&lease, "w", &throttled(Some(0))).await;
        let shut_ms = match bench.gate("k", A).await.opens {
            Opens::At(at) => at.ms_since(lease.started_at),
            Opens::Now | Opens::AfterCall => 0,
        };
        assert!(shut_ms >= least, "{shut_ms} of {least}");
    }
}

#[tokio::test]
async fn a_limit_that_was_told_is_kept_until_it_has_refilled() {
    let mut bench = Bench::new().await;
    bench.beat("w", 0, &declare(&["k"], 9, Vec::new())).await;
    bench.submit(A, 20).await;
    let leases = bench.claim("w", 1, &["k"]).await;
    // Empty; ten requests flow in within 2 s.
    let bucket = Bucket { limit: Some(10), remaining: Some(0), reset_ms: Some(2_000) };
    let observed = Observation { signal: Signal::Answered, requests: Some(bucket), ..Observation::default() };
    bench.finish(&leases[0], "w", &told(observed)).await;
    let begun = Instant::now();
    assert!(bench.claim("w", 9, &["k"]).await.is_empty());
    let held = bench.held_back().await;
    assert!(matches!(&held[..], [HeldBack { held_by: HeldBy::Requests, until: Opens::At(_), .. }]), "{held:?}");
    let mut taken = 0;
    while taken < 5 {
        taken += bench.claim("w", 9, &["k"]).await.len();
        tokio::task::yield_now().await;
    }
    assert!(begun.elapsed() >= Duration::from_millis(990), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_bucket_that_is_nearly_full_tells_no_rate() {
    let mut bench = Bench::new().await;
    bench.beat("w", 0, &declare(&["k"], 9, Vec::new())).await;
    bench.submit(A, 20).await;
    // 6000 in a minute, rounded up to a whole second.
    let leases = bench.claim("w", 1, &["k"]).await;
    let told_with = |remaining, reset_ms| {
        let bucket = Bucket { limit: Some(6_000), remaining: Some(remaining), reset_ms };
        told(Observation { signal: Signal::Answered, requests: Some(bucket), ..Observation::default() })
    };
    bench.finish(&leases[0], "w", &told_with(5_999, Some(1_000))).await;
    let leases = bench.claim("w", 1, &["k"]).await;
    bench.finish(&leases[0], "w", &told_with(0, None)).await;
    // Empty; had it one a second, this would not come before a second.
    let begun = Instant::now();
    bench.claim_soon("w", &["k"]).await;
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn tokens_are_charged_as_estimated_then_as_used_and_a_large_job_goes_when_the_bucket_is_half_full() {
    let mut bench = Bench::new().await;
    let tokens = |most| Limit { tokens: Some(most), ..limit(A) };
    bench.beat("w", 0, &declare(&["k"], 9, vec![tokens(2 * TOKENS)])).await;
    bench.submit(A, 9).await;
    let leases = bench.claim("w", 9, &["k"]).await;
    assert_eq!(leases.len(), 2, "as many as the estimates fill the bucket with");
    assert_eq!(bench.held_back().await[0].held_by, HeldBy::Tokens);
    let used = |used| told(Observation { used_tokens: Some(used), ..Observation::default() });
    bench.finish(&leases[0], "w", &used(0)).await;
    let again = bench.claim("w", 9, &["k"]).await;
    assert_eq!(again.len(), 1);
    // Larger than the whole bucket: it goes alone.
    bench.finish_all(&[leases[1].clone(), again[0].clone()], "w", &used(0)).await;
    bench.beat("w", 0, &declare(&["k"], 9, vec![tokens(TOKENS / 2)])).await;
    let large = bench.claim("w", 9, &["k"]).await;
    assert_eq!(large.len(), 1);
    let Opens::At(at) = bench.held_back().await[0].until else { panic!("it is open") };
    // It owes half of its estimate, at half of its estimate a minute, and then the bucket must be half full again.
    let wait = at.ms_since(now());
    assert!((70_000..=90_000).contains(&wait), "{wait}");
}

#[tokio::test]
async fn smaller_jobs_do_not_keep_a_bucket_empty_for_which_a_larger_one_waits() {
    for (of, experiments) in [(A, 1), ("", 1), (A, 50)] {
        let mut bench = Bench::new().await;
        // A token flows in every millisecond.
        let tokens = Limit { tokens: Some(60_000), ..limit(of) };
        bench.beat("w", 0, &declare(&["k"], 1_000, vec![tokens])).await;
        // It takes the whole bucket.
        bench.submit_sized(1, "first", 59_990).await;
        assert_eq!(bench.claim("w", 9, &["k"]).await.len(), 1);
        for number in 0..experiments {
            bench.submit_sized(100 / experiments, &format!("small-{number}"), 50).await;
        }
        let large = bench.submit_sized(1, "large", 1_500).await[0];
        let mut before = 0;
        while bench.claim_soon("w", &["k"]).await.id != large {
            before += 1;
        }
        // At most those whose turn it was.
        assert!(before <= experiments + 5, "{before} small jobs of {experiments} experiments passed it by");
    }
}

#[tokio::test]
async fn a_limit_of_all_models_bounds_them_together() {
    let mut bench = Bench::new().await;
    let all = Limit { requests: Some(3), ..limit("") };
    bench.beat("w", 0, &declare(&["k"], 9, vec![all])).await;
    bench.submit(A, 2).await;
    bench.submit(B, 5).await;
    let leases = bench.claim("w", 9, &["k"]).await;
    assert_eq!(leases.len(), 3);
    assert_eq!(bench.gate("k", "").await.in_flight, 3);
    bench.finish_all(&leases, "w", &answered()).await;
    assert_eq!(bench.gate("k", "").await.in_flight, 0);
    let held = bench.held_back().await;
    assert!(held.iter().all(|held| held.held_by == HeldBy::Requests && held.until != Opens::AfterCall), "{held:?}");
    // A job that nobody called gives its permit back whole.
    let concurrency = Limit { concurrency: Some(1), ..limit("") };
    bench.beat("w", 0, &declare(&["k"], 9, vec![concurrency])).await;
    let one = bench.claim("w", 9, &["k"]).await;
    assert_eq!(one.len(), 1);
    bench.finish(&one[0], "w", &Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    assert_eq!(bench.claim("w", 9, &["k"]).await.len(), 1);
}

#[tokio::test]
async fn what_is_told_may_lower_what_is_configured_but_not_raise_it() {
    let mut bench = Bench::new().await;
    let two = Limit { requests: Some(2), ..limit(A) };
    bench.beat("w", 0, &declare(&["k"], 9, vec![two])).await;
    bench.submit(A, 9).await;
    let leases = bench.claim("w", 9, &["k"]).await;
    assert_eq!(leases.len(), 2);
    let generous = Bucket { limit: Some(1_000), remaining: Some(999), reset_ms: Some(1) };
    let observed = Observation { signal: Signal::Answered, requests: Some(generous), ..Observation::default() };
    bench.finish(&leases[0], "w", &told(observed)).await;
    assert!(bench.claim("w", 9, &["k"]).await.is_empty());
    let Opens::At(at) = bench.held_back().await[0].until else { panic!("it is open") };
    assert!(at.ms_since(now()) > 20_000);
}

#[tokio::test]
async fn a_provider_that_fails_is_left_alone_and_then_tried_with_one_call() {
    let mut bench = Bench::new().await;
    bench.beat("w", 0, &declare(&["k"], 9, Vec::new())).await;
    bench.submit(A, 20).await;
    let leases = bench.claim("w", 9, &["k"]).await;
    bench.finish_all(&leases[..4], "w", &overloaded()).await;
    assert_eq!(bench.gate("k", A).await.opens, Opens::Now);
    let begun = Instant::now();
    bench.finish_all(&leases[4..], "w", &overloaded()).await;
    assert_eq!(bench.gate("k", A).await.held_by, Some(HeldBy::Failing));
    assert!(bench.claim("w", 9, &["k"]).await.is_empty());
    assert_eq!(bench.held_back().await[0].held_by, HeldBy::Failing);
    let probe = bench.claim_soon("w", &["k"]).await;
    assert!(begun.elapsed() >= Duration::from_millis(1_990), "{:?}", begun.elapsed());
    assert!(bench.claim("w", 9, &["k"]).await.is_empty(), "one probe at a time");
    // The probe goes to somebody else, and comes back with good news.
    bench.finish(&probe, "w", &Finish { verdict: Verdict::HandBack, cost: None, observation: None }).await;
    let probe = bench.claim_soon("w", &["k"]).await;
    bench.finish(&probe, "w", &answered()).await;
    assert_eq!(bench.claim("w", 5, &["k"]).await.len(), 5);
}

#[tokio::test]
async fn a_job_for_a_key_that_its_worker_lacks_goes_to_one_that_has_it() {
    let mut bench = Bench::new().await;
    let one = Limit { concurrency: Some(1), ..limit(A) };
    bench.beat("v", 1, &declare(&["k"], 9, vec![one.clone()])).await;
    // Fed with the one key there is.
    bench.submit(A, 3).await;
    assert_eq!(bench.queue.lane_state(bench.lane).await.unwrap().look_ahead, 1);
    bench.beat("w", 1, &declare(&["l"], 9, vec![one])).await;
    let leases = bench.claim("w", 9, &["l"]).await;
    assert_eq!(leases.len(), 1);
    assert_eq!((bench.gate("k", A).await.in_flight, bench.gate("l", A).await.in_flight), (0, 1));
    // Neither has room for this worker, but the other's key has: its leaf must not be set aside.
    assert!(bench.claim("w", 9, &["l"]).await.is_empty());
    assert_eq!(bench.claim("v", 9, &["k"]).await.len(), 1);
    assert!(bench.claim("none", 9, &[]).await.is_empty());
}

#[tokio::test]
async fn a_lost_worker_and_a_cancelled_job_keep_no_permit() {
    let mut bench = Bench::new().await;
    let two = Limit { requests: Some(3), ..limit(A) };
    bench.beat("w", 2, &declare(&["k"], 9, vec![two])).await;
    let ids = bench.submit(A, 9).await;
    // Fed, not claimed: no call was made.
    bench.queue.cancel(bench.lane, &ids[..2]).await.unwrap();
    assert_eq!(bench.gate("k", A).await.in_flight, 0);
    let leases = bench.claim("w", 2, &["k"]).await;
    assert_eq!(leases.len(), 2);
    // Lost with its worker: its call may have been made.
    let held = [Holding { held: leases[0].held(), started: true }];
    let slots = Slots { capacity: 0, free: 0, tokens: None, declared: None };
    bench.queue.heartbeat(bench.lane, &worker("w"), slots, 0, &held).await.unwrap();
    bench.queue.reclaim(bench.lane, &Policy::default(), 0).await.unwrap();
    assert_eq!(bench.gate("k", A).await.in_flight, 1);
    bench.beat("v", 0, &declare(&["k"], 9, vec![Limit { requests: Some(3), ..limit(A) }])).await;
    assert_eq!(bench.claim("v", 9, &["k"]).await.len(), 1, "of three requests two are charged");
}

#[tokio::test]
async fn many_experiments_with_one_model_all_get_their_turns() {
    let mut bench = Bench::new().await;
    let one = Limit { concurrency: Some(1), ..limit(A) };
    bench.beat("w", 0, &declare(&["k"], 9, vec![one])).await;
    for experiment in 0..40 {
        bench.submit_of(A, 2, Some(&format!("e{experiment}"))).await;
    }
    let mut first_seen = Vec::new();
    for _ in 0..80 {
        let lease = bench.claim_soon("w", &["k"]).await;
        first_seen.push(lease.spec.experiment.clone().unwrap());
        assert!(bench.claim("w", 1, &["k"]).await.is_empty());
        bench.finish(&lease, "w", &answered()).await;
    }
    let distinct: BTreeSet<&Experiment> = first_seen[..40].iter().collect();
    assert!(distinct.len() > 36, "{first_seen:?}");
}

#[tokio::test]
async fn a_call_beside_a_job_has_a_permit_of_its_own_that_ends_by_itself() {
    let mut bench = Bench::new().await;
    let (model, keys) = (ModelName::parse(A).unwrap(), [key("k")]);
    let call = |name: &'static str, ttl_ms| SideCall { name, model: &model, tokens: 5, keys: &keys, ttl_ms };
    assert_eq!(bench.queue.permit(bench.lane, &call("early", 1)).await.unwrap(), Passage::Free);
    bench.beat("w", 0, &declare(&["k", "l"], 9, vec![Limit { concurrency: Some(2), ..limit(A) }])).await;
    let Passage::Permitted(permit) = bench.queue.permit(bench.lane, &call("one", 60_000)).await.unwrap() else {
        panic!("there is room");
    };
    assert_eq!(permit.key, key("k"));
    // The second one is lost with its caller.
    assert!(matches!(bench.queue.permit(bench.lane, &call("lost", 0)).await.unwrap(), Passage::Permitted(_)));
    // The other key is not the caller's.
    let held = Passage::Held { until: Opens::AfterCall, held_by: HeldBy::Calls };
    assert_eq!(bench.queue.permit(bench.lane, &call("two", 60_000)).await.unwrap(), held);
    assert_eq!(bench.gate("k", A).await.in_flight, 2);
    bench.queue.reclaim(bench.lane, &Policy::default(), 0).await.unwrap();
    assert_eq!(bench.gate("k", A).await.in_flight, 1);
    // What it tells counts, once.
    let told = Observation { signal: Signal::Throttled, retry_after_ms: Some(60_000), ..Observation::default() };
    for _ in 0..2 {
        bench.queue.settle(&permit, Some(&told)).await.unwrap();
        let gate = bench.gate("k", A).await;
        assert_eq!((gate.in_flight, gate.held_by), (0, Some(HeldBy::Throttled)));
    }
    bench.submit(A, 1).await;
    assert!(bench.claim("w", 1, &["k"]).await.is_empty());
}

/// What gates decide, as a script that is told what happens when.
const DRIVER: &str = r"
local limits = { requests = tonumber(ARGV[1]), tokens = tonumber(ARGV[2]), concurrency = tonumber(ARGV[3]) }
local gate, told = fresh(1000), {}
for index = 4, #ARGV, 3 do
  local now, what, tokens = tonumber(ARGV[index]), ARGV[index + 1], tonumber(ARGV[index + 2])
  if what == 'pass' then
    local at, why = opens(gate, limits, tokens, now)
    if at <= now then pass(gate, limits, tokens, now, 'j') end
    told[#told + 1] = why .. ':' .. (at < math.huge and string.format('%d', at) or '')
  elseif what == 'back' then
    take_back(gate, limits, 4, now, 'j')
  else
    ended(gate, limits, 4, now, 'j', now, { signal = 'given_up', used_tokens = tokens })
  end
end
return told";

/// The same in whole numbers: levels in parts of which a minute's worth flows in every millisecond.
struct Scalar {
    limits: [i64; 2],
    levels: [i64; 2],
    in_flight: i64,
    most: i64,
    at: i64,
}

const PARTS: i64 = 60_000;

impl Scalar {
    fn new(limits: [i64; 2], most: i64) -> Self {
        Self { limits, levels: limits.map(|limit| limit * PARTS), in_flight: 0, most, at: 0 }
    }

    fn advance(&mut self, now: i64) {
        for (level, limit) in self.levels.iter_mut().zip(self.limits) {
            *level = (*level + (now - self.at) * limit).min(limit * PARTS);
        }
        self.at = now;
    }

    fn pour(&mut self, amounts: [i64; 2]) {
        for ((level, limit), amount) in self.levels.iter_mut().zip(self.limits).zip(amounts) {
            *level = (*level + amount * PARTS).min(limit * PARTS);
        }
    }

    /// Why a job must wait, and until when.
    fn opens(&self, tokens: i64) -> (&'static str, Option<i64>) {
        if self.in_flight >= self.most {
            return ("calls", None);
        }
        let filled = |of: usize, size: i64| {
            let wanted = if size > self.limits[of] { self.limits[of] * PARTS / 2 } else { size * PARTS };
            let missing = wanted - self.levels[of];
            self.at + missing.max(0).div_euclid(self.limits[of]) + i64::from(missing.max(0) % self.limits[of] > 0)
        };
        let (requests, tokens) = (filled(0, 1), filled(1, tokens));
        match requests.max(tokens) {
            at if at <= self.at => ("", Some(at)),
            at if tokens > requests => ("tokens", Some(at)),
            at => ("requests", Some(at)),
        }
    }
}

#[test]
fn gates_decide_as_whole_numbers_do() {
    let redis = RedisServer::start().unwrap();
    let decisions = include_str!("../../crates/queue/src/scripts/gates.lua");
    for seed in 0..40 {
        let mut dice = Dice::new(seed);
        let mut roll = |sides: u64| i64::try_from(dice.roll(sides)).unwrap();
        let (limits, most) = ([1 + roll(50), 1 + roll(400)], 1 + roll(6));
        let mut scalar = Scalar::new(limits, most);
        let mut script = redis::cmd("EVAL");
        script.arg(format!("{decisions}{DRIVER}")).arg(0).arg(limits[0]).arg(limits[1]).arg(most);
        let (mut expected, mut at) = (Vec::new(), 0);
        for _ in 0..300 {
            at += roll(4) * roll(3_000);
            scalar.advance(at);
            let (what, tokens) = match roll(3) {
                0 | 1 => ("pass", 1 + roll(500)),
                _ if scalar.in_flight == 0 => continue,
                _ => (if roll(2) == 0 { "back" } else { "end" }, roll(8)),
            };
            script.arg(at).arg(what).arg(tokens);
            match what {
                "pass" => {
                    let (why, opens) = scalar.opens(tokens);
                    expected.push((why, opens));
                    if why.is_empty() {
                        scalar.in_flight += 1;
                        scalar.pour([-1, -tokens]);
                    }
                }
                "back" => {
                    scalar.in_flight -= 1;
                    scalar.pour([1, 4]);
                }
                _ => {
                    scalar.in_flight -= 1;
                    scalar.pour([0, 4 - tokens]);
                }
            }
        }
        let told: Vec<String> = ask(&redis, &script).unwrap();
        assert_eq!(told.len(), expected.len());
        for (step, (told, (why, opens))) in told.iter().zip(expected).enumerate() {
            let (said, at) = told.split_once(':').unwrap();
            assert_eq!(said, why, "seed {seed}, decision {step}");
            // Fractions are rounded up, at most by one millisecond too many.
            let off = opens.map(|opens| at.parse::<i64>().unwrap() - opens);
            assert!(
                off.is_none_or(|off| (-1..=1).contains(&off)),
                "seed {seed}, decision {step}: {told} for {opens:?}"
            );
        }
    }
}
