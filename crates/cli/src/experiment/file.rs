//! An experiment as it is written, and as it is meant. Never here: whether its models exist.

use crate::documents;
use crate::messages::{Message, input as messages_input};
use crate::submit::{Mode, Priority};
use anyhow::{Context as _, bail, ensure};
use genmill_client::v1;
use genmill_core::model::ModelName;
use genmill_core::names::Experiment as Name;
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use v1::generation_request::Input;

/// An experiment, every rule checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Experiment {
    pub(crate) name: String,
    pub(crate) models: Vec<String>,
    /// What all jobs have in common.
    pub(crate) request: v1::GenerationRequest,
    pub(crate) prompts: Vec<Prompt>,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Prompt {
    pub(crate) id: String,
    pub(crate) input: Input,
    /// Answers that count as correct, without space around; `None`: nothing is expected.
    pub(crate) expect: Option<Vec<String>>,
    /// All answers there are.
    pub(crate) choices: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    models: Vec<String>,
    #[serde(default)]
    request: Common,
    prompts: Option<Vec<Entry>>,
    prompts_file: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Common {
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<u32>,
    seed: Option<u64>,
    stop: Vec<String>,
    timeout_ms: Option<u64>,
    priority: Option<Priority>,
    mode: Option<Mode>,
    tenant: String,
    labels: BTreeMap<String, Scalar>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: Option<Scalar>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    expect: Option<Vec<Scalar>>,
    choices: Option<Vec<Scalar>>,
}

/// A text that may be written as a number: `expect: [4]`.
struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => Ok(Self(text)),
            value @ (serde_json::Value::Number(_) | serde_json::Value::Bool(_)) => Ok(Self(value.to_string())),
            _ => Err(serde::de::Error::custom("expected a text or a number")),
        }
    }
}

/// Reads an experiment, and the file of its prompts if it names one.
pub(crate) fn read(path: &Path) -> anyhow::Result<Experiment> {
    let text = documents::read_text(path)?;
    parse(&text, path.parent().unwrap_or(Path::new("."))).with_context(|| format!("in {}", path.display()))
}

fn parse(text: &str, folder: &Path) -> anyhow::Result<Experiment> {
    let written: Written = documents::parse(text)?;
    let name = Name::parse(&written.name).context("name")?;
    check_models(&written.models)?;
    let entries = match (written.prompts, written.prompts_file) {
        (Some(entries), None) => entries,
        (None, Some(file)) => read_prompts(&folder.join(file))?,
        _ => bail!("give either `prompts` or `prompts_file`"),
    };
    ensure!(!entries.is_empty(), "there are no prompts");
    let prompts = entries.into_iter().enumerate().map(|(index, entry)| {
        let number = index + 1;
        prompt(entry, number).with_context(|| format!("prompt {number}"))
    });
    let prompts = prompts.collect::<anyhow::Result<Vec<Prompt>>>()?;
    let mut seen = HashSet::new();
    for prompt in &prompts {
        ensure!(seen.insert(&prompt.id), "two prompts have the id `{}`", prompt.id);
    }
    Ok(Experiment {
        request: common(written.request, name.as_str()),
        name: name.into(),
        models: written.models,
        prompts,
    })
}

fn check_models(models: &[String]) -> anyhow::Result<()> {
    ensure!(!models.is_empty(), "`models` is empty");
    let mut seen = HashSet::new();
    for model in models {
        ModelName::parse(model)?;
        ensure!(seen.insert(model), "model `{model}` is listed twice");
    }
    Ok(())
}

