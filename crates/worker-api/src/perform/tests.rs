//! The performer against the stand-in, over HTTP.

use super::*;
use crate::fixture::{messages, spec};
use crate::providers::Table;
use genmill_core::attempt::{FinishReason, Generation};
use genmill_core::gate::{KeyId, Signal};
use genmill_core::ids::{Epoch, JobId, LaneNumber};
use genmill_core::request::Role;
use genmill_daemon::environment::Environment;
use genmill_daemon::models::{ListedModel, LocalSettings};
use genmill_standin::{BAD_KEY, Options, Standin};
use genmill_worker::perform::Started;
use std::path::PathBuf;
use tokio::sync::mpsc;

const LIMITS: Limits = Limits { calls_max: 4, unsupported: Unsupported::Refuse };

/// A performer whose provider `openai` is the stand-in.
struct Bench {
    standin: Standin,
    performer: Performer,
}

impl Bench {
    async fn new(key: &str) -> Self {
        let standin = Standin::start(Options::default()).await.unwrap();
        let performer = performer(&standin.base_url(), key, |_| ());
        Self { standin, performer }
    }

    async fn perform(&self, spec: JobSpec) -> (Performed, String) {
        perform(&self.performer, spec, CancellationToken::new()).await
    }
}

fn performer(base_url: &str, key: &str, change: impl Fn(&mut Endpoint)) -> Performer {
    performer_of("gpt-4o-mini", &format!("openai = {{ base_url = '{base_url}', api_key = '{key}' }}"), LIMITS, change)
}

/// A performer of one model, with these settings of providers.
fn performer_of(name: &str, settings: &str, limits: Limits, change: impl Fn(&mut Endpoint)) -> Performer {
    genmill_daemon::tls::install();
    let model = ListedModel {
        prefix: "litellm",
        name: name.to_owned(),
        path: None,
        tokenizer: None,
        description: String::new(),
        context_tokens: None,
        threads: None,
        device: None,
        local: LocalSettings::default(),
        file: PathBuf::new(),
    };
    let settings = toml::from_str(settings).unwrap();
    let table = Table::embedded().unwrap();
    let mut catalog = Catalog::new(&[model], &table, &settings, &Environment::default()).unwrap();
    catalog.endpoints.values_mut().for_each(change);
    let http = Http::new(Duration::from_secs(5)).unwrap();
    Performer::new(catalog, Prices::embedded().unwrap(), http, limits)
}

/// Performs one job and returns what came of it, and the text that was reported.
async fn perform(performer: &Performer, spec: JobSpec, stop: CancellationToken) -> (Performed, String) {
    perform_with(performer, spec, None, stop).await
}

/// The same with a key.
async fn perform_with(
    performer: &Performer,
    spec: JobSpec,
    key: Option<KeyId>,
    stop: CancellationToken,
) -> (Performed, String) {
    let task = Task { id: JobId::new(UnixMs(1), LaneNumber(1), 1), epoch: Epoch(1), spec, key };
    let (report, mut reported) = mpsc::channel(1);
    let progress = Progress::new(&task, Started::default(), report);
    let listen = async {
        let mut text = String::new();
        while let Some(piece) = reported.recv().await {
            text.push_str(&piece.text);
        }
        text
    };
    tokio::join!(performer.perform(task, progress, stop), listen)
}

fn job(prompt: &str) -> JobSpec {
    spec("litellm_gpt-4o-mini", prompt)
}

fn generation(performed: Performed) -> Generation {
    let Outcome::Generated(generation) = performed.outcome else { panic!("{performed:?}") };
    generation
}

/// What a failed attempt tells: its class, and whether it is known to have cost nothing.
async fn check_failure(prompt: &str, class: FailureClass, free: bool, says: &str) -> Failure {
    let bench = Bench::new("sk-a").await;
    let (performed, _) = bench.perform(job(prompt)).await;
    assert_eq!(bench.standin.bill().calls, 1, "one attempt is one call");
    assert_eq!(performed.cost == Some(Picodollars(0)), free, "{performed:?}");
    let Outcome::Failed(failure) = performed.outcome else { panic!("{performed:?}") };
    assert_eq!(failure.class, class, "{failure:?}");
    assert!(failure.message.contains(says), "{failure:?}");
    failure
}

