//! From protobuf to the domain: the door at which everything a caller sends is parsed.

use crate::error::{ApiError, Reason};
use crate::v1;
use genmill_core::admit::Refusal;
use genmill_core::controls::{Controls, ReasoningEffort, StructuredOutput, Tool, ToolCall, ToolChoice};
use genmill_core::ids::JobId;
use genmill_core::image::{Detail, Image, Part};
use genmill_core::model::ModelName;
use genmill_core::names::{Experiment, Tenant};
use genmill_core::request::{ChatMessage, Input, Invalid, Mode, Priority, Request, Role};
use genmill_core::state::State;
use genmill_core::time::UnixMs;

fn invalid(field: &'static str, problem: impl Into<String>) -> Refusal {
    Refusal::Invalid(Invalid::new(field, problem))
}

/// Reads a request. Only its form is checked here: see `Request::check` for the rules.
///
/// # Errors
/// [`Refusal`] naming the field that is wrong.
pub fn request(pb: v1::GenerationRequest) -> Result<Request, Refusal> {
    if pb.model.is_empty() {
        return Err(invalid("model", "must be set"));
    }
    let text = |text: String| (!text.is_empty()).then_some(text);
    let controls = Controls {
        min_p: pb.min_p,
        logit_bias: pb.logit_bias.into_iter().collect(),
        min_tokens: pb.min_tokens,
        stop_token_ids: pb.stop_token_ids,
        ignore_eos: pb.ignore_eos,
        frequency_penalty: pb.frequency_penalty,
        presence_penalty: pb.presence_penalty,
        repetition_penalty: pb.repetition_penalty,
        n: pb.n,
        logprobs: pb.logprobs,
        prompt_logprobs: pb.prompt_logprobs,
        echo: pb.echo,
        structured_output: pb.structured_output.map(structured_output).transpose()?,
        tools: pb.tools.into_iter().map(tool).collect(),
        tool_choice: pb.tool_choice.map(tool_choice).transpose()?,
        reasoning_effort: pb.reasoning_effort.map(reasoning_effort).transpose()?,
    };
    Ok(Request {
        controls,
        model: ModelName::parse(&pb.model)?,
        input: input(pb.input.ok_or_else(|| invalid("prompt", "either prompt or messages must be set"))?)?,
        max_tokens: pb.max_tokens,
        temperature: pb.temperature,
        top_p: pb.top_p,
        top_k: pb.top_k,
        seed: pb.seed,
        stop: pb.stop,
        labels: pb.labels.into_iter().collect(),
        tenant: tenant(&pb.tenant)?.unwrap_or_default(),
        experiment: experiment(&pb.experiment)?,
        priority: priority(pb.priority)?,
        request_id: text(pb.request_id),
        timeout_ms: pb.timeout_ms,
        deadline: pb.deadline.map(|at| unix_ms("deadline", &at)).transpose()?,
        not_before: pb.not_before.map(|at| unix_ms("not_before", &at)).transpose()?,
        mode: mode(pb.mode)?,
    })
}

fn structured_output(pb: v1::StructuredOutput) -> Result<StructuredOutput, Refusal> {
    use v1::structured_output::Form;
    match pb.form.ok_or_else(|| invalid("structured_output", "json_schema, regex, choice or lark must be set"))? {
        Form::JsonSchema(schema) => Ok(StructuredOutput::JsonSchema(schema)),
        Form::Regex(regex) => Ok(StructuredOutput::Regex(regex)),
        Form::Choice(choice) => Ok(StructuredOutput::Choice(choice.choices)),
        Form::Lark(grammar) => Ok(StructuredOutput::Lark(grammar)),
    }
}

fn tool_choice(pb: v1::ToolChoice) -> Result<ToolChoice, Refusal> {
    use v1::tool_choice::Choice;
    let unset = || invalid("tool_choice", "must be auto, none, required or a tool's name");
    let mode = match pb.choice.ok_or_else(unset)? {
        Choice::Tool(name) => return Ok(ToolChoice::Tool(name)),
        Choice::Mode(mode) => mode,
    };
    match v1::ToolChoiceMode::try_from(mode) {
        Ok(v1::ToolChoiceMode::Auto) => Ok(ToolChoice::Auto),
        Ok(v1::ToolChoiceMode::None) => Ok(ToolChoice::None),
        Ok(v1::ToolChoiceMode::Required) => Ok(ToolChoice::Required),
        Ok(v1::ToolChoiceMode::Unspecified) | Err(_) => Err(unset()),
    }
}

