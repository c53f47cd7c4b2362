//! Batches of a real performer against the stand-in, over HTTP.

use super::*;
use crate::catalog::Catalog;
use crate::fixture::spec;
use crate::http::{Http, Settings};
use crate::perform::{Limits, Unsupported};
use crate::prices::Prices;
use crate::providers::Table;
use genmill_core::attempt::{Determinism, FinishReason, Generation, Outcome, Performed, Usage};
use genmill_core::ids::{Epoch, JobId, LaneNumber};
use genmill_core::model::ModelName;
use genmill_core::money::{Cost, Picodollars};
use genmill_daemon::environment::Environment;
use genmill_daemon::models::{ListedModel, LocalSettings};
use genmill_standin::{BAD_KEY, Made, Options, Standin};
use genmill_worker::batches::Item;
use std::path::PathBuf;
use std::time::Duration;

const LIMITS: Limits =
    Limits { calls_max: 4, unsupported: Unsupported::Refuse, batches: true, first_byte: None, idle: None };

/// Of each batch API a model, and the settings of its provider at `{origin}`.
const PROVIDERS: [(&str, &str); 4] = [
    ("gpt-4o-mini", "openai.base_url = '{origin}/v1'\nopenai.api_key = '{key}'"),
    ("claude-haiku-4-5", "anthropic.base_url = '{origin}'\nanthropic.api_key = '{key}'"),
    ("gemini-2.5-flash", "gemini.base_url = '{origin}/v1beta'\ngemini.api_key = '{key}'"),
    ("mistral/mistral-small-latest", "mistral.base_url = '{origin}/v1'\nmistral.api_key = '{key}'"),
];

/// A performer whose provider is the stand-in.
struct Bench {
    standin: Standin,
    performer: Performer,
    model: ModelName,
}

impl Bench {
    async fn new(provider: usize) -> Self {
        Self::with(provider, "sk-a", LIMITS).await
    }

    async fn with(provider: usize, key: &str, limits: Limits) -> Self {
        let standin = Standin::start(Options::default()).await.unwrap();
        let performer = performer(&standin.origin(), provider, key, limits);
        let model = ModelName::parse(&format!("litellm_{}", PROVIDERS[provider].0)).unwrap();
        Self { standin, performer, model }
    }

    /// A batch of jobs with these prompts.
    fn batch(&self, prompts: &[&str]) -> Batch {
        let item = |(place, prompt): (u64, &&str)| Item {
            id: JobId::new(UnixMs(1_000), LaneNumber(1), place),
            epoch: Epoch(7),
            spec: spec(self.model.as_str(), prompt),
        };
        Batch {
            tag: "00112233445566778899aabbccddeeff".to_owned(),
            model: self.model.clone(),
            key: self.performer.batch_offers()[0].key.clone(),
            since: UnixMs(now_unix_ms()),
            submitted: Some(prompts.len() as u64),
            items: (1..).zip(prompts).map(item).collect(),
        }
    }

    /// Prepares a batch and makes it.
    async fn make(&self, batch: &Batch) -> Result<String, Unsubmitted> {
        make(&self.performer, batch, Duration::from_secs(60)).await
    }

    async fn submit(&self, prompts: &[&str]) -> (Batch, String) {
        let batch = self.batch(prompts);
        let remote = self.make(&batch).await.unwrap();
        (batch, remote)
    }

    async fn find(&self, batch: &Batch) -> Found {
        self.performer.find(batch, &[]).await.unwrap()
    }

    /// What came of the jobs of a batch, by their places, until the reading broke off.
    async fn collect(&self, batch: &Batch, remote: &str) -> (Vec<(usize, Performed)>, Result<(), Failure>) {
        let (send, mut arriving) = mpsc::channel(1);
        let listen = async {
            let mut arrived = Vec::new();
            while let Some(Arrived { id, epoch, performed }) = arriving.recv().await {
                let place = batch.items.iter().position(|item| item.id == id && item.epoch == epoch).unwrap();
                arrived.push((place, performed));
            }
            arrived.sort_by_key(|(place, _)| *place);
            arrived
        };
        let (told, arrived) = tokio::join!(self.performer.collect(batch, remote, send), listen);
        (arrived, told)
    }

    async fn collected(&self, batch: &Batch, remote: &str) -> Vec<(usize, Performed)> {
        let (arrived, told) = self.collect(batch, remote).await;
        told.unwrap();
        arrived
    }

    fn made(&self) -> Vec<Made> {
        self.standin.batches()
    }
}

