//! What operators do with a running mill, by gRPC and by the command: pauses, limits, weights, redriving, purging, start
//! times, following from now on. Two schedulers share one Redis, so that what is asked at one must hold at the other.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

use genmill_client::{Client, Error, Outcome, Pausable, Reason, Request, TenantLimits, Until, v1};
use genmill_core::attempt::{Failure, FailureClass};
use genmill_core::ids::{JobId, WorkerId};
use genmill_core::judge::Verdict;
use genmill_core::model::ModelName;
use genmill_core::names::Tenant;
use genmill_core::registration::{Availability, Registration, ServedModel};
use genmill_core::time::UnixMs;
use genmill_queue::{
    Ended, Finish, Head, ListQuery, NewJob, Options, Purge, Queue, RequestId, Reservation, Room, Which, content_hash,
};
use genmill_tests::daemons::Daemon;
use genmill_tests::place::{MODEL, OTHER_MODEL, Place, check_all_succeeded_once, client, request, results, submit_all};
use genmill_tests::redis_cluster::ask;
use genmill_tests::redis_server::RedisServer;
use genmill_tests::specs::plain;
use genmill_wire::from_pb;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio_stream::StreamExt as _;
use tonic_types::StatusExt as _;
use v1::job_service_client::JobServiceClient;

const LANE: &str = "litellm:openai";
const OTHER_LANE: &str = "litellm:groq";

/// Long after every test.
const YEAR_2100: Duration = Duration::from_secs(4_102_444_800);

struct Mill {
    // Processes end before what they use.
    schedulers: [Daemon; 2],
    _worker: Daemon,
    redis: RedisServer,
    place: Place,
    /// Clients of the two schedulers.
    client: Client,
    other: Client,
}

impl Mill {
    async fn up() -> Self {
        let place = Place::new().await;
        let redis = RedisServer::start().unwrap();
        let start = |daemon: &str| {
            let listen = ("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0");
            let groq =
                place.start(daemon).env("GROQ_API_KEY", "sk-test").env("GROQ_BASE_URL", &place.provider.base_url());
            groq.env("GENMILL__REDIS__URL", &redis.url()).env(listen.0, listen.1).until_ready().unwrap()
        };
        let schedulers = [start("genmill-scheduler"), start("genmill-scheduler")];
        let worker = start("genmill-worker-api");
        let (client, other) = (client(&schedulers[0]).await, client(&schedulers[1]).await);
        Self { schedulers, _worker: worker, redis, place, client, other }
    }

    /// Runs the command against the first scheduler. Fails unless it ends with `code`, and says exactly `out` on standard
    /// output when that went well, else `out` somewhere on standard error and nothing on standard output.
    fn command(&self, line: &str, code: i32, out: &str) {
        let (ended, said, error) = self.place.genmill(&self.schedulers[0], &line.split(' ').collect::<Vec<_>>());
        assert_eq!(ended, Some(code), "{line}: {said}{error}");
        if code == 0 {
            assert_eq!(said, out, "{line}: {error}");
        } else {
            assert!(said.is_empty() && error.contains(out), "{line}: {said}{error}");
        }
    }