fn reasoning_effort(pb: i32) -> Result<ReasoningEffort, Refusal> {
    match v1::ReasoningEffort::try_from(pb) {
        Ok(v1::ReasoningEffort::None) => Ok(ReasoningEffort::None),
        Ok(v1::ReasoningEffort::Minimal) => Ok(ReasoningEffort::Minimal),
        Ok(v1::ReasoningEffort::Low) => Ok(ReasoningEffort::Low),
        Ok(v1::ReasoningEffort::Medium) => Ok(ReasoningEffort::Medium),
        Ok(v1::ReasoningEffort::High) => Ok(ReasoningEffort::High),
        Ok(v1::ReasoningEffort::Unspecified) | Err(_) => {
            Err(invalid("reasoning_effort", "must be none, minimal, low, medium or high"))
        }
    }
}

fn tool(v1::Tool { name, description, parameters }: v1::Tool) -> Tool {
    Tool { name, description, parameters }
}

fn tool_call(v1::ToolCall { id, name, arguments }: v1::ToolCall) -> ToolCall {
    ToolCall { id, name, arguments }
}

fn input(pb: v1::generation_request::Input) -> Result<Input, Refusal> {
    match pb {
        v1::generation_request::Input::Prompt(prompt) => Ok(Input::Prompt(prompt)),
        v1::generation_request::Input::Messages(messages) => {
            Ok(Input::Messages(messages.messages.into_iter().map(message).collect::<Result<_, _>>()?))
        }
    }
}

fn message(pb: v1::ChatMessage) -> Result<ChatMessage, Refusal> {
    let role = match v1::Role::try_from(pb.role) {
        Ok(v1::Role::System) => Role::System,
        Ok(v1::Role::User) => Role::User,
        Ok(v1::Role::Assistant) => Role::Assistant,
        Ok(v1::Role::Tool) => Role::Tool,
        Ok(v1::Role::Unspecified) | Err(_) => {
            return Err(invalid("messages", "every message needs a role: system, user, assistant or tool"));
        }
    };
    if !pb.content.is_empty() && !pb.parts.is_empty() {
        return Err(invalid("messages", "a message has either content or parts"));
    }
    let parts = pb.parts.into_iter().map(part).collect::<Result<Vec<_>, _>>()?;
    let tool_calls = pb.tool_calls.into_iter().map(tool_call).collect();
    let message =
        ChatMessage { parts, tool_calls, tool_call_id: pb.tool_call_id, ..ChatMessage::new(role, pb.content) };
    if message.images().next().is_some() {
        return Ok(message);
    }
    // Texts alone are one text, which whoever knows nothing of images can read.
    Ok(ChatMessage { content: message.texts().collect(), parts: Vec::new(), ..message })
}

fn part(pb: v1::ContentPart) -> Result<Part, Refusal> {
    use v1::content_part::Part::{Image, Text};
    match pb.part.ok_or_else(|| invalid("messages", "a part must be text or an image"))? {
        Text(text) => Ok(Part::Text(text)),
        Image(pb) => image(pb).map(Part::Image),
    }
}

fn image(pb: v1::Image) -> Result<Image, Refusal> {
    use v1::image::Source;
    let unset = || invalid("messages", "an image needs a url or data");
    let image = match pb.source.ok_or_else(unset)? {
        Source::Url(url) => Image::at(url, &pb.media_type),
        Source::Data(data) => Image::of(data, &pb.media_type),
    };
    let detail = match v1::ImageDetail::try_from(pb.detail) {
        Ok(v1::ImageDetail::Unspecified) => None,
        Ok(v1::ImageDetail::Auto) => Some(Detail::Auto),
        Ok(v1::ImageDetail::Low) => Some(Detail::Low),
        Ok(v1::ImageDetail::High) => Some(Detail::High),
        Err(_) => return Err(invalid("messages", "an image's detail must be auto, low or high")),
    };
    Ok(Image { detail, ..image.map_err(|problem| invalid("messages", problem))? })
}

