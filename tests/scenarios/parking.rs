//! Batches in the queue: jobs leave their leases for a record that has a lease of its own, and end from there.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::attempt::{AttemptEnd, FinishReason, Generation};
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_core::job::JobSpec;
use genmill_core::judge::{Policy, Verdict};
use genmill_core::model::ModelName;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::state::State;
use genmill_core::time::UnixMs;
use genmill_queue::{
    Advance, BatchRecord, BatchState, Ended, Finish, Held, Kept, Lease, Member, Moved, NewJob, Options, Parking, Queue,
    Room,
};
use genmill_tests::redis_server::RedisServer;
use genmill_tests::specs::{now, plain, worker};
use std::time::Duration;

const LEASE_MS: u64 = 60_000;
const TAG: &str = "tag";

struct Bench {
    _redis: RedisServer,
    queue: Queue,
    lane: LaneNumber,
    next: u64,
}

fn spec() -> JobSpec {
    JobSpec { batch: true, ..plain(ModelName::parse("litellm_gpt-4o").unwrap()) }
}

fn done() -> Finish {
    let generation = Generation::new("text".to_owned(), FinishReason::Stop);
    Finish { verdict: Verdict::Succeed(generation), cost: Some(Cost::exact(Picodollars(7))), observation: None }
}

impl Bench {
    async fn new() -> Self {
        let redis = RedisServer::start().unwrap();
        let options = Options { url: redis.url(), namespace: "test".to_owned() };
        let queue = Queue::connect(&options).await.unwrap();
        let lane = queue.open_lane(&spec().lane()).await.unwrap();
        Self { _redis: redis, queue, lane, next: 0 }
    }

    async fn submit(&mut self, spec: JobSpec) -> JobId {
        self.next += 1;
        let id = JobId::new(now(), self.lane, self.next << 32);
        self.queue.enqueue(&spec.lane(), &[NewJob { id, spec }]).await.unwrap();
        id
    }

    async fn claim(&self, name: &str) -> Vec<Lease> {
        let room = Room { free: 100, tokens: None, keys: &[] };
        self.queue.claim(self.lane, &worker(name), room, LEASE_MS).await.unwrap()
    }

    async fn park(&self, name: &str, lease_ms: u64, leases: &[Lease]) -> Option<Vec<bool>> {
        let model = spec().model;
        let parking = Parking { tag: TAG, model: &model, key: None, lease_ms, fill_ms: 1_000 };
        let held: Vec<Held> = leases.iter().map(Lease::held).collect();
        self.queue.park(self.lane, &worker(name), parking, &held).await.unwrap()
    }

    /// Two jobs in a batch that `w` holds for so long.
    async fn parked(lease_ms: u64) -> (Self, [JobId; 2]) {
        let mut bench = Self::new().await;
        let ids = [bench.submit(spec()).await, bench.submit(spec()).await];
        let leases = bench.claim("w").await;
        assert_eq!(bench.park("w", lease_ms, &leases).await, Some(vec![true, true]));
        (bench, ids)
    }

    async fn members(&self) -> Vec<Member> {
        let members = self.queue.batch_members(self.lane, TAG).await.unwrap();
        assert!(members.damaged.is_empty());
        members.jobs
    }

    async fn hold(&self, name: &str, held: &[(&str, Epoch)]) -> (Vec<Option<u64>>, Vec<BatchRecord>) {
        self.queue.hold_batches(self.lane, &worker(name), LEASE_MS, 9, held).await.unwrap()
    }

    async fn advance(&self, name: &str, epoch: u32, advance: Advance<'_>) -> Moved {
        let batch = (TAG, Epoch(epoch));
        self.queue.advance_batch(self.lane, &worker(name), batch, 0, advance).await.unwrap()
    }

    async fn part(&self, name: &str, epoch: u32, part: &str, after_ms: u64, jobs: &[Held]) -> Moved {
        let batch = (TAG, Epoch(epoch));
        self.queue.part_batch(self.lane, &worker(name), batch, (part, after_ms), jobs).await.unwrap()
    }

    async fn close(&self, name: &str, epoch: u32) -> Moved {
        self.queue.close_batch(self.lane, &worker(name), (TAG, Epoch(epoch))).await.unwrap()
    }

    async fn finish(&self, member: &Member, finish: &Finish) -> Kept {
        let ended = Ended { held: member.held, started_at: member.started_at, finish };
        self.queue.finish(self.lane, &WorkerId::of_batch(TAG), &[ended]).await.unwrap()[0]
    }

