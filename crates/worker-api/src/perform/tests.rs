//! The performer against the stand-in, over HTTP.

use super::*;
use crate::auth::google;
use crate::fallbacks::Fallbacks;
use crate::fixture::{messages, spec, with_images};
use crate::http::Settings;
use crate::providers::Table;
use genmill_core::attempt::{FinishReason, Generation, Usage};
use genmill_core::gate::{KeyId, Signal};
use genmill_core::ids::{Epoch, LaneNumber};
use genmill_core::job::JobSpec;
use genmill_core::model::ModelName;
use genmill_core::money::Picodollars;
use genmill_core::request::Role;
use genmill_daemon::config;
use genmill_daemon::environment::Environment;
use genmill_daemon::models::{ListedModel, LocalSettings};
use genmill_standin::{BAD_KEY, Options, Standin};
use genmill_worker::perform::Started;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;

const LIMITS: Limits =
    Limits { calls_max: 4, unsupported: Unsupported::Refuse, batches: true, first_byte: None, idle: None };

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
    performer_in(name, settings, &[], limits, change)
}

/// A performer of one model, with these settings of providers and these variables.
fn performer_in(
    name: &str,
    settings: &str,
    variables: &[(&str, String)],
    limits: Limits,
    change: impl Fn(&mut Endpoint),
) -> Performer {
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
    let environment: Environment = variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    let table = Table::embedded().unwrap();
    let mut catalog = Catalog::new(&[model], &table, &settings, &environment).unwrap();
    catalog.endpoints.values_mut().for_each(change);
    let http = Http::new(&Settings { connect_timeout: Duration::from_secs(5), proxy: None, ca_file: None }).unwrap();
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
    let task = Task { id: JobId::new(UnixMs(1), LaneNumber(1), 1), epoch: Epoch(1), spec: spec.into(), key };
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
    assert_eq!(performed.cost == Some(Cost::NOTHING), free, "{performed:?}");
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
    assert_eq!(performed.cost, Some(Cost::exact(Picodollars(5 * 150_000 + 3 * 600_000))));
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
async fn a_wrong_content_type_does_not_matter() {
    let standin = Standin::start(Options::default()).await.unwrap();
    for streaming in [true, false] {
        let performer = performer(&standin.base_url(), "sk-a", |endpoint| endpoint.provider.streaming = streaming);
        for kind in ["text/plain", "application/octet-stream", "text/event-stream", "application/json"] {
            let job = job(&format!("!words=2 type={kind}"));
            let (performed, _) = perform(&performer, job, CancellationToken::new()).await;
            assert_eq!(generation(performed).text, "word1 word2", "{kind} {streaming}");
        }
    }
    // What was asked for as a stream may come whole.
    let whole = Bench::new("sk-a").await.perform(job("!whole type=text/plain !words=2")).await.0;
    assert_eq!(generation(whole).text, "word1 word2");
}

#[tokio::test]
async fn a_long_answer_is_read_and_an_endless_one_is_not() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let performer = performer(&standin.base_url(), "sk-a", |endpoint| endpoint.provider.streaming = false);
    let mut long = job("!words=1000000");
    long.sampling.max_tokens = 1_000_000;
    let (performed, _) = perform(&performer, long, CancellationToken::new()).await;
    assert!(generation(performed).text.len() > 10_000_000);
    let mut endless = job("!words=3000000");
    endless.sampling.max_tokens = 3_000_000;
    let (performed, _) = perform(&performer, endless, CancellationToken::new()).await;
    let Outcome::Failed(failure) = performed.outcome else { panic!() };
    assert!(failure.class == FailureClass::Invalid && failure.message.contains("32 MiB"), "{failure:?}");
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
    assert_eq!(performed.cost, Some(Cost::exact(Picodollars(12_340_000))));
    let (unknown, _) = bench.perform(spec("litellm_no-such-price", "hi")).await;
    assert_eq!(unknown.cost, None);
    let (uncounted, _) = bench.perform(job("!no-usage hi")).await;
    assert_eq!(uncounted.cost, None);
}