fn mode(pb: i32) -> Result<Mode, Refusal> {
    match v1::Mode::try_from(pb) {
        Ok(v1::Mode::Unspecified) => Ok(Mode::Auto),
        Ok(v1::Mode::Direct) => Ok(Mode::Direct),
        Ok(v1::Mode::Batch) => Ok(Mode::Batch),
        Err(_) => Err(invalid("mode", format!("{pb} is no mode"))),
    }
}

fn priority(pb: i32) -> Result<Priority, Refusal> {
    match v1::Priority::try_from(pb) {
        Ok(v1::Priority::Interactive) => Ok(Priority::Interactive),
        Ok(v1::Priority::Normal | v1::Priority::Unspecified) => Ok(Priority::Normal),
        Ok(v1::Priority::Bulk) => Ok(Priority::Bulk),
        Err(_) => Err(invalid("priority", format!("{pb} is no priority"))),
    }
}

/// 9999-12-31T23:59:59Z, the last second that a google.protobuf.Timestamp may name.
const SECONDS_MAX: u64 = 253_402_300_799;

/// Reads a time of the field `field`.
///
/// # Errors
/// [`Refusal`] when it is out of range.
pub fn unix_ms(field: &'static str, at: &prost_types::Timestamp) -> Result<UnixMs, Refusal> {
    let seconds = u64::try_from(at.seconds).ok().filter(|seconds| *seconds <= SECONDS_MAX);
    let seconds = seconds.ok_or_else(|| invalid(field, "must be a time from 1970 to 9999"))?;
    let nanos = u64::try_from(at.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
    let nanos = nanos.ok_or_else(|| invalid(field, "nanos must be 0 to 999,999,999"))?;
    Ok(UnixMs(seconds * 1_000 + nanos / 1_000_000))
}

/// Reads a tenant's name; `None` when it is empty.
///
/// # Errors
/// [`Refusal`] when it is no name.
pub fn tenant(name: &str) -> Result<Option<Tenant>, Refusal> {
    let parse = || Tenant::parse(name).map_err(|error| invalid("tenant", error.to_string()));
    (!name.is_empty()).then(parse).transpose()
}

/// Reads an experiment's name; `None` when it is empty.
///
/// # Errors
/// [`Refusal`] when it is no name.
pub fn experiment(name: &str) -> Result<Option<Experiment>, Refusal> {
    let parse = || Experiment::parse(name).map_err(|error| invalid("experiment", error.to_string()));
    (!name.is_empty()).then(parse).transpose()
}

/// Which jobs a caller means. What is `None` matches any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// The state.
    pub state: Option<State>,
    /// The model.
    pub model: Option<ModelName>,
    /// The experiment.
    pub experiment: Option<Experiment>,
    /// The tenant.
    pub tenant: Option<Tenant>,
}

/// Reads a filter.
///
/// # Errors
/// [`Refusal`] naming the field that is wrong.
pub fn filter(pb: Option<v1::JobFilter>) -> Result<Filter, Refusal> {
    let pb = pb.unwrap_or_default();
    Ok(Filter {
        state: state(pb.state)?,
        model: (!pb.model.is_empty()).then(|| ModelName::parse(&pb.model)).transpose()?,
        experiment: experiment(&pb.experiment)?,
        tenant: tenant(&pb.tenant)?,
    })
}

fn state(pb: i32) -> Result<Option<State>, Refusal> {
    match v1::JobState::try_from(pb) {
        Ok(v1::JobState::Unspecified) => Ok(None),
        Ok(v1::JobState::Queued) => Ok(Some(State::Queued)),
        Ok(v1::JobState::Delayed) => Ok(Some(State::Delayed)),
        Ok(v1::JobState::Running) => Ok(Some(State::Running)),
        Ok(v1::JobState::Succeeded) => Ok(Some(State::Succeeded)),
        Ok(v1::JobState::Failed) => Ok(Some(State::Failed)),
        Ok(v1::JobState::Cancelled) => Ok(Some(State::Cancelled)),
        Ok(v1::JobState::Expired) => Ok(Some(State::Expired)),
        Err(_) => Err(invalid("filter.state", format!("{pb} is no state"))),
    }
}

/// Reads a job id.
///
/// # Errors
/// [`ApiError`] when it is none.
pub fn job_id(id: &str) -> Result<JobId, ApiError> {
    JobId::parse(id).map_err(|error| ApiError::new(Reason::InvalidRequest, format!("job_id: {error}")))
}
