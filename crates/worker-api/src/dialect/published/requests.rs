//! Requests of all kinds, as a dialect sends them to a provider.

use crate::dialect::conformance::provider;
use crate::dialect::{NEVER_LEFT_OUT, Streaming, find};
use crate::fixture::{messages, rich, spec, with_images};
use crate::providers::{Provider, Table};
use genmill_core::controls::{Controls, ReasoningEffort, StructuredOutput, ToolChoice};
use genmill_core::job::JobSpec;
use genmill_core::request::Role;
use serde_json::Value;

/// All providers.
pub(super) fn table() -> Table {
    Table::embedded().unwrap()
}

/// What is asked, by a name for each. None of it is the same.
fn jobs() -> Vec<(&'static str, JobSpec)> {
    let plain = spec("litellm_x/y", "Hi");
    let with = |change: fn(&mut JobSpec)| {
        let mut spec = plain.clone();
        change(&mut spec);
        spec
    };
    let tools = |choice: Option<ToolChoice>| {
        let rich = rich();
        let tools = rich.sampling.controls.tools.clone();
        let mut spec = JobSpec { input: rich.input, ..plain.clone() };
        spec.sampling.controls = Controls { tools, tool_choice: choice, ..Controls::default() };
        spec
    };
    let url = "https://example.com/a.png";
    vec![
        ("plain", plain.clone()),
        ("system", with(|spec| spec.input = messages(&[(Role::System, "Be brief."), (Role::User, "Hi")]))),
        ("greedy", with(|spec| spec.sampling.temperature = 0.0)),
        ("stop", with(|spec| spec.sampling.stop = vec!["a".to_owned(), "\n".to_owned()])),
        ("top_p", with(|spec| spec.sampling.top_p = Some(0.9))),
        ("top_k", with(|spec| spec.sampling.top_k = Some(40))),
        (
            "penalties",
            with(|spec| {
                let controls = &mut spec.sampling.controls;
                (controls.frequency_penalty, controls.presence_penalty) = (Some(0.5), Some(-0.5));
                controls.repetition_penalty = Some(1.1);
            }),
        ),
        ("bias", with(|spec| spec.sampling.controls.logit_bias = [(7, -100.0)].into())),
        ("logprobs", with(|spec| spec.sampling.controls.logprobs = Some(2))),
        ("logprobs of the text alone", with(|spec| spec.sampling.controls.logprobs = Some(0))),
        ("samples", with(|spec| spec.sampling.controls.n = Some(2))),
        (
            "schema",
            with(|spec| {
                let schema = r#"{"type":"object","properties":{"a":{"type":"string"}},"required":["a"]}"#;
                spec.sampling.controls.structured_output = Some(StructuredOutput::JsonSchema(schema.to_owned()));
            }),
        ),
        ("no thoughts", with(|spec| spec.sampling.controls.reasoning_effort = Some(ReasoningEffort::None))),
        ("few thoughts", with(|spec| spec.sampling.controls.reasoning_effort = Some(ReasoningEffort::Minimal))),
        (
            "thoughts",
            with(|spec| {
                spec.sampling.max_tokens = 5_000;
                spec.sampling.controls.reasoning_effort = Some(ReasoningEffort::Medium);
            }),
        ),
        ("tools", tools(None)),
        ("no tools", tools(Some(ToolChoice::None))),
        ("any tool", tools(Some(ToolChoice::Required))),
        ("a tool", tools(Some(ToolChoice::Tool("now".to_owned())))),
        ("image", with_images(&[])),
        ("image by URL", with_images(&[url])),
        ("everything", rich()),
    ]
}

/// The requests that a dialect sends to a provider (that of the dialect when there is no row of the name), each with what
/// it is about. What is refused before it is sent is not among them.
pub(super) fn requests(dialect: &str, name: Option<&str>) -> Vec<(String, Value)> {
    let table = table();
    let row = name.and_then(|name| table.find(name)).filter(|row| speaks(row, dialect)).cloned();
    let row = row.unwrap_or_else(|| provider(&table, dialect));
    let own = row.models.iter().filter(|models| models.dialect.as_deref().unwrap_or(&row.dialect) == dialect);
    let models =
        std::iter::once("the-model").chain(own.filter_map(|models| models.starts_with.first()).map(String::as_str));
    let mut requests = Vec::new();
    for model in models {
        for (about, job) in jobs() {
            for streaming in [Streaming::On, Streaming::Off] {
                let encoded = find(dialect).unwrap().encode(&job, model, &row, streaming);
                if NEVER_LEFT_OUT.iter().all(|(name, _)| !encoded.left_out.contains(name)) {
                    let body = serde_json::from_str(&encoded.body).unwrap();
                    requests.push((format!("{about}, {model}, streaming {streaming:?}"), body));
                }
            }
        }
    }
    requests
}

fn speaks(row: &Provider, dialect: &str) -> bool {
    row.dialect == dialect || row.models.iter().any(|models| models.dialect.as_deref() == Some(dialect))
}