#[tokio::test]
async fn a_refusal_is_classified_and_costs_nothing() {
    let wait = check_failure(
        "!status=429 retry-after=1.5",
        FailureClass::Throttled,
        true,
        "openai asked to slow down (HTTP 429",
    )
    .await;
    assert_eq!(wait.retry_after_ms, Some(1_500));
    for wait in ["header=x-ratelimit-reset-tokens:2.5s", "message=Please_try_again_in_2.5s.", "retry-after-ms=2500"] {
        let wait = check_failure(&format!("!status=429 {wait}"), FailureClass::Throttled, true, "slow down").await;
        assert_eq!(wait.retry_after_ms, Some(2_500));
    }
    check_failure("!status=429 code=insufficient_quota", FailureClass::Quota, true, "billing").await;
    let long = "!status=400 code=context_length_exceeded";
    check_failure(long, FailureClass::ContextOverflow, true, "shorten the prompt").await;
    check_failure("!status=400 code=content_filter", FailureClass::ContentFilter, true, "change the prompt").await;
    let never = "!status=503 header=x-should-retry:false";
    check_failure(never, FailureClass::Invalid, true, "asks not to be called again").await;
    check_failure("!status=500", FailureClass::Transient, true, "openai failed (HTTP 500").await;
    check_failure("!status=503 retry-after-ms=20", FailureClass::Transient, true, "503").await;
    check_failure("!status=529", FailureClass::Overloaded, true, "529").await;
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
async fn a_broken_answer_may_be_tried_again_and_its_cost_is_no_exact_one() {
    check_failure("!cut-after=5", FailureClass::CutStream, false, "openai").await;
    check_failure("!garbage", FailureClass::Transient, false, "not a chat completion").await;
    check_failure("!html", FailureClass::Transient, false, "web page").await;
    check_failure("!error-after=2", FailureClass::Transient, false, "It broke.").await;
}

/// A performer of the stand-in with these limits, and what becomes of a job with this prompt.
async fn limited(limits: Limits, prompt: &str) -> Performed {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = format!("openai = {{ base_url = '{}', api_key = 'sk-a' }}", standin.base_url());
    let performer = performer_of("gpt-4o-mini", &settings, limits, |_| ());
    perform(&performer, job(prompt), CancellationToken::new()).await.0
}

#[tokio::test]
async fn each_part_of_an_answer_has_a_limit_of_its_own() {
    let first = Limits { first_byte: Some(Duration::from_millis(50)), ..LIMITS };
    let idle = Limits { idle: Some(Duration::from_millis(50)), ..LIMITS };
    for (limits, prompt, says) in [
        (first, "!sleep=60000", "sent nothing for 0.05 s (api.first_byte_timeout_ms)"),
        (first, "!first-byte=60000", "sent nothing for 0.05 s"),
        (idle, "!stall-after=2 !words=4", "sent nothing more for 0.05 s (api.idle_timeout_ms)"),
    ] {
        let performed = limited(limits, prompt).await;
        assert!(performed.cost.is_some_and(|cost| cost.estimated), "{prompt}: what was written is billed");
        let Outcome::Failed(failure) = performed.outcome else { panic!("{prompt}: {performed:?}") };
        assert_eq!(failure.class, FailureClass::Timeout, "{failure:?}");
        assert!(failure.message.contains(says), "{failure:?}");
    }
    // Each piece begins the time anew.
    let patient = Limits { idle: Some(Duration::from_secs(20)), ..LIMITS };
    assert_eq!(generation(limited(patient, "!slow-stream=5 !words=4").await).text, "word1 word2 word3 word4");
}

#[tokio::test]
async fn a_failure_that_comes_again_and_again_to_the_same_job_ends_it() {
    let bench = Bench::new("sk-a").await;
    for is_retried in [true, true, false] {
        let (performed, _) = bench.perform(job("!error-after=1 a b")).await;
        let Outcome::Failed(failure) = performed.outcome else { panic!("{performed:?}") };
        assert_eq!((failure.class, failure.is_retried()), (FailureClass::Transient, is_retried));
    }
}

#[tokio::test]
async fn a_broken_answer_costs_what_its_providers_record_says() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = format!("openrouter = {{ base_url = '{}', api_key = 'sk-a' }}", standin.base_url());
    let performer = performer_of("openrouter/x/y", &settings, LIMITS, |_| ());
    let broken = |prompt: &'static str, stop: CancellationToken| {
        perform(&performer, spec("litellm_openrouter/x/y", prompt), stop)
    };
    let (cut, _) = broken("!cut-after=2 !cost=0.00001234 a b c", CancellationToken::new()).await;
    assert!(matches!(cut.outcome, Outcome::Failed(_)), "{cut:?}");
    assert_eq!(cut.cost, Some(Cost::exact(Picodollars(12_340_000))));
    // Also of a call that was told to stop in the middle of its answer.
    let stop = CancellationToken::new();
    let begun = async {
        while standin.bill().completion_tokens < 4 {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    let ((stopped, _), ()) = tokio::join!(broken("!stall-after=2 !cost=0.5 a b c", stop.clone()), begun);
    assert_eq!((stopped.outcome, stopped.cost), (Outcome::HandedBack, Some(Cost::exact(Picodollars(500_000_000_000)))));
    // An answer that came whole is not held up by looking for what it did not tell.
    let asked = standin.records_asked();
    let (whole, _) = broken("a b c", CancellationToken::new()).await;
    assert_eq!((whole.cost, generation(whole).text.as_str()), (None, "a b c"));
    assert_eq!(standin.records_asked(), asked);
    // What no record tells stays unknown, and what is only estimated is told as such.
    let (lost, _) = broken("!cut-after=2 word word", CancellationToken::new()).await;
    assert_eq!(lost.cost, None);
    let Outcome::Failed(failure) = lost.outcome else { panic!() };
    assert!(
        failure.message.contains("about 3 tokens had come by then (estimated), and what they cost is"),
        "{failure:?}"
    );
}

#[tokio::test]
async fn a_broken_answer_without_a_record_costs_about_what_had_come() {
    let prompt = "!cut-after=2 !echo=word word word";
    let (input, output) = (prompt.len().div_ceil(4) as u128, "word word ".len().div_ceil(4) as u128);
    let (performed, reported) = Bench::new("sk-a").await.perform(job(prompt)).await;
    assert_eq!(reported, "word word ");
    assert_eq!(performed.cost, Some(Cost::estimated(Picodollars(input * 150_000 + output * 600_000))));
    // What was told of it counts: this dialect tells the tokens of the prompt first.
    let standin = Standin::start(Options::default()).await.unwrap();
    let (name, settings, _) = spoken(&standin, "sk-a").swap_remove(1);
    let performer = performer_of(name, &settings, LIMITS, |_| ());
    let spec = spec("litellm_claude-haiku-4-5", prompt);
    let (performed, _) = perform(&performer, spec, CancellationToken::new()).await;
    let billed = standin.bill();
    let told = u128::from(billed.prompt_tokens) * 1_000_000 + output * 5_000_000;
    assert_eq!(performed.cost, Some(Cost::estimated(Picodollars(told))), "{billed:?}");
}

/// What becomes of a job whose model has a fallback, and how many calls that took. Both are the stand-in; what the
/// model's name says of misbehaving concerns itself alone.
async fn with_fallback(model: &str, prompt: &str, on: Option<&str>) -> (Performed, String, u64) {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = format!("openai = {{ base_url = '{}', api_key = 'sk-a' }}", standin.base_url());
    let model = format!("litellm_openai/{model}");
    let fallback = config::Fallback {
        model: model.clone(),
        to: vec!["openrouter_nobody/serves".to_owned(), "litellm_gpt-4o-mini".to_owned()],
        on: on.map(|kind| vec![kind.to_owned()]),
    };
    let performer = performer_of("gpt-4o-mini", &settings, LIMITS, |_| ());
    let performer = performer.with_fallbacks(Fallbacks::new(&[fallback]).unwrap());
    let (performed, reported) = perform(&performer, spec(&model, prompt), CancellationToken::new()).await;
    (performed, reported, standin.bill().calls)
}

#[tokio::test]
async fn another_model_answers_in_place_of_one_that_fails_which_the_result_tells() {
    for model in ["x!status=529", "x!status=429,retry-after=60", "missing", "x!garbage", "x!status=402"] {
        let (performed, reported, calls) = with_fallback(model, "one two", None).await;
        let generation = generation(performed);
        assert_eq!((generation.text.as_str(), reported.as_str(), calls), ("one two", "one two", 2), "{model}");
        assert_eq!(generation.answered_by.map(|model| model.to_string()).as_deref(), Some("litellm_gpt-4o-mini"));
    }
    let (performed, _, calls) = with_fallback("x", "one two", None).await;
    assert_eq!((generation(performed).answered_by, calls), (None, 1));
}

#[tokio::test]
async fn no_other_model_answers_where_it_would_not_help_or_something_was_shown() {
    for (model, on, calls) in
        [("x!status=400", None, 1), ("x!cut-after=2", None, 1), ("x!status=529", Some("quota"), 1)]
    {
        let (performed, _, called) = with_fallback(model, "a b c", on).await;
        assert!(matches!(performed.outcome, Outcome::Failed(_)), "{model}: {performed:?}");
        assert_eq!(called, calls, "{model}");
    }
    let (performed, _, _) = with_fallback("x!status=400", "a b c", Some("invalid")).await;
    assert_eq!(generation(performed).text, "a b c");
}

#[tokio::test]
async fn however_a_fallback_fails_those_behind_it_are_asked() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = format!("openai = {{ base_url = '{}', api_key = 'sk-a' }}", standin.base_url());
    let to = ["litellm_x!status=400", "litellm_missing", "litellm_gpt-4o-mini"].map(str::to_owned).to_vec();
    let fallback = config::Fallback { model: "litellm_x!status=529".to_owned(), to, on: None };
    let performer = performer_of("gpt-4o-mini", &settings, LIMITS, |_| ());
    let performer = performer.with_fallbacks(Fallbacks::new(&[fallback]).unwrap());
    let (performed, _) = perform(&performer, spec("litellm_x!status=529", "a b"), CancellationToken::new()).await;
    let answered_by = generation(performed).answered_by.map(|model| model.to_string());
    assert_eq!((answered_by.as_deref(), standin.bill().calls), (Some("litellm_gpt-4o-mini"), 4));
}