/// Prepares a batch and makes it under a hold that lasts for so long.
async fn make(performer: &Performer, batch: &Batch, lease: Duration) -> Result<String, Unsubmitted> {
    let prepared = performer.prepare(batch).await.map_err(Unsubmitted::Refused)?;
    performer.create(batch, prepared.ready, &Hold::lasting(lease)).await
}

fn performer(origin: &str, provider: usize, key: &str, limits: Limits) -> Performer {
    genmill_daemon::tls::install();
    let (name, settings) = PROVIDERS[provider];
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
    let settings = toml::from_str(&settings.replace("{origin}", origin).replace("{key}", key)).unwrap();
    let table = Table::embedded().unwrap();
    let catalog = Catalog::new(&[model], &table, &settings, &Environment::default()).unwrap();
    let http = Http::new(&Settings { connect_timeout: Duration::from_secs(5), proxy: None, ca_file: None }).unwrap();
    Performer::new(catalog, Prices::embedded().unwrap(), http, limits)
}

fn generation(performed: &Performed) -> &Generation {
    let Outcome::Generated(generation) = &performed.outcome else { panic!("{performed:?}") };
    generation
}

fn failure(performed: &Performed) -> &Failure {
    let Outcome::Failed(failure) = &performed.outcome else { panic!("{performed:?}") };
    failure
}

fn places(arrived: &[(usize, Performed)]) -> Vec<usize> {
    arrived.iter().map(|(place, _)| *place).collect()
}

#[tokio::test]
async fn a_batch_is_submitted_once_looked_at_and_read_as_single_calls_are() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["!batch-looks=1 one two", "grüße 世界", "!words=9 stop"]).await;
        assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Works));
        let mut others = bench.batch(&["one"]);
        others.items[0].epoch = Epoch(8);
        let strange = bench.collected(&others, &remote).await;
        assert_eq!((strange.len(), failure(&strange[0].1).class), (1, FailureClass::Transient), "no result is its");
        assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Ended));
        let arrived = bench.collected(&batch, &remote).await;
        let texts: Vec<&str> = arrived.iter().map(|(_, performed)| generation(performed).text.as_str()).collect();
        assert_eq!(texts, ["one two", "grüße 世界", "word1 word2 word3 word4 word5 word6 word7 word8 word9"]);
        let usage = Usage { prompt_tokens: 2, cached_prompt_tokens: 0, completion_tokens: 2 };
        let second = generation(&arrived[1].1);
        assert_eq!((second.usage, second.finish_reason), (Some(usage), FinishReason::Stop));
        assert_eq!(second.first_token_ms, None);
        assert_eq!(arrived[1].1.observation, None);
        let made = bench.made();
        assert_eq!((made.len(), made[0].items.len()), (1, 3));
        assert_eq!(bench.standin.bill().calls, 3, "each job was done once");
    }
}

#[tokio::test]
async fn what_a_job_cost_is_told_at_the_price_of_batches() {
    // In picodollars for a token read and one written; Mistral tells no price of batches.
    let prices = [Some((75_000, 300_000)), Some((500_000, 2_500_000)), Some((150_000, 1_250_000)), None];
    for (provider, price) in prices.into_iter().enumerate() {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["one two three"]).await;
        let arrived = bench.collected(&batch, &remote).await;
        let expect = price.map(|(read, written)| Cost::exact(Picodollars(3 * read + 3 * written)));
        assert_eq!(arrived[0].1.cost, expect);
        let determinism = generation(&arrived[0].1).determinism;
        assert_eq!(determinism, Some(if provider == 1 { Determinism::None } else { Determinism::Seeded }));
    }
}

#[tokio::test]
async fn a_batch_that_was_not_said_to_be_made_is_found_by_its_tag_or_its_results() {
    for provider in 0..PROVIDERS.len() {
        for lost in ["!batch-lost", "!batch-lost=cut"] {
            let bench = Bench::new(provider).await;
            // Others before it and behind it, over several pages.
            for place in 0..3 {
                let mut other = bench.batch(&["other"]);
                other.tag = format!("{place:032x}");
                other.items[0].epoch = Epoch(place);
                bench.make(&other).await.unwrap();
            }
            bench.standin.end_batches();
            let batch = bench.batch(&[&format!("{lost} one"), "two"]);
            assert_eq!(bench.find(&batch).await, Found::NotThere);
            let unclear = bench.make(&batch).await;
            assert!(matches!(unclear, Err(Unsubmitted::Unclear(_))), "{unclear:?}");
            let remote = bench.made()[3].id.clone();
            if provider == 1 {
                assert_eq!(bench.find(&batch).await, Found::NotYet, "only results tell whose it is");
                bench.standin.end_batches();
            }
            assert_eq!(bench.find(&batch).await, Found::Here(remote.clone()));
            let later = bench.submit(&["later"]).await;
            bench.standin.end_batches();
            assert_eq!(places(&bench.collected(&batch, &remote).await), [0, 1]);
            assert_eq!(bench.made().len(), 5, "{later:?}");
        }
    }
}

