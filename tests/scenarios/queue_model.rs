//! Random commands against the scripts on a real Redis, and against a small model in memory: both must always agree. On
//! a single server and on a cluster of three, in several lanes at once, so that every node of a cluster has some.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use genmill_core::attempt::{AttemptEnd, Failure, FailureClass, FinishReason, Generation};
use genmill_core::gate::{Covered, Declaration, KeyId, Limit, Observation, Signal};
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_core::job::JobSpec;
use genmill_core::judge::{Policy, Verdict};
use genmill_core::model::ModelName;
use genmill_core::money::{Cost, Picodollars};
use genmill_core::names::{Experiment, Tenant};
use genmill_core::prefix::PrefixKey;
use genmill_core::request::Priority;
use genmill_core::state::{Event, State, transition};
use genmill_core::time::UnixMs;
use genmill_queue::{
    Beat, Booked, ContentHash, Ended, Finish, Held, Holding, Kept, Lease, ListQuery, Moved, NewJob, Options, Parking,
    Purge, Queue, Redrive, Redriven, RequestId, Reservation, Room, Setting, Slots, Which,
};
use genmill_tests::dice::Dice;
use genmill_tests::redis_cluster::{Redis, RedisCluster, ask};
use genmill_tests::redis_server::RedisServer;
use genmill_tests::specs::plain;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const SEEDS: u64 = 20;
const COMMANDS: u64 = 300;
/// Their numbers, and so their slots, are given in this order: the first, third and fourth are on different nodes.
const MODELS: [&str; 4] = ["vllm_a", "vllm_b", "vllm_c", "litellm_d"];
const LEASE_MS: u64 = 3_600_000;
const WORKERS: [&str; 3] = ["a", "b", "c"];
/// The keys of these workers, in lanes that have gates.
const KEYS: [&[&str]; 3] = [&["k"], &["k", "l"], &["l"]];
/// Two models of one lane: calls at once with a key for each of them, and for both.
const GATED: [&str; 2] = ["litellm_d", "litellm_e"];
const CALLS_MAX: (u64, u64) = (3, 5);
const TENANTS: [&str; 3] = ["x", "y", "z"];
const REQUEST_IDS: [&str; 3] = ["r", "s", "t"];

/// What the model knows of a job.
#[derive(Clone, Debug)]
struct Known {
    state: State,
    tenant: Tenant,
    experiment: Option<Experiment>,
    /// Its time is far away.
    parked: bool,
    epoch: u32,
    failures: u32,
    losses: u32,
    cancel_asked: bool,
    overdue: bool,
    ends: Vec<AttemptEnd>,
    /// Epochs whose verdicts were kept, and those that were fenced.
    kept: BTreeSet<u32>,
    fenced: BTreeSet<u32>,
    redriven_as: Option<JobId>,
    /// The worker whose batch it is in.
    batch: Option<&'static str>,
}

impl Known {
    fn happens(&mut self, event: Event) {
        self.state = transition(self.state, event).unwrap();
        self.batch = None;
    }

    /// A job that was cancelled or is overdue does not wait again.
    fn ends_instead_of_waiting(&mut self) {
        if self.cancel_asked {
            self.state = State::Cancelled;
        } else if self.overdue {
            self.state = State::Expired;
        }
    }
}

struct Run {
    queue: Queue,
    model: ModelName,
    lane: LaneNumber,
    dice: Dice,
    jobs: BTreeMap<JobId, Known>,
    /// Every lease that was ever given, with its worker.
    leases: Vec<(Lease, WorkerId)>,
    /// What is paused and capped now, shared by the runs of all lanes.
    settings: Rc<RefCell<BTreeMap<Setting, u64>>>,
    /// Jobs that finished and were purged.
    purged: usize,
    /// Where gates are: the workers that live, as far as anybody told.
    gated: Option<BTreeSet<&'static str>>,
    redis: Rc<Redis>,
    namespace: String,
}