/// Reads prompts: a list in YAML or JSON, or one JSON object a line.
fn read_prompts(path: &Path) -> anyhow::Result<Vec<Entry>> {
    let text = documents::read_text(path)?;
    let lines = path.extension().is_some_and(|extension| extension == "jsonl" || extension == "ndjson");
    if !lines {
        return documents::parse(&text).with_context(|| format!("in {}", path.display()));
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entry = |(index, line): (usize, &str)| {
        documents::parse(line).with_context(|| format!("in {}, line {}", path.display(), index + 1))
    };
    lines.map(entry).collect()
}

fn prompt(entry: Entry, number: usize) -> anyhow::Result<Prompt> {
    let input = match (entry.prompt, entry.messages) {
        (Some(prompt), None) => Input::Prompt(prompt),
        (None, Some(messages)) => messages_input(messages)?,
        _ => bail!("give either `prompt` or `messages`"),
    };
    let answers = |answers: Option<Vec<Scalar>>, name: &str| {
        let answers: Option<Vec<String>> =
            answers.map(|answers| answers.into_iter().map(|Scalar(text)| text.trim().to_owned()).collect());
        ensure!(answers.as_ref().is_none_or(|answers| !answers.is_empty()), "`{name}` is empty");
        Ok(answers)
    };
    let expect = answers(entry.expect, "expect")?;
    let choices = answers(entry.choices, "choices")?;
    let id = entry.id.map_or_else(|| number.to_string(), |Scalar(id)| id);
    Ok(Prompt { id, input, expect, choices })
}

fn common(written: Common, experiment: &str) -> v1::GenerationRequest {
    v1::GenerationRequest {
        max_tokens: written.max_tokens,
        temperature: written.temperature,
        top_p: written.top_p,
        top_k: written.top_k,
        seed: written.seed,
        stop: written.stop,
        labels: written.labels.into_iter().map(|(key, Scalar(value))| (key, value)).collect(),
        tenant: written.tenant,
        experiment: experiment.to_owned(),
        priority: written.priority.map_or(v1::Priority::Unspecified, v1::Priority::from).into(),
        mode: written.mode.map_or(v1::Mode::Unspecified, v1::Mode::from).into(),
        timeout_ms: written.timeout_ms,
        ..v1::GenerationRequest::default()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two models, three prompts.
    pub(crate) fn sample() -> Experiment {
        let text = "
name: sums
models: [vllm_a, hf_b]
request: {max_tokens: 5, temperature: 0, priority: bulk, mode: batch, labels: {set: 1}}
prompts:
  - {id: two, prompt: '2 + 2 =', expect: [4, ' four '], choices: [3, 4, 5, four]}
  - {prompt: '3 + 3 =', expect: [6], choices: [6, 7]}
  - {messages: [{role: user, content: Hi}], expect: ['x'], choices: ['y']}
";
        parse(text, Path::new(".")).unwrap()
    }

    fn refused(text: &str, says: &str) {
        let error = format!("{:#}", parse(text, Path::new("/nowhere")).unwrap_err());
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn an_experiment_is_models_and_prompts() {
        let experiment = sample();
        assert_eq!(experiment.request.max_tokens, Some(5));
        assert_eq!(experiment.request.temperature, Some(0.0));
        assert_eq!(experiment.request.priority(), v1::Priority::Bulk);
        assert_eq!(experiment.request.mode(), v1::Mode::Batch);
        assert_eq!(experiment.request.experiment, "sums");
        assert_eq!(experiment.request.labels["set"], "1");
        assert_eq!(experiment.prompts[0].expect, Some(vec!["4".to_owned(), "four".to_owned()]));
        let ids: Vec<&str> = experiment.prompts.iter().map(|prompt| prompt.id.as_str()).collect();
        assert_eq!(ids, ["two", "2", "3"]);
        assert!(matches!(experiment.prompts[2].input, Input::Messages(_)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        refused("nam: x\nmodels: []", "did you mean `name`?");
        refused("{name: x, models: [vllm_a], prompts: [{prmpt: a}]}", "prompts[0]");
        refused("{name: x, models: [vllm_a], prompts: [{prmpt: a}]}", "did you mean `prompt`?");
        refused("{name: x, models: [vllm_a], request: {max_token: 1}, prompts: []}", "did you mean `max_tokens`?");
        refused("{name: a b, models: [vllm_a], prompts: [{prompt: a}]}", "`a b` is not a name");
        refused("{name: x, models: [], prompts: [{prompt: a}]}", "`models` is empty");
        refused("{name: x, models: [gpt], prompts: [{prompt: a}]}", "no known backend prefix");
        refused("{name: x, models: [vllm_a, vllm_a], prompts: [{prompt: a}]}", "twice");
        refused("{name: x, models: [vllm_a], prompts: []}", "no prompts");
        refused("{name: x, models: [vllm_a]}", "either `prompts` or `prompts_file`");
        refused("{name: x, models: [vllm_a], prompts: [{id: a}]}", "prompt 1: give either `prompt` or `messages`");
        refused("{name: x, models: [vllm_a], prompts: [{prompt: a, expect: []}]}", "`expect` is empty");
        refused(
            "{name: x, models: [vllm_a], prompts: [{id: 2, prompt: a}, {prompt: b}]}",
            "two prompts have the id `2`",
        );
        refused("{name: x, models: [vllm_a], prompts_file: p.jsonl}", "cannot read /nowhere/p.jsonl");
    }

    #[test]
    fn prompts_may_lie_in_a_file_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let experiment = |file: &str, text: &str| {
            std::fs::write(folder.path().join(file), text).unwrap();
            let path = folder.path().join("experiment.yaml");
            std::fs::write(&path, format!("{{name: x, models: [vllm_a], prompts_file: {file}}}")).unwrap();
            read(&path)
        };
        let lines =
            experiment("p.jsonl", "{\"prompt\": \"a\", \"expect\": [\"\\ud83d\\ude00\"]}\n\n{\"prompt\": \"b\"}\n");
        let list = experiment("p.yaml", "- {prompt: a, expect: [😀]}\n- prompt: b\n");
        assert_eq!(lines.unwrap(), list.unwrap());
        let error = format!("{:#}", experiment("q.jsonl", "{\"prompt\": \"a\"}\n{\"promt\": 1}").unwrap_err());
        assert!(error.contains("q.jsonl, line 2") && error.contains("did you mean `prompt`?"), "{error}");
    }

    #[test]
    fn a_hundred_thousand_prompts_are_read() {
        let mut text = "name: x\nmodels: [vllm_a]\nprompts:\n".to_owned();
        for n in 0..100_000 {
            text.push_str("  - prompt: p");
            text.push_str(&n.to_string());
            text.push('\n');
        }
        assert_eq!(parse(&text, Path::new(".")).unwrap().prompts.len(), 100_000);
    }
}