#[tokio::test]
async fn a_provider_that_does_not_answer_may_have_made_the_batch() {
    for provider in 0..PROVIDERS.len() {
        let impatient = Limits { idle: Some(Duration::from_millis(100)), ..LIMITS };
        let bench = Bench::with(provider, "sk-a", impatient).await;
        let unclear = bench.make(&bench.batch(&["!batch-lost=stall one"])).await;
        let Err(Unsubmitted::Unclear(failure)) = unclear else { panic!("{unclear:?}") };
        assert_eq!(failure.class, FailureClass::Timeout);
    }
}

#[tokio::test]
async fn a_batch_of_a_provider_that_forgets_metadata_is_found_by_the_name_of_its_file() {
    let bench = Bench::new(0).await;
    let mut other = bench.batch(&["!batch-forgets other"]);
    other.tag = "f".repeat(32);
    bench.make(&other).await.unwrap();
    let (batch, remote) = bench.submit(&["!batch-forgets one"]).await;
    assert_eq!(bench.find(&batch).await, Found::Here(remote));
    other.tag = "e".repeat(32);
    assert_eq!(bench.find(&other).await, Found::NotThere);
}

#[tokio::test]
async fn what_was_made_long_before_is_not_ours() {
    let bench = Bench::new(1).await;
    // One that runs, of before: it cannot be the one.
    bench.submit(&["!batch-looks=9 other"]).await;
    let mut batch = bench.batch(&["one"]);
    assert_eq!(bench.find(&batch).await, Found::NotYet, "only results tell whose it is");
    batch.since = UnixMs(now_unix_ms() + 30 * 3_600_000);
    assert_eq!(bench.find(&batch).await, Found::NotThere);
}

#[tokio::test]
async fn a_refused_batch_is_surely_not_submitted() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let check = async |prompt: &str, class, wait| {
            let refused = bench.make(&bench.batch(&[prompt, "a secret phrase"])).await;
            let Err(Unsubmitted::Refused(Refusal { failure, .. })) = refused else { panic!("{refused:?}") };
            assert_eq!((failure.class, failure.retry_after_ms), (class, wait), "{failure:?}");
            failure
        };
        let quoted = check("!batch-status=400 message=not_a_secret_phrase,_please", FailureClass::Invalid, None).await;
        assert!(quoted.message.contains("not […], please"), "{quoted:?}");
        check("!batch-status=429 retry-after=2.5", FailureClass::Throttled, Some(2_500)).await;
        if provider == 0 || provider == 3 {
            // A file is no batch.
            check("!batch-upload=500", FailureClass::Transient, None).await;
        }
        assert_eq!(bench.made(), []);
    }
}

#[tokio::test]
async fn what_may_have_reached_a_provider_is_unclear_and_what_cannot_have_is_not() {
    for provider in 0..PROVIDERS.len() {
        // Nobody listens there.
        let gone = Bench::new(provider).await;
        let batch = gone.batch(&["one"]);
        let nowhere = performer("http://127.0.0.1:1", provider, "sk-a", LIMITS);
        let refused = make(&nowhere, &batch, Duration::from_secs(60)).await;
        assert!(
            matches!(&refused, Err(Unsubmitted::Refused(refusal)) if refusal.failure.class == FailureClass::Transient),
            "{refused:?}"
        );
        assert!(nowhere.find(&batch, &[]).await.is_err());
        // A refused key does not reach the batches.
        let bad = Bench::with(provider, BAD_KEY, LIMITS).await;
        let refused = bad.make(&bad.batch(&["one"])).await;
        let Err(Unsubmitted::Refused(Refusal { failure, .. })) = refused else { panic!("{refused:?}") };
        assert_eq!(failure.class, FailureClass::Auth);
        assert!(!failure.message.contains(BAD_KEY));
    }
}