/// What a worker has declared where gates are.
fn declared(name: &str) -> Declaration {
    let limit = |model: &str, most: u64| Limit {
        model: model.to_owned(),
        concurrency: Some(u32::try_from(most).unwrap()),
        ..Limit::default()
    };
    let limits = vec![limit(GATED[0], CALLS_MAX.0), limit(GATED[1], CALLS_MAX.0), limit("", CALLS_MAX.1)];
    Declaration { keys: keys_of(name), start: 20, limits, covered: Covered::default() }
}

fn keys_of(name: &str) -> Vec<KeyId> {
    let at = WORKERS.iter().position(|worker| *worker == name).unwrap();
    KEYS[at].iter().map(|key| KeyId::from_stored((*key).to_owned())).collect()
}

fn spec(dice: &mut Dice, model: &ModelName) -> JobSpec {
    JobSpec {
        tenant: Tenant::parse(dice.pick(&TENANTS).unwrap()).unwrap(),
        experiment: (dice.roll(2) == 0).then(|| Experiment::parse("e").unwrap()),
        priority: *dice.pick(&[Priority::Interactive, Priority::Normal, Priority::Bulk]).unwrap(),
        deadline: (dice.roll(6) == 0).then_some(UnixMs(1)),
        not_before: (dice.roll(6) == 0).then_some(UnixMs(u64::MAX / 4096)),
        prefix: (dice.roll(2) == 0).then(|| PrefixKey(dice.roll(2) << 32)),
        ..plain(model.clone())
    }
}

impl Run {
    async fn command(&mut self) {
        match self.dice.roll(15) {
            0 | 1 => self.submit().await,
            2 | 3 => self.claim().await,
            4 | 5 => self.finish().await,
            6 => self.cancel().await,
            7 => self.lose().await,
            8 => self.set().await,
            9 if self.dice.roll(4) == 0 => self.purge().await,
            10 => self.beat().await,
            11 => self.redrive().await,
            12 => self.leave().await,
            13 => self.park().await,
            _ => self.upkeep().await,
        }
    }

    async fn submit(&mut self) {
        let mut jobs = Vec::new();
        for _ in 0..=self.dice.roll(4) {
            let model = if self.gated.is_some() { self.dice.pick(&GATED).unwrap() } else { self.model.as_str() };
            let model = ModelName::parse(model).unwrap();
            let spec = spec(&mut self.dice, &model);
            let id = JobId::new(UnixMs(1), self.lane, self.dice.roll(u64::MAX));
            let overdue = spec.deadline.is_some();
            let known = Known {
                state: if spec.not_before.is_some() { State::Delayed } else { State::Queued },
                tenant: spec.tenant.clone(),
                experiment: spec.experiment.clone(),
                parked: spec.not_before.is_some(),
                epoch: 0,
                failures: 0,
                losses: 0,
                cancel_asked: false,
                overdue,
                ends: Vec::new(),
                kept: BTreeSet::new(),
                fenced: BTreeSet::new(),
                redriven_as: None,
                batch: None,
            };
            self.jobs.insert(id, known);
            jobs.push(NewJob { id, spec });
        }
        for _ in 0..=self.dice.roll(2) {
            self.queue.enqueue(&jobs[0].spec.model.lane(), &jobs).await.unwrap();
        }
    }