/// A job of a provider with these keys, and how many calls were made.
async fn with_api_keys(keys: &[&str]) -> (Performed, u64) {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = format!("openai = {{ base_url = '{}', api_keys = {keys:?} }}", standin.base_url());
    let performer = performer_of("gpt-4o-mini", &settings, LIMITS, |_| ());
    let (performed, _) = perform(&performer, job("a b"), CancellationToken::new()).await;
    (performed, standin.bill().calls)
}

#[tokio::test]
async fn a_refused_key_is_left_alone_where_another_one_is_taken() {
    let (performed, calls) = with_api_keys(&[BAD_KEY, "sk-a"]).await;
    let told = performed.observation.unwrap();
    assert_eq!((told.signal, told.retry_after_ms), (Signal::Throttled, Some(SPARED_MS)));
    assert_eq!((generation(performed).text.as_str(), calls), ("a b", 2));
    let (performed, calls) = with_api_keys(&[BAD_KEY]).await;
    assert_eq!(performed.observation.unwrap().signal, Signal::Answered, "jobs fail at once where no key is good");
    let Outcome::Failed(failure) = performed.outcome else { panic!("it has no good key") };
    assert_eq!((failure.class, calls), (FailureClass::Auth, 1));
}

#[test]
fn a_job_is_tried_again_when_that_may_help_any_of_its_models() {
    let failed = |class| Outcome::Failed(Failure::new(class, "x"));
    let class = |first, last| match in_all(first, last) {
        Outcome::Failed(failure) => Some(failure.class),
        other => panic!("{other:?}"),
    };
    let (transient, auth) = (FailureClass::Transient, FailureClass::Auth);
    assert_eq!(class(failed(transient), failed(auth)), Some(transient));
    assert_eq!(class(failed(auth), failed(transient)), Some(transient));
    assert_eq!(class(failed(auth), failed(FailureClass::Invalid)), Some(auth));
    let throttled = FailureClass::Throttled;
    assert_eq!(class(failed(auth), failed(throttled)), Some(auth), "it would wait at its own gate, which is open");
    assert_eq!(class(failed(throttled), failed(auth)), Some(throttled));
    assert_eq!(class(failed(transient), Outcome::HandedBack), Some(transient));
}

