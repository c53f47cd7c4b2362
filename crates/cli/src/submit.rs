//! `genmill submit`: one job from the command line.

use crate::exit::{Ending, WrongUsage};
use crate::images::Part;
use crate::watch::print_text;
use crate::when::{When, parse_when};
use crate::{documents, messages, output, show};
use anyhow::Context as _;
use genmill_client::{Client, Position, v1};
use std::path::PathBuf;

/// Submit a job, wait for it, print its text
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    request: RequestArgs,
    /// Print the text as it comes; with --json nothing but the job at its end
    #[arg(long, conflicts_with = "no_wait")]
    stream: bool,
    /// Print the job's id and leave
    #[arg(long)]
    no_wait: bool,
    /// Print nothing but the job, at its end (with --no-wait as accepted), as one line of JSON
    #[arg(long)]
    json: bool,
}

/// Every field of a request.
#[derive(Debug, clap::Args)]
struct RequestArgs {
    /// The model with its prefix, such as vllm_NAME or litellm_PROVIDER/MODEL; `genmill models` lists them
    #[arg(long, value_name = "NAME")]
    model: String,
    /// The input as plain text
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    #[arg(required_unless_present = "messages_file", conflicts_with = "messages_file")]
    prompt: Option<String>,
    /// The input as a conversation: a YAML or JSON list of {role: system|user|assistant|tool, content}, bare or under the key
    /// `messages`; content may be a list of parts: {type: text, text}, {type: image_url, image_url: URL or {url, detail}},
    /// {type: image, file, detail}; - is standard input
    #[arg(long, value_name = "FILE")]
    messages_file: Option<PathBuf>,
    /// An image that is shown with the prompt, to a remote model: a file (PNG, JPEG, GIF, WebP) or an address, from which the
    /// provider fetches it; may be repeated. With text at most 1.5 MiB in all
    #[arg(long = "image", value_name = "FILE_OR_URL", conflicts_with = "messages_file")]
    images: Vec<String>,
    /// Upper bound of generated tokens [default: the server's]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Sampling temperature, 0 (greedy) to 2 [default: the server's]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Only the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Only the K most likely tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Seed of the random numbers [default: drawn by the server and kept with the job]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Generation ends before this string; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    #[command(flatten)]
    controls: ControlArgs,
    /// A label kept with the job; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Who the job belongs to [default: default]
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// The experiment the job is part of
    #[arg(long, value_name = "NAME")]
    experiment: Option<String>,
    /// Which jobs go first
    #[arg(long, value_enum)]
    priority: Option<Priority>,
    /// Makes submission idempotent: the same id and content is the same job. A --deadline or --not-before that goes with it
    /// should be a time: a duration is another time at each submission, so other content
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Bound of one attempt, in milliseconds
    #[arg(long, value_name = "MS")]
    timeout_ms: Option<u64>,
    /// The job expires when it has not finished by then: an RFC 3339 time, or a duration from now such as 10m
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    deadline: Option<When>,
    /// No attempt starts earlier: an RFC 3339 time, or a duration from now such as 10m
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    not_before: Option<When>,
    /// How the job gets to its provider: in a batch at half the price or so, which may take a day, or by a call of its own.
    /// Unset: in a batch if it is of priority bulk and its deadline is a day or more away
    #[arg(long, value_enum)]
    mode: Option<Mode>,
}