    async fn claim(&mut self) {
        let name = *self.dice.pick(&WORKERS).unwrap();
        let worker = WorkerId::from_stored(name.to_owned());
        let free = u32::try_from(1 + self.dice.roll(4)).unwrap();
        let tokens = (self.dice.roll(3) == 0).then(|| self.dice.roll(20));
        let keys = if self.gated.is_some() { keys_of(name) } else { Vec::new() };
        let room = Room { free, tokens, keys: &keys };
        let claimed = self.queue.claim(self.lane, &worker, room, LEASE_MS).await.unwrap();
        let may_start = self.may_start().min(u64::from(free));
        let taken: Vec<u64> = claimed.iter().map(|lease| lease.spec.estimated_tokens()).collect();
        let is_full = |taken: &[u64]| tokens.is_some_and(|tokens| taken.iter().sum::<u64>() >= tokens);
        assert!(!taken.split_last().is_some_and(|(_, before)| is_full(before)), "{taken:?} for {tokens:?} tokens");
        if !is_full(&taken) {
            let filled = u64::try_from(claimed.len()).unwrap() == may_start;
            assert!(filled || self.gates_are_shut(name).await, "all places are filled while jobs wait: {claimed:?}");
        }
        let with_own = |lease: &Lease| lease.key.as_ref().is_none_or(|key| keys.contains(key));
        assert!(claimed.iter().all(with_own), "{claimed:?}");
        for lease in claimed {
            let job = self.jobs.get_mut(&lease.id).unwrap();
            job.happens(Event::Claim);
            job.epoch += 1;
            assert_eq!((lease.epoch.0, lease.failures), (job.epoch, job.failures));
            self.leases.push((lease, worker.clone()));
        }
        if self.dice.roll(2) == 0 {
            let declared = self.lives(name);
            let slots = Slots { capacity: free, free: 0, tokens: None, declared: declared.as_ref() };
            self.queue.heartbeat(self.lane, &worker, slots, LEASE_MS, &[]).await.unwrap();
        }
    }

    /// What a worker declares when it tells what it has.
    fn lives(&mut self, name: &'static str) -> Option<Declaration> {
        let living = self.gated.as_mut()?;
        living.insert(name);
        Some(declared(name))
    }

    fn dies(&mut self, name: &str) {
        if let Some(living) = &mut self.gated {
            living.remove(name);
        }
    }

    /// Whether gates explain that a worker got less than waits: there is a model for which all of its keys are used up,
    /// or others live, and it did not tell that it does.
    async fn gates_are_shut(&self, worker: &str) -> bool {
        let Some(living) = &self.gated else { return false };
        let known: BTreeSet<KeyId> = living.iter().flat_map(|name| keys_of(name)).collect();
        let gates = self.queue.gates(self.lane).await.unwrap().gates;
        let used = |key: &KeyId, model: &str| {
            gates.iter().find(|gate| gate.key == *key && gate.model == model).map_or(0, |gate| gate.in_flight)
        };
        let is_shut = |key: &KeyId, model: &str| used(key, model) == CALLS_MAX.0 || used(key, "") == CALLS_MAX.1;
        let mine: Vec<KeyId> = keys_of(worker).into_iter().filter(|key| known.contains(key)).collect();
        !known.is_empty() && GATED.iter().any(|model| mine.iter().all(|key| is_shut(key, model)))
    }

