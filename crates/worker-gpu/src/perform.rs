//! How a job becomes a request of an engine, and the engine's answer an outcome.

use crate::desk::{Desk, User, Waits};
use crate::mailbox::{Ended, Mailbox};
use crate::report;
use crate::residents::Residents;
use genmill_core::attempt::{
    Determinism, Failure, FailureClass, FinishReason, Generation, Outcome, Performed, Sample, TokenLogprob, Usage,
};
use genmill_core::controls::{StructuredOutput, ToolCall};
use genmill_core::ids::JobId;
use genmill_core::model::{Lane, ModelName};
use genmill_core::money::{Cost, Picodollars, price_of_engine_time};
use genmill_core::registration::ServedModel;
use genmill_core::request::{ChatMessage, Input, Priority};
use genmill_engine::{
    Call, Completion, Engine, Form, ModelCard, Prompt, Request, RequestId, Scored, Shaping, SubmitError, Tool,
};
use genmill_worker::perform::{Offer, Perform, Places, Progress, Task};
use std::error::Error;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Text is taken from the engine this often at most; the loop passes it on at that pace anyway.
const TEXT_EVERY: Duration = Duration::from_millis(20);

/// Runs jobs on the engines of the models that are held.
#[derive(Debug)]
pub struct Performer {
    desks: Vec<Arc<Desk>>,
    /// Rung when other things are to be registered than before.
    told: Arc<Notify>,
    /// Bytes that this machine reads from memory in a second, once that was measured.
    memory_bytes_per_s: OnceLock<f64>,
}

impl Performer {
    /// Serves what `residents` owns.
    #[must_use]
    pub fn new(residents: &[Residents]) -> Self {
        Self {
            desks: residents.iter().flat_map(Residents::desks).collect(),
            told: residents.first().map(Residents::told).unwrap_or_default(),
            memory_bytes_per_s: OnceLock::new(),
        }
    }

    /// The engines that run now, with the names of their models.
    pub(crate) fn engines(&self) -> impl Iterator<Item = (&ModelName, Arc<Engine>)> {
        self.desks.iter().filter_map(|desk| Some((&desk.name, desk.shown.borrow().engine.clone()?)))
    }

    /// Notes how fast this machine reads memory, against which its engines are compared.
    pub fn set_memory_bytes_per_s(&self, bytes: f64) {
        // The first figure stands.
        self.memory_bytes_per_s.get_or_init(|| bytes);
    }

    fn figures(&self) -> Vec<report::Figures> {
        let of = |desk: &Arc<Desk>| {
            let shown = desk.shown.borrow();
            let mut totals = shown.past;
            if let Some(engine) = &shown.engine {
                totals.join(&engine.totals());
            }
            report::Figures {
                model: desk.name.to_string(),
                totals,
                places: desk.sequences,
                held: shown.engine.is_some(),
                bytes_per_s_most: desk.device_bytes_per_s.or_else(|| self.memory_bytes_per_s.get().copied()),
            }
        };
        self.desks.iter().map(of).collect()
    }

    /// A line for each model that something was computed for.
    #[must_use]
    pub fn summary(&self) -> Vec<String> {
        self.figures().iter().filter(|figures| figures.totals.steps > 0).map(report::Figures::line).collect()
    }
}

/// A request that an engine has; ends there when this is dropped.
struct Running {
    user: User,
    id: RequestId,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.user.engine.cancel(self.id);
    }
}

impl Perform for Performer {
    fn offers(&self) -> Vec<Offer> {
        let offer = |desk: &Arc<Desk>| {
            let mut changes = desk.places.subscribe();
            let Places { capacity, tokens } = *changes.borrow_and_update();
            Offer { lane: desk.name.lane(), capacity, tokens, changes: Some(changes) }
        };
        self.desks.iter().map(offer).collect()
    }

    fn models(&self) -> Vec<ServedModel> {
        self.desks.iter().map(|desk| desk.shown.borrow().served.clone()).collect()
    }

    async fn changed(&self) {
        self.told.notified().await;
    }

    fn waits(&self, lane: &Lane, jobs: u64, elsewhere: bool) {
        // A local model has its lane for itself.
        for desk in self.desks.iter().filter(|desk| desk.name.lane() == *lane) {
            desk.set_waits(Waits { jobs, elsewhere });
        }
    }

    fn metrics(&self) -> String {
        report::metrics(&self.figures())
    }