/// What becomes of a job whose model is called once more after 50 ms, and the contents of the calls.
async fn with_hedge(name: &str, prompt: &str, to: Option<&str>) -> (Performed, String, Vec<String>) {
    hedged_after(50, name, prompt, to).await
}

async fn hedged_after(after_ms: u64, name: &str, prompt: &str, to: Option<&str>) -> (Performed, String, Vec<String>) {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = format!("openai = {{ base_url = '{}', api_keys = ['sk-a', 'sk-b'] }}", standin.base_url());
    let model = format!("litellm_openai/{name}");
    let hedge = config::Hedge { model: model.clone(), after_ms, after: None, to: to.map(str::to_owned) };
    let performer = performer_of("gpt-4o-mini", &settings, LIMITS, |_| ());
    let performer = performer.with_hedges(Hedges::new(&[hedge]).unwrap());
    let (performed, reported) = perform(&performer, spec(&model, prompt), CancellationToken::new()).await;
    let calls = standin.calls().into_iter().map(|call| format!("{} {}", call.key, call.content));
    (performed, reported, calls.collect())
}

#[tokio::test]
async fn a_call_that_does_not_begin_to_answer_is_made_once_more_and_both_are_paid() {
    let slow = "!sleep=60000 times=1 one two";
    let (performed, reported, calls) = with_hedge("gpt-4o-mini", slow, None).await;
    assert_eq!((reported.as_str(), calls.len()), ("one two", 2));
    assert!(calls[0].starts_with("sk-a ") && calls[1].starts_with("sk-b "), "with another key: {calls:?}");
    // The first is estimated by its prompt, the second told.
    let input = slow.len().div_ceil(4) as u128 * 150_000;
    let told = 4 * 150_000 + 2 * 600_000;
    assert_eq!(performed.cost, Some(Cost::estimated(Picodollars(input + told))));
    assert_eq!(performed.observation.map(|told| told.signal), Some(Signal::GivenUp), "of the job's own call");
    let generation = generation(performed);
    assert_eq!((generation.text.as_str(), generation.answered_by), ("one two", None));
}