    /// Runs a command that prints JSON, one object a line.
    fn json(&self, line: &str) -> Vec<Value> {
        let (code, out, error) = self.place.genmill(&self.schedulers[1], &line.split(' ').collect::<Vec<_>>());
        assert_eq!(code, Some(0), "{line}: {error}");
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The generated client of a scheduler, for what the client does not show.
    async fn raw(&self, scheduler: usize) -> JobServiceClient<tonic::transport::Channel> {
        JobServiceClient::connect(format!("http://{}", self.schedulers[scheduler].place("grpc"))).await.unwrap()
    }

    /// The queue itself, for what no scheduler does.
    async fn queue(&self) -> Queue {
        Queue::connect(&Options { url: self.redis.url(), namespace: "genmill".to_owned() }).await.unwrap()
    }

    /// Submits a job and returns it when it has ended.
    async fn run(&self, request: Request) -> v1::Job {
        let id = self.client.submit(request).await.unwrap().job.id;
        self.ended(&id).await
    }

    async fn ended(&self, id: &str) -> v1::Job {
        self.other.watch(id).map(Result::unwrap).collect::<Vec<_>>().await;
        self.client.get(id).await.unwrap()
    }

    async fn lane(&self, name: &str) -> v1::Lane {
        self.other.list_lanes().await.unwrap().into_iter().find(|lane| lane.name == name).unwrap()
    }

    fn most_at_once(&self, model: &str) -> usize {
        self.place.provider.bill().most_at_once.get(model).copied().unwrap_or_default()
    }
}

fn of_experiment(name: &str) -> v1::JobFilter {
    v1::JobFilter { experiment: name.to_owned(), ..v1::JobFilter::default() }
}

fn in_state(state: v1::JobState) -> v1::JobFilter {
    v1::JobFilter { state: state.into(), ..v1::JobFilter::default() }
}

/// How often a Redis has run a command.
fn command_calls(redis: &RedisServer, command: &str) -> u64 {
    let told: String = ask(redis, redis::cmd("INFO").arg("commandstats")).unwrap();
    let calls = told.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
    calls.map_or(0, |calls| calls.split(',').next().unwrap().parse().unwrap())
}

fn requests(count: u32, request: impl Fn(u32) -> Request) -> Vec<Request> {
    (0..count).map(request).collect()
}

/// Fails unless `answer` is a refusal for `reason` that says `says`.
fn check_refused<T: std::fmt::Debug>(answer: Result<T, Error>, reason: Reason, says: &str) {
    let error = answer.unwrap_err();
    let Error::Refused { reason: given, message } = &error else { panic!("{error:?}") };
    assert_eq!(*given, reason, "{message}");
    assert!(message.contains(says), "{message}");
}

/// The same for what is not found.
fn check_not_found<T: std::fmt::Debug>(answer: Result<T, Error>, says: &str) {
    let error = answer.unwrap_err();
    assert!(matches!(&error, Error::NotFound { message } if message.contains(says)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paused_starts_nothing_until_it_is_resumed_at_any_scheduler() {
    let mill = Mill::up().await;
    let plain = |name: &str, prompt: &str| request(prompt).experiment(name).tenant(name);
    for (what, name) in [
        (Pausable::Lane(LANE.to_owned()), "lane"),
        (Pausable::Experiment("experiment".to_owned()), "experiment"),
        (Pausable::Tenant("tenant".to_owned()), "tenant"),
    ] {
        // What runs goes on.
        let first = format!("!first-byte=400 {name} running");
        let running = mill.client.submit(plain(name, &first)).await.unwrap().job.id;
        while mill.client.get(&running).await.unwrap().state() != v1::JobState::Running {
            tokio::task::yield_now().await;
        }
        mill.client.pause(what.clone()).await.unwrap();
        mill.client.pause(what.clone()).await.unwrap();
        let held = requests(5, |n| plain(name, &format!("{name} {n}")));
        let held = submit_all(&mill.other, held).await;
        assert_eq!(mill.ended(&running).await.state(), v1::JobState::Succeeded);
        // The others do not wait: several rounds of jobs go by.
        for n in 0..3 {
            let model = if name == "lane" { OTHER_MODEL } else { MODEL };
            let other = mill.run(Request::new(model).prompt(format!("beside {name} {n}"))).await;
            assert_eq!(other.state(), v1::JobState::Succeeded);
        }
        for id in &held {
            let job = mill.client.get(id).await.unwrap();
            assert_eq!((job.state(), job.attempts), (v1::JobState::Queued, 0), "{name}");
        }
        assert!((0..5).all(|n| !mill.place.provider.bill().contents.contains_key(&format!("gpt-4o-mini: {name} {n}"))));
        check_paused(&mill, &what, true).await;
        mill.other.resume(what.clone()).await.unwrap();
        let ids: Vec<String> = held.into_iter().chain([running]).collect();
        check_all_succeeded_once(&results(&mill.client, name).await.unwrap(), &ids);
        check_paused(&mill, &what, false).await;
    }
}

/// Both schedulers tell whether it is paused.
async fn check_paused(mill: &Mill, what: &Pausable, expect: bool) {
    for client in [&mill.client, &mill.other] {
        let settings = client.list_settings().await.unwrap();
        let lanes = client.list_lanes().await.unwrap();
        let paused = match what {
            Pausable::Lane(name) => lanes.iter().any(|lane| lane.name == *name && lane.paused),
            Pausable::Experiment(name) => settings.paused_experiments.contains(name),
            Pausable::Tenant(name) => settings.tenants.iter().any(|tenant| tenant.tenant == *name && tenant.paused),
        };
        assert_eq!(paused, expect, "{what:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_a_lane_is_kept_at_the_provider_until_it_is_lifted() {
    let mill = Mill::up().await;
    let slow = |name: &'static str, ms: u32| {
        requests(20, move |n| request(&format!("!first-byte={ms} {name} {n}")).experiment(name))
    };
    mill.client.set_lane_limits(LANE, Some(2)).await.unwrap();
    let ids = submit_all(&mill.other, slow("limited", 30)).await;
    check_all_succeeded_once(&results(&mill.client, "limited").await.unwrap(), &ids);
    assert_eq!(mill.most_at_once("gpt-4o-mini"), 2);
    let lane = mill.lane(LANE).await;
    assert_eq!((lane.max_running, lane.capacity, lane.running), (Some(2), 16, 0));
    mill.other.set_lane_limits(LANE, None).await.unwrap();
    let ids = submit_all(&mill.client, slow("free", 500)).await;
    check_all_succeeded_once(&results(&mill.client, "free").await.unwrap(), &ids);
    assert!(mill.most_at_once("gpt-4o-mini") > 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_a_tenant_is_kept_at_the_provider_and_binds_no_other() {
    let mill = Mill::up().await;
    let limits = TenantLimits { max_running: Some(2), weight_percent: None };
    mill.other.set_tenant_limits("bounded", limits).await.unwrap();
    // Their models tell their calls apart; both are in one lane.
    let one = |n: u32| {
        let (tenant, model) = if n < 20 { ("bounded", MODEL) } else { ("free", "litellm_gpt-4") };
        Request::new(model).prompt(format!("!first-byte=200 {n}")).tenant(tenant).experiment("limits")
    };
    let ids = submit_all(&mill.client, requests(40, one)).await;
    check_all_succeeded_once(&results(&mill.client, "limits").await.unwrap(), &ids);
    assert_eq!(mill.most_at_once("gpt-4o-mini"), 2);
    assert!(mill.most_at_once("gpt-4") > 2);
    let limited = mill.client.list_settings().await.unwrap().tenants;
    assert_eq!(limited.len(), 1);
    assert_eq!((limited[0].tenant.as_str(), limited[0].max_running), ("bounded", Some(2)));
    mill.client.set_tenant_limits("bounded", TenantLimits::default()).await.unwrap();
    assert_eq!(mill.other.list_settings().await.unwrap(), v1::ListSettingsResponse::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_that_compete_share_by_their_weights() {
    let mill = Mill::up().await;
    mill.run(request("first")).await;
    mill.client.pause(Pausable::Lane(LANE.to_owned())).await.unwrap();
    mill.client.set_lane_limits(LANE, Some(1)).await.unwrap();
    let limits = TenantLimits { max_running: None, weight_percent: Some(300) };
    mill.other.set_tenant_limits("heavy", limits).await.unwrap();
    let one = |n: u32| {
        let tenant = if n < 40 { "light" } else { "heavy" };
        request(&format!("{tenant} {n}")).tenant(tenant).experiment("weights")
    };
    let ids = submit_all(&mill.client, requests(80, one)).await;
    mill.client.resume(Pausable::Lane(LANE.to_owned())).await.unwrap();
    check_all_succeeded_once(&results(&mill.client, "weights").await.unwrap(), &ids);
    // One at a time, so the provider's calls are in the order of the starts.
    let calls = mill.place.provider.requests();
    let while_both_wait = calls.iter().skip(1).take(40);
    let heavy = while_both_wait.filter(|call| call.body.to_string().contains("heavy")).count();
    assert!((29..=31).contains(&heavy), "three of four are the heavy tenant's: {heavy} of 40");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_is_kept_with_its_history_and_redriven_once() {
    let mill = Mill::up().await;
    let asked = request("!status=400 times=1 again").experiment("e").tenant("t").label("k", "v").request_id("r");
    let failed = mill.run(asked.clone()).await;
    assert_eq!(failed.state(), v1::JobState::Failed);
    let listed: Vec<v1::Job> =
        mill.other.list_whole(in_state(v1::JobState::Failed)).map(Result::unwrap).collect().await;
    assert_eq!(listed, std::slice::from_ref(&failed));
    assert_eq!(listed[0].attempt_history.len(), 1);
    assert_eq!(listed[0].attempt_history[0].outcome(), v1::AttemptOutcome::Failed);
    assert!(listed[0].error.as_ref().unwrap().message.contains("400"));
    assert!(listed[0].request.as_ref().unwrap().input.is_some());

    let (here, there) = tokio::join!(mill.client.redrive(&failed.id), mill.other.redrive(&failed.id));
    let copy = here.unwrap();
    assert_eq!(copy, there.unwrap());
    assert_eq!(copy, mill.client.redrive(&failed.id).await.unwrap());
    let copy = mill.ended(&copy).await;
    assert_eq!((copy.state(), copy.redriven_from.as_str()), (v1::JobState::Succeeded, failed.id.as_str()));
    let failed = mill.client.get(&failed.id).await.unwrap();
    assert_eq!((failed.state(), failed.redriven_as.as_str()), (v1::JobState::Failed, copy.id.as_str()));
    assert_eq!(mill.place.provider.bill().calls, 2);
    // The same work, but the request id still stands for the first job.
    let (was, is) = (failed.request.unwrap(), copy.request.unwrap());
    assert_eq!(v1::GenerationRequest { request_id: String::new(), ..was }, is);
    let again = mill.client.submit(asked).await.unwrap();
    assert_eq!((again.existed, again.job.id), (true, failed.id));

    check_refused(mill.client.redrive(&copy.id).await, Reason::JobNotFailed, &format!("job {} is succeeded", copy.id));
    let nobody = "00000000-0000-8000-8000-000000000000";
    check_not_found(mill.client.redrive(nobody).await, nobody);
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_jobs_of_a_filter_are_redriven_each_once() {
    let mill = Mill::up().await;
    let fails = |n: u32| {
        let model = if n.is_multiple_of(2) { MODEL } else { OTHER_MODEL };
        Request::new(model).prompt(format!("!status=400 times=1 {n}")).experiment(if n < 6 { "a" } else { "b" })
    };
    submit_all(&mill.client, requests(8, fails)).await;
    let mut failed = results(&mill.client, "a").await.unwrap();
    failed.extend(results(&mill.client, "b").await.unwrap());
    assert!(failed.iter().all(|job| job.state() == v1::JobState::Failed));
    let first = mill.client.redrive_all(of_experiment("a")).await.unwrap();
    assert_eq!((first.redriven, first.redriven_before, first.job_ids.len()), (6, 0, 6));
    let second = mill.other.redrive_all(of_experiment("a")).await.unwrap();
    assert_eq!((second.redriven, second.redriven_before), (0, 6));
    assert_eq!(first.job_ids, second.job_ids);
    let of_one_model = v1::JobFilter { model: MODEL.to_owned(), ..in_state(v1::JobState::Failed) };
    let rest = mill.client.redrive_all(of_one_model).await.unwrap();
    assert_eq!((rest.redriven, rest.redriven_before), (1, 3));
    let failed: Vec<v1::Job> = mill.client.list(in_state(v1::JobState::Failed)).map(Result::unwrap).collect().await;
    let of_a = failed.iter().filter(|job| job.request.as_ref().unwrap().experiment == "a");
    assert!(of_a.map(|job| &job.redriven_as).eq(&second.job_ids), "in the order of the list of failed jobs");
    results(&mill.client, "b").await.unwrap();
    let copies = results(&mill.client, "a").await.unwrap();
    assert_eq!(copies.iter().filter(|job| job.state() == v1::JobState::Succeeded).count(), 6);
    // Also when what came of it has been cleared away; the one that is new had not been asked for.
    assert_eq!(mill.client.purge(in_state(v1::JobState::Succeeded), None).await.unwrap(), 7);
    let third = mill.other.redrive_all(v1::JobFilter::default()).await.unwrap();
    assert_eq!((third.redriven, third.redriven_before), (1, 7));
    let answer = mill.client.redrive_all(in_state(v1::JobState::Succeeded)).await;
    check_refused(answer, Reason::InvalidRequest, "filter.state");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_lane_is_told_with_the_known_ones() {
    let mill = Mill::up().await;
    mill.run(request("first")).await;
    mill.run(Request::new(OTHER_MODEL).prompt("second")).await;
    let unknown = "litellm:nowhere";
    check_not_found(mill.client.pause(Pausable::Lane(unknown.to_owned())).await, LANE);
    check_not_found(mill.client.resume(Pausable::Lane(unknown.to_owned())).await, OTHER_LANE);
    check_not_found(mill.client.set_lane_limits(unknown, Some(1)).await, "no lane is called `litellm:nowhere`");
    // A name that cannot be one, and a limit that lets nothing run.
    check_refused(mill.client.pause(Pausable::Tenant(String::new())).await, Reason::InvalidRequest, "tenant");
    check_refused(mill.client.pause(Pausable::Experiment("a b".into())).await, Reason::InvalidRequest, "experiment");
    check_refused(mill.client.set_lane_limits(LANE, Some(0)).await, Reason::InvalidRequest, "max_running");
    let limits = TenantLimits { max_running: None, weight_percent: Some(10_001) };
    check_refused(mill.client.set_tenant_limits("t", limits).await, Reason::InvalidRequest, "weight_percent");
    assert_eq!(mill.client.list_settings().await.unwrap(), v1::ListSettingsResponse::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn purging_removes_what_has_finished_and_frees_its_request_ids() {
    let mill = Mill::up().await;
    let one = |n: u32| {
        let prompt = if n == 0 { "!status=400".to_owned() } else { format!("job {n}") };
        request(&prompt).experiment("e").request_id(format!("id-{n}"))
    };
    let mut ids = submit_all(&mill.client, requests(4, one)).await;
    results(&mill.client, "e").await.unwrap();
    let later = request("later").experiment("e").request_id("later").not_before(UNIX_EPOCH + YEAR_2100);
    let later_id = mill.client.submit(later.clone()).await.unwrap().job.id;
    let beside = mill.run(request("beside").experiment("f").request_id("beside")).await;

    check_refused(mill.client.purge(v1::JobFilter::default(), None).await, Reason::InvalidRequest, "filter");
    let answer = mill.client.purge(in_state(v1::JobState::Delayed), None).await;
    check_refused(answer, Reason::InvalidRequest, "filter.state");
    let too_early = mill.client.purge(of_experiment("e"), Some(UNIX_EPOCH.into())).await.unwrap();
    assert_eq!(too_early, 0);
    let failed = v1::JobFilter { state: v1::JobState::Failed.into(), ..of_experiment("e") };
    assert_eq!(mill.other.purge(failed, None).await.unwrap(), 1);
    assert_eq!(mill.other.purge(of_experiment("e"), None).await.unwrap(), 3);
    assert_eq!(mill.client.purge(of_experiment("e"), None).await.unwrap(), 0);
    for id in &ids {
        check_not_found(mill.client.get(id).await, id);
    }
    let left: Vec<String> = mill.client.list(v1::JobFilter::default()).map(|job| job.unwrap().id).collect().await;
    assert_eq!(left, [beside.id.clone(), later_id.clone()]);
    let lane = mill.lane(LANE).await;
    assert_eq!((lane.failed, lane.delayed, lane.queued, lane.running), (0, 1, 0, 0));

    // Request ids of what is gone may stand for something else, those of what is left may not.
    let anew = |n: u32| request(&format!("anew {n}")).experiment("anew").request_id(format!("id-{n}"));
    ids = submit_all(&mill.other, requests(4, anew)).await;
    check_all_succeeded_once(&results(&mill.client, "anew").await.unwrap(), &ids);
    let answer = mill.client.submit(request("other").experiment("e").request_id("later")).await;
    check_refused(answer, Reason::RequestIdReused, &later_id);
    assert!(mill.client.submit(later).await.unwrap().existed);
    // Everything that finished by then.
    let before = Some((UNIX_EPOCH + YEAR_2100).into());
    assert_eq!(mill.client.purge(v1::JobFilter::default(), before).await.unwrap(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_that_stands_for_a_job_which_is_gone_is_taken_anew() {
    let mill = Mill::up().await;
    let queue = mill.queue().await;
    let one = || request("one").request_id("r");
    let first = mill.run(one()).await;
    // As a purge that is cut off half way leaves it.
    let id = JobId::parse(&first.id).unwrap();
    let listed =
        queue.list(ListQuery { lanes: &[id.lane()], which: Which::All, before: None, limit: 1 }).await.unwrap();
    let head = Head { request_id: None, ..queue.heads(&[id]).await.unwrap().remove(0) };
    assert_eq!(queue.purge(&[Purge { place: listed[0].place, head: &head }]).await.unwrap(), 1);
    let (here, there) = tokio::join!(mill.client.submit(one()), mill.other.submit(one()));
    let (here, there) = (here.unwrap(), there.unwrap());
    assert!(here.job.id == there.job.id && here.job.id != first.id && here.existed != there.existed);
    assert_eq!(mill.ended(&here.job.id).await.state(), v1::JobState::Succeeded);
    assert_eq!(mill.place.provider.bill().calls, 2);
    // Other content, when the job was never stored or went long ago.
    let old = JobId::new(UnixMs(1), id.lane(), 1);
    let reserve = async |request_id: &str, id: JobId, content: &[u8; 16]| {
        let reservation = Reservation { tenant: &Tenant::default(), request_id, id, content };
        assert_eq!(queue.reserve_request_ids(&[reservation]).await.unwrap(), [RequestId::Fresh]);
    };
    reserve("old", old, &[1; 16]).await;
    let job = mill.run(request("two").request_id("old")).await;
    assert_eq!(job.state(), v1::JobState::Succeeded);
    assert!(mill.client.submit(request("two").request_id("old")).await.unwrap().existed);
    // But not while the job is about to be stored, which whoever submits the same again makes good.
    let three = v1::GenerationRequest::from(request("three").request_id("new"));
    let created = SystemTime::try_from(job.created_at.unwrap()).unwrap().duration_since(UNIX_EPOCH).unwrap();
    let new = JobId::new(UnixMs(u64::try_from(created.as_millis()).unwrap()), id.lane(), 1);
    reserve("new", new, &content_hash(&from_pb::request(three.clone()).unwrap()).unwrap()).await;
    let other = mill.client.submit(request("other").request_id("new")).await;
    check_refused(other, Reason::RequestIdReused, &new.to_string());
    let stored = mill.client.submit(three).await.unwrap();
    assert_eq!((stored.job.id, stored.existed), (new.to_string(), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_model_nobody_serves_does_not_keep_others_from_being_redriven() {
    let mill = Mill::up().await;
    let fails = |n: u32| request(&format!("!status=400 times=1 {n}")).experiment("e");
    submit_all(&mill.client, requests(2, fails)).await;
    results(&mill.client, "e").await.unwrap();
    // The one that failed last stands first in the list.
    let queue = mill.queue().await;
    let spec = plain(ModelName::parse("vllm_unserved").unwrap());
    let lane = queue.open_lane(&spec.model.lane()).await.unwrap();
    let unserved = JobId::new(UnixMs(1), lane, 1);
    let worker = WorkerId::new("test", "host", 0);
    queue.enqueue(&spec.model.lane(), &[NewJob { id: unserved, spec }]).await.unwrap();
    let lease = queue.claim(lane, &worker, Room { free: 1, tokens: None, keys: &[] }, 60_000).await.unwrap().remove(0);
    let finish =
        Finish { verdict: Verdict::Fail(Failure::new(FailureClass::Invalid, "x")), cost: None, observation: None };
    let ended = Ended { held: lease.held(), started_at: lease.started_at, finish: &finish };
    queue.finish(lane, &worker, &[ended]).await.unwrap();

    let told = mill.client.redrive_all(v1::JobFilter::default()).await.unwrap();
    assert_eq!((told.redriven, told.redriven_before, told.skipped, told.job_ids.len()), (2, 0, 1, 2));
    assert!(told.skipped_because.contains("no live worker serves `vllm_unserved`"), "{}", told.skipped_because);
    let line = format!("0 redriven, 2 had been before, 1 skipped: {}\n", told.skipped_because);
    mill.command("redrive --all", 0, &line);
    let error = mill.client.redrive(&unserved.to_string()).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { message, .. } if *message == told.skipped_because), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_its_time_and_may_be_cancelled_until_then() {
    let mill = Mill::up().await;
    let at = |prompt: &str, after: Duration| request(prompt).not_before(UNIX_EPOCH + after);
    let job = mill.client.submit(at("future", YEAR_2100)).await.unwrap().job;
    assert_eq!((job.state(), job.not_before), (v1::JobState::Delayed, Some((UNIX_EPOCH + YEAR_2100).into())));
    let past = mill.run(at("past", Duration::from_secs(1_000))).await;
    assert_eq!(past.state(), v1::JobState::Succeeded);
    let soon = SystemTime::try_from(past.created_at.unwrap()).unwrap() + Duration::from_secs(2);
    let soon = mill.run(request("soon").not_before(soon)).await;
    assert_eq!(soon.state(), v1::JobState::Succeeded);
    assert!(soon.started_at.unwrap().seconds >= past.created_at.unwrap().seconds + 2);
    assert_eq!(mill.client.get(&job.id).await.unwrap().state(), v1::JobState::Delayed);
    assert_eq!(mill.other.cancel(&job.id).await.unwrap().state(), v1::JobState::Cancelled);
    let late = at("late", YEAR_2100 + Duration::from_secs(1)).deadline(UNIX_EPOCH + YEAR_2100);
    check_refused(mill.client.submit(late).await, Reason::InvalidRequest, "not_before: must be before the deadline");
    assert_eq!(mill.place.provider.bill().calls, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_for_an_unlisted_model_are_refused_together_and_a_new_worker_is_found_at_once() {
    let mill = Mill::up().await;
    let unlisted = |n: u32| v1::GenerationRequest::from(Request::new("litellm_unlisted").prompt(n.to_string()));
    let readings = || command_calls(&mill.redis, "smembers");
    let (before, begun) = (readings(), Instant::now());
    let answers: Vec<_> = mill.client.submit_all(tokio_stream::iter((0..1_000).map(unlisted))).collect().await;
    let (readings, took) = (readings() - before, begun.elapsed());
    assert_eq!(answers.len(), 1_000);
    assert!(answers.iter().all(|answer| matches!(answer.as_ref().unwrap().outcome, Outcome::Refused(_))));
    assert!(u128::from(readings) <= took.as_millis() / 100 + 2, "{readings} readings in {took:?}");
    // Refused a moment ago, and served now.
    let served = ServedModel {
        name: ModelName::parse("litellm_unlisted").unwrap(),
        availability: Availability::Ready,
        description: String::new(),
        context_tokens: None,
        batches: false,
    };
    let registration = Registration {
        worker: WorkerId::new("test", "host", 0),
        started_at: UnixMs(0),
        capacity: 1,
        prefixes: vec!["litellm".to_owned()],
        models: vec![served],
    };
    mill.queue().await.register(&registration, 60_000).await.unwrap();
    mill.client.submit(unlisted(0)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_a_tenant_until_it_is_idle_looks_at_the_jobs_of_others_once() {
    const OTHERS: u32 = 2_500;
    let mill = Mill::up().await;
    mill.client.pause(Pausable::Tenant("watched".to_owned())).await.unwrap();
    let of_tenant = v1::JobFilter { tenant: "watched".to_owned(), ..v1::JobFilter::default() };
    let open = mill.client.submit(request("open").tenant("watched")).await.unwrap().job.id;
    let other = |n: u32| request(&n.to_string()).tenant("other").not_before(UNIX_EPOCH + YEAR_2100);
    submit_all(&mill.client, requests(OTHERS, other)).await;
    mill.client.cancel_all(v1::JobFilter { tenant: "other".to_owned(), ..v1::JobFilter::default() }).await.unwrap();
    let mut watched = Box::pin(mill.other.watch_jobs(of_tenant, String::new(), Until::Idle));
    let before = command_calls(&mill.redis, "hget");
    // Each wakes the watcher up.
    let runs = async {
        for n in 0..20 {
            mill.run(request(&format!("wakes {n}")).tenant("other")).await;
        }
        mill.client.resume(Pausable::Tenant("watched".to_owned())).await.unwrap();
    };
    let (told, ()) = tokio::join!(watched.next(), runs);
    assert_eq!(told.unwrap().unwrap().job.id, open);
    assert!(watched.next().await.is_none());
    let looked_at = command_calls(&mill.redis, "hget") - before;
    assert!(looked_at < u64::from(3 * OTHERS), "{looked_at}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_asks_for_an_hour_is_left_alone_for_an_hour() {
    let mill = Mill::up().await;
    let asks = |prompt: &str| request(&format!("!status=429 retry-after=3600 {prompt}"));
    let patient = mill.client.submit(asks("patient")).await.unwrap().job;
    let accepted = SystemTime::try_from(patient.created_at.unwrap()).unwrap();
    let held = loop {
        if let Some(held) = mill.lane("litellm:openai").await.held_back.pop() {
            break held;
        }
    };
    assert_eq!((held.model.as_str(), held.reason()), (MODEL, v1::HeldBackReason::Throttled));
    let until = SystemTime::try_from(held.until.unwrap()).unwrap();
    assert!(until.duration_since(accepted).unwrap() >= Duration::from_secs(3_600), "{until:?}");
    let job = mill.client.get(&patient.id).await.unwrap();
    assert_eq!((job.state(), job.attempts, job.failures), (v1::JobState::Queued, 1, 0));
    assert_eq!(job.attempt_history[0].error.as_ref().unwrap().error_class(), v1::ErrorClass::Throttled);
    // It would be called too late for this one.
    let late = mill.run(asks("late").deadline(accepted + Duration::from_secs(3))).await;
    assert_eq!((late.state(), late.attempts), (v1::JobState::Expired, 0));
    // Another model of the same provider is not held up.
    let other = mill.run(Request::new("litellm_gpt-4").prompt("other")).await;
    assert_eq!(other.state(), v1::JobState::Succeeded);
    assert_eq!(mill.place.provider.bill().calls, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_for_other_content_tells_what_differs() {
    let mill = Mill::up().await;
    let first = || request("one").request_id("r").max_tokens(5).experiment("e");
    let id = mill.run(first()).await.id;
    let mut raw = mill.raw(1).await;
    for (request, differs) in [
        (request("two").request_id("r").max_tokens(5).experiment("e"), "input"),
        (first().max_tokens(6).label("k", "v"), "max_tokens,labels"),
        (Request::new(OTHER_MODEL).prompt("one").request_id("r").max_tokens(5).experiment("e"), "model"),
        (first().not_before(UNIX_EPOCH + YEAR_2100), "not_before"),
        (first().seed(1), "seed"),
    ] {
        let status = raw.submit_job(v1::SubmitJobRequest { request: Some(request.into()) }).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::AlreadyExists);
        assert!(status.message().contains(&format!("{id}, which differs in: {differs};")), "{}", status.message());
        let info = status.get_error_details().error_info().unwrap().clone();
        assert_eq!(info.reason, "REQUEST_ID_REUSED");
        assert_eq!((info.metadata["job_id"].as_str(), info.metadata["differs"].as_str()), (id.as_str(), differs));
    }
    // Of another tenant it is another request id.
    assert!(!mill.client.submit(first().tenant("other").max_tokens(6)).await.unwrap().existed);
    assert!(mill.other.submit(first()).await.unwrap().existed);
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_from_now_tells_nothing_of_the_past_and_everything_after() {
    let mill = Mill::up().await;
    let of_both =
        |n: u32| Request::new(if n == 0 { MODEL } else { OTHER_MODEL }).prompt(format!("past {n}")).experiment("e");
    submit_all(&mill.client, requests(2, of_both)).await;
    results(&mill.client, "e").await.unwrap();
    let watch = async |scheduler: usize, cursor: &str, from_now: bool| {
        let filter = Some(of_experiment("e"));
        let asked = v1::WatchJobsRequest { filter, cursor: cursor.to_owned(), from_now, until_idle: false };
        mill.raw(scheduler).await.watch_jobs(asked).await.map(tonic::Response::into_inner)
    };
    let mut watched = watch(0, "", true).await.unwrap();
    let now = watched.next().await.unwrap().unwrap();
    assert!(now.job.is_none() && !now.cursor.is_empty(), "{now:?}");
    let mut ids = Vec::new();
    for (n, model) in [MODEL, OTHER_MODEL, MODEL].into_iter().enumerate() {
        ids.push(mill.run(Request::new(model).prompt(format!("after {n}")).experiment("e")).await.id);
    }
    let mut told = Vec::new();
    let mut cursors = vec![now.cursor];
    while told.len() < ids.len() {
        let response = watched.next().await.unwrap().unwrap();
        cursors.push(response.cursor);
        told.extend(response.job.map(|job| (job.id, cursors.len() - 1)));
    }
    let as_told: Vec<String> = told.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(as_told.iter().collect::<BTreeSet<_>>(), ids.iter().collect());
    // From the moment of the beginning and from each job told, another scheduler goes on.
    for (seen, cursor) in [&cursors[0]].into_iter().chain(told.iter().map(|(_, at)| &cursors[*at])).enumerate() {
        let mut resumed = watch(1, cursor, false).await.unwrap();
        let mut rest = Vec::new();
        while rest.len() < ids.len() - seen {
            rest.extend(resumed.next().await.unwrap().unwrap().job.map(|job| job.id));
        }
        assert_eq!(rest.iter().collect::<BTreeSet<_>>(), as_told[seen..].iter().collect());
    }
    let status = watch(0, &cursors[0], true).await.err().unwrap();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    // The client's own way, from before the first job of a lane to after it.
    let mut finished = Box::pin(mill.client.watch_jobs_from_now(of_experiment("g")));
    let (next, id) = tokio::join!(finished.next(), async { mill.run(request("g").experiment("g")).await.id });
    assert_eq!(next.unwrap().unwrap().job.id, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_pauses_limits_and_shows_lanes() {
    let mill = Mill::up().await;
    mill.run(request("first")).await;
    mill.command("list --state failed", 0, "");
    mill.command("pause lane litellm:openai", 0, "lane litellm:openai is paused\n");
    mill.command("pause experiment e", 0, "experiment e is paused\n");
    mill.command("pause tenant t", 0, "tenant t is paused\n");
    mill.command("limit lane litellm:groq --max-running 2", 0, "lane litellm:groq: at most 2 jobs at once\n");
    let told = "tenant u: at most 1 job at once in each lane, weight 300 %\n";
    mill.command("limit tenant u --max-running 1 --weight-percent 300", 0, told);
    submit_all(&mill.other, requests(3, |n| request(&n.to_string()))).await;
    let table = "\
LANE            PAUSED  QUEUED  DELAYED  RUNNING  CAPACITY  LIMIT  FAILED
litellm:groq    -            0        0        0        16      2       0
litellm:openai  yes          3        0        0        16      -       0

paused experiments: e

TENANT  PAUSED  LIMIT  WEIGHT
t       yes         -   100 %
u       -           1   300 %
";
    mill.command("lanes", 0, table);
    let lanes = [
        json!({"name": OTHER_LANE, "capacity": "16", "max_running": 2}),
        json!({"name": LANE, "queued": "3", "capacity": "16", "paused": true}),
        json!({"paused_experiments": ["e"], "tenants": [
            {"tenant": "t", "paused": true},
            {"tenant": "u", "max_running": 1, "weight_percent": 300},
        ]}),
    ];
    assert_eq!(mill.json("lanes --json"), lanes);
    mill.command("resume lane litellm:openai", 0, "lane litellm:openai is resumed\n");
    mill.command("resume experiment e", 0, "experiment e is resumed\n");
    mill.command("resume tenant t", 0, "tenant t is resumed\n");
    mill.command("limit lane litellm:groq", 0, "lane litellm:groq: no limit\n");
    mill.command("limit tenant u", 0, "tenant u: no limit, weight 100 %\n");
    assert_eq!(mill.client.list_settings().await.unwrap(), v1::ListSettingsResponse::default());

    mill.command("pause lane nowhere", 1, "no lane is called `nowhere`; lanes: litellm:");
    mill.command("limit lane nowhere --max-running 1", 1, "no lane is called `nowhere`");
    mill.command("limit lane litellm:groq --max-running 0", 2, "--max-running");
    mill.command("limit tenant u --weight-percent 0", 2, "--weight-percent");
    mill.command("pause experiment a/b", 2, "experiment: `a/b` is not a name");
    mill.command("pause", 2, "Usage: genmill pause");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_redrives_and_purges() {
    let mill = Mill::up().await;
    let failed = mill.run(request("!status=400 times=1 again").experiment("e")).await;
    let whole = mill.json("list --state failed --json --whole");
    assert_eq!(whole.len(), 1);
    assert_eq!(whole[0]["request"]["prompt"], "!status=400 times=1 again");
    assert_eq!(whole[0]["attempt_history"][0]["outcome"], "ATTEMPT_OUTCOME_FAILED");
    assert_eq!(whole[0]["attempt_history"][0]["error"]["error_class"], "ERROR_CLASS_INVALID");
    assert_eq!(mill.json("list --state failed --json")[0]["attempt_history"], Value::Null);

    mill.command("redrive --experiment e", 0, "1 redriven, 0 had been before\n");
    mill.command("redrive --all", 0, "0 redriven, 1 had been before\n");
    let copy = mill.client.get(&failed.id).await.unwrap().redriven_as;
    mill.command(&format!("redrive {}", failed.id), 0, &format!("{copy}\n"));
    mill.ended(&copy).await;
    assert_eq!(mill.json(&format!("get {copy} --json"))[0]["redriven_from"], failed.id);
    assert_eq!(mill.json(&format!("get {} --json", failed.id))[0]["redriven_as"], copy);
    for (id, row) in [(&failed.id, format!("redriven as   {copy}")), (&copy, format!("redriven from {}", failed.id))] {
        let (_, shown, _) = mill.place.genmill(&mill.schedulers[0], &["get", id]);
        assert!(shown.lines().any(|line| line == row), "{shown}");
    }
    mill.command(&format!("redrive {copy}"), 1, "only failed jobs can be redriven");
    mill.command("redrive 00000000-0000-8000-8000-000000000000", 1, "00000000-0000-8000-8000-000000000000");
    mill.command("redrive", 2, "Usage: genmill redrive");

    let later =
        "submit --model litellm_gpt-4o-mini --prompt x --request-id r --no-wait --not-before 2100-01-01T00:00:00Z";
    let job = mill.json(&format!("{later} --json")).remove(0);
    assert_eq!((&job["state"], &job["not_before"]), (&json!("JOB_STATE_DELAYED"), &json!("2100-01-01T00:00:00Z")));
    let id = job["id"].as_str().unwrap();
    mill.command(later, 0, &format!("{id}\n"));
    mill.command(&format!("{later} --top-k 3"), 1, &format!("job {id}, which differs in: top_k"));
    mill.command(&format!("{later} --deadline 1h"), 2, "not_before: must be before the deadline");

    mill.command("purge", 2, "Usage: genmill purge");
    mill.command("purge --state delayed", 2, "delayed");
    mill.command("purge --older-than 1d", 0, "0 purged\n");
    mill.command("purge --state failed --experiment e", 0, "1 purged\n");
    mill.command("purge --tenant default", 0, "1 purged\n");
    let left = mill.json("list --json");
    assert_eq!(left.iter().map(|job| &job["id"]).collect::<Vec<_>>(), [id]);
    mill.command(&format!("cancel {id}"), 0, &format!("{id} cancelled\n"));
    mill.command("purge --older-than 0s", 0, "1 purged\n");
    mill.command("get 00000000-0000-8000-8000-000000000000", 1, "00000000");
}