    async fn perform(&self, task: Task, progress: Progress, stop: CancellationToken) -> Performed {
        let desk = self.desks.iter().find(|desk| desk.name == task.spec.model);
        let Some((user, price)) = desk.and_then(|desk| Some((desk.enter()?, desk.price_per_hour))) else {
            // Claimed just before the model was given up, or a job of another worker's model in the same lane.
            return Performed { outcome: Outcome::HandedBack, cost: None, observation: None };
        };
        let engine = user.engine.clone();
        let answer = Answer { id: task.id, tools: tools(&task), card: engine.card().clone() };
        let mailbox = Arc::new(Mailbox::new(progress.started.clone()));
        let running = match submit(&engine, request(&task), &mailbox, task.spec.input.text_bytes()).await {
            Ok(id) => Running { user, id },
            Err(outcome) => return Performed { outcome, cost: Some(Cost::NOTHING), observation: None },
        };
        let mut told = false;
        let mut not_before = Instant::now();
        loop {
            let (texts, ended) = tokio::select! {
                taken = mailbox.take(not_before) => taken,
                () = stop.cancelled(), if !told => {
                    told = true;
                    running.user.engine.cancel(running.id);
                    continue;
                }
            };
            for (sample, text) in texts {
                progress.text_of(u32::try_from(sample).unwrap_or(u32::MAX), text).await;
            }
            not_before = Instant::now() + TEXT_EVERY;
            if let Some(ended) = ended {
                return performed(ended, price, &answer);
            }
        }
    }
}

fn request(task: &Task) -> Request {
    let spec = &task.spec;
    let call = |call: &ToolCall| (call.id.clone(), Call { name: call.name.clone(), arguments: call.arguments.clone() });
    let message = |message: &ChatMessage| genmill_engine::ChatMessage {
        role: message.role.name().to_owned(),
        content: message.content.clone(),
        calls: message.tool_calls.iter().map(call).collect(),
        call_id: message.tool_call_id.clone(),
    };
    let (sampling, controls) = (&spec.sampling, &spec.sampling.controls);
    let count = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
    let shaping = Shaping {
        logit_bias: controls.logit_bias.iter().map(|(token, bias)| (*token, small(*bias))).collect(),
        frequency_penalty: small(controls.frequency_penalty.unwrap_or(0.0)),
        presence_penalty: small(controls.presence_penalty.unwrap_or(0.0)),
        repetition_penalty: small(controls.repetition_penalty.unwrap_or(1.0)),
        min_tokens: count(controls.min_tokens.unwrap_or(0)),
    };
    Request {
        prompt: match &spec.input {
            Input::Prompt(prompt) => Prompt::Text(prompt.clone()),
            Input::Messages(messages) => Prompt::Chat(messages.iter().map(message).collect()),
        },
        max_tokens: count(sampling.max_tokens),
        temperature: small(sampling.temperature),
        // A share so small that it rounds to nothing still means the best token.
        top_p: small(sampling.top_p.unwrap_or(1.0)).max(f32::MIN_POSITIVE),
        top_k: sampling.top_k.map_or(0, count),
        min_p: small(controls.min_p.unwrap_or(0.0)),
        seed: sampling.seed,
        samples: count(controls.samples()),
        shaping,
        stop: sampling.stop.clone(),
        stop_tokens: controls.stop_token_ids.clone(),
        ignore_end: controls.ignore_eos,
        logprobs: controls.logprobs.map(count),
        prompt_logprobs: controls.prompt_logprobs.map(count),
        echo: controls.echo,
        overtakes: overtakes(spec.priority),
        form: controls.structured_output.as_ref().map(form),
        tools: tools(task),
        deadline: None,
        label: task.id.to_string().into(),
        now_unix_s: task.id.submitted_at().0 / 1_000,
    }
}

/// How many that came to the engine before it a job may overtake there. The queue has put them into order; here waits only
/// what fits into a worker's free places but not yet into its blocks.
const fn overtakes(priority: Priority) -> u64 {
    match priority {
        Priority::Interactive => 64,
        Priority::Normal => 8,
        Priority::Bulk => 0,
    }
}

fn form(form: &StructuredOutput) -> Form {
    match form.clone() {
        StructuredOutput::JsonSchema(schema) => Form::JsonSchema(schema),
        StructuredOutput::Regex(regex) => Form::Regex(regex),
        StructuredOutput::Choice(choices) => Form::Choice(choices),
        StructuredOutput::Lark(grammar) => Form::Lark(grammar),
    }
}

fn tools(task: &Task) -> Vec<Tool> {
    let tool = |tool: &genmill_core::controls::Tool| Tool {
        name: tool.name.clone(),
        description: tool.description.clone(),
        parameters: tool.parameters.clone(),
    };
    task.spec.sampling.controls.tools.iter().map(tool).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "an engine samples in f32, and these are small numbers")]
const fn small(number: f64) -> f32 {
    number as f32
}