/// What else steers a generation, and the form of its text.
#[derive(Debug, clap::Args)]
struct ControlArgs {
    /// Only tokens of at least this part of the best token's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f64>,
    /// Added to the logit of a token, -100 to 100; may be repeated
    #[arg(long, value_name = "TOKEN_ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f64)>,
    /// No end before so many tokens
    #[arg(long, value_name = "N")]
    min_tokens: Option<u32>,
    /// Generation ends before this token; may be repeated
    #[arg(long = "stop-token", value_name = "TOKEN_ID")]
    stop_tokens: Vec<u32>,
    /// The model's own end tokens do not end the text
    #[arg(long)]
    ignore_eos: bool,
    /// Taken from a token's logit for each time it was generated, -2 to 2
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f64>,
    /// Taken from a token's logit when it was generated at all, -2 to 2
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f64>,
    /// Divides positive and multiplies negative logits of tokens of prompt and text; 1 changes nothing
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f64>,
    /// How many texts to generate; each is printed on a line of its own
    #[arg(long, short, value_name = "N")]
    n: Option<u32>,
    /// Log probabilities of the text's tokens and of the N best at each place, 0 to 20; shown by --json
    #[arg(long, value_name = "N")]
    logprobs: Option<u32>,
    /// The same of the prompt's tokens
    #[arg(long, value_name = "N")]
    prompt_logprobs: Option<u32>,
    /// The text begins with the prompt
    #[arg(long)]
    echo: bool,
    /// The text is a JSON value that the JSON schema in this file allows; - is standard input
    #[arg(long, value_name = "FILE", group = "form")]
    json_schema: Option<PathBuf>,
    /// The text matches this regular expression
    #[arg(long, value_name = "REGEX", group = "form", allow_hyphen_values = true)]
    regex: Option<String>,
    /// The text is this, or another --choice
    #[arg(long = "choice", value_name = "TEXT", group = "form", allow_hyphen_values = true)]
    choices: Vec<String>,
    /// The text is a sentence of the Lark grammar in this file; - is standard input
    #[arg(long, value_name = "FILE", group = "form")]
    lark: Option<PathBuf>,
    /// Functions that the model may ask to be called: a YAML or JSON list as chat APIs take it; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "form")]
    tools_file: Option<PathBuf>,
    /// Whether the model calls its tools: auto, none, required, or the name of one
    #[arg(long, value_name = "CHOICE", value_parser = parse_tool_choice)]
    tool_choice: Option<v1::ToolChoice>,
    /// How long a remote model thinks before it answers
    #[arg(long, value_enum)]
    reasoning_effort: Option<Effort>,
}

impl ControlArgs {
    fn form(&mut self) -> anyhow::Result<Option<v1::StructuredOutput>> {
        use v1::structured_output::Form;
        let form = match (self.json_schema.take(), self.lark.take(), self.regex.take()) {
            (Some(file), _, _) => Form::JsonSchema(documents::read_text(&file)?),
            (_, Some(file), _) => Form::Lark(documents::read_text(&file)?),
            (_, _, Some(regex)) => Form::Regex(regex),
            _ if self.choices.is_empty() => return Ok(None),
            _ => Form::Choice(v1::Choices { choices: std::mem::take(&mut self.choices) }),
        };
        Ok(Some(v1::StructuredOutput { form: Some(form) }))
    }

    fn tools(&mut self) -> anyhow::Result<Vec<v1::Tool>> {
        let Some(file) = self.tools_file.take() else { return Ok(Vec::new()) };
        let text = documents::read_text(&file)?;
        messages::tools(&text).with_context(|| format!("in {}", file.display()))
    }
}

/// Which jobs go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Priority {
    /// Somebody is waiting for the answer
    Interactive,
    /// The usual class
    Normal,
    /// Large runs that may take what is left
    Bulk,
}

/// How a job gets to its provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// By a call of its own
    Direct,
    /// In a batch of its provider
    Batch,
}

impl From<Mode> for v1::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Direct => Self::Direct,
            Mode::Batch => Self::Batch,
        }
    }
}

impl From<Priority> for v1::Priority {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Interactive => Self::Interactive,
            Priority::Normal => Self::Normal,
            Priority::Bulk => Self::Bulk,
        }
    }
}

/// How long a model thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Effort {
    /// Not at all
    None,
    /// Hardly
    Minimal,
    /// Shortly
    Low,
    /// In between
    Medium,
    /// Long
    High,
}