    /// Each gate counts the jobs that hold its permit, and no job holds one that is neither delivered nor runs.
    async fn compare_permits(&self) {
        if self.gated.is_none() {
            return;
        }
        let mut holders: BTreeMap<(String, String), u64> = BTreeMap::new();
        let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
        let jobs = self.queue.get_many(&jobs).await.unwrap();
        for node in self.redis.nodes() {
            for job in &jobs {
                let mut held = redis::cmd("HGET");
                let prefix = format!("{}:{{{}}}:j:", self.namespace, self.lane.0);
                held.arg([prefix.as_bytes(), job.id.as_bytes().as_slice()].concat()).arg("pm");
                // Of a cluster, only one node has it.
                let Ok(Some(permit)) = ask::<Option<String>>(node, &held) else { continue };
                assert!(matches!(job.state, State::Queued | State::Running), "{} holds {permit}", job.id);
                let key = permit.trim_end_matches('+').to_owned();
                *holders.entry((key.clone(), job.spec.model.as_str().to_owned())).or_default() += 1;
                *holders.entry((key, String::new())).or_default() += 1;
                assert!(permit.ends_with('+'));
            }
        }
        let gates = self.queue.gates(self.lane).await.unwrap().gates;
        let counted = gates.into_iter().map(|gate| ((gate.key.as_str().to_owned(), gate.model), gate.in_flight));
        let counted: BTreeMap<(String, String), u64> = counted.filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, holders);
        assert!(
            counted
                .iter()
                .all(|((_, model), count)| { *count <= if model.is_empty() { CALLS_MAX.1 } else { CALLS_MAX.0 } })
        );
    }

    /// How many jobs may start, by what is paused and capped.
    fn may_start(&self) -> u64 {
        let set = |setting: Setting| self.settings.borrow().get(&setting).copied();
        if set(Setting::PauseLane(self.lane)).is_some() {
            return 0;
        }
        let in_state = |tenant: &Tenant, wanted: State, experiments: bool| {
            let paused = |name: &Experiment| set(Setting::PauseExperiment(name.clone())).is_some();
            let counts = |job: &&Known| {
                job.tenant == *tenant
                    && job.batch.is_none()
                    && job.state == wanted
                    && (experiments || !job.experiment.as_ref().is_some_and(paused))
            };
            u64::try_from(self.jobs.values().filter(counts).count()).unwrap()
        };
        let of = |name: &str| {
            let tenant = Tenant::parse(name).unwrap();
            let running = in_state(&tenant, State::Running, true);
            let cap = set(Setting::TenantCap(tenant.clone())).unwrap_or(u64::MAX);
            let paused = set(Setting::PauseTenant(tenant.clone())).is_some();
            let queued = if paused { 0 } else { in_state(&tenant, State::Queued, false) };
            (queued.min(cap.saturating_sub(running)), running)
        };
        let (waiting, running) = TENANTS.iter().map(|name| of(name)).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        waiting.min(set(Setting::LaneCap(self.lane)).unwrap_or(u64::MAX).saturating_sub(running))
    }

    async fn set(&mut self) {
        let tenant = Tenant::parse(self.dice.pick(&TENANTS).unwrap()).unwrap();
        let setting = match self.dice.roll(6) {
            0 => Setting::PauseLane(self.lane),
            1 => Setting::PauseTenant(tenant),
            2 => Setting::PauseExperiment(Experiment::parse("e").unwrap()),
            3 => Setting::LaneCap(self.lane),
            4 => Setting::TenantWeight(tenant),
            _ => Setting::TenantCap(tenant),
        };
        let value = (self.dice.roll(2) == 0).then(|| 1 + self.dice.roll(5));
        self.queue.set(&setting, value).await.unwrap();
        match value {
            Some(value) => drop(self.settings.borrow_mut().insert(setting, value)),
            None => drop(self.settings.borrow_mut().remove(&setting)),
        }
    }

    async fn purge(&mut self) {
        let query = ListQuery { lanes: &[self.lane], which: Which::All, before: None, limit: 1_000 };
        let listed = self.queue.list(query).await.unwrap();
        assert_eq!(listed.len(), self.jobs.len(), "every job is listed once");
        let before = self.jobs.len();
        self.jobs.retain(|_, job| !job.state.is_final());
        let purged = before - self.jobs.len();
        let ids: Vec<JobId> = listed.iter().map(|job| job.id).collect();
        let heads = self.queue.heads(&ids).await.unwrap();
        let jobs: Vec<Purge<'_>> =
            listed.iter().zip(&heads).map(|(listed, head)| Purge { place: listed.place, head }).collect();
        assert_eq!(self.queue.purge(&jobs).await.unwrap(), u64::try_from(purged).unwrap());
        assert_eq!(self.queue.purge(&jobs).await.unwrap(), 0);
        self.purged += purged;
        self.leases.retain(|(lease, _)| self.jobs.contains_key(&lease.id));
    }

    /// A worker renews all that it thinks it holds, and says what it has free.
    async fn beat(&mut self) {
        let name = *self.dice.pick(&WORKERS).unwrap();
        let worker = WorkerId::from_stored(name.to_owned());
        let (free, tokens) = (u32::try_from(self.dice.roll(3)).unwrap(), (self.dice.roll(3) == 0).then_some(100));
        let declared = self.lives(name);
        let slots = Slots { capacity: 4, free, tokens, declared: declared.as_ref() };
        let mine = self.leases.iter().filter(|(_, holder)| *holder == worker);
        let held: Vec<(Lease, bool)> = mine.map(|(lease, _)| (lease.clone(), self.dice.roll(2) == 0)).collect();
        let holdings: Vec<Holding> =
            held.iter().map(|(lease, started)| Holding { held: lease.held(), started: *started }).collect();
        let told = self.queue.heartbeat(self.lane, &worker, slots, LEASE_MS, &holdings).await.unwrap();
        for ((lease, started), beat) in held.iter().zip(told) {
            let job = &self.jobs[&lease.id];
            let expected = match (self.holds(lease), job.cancel_asked, job.overdue) {
                (false, ..) => Beat::Lost,
                (true, true, _) => Beat::Cancel,
                (true, false, true) => Beat::DeadlinePassed,
                (true, false, false) if !*started && beat == Beat::HandBack => Beat::HandBack,
                (true, false, false) => Beat::Ok,
            };
            assert_eq!(beat, expected);
        }
    }

    /// A worker moves some of its leases into its batch, or ends that.
    async fn park(&mut self) {
        let name = *self.dice.pick(&WORKERS).unwrap();
        let worker = WorkerId::from_stored(name.to_owned());
        if self.dice.roll(3) == 0 {
            let filled = self.jobs.values().any(|job| job.batch == Some(name));
            let closed = self.queue.close_batch(self.lane, &worker, (name, Epoch(1))).await.unwrap();
            assert_eq!(closed, if filled { Moved::NotDone } else { Moved::On });
            return;
        }
        let mine = self.leases.iter().filter(|(_, holder)| *holder == worker);
        let mine: Vec<Held> = mine.map(|(lease, _)| lease.held()).filter(|_| self.dice.roll(2) == 0).collect();
        let model = self.model.clone();
        let parking = Parking { tag: name, model: &model, key: None, lease_ms: LEASE_MS, fill_ms: 1 };
        let parked = self.queue.park(self.lane, &worker, parking, &mine).await.unwrap().unwrap();
        for (held, parked) in mine.iter().zip(parked) {
            let job = self.jobs.get_mut(&held.id).unwrap();
            let holds = job.state == State::Running && job.epoch == held.epoch.0 && job.batch.is_none();
            assert_eq!(parked, holds || job.batch == Some(name), "{}", held.id);
            match (holds, job.cancel_asked, job.overdue) {
                (false, ..) => continue,
                (true, true, _) => job.happens(Event::Cancel),
                (true, false, true) => job.happens(Event::Expire),
                (true, false, false) => job.batch = Some(name),
            }
            for (lease, holder) in self.leases.iter_mut().filter(|(lease, _)| lease.held() == *held) {
                assert_eq!(lease.id, held.id);
                *holder = WorkerId::of_batch(name);
            }
        }
        let found = self.queue.batch_members(self.lane, name).await.unwrap().jobs;
        let found: BTreeSet<JobId> = found.iter().filter(|member| member.wanted).map(|member| member.held.id).collect();
        let known = self.jobs.iter().filter(|(_, job)| job.batch == Some(name)).map(|(id, _)| *id);
        assert_eq!(found, known.collect());
    }

    async fn redrive(&mut self) {
        let ids: Vec<JobId> = self.jobs.keys().copied().collect();
        let Some(from) = self.dice.pick(&ids).copied() else { return };
        let to = JobId::new(UnixMs(1), self.lane, self.dice.roll(u64::MAX));
        let told = self.queue.redrive(self.lane, &[Redrive { from, to }]).await.unwrap();
        let job = self.jobs.get_mut(&from).unwrap();
        let failed = job.state == State::Failed;
        assert_eq!(told, [failed.then(|| Redriven::As(*job.redriven_as.get_or_insert(to)))]);
    }

    async fn leave(&mut self) {
        let name = *self.dice.pick(&WORKERS).unwrap();
        let worker = WorkerId::from_stored(name.to_owned());
        self.dies(name);
        let holds = self.leases.iter().any(|(lease, holder)| *holder == worker && self.holds(lease));
        let booked = self.queue.leave(self.lane, &worker).await.unwrap();
        assert_eq!(booked, if holds { Booked::Pending } else { Booked::Gone });
    }

    /// Any lease that was ever given may be finished, at any time, and more than once.
    async fn finish(&mut self) {
        let Some((lease, worker)) = self.dice.pick(&self.leases).cloned() else { return };
        let failure = Failure::new(FailureClass::Transient, "x");
        let generation = Generation::new("x".to_owned(), FinishReason::Stop);
        let verdict = match self.dice.roll(7) {
            0 => Verdict::Fail(failure),
            6 => Verdict::Wait { delay_ms: self.dice.roll(2), failure },
            1 => Verdict::Retry { delay_ms: 0, failure },
            2 => Verdict::HandBack,
            3 => Verdict::Cancel,
            _ => Verdict::Succeed(generation),
        };
        let signal = *self.dice.pick(&[Signal::Answered, Signal::GivenUp]).unwrap();
        let observation = (self.dice.roll(2) == 0).then_some(Observation { signal, ..Observation::default() });
        let finish = Finish { verdict, cost: Some(Cost::exact(Picodollars(1))), observation };
        let ended = Ended { held: lease.held(), started_at: lease.started_at, finish: &finish };
        let kept = self.queue.finish(lease.id.lane(), &worker, &[ended]).await.unwrap()[0];
        let job = self.jobs.get_mut(&lease.id).unwrap();
        let holds = job.state == State::Running && job.epoch == lease.epoch.0;
        if !holds {
            // A repeated call is answered as the first was; any other is fenced, and booked once.
            assert_eq!(kept == Kept::Kept, job.kept.contains(&lease.epoch.0));
            if kept == Kept::LeaseLost && job.fenced.insert(lease.epoch.0) {
                job.ends.push(AttemptEnd::Fenced);
            }
            return;
        }
        assert_eq!(kept, Kept::Kept);
        job.kept.insert(lease.epoch.0);
        job.ends.push(finish.verdict.attempt_end());
        job.failures += u32::from(finish.verdict.counts());
        job.happens(finish.verdict.event());
        if matches!(job.state, State::Queued | State::Delayed) {
            job.ends_instead_of_waiting();
        }
    }

    async fn cancel(&mut self) {
        let ids: Vec<JobId> = self.jobs.keys().copied().collect();
        let Some(id) = self.dice.pick(&ids).copied() else { return };
        self.queue.cancel(self.lane, &[id]).await.unwrap();
        let job = self.jobs.get_mut(&id).unwrap();
        match job.state {
            State::Running if job.batch.is_none() => job.cancel_asked = true,
            state if state.is_final() => {}
            _ => job.happens(Event::Cancel),
        }
    }

    /// A worker dies: one of its leases runs out.
    async fn lose(&mut self) {
        let running: Vec<(Lease, WorkerId)> = self
            .leases
            .iter()
            .filter(|(lease, _)| self.holds(lease) && self.jobs[&lease.id].batch.is_none())
            .cloned()
            .collect();
        let Some((lease, worker)) = self.dice.pick(&running).cloned() else { return };
        self.dies(worker.as_str());
        let slots = Slots { capacity: 1, free: 0, tokens: None, declared: None };
        let held = [Holding { held: lease.held(), started: true }];
        let told = self.queue.heartbeat(self.lane, &worker, slots, 0, &held).await.unwrap();
        let job = &self.jobs[&lease.id];
        let expected = match (job.cancel_asked, job.overdue) {
            (true, _) => Beat::Cancel,
            (false, true) => Beat::DeadlinePassed,
            (false, false) => Beat::Ok,
        };
        assert_eq!(told, [expected]);
        self.queue.reclaim(self.lane, &Policy::default(), 0).await.unwrap();
        let job = self.jobs.get_mut(&lease.id).unwrap();
        job.losses += 1;
        job.ends.push(AttemptEnd::Lost);
        if job.losses >= Policy::default().losses_max {
            job.state = State::Failed;
        } else {
            job.happens(Event::Reclaim);
            job.ends_instead_of_waiting();
        }
    }

    fn holds(&self, lease: &Lease) -> bool {
        let job = &self.jobs[&lease.id];
        job.state == State::Running && job.epoch == lease.epoch.0
    }

    async fn upkeep(&mut self) {
        // What it does to the order is no promise of the model.
        self.queue.age(self.lane).await.unwrap();
        if self.dice.roll(2) == 0 {
            self.queue.promote(self.lane).await.unwrap();
            for job in self.jobs.values_mut().filter(|job| job.state == State::Delayed && !job.parked) {
                job.happens(Event::Promote);
                job.ends_instead_of_waiting();
            }
            return;
        }
        self.queue.expire(self.lane).await.unwrap();
        let waits = |job: &&mut Known| matches!(job.state, State::Queued | State::Delayed);
        for job in self.jobs.values_mut().filter(waits).filter(|job| job.overdue) {
            // A deadline is looked at once: a running job is told by its heartbeat, or ends when it is queued again.
            job.happens(Event::Expire);
        }
    }

    async fn compare(&self) {
        self.compare_permits().await;
        let ids: Vec<JobId> = self.jobs.keys().copied().collect();
        for job in self.queue.get_many(&ids).await.unwrap() {
            let known = &self.jobs[&job.id];
            let ends: Vec<AttemptEnd> = job.attempts.iter().map(|attempt| attempt.end).collect();
            let found = (job.state, job.epoch.0, job.failures, job.losses, sorted(ends));
            let wanted = (known.state, known.epoch, known.failures, known.losses, sorted(known.ends.clone()));
            assert_eq!(found, wanted, "{}", job.id);
            assert_eq!(job.generation.is_some(), known.state == State::Succeeded);
        }
        let open = self.jobs.values().filter(|job| !job.state.is_final()).count();
        let in_state = |state| u64::try_from(self.jobs.values().filter(|job| job.state == state).count()).unwrap();
        let lane = self.queue.lane_state(self.lane).await.unwrap();
        assert_eq!(
            (lane.queued, lane.delayed, lane.running, lane.failed),
            (in_state(State::Queued), in_state(State::Delayed), in_state(State::Running), in_state(State::Failed))
        );
        let counted = self.queue.open_jobs(&[self.lane], None).await.unwrap();
        assert_eq!(counted, u64::try_from(open).unwrap());
        let finished = self.queue.finished(self.lane, None, 10_000).await.unwrap();
        assert_eq!(finished.len(), self.jobs.len() - open + self.purged, "every final job is told once");
    }
}