#[tokio::test]
async fn when_a_second_call_goes_out_is_learnt_from_the_answers_before() {
    let bench = Bench::new("sk-a").await;
    let settings =
        config::Hedge { model: "litellm_gpt*".to_owned(), after: Some("p95".to_owned()), ..config::Hedge::default() };
    let bench = Bench { performer: bench.performer.with_hedges(Hedges::new(&[settings]).unwrap()), ..bench };
    // Nothing is known yet, so whatever takes long is waited for.
    for n in 0..19 {
        bench.perform(job(&format!("!first-byte=30 one {n}"))).await;
    }
    bench.perform(job("!sleep=200 times=1 first")).await;
    assert_eq!(bench.standin.bill().calls, 20);
    // By now answers begin after 30 ms, all but one.
    let (performed, _) = bench.perform(job("!sleep=60000 times=1 second")).await;
    assert_eq!((generation(performed).text.as_str(), bench.standin.bill().calls), ("second", 22));
}

#[tokio::test]
async fn another_model_may_be_the_second_which_the_result_tells() {
    let (performed, reported, calls) = with_hedge("x!sleep=60000", "one", Some("litellm_gpt-4o-mini")).await;
    assert_eq!((reported.as_str(), calls.len()), ("one", 2));
    let answered_by = generation(performed).answered_by.map(|model| model.to_string());
    assert_eq!(answered_by.as_deref(), Some("litellm_gpt-4o-mini"));
}

#[tokio::test]
async fn what_answers_in_time_is_called_once_and_nothing_is_shown_twice() {
    // What is to be in time has so much of it that a busy machine does not matter.
    for (after_ms, name, prompt, called) in [
        (60_000, "x", "one two", 1),
        // It begins in time, and is slow then.
        (2_000, "x", "!slow-stream=450 one two three four five six", 1),
        // Both begin, and the first is heard.
        (50, "x", "!first-byte=150 !slow-stream=5 one two three four", 2),
        // A failure in time is a failure.
        (60_000, "x!status=400", "one", 1),
        // The first fails while the second is out.
        (50, "x", "!sleep=500 !status=400 times=1 one", 2),
    ] {
        let (performed, reported, calls) = hedged_after(after_ms, name, prompt, None).await;
        assert_eq!(calls.len(), called, "{name} {prompt}");
        match performed.outcome {
            Outcome::Generated(generation) => {
                assert_eq!(reported, generation.text, "{name} {prompt}");
                assert_eq!(generation.text, genmill_standin::script::Script::strip(prompt), "{name} {prompt}");
            }
            outcome => assert!(name.contains("400") && reported.is_empty(), "{outcome:?}"),
        }
    }
    let (performed, _, calls) = with_hedge("x!sleep=100,status=503", "one", Some("litellm_openai/y!status=401")).await;
    let Outcome::Failed(failure) = performed.outcome else { panic!("{performed:?}") };
    assert_eq!((failure.class, calls.len()), (FailureClass::Transient, 2), "it may be tried again: {failure:?}");
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
        // At $0.15 per million: 4 bytes of the prompt are taken for a token.
        let prompt_only = Cost::estimated(Picodollars(150_000 * prompt.len().div_ceil(4) as u128));
        assert_eq!(performed.outcome, Outcome::HandedBack, "{prompt}");
        let cost = performed.cost.unwrap();
        assert!(cost == prompt_only || (prompt.starts_with("!stall") && cost.estimated), "{prompt}: {cost:?}");
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
    assert_eq!(performed.cost, Some(Cost::NOTHING));
    let Outcome::Failed(failure) = performed.outcome else { panic!() };
    assert_eq!(failure.class, FailureClass::Transient);
    assert!(failure.message.starts_with("openai cannot be connected to at 127.0.0.1: "), "{failure:?}");
}

/// What a person is told of a job to this address.
async fn told_of(base_url: &str, settings: &Settings) -> String {
    genmill_daemon::tls::install();
    let bare = performer(base_url, "sk-a", |_| ());
    let performer = Performer { http: Http::new(settings).unwrap(), ..bare };
    let (performed, _) = perform(&performer, job("hi"), CancellationToken::new()).await;
    let Outcome::Failed(failure) = performed.outcome else { panic!("{performed:?}") };
    assert_eq!((failure.class, performed.cost), (FailureClass::Transient, Some(Cost::NOTHING)), "{failure:?}");
    failure.message
}

