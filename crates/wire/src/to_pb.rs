//! From the domain to protobuf. Cannot fail.

use crate::v1;
use genmill_core::attempt::{
    Attempt, AttemptEnd, Determinism, Failure, FailureClass, FinishReason, Generation, Sample, TokenLogprob, Usage,
    UsageDetails,
};
use genmill_core::controls::{ReasoningEffort, StructuredOutput, Tool, ToolCall, ToolChoice};
use genmill_core::image::{Detail, Image, MediaType, Part, Source};
use genmill_core::job::{Job, JobSpec};
use genmill_core::money::Cost;
use genmill_core::request::{ChatMessage, Input, Priority, Role};
use genmill_core::state::State;
use genmill_core::time::UnixMs;

/// A job with all its parts.
#[must_use]
pub fn job(job: Job) -> v1::Job {
    let cost = job.cost().map(cost);
    let result = job.generation.as_ref().map(|generation| result(generation, &job));
    let redriven_from = job.spec.redriven_from.map(|id| id.to_string()).unwrap_or_default();
    v1::Job {
        id: job.id.to_string(),
        state: state(job.state).into(),
        request: Some(request(job.spec)),
        attempts: job.epoch.0,
        failures: job.failures,
        losses: job.losses,
        created_at: Some(timestamp(job.created_at)),
        started_at: job.started_at.map(timestamp),
        finished_at: job.finished_at.map(timestamp),
        not_before: job.not_before.map(timestamp),
        worker: job.worker.map(|worker| worker.to_string()).unwrap_or_default(),
        result,
        cost,
        error: job.failure.map(failure),
        attempt_history: job.attempts.into_iter().map(attempt).collect(),
        redriven_from,
        redriven_as: job.redriven_as.map(|id| id.to_string()).unwrap_or_default(),
    }
}

/// What a list shows of a job: everything but what may be long: prompt, messages, tools, form of the text, what was generated, history.
#[must_use]
pub fn job_in_list(full: Job) -> v1::Job {
    let mut pb = job(full);
    if let Some(request) = &mut pb.request {
        request.input = None;
        request.tools.clear();
        request.structured_output = None;
    }
    if let Some(result) = &mut pb.result {
        *result = v1::Result {
            finish_reason: result.finish_reason,
            usage: result.usage,
            latency: result.latency,
            determinism: result.determinism,
            fingerprint: std::mem::take(&mut result.fingerprint),
            ..v1::Result::default()
        };
    }
    pb.attempt_history.clear();
    pb
}

fn request(spec: JobSpec) -> v1::GenerationRequest {
    let controls = spec.sampling.controls;
    v1::GenerationRequest {
        min_p: controls.min_p,
        logit_bias: controls.logit_bias.into_iter().collect(),
        min_tokens: controls.min_tokens,
        stop_token_ids: controls.stop_token_ids,
        ignore_eos: controls.ignore_eos,
        frequency_penalty: controls.frequency_penalty,
        presence_penalty: controls.presence_penalty,
        repetition_penalty: controls.repetition_penalty,
        n: controls.n,
        logprobs: controls.logprobs,
        prompt_logprobs: controls.prompt_logprobs,
        echo: controls.echo,
        structured_output: controls.structured_output.map(structured_output),
        tools: controls.tools.into_iter().map(tool).collect(),
        tool_choice: controls.tool_choice.map(tool_choice),
        reasoning_effort: controls.reasoning_effort.map(|effort| reasoning_effort(effort).into()),
        model: spec.model.into(),
        input: Some(input(spec.input)),
        max_tokens: Some(spec.sampling.max_tokens),
        temperature: Some(spec.sampling.temperature),
        top_p: spec.sampling.top_p,
        top_k: spec.sampling.top_k,
        seed: Some(spec.sampling.seed),
        stop: spec.sampling.stop,
        labels: spec.labels.into_iter().collect(),
        tenant: spec.tenant.into(),
        experiment: spec.experiment.map(String::from).unwrap_or_default(),
        priority: priority(spec.priority).into(),
        request_id: spec.request_id.unwrap_or_default(),
        timeout_ms: spec.timeout_ms,
        deadline: spec.deadline.map(timestamp),
        not_before: spec.not_before.map(timestamp),
        mode: if spec.batch { v1::Mode::Batch } else { v1::Mode::Unspecified }.into(),
    }
}

fn structured_output(form: StructuredOutput) -> v1::StructuredOutput {
    use v1::structured_output::Form;
    let form = match form {
        StructuredOutput::JsonSchema(schema) => Form::JsonSchema(schema),
        StructuredOutput::Regex(regex) => Form::Regex(regex),
        StructuredOutput::Choice(choices) => Form::Choice(v1::Choices { choices }),
        StructuredOutput::Lark(grammar) => Form::Lark(grammar),
    };
    v1::StructuredOutput { form: Some(form) }
}