fn sorted(mut ends: Vec<AttemptEnd>) -> Vec<String> {
    ends.sort_by_key(|end| format!("{end:?}"));
    ends.into_iter().map(|end| format!("{end:?}")).collect()
}

/// Request ids of several tenants, each in a slot of its own.
#[derive(Default)]
struct Requests {
    known: BTreeMap<(&'static str, &'static str), (JobId, ContentHash)>,
}

impl Requests {
    /// Reserves several at once, some of them again, some with other content.
    async fn reserve(&mut self, queue: &Queue, dice: &mut Dice) {
        let names: Vec<(&str, &str)> = TENANTS.iter().flat_map(|tenant| REQUEST_IDS.map(|id| (*tenant, id))).collect();
        let mut wanted: Vec<((&str, &str), Tenant, JobId, ContentHash)> = Vec::new();
        for name in names {
            if dice.roll(2) == 0 {
                let id = JobId::new(UnixMs(1), LaneNumber(1), dice.roll(u64::MAX));
                let content = [u8::try_from(dice.roll(2)).unwrap(); 16];
                wanted.push((name, Tenant::parse(name.0).unwrap(), id, content));
            }
        }
        let reservations: Vec<Reservation<'_>> = wanted
            .iter()
            .map(|(name, tenant, id, content)| Reservation { tenant, request_id: name.1, id: *id, content })
            .collect();
        let found = queue.reserve_request_ids(&reservations).await.unwrap();
        let expect = wanted.iter().map(|(name, _, id, content)| match self.known.get(name) {
            None => {
                self.known.insert(*name, (*id, *content));
                RequestId::Fresh
            }
            Some((earlier, same)) if same == content => RequestId::Same(*earlier),
            Some((earlier, _)) => RequestId::Other(*earlier),
        });
        assert_eq!(found, expect.collect::<Vec<_>>());
    }
}