#[tokio::test]
async fn failures_of_name_servers_certificates_and_proxies_say_what_to_do() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let settings = Settings { connect_timeout: Duration::from_secs(5), proxy: None, ca_file: None };
    let told = told_of(&format!("https://{}/v1", standin.address()), &settings).await;
    assert!(told.contains("it does not speak TLS there: check base_url"), "{told}");
    let proxied = Settings { proxy: Some(standin.origin()), ..settings.clone() };
    let told = told_of("https://provider.example/v1", &proxied).await;
    assert!(told.contains("the proxy refuses"), "{told}");
    let told = told_of("http://127.0.0.1:1/v1", &settings).await;
    assert!(told.contains("nothing listens there"), "{told}");
}

#[test]
fn a_file_of_certificates_that_is_none_is_told() {
    genmill_daemon::tls::install();
    let settings = |file: &str| Settings {
        connect_timeout: Duration::from_secs(5),
        proxy: None,
        ca_file: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)),
    };
    for file in ["no-such-file.pem", "Cargo.toml"] {
        let told = Http::new(&settings(file)).unwrap_err().to_string();
        assert!(
            told.starts_with("api.ca_file: cannot read certificates (PEM) from ") && told.ends_with(file),
            "{told}"
        );
    }
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

/// A model of a dialect that the stand-in speaks, with the settings and variables by which it is reached there.
type Spoken = (&'static str, String, Vec<(&'static str, String)>);

/// A model of each such dialect.
fn spoken(standin: &Standin, key: &str) -> Vec<Spoken> {
    let origin = standin.origin();
    let at = |provider: &str, path: &str| format!("{provider} = {{ base_url = '{origin}{path}', api_key = '{key}' }}");
    let account = google::tests::account(&format!("{origin}/token"));
    let account = account.replace("mill@the-project.iam.gserviceaccount.com", key);
    let vertex = format!("vertex_ai.base_url = '{origin}/v1/projects/{{project}}/locations/here'");
    let google = vec![("GOOGLE_APPLICATION_CREDENTIALS", account)];
    let tokens = ("WATSONX_TOKEN_URI", format!("{origin}/identity/token"));
    let amazon = vec![("AWS_ACCESS_KEY_ID", key.to_owned()), ("AWS_SECRET_ACCESS_KEY", "secret".to_owned())];
    vec![
        ("gpt-4o-mini", at("openai", "/v1"), Vec::new()),
        ("claude-haiku-4-5", at("anthropic", ""), Vec::new()),
        ("gemini-2.5-flash", at("gemini", "/v1beta"), Vec::new()),
        ("vertex_ai/gemini-2.5-flash", vertex.clone(), google.clone()),
        ("vertex_ai/claude-3-5-sonnet@20240620", vertex, google),
        ("watsonx/ibm/granite", at("watsonx", ""), vec![tokens, ("WATSONX_PROJECT_ID", "p".to_owned())]),
        ("tgi_generate/any", at("tgi_generate", ""), Vec::new()),
        ("bedrock/meta.llama3-8b-v1:0", format!("bedrock.base_url = '{origin}'"), amazon),
        ("replicate/meta/llama", at("replicate", "/v1"), Vec::new()),
    ]
}

#[tokio::test]
async fn google_is_called_for_a_person_and_for_a_machine_too() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let (origin, name) = (standin.origin(), "vertex_ai/gemini-2.5-flash");
    let settings = format!("vertex_ai.base_url = '{origin}/v1/projects/{{project}}/locations/here'");
    let person = format!(
        r#"{{"type":"authorized_user","client_id":"c","client_secret":"s","refresh_token":"r","quota_project_id":"q",
        "token_uri":"{origin}/token"}}"#
    );
    let gcloud = tempfile::tempdir().unwrap();
    std::fs::write(gcloud.path().join("application_default_credentials.json"), person).unwrap();
    let project = ("VERTEXAI_PROJECT", "mine".to_owned());
    let file = ("CLOUDSDK_CONFIG", gcloud.path().to_str().unwrap().to_owned());
    let machine = ("GCE_METADATA_HOST", standin.address().to_string());
    for (variables, key, quota) in [(vec![file], "r", Some("q")), (vec![machine, project], "machine", None)] {
        let performer = performer_in(name, &settings, &variables, LIMITS, |_| ());
        let job = spec(&format!("litellm_{name}"), "one two");
        let (performed, _) = perform(&performer, job, CancellationToken::new()).await;
        assert_eq!(generation(performed).text, "one two");
        assert_eq!(standin.calls().last().unwrap().key, key);
        let headers = standin.requests().pop().unwrap().headers;
        let told = headers.iter().find(|(name, _)| name == "x-goog-user-project").map(|(_, value)| value.as_str());
        assert_eq!(told, quota);
    }
}

