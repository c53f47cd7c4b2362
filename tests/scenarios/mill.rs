//! A whole mill: `genmill up` with a provider stand-in, as a user would start it, and what happens when parts die.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test ends where something is not as it should be")]

use anyhow::{Context as _, bail};
use genmill_client::v1::watch_job_response::Event;
use genmill_client::{Client, Error, Reason, Request, Until, v1};
use genmill_tests::daemons::Daemon;
use genmill_tests::place::{MODEL, OTHER_MODEL, Place, check_all_succeeded_once, client, request, results, submit_all};
use genmill_tests::redis_cluster::RedisCluster;
use genmill_tests::redis_server::RedisServer;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio_stream::StreamExt as _;

/// How long a daemon may take to stop. Generous: test machines are shared.
const STOP_WITHIN: Duration = Duration::from_secs(30);

async fn refused(client: &Client, request: Request, reason: Reason, says: &str) {
    let error = client.submit(request).await.err().unwrap();
    let Error::Refused { reason: given, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*given, reason);
    assert!(error.to_string().contains(says), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_takes_a_job_from_submission_to_result() {
    let place = Place::new().await;
    let mut mill = place.up();
    let (code, out, _) = place.genmill(&mill, &["submit", "--model", MODEL, "--prompt", "!echo=Grüße an alle"]);
    assert_eq!((code, out.as_str()), (Some(0), "Grüße an alle\n"));

    let (code, out, _) = place.genmill(&mill, &["submit", "--model", MODEL, "--prompt", "!words=5", "--json"]);
    assert_eq!((code, out.lines().count()), (Some(0), 1));
    let job: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(job["state"], "JOB_STATE_SUCCEEDED");
    assert_eq!(job["result"]["text"], "word1 word2 word3 word4 word5");
    assert_eq!(job["result"]["usage"]["completion_tokens"], "5");
    assert!(job["cost"]["nanodollars"].as_str().is_some());

    let id = job["id"].as_str().unwrap();
    let (code, out, _) = place.genmill(&mill, &["get", id, "--json"]);
    assert_eq!(code, Some(0));
    assert_eq!(serde_json::from_str::<serde_json::Value>(&out).unwrap(), job);
    let (code, out, _) = place.genmill(&mill, &["watch", id]);
    assert_eq!((code, out.trim_end()), (Some(0), "word1 word2 word3 word4 word5"));
    let (code, out, _) = place.genmill(&mill, &["list", "--model", MODEL, "--json"]);
    assert_eq!((code, out.lines().count()), (Some(0), 2));

    let (code, _, error) = place.genmill(&mill, &["submit", "--model", MODEL, "--prompt", "!status=400"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("400"), "{error}");
    let (code, _, _) = place.genmill(&mill, &["submit", "--model", MODEL]);
    assert_eq!(code, Some(2));
    let unreachable = ["--server", "http://127.0.0.1:1", "list"];
    let (code, _, error) = place.genmill(&mill, &unreachable);
    assert_eq!(code, Some(3));
    assert!(error.contains("127.0.0.1:1"), "{error}");

    mill.signal(Signal::TERM).unwrap();
    assert!(mill.wait(STOP_WITHIN).unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_serve_is_refused_at_submission_with_what_to_do() {
    let place = Place::new().await;
    let mill = place.up();
    let client = client(&mill).await;
    let ask = |model: &str| Request::new(model).prompt("x");
    refused(&client, ask("gpt-4"), Reason::UnknownPrefix, "model names begin with vllm_").await;
    refused(&client, ask("litellm_gpt-4o-maxi"), Reason::ModelNotListed, "litellm_models.yaml").await;
    refused(&client, ask("litellm_groq/llama3-8b-8192"), Reason::KeyMissing, "set GROQ_API_KEY").await;
    refused(&client, ask("vllm_gone"), Reason::ModelUnavailable, "no/such/folder does not exist: set MODELS_DIR").await;
    refused(&client, request("x").temperature(9.0), Reason::InvalidRequest, "temperature").await;
    refused(&client, Request::new(MODEL), Reason::InvalidRequest, "prompt").await;
    refused(&client, request(&"x".repeat(3 << 20)), Reason::TooLarge, "1572864").await;
    assert!(client.is_available(MODEL).await.unwrap());
    let model = client.model("vllm_gone").await.unwrap();
    assert!(!model.available);
    assert!(model.unavailable_reason.contains("MODELS_DIR"), "{}", model.unavailable_reason);
    let names: Vec<String> = client.list_models().await.unwrap().into_iter().map(|model| model.name).collect();
    assert_eq!(names, ["litellm_gpt-4", MODEL, "litellm_groq/llama3-8b-8192", "vllm_gone"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn text_is_watched_as_it_comes_and_from_any_offset_afterwards() {
    let place = Place::new().await;
    let mill = place.up();
    let client = client(&mill).await;
    let job = client.submit(request("!slow-stream=60 !echo=Größe 1, Größe 2, Größe 3")).await.unwrap().job;
    let mut raw =
        v1::job_service_client::JobServiceClient::connect(format!("http://{}", mill.place("grpc"))).await.unwrap();
    let mut watch = async |epoch, offset| {
        let asked = v1::WatchJobRequest { job_id: job.id.clone(), epoch, offset, more_offsets: Vec::new() };
        let mut events = raw.watch_job(asked).await.unwrap().into_inner();
        let (mut text, mut pieces, mut last) = (String::new(), 0, None);
        while let Some(event) = events.next().await {
            match event.unwrap().event.unwrap() {
                Event::Text(delta) => {
                    assert_eq!(delta.offset, offset + u64::try_from(text.len()).unwrap());
                    text.push_str(&delta.text);
                    pieces += 1;
                }
                Event::Restarted(restarted) => panic!("{restarted:?}"),
                Event::Job(job) => last = Some(job),
            }
        }
        (text, pieces, last.unwrap())
    };
    let whole = "Größe 1, Größe 2, Größe 3";
    let (text, pieces, job) = watch(0, 0).await;
    assert_eq!(text, whole);
    assert!(pieces > 2, "the text came in {pieces} pieces");
    assert_eq!(job.result.unwrap().text, whole);
    assert_eq!(watch(0, 0).await.0, whole);
    assert_eq!(watch(1, 7).await.0, whole[7..]);
    let end = u64::try_from(whole.len()).unwrap();
    assert_eq!(watch(1, end).await.0, "");
    // Beyond the end, and inside a character.
    for offset in [end + 1, 3] {
        let asked = v1::WatchJobRequest { job_id: watch(1, 0).await.2.id, epoch: 1, offset, more_offsets: Vec::new() };
        let mut raw =
            v1::job_service_client::JobServiceClient::connect(format!("http://{}", mill.place("grpc"))).await.unwrap();
        let mut events = raw.watch_job(asked).await.unwrap().into_inner();
        let status = events.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passing_fault_of_the_provider_is_retried_and_a_lasting_one_is_not() {
    let place = Place::new().await;
    let mill = place.up();
    let client = client(&mill).await;
    for (prompt, attempts, state) in [
        ("!status=429 times=1 a", 2, v1::JobState::Succeeded),
        ("!status=500 times=2 b", 3, v1::JobState::Succeeded),
        ("!cut-after=2 times=1 c d e f", 2, v1::JobState::Succeeded),
        ("!status=503 g", 4, v1::JobState::Failed),
        ("!status=400 h", 1, v1::JobState::Failed),
        ("!status=401 i", 1, v1::JobState::Failed),
        ("!status=403 j", 1, v1::JobState::Failed),
        ("!status=404 k", 1, v1::JobState::Failed),
    ] {
        let id = client.submit(request(prompt)).await.unwrap().job.id;
        let mut events = Box::pin(client.watch(&id));
        while let Some(event) = events.next().await {
            event.unwrap();
        }
        let job = client.get(&id).await.unwrap();
        assert_eq!((job.attempts, job.state()), (attempts, state), "{prompt}");
        assert_eq!(job.error.is_some(), state == v1::JobState::Failed);
    }
    let slow = request("!sleep=30000 l").timeout(Duration::from_millis(200));
    let id = client.submit(slow).await.unwrap().job.id;
    client.watch(&id).map(Result::unwrap).collect::<Vec<_>>().await;
    let job = client.get(&id).await.unwrap();
    assert_eq!(job.error.unwrap().error_class(), v1::ErrorClass::Timeout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_run_is_submitted_once_however_often_it_is_sent() {
    let place = Place::new().await;
    let mill = place.up();
    let client = client(&mill).await;
    let requests = || -> Vec<Request> {
        (0..500).map(|n| request(&format!("!echo={n}")).experiment("bulk").request_id(format!("bulk-{n}"))).collect()
    };
    let ids = submit_all(&client, requests()).await;
    assert_eq!(submit_all(&client, requests()).await, ids);
    let jobs = results(&client, "bulk").await.unwrap();
    check_all_succeeded_once(&jobs, &ids);
    let filter = v1::JobFilter { experiment: "bulk".to_owned(), ..v1::JobFilter::default() };
    let listed: Vec<String> = client.list(filter).map(|job| job.unwrap().id).collect().await;
    assert!(listed.iter().rev().eq(ids.iter()), "the list is the order of submission, newest first");
    let other = request("!echo=other").request_id("bulk-0");
    refused(&client, other, Reason::RequestIdReused, &format!("{}, which differs in: input,experiment", ids[0])).await;
    assert_eq!(place.provider.bill().calls, 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_nobody_reads_on_holds_up_no_other_call() {
    let place = Place::new().await;
    let mill = place.up();
    let client = client(&mill).await;
    // Far more than a connection takes by default before somebody reads.
    let text = "w".repeat(4_000);
    let requests = (0..100).map(|n| request(&format!("!echo={n} {text}")).experiment("unread")).collect();
    let ids = submit_all(&client, requests).await;
    check_all_succeeded_once(&results(&client, "unread").await.unwrap(), &ids);
    let mut unread = Box::pin(client.watch_jobs(v1::JobFilter::default(), String::new(), Until::Dropped));
    unread.next().await.unwrap().unwrap();
    for id in &ids {
        let job = tokio::time::timeout(STOP_WITHIN, client.get(id)).await.expect("it waits for the watch").unwrap();
        assert_eq!(job.id, *id);
    }
    for _ in 1..ids.len() {
        unread.next().await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_small_items_may_be_sent_one_frame_each() {
    let place = Place::new().await;
    let mill = place.up();
    let mut raw =
        v1::job_service_client::JobServiceClient::connect(format!("http://{}", mill.place("grpc"))).await.unwrap();
    // A refused item costs no provider's time, and its acknowledgement is awaited like any other.
    let item = |n: u32| v1::SubmitJobsRequest { request: Some(Request::new("vllm_gone").prompt(n.to_string()).into()) };
    // Yielding between items sends each in a frame of its own, as other languages' clients do.
    let items = tokio_stream::iter(0..10_000_u32).then(move |n| async move {
        tokio::task::yield_now().await;
        item(n)
    });
    let answers: Vec<_> = raw.submit_jobs(items).await.unwrap().into_inner().collect().await;
    assert_eq!(answers.len(), 10_000);
    for (index, answer) in (0..).zip(answers) {
        assert_eq!(answer.unwrap().index, index);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn running_jobs_are_cancelled_within_a_heartbeat_and_waiting_ones_at_once() {
    let place = Place::new().await;
    let mill = place.up();
    let client = client(&mill).await;
    let requests: Vec<Request> = (0..40).map(|n| request(&format!("!sleep=60000 {n}")).experiment("long")).collect();
    let ids = submit_all(&client, requests).await;
    let running = async || {
        let filter = v1::JobFilter { state: v1::JobState::Running.into(), ..v1::JobFilter::default() };
        client.list(filter).collect::<Vec<_>>().await.len()
    };
    while running().await < 16 {
        tokio::task::yield_now().await;
    }
    let filter = v1::JobFilter { experiment: "long".to_owned(), ..v1::JobFilter::default() };
    let tally = client.cancel_all(filter).await.unwrap();
    assert_eq!((tally.cancelled, tally.cancelling), (24, 16));
    let jobs = results(&client, "long").await.unwrap();
    assert_eq!(jobs.len(), ids.len());
    assert!(jobs.iter().all(|job| job.state() == v1::JobState::Cancelled));
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_a_worker_loses_nothing_and_repeats_no_result() {
    let place = Place::new().await;
    let mill = place.up();
    let client = client(&mill).await;
    let second =
        place.start("genmill-worker-api").env("GENMILL__REDIS__URL", mill.place("redis")).until_ready().unwrap();
    let requests: Vec<Request> = (0..100).map(|n| request(&format!("!sleep=1000 {n}")).experiment("kill")).collect();
    let ids = submit_all(&client, requests).await;
    let mut finished = Box::pin(client.watch_jobs(
        v1::JobFilter { experiment: "kill".to_owned(), ..v1::JobFilter::default() },
        String::new(),
        Until::Idle,
    ));
    let mut jobs = Vec::new();
    for _ in 0..20 {
        jobs.push(finished.next().await.unwrap().unwrap().job);
    }
    second.signal(Signal::KILL).unwrap();
    while let Some(next) = finished.next().await {
        jobs.push(next.unwrap().job);
    }
    check_all_succeeded_once(&jobs, &ids);
    assert!(jobs.iter().any(|job| job.losses == 1), "the killed worker held jobs");
    assert!(jobs.iter().all(|job| job.failures == 0), "a lost worker never eats a job's retries");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_told_to_stop_hands_back_what_it_cannot_finish() {
    let place = Place::new().await;
    // Else both begin with fewer than they have places.
    std::fs::write(place.path().join("genmill.toml"), "[api]\ncalls_start = 64\n").unwrap();
    let mill = place.up();
    let client = client(&mill).await;
    let mut second = place
        .start("genmill-worker-api")
        .env("GENMILL__REDIS__URL", mill.place("redis"))
        .env("GENMILL__WORKER__DRAIN_TIMEOUT_MS", "300")
        .until_ready()
        .unwrap();
    let requests: Vec<Request> = (0..32).map(|n| request(&format!("!sleep=2500 {n}")).experiment("drain")).collect();
    let ids = submit_all(&client, requests).await;
    // Both workers have 16 places, so each holds some.
    while running_of(&client, "drain").await.unwrap() < 32 {
        tokio::task::yield_now().await;
    }
    second.signal(Signal::TERM).unwrap();
    assert!(second.wait(STOP_WITHIN).unwrap().success());
    let jobs = results(&client, "drain").await.unwrap();
    check_all_succeeded_once(&jobs, &ids);
    let handed_back = |job: &&v1::Job| job.attempt_history[0].outcome() == v1::AttemptOutcome::HandedBack;
    assert!(jobs.iter().filter(handed_back).count() > 0);
    assert!(jobs.iter().all(|job| job.losses == 0 && job.failures == 0));
}

async fn running_of(client: &Client, experiment: &str) -> anyhow::Result<usize> {
    let filter = v1::JobFilter {
        state: v1::JobState::Running.into(),
        experiment: experiment.to_owned(),
        ..v1::JobFilter::default()
    };
    let jobs: Vec<_> = client.list(filter).collect().await;
    if let Some(Err(error)) = jobs.iter().find(|job| job.is_err()) {
        bail!("cannot list: {error}");
    }
    Ok(jobs.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_up_leaves_no_orphan_and_the_next_up_goes_on() {
    let place = Place::new().await;
    let mut mill = place.up();
    let before = client(&mill).await;
    let requests: Vec<Request> = (0..60).map(|n| request(&format!("!sleep=300 {n}")).experiment("up")).collect();
    let ids = submit_all(&before, requests).await;

    let (code, out, error) = place.genmill(&mill, &["up", "--listen", "127.0.0.1:0"]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(error.contains("another `genmill up`"), "{error}");

    let children = children_of(mill.id()).unwrap();
    assert_eq!(children.len(), 4, "redis, scheduler and two workers");
    mill.signal(Signal::KILL).unwrap();
    mill.wait(STOP_WITHIN).unwrap();
    while children.iter().any(|child| is_alive(*child)) {
        tokio::task::yield_now().await;
    }
    let mill = place.up();
    let after = client(&mill).await;
    check_all_succeeded_once(&results(&after, "up").await.unwrap(), &ids);
}

/// The processes whose parent is `parent`.
fn children_of(parent: u32) -> anyhow::Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if stat(id).is_ok_and(|(_, its_parent)| its_parent == parent) {
            children.push(id);
        }
    }
    Ok(children)
}

/// State and parent of a process (proc(5): the fields behind the name in parentheses).
fn stat(id: u32) -> anyhow::Result<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a name in parentheses")?;
    let mut fields = fields.split_whitespace();
    let state = fields.next().and_then(|state| state.chars().next()).context("a state")?;
    Ok((state, fields.next().context("a parent")?.parse()?))
}

/// A zombie is dead; nobody has asked for its exit code yet.
fn is_alive(id: u32) -> bool {
    stat(id).is_ok_and(|(state, _)| state != 'Z')
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_is_refused_with_the_nearest_key() {
    let place = Place::new().await;
    std::fs::write(place.path().join("genmill.toml"), "[scheduler]\nlissten = \"x\"").unwrap();
    for daemon in ["genmill-scheduler", "genmill-worker-api", "genmill-worker-gpu"] {
        let output = place.start(daemon).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("did you mean `listen`?"), "{error}");
    }
    std::fs::write(place.path().join("genmill.toml"), "[providers.openai]\napi_key = \"hunter2\"").unwrap();
    for daemon in ["genmill-scheduler", "genmill-worker-api", "genmill-worker-gpu"] {
        let output = place.start(daemon).args(&["--check-config"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let shown = String::from_utf8(output.stdout).unwrap();
        assert!(shown.contains("[providers.openai]") && !shown.contains("hunter2"), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_ends_in_time_even_when_redis_is_gone() {
    let place = Place::new().await;
    let redis = RedisServer::start().unwrap();
    let scheduler = place
        .start("genmill-scheduler")
        .env("GENMILL__REDIS__URL", &redis.url())
        .env("GENMILL__SCHEDULER__LISTEN", "127.0.0.1:0")
        .until_ready()
        .unwrap();
    let mut worker = place
        .start("genmill-worker-api")
        .env("GENMILL__REDIS__URL", &redis.url())
        .env("GENMILL__WORKER__DRAIN_TIMEOUT_MS", "200")
        .until_ready()
        .unwrap();
    let client = client(&scheduler).await;
    client.submit(request("!sleep=60000").experiment("gone")).await.unwrap();
    while running_of(&client, "gone").await.unwrap() < 1 {
        tokio::task::yield_now().await;
    }
    drop(redis);
    worker.signal(Signal::TERM).unwrap();
    assert!(worker.wait(STOP_WITHIN).unwrap().success());
}

/// A mill on `cluster`, whose two lanes are on different nodes.
async fn up_on(cluster: &RedisCluster, place: &Place) -> Daemon {
    let options = genmill_queue::Options { url: cluster.url(), namespace: "genmill".to_owned() };
    let queue = genmill_queue::Queue::connect(&options).await.unwrap();
    let mut nodes = Vec::new();
    // The lanes take their numbers in this order; of the first three, the second and the third are on two nodes.
    for model in ["vllm_first", MODEL, OTHER_MODEL] {
        let lane = queue.open_lane(&genmill_core::model::ModelName::parse(model).unwrap().lane()).await.unwrap();
        nodes.push(cluster.slot_of(&format!("{{{}}}", lane.0)).unwrap().1);
    }
    assert_ne!(nodes[1], nodes[2]);
    let args = ["up", "--listen", "127.0.0.1:0", "--redis", &cluster.url()];
    let up = place.start("genmill").env("GROQ_API_KEY", "sk-test").env("GROQ_BASE_URL", &place.provider.base_url());
    up.args(&args).until_ready().unwrap()
}

/// Requests for both lanes and of three tenants.
fn for_both_lanes(experiment: &str, prompt: impl Fn(u32) -> String) -> Vec<Request> {
    let one = |n: u32| {
        let model = if n.is_multiple_of(2) { MODEL } else { OTHER_MODEL };
        let request = Request::new(model).prompt(prompt(n)).tenant(format!("tenant-{}", n % 3));
        request.experiment(experiment).request_id(format!("{experiment}-{n}"))
    };
    (0..60).map(one).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mill_works_on_a_cluster() {
    let place = Place::new().await;
    let cluster = RedisCluster::start().unwrap();
    let mut mill = up_on(&cluster, &place).await;
    assert_eq!(mill.place("redis"), cluster.url());
    let client = client(&mill).await;
    for model in [MODEL, OTHER_MODEL] {
        let request = Request::new(model).prompt("!slow-stream=150 !echo=Größe 1, Größe 2, Größe 3");
        let id = client.submit(request).await.unwrap().job.id;
        let events: Vec<_> = client.watch(&id).map(Result::unwrap).collect().await;
        // More than all text at once and the job.
        assert!(events.len() > 2, "the text came in {} events", events.len());
        assert_eq!(client.get(&id).await.unwrap().result.unwrap().text, "Größe 1, Größe 2, Größe 3");
    }
    let requests = || for_both_lanes("bulk", |n| format!("!echo={n}"));
    let ids = submit_all(&client, requests()).await;
    assert_eq!(submit_all(&client, requests()).await, ids);
    check_all_succeeded_once(&results(&client, "bulk").await.unwrap(), &ids);
    let filter = v1::JobFilter { experiment: "bulk".to_owned(), ..v1::JobFilter::default() };
    let listed: BTreeSet<String> = client.list(filter).map(|job| job.unwrap().id).collect().await;
    assert_eq!(listed, ids.into_iter().collect());
    mill.signal(Signal::TERM).unwrap();
    assert!(mill.wait(STOP_WITHIN).unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn all_jobs_end_when_a_node_of_a_cluster_dies_and_comes_back() {
    let place = Place::new().await;
    let mut cluster = RedisCluster::start().unwrap();
    let mill = up_on(&cluster, &place).await;
    let client = client(&mill).await;
    let ids = submit_all(&client, for_both_lanes("node", |n| format!("!sleep=1000 {n}"))).await;
    let filter = v1::JobFilter { experiment: "node".to_owned(), ..v1::JobFilter::default() };
    let mut finished = Box::pin(client.watch_jobs(filter, String::new(), Until::Idle));
    let mut jobs = vec![finished.next().await.unwrap().unwrap().job];
    for away in 0..cluster.nodes().len() {
        cluster.kill(away).unwrap();
        tokio::task::block_in_place(|| cluster.restart(away)).unwrap();
    }
    while let Some(next) = finished.next().await {
        jobs.push(next.unwrap().job);
    }
    check_all_succeeded_once(&jobs, &ids);
}