/// What is asked of all lanes at once is what each lane answers.
async fn compare_lanes(runs: &[Run]) {
    let queue = &runs[0].queue;
    let lanes: Vec<LaneNumber> = runs.iter().map(|run| run.lane).collect();
    // By the random part, so that jobs of one lane do not stand side by side.
    let mut ids: Vec<JobId> = runs.iter().flat_map(|run| run.jobs.keys().copied()).collect();
    ids.sort_unstable_by_key(|id| id.as_bytes()[15]);
    let found: Vec<JobId> = queue.get_many(&ids).await.unwrap().into_iter().map(|job| job.id).collect();
    assert_eq!(found, ids);
    let known: Vec<Option<State>> =
        ids.iter().map(|id| runs.iter().find_map(|run| run.jobs.get(id)).map(|job| job.state)).collect();
    assert_eq!(queue.states(&ids).await.unwrap(), known);
    let open = known.iter().flatten().filter(|state| !state.is_final()).count();
    assert_eq!(queue.open_jobs(&lanes, None).await.unwrap(), u64::try_from(open).unwrap());
    let listed = queue.list(ListQuery { lanes: &lanes, which: Which::All, before: None, limit: ids.len() + 1 });
    let mut listed: Vec<JobId> = listed.await.unwrap().into_iter().map(|job| job.id).collect();
    listed.sort_unstable();
    ids.sort_unstable();
    assert_eq!(listed, ids);
}

