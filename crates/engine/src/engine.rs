//! The engine: one thread that owns the device and runs steps while there is work.
//!
//! Never here: arithmetic, jobs, async. The loop is `schedule.next -> forward -> sample ->
//! schedule.commit`; requests come in through a bounded channel, events go out through each
//! request's own sink. A request that goes wrong fails alone.

mod check;
mod dry_run;
mod gauge;
mod group;
mod guided;
mod room;
mod run;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use genmill_grammar::Form;

use crate::chat::ChatMessage;
use crate::decoder::Forward;
use crate::engine::gauge::Gauge;
use crate::kv::BLOCK_TOKENS;
use crate::measure::{Cost, Totals};
use crate::model::{Model, ModelCard, PromptError};
use crate::sampler::{NotFinite, Sampling, Scored};
use crate::schedule::{Limits, NeverFits, Schedule};
use crate::shape::Shaping;
use crate::tools::Tool;

pub use crate::engine::gauge::{SequenceUnderway, Underway};

/// The size of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// The pool of keys and values, in tokens; rounded down to whole blocks of 16.
    pub kv_tokens: usize,
    /// Most sequences at a time.
    pub max_sequences: usize,
    /// Most tokens in a step; at least `max_sequences`.
    pub step_tokens: usize,
    /// Most requests that wait for a place.
    pub max_waiting: usize,
    /// Whether what was computed is kept for requests that begin alike, until the room is needed.
    pub prefix_cache: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { kv_tokens: 16_384, max_sequences: 32, step_tokens: 256, max_waiting: 256, prefix_cache: true }
    }
}