#[tokio::test]
async fn a_prediction_that_nobody_waits_for_any_more_is_called_off() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let (name, settings, _) = spoken(&standin, "sk-a").pop().unwrap();
    let performer = performer_of(name, &settings, LIMITS, |_| ());
    let job = |prompt: &str| spec(&format!("litellm_{name}"), prompt);
    let stop = CancellationToken::new();
    let made = async {
        while standin.predictions_looked_at() == 0 {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    let ((stopped, _), ()) = tokio::join!(perform(&performer, job("!stall-after=0 a b"), stop.clone()), made);
    assert_eq!((stopped.outcome, standin.predictions_cancelled()), (Outcome::HandedBack, vec![0]));
    // One that has come is left alone.
    let (answered, _) = perform(&performer, job("a b"), CancellationToken::new()).await;
    assert_eq!((generation(answered).text.as_str(), standin.predictions_cancelled()), ("a b", vec![0]));
    // One that could not be looked at may run on.
    let (broken, _) = perform(&performer, job("!cut-after=1 a b"), CancellationToken::new()).await;
    assert!(matches!(broken.outcome, Outcome::Failed(_)), "{broken:?}");
    assert_eq!(standin.predictions_cancelled(), [0, 2]);
}

/// What becomes of a prompt in each dialect.
async fn in_every_dialect(key: &str, prompt: &str, check: impl Fn(&str, Performed, String)) {
    let standin = Standin::start(Options::default()).await.unwrap();
    for (name, settings, variables) in spoken(&standin, key) {
        for streaming in [true, false] {
            let set = |endpoint: &mut Endpoint| endpoint.provider.streaming &= streaming;
            let performer = performer_in(name, &settings, &variables, LIMITS, set);
            let job = spec(&format!("litellm_{name}"), prompt);
            let (performed, reported) = perform(&performer, job, CancellationToken::new()).await;
            check(&format!("{name}, streaming: {streaming}"), performed, reported);
        }
    }
}

#[tokio::test]
async fn every_dialect_answers_counts_and_prices() {
    in_every_dialect("sk-a", "!split-utf8 !comments !echo=grüße 世界 🦀", |case, performed, reported| {
        let has_price = !["tgi", "watsonx", "bedrock", "replicate"].iter().any(|name| case.starts_with(name));
        assert!(performed.cost.is_some_and(|cost| cost.amount > Picodollars(0)) == has_price, "{case}: {performed:?}");
        let generation = generation(performed);
        assert_eq!((generation.text.as_str(), reported.as_str()), ("grüße 世界 🦀", "grüße 世界 🦀"), "{case}");
        let reason = if case.starts_with("replicate") { FinishReason::Unknown } else { FinishReason::Stop };
        assert_eq!(generation.finish_reason, reason, "{case}");
        assert_eq!(generation.usage.map(|usage| usage.completion_tokens), Some(3), "{case}");
        let seedless = case.contains("claude") || case.starts_with("bedrock");
        let left_out: &[&str] = if seedless { &["seed"] } else { &[] };
        assert_eq!(generation.left_out, left_out, "{case}");
    })
    .await;
}

#[tokio::test]
async fn several_samples_come_from_who_takes_their_number() {
    let standin = Standin::start(Options::default()).await.unwrap();
    for (name, settings, variables) in spoken(&standin, "sk-a") {
        for streaming in [true, false] {
            let set = |endpoint: &mut Endpoint| endpoint.provider.streaming &= streaming;
            let performer = performer_in(name, &settings, &variables, LIMITS, set);
            let mut job = spec(&format!("litellm_{name}"), "a b");
            job.sampling.controls.n = Some(3);
            let calls = standin.bill().calls;
            let (performed, _) = perform(&performer, job, CancellationToken::new()).await;
            let asked = standin.bill().calls - calls;
            match performed.outcome {
                Outcome::Generated(generation) if name.contains("gemini") => {
                    // The stand-in's Gemini knows of one candidate only, as some providers do.
                    let known = (generation.text.as_str(), generation.more.len(), &generation.left_out[..]);
                    assert_eq!(known, ("a b", 0, &["n".to_owned()][..]), "{name}");
                }
                Outcome::Generated(generation) => {
                    let texts: Vec<&str> = generation.more.iter().map(|sample| sample.text.as_str()).collect();
                    assert_eq!((generation.text.as_str(), texts), ("a b", vec!["1 a b", "2 a b"]), "{name}");
                    assert!(generation.left_out.is_empty(), "{name}");
                }
                Outcome::Failed(failure) => {
                    assert!(failure.message.contains("does not take n for"), "{name}: {failure:?}");
                    assert_eq!((failure.class, asked), (FailureClass::Invalid, 0), "{name}");
                    let takes_it = ["gpt-4o-mini", "watsonx"].iter().any(|taker| name.starts_with(taker));
                    assert!(!takes_it, "{name}: {failure:?}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_token_that_was_taken_back_is_asked_for_anew() {
    let standin = Standin::start(Options::default()).await.unwrap();
    for (name, calls) in [("watsonx/ibm/granite", 2), ("gpt-4o-mini", 1)] {
        let spoken = spoken(&standin, "sk-a").into_iter().find(|(model, ..)| *model == name);
        let (_, settings, variables) = spoken.unwrap();
        let performer = performer_in(name, &settings, &variables, LIMITS, |_| ());
        let before = standin.bill().calls;
        let job = spec(&format!("litellm_{name}"), "!status=401 times=1 hi");
        let (performed, _) = perform(&performer, job, CancellationToken::new()).await;
        let answered = matches!(performed.outcome, Outcome::Generated(_));
        assert_eq!((answered, standin.bill().calls - before), (calls == 2, calls), "{name}: {performed:?}");
    }
}

#[tokio::test]
async fn every_dialect_tells_what_went_wrong() {
    let class = |prompt: &'static str, key: &'static str, expect: FailureClass| {
        in_every_dialect(key, prompt, move |case, performed, _| {
            // A prediction has no error in the middle.
            if prompt.starts_with("!error-after") && case.starts_with("replicate") {
                return;
            }
            let Outcome::Failed(failure) = performed.outcome else { panic!("{case}, {prompt}: {performed:?}") };
            assert_eq!(failure.class, expect, "{case}, {prompt}: {failure:?}");
            assert!(!failure.message.contains(BAD_KEY), "{case}: {failure:?}");
        })
    };
    class("hi", BAD_KEY, FailureClass::Auth).await;
    class("!status=429 retry-after=1", "sk-a", FailureClass::Throttled).await;
    class("!status=500", "sk-a", FailureClass::Transient).await;
    class("!status=529", "sk-a", FailureClass::Overloaded).await;
    class("!status=400", "sk-a", FailureClass::Invalid).await;
    class("!cut-after=1 a b c", "sk-a", FailureClass::CutStream).await;
    class("!error-after=1 a b c", "sk-a", FailureClass::Transient).await;
    class("!garbage", "sk-a", FailureClass::Transient).await;
}

#[tokio::test]
async fn a_parameter_that_a_provider_does_not_take_fails_the_job_or_is_left_out() {
    let standin = Standin::start(Options::default()).await.unwrap();
    let (name, settings, _) = spoken(&standin, "sk-a").swap_remove(1);
    let job = || {
        let mut job = spec("litellm_claude-haiku-4-5", "hi");
        job.sampling.controls.frequency_penalty = Some(0.5);
        job
    };
    let refusing = performer_of(name, &settings, LIMITS, |_| ());
    let (performed, _) = perform(&refusing, job(), CancellationToken::new()).await;
    let Outcome::Failed(failure) = performed.outcome else { panic!() };
    assert_eq!((failure.class, performed.cost), (FailureClass::Invalid, Some(Cost::NOTHING)));
    assert!(failure.message.contains("does not take frequency_penalty for claude-haiku-4-5"), "{failure:?}");
    assert_eq!(standin.bill().calls, 0);
    let leaving_out = Limits { unsupported: Unsupported::LeaveOut, ..LIMITS };
    let performer = performer_of(name, &settings, leaving_out, |_| ());
    let (performed, _) = perform(&performer, job(), CancellationToken::new()).await;
    assert_eq!(generation(performed).left_out, ["seed", "frequency_penalty"]);
    // What is asked about is not left out.
    let (name, settings, _) = spoken(&standin, "sk-a").into_iter().find(|(name, ..)| name.starts_with("tgi")).unwrap();
    let performer = performer_of(name, &settings, leaving_out, |_| ());
    let job = JobSpec { model: ModelName::parse(&format!("litellm_{name}")).unwrap(), ..with_images(&[]) };
    let calls = standin.bill().calls;
    let (performed, _) = perform(&performer, job, CancellationToken::new()).await;
    let Outcome::Failed(failure) = performed.outcome else { panic!() };
    assert!(failure.message.contains("does not take images"), "{failure:?}");
    assert_eq!((failure.class, standin.bill().calls), (FailureClass::Invalid, calls));
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