fn tool(Tool { name, description, parameters }: Tool) -> v1::Tool {
    v1::Tool { name, description, parameters }
}

fn tool_choice(choice: ToolChoice) -> v1::ToolChoice {
    use v1::tool_choice::Choice;
    let mode = |mode: v1::ToolChoiceMode| Choice::Mode(mode.into());
    let choice = match choice {
        ToolChoice::Auto => mode(v1::ToolChoiceMode::Auto),
        ToolChoice::None => mode(v1::ToolChoiceMode::None),
        ToolChoice::Required => mode(v1::ToolChoiceMode::Required),
        ToolChoice::Tool(name) => Choice::Tool(name),
    };
    v1::ToolChoice { choice: Some(choice) }
}

const fn reasoning_effort(effort: ReasoningEffort) -> v1::ReasoningEffort {
    match effort {
        ReasoningEffort::None => v1::ReasoningEffort::None,
        ReasoningEffort::Minimal => v1::ReasoningEffort::Minimal,
        ReasoningEffort::Low => v1::ReasoningEffort::Low,
        ReasoningEffort::Medium => v1::ReasoningEffort::Medium,
        ReasoningEffort::High => v1::ReasoningEffort::High,
    }
}

fn tool_call(ToolCall { id, name, arguments }: ToolCall) -> v1::ToolCall {
    v1::ToolCall { id, name, arguments }
}

fn tool_calls(calls: &[ToolCall]) -> Vec<v1::ToolCall> {
    calls.iter().cloned().map(tool_call).collect()
}

fn input(input: Input) -> v1::generation_request::Input {
    match input {
        Input::Prompt(prompt) => v1::generation_request::Input::Prompt(prompt),
        Input::Messages(messages) => v1::generation_request::Input::Messages(v1::ChatMessages {
            messages: messages.into_iter().map(message).collect(),
        }),
    }
}

fn message(message: ChatMessage) -> v1::ChatMessage {
    let role = match message.role {
        Role::System => v1::Role::System,
        Role::User => v1::Role::User,
        Role::Assistant => v1::Role::Assistant,
        Role::Tool => v1::Role::Tool,
    };
    v1::ChatMessage {
        role: role.into(),
        content: message.content,
        tool_calls: tool_calls(&message.tool_calls),
        tool_call_id: message.tool_call_id,
        parts: message.parts.into_iter().map(part).collect(),
    }
}

fn part(part: Part) -> v1::ContentPart {
    use v1::content_part::Part as Pb;
    let part = match part {
        Part::Text(text) => Pb::Text(text),
        Part::Image(of) => Pb::Image(image(of)),
    };
    v1::ContentPart { part: Some(part) }
}

fn image(Image { source, media_type, detail }: Image) -> v1::Image {
    use v1::image::Source as Pb;
    let source = match source {
        Source::Url(url) => Pb::Url(url),
        Source::Data(bytes) => Pb::Data(bytes.as_ref().to_vec()),
    };
    let detail = match detail {
        None => v1::ImageDetail::Unspecified,
        Some(Detail::Auto) => v1::ImageDetail::Auto,
        Some(Detail::Low) => v1::ImageDetail::Low,
        Some(Detail::High) => v1::ImageDetail::High,
    };
    let media_type = media_type.map(MediaType::name).unwrap_or_default().to_owned();
    v1::Image { media_type, detail: detail.into(), source: Some(source) }
}

fn priority(priority: Priority) -> v1::Priority {
    match priority {
        Priority::Interactive => v1::Priority::Interactive,
        Priority::Normal => v1::Priority::Normal,
        Priority::Bulk => v1::Priority::Bulk,
    }
}

/// A state.
#[must_use]
pub fn state(state: State) -> v1::JobState {
    match state {
        State::Queued => v1::JobState::Queued,
        State::Delayed => v1::JobState::Delayed,
        State::Running => v1::JobState::Running,
        State::Succeeded => v1::JobState::Succeeded,
        State::Failed => v1::JobState::Failed,
        State::Cancelled => v1::JobState::Cancelled,
        State::Expired => v1::JobState::Expired,
    }
}

fn finish_reason(reason: FinishReason) -> v1::FinishReason {
    match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
        FinishReason::ContentFilter => v1::FinishReason::ContentFilter,
        FinishReason::ToolCalls => v1::FinishReason::ToolCalls,
        FinishReason::Unknown => v1::FinishReason::Unspecified,
    }
}

fn logprobs(logprobs: &[TokenLogprob]) -> Vec<v1::TokenLogprob> {
    let each = |TokenLogprob { token_id, token, logprob, top }: &TokenLogprob| v1::TokenLogprob {
        token_id: *token_id,
        token: token.clone(),
        logprob: *logprob,
        top: self::logprobs(top),
    };
    logprobs.iter().map(each).collect()
}