    async fn states(&self, ids: &[JobId]) -> Vec<State> {
        self.queue.states(ids).await.unwrap().into_iter().map(Option::unwrap).collect()
    }

    async fn running(&self) -> (u64, u64) {
        let state = self.queue.lane_state(self.lane).await.unwrap();
        (state.queued, state.running)
    }
}

#[tokio::test]
async fn parked_jobs_run_on_without_a_lease_and_end_from_their_batch() {
    let (bench, ids) = Bench::parked(LEASE_MS).await;
    bench.queue.reclaim(bench.lane, &Policy::default(), 0).await.unwrap();
    assert_eq!(bench.states(&ids).await, [State::Running, State::Running]);
    assert_eq!(bench.running().await, (0, 2));
    let job = bench.queue.get(ids[0]).await.unwrap();
    assert_eq!((job.worker, job.losses), (Some(WorkerId::of_batch(TAG)), 0));
    let members = bench.members().await;
    assert!(members.iter().all(|member| member.wanted && member.spec == spec() && member.held.epoch == Epoch(1)));
    // Whoever held the leases has nothing to say any more.
    let old = Ended { held: members[0].held, started_at: members[0].started_at, finish: &done() };
    assert_eq!(bench.queue.finish(bench.lane, &worker("w"), &[old]).await.unwrap(), [Kept::LeaseLost]);
    assert_eq!(bench.finish(&members[0], &done()).await, Kept::Kept);
    assert_eq!(bench.finish(&members[0], &done()).await, Kept::Kept, "it may be said again");
    assert_eq!(bench.states(&ids).await, [State::Succeeded, State::Running]);
    assert_eq!(bench.close("w", 1).await, Moved::NotDone);
    // What is missing goes back to its place.
    let missing = bench.members().await;
    assert_eq!(missing.len(), 1);
    let hand_back = Finish { verdict: Verdict::HandBack, cost: Some(Cost::NOTHING), observation: None };
    assert_eq!(bench.finish(&missing[0], &hand_back).await, Kept::Kept);
    assert_eq!(bench.running().await, (1, 0));
    assert_eq!((bench.close("w", 1).await, bench.close("w", 1).await), (Moved::On, Moved::On));
    assert!(bench.queue.batches(bench.lane).await.unwrap().is_empty());
    let again = bench.claim("w").await;
    assert_eq!((again[0].id, again[0].epoch, again[0].failures), (ids[1], Epoch(2), 0));
}