#[tokio::test]
async fn a_streamed_answer_is_reported_counted_and_priced() {
    let bench = Bench::new("sk-a").await;
    let mut spec = job("");
    spec.input = messages(&[(Role::System, "be brief"), (Role::User, "one two three")]);
    let (performed, reported) = bench.perform(spec).await;
    // 5 and 3 tokens at $0.15 and $0.60 per million.
    assert_eq!(performed.cost, Some(Picodollars(5 * 150_000 + 3 * 600_000)));
    let generation = generation(performed);
    assert_eq!((generation.text.as_str(), reported.as_str()), ("one two three", "one two three"));
    assert_eq!(generation.finish_reason, FinishReason::Stop);
    assert_eq!(generation.usage, Some(Usage { prompt_tokens: 5, cached_prompt_tokens: 0, completion_tokens: 3 }));
    assert!(generation.first_token_ms.is_some());
    assert_eq!(generation.determinism, Some(Determinism::Seeded));
    let body = &bench.standin.requests()[0].body;
    assert_eq!((&body["stream"], &body["seed"], &body["model"]), (&true.into(), &7.into(), &"gpt-4o-mini".into()));
}

#[tokio::test]
async fn a_whole_answer_is_read_where_a_provider_does_not_stream() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let performer = performer(&standin.base_url(), "sk-a", |endpoint| endpoint.provider.streaming = false);
    let (performed, reported) = perform(&performer, job("one two"), CancellationToken::new()).await;
    assert_eq!(generation(performed).text, "one two");
    assert_eq!(reported, "one two");
    assert_eq!(standin.requests()[0].body.get("stream"), None);
}

#[tokio::test]
async fn an_answer_of_a_provider_that_takes_no_seed_cannot_be_had_again() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let performer = performer(&standin.base_url(), "sk-a", |endpoint| endpoint.provider.drop.push("seed".to_owned()));
    let (performed, _) = perform(&performer, job("one two"), CancellationToken::new()).await;
    assert_eq!(generation(performed).determinism, Some(Determinism::None));
    assert_eq!(standin.requests()[0].body.get("seed"), None);
}

#[tokio::test]
async fn comments_and_odd_borders_do_not_matter() {
    let bench = Bench::new("sk-a").await;
    let (performed, reported) = bench.perform(job("!split-utf8 !comments !echo=grüße 世界 🦀")).await;
    assert_eq!(reported, "grüße 世界 🦀");
    assert_eq!(generation(performed).text, "grüße 世界 🦀");
}

#[tokio::test]
async fn bounds_and_stop_strings_are_kept() {
    let bench = Bench::new("sk-a").await;
    let mut short = job("!words=9");
    short.sampling.max_tokens = 2;
    assert_eq!(generation(bench.perform(short).await.0).finish_reason, FinishReason::Length);
    // The fifth stop string is not sent: it is the worker that keeps it.
    let mut stopped = job("!words=9");
    stopped.sampling.stop = ["q", "w", "x", "y", " word3"].map(str::to_owned).to_vec();
    stopped.sampling.stop[1] = "word9".to_owned();
    let (performed, reported) = bench.perform(stopped).await;
    let generation = generation(performed);
    assert_eq!((generation.text.as_str(), reported.as_str()), ("word1 word2", "word1 word2"));
    assert_eq!(generation.finish_reason, FinishReason::Stop);
}

#[tokio::test]
async fn the_providers_own_figure_is_the_cost() {
    let bench = Bench::new("sk-a").await;
    let (performed, _) = bench.perform(job("!cost=0.00001234 !words=3")).await;
    assert_eq!(performed.cost, Some(Picodollars(12_340_000)));
    let (unknown, _) = bench.perform(spec("litellm_no-such-price", "hi")).await;
    assert_eq!(unknown.cost, None);
    let (uncounted, _) = bench.perform(job("!no-usage hi")).await;
    assert_eq!(uncounted.cost, None);
}

#[tokio::test]
async fn a_refusal_is_classified_and_costs_nothing() {
    let wait = check_failure("!status=429 retry-after=1.5", FailureClass::Throttled, true, "openai answered 429").await;
    assert_eq!(wait.retry_after_ms, Some(1_500));
    check_failure("!status=429 code=insufficient_quota", FailureClass::Auth, true, "billing").await;
    check_failure("!status=500", FailureClass::Transient, true, "openai answered 500").await;
    check_failure("!status=503 retry-after-ms=20", FailureClass::Transient, true, "503").await;
    check_failure("!status=529", FailureClass::Throttled, true, "529").await;
    check_failure("!status=400", FailureClass::Invalid, true, "400").await;
    check_failure("!status=403", FailureClass::Auth, true, "403").await;
    check_failure("!status=404", FailureClass::NotFound, true, "404").await;
}

#[tokio::test]
async fn a_refused_key_is_told_but_not_repeated() {
    let bench = Bench::new(BAD_KEY).await;
    let (performed, _) = bench.perform(job("hi")).await;
    let Outcome::Failed(failure) = performed.outcome else { panic!() };
    assert_eq!(failure.class, FailureClass::Auth);
    assert!(!failure.message.contains(BAD_KEY), "{failure:?}");
}