fn sample((number, sample): (u32, &Sample)) -> v1::Sample {
    v1::Sample {
        sample: number,
        text: sample.text.clone(),
        finish_reason: finish_reason(sample.finish_reason).into(),
        logprobs: logprobs(&sample.logprobs),
        tool_calls: tool_calls(&sample.tool_calls),
    }
}

fn result(generation: &Generation, job: &Job) -> v1::Result {
    let since_created = |at: Option<UnixMs>| at.map_or(0, |at| at.ms_since(job.created_at));
    v1::Result {
        text: generation.text.clone(),
        finish_reason: finish_reason(generation.finish_reason).into(),
        logprobs: logprobs(&generation.logprobs),
        prompt_logprobs: logprobs(&generation.prompt_logprobs),
        tool_calls: tool_calls(&generation.tool_calls),
        more_samples: (1..).zip(&generation.more).map(sample).collect(),
        determinism: generation.determinism.map_or(v1::Determinism::Unspecified, determinism).into(),
        fingerprint: generation.fingerprint.clone(),
        usage: generation.usage.map(|told| usage(told, generation.usage_details.unwrap_or_default())),
        reasoning: generation.reasoning.clone(),
        left_out_parameters: generation.left_out.clone(),
        cached: generation.cached,
        answered_by: generation.answered_by.as_ref().map(ToString::to_string).unwrap_or_default(),
        latency: Some(v1::Latency {
            queued_ms: since_created(job.started_at),
            first_token_ms: generation.first_token_ms,
            total_ms: since_created(job.finished_at),
        }),
    }
}

fn determinism(determinism: Determinism) -> v1::Determinism {
    match determinism {
        Determinism::Bitwise => v1::Determinism::Bitwise,
        Determinism::Seeded => v1::Determinism::Seeded,
        Determinism::None => v1::Determinism::None,
    }
}

fn usage(usage: Usage, details: UsageDetails) -> v1::Usage {
    v1::Usage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_prompt_tokens: usage.cached_prompt_tokens,
        cache_write_tokens: details.cache_write_tokens,
        reasoning_tokens: details.reasoning_tokens,
    }
}

fn cost(cost: Cost) -> v1::Cost {
    v1::Cost { nanodollars: cost.amount.to_nanodollars().0, estimated: cost.estimated }
}

fn failure(failure: Failure) -> v1::JobError {
    let class = match failure.class {
        FailureClass::Invalid => v1::ErrorClass::Invalid,
        FailureClass::Auth => v1::ErrorClass::Auth,
        FailureClass::NotFound => v1::ErrorClass::NotFound,
        FailureClass::Throttled => v1::ErrorClass::Throttled,
        FailureClass::Transient => v1::ErrorClass::Transient,
        FailureClass::Timeout => v1::ErrorClass::Timeout,
        FailureClass::Poison => v1::ErrorClass::Poison,
        FailureClass::Internal => v1::ErrorClass::Internal,
        FailureClass::Quota => v1::ErrorClass::Quota,
        FailureClass::Overloaded => v1::ErrorClass::Overloaded,
        FailureClass::ContentFilter => v1::ErrorClass::ContentFilter,
        FailureClass::ContextOverflow => v1::ErrorClass::ContextOverflow,
        FailureClass::CutStream => v1::ErrorClass::CutStream,
    };
    v1::JobError { error_class: class.into(), message: failure.message }
}

fn attempt(attempt: Attempt) -> v1::Attempt {
    let outcome = match attempt.end {
        AttemptEnd::Succeeded => v1::AttemptOutcome::Succeeded,
        AttemptEnd::Failed => v1::AttemptOutcome::Failed,
        AttemptEnd::Lost => v1::AttemptOutcome::Lost,
        AttemptEnd::HandedBack => v1::AttemptOutcome::HandedBack,
        AttemptEnd::Cancelled => v1::AttemptOutcome::Cancelled,
        AttemptEnd::Expired => v1::AttemptOutcome::Expired,
        AttemptEnd::Fenced => v1::AttemptOutcome::Fenced,
    };
    v1::Attempt {
        epoch: attempt.epoch.0,
        worker: attempt.worker.to_string(),
        started_at: Some(timestamp(attempt.started_at)),
        ended_at: Some(timestamp(attempt.ended_at)),
        outcome: outcome.into(),
        cost: attempt.cost.map(cost),
        error: attempt.failure.map(failure),
    }
}

/// A point in time.
#[must_use]
pub fn timestamp(at: UnixMs) -> prost_types::Timestamp {
    // Both always fit: a u64 of milliseconds has fewer than 2^55 seconds, and the rest is below 10^9.
    let seconds = i64::try_from(at.0 / 1_000).unwrap_or(i64::MAX);
    let nanos = i32::try_from(at.0 % 1_000 * 1_000_000).unwrap_or(0);
    prost_types::Timestamp { seconds, nanos }
}