/// Prompts up to this many bytes are tokenised where they are: it takes less than handing them to another thread.
const SHORT_PROMPT_BYTES: usize = 4 * 1024;

/// Gives the request to the engine. Tokenising a long prompt or compiling a form takes a while, so it has a thread of its own.
async fn submit(
    engine: &Arc<Engine>,
    request: Request,
    mailbox: &Arc<Mailbox>,
    prompt_bytes: usize,
) -> Result<RequestId, Outcome> {
    // Compiling a form takes as long as a long prompt.
    if prompt_bytes <= SHORT_PROMPT_BYTES && request.form.is_none() {
        return submit_what_fits(engine, request, mailbox).map_err(|error| refused(&error));
    }
    let (engine, mailbox) = (engine.clone(), mailbox.clone());
    let submitting = tokio::task::spawn_blocking(move || submit_what_fits(&engine, request, &mailbox));
    match submitting.await {
        Ok(submitted) => submitted.map_err(|error| refused(&error)),
        Err(_) => Err(Outcome::Failed(Failure::new(FailureClass::Internal, "tokenising the prompt broke off"))),
    }
}

/// What exceeds the model's context is cut off the output, which then ends with the reason `length`: `max_tokens` is a
/// bound, and most requests take its default without knowing the model. A prompt that fills the context is refused.
fn submit_what_fits(engine: &Engine, mut request: Request, mailbox: &Arc<Mailbox>) -> Result<RequestId, SubmitError> {
    match engine.submit(request.clone(), mailbox.sink()) {
        Err(SubmitError::TooLong { prompt_tokens, context_tokens, .. }) if prompt_tokens < context_tokens => {
            request.max_tokens = context_tokens - prompt_tokens;
            request.shaping.min_tokens = request.shaping.min_tokens.min(request.max_tokens);
            engine.submit(request, mailbox.sink())
        }
        submitted => submitted,
    }
}

fn refused(error: &SubmitError) -> Outcome {
    match error {
        SubmitError::Full { .. } | SubmitError::Stopped => Outcome::HandedBack,
        SubmitError::Parameter { .. }
        | SubmitError::Prompt { .. }
        | SubmitError::TooLong { .. }
        | SubmitError::NeverFits(_) => Outcome::Failed(Failure::new(FailureClass::Invalid, chain(error))),
    }
}

fn performed(ended: Ended, price_per_hour: Option<Picodollars>, answer: &Answer) -> Performed {
    let completion = match ended {
        Ok(completion) => completion,
        Err(error) => {
            let failure = Failure::new(FailureClass::Internal, chain(&error));
            return Performed { outcome: Outcome::Failed(failure), cost: None, observation: None };
        }
    };
    let engine_us = u64::try_from(completion.engine_time.as_micros()).unwrap_or(u64::MAX);
    let cost = price_per_hour.map(|per_hour| Cost::exact(price_of_engine_time(engine_us, per_hour)));
    let reasons = std::iter::once(completion.reason).chain(completion.more.iter().map(|output| output.reason));
    let outcome = match reasons.filter_map(finish_reason).count() {
        count if count == 1 + completion.more.len() => Outcome::Generated(answer.generation(completion)),
        _ if completion.reason == genmill_engine::FinishReason::Deadline => Outcome::DeadlinePassed,
        _ => Outcome::HandedBack,
    };
    Performed { outcome, cost, observation: None }
}

/// Why a text ended; `None` when somebody ended it before.
const fn finish_reason(reason: genmill_engine::FinishReason) -> Option<FinishReason> {
    match reason {
        genmill_engine::FinishReason::Stop => Some(FinishReason::Stop),
        genmill_engine::FinishReason::Length => Some(FinishReason::Length),
        genmill_engine::FinishReason::Deadline | genmill_engine::FinishReason::Cancelled => None,
    }
}

/// What an answer is read with.
struct Answer {
    id: JobId,
    tools: Vec<Tool>,
    card: Arc<ModelCard>,
}

impl Answer {
    fn generation(&self, completion: Completion) -> Generation {
        let count = |tokens: usize| u64::try_from(tokens).unwrap_or(u64::MAX);
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let first = completion.first_prompt_token.map(|id| token(id, None, &self.card));
        let outputs = (1..).zip(completion.more);
        let more = outputs.map(|(index, output)| self.sample(index, output.text, output.reason, &output.logprobs));
        let more = more.collect();
        let Sample { text, finish_reason, logprobs: of_text, tool_calls } =
            self.sample(0, completion.text, completion.reason, &completion.logprobs);
        Generation {
            usage: Some(Usage {
                prompt_tokens: count(completion.prompt_tokens),
                cached_prompt_tokens: count(completion.cached_prompt_tokens),
                completion_tokens: count(completion.completion_tokens),
            }),
            first_token_ms: completion.first_token.map(ms),
            logprobs: of_text,
            prompt_logprobs: first.into_iter().chain(logprobs(&completion.prompt_logprobs, &self.card)).collect(),
            tool_calls,
            more,
            // Admission has drawn a seed where none was given, so the engine's contract holds for every job.
            determinism: Some(Determinism::Bitwise),
            fingerprint: self.card.fingerprint().to_string(),
            ..Generation::new(text, finish_reason)
        }
    }