#[tokio::test]
async fn a_broken_answer_may_be_tried_again_and_its_cost_is_unknown() {
    check_failure("!cut-after=5", FailureClass::Transient, false, "openai").await;
    check_failure("!garbage", FailureClass::Transient, false, "not a chat completion").await;
    check_failure("!html", FailureClass::Transient, false, "web page").await;
    check_failure("!error-after=2", FailureClass::Transient, false, "It broke.").await;
}

#[tokio::test]
async fn a_later_try_of_the_same_job_gets_the_answer() {
    let bench = Bench::new("sk-a").await;
    let prompt = "!cut-after=2 times=1 !words=4";
    assert!(matches!(bench.perform(job(prompt)).await.0.outcome, Outcome::Failed(_)));
    assert_eq!(generation(bench.perform(job(prompt)).await.0).text, "word1 word2 word3 word4");
}

#[tokio::test]
async fn a_stream_without_done_is_whole_once_it_told_why_it_ended() {
    let bench = Bench::new("sk-a").await;
    assert_eq!(generation(bench.perform(job("!no-done hi")).await.0).text, "hi");
}

#[tokio::test]
async fn a_call_ends_when_told_to_stop() {
    let bench = Bench::new("sk-a").await;
    for prompt in ["!sleep=60000", "!first-byte=60000", "!stall-after=3"] {
        let stop = CancellationToken::new();
        let told = stop.clone();
        let wait_then_tell = async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            told.cancel();
        };
        let ((performed, _), ()) = tokio::join!(perform(&bench.performer, job(prompt), stop), wait_then_tell);
        assert_eq!((performed.outcome, performed.cost), (Outcome::HandedBack, None), "{prompt}");
        let told = performed.observation.map(|told| told.signal);
        assert_eq!(told, Some(Signal::GivenUp), "a call was made, and given up");
    }
}

#[tokio::test]
async fn a_provider_that_is_not_there_is_a_passing_fault() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = listener.local_addr().unwrap();
    drop(listener);
    let performer = performer(&format!("http://{closed}/v1"), "sk-a", |_| ());
    let (performed, _) = perform(&performer, job("hi"), CancellationToken::new()).await;
    assert_eq!(performed.cost, Some(Picodollars(0)));
    let Outcome::Failed(failure) = performed.outcome else { panic!() };
    assert_eq!(failure.class, FailureClass::Transient);
    assert!(failure.message.starts_with("openai: cannot connect to 127.0.0.1: "), "{failure:?}");
}

#[tokio::test]
async fn only_lanes_with_a_key_are_offered() {
    let bench = Bench::new("sk-a").await;
    let offers = bench.performer.offers();
    assert_eq!(offers.len(), 1);
    assert_eq!((offers[0].lane.to_string().as_str(), offers[0].capacity), ("litellm:openai", 4));
    let bare = performer(&bench.standin.base_url(), "", |_| ());
    assert_eq!((bare.offers().len(), bare.models().len()), (0, 1));
}