#[tokio::test]
async fn errors_of_items_are_judged_as_those_of_calls() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let prompts = ["!status=400", "!status=429", "!status=500", "fine"];
        let (batch, remote) = bench.submit(&prompts).await;
        let arrived = bench.collected(&batch, &remote).await;
        assert_eq!(places(&arrived), [0, 1, 2, 3]);
        let classes: Vec<FailureClass> = arrived[..3].iter().map(|(_, performed)| failure(performed).class).collect();
        assert_eq!(classes, [FailureClass::Invalid, FailureClass::Throttled, FailureClass::Transient]);
        assert!(arrived[..3].iter().all(|(_, performed)| performed.cost == Some(Cost::NOTHING)));
        assert_eq!(generation(&arrived[3].1).text, "fine");
    }
}

#[tokio::test]
async fn what_an_expired_or_cancelled_batch_has_is_kept_and_the_rest_is_missing() {
    for provider in 0..PROVIDERS.len() {
        for end in ["expired", "cancelled"] {
            let bench = Bench::new(provider).await;
            let first = format!("!batch-end={end} !batch-partial=2 one");
            let (batch, remote) = bench.submit(&[&first, "two", "three", "four"]).await;
            assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Ended));
            let arrived = bench.collected(&batch, &remote).await;
            assert_eq!(places(&arrived), [0, 1, 2, 3], "{end}");
            assert_eq!(generation(&arrived[1].1).text, "two");
            for (_, rest) in &arrived[2..] {
                assert_eq!((&rest.outcome, rest.cost), (&Outcome::HandedBack, Some(Cost::NOTHING)));
            }
        }
    }
}

#[tokio::test]
async fn a_batch_is_cancelled_and_what_is_done_can_be_read() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["!batch-looks=99 !batch-partial=1 one", "two"]).await;
        bench.performer.cancel(&batch, &remote).await.unwrap();
        assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Ended));
        let arrived = bench.collected(&batch, &remote).await;
        assert_eq!((generation(&arrived[0].1).text.as_str(), &arrived[1].1.outcome), ("one", &Outcome::HandedBack));
        // One that has ended is as good as cancelled.
        bench.performer.cancel(&batch, &remote).await.unwrap();
    }
}

#[tokio::test]
async fn a_batch_that_is_refused_as_a_whole_tells_why() {
    for provider in [0, 2, 3] {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["!batch-end=invalid_request_error one"]).await;
        let told = bench.performer.look(&batch, &remote).await;
        let Ok(Stage::Refused(Refusal { failure, named })) = told else { panic!("{told:?}") };
        assert_eq!(named, []);
        let expect = if provider == 3 { FailureClass::Transient } else { FailureClass::Invalid };
        assert_eq!(failure.class, expect, "{failure:?}");
        assert_eq!(bench.collected(&batch, &remote).await[0].1.outcome, Outcome::HandedBack);
    }
    // Others are to be done first.
    let bench = Bench::new(0).await;
    let (batch, remote) = bench.submit(&["!batch-end=token_limit_exceeded one"]).await;
    let told = bench.performer.look(&batch, &remote).await;
    assert!(
        matches!(&told, Ok(Stage::Refused(refusal)) if refusal.failure.class == FailureClass::Throttled),
        "{told:?}"
    );
}

#[tokio::test]
async fn results_that_break_off_are_read_again() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["!batch-cut=1 one", "two", "three"]).await;
        assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Ended));
        let (_, told) = bench.collect(&batch, &remote).await;
        assert!(told.unwrap_err().class.is_retried());
        assert_eq!(places(&bench.collected(&batch, &remote).await), [0, 1, 2]);
    }
}

#[tokio::test]
async fn disorder_in_results_does_not_matter() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["!batch-garbled one", "two", "three"]).await;
        let arrived = bench.collected(&batch, &remote).await;
        assert_eq!(places(&arrived), [0, 1, 2], "each once");
        let texts: Vec<&str> = arrived.iter().map(|(_, performed)| generation(performed).text.as_str()).collect();
        assert_eq!(texts, ["one", "two", "three"]);
    }
}

#[tokio::test]
async fn results_of_which_none_is_understood_are_not_taken_for_missing() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["!batch-nameless one", "two"]).await;
        let (arrived, told) = bench.collect(&batch, &remote).await;
        assert!(arrived.is_empty());
        assert!(told.unwrap_err().message.contains("not understood"));
    }
}

#[tokio::test]
async fn a_search_among_results_that_cannot_be_read_tells_so() {
    let bench = Bench::new(1).await;
    bench.submit(&["!batch-elsewhere other"]).await;
    bench.standin.end_batches();
    let mut batch = bench.batch(&["one"]);
    batch.items[0].epoch = Epoch(8);
    let told = bench.find(&batch).await;
    assert!(matches!(&told, Found::Never(why) if why.contains("another host")), "{told:?}");
}