#[expect(clippy::print_stderr, reason = "shown only when the test fails: with it, a failing run replays")]
async fn agree(redis: Redis) {
    let redis = Rc::new(redis);
    for seed in 0..SEEDS {
        let options = Options { url: redis.url(), namespace: format!("seed-{seed}") };
        let queue = Queue::connect(&options).await.unwrap();
        let mut dice = Dice::new(seed);
        let mut runs = Vec::new();
        let settings = Rc::new(RefCell::new(BTreeMap::new()));
        for model in MODELS {
            let model = ModelName::parse(model).unwrap();
            let lane = queue.open_lane(&model.lane()).await.unwrap();
            let dice = Dice::new(dice.roll(u64::MAX));
            let gated = GATED.contains(&model.as_str()).then(BTreeSet::new);
            runs.push(Run {
                gated,
                redis: redis.clone(),
                namespace: options.namespace.clone(),
                queue: queue.clone(),
                model,
                lane,
                dice,
                jobs: BTreeMap::new(),
                leases: Vec::new(),
                settings: settings.clone(),
                purged: 0,
            });
        }
        let mut requests = Requests::default();
        for step in 0..COMMANDS {
            eprintln!("seed {seed}, step {step}");
            let run = usize::try_from(dice.roll(u64::try_from(runs.len()).unwrap())).unwrap();
            runs[run].command().await;
            runs[run].compare().await;
            if dice.roll(10) == 0 {
                requests.reserve(&queue, &mut dice).await;
                compare_lanes(&runs).await;
            }
        }
    }
}

#[tokio::test]
async fn scripts_and_model_agree_whatever_is_asked() {
    agree(Redis::Server(RedisServer::start().unwrap())).await;
}

#[tokio::test]
async fn scripts_and_model_agree_on_a_cluster() {
    let cluster = RedisCluster::start().unwrap();
    let nodes: BTreeSet<usize> =
        (1..=MODELS.len()).map(|lane| cluster.slot_of(&format!("{{{lane}}}")).unwrap().1).collect();
    assert_eq!(nodes.len(), cluster.nodes().len(), "every node has a lane");
    agree(Redis::Cluster(cluster)).await;
}