impl EngineOptions {
    /// Most sequences that run or wait.
    const fn places(&self) -> usize {
        self.max_sequences + self.max_waiting
    }
}

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An option makes no sense.
    #[error("{option} {reason}")]
    Option {
        /// The name in [`EngineOptions`].
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The device has no room for steps and cache of that size, or failed.
    #[error("cannot make room: {message}")]
    Device {
        /// What it could not do.
        message: String,
    },
    /// The largest step cannot be computed.
    #[error("the largest step cannot be computed: {message}")]
    DryRun {
        /// What went wrong.
        message: String,
    },
    /// The system refused the thread.
    #[error("cannot start the engine's thread")]
    Thread {
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// Names a request of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

impl RequestId {
    /// For schedules without an engine.
    #[must_use]
    pub fn new(number: u64) -> Self {
        Self(number)
    }
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text, tokenised with the special tokens of the tokenizer's post-processor.
    Text(String),
    /// Messages, rendered by the model's chat template.
    Chat(Vec<ChatMessage>),
}

/// One generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// Divides the logits; 0 always takes the best token.
    pub temperature: f32,
    /// Considers the best tokens that together have this probability, in (0, 1]; 1 is off.
    pub top_p: f32,
    /// Considers so many of the best tokens; 0 is off.
    pub top_k: usize,
    /// Considers tokens of at least this part of the best one's probability; 0 is off.
    pub min_p: f32,
    /// The key of the random numbers.
    pub seed: u64,
    /// How many texts to generate, each with random numbers of its own. At least 1.
    pub samples: usize,
    /// What changes the logits.
    pub shaping: Shaping,
    /// Texts before which the output ends.
    pub stop: Vec<String>,
    /// Tokens before which the output ends, beside the model's own end tokens.
    pub stop_tokens: Vec<u32>,
    /// The model's own end tokens are tokens like any other (vLLM's `ignore_eos`).
    pub ignore_end: bool,
    /// The log probability of each generated token is wanted, and those of so many of the best.
    pub logprobs: Option<usize>,
    /// The same of each token of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// The text begins with the prompt, which must be text.
    pub echo: bool,
    /// How many requests that came before it it may overtake while it waits.
    pub overtakes: u64,
    /// The form that each text must have.
    pub form: Option<Form>,
    /// What the chat template is told that the model may call.
    pub tools: Vec<Tool>,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// What the request is called where the engine tells of itself, see [`Engine::underway`].
    pub label: Arc<str>,
    /// The time a chat template sees, in seconds since 1970; the time of submission, so that a
    /// retry renders the same prompt.
    pub now_unix_s: u64,
}

impl Request {
    /// Most of the best tokens whose log probabilities may be asked for.
    pub const LOGPROBS_MAX: usize = 20;

    /// Always the best token, at most `max_tokens` of them; everything else off.
    #[must_use]
    pub fn greedy(prompt: Prompt, max_tokens: usize) -> Self {
        Self {
            prompt,
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            samples: 1,
            overtakes: 0,
            shaping: Shaping::default(),
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_end: false,
            logprobs: None,
            prompt_logprobs: None,
            echo: false,
            form: None,
            tools: Vec::new(),
            deadline: None,
            label: Arc::default(),
            now_unix_s: 0,
        }
    }
}

/// Why a request is refused; it never reached the engine's thread.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// A parameter is out of range.
    #[error("{parameter} {reason}")]
    Parameter {
        /// The name in [`Request`].
        parameter: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The prompt cannot be run.
    #[error("the prompt cannot be used")]
    Prompt {
        /// Why.
        #[source]
        source: PromptError,
    },
    /// Prompt and output exceed what the model can see.
    #[error(
        "{prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the model's context of \
         {context_tokens}"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens to generate.
        max_tokens: usize,
        /// The context.
        context_tokens: usize,
    },
    /// Prompt and output exceed the whole pool.
    #[error(transparent)]
    NeverFits(#[from] NeverFits),
    /// Too many requests wait.
    #[error("{waiting} requests wait already")]
    Full {
        /// How many.
        waiting: usize,
    },
    /// The engine was shut down.
    #[error("the engine has stopped")]
    Stopped,
}

/// What happens to a request, in this order: `Started`, any number of `Text`, then exactly one
/// `Finished` or `Failed`. One that never starts has only the last.
#[derive(Debug)]
pub enum Event {
    /// It was admitted.
    Started,
    /// The next piece of text; never empty, never part of a character.
    Text {
        /// Which of the request's samples, from 0.
        sample: usize,
        /// The piece.
        delta: String,
    },
    /// It ended, with all of its samples.
    Finished(Completion),
    /// It could not go on.
    Failed(RequestError),
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens`.
    Length,
    /// [`Engine::cancel`] or a shutdown.
    Cancelled,
    /// The request's deadline.
    Deadline,
}

/// A finished request.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Why it ended.
    pub reason: FinishReason,
    /// All deltas of the first sample joined.
    pub text: String,
    /// One for each of its generated tokens, an end token included, where asked for.
    pub logprobs: Vec<Scored>,
    /// The samples after the first.
    pub more: Vec<Output>,
    /// One for each token of the prompt but the first, where asked for.
    pub prompt_logprobs: Vec<Scored>,
    /// The prompt's first token, where those are asked for: nothing stands before it, so it has none.
    pub first_prompt_token: Option<u32>,
    /// Tokens of the prompt, once for all samples.
    pub prompt_tokens: usize,
    /// Of these, what others had computed before.
    pub cached_prompt_tokens: usize,
    /// Tokens generated in all samples, end tokens included.
    pub completion_tokens: usize,
    /// From submission to admission (or to the end, without one).
    pub queued: Duration,
    /// From submission to the first token.
    pub first_token: Option<Duration>,
    /// From submission to the end.
    pub total: Duration,
    /// The request's part of the engine's time: of each step, its part of the step's tokens.
    pub engine_time: Duration,
}

/// A sample after the first.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Why it ended.
    pub reason: FinishReason,
    /// All its deltas joined.
    pub text: String,
    /// One for each of its generated tokens, an end token included, where asked for.
    pub logprobs: Vec<Scored>,
}

/// Why a request could not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The model gave something that is not a number.
    #[error("the model's output at token {position} is not a number")]
    NotFinite {
        /// The position in the sequence.
        position: usize,
        /// Which logit.
        #[source]
        source: NotFinite,
    },
    /// The text could not be led along its form.
    #[error("the form of the text cannot be kept: {message}")]
    Form {
        /// What the grammar said.
        message: String,
    },
    /// A step failed as a whole.
    #[error("the engine failed in a step: {message}")]
    Step {
        /// What the panic said.
        message: String,
    },
}

/// Takes a request's events, one after the other, on the engine's threads: it must not block, and
/// must not call the engine (a cancellation could wait for the very thread it runs on).
pub type Sink = Box<dyn FnMut(Event) + Send>;

/// How much more an engine can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Free {
    /// Sequences that would start at once.
    pub sequences: usize,
    /// Tokens not reserved by any request, running or waiting.
    pub kv_tokens: usize,
}

/// A running engine. Dropping it cancels what runs and waits for the thread.
#[derive(Debug)]
pub struct Engine {
    card: Arc<ModelCard>,
    options: EngineOptions,
    commands: SyncSender<run::Command>,
    load: Arc<Load>,
    gauge: Arc<Gauge>,
    cost: Cost,
    next_id: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

/// What was accepted and has not ended; counted up by `submit`, down by the thread.
#[derive(Debug, Default)]
struct Load {
    sequences: AtomicUsize,
    kv_tokens: AtomicUsize,
    /// A command waits, for which lanes end their encore.
    news: AtomicBool,
}

impl Engine {
    /// Takes a model over, makes room and starts the thread.
    ///
    /// # Errors
    /// When an option makes no sense, the device has no room, or the system refuses the thread.
    pub fn start(model: Model, options: EngineOptions) -> Result<Self, StartError> {
        Self::start_with(model, options, |_, _, _, _| Ok(()))
    }

    /// The same, once the largest step has been computed: whatever breaks there breaks here, and later steps find their
    /// memory taken and their weights laid out.
    ///
    /// # Errors
    /// As [`Self::start`], and when that step fails.
    pub fn start_after_dry_run(model: Model, options: EngineOptions) -> Result<Self, StartError> {
        Self::start_with(model, options, dry_run::dry_run)
    }

    fn start_with(
        model: Model,
        options: EngineOptions,
        rehearse: impl Fn(&mut dyn Forward, &Limits, u32, usize) -> Result<(), String>,
    ) -> Result<Self, StartError> {
        let blocks = checked_blocks(&options)?;
        let (card, mut forward) = model.into_parts();
        let limits = Limits { step_tokens: options.step_tokens, max_sequences: options.max_sequences };
        let context = card.context_tokens();
        let blocks = room::make(forward.as_mut(), (&limits, blocks), |forward, blocks| {
            rehearse(forward, &limits, blocks, context).map_err(|message| StartError::DryRun { message })
        })?;
        // A device may have room for fewer.
        let kv_tokens = options.kv_tokens.min(blocks as usize * BLOCK_TOKENS);
        let options = EngineOptions { kv_tokens, ..options };
        // Every accepted request has a place in the channel, so `submit` never blocks; the same
        // room again is for cancellations, which may wait for a step to end.
        let (commands, receiver) = sync_channel(2 * options.places());
        let load = Arc::new(Load::default());
        // Keys that depend on how long their sequence gets are no beginning for another.
        let keeps_prefixes = options.prefix_cache && forward.restarts_after().is_none();
        let schedule = Schedule::new(blocks, keeps_prefixes);
        let (gauge, cost) = (Arc::new(Gauge::default()), forward.cost());
        let runner = run::Runner::new(forward, schedule, limits, (Arc::clone(&load), Arc::clone(&gauge)), receiver);
        let thread = std::thread::Builder::new()
            .name("genmill-engine".to_owned())
            .spawn(move || runner.run())
            .map_err(|source| StartError::Thread { source })?;
        let next_id = AtomicU64::new(1);
        Ok(Self { card, options, commands, load, gauge, cost, next_id, thread: Some(thread) })
    }

    /// What the model says of itself, and its words.
    #[must_use]
    pub fn card(&self) -> &Arc<ModelCard> {
        &self.card
    }

    /// Checks a request, tokenises its prompt on the caller's thread and queues it; events go to
    /// `sink` on the engine's thread.
    ///
    /// # Errors
    /// When it is malformed, can never fit, or too many wait. Then `sink` is never called.
    pub fn submit(&self, request: Request, sink: Sink) -> Result<RequestId, SubmitError> {
        let submitted = Instant::now();
        check::parameters(&request, &self.options, self.card.vocabulary())?;
        let prompt = self
            .card
            .prompt_tokens(&request.prompt, &request.tools, request.now_unix_s)
            .map_err(|source| SubmitError::Prompt { source })?;
        let guide = request.form.as_ref().map(|form| self.card.guide(form)).transpose();
        let guide = guide.map_err(|reason| SubmitError::Parameter { parameter: "form", reason })?;
        let needed = self.check_length(prompt.len(), request.max_tokens)?;
        let samples = request.samples;
        self.take_places(samples, needed)?;
        let id = RequestId(self.next_id.fetch_add(samples as u64, Ordering::Relaxed));
        let mut end_tokens = if request.ignore_end { Vec::new() } else { self.card.end_tokens(&request.prompt) };
        end_tokens.extend(&request.stop_tokens);
        let ticket = run::Ticket {
            id,
            end_tokens,
            // By themselves, some tokenizers drop a text's first space. An echo needs it, and a form knows of it.
            stream: match request.form.is_some() || request.echo && request.prompt != Prompt::Text(String::new()) {
                true => self.card.stream_after(&prompt),
                false => self.card.stream(),
            },
            sampling: Sampling {
                temperature: request.temperature,
                top_k: request.top_k,
                top_p: request.top_p,
                min_p: request.min_p,
                seed: request.seed,
                sample: 0,
            },
            samples,
            guide: guide.zip(self.card.form_end()),
            shaping: request.shaping,
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            echo: if let (true, Prompt::Text(text)) = (request.echo, request.prompt) { text } else { String::new() },
            prompt,
            max_tokens: request.max_tokens,
            overtakes: request.overtakes,
            stop: request.stop,
            deadline: request.deadline,
            label: request.label,
            needed,
            submitted,
            sink,
        };
        match self.commands.try_send(run::Command::Submit(Box::new(ticket))) {
            Ok(()) => {
                self.load.news.store(true, Ordering::Relaxed);
                Ok(id)
            }
            Err(error) => {
                (0..samples).for_each(|_| self.load.give_place(needed));
                Err(match error {
                    TrySendError::Full(_) => SubmitError::Full { waiting: self.options.max_waiting },
                    TrySendError::Disconnected(_) => SubmitError::Stopped,
                })
            }
        }
    }

    /// Ends a request at the next step; one that has ended already is left alone. May wait for a
    /// step to end when very many commands are on their way.
    pub fn cancel(&self, id: RequestId) {
        // A stopped engine has cancelled everything already.
        drop(self.commands.send(run::Command::Cancel(id)));
        self.load.news.store(true, Ordering::Relaxed);
    }

    /// How much more the engine can take now.
    #[must_use]
    pub fn free(&self) -> Free {
        let pool = self.options.kv_tokens / BLOCK_TOKENS * BLOCK_TOKENS;
        let sequences = self.load.sequences.load(Ordering::Acquire);
        let kv_tokens = self.load.kv_tokens.load(Ordering::Acquire);
        Free {
            sequences: self.options.max_sequences.saturating_sub(sequences),
            kv_tokens: pool.saturating_sub(kv_tokens),
        }
    }

    /// The step that the thread is in, while it is in one.
    #[must_use]
    pub fn underway(&self) -> Option<Underway> {
        self.gauge.underway()
    }

    /// Whether the thread has ended, which it does not do by itself unless something is broken.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// All steps since the start.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.gauge.totals()
    }

    /// What the model costs to run.
    #[must_use]
    pub const fn cost(&self) -> &Cost {
        &self.cost
    }

    /// The options it was started with.
    #[must_use]
    pub const fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Cancels everything and waits until the thread has ended. To let requests finish first, wait
    /// for their last events.
    pub fn shutdown(self) {
        drop(self);
    }

    fn check_length(&self, prompt_tokens: usize, max_tokens: usize) -> Result<usize, SubmitError> {
        let context_tokens = self.card.context_tokens();
        let length = prompt_tokens.saturating_add(max_tokens);
        if length > context_tokens {
            return Err(SubmitError::TooLong { prompt_tokens, max_tokens, context_tokens });
        }
        let total = self.options.kv_tokens / BLOCK_TOKENS * BLOCK_TOKENS;
        let needed = length.next_multiple_of(BLOCK_TOKENS);
        if needed > total {
            return Err(NeverFits { needed: length, total }.into());
        }
        Ok(needed)
    }

    fn take_places(&self, samples: usize, needed: usize) -> Result<(), SubmitError> {
        let most = self.options.places();
        self.load
            .sequences
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                (count + samples <= most).then_some(count + samples)
            })
            .map_err(|_| SubmitError::Full { waiting: self.options.max_waiting })?;
        self.load.kv_tokens.fetch_add(samples * needed, Ordering::AcqRel);
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        drop(self.commands.send(run::Command::Stop));
        self.load.news.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread ended by a panic");
        }
    }
}

impl Load {
    fn give_place(&self, needed: usize) {
        self.sequences.fetch_sub(1, Ordering::AcqRel);
        self.kv_tokens.fetch_sub(needed, Ordering::AcqRel);
    }
}

fn checked_blocks(options: &EngineOptions) -> Result<u32, StartError> {
    let wrong = |option, reason: &str| StartError::Option { option, reason: reason.to_owned() };
    if options.max_sequences == 0 {
        return Err(wrong("max_sequences", "is 0"));
    }
    if options.step_tokens < options.max_sequences {
        return Err(StartError::Option {
            option: "step_tokens",
            reason: format!(
                "is {}, below max_sequences {}: not every sequence could advance in a step",
                options.step_tokens, options.max_sequences
            ),
        });
    }
    match u32::try_from(options.kv_tokens / BLOCK_TOKENS) {
        Ok(0) => Err(wrong("kv_tokens", "is less than one block of 16")),
        Ok(blocks) => Ok(blocks),
        Err(_) => Err(wrong("kv_tokens", "is more than 2^36")),
    }
}