impl Effort {
    const fn in_words(self) -> v1::ReasoningEffort {
        match self {
            Self::None => v1::ReasoningEffort::None,
            Self::Minimal => v1::ReasoningEffort::Minimal,
            Self::Low => v1::ReasoningEffort::Low,
            Self::Medium => v1::ReasoningEffort::Medium,
            Self::High => v1::ReasoningEffort::High,
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  genmill submit --model vllm_tictactoe-qwen2 --prompt 'Best move (1-9):' --temperature 0
  genmill submit --model litellm_gpt-4 --messages-file chat.yaml --stream
  genmill submit --model hf_gpt2 --prompt 'Once' --seed 7 --label set=a --no-wait
  genmill submit --model hf_gpt2 --prompt 'Once' --request-id once-1 --deadline 2027-01-31T18:00:00Z
  genmill submit --model hf_gpt2 --prompt 'Once' --json | jq -r .result.text
  genmill submit --model vllm_x --prompt 'A person:' --json-schema person.json -n 4 --temperature 1
  genmill submit --model vllm_x --messages-file chat.yaml --tools-file tools.json --json

Exit codes: 0 done (with --no-wait: accepted), 1 the job failed or was refused, 2 wrong usage,
3 server not reachable.";

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[expect(clippy::unnecessary_wraps, reason = "clap's form of a parser")]
fn parse_tool_choice(text: &str) -> Result<v1::ToolChoice, String> {
    use v1::tool_choice::Choice;
    let choice = match text {
        "auto" => Choice::Mode(v1::ToolChoiceMode::Auto.into()),
        "none" => Choice::Mode(v1::ToolChoiceMode::None.into()),
        "required" => Choice::Mode(v1::ToolChoiceMode::Required.into()),
        tool => Choice::Tool(tool.to_owned()),
    };
    Ok(v1::ToolChoice { choice: Some(choice) })
}

fn parse_bias(text: &str) -> Result<(u32, f64), String> {
    let form = "write TOKEN_ID=BIAS, such as 42=-100";
    let (token, bias) = text.split_once('=').ok_or(form)?;
    Ok((token.parse().map_err(|_| form)?, bias.parse().map_err(|_| form)?))
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let request = args.request.into_message(genmill_daemon::clock::now_unix_ms()).map_err(WrongUsage)?;
    let client = Client::connect(server).await?;
    let submitted = client.submit(request).await?.job;
    if args.no_wait {
        if args.json {
            output::job_json(&submitted)?;
        } else {
            output::line(&submitted.id)?;
        }
        return Ok(Ending::Done);
    }
    if args.stream && !args.json {
        let job = print_text(&client, &submitted.id, Position::default()).await?;
        return Ok(show::ending(job));
    }
    let job = crate::watch::wait(&client, &submitted.id).await?;
    match &job.result {
        _ if args.json => output::job_json(&job)?,
        Some(result) => {
            output::line(&result.text)?;
            for sample in &result.more_samples {
                output::line(&sample.text)?;
            }
        }
        None => {}
    }
    Ok(show::ending(job))
}

impl RequestArgs {
    fn into_message(self, now_unix_ms: u64) -> anyhow::Result<v1::GenerationRequest> {
        let mut controls = self.controls;
        Ok(v1::GenerationRequest {
            structured_output: controls.form()?,
            tools: controls.tools()?,
            tool_choice: controls.tool_choice,
            reasoning_effort: controls.reasoning_effort.map(|effort| effort.in_words().into()),
            min_p: controls.min_p,
            logit_bias: controls.logit_bias.into_iter().collect(),
            min_tokens: controls.min_tokens,
            stop_token_ids: controls.stop_tokens,
            ignore_eos: controls.ignore_eos,
            frequency_penalty: controls.frequency_penalty,
            presence_penalty: controls.presence_penalty,
            repetition_penalty: controls.repetition_penalty,
            n: controls.n,
            logprobs: controls.logprobs,
            prompt_logprobs: controls.prompt_logprobs,
            echo: controls.echo,
            input: Some(input(self.prompt, self.images, self.messages_file)?),
            model: self.model,
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            seed: self.seed,
            stop: self.stop,
            labels: self.labels.into_iter().collect(),
            tenant: self.tenant.unwrap_or_default(),
            experiment: self.experiment.unwrap_or_default(),
            priority: self.priority.map_or(v1::Priority::Unspecified, v1::Priority::from).into(),
            request_id: self.request_id.unwrap_or_default(),
            timeout_ms: self.timeout_ms,
            deadline: self.deadline.map(|when| when.timestamp(now_unix_ms)),
            not_before: self.not_before.map(|when| when.timestamp(now_unix_ms)),
            mode: self.mode.map_or(v1::Mode::Unspecified, v1::Mode::from).into(),
        })
    }
}

fn input(
    prompt: Option<String>,
    images: Vec<String>,
    file: Option<PathBuf>,
) -> anyhow::Result<v1::generation_request::Input> {
    let prompt = prompt.unwrap_or_default();
    let Some(file) = file else {
        if images.is_empty() {
            return Ok(v1::generation_request::Input::Prompt(prompt));
        }
        // Images first: models read the question better that way.
        let parts = images.into_iter().map(Part::named).chain([Part::Text { text: prompt }]);
        return messages::input(vec![messages::Message::of_user(parts.collect())]);
    };
    let text = documents::read_text(&file)?;
    let read = messages::read(&text).with_context(|| format!("in {}", file.display()))?;
    messages::input(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        request: RequestArgs,
    }

    #[test]
    fn every_field_has_a_flag() {
        let line = "x --model vllm_x --prompt Hi --max-tokens 1 --temperature 0.5 --top-p 0.9 --top-k 3 --seed 7 \
                    --stop a --stop b --label k=v=w --label e= --tenant t --experiment e --priority bulk \
                    --request-id r --timeout-ms 5 --deadline 1s --not-before 500ms --min-p 0.1 --logit-bias 5=-1.5 \
                    --min-tokens 1 --stop-token 8 --ignore-eos --frequency-penalty -0.5 --presence-penalty 0.5 \
                    --repetition-penalty 1.5 -n 2 --logprobs 3 --prompt-logprobs 0 --echo --choice a --choice b \
                    --reasoning-effort low --mode batch";
        let request = Line::try_parse_from(line.split_whitespace()).unwrap().request.into_message(4_000).unwrap();
        let expect = v1::GenerationRequest {
            model: "vllm_x".to_owned(),
            input: Some(v1::generation_request::Input::Prompt("Hi".to_owned())),
            max_tokens: Some(1),
            temperature: Some(0.5),
            top_p: Some(0.9),
            top_k: Some(3),
            seed: Some(7),
            stop: vec!["a".to_owned(), "b".to_owned()],
            labels: [("k".to_owned(), "v=w".to_owned()), ("e".to_owned(), String::new())].into(),
            tenant: "t".to_owned(),
            experiment: "e".to_owned(),
            priority: v1::Priority::Bulk.into(),
            request_id: "r".to_owned(),
            timeout_ms: Some(5),
            deadline: Some(prost_types::Timestamp { seconds: 5, nanos: 0 }),
            not_before: Some(prost_types::Timestamp { seconds: 4, nanos: 500_000_000 }),
            mode: v1::Mode::Batch.into(),
            min_p: Some(0.1),
            logit_bias: [(5, -1.5)].into(),
            min_tokens: Some(1),
            stop_token_ids: vec![8],
            ignore_eos: true,
            frequency_penalty: Some(-0.5),
            presence_penalty: Some(0.5),
            repetition_penalty: Some(1.5),
            n: Some(2),
            logprobs: Some(3),
            prompt_logprobs: Some(0),
            echo: true,
            structured_output: Some(v1::StructuredOutput {
                form: Some(v1::structured_output::Form::Choice(v1::Choices {
                    choices: vec!["a".to_owned(), "b".to_owned()],
                })),
            }),
            tools: Vec::new(),
            tool_choice: None,
            reasoning_effort: Some(v1::ReasoningEffort::Low.into()),
        };
        assert_eq!(request, expect);
    }

    #[test]
    fn a_prompt_may_begin_with_a_dash() {
        let line = ["x", "--model", "vllm_x", "--prompt", "- a", "--stop", "--"];
        let request = Line::try_parse_from(line).unwrap().request.into_message(0).unwrap();
        assert_eq!(request.input, Some(v1::generation_request::Input::Prompt("- a".to_owned())));
        assert_eq!(request.stop, ["--"]);
    }

    #[test]
    fn messages_are_read_from_yaml_and_json() {
        let folder = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            let file = folder.path().join("chat");
            std::fs::write(&file, text).unwrap();
            input(None, Vec::new(), Some(file))
        };
        let yaml = read("- {role: system, content: Be brief.}\n- role: user\n  content: Hi\n").unwrap();
        let json = read(r#"[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"}]"#).unwrap();
        assert_eq!(yaml, json);
        let object = r#"{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"}]}"#;
        assert_eq!(read(object).unwrap(), json);
        let error = format!("{:#}", read("- {role: boss, content: Hi}").unwrap_err());
        assert!(error.contains("[0].role") && error.contains("assistant"), "{error}");
        let error = format!("{:#}", read("- {role: user, contents: Hi}").unwrap_err());
        assert!(error.contains("did you mean `content`?"), "{error}");
    }
}