#[tokio::test]
async fn one_that_was_cancelled_or_has_expired_ends_at_once_and_what_it_cost_is_booked_later() {
    let mut bench = Bench::new().await;
    let cancelled = bench.submit(spec()).await;
    let late = bench.submit(JobSpec { deadline: Some(UnixMs(now().0 + 300)), ..spec() }).await;
    let leases = bench.claim("w").await;
    bench.park("w", LEASE_MS, &leases).await.unwrap();
    bench.queue.cancel(bench.lane, &[cancelled]).await.unwrap();
    assert_eq!(bench.states(&[cancelled]).await, [State::Cancelled]);
    for _ in 0..200 {
        bench.queue.expire(bench.lane).await.unwrap();
        if bench.states(&[late]).await == [State::Expired] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(bench.states(&[late]).await, [State::Expired]);
    assert_eq!(bench.hold("w", &[(TAG, Epoch(1))]).await.0, [Some(0)]);
    let members = bench.members().await;
    assert!(members.len() == 2 && members.iter().all(|member| !member.wanted));
    for member in &members {
        assert_eq!(bench.finish(member, &done()).await, Kept::LeaseLost);
        assert_eq!(bench.finish(member, &done()).await, Kept::LeaseLost);
        let job = bench.queue.get(member.held.id).await.unwrap();
        assert_eq!(job.attempts.iter().map(|attempt| attempt.end).collect::<Vec<_>>(), [AttemptEnd::Fenced]);
        assert_eq!((job.cost(), job.generation), (Some(Cost::exact(Picodollars(7))), None));
    }
    assert_eq!(bench.close("w", 1).await, Moved::On);
    assert_eq!(bench.running().await, (0, 0));
}

#[tokio::test]
async fn a_batch_that_nobody_holds_is_taken_over_as_it_was_left() {
    let (bench, ids) = Bench::parked(0).await;
    assert_eq!(bench.advance("w", 1, Advance::Submitting { items: 2, without: &[] }).await, Moved::On);
    let (_, taken) = bench.hold("other", &[]).await;
    let [batch] = &taken[..] else { panic!("{taken:?}") };
    assert_eq!((batch.tag.as_str(), batch.epoch, batch.state), (TAG, Epoch(2), BatchState::Intent));
    assert!(
        batch.tried
            && batch.items == Some(2)
            && batch.remote.is_none()
            && batch.jobs == 2
            && batch.model == spec().model
    );
    // The one before cannot say anything any more.
    assert_eq!(bench.hold("w", &[(TAG, Epoch(1))]).await, (vec![None], vec![]));
    assert_eq!(bench.advance("w", 1, Advance::Submitted("its")).await, Moved::Lost);
    assert_eq!(bench.close("w", 1).await, Moved::Lost);
    assert_eq!(bench.advance("other", 2, Advance::Submitted("mine")).await, Moved::On);
    let batches = bench.queue.batches(bench.lane).await.unwrap();
    assert_eq!((batches[0].state, batches[0].remote.as_deref()), (BatchState::Submitted, Some("mine")));
    assert!(!batches[0].tried);
    // Let go, it is anybody's at once.
    bench.queue.hold_batches(bench.lane, &worker("other"), 0, 0, &[(TAG, Epoch(2))]).await.unwrap();
    assert_eq!(bench.hold("third", &[]).await.1[0].epoch, Epoch(3));
    assert_eq!(bench.states(&ids).await, [State::Running, State::Running]);
}

#[tokio::test]
async fn a_batch_that_is_being_submitted_takes_no_more_jobs() {
    let (mut bench, _) = Bench::parked(LEASE_MS).await;
    let id = bench.submit(spec()).await;
    let leases = bench.claim("w").await;
    assert_eq!(bench.park("other", LEASE_MS, &leases).await, None, "it is not theirs");
    assert_eq!(bench.advance("w", 1, Advance::Submitting { items: 2, without: &[] }).await, Moved::On);
    assert_eq!(bench.park("w", LEASE_MS, &leases).await, None);
    // Nor does one that surely was not submitted: what it is made of may be with its provider already.
    assert_eq!(bench.advance("w", 1, Advance::Full).await, Moved::On);
    assert_eq!(bench.park("w", LEASE_MS, &leases).await, None);
    let batches = bench.queue.batches(bench.lane).await.unwrap();
    assert_eq!((batches[0].full, batches[0].tried, bench.members().await.len()), (true, false, 2));
    assert_eq!(bench.states(&[id]).await, [State::Running]);
}

#[tokio::test]
async fn jobs_go_into_a_batch_that_is_filled_as_often_as_it_is_said() {
    let (mut bench, _) = Bench::parked(LEASE_MS).await;
    bench.submit(spec()).await;
    let leases = bench.claim("w").await;
    assert_eq!(bench.park("w", LEASE_MS, &leases).await, Some(vec![true]));
    assert_eq!(bench.park("w", LEASE_MS, &leases).await, Some(vec![true]), "it may be said again");
    assert_eq!(bench.members().await.len(), 3);
    assert_eq!(bench.hold("w", &[(TAG, Epoch(1))]).await.0, [Some(3)]);
}

#[tokio::test]
async fn a_job_that_was_cancelled_while_it_was_claimed_does_not_go_into_a_batch() {
    let mut bench = Bench::new().await;
    let id = bench.submit(spec()).await;
    let leases = bench.claim("w").await;
    bench.queue.cancel(bench.lane, &[id]).await.unwrap();
    assert_eq!(bench.park("w", LEASE_MS, &leases).await, Some(vec![true]));
    assert_eq!(bench.states(&[id]).await, [State::Cancelled]);
    assert!(bench.members().await.is_empty());
    assert_eq!((bench.running().await, bench.close("w", 1).await), ((0, 0), Moved::On));
}

#[tokio::test]
async fn a_job_that_was_cancelled_before_is_not_in_what_is_submitted() {
    let (bench, ids) = Bench::parked(LEASE_MS).await;
    bench.queue.cancel(bench.lane, &ids[..1]).await.unwrap();
    let cancelled = bench.members().await.into_iter().find(|member| !member.wanted).unwrap();
    for _ in 0..2 {
        assert_eq!(
            bench.advance("w", 1, Advance::Submitting { items: 2, without: &[cancelled.held] }).await,
            Moved::On
        );
        assert_eq!(bench.members().await.iter().map(|member| member.held.id).collect::<Vec<_>>(), ids[1..]);
    }
}

#[tokio::test]
async fn every_step_that_is_written_down_renews_the_hold() {
    let (bench, _) = Bench::parked(0).await;
    let batch = (TAG, Epoch(1));
    let advanced = bench
        .queue
        .advance_batch(bench.lane, &worker("w"), batch, LEASE_MS, Advance::Submitting { items: 2, without: &[] })
        .await;
    assert_eq!(advanced.unwrap(), Moved::On);
    assert!(bench.hold("other", &[]).await.1.is_empty());
    assert_eq!(bench.advance("w", 1, Advance::Submitted("its")).await, Moved::On);
    assert_eq!(bench.hold("other", &[]).await.1[0].remote.as_deref(), Some("its"));
}

#[tokio::test]
async fn a_batch_is_not_cleared_while_jobs_of_it_are_wanted() {
    let (bench, _) = Bench::parked(LEASE_MS).await;
    bench.advance("w", 1, Advance::Submitted("its")).await;
    bench.advance("w", 1, Advance::Collecting).await;
    assert_eq!(bench.advance("w", 1, Advance::Clearing).await, Moved::NotDone);
    for member in bench.members().await {
        bench.finish(&member, &done()).await;
    }
    assert_eq!(bench.advance("other", 1, Advance::Clearing).await, Moved::Lost);
    assert_eq!(bench.advance("w", 1, Advance::Clearing).await, Moved::On);
    let batches = bench.queue.batches(bench.lane).await.unwrap();
    assert_eq!((batches[0].state, batches[0].remote.as_deref()), (BatchState::Clearing, Some("its")));
    assert_eq!(bench.close("w", 1).await, Moved::On);
}

#[tokio::test]
async fn jobs_that_are_parted_from_a_batch_go_on_in_another_one() {
    let (bench, ids) = Bench::parked(LEASE_MS).await;
    let held: Vec<Held> = bench.members().await.iter().map(|member| member.held).collect();
    assert_eq!(bench.part("other", 1, "part", 0, &held).await, Moved::Lost);
    for _ in 0..2 {
        // It may be said again.
        assert_eq!(bench.part("w", 1, "part", 0, &held[1..]).await, Moved::On);
        assert_eq!(bench.members().await.iter().map(|member| member.held).collect::<Vec<_>>(), held[..1]);
    }
    assert_eq!(bench.hold("w", &[(TAG, Epoch(1))]).await.0, [Some(1)]);
    let batches = bench.queue.batches(bench.lane).await.unwrap();
    let part = batches.iter().find(|batch| batch.tag == "part").unwrap();
    assert_eq!((part.epoch, part.state, part.jobs), (Epoch(1), BatchState::Intent, 1), "whoever looks has it");
    assert!(part.full && !part.tried && part.remote.is_none() && part.model == spec().model);
    // Said again now, it takes nothing from whoever has it.
    assert_eq!(bench.part("w", 1, "part", 0, &held[1..]).await, Moved::On);
    let part = ("part", Epoch(1));
    assert_eq!(bench.hold("w", &[part]).await.0, [Some(1)]);
    // Its job ends from there and nowhere else.
    let member = bench.queue.batch_members(bench.lane, "part").await.unwrap().jobs.remove(0);
    assert_eq!((member.held, member.wanted), (held[1], true));
    assert_eq!(bench.finish(&member, &done()).await, Kept::LeaseLost);
    let ended = Ended { held: member.held, started_at: member.started_at, finish: &done() };
    let kept = bench.queue.finish(bench.lane, &WorkerId::of_batch("part"), &[ended]).await.unwrap();
    assert_eq!((kept, bench.states(&ids).await[1]), (vec![Kept::Kept], State::Succeeded));
    assert_eq!(bench.queue.close_batch(bench.lane, &worker("w"), part).await.unwrap(), Moved::On);
    assert_eq!(bench.running().await, (0, 1));
    // One that is to wait is nobody's until then.
    assert_eq!(bench.part("w", 1, "later", LEASE_MS, &held[..1]).await, Moved::On);
    assert_eq!((bench.close("w", 1).await, bench.hold("w", &[]).await.1), (Moved::On, vec![]));
    bench.queue.cancel(bench.lane, &ids[..1]).await.unwrap();
    assert_eq!((bench.states(&ids).await[0], bench.running().await), (State::Cancelled, (0, 0)));
}