#[tokio::test]
async fn an_item_that_cannot_be_asked_does_not_fail_the_batch() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let mut batch = bench.batch(&["one", "two"]);
        batch.items[0].spec.sampling.controls.min_p = Some(0.5);
        let remote = bench.make(&batch).await.unwrap();
        assert_eq!(bench.made()[0].items.len(), 1);
        let arrived = bench.collected(&batch, &remote).await;
        assert_eq!(failure(&arrived[0].1).class, FailureClass::Invalid);
        assert!(failure(&arrived[0].1).message.contains("does not take min_p"));
        assert_eq!(arrived[0].1.cost, Some(Cost::NOTHING));
        assert_eq!(generation(&arrived[1].1).text, "two");
        // Of nothing else there is no batch at the provider, and what is known of it outlasts the worker.
        batch.items.pop();
        let remote = bench.make(&batch).await.unwrap();
        assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Ended));
        assert_eq!(bench.performer.cancel(&batch, &remote).await, Ok(()));
        assert_eq!(places(&bench.collected(&batch, &remote).await), [0]);
        assert_eq!(bench.made().len(), 1);
    }
}

#[tokio::test]
async fn what_is_left_out_is_noted_in_the_result() {
    let bench = Bench::with(0, "sk-a", Limits { unsupported: Unsupported::LeaveOut, ..LIMITS }).await;
    let mut batch = bench.batch(&["one"]);
    batch.items[0].spec.sampling.controls.min_p = Some(0.5);
    let remote = bench.make(&batch).await.unwrap();
    let arrived = bench.collected(&batch, &remote).await;
    assert_eq!(generation(&arrived[0].1).left_out, ["min_p"]);
}

#[tokio::test]
async fn no_request_is_longer_than_its_provider_takes() {
    // 20 MB with Gemini, whose items stand in the request; ours is 64 MiB for the others.
    for (provider, bytes_max) in [(2, 20_000_000), (1, BYTES_MAX)] {
        let bench = Bench::new(provider).await;
        // Quotes take two bytes each.
        let long = "\"".repeat(bytes_max / 5);
        let batch = bench.batch(&[&long, &long, "short", &long]);
        let prepared = bench.performer.prepare(&batch).await.unwrap();
        let body = prepared.ready.request.as_ref().unwrap().body.len();
        assert!(body <= bytes_max && body > bytes_max * 4 / 5, "{body}");
        assert_eq!(prepared.ready.items.len(), 3);
        assert_eq!(prepared.left, [(batch.items[3].id, batch.items[3].epoch)]);
    }
}

#[tokio::test]
async fn nothing_leaves_that_makes_a_batch_when_the_hold_on_it_has_ended() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let late = make(&bench.performer, &bench.batch(&["one", "two"]), Duration::ZERO).await;
        assert_eq!(late, Err(Unsubmitted::Late));
        assert_eq!((bench.made(), bench.standin.files()), (vec![], vec![]));
    }
}

#[tokio::test]
async fn a_refusal_names_the_items_that_it_is_about() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        // One that cannot be asked has no line.
        let mut batch = bench.batch(&["not asked", "one", "!batch-bad=named two", "three", "!batch-bad=named four"]);
        batch.items[0].spec.sampling.controls.min_p = Some(0.5);
        let refusal = match bench.make(&batch).await {
            Ok(remote) => match bench.performer.look(&batch, &remote).await {
                Ok(Stage::Refused(refusal)) => refusal,
                told => panic!("{told:?}"),
            },
            Err(Unsubmitted::Refused(refusal)) => refusal,
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(refusal.failure.class, FailureClass::Invalid);
        let named: Vec<(JobId, Epoch)> = refusal.named.iter().map(|(item, _)| *item).collect();
        let bad = [&batch.items[2], &batch.items[4]].map(|item| (item.id, item.epoch));
        assert_eq!(named, bad, "{provider}");
        assert!(refusal.named.iter().all(|(_, failure)| failure.class == FailureClass::Invalid));
        // With a provider that takes files, that of a batch that was not made is gone.
        assert_eq!(bench.standin.files().len(), usize::from(provider == 0));
    }
}