    fn sample(&self, index: usize, text: String, reason: genmill_engine::FinishReason, scored: &[Scored]) -> Sample {
        let calls = if self.tools.is_empty() { Vec::new() } else { self.card.calls(&text, &self.tools) };
        let tool_calls: Vec<ToolCall> =
            calls.into_iter().enumerate().map(|(place, call)| self.tool_call(index, place, call)).collect();
        let finish_reason = match finish_reason(reason).unwrap_or(FinishReason::Unknown) {
            FinishReason::Stop if !tool_calls.is_empty() => FinishReason::ToolCalls,
            other => other,
        };
        Sample { text, finish_reason, logprobs: logprobs(scored, &self.card), tool_calls }
    }

    /// Names a call after its job and place: nine letters and digits, which is all that Mistral's templates take. The
    /// same call of the same job has the same name, so that an attempt can be repeated.
    fn tool_call(&self, sample: usize, place: usize, Call { name, arguments }: Call) -> ToolCall {
        const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz012345";
        let bytes = format!("{} {sample} {place}", self.id).into_bytes();
        // FNV-1a, 64 bits, of which 45 are shown.
        let hash = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        let letter = |shift: u32| char::from(LETTERS[usize::try_from(hash >> (5 * shift) & 31).unwrap_or(0)]);
        ToolCall { id: (0..9).map(letter).collect(), name, arguments }
    }
}

fn logprobs(scored: &[Scored], card: &ModelCard) -> Vec<TokenLogprob> {
    let each = |scored: &Scored| TokenLogprob {
        top: scored.top.iter().map(|(id, logprob)| token(*id, Some(*logprob), card)).collect(),
        ..token(scored.token, Some(scored.logprob), card)
    };
    scored.iter().map(each).collect()
}

fn token(id: u32, logprob: Option<f32>, card: &ModelCard) -> TokenLogprob {
    TokenLogprob { token_id: Some(id), token: card.token_text(id), logprob, top: Vec::new() }
}

/// An error with what caused it.
fn chain(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message = format!("{message}: {error}");
        source = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_engine::{LoadOptions, Model, ModelPaths};
    use std::path::Path;

    /// The engine's tiny model with a template that has a form of calls.
    fn card(template: &str) -> Arc<ModelCard> {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/qwen2");
        let folder = tempfile::tempdir().unwrap();
        for file in
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
        {
            std::fs::copy(fixture.join(file), folder.path().join(file)).unwrap();
        }
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        let paths = ModelPaths { model_path: folder.path().to_owned(), tokenizer_path: None };
        Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap().card().clone()
    }

    #[test]
    fn calls_in_a_text_are_told_and_named_the_same_in_every_attempt() {
        let tool = Tool { name: "add".to_owned(), description: String::new(), parameters: String::new() };
        let id = JobId::new(genmill_core::time::UnixMs(1), genmill_core::ids::LaneNumber(1), 7);
        let answer = Answer { id, tools: vec![tool], card: card("{{ '<tool_call>' }}") };
        let text = "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>";
        let sample = |index, reason| answer.sample(index, text.to_owned(), reason, &[]);
        let first = sample(0, genmill_engine::FinishReason::Stop);
        assert_eq!((first.finish_reason, first.text.as_str()), (FinishReason::ToolCalls, text));
        let [call] = first.tool_calls.as_slice() else { panic!("{first:?}") };
        assert_eq!((call.name.as_str(), call.arguments.as_str(), call.id.len()), ("add", "{\"a\":1}", 9));
        assert_eq!(first, sample(0, genmill_engine::FinishReason::Stop));
        assert_ne!(first.tool_calls[0].id, sample(1, genmill_engine::FinishReason::Stop).tool_calls[0].id);
        assert_eq!(sample(0, genmill_engine::FinishReason::Length).finish_reason, FinishReason::Length);
        let none = Answer { tools: Vec::new(), ..answer };
        let plain = none.sample(0, text.to_owned(), genmill_engine::FinishReason::Stop, &[]);
        assert_eq!((plain.finish_reason, plain.tool_calls.len()), (FinishReason::Stop, 0));
    }
}