/// A model of each dialect that the stand-in speaks, and the settings by which it is reached there.
fn spoken(standin: &Standin, key: &str) -> [(&'static str, String); 3] {
    let origin = standin.origin();
    let at = |provider: &str, path: &str| format!("{provider} = {{ base_url = '{origin}{path}', api_key = '{key}' }}");
    [
        ("gpt-4o-mini", at("openai", "/v1")),
        ("claude-haiku-4-5", at("anthropic", "")),
        ("gemini-2.5-flash", at("gemini", "/v1beta")),
    ]
}

/// What becomes of a prompt in each dialect.
async fn in_every_dialect(key: &str, prompt: &str, check: impl Fn(&str, Performed, String)) {
    let standin = Standin::start(Options::default()).await.unwrap();
    for (name, settings) in spoken(&standin, key) {
        for streaming in [true, false] {
            let set = |endpoint: &mut Endpoint| endpoint.provider.streaming = streaming;
            let performer = performer_of(name, &settings, LIMITS, set);
            let job = spec(&format!("litellm_{name}"), prompt);
            let (performed, reported) = perform(&performer, job, CancellationToken::new()).await;
            check(&format!("{name}, streaming: {streaming}"), performed, reported);
        }
    }
}

#[tokio::test]
async fn every_dialect_answers_counts_and_prices() {
    in_every_dialect("sk-a", "!split-utf8 !comments !echo=grüße 世界 🦀", |case, performed, reported| {
        assert!(performed.cost.is_some_and(|cost| cost > Picodollars(0)), "{case}: {performed:?}");
        let generation = generation(performed);
        assert_eq!((generation.text.as_str(), reported.as_str()), ("grüße 世界 🦀", "grüße 世界 🦀"), "{case}");
        assert_eq!(generation.finish_reason, FinishReason::Stop, "{case}");
        assert_eq!(generation.usage.map(|usage| usage.completion_tokens), Some(3), "{case}");
        let left_out: &[&str] = if case.starts_with("claude") { &["seed"] } else { &[] };
        assert_eq!(generation.left_out, left_out, "{case}");
    })
    .await;
}

#[tokio::test]
async fn every_dialect_tells_what_went_wrong() {
    let class = |prompt: &'static str, key: &'static str, expect: FailureClass| {
        in_every_dialect(key, prompt, move |case, performed, _| {
            let Outcome::Failed(failure) = performed.outcome else { panic!("{case}, {prompt}: {performed:?}") };
            assert_eq!(failure.class, expect, "{case}, {prompt}: {failure:?}");
            assert!(!failure.message.contains(BAD_KEY), "{case}: {failure:?}");
        })
    };
    class("hi", BAD_KEY, FailureClass::Auth).await;
    class("!status=429 retry-after=1", "sk-a", FailureClass::Throttled).await;
    class("!status=500", "sk-a", FailureClass::Transient).await;
    class("!status=529", "sk-a", FailureClass::Throttled).await;
    class("!status=400", "sk-a", FailureClass::Invalid).await;
    class("!cut-after=1 a b c", "sk-a", FailureClass::Transient).await;
    class("!error-after=1 a b c", "sk-a", FailureClass::Transient).await;
    class("!garbage", "sk-a", FailureClass::Transient).await;
}

#[tokio::test]
async fn a_parameter_that_a_provider_does_not_take_fails_the_job_or_is_left_out() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let [_, (name, settings), _] = spoken(&standin, "sk-a");
    let job = || {
        let mut job = spec("litellm_claude-haiku-4-5", "hi");
        job.sampling.controls.frequency_penalty = Some(0.5);
        job
    };
    let refusing = performer_of(name, &settings, LIMITS, |_| ());
    let (performed, _) = perform(&refusing, job(), CancellationToken::new()).await;
    let Outcome::Failed(failure) = performed.outcome else { panic!() };
    assert_eq!((failure.class, performed.cost), (FailureClass::Invalid, Some(Picodollars(0))));
    assert!(failure.message.contains("does not take frequency_penalty for claude-haiku-4-5"), "{failure:?}");
    assert_eq!(standin.bill().calls, 0);
    let leaving_out = Limits { unsupported: Unsupported::LeaveOut, ..LIMITS };
    let performer = performer_of(name, &settings, leaving_out, |_| ());
    let (performed, _) = perform(&performer, job(), CancellationToken::new()).await;
    assert_eq!(generation(performed).left_out, ["seed", "frequency_penalty"]);
}

#[tokio::test]
async fn a_job_is_called_with_the_key_of_its_permit() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = format!(
        "openai = {{ base_url = '{}', api_key = 'sk-a', api_keys = ['sk-b', 'sk-a', ''] }}",
        standin.base_url()
    );
    let row = |provider: &str, model: Option<&str>| config::Limit {
        provider: provider.to_owned(),
        model: model.map(str::to_owned),
        requests_per_minute: Some(3),
        tokens_per_minute: None,
        concurrency: None,
    };
    let rows =
        vec![row("openai", Some("gpt-4o-mini")), row("openai", None), row("openai", Some("o1")), row("groq", None)];
    let performer = performer_of("gpt-4o-mini", &settings, LIMITS, |_| ()).within(7, rows);
    let spec = job("a");
    let declared = performer.declares(&spec.model.lane()).unwrap();
    assert_eq!((declared.keys.len(), declared.start), (2, 7));
    let models: Vec<&str> = declared.limits.iter().map(|limit| limit.model.as_str()).collect();
    assert_eq!(
        models,
        ["litellm_gpt-4o-mini", ""],
        "those of other lanes and of models that are not listed are left out"
    );
    for (key, secret) in declared.keys.iter().zip(["sk-a", "sk-b"]) {
        assert!(!key.as_str().contains(secret));
        perform_with(&performer, spec.clone(), Some(key.clone()), CancellationToken::new()).await;
        assert_eq!(standin.calls().last().unwrap().key, secret);
    }
}

#[tokio::test]
async fn a_call_tells_of_its_providers_limits() {
    let bench = Bench::new("sk-a").await;
    for (prompt, signal, retry_after_ms, used_tokens) in [
        ("one two three", Signal::Answered, None, Some(6)),
        ("!status=429 retry-after=1.5 a", Signal::Throttled, Some(1_500), Some(0)),
        ("!status=503 a", Signal::Overloaded, None, Some(0)),
        ("!status=400 a", Signal::Answered, None, Some(0)),
        ("!cut-after=2 a b c", Signal::Overloaded, None, None),
    ] {
        let (performed, _) = bench.perform(job(prompt)).await;
        let told = performed.observation.unwrap();
        assert_eq!(
            (told.signal, told.retry_after_ms, told.used_tokens),
            (signal, retry_after_ms, used_tokens),
            "{prompt}"
        );
    }
}