#[tokio::test]
async fn what_a_batch_leaves_behind_is_deleted() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["one", "!status=400 two"]).await;
        assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Ended));
        assert_eq!(places(&bench.collected(&batch, &remote).await), [0, 1]);
        let files = bench.standin.files().len();
        assert_eq!(files, if provider == 0 || provider == 3 { 3 } else { 0 });
        for _ in 0..2 {
            // What is gone already is no failure.
            assert_eq!(bench.performer.clear(&batch, &remote).await, Ok(()));
            assert_eq!(bench.standin.files(), [""; 0]);
        }
        assert_eq!(bench.performer.clear(&batch, "gone").await, Ok(()));
    }
}

#[tokio::test]
async fn what_is_told_of_no_more_counts_as_a_failure_and_is_not_done_again_for_ever() {
    for provider in [0, 1, 3] {
        let bench = Bench::new(provider).await;
        let (batch, remote) = bench.submit(&["!batch-truncate one", "two", "three"]).await;
        assert_eq!(bench.performer.look(&batch, &remote).await, Ok(Stage::Ended));
        let arrived = bench.collected(&batch, &remote).await;
        assert_eq!((places(&arrived), failure(&arrived[1].1).class), (vec![0, 1, 2], FailureClass::Transient));
        assert_eq!(arrived[1].1.cost, None, "it may have been paid for");
        assert_eq!(generation(&arrived[2].1).text, "three");
    }
}

#[tokio::test]
async fn a_search_does_not_wait_for_batches_that_are_known_or_of_another_size() {
    let bench = Bench::new(1).await;
    let (_, other) = bench.submit(&["!batch-looks=99 one", "two"]).await;
    for prompts in [&["!batch-looks=99 x"][..], &["!batch-looks=99 x", "y", "z"]] {
        bench.submit(prompts).await;
    }
    let mut sought = bench.batch(&["one", "two"]);
    sought.items[0].epoch = Epoch(8);
    assert_eq!(bench.find(&sought).await, Found::NotYet, "the first may be the one");
    assert_eq!(bench.performer.find(&sought, &[other]).await, Ok(Found::NotThere));
}

#[tokio::test]
async fn a_batch_is_found_by_its_tag_whatever_its_providers_clock_shows() {
    for provider in [0, 2, 3] {
        for clock in ["-40000", "40000"] {
            let bench = Bench::new(provider).await;
            let (batch, remote) = bench.submit(&[&format!("!batch-clock={clock} one")]).await;
            assert_eq!(bench.find(&batch).await, Found::Here(remote), "{clock}");
        }
    }
}

#[tokio::test]
async fn an_item_that_never_has_room_cannot_be_asked() {
    let bench = Bench::new(2).await;
    let (batch, remote) = bench.submit(&[&"x".repeat(20_000_000), "two"]).await;
    assert_eq!(bench.made()[0].items.len(), 1, "20 MB are what Gemini takes");
    let arrived = bench.collected(&batch, &remote).await;
    assert_eq!((places(&arrived), failure(&arrived[0].1).class), (vec![0, 1], FailureClass::Invalid));
}

#[tokio::test]
async fn a_key_does_not_leave_for_where_results_are_said_to_be() {
    let bench = Bench::new(1).await;
    let (batch, remote) = bench.submit(&["!batch-elsewhere one"]).await;
    let (arrived, told) = bench.collect(&batch, &remote).await;
    assert!(arrived.is_empty());
    let failure = told.unwrap_err();
    assert!(failure.message.contains("another host"), "{failure:?}");
}

#[tokio::test]
async fn lanes_with_a_batch_api_are_offered_with_their_first_key() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let lane = bench.model.lane();
        assert!(bench.performer.batch_api(&lane).is_some());
        let offers = bench.performer.batch_offers();
        assert_eq!((offers.len(), offers[0].items_max), (1, 10_000));
        assert_eq!(offers[0].lane.to_string(), format!("{lane}+batch"));
        assert_eq!(offers[0].key.as_ref(), bench.performer.keys.first(&lane));
        // A batch of a key that is gone cannot be looked at with another one.
        let other = Bench::with(provider, "sk-b", LIMITS).await;
        let told = other.performer.look(&bench.batch(&["one"]), "x").await;
        assert_eq!(told.unwrap_err().class, FailureClass::Auth);
    }
}

#[tokio::test]
async fn a_batch_that_is_not_there_any_more_is_told() {
    for provider in 0..PROVIDERS.len() {
        let bench = Bench::new(provider).await;
        let told = bench.performer.look(&bench.batch(&["one"]), "../x?y#z").await;
        assert_eq!(told.unwrap_err().class, FailureClass::NotFound);
    }
}
