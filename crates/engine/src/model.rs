//! A model: a folder in Hugging Face layout or a GGUF file, loaded and ready for an engine.
//!
//! Never here: steps, requests. The tokenizer, the chat template and what the model says of itself
//! are its card, which many threads may read while the engine's thread owns the weights.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use genmill_grammar::{Compiler, Form, Guide};
use serde_json::Value;

use crate::architectures::Architecture;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, device::Dtype, driver::Driver};
use crate::chat::{ChatMessage, ChatTemplate};
use crate::config::{Config, Fields};
use crate::decoder::{Decoder, Forward};
use crate::engine::Prompt;
use crate::error::LoadError;
use crate::gguf::Gguf;
use crate::quantized::Format;
use crate::sim::{Device, Simulated};
use crate::text::{EncodeError, Special, TokenStream, Words, pairs};
use crate::tools::{Call, Tool};
use crate::weights::Weights;

/// Where a model lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPaths {
    /// The folder with config.json and the safetensors files, or a GGUF file (any part of a split one), or a folder
    /// with one.
    pub model_path: PathBuf,
    /// A folder with tokenizer.json (and tokenizer_config.json), or that file itself; the model's
    /// own when absent.
    pub tokenizer_path: Option<PathBuf>,
}

/// How to load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Compute threads; 0 takes as many as the machine has.
    pub threads: usize,
    /// What float weights are brought to: a quarter of the memory and several times the speed, for slightly other weights.
    /// Norms, biases, positions, routers of experts and rows without whole blocks stay as they are; so do weights that
    /// are quantised in the file.
    pub quantize: Option<Format>,
}

/// What decides the bits of a model's output. Workers with equal fingerprints give equal tokens
/// for equal requests with a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// SHA-256 of config, tokenizer, chat template and the weights' own hashes, in hexadecimal: the same on every backend.
    pub model: String,
    /// The type that the arithmetic is done in, or the format that weights were brought to at load.
    pub dtype: &'static str,
    /// The backend's name.
    pub backend: &'static str,
    /// What else decides the bits: the way of rounding (fused multiply-add) or the device's type.
    pub level: String,
    /// The engine's version.
    pub version: &'static str,
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { model, dtype, backend, level, version } = self;
        write!(f, "{model}/{dtype}/{backend}/{level}/{version}")
    }
}

/// Why a prompt cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The model has no chat template.
    #[error(
        "the model has no chat template, so it cannot take messages; send a prompt, or add a \
         chat_template.jinja to its folder"
    )]
    NoChatTemplate,
    /// The model's chat template has no place for tools.
    #[error(
        "the model's chat template knows no form of tool calls (Llama 3, Qwen or Mistral), so it cannot take tools"
    )]
    NoTools,
    /// The template refused the messages.
    #[error("the chat template cannot render these messages")]
    Template {
        /// What it said.
        #[source]
        source: minijinja::Error,
    },
    /// The tokenizer refused the text.
    #[error("cannot turn the prompt into tokens")]
    Encode {
        /// What it said.
        #[source]
        source: EncodeError,
    },
    /// There is nothing to continue.
    #[error("the prompt has no tokens, and the model has no begin token to start from")]
    Empty,
    /// The tokenizer does not belong to this model.
    #[error("the tokenizer gave token {id}, but the model knows only {vocabulary}: they do not belong together")]
    UnknownToken {
        /// The token.
        id: u32,
        /// How many tokens the model knows.
        vocabulary: usize,
    },
}

/// Where a model runs on a GPU, and how.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
pub struct GpuOptions {
    /// The number of the GPU, as `CUDA_VISIBLE_DEVICES` counts them.
    pub ordinal: usize,
    /// Whether steps of decode are recorded and repeated.
    pub graphs: bool,
    /// What float projections and embeddings are brought to while they are loaded.
    pub quantize: Option<Format>,
}

/// A loaded model, to be given to [`crate::Engine::start`].
pub struct Model {
    card: Arc<ModelCard>,
    forward: Box<dyn Forward>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("card", &self.card).finish_non_exhaustive()
    }
}

/// What a model says of itself, and its words.
#[derive(Debug)]
pub struct ModelCard {
    context_tokens: usize,
    vocabulary: usize,
    fingerprint: Fingerprint,
    instructions: String,
    words: Words,
    chat: Option<ChatTemplate>,
    begin_token: Option<u32>,
    end_tokens: Vec<u32>,
    /// The tokenizer's own end token, which ends an assistant's turn.
    turn_end: Option<u32>,
    /// Made when the first form is asked for.
    compiler: OnceLock<Result<Compiler, String>>,
}

impl Model {
    /// Loads a model onto the CPU: float weights as float32 unless told otherwise, quantised ones as they are.
    ///
    /// # Errors
    /// Whatever is missing, malformed or unsupported, naming file and tensor or field.
    pub fn load(paths: &ModelPaths, options: &LoadOptions) -> Result<Self, LoadError> {
        let dtype = options.quantize.map_or("float32", Format::name);
        Self::on(paths, (dtype, options.quantize), || Cpu::new(options.threads))
    }

    /// Loads a model onto a GPU: float weights as float16 where config.json names that type, else as bfloat16, unless told
    /// otherwise; quantised ones as they are.
    ///
    /// # Errors
    /// As [`Self::load`], and when there is no such GPU or it fails.
    #[cfg(feature = "cuda")]
    pub fn on_gpu(paths: &ModelPaths, options: &GpuOptions) -> Result<Self, LoadError> {
        let (config, _) = shape(&paths.model_path)?;
        let (dtype, name) = match config.dtype.as_deref() {
            Some("float16") => (Dtype::F16, "float16"),
            _ => (Dtype::Bf16, "bfloat16"),
        };
        let name = options.quantize.map_or(name, Format::name);
        Self::on(paths, (name, options.quantize), || {
            let driver = Driver::open(options.ordinal);
            let driver = driver.map_err(|error| LoadError::Device { message: error.to_string() })?;
            let cuda = Cuda::new(driver, dtype);
            Ok(if options.graphs { cuda.with_graphs() } else { cuda })
        })
    }

    /// A model on a backend, which does its arithmetic in `dtype`, with float weights brought to a format where there is
    /// one.
    pub(crate) fn on<B: Backend>(
        paths: &ModelPaths,
        (dtype, format): (&'static str, Option<Format>),
        backend: impl FnOnce() -> Result<B, LoadError>,
    ) -> Result<Self, LoadError> {
        let (config, mut weights) = open(&paths.model_path)?;
        let front = Front::read(paths, config.architecture, &mut weights)?;
        weights.quantise(format);
        let decoder = Decoder::load(backend()?, config.clone(), &mut weights)?;
        let fingerprint = Fingerprint {
            model: weights.finish(),
            dtype,
            backend: decoder.backend().name(),
            level: decoder.backend().level(),
            version: env!("CARGO_PKG_VERSION"),
        };
        let instructions = decoder.backend().instructions();
        let card = front.card(config, fingerprint, instructions);
        Ok(Self { card: Arc::new(card), forward: Box::new(decoder) })
    }

    /// The shape and the words of a model on a simulated device: its weights are neither needed nor read.
    ///
    /// # Errors
    /// Whatever of config and tokenizer is missing or malformed.
    pub fn simulated(paths: &ModelPaths, device: &Device) -> Result<Self, LoadError> {
        let (config, mut weights) = shape(&paths.model_path)?;
        let front = Front::read(paths, config.architecture, &mut weights)?;
        let simulated = Simulated::new(&config, device);
        let fingerprint = Fingerprint {
            model: weights.finish(),
            dtype: device.dtype.name(),
            backend: "simulated",
            level: device.gpu.name.to_owned(),
            version: env!("CARGO_PKG_VERSION"),
        };
        let card = front.card(config, fingerprint, format!("simulated {}", device.gpu.name));
        Ok(Self { card: Arc::new(card), forward: Box::new(simulated) })
    }

    /// What the model says of itself, and its words.
    #[must_use]
    pub fn card(&self) -> &Arc<ModelCard> {
        &self.card
    }

    /// The same model with sequences of at most so many tokens.
    #[must_use]
    pub fn with_context_limit(mut self, tokens: usize) -> Self {
        // Nobody else has the card yet.
        if let Some(card) = Arc::get_mut(&mut self.card) {
            card.context_tokens = card.context_tokens.min(tokens.max(1));
        }
        self
    }

    pub(crate) fn into_parts(self) -> (Arc<ModelCard>, Box<dyn Forward>) {
        (self.card, self.forward)
    }

    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn with_forward(self, forward: Box<dyn Forward>) -> Self {
        Self { forward, ..self }
    }

    /// The same model as one that can do so many tokens.
    #[cfg(feature = "cuda")]
    pub(crate) fn with_context(mut self, tokens: usize) -> Self {
        if let Some(card) = Arc::get_mut(&mut self.card) {
            card.context_tokens = tokens;
        }
        self
    }
}

impl ModelCard {
    /// Longest sequence, prompt and output together, in tokens.
    #[must_use]
    pub fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    /// What decides the bits of the output.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The instruction set or device in use, for people; it does not change the output.
    #[must_use]
    pub fn instructions(&self) -> &str {
        &self.instructions
    }

    /// Whether the model takes messages.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// The text of a chat with the assistant's turn opened; `now_unix_s` is what a template that
    /// prints the date shows.
    ///
    /// # Errors
    /// When there is no template, or it refuses these messages.
    pub fn render_chat(
        &self,
        messages: &[ChatMessage],
        tools: &[Tool],
        now_unix_s: u64,
    ) -> Result<String, PromptError> {
        let template = self.chat.as_ref().ok_or(PromptError::NoChatTemplate)?;
        if !tools.is_empty() && template.call_format().is_none() {
            return Err(PromptError::NoTools);
        }
        template.render(messages, tools, now_unix_s).map_err(|source| PromptError::Template { source })
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// When the tokenizer refuses it.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, PromptError> {
        self.words.encode(text, special).map_err(|source| PromptError::Encode { source })
    }

    /// The tokens that a request's prompt begins with: raw text with the special tokens of the
    /// tokenizer's post-processor, a chat as its template wrote it. At least one token, each
    /// known to the model.
    ///
    /// # Errors
    /// When there is no such thing, see [`PromptError`].
    pub fn prompt_tokens(&self, prompt: &Prompt, tools: &[Tool], now_unix_s: u64) -> Result<Vec<u32>, PromptError> {
        let mut ids = match prompt {
            Prompt::Text(text) => self.encode(text, Special::Add)?,
            Prompt::Chat(messages) => self.encode(&self.render_chat(messages, tools, now_unix_s)?, Special::Leave)?,
        };
        if ids.is_empty() {
            ids.push(self.begin_token.ok_or(PromptError::Empty)?);
        }
        match ids.iter().find(|id| **id as usize >= self.vocabulary) {
            Some(id) => Err(PromptError::UnknownToken { id: *id, vocabulary: self.vocabulary }),
            None => Ok(ids),
        }
    }

    /// What leads a text of this model along a form, see [`Compiler::compile`].
    ///
    /// # Errors
    /// When the form is malformed, or the model has no end token.
    pub(crate) fn guide(&self, form: &Form) -> Result<Guide, String> {
        let compiler = self.compiler.get_or_init(|| {
            let end = self.form_end().ok_or("the model has no end token")?;
            Compiler::new(self.words.vocabulary(self.vocabulary, end)).map_err(|error| error.to_string())
        });
        let compiler = compiler.as_ref().map_err(Clone::clone)?;
        compiler.compile(form).map_err(|error| error.to_string())
    }

    /// The end token that stands for all of them in masks.
    pub(crate) fn form_end(&self) -> Option<u32> {
        self.turn_end.or_else(|| self.end_tokens.first().copied())
    }

    /// The calls of `tools` in a text of the model.
    #[must_use]
    pub fn calls(&self, text: &str, tools: &[Tool]) -> Vec<Call> {
        let format = self.chat.as_ref().and_then(ChatTemplate::call_format);
        format.map(|format| format.calls(text, tools)).unwrap_or_default()
    }

    /// The tokens that end the answer to such a prompt. A chat's turn also ends at the
    /// tokenizer's end token, which instruction-tuned models use and sometimes do not list.
    #[must_use]
    pub fn end_tokens(&self, prompt: &Prompt) -> Vec<u32> {
        let mut ends = self.end_tokens.clone();
        if matches!(prompt, Prompt::Chat(_)) {
            ends.extend(self.turn_end);
        }
        ends
    }

    /// How many tokens the model knows.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// What a token stands for by itself, see [`Words::text_of`].
    #[must_use]
    pub fn token_text(&self, id: u32) -> String {
        self.words.text_of(id)
    }

    /// A stream that decodes tokens as they come.
    #[must_use]
    pub fn stream(&self) -> TokenStream {
        self.words.stream()
    }

    /// A stream that decodes tokens which follow others, see [`Words::stream_after`].
    #[must_use]
    pub fn stream_after(&self, ids: &[u32]) -> TokenStream {
        self.words.stream_after(ids)
    }
}

/// Reads what stands before the weights.
pub(crate) fn open(path: &Path) -> Result<(Config, Weights), LoadError> {
    match Gguf::find(path) {
        Some(file) => {
            let gguf = Gguf::open(&file)?;
            let config = Config::of(&Fields::of(gguf.path(), gguf.config()), None)?;
            let text = gguf.config().to_string();
            let mut weights = Weights::of_gguf(gguf);
            weights.hash_bytes(text.as_bytes());
            Ok((config, weights))
        }
        None => {
            let config = Config::read(path)?;
            let mut weights = Weights::open(path)?;
            weights.hash_bytes(&read(&path.join("config.json"))?);
            Ok((config, weights))
        }
    }
}

/// The shape of a model, and no weights.
pub(crate) fn shape(path: &Path) -> Result<(Config, Weights), LoadError> {
    if let Some(file) = Gguf::find(path) {
        let gguf = Gguf::open(&file)?;
        return Ok((Config::of(&Fields::of(gguf.path(), gguf.config()), None)?, Weights::of_gguf(gguf)));
    }
    let mut weights = Weights::empty(path);
    weights.hash_bytes(&read(&path.join("config.json"))?);
    Ok((Config::read(path)?, weights))
}

/// The tokenizer's files.
struct Front {
    words: Words,
    chat: Option<ChatTemplate>,
    turn_end: Option<u32>,
}

impl Front {
    fn read(paths: &ModelPaths, architecture: &Architecture, weights: &mut Weights) -> Result<Self, LoadError> {
        if paths.tokenizer_path.is_none()
            && let Some(gguf) = weights.gguf()
        {
            let path = gguf.path().to_owned();
            let bytes = gguf.tokenizer()?.to_string().into_bytes();
            let settings = Fields::of(&path, &gguf.tokenizer_config()?);
            return Self::of((&path, &path), &bytes, Some(&settings), weights);
        }
        let path = paths.tokenizer_path.as_ref().unwrap_or(&paths.model_path);
        let (folder, file) = match path.extension() {
            Some(end) if end == "json" => (path.parent().unwrap_or(path), path.clone()),
            _ => (path.as_path(), path.join("tokenizer.json")),
        };
        let in_pairs = architecture.tokenizer_in_pairs && !file.exists();
        let bytes = match if in_pairs { pairs::tokenizer_json(folder)? } else { None } {
            Some(bytes) => bytes,
            None => read(&file)?,
        };
        let settings = match folder.join("tokenizer_config.json") {
            path if path.exists() => Some(Fields::read(path)?),
            _ => None,
        };
        Self::of((folder, &file), &bytes, settings.as_ref(), weights)
    }

    fn of(
        (folder, file): (&Path, &Path),
        bytes: &[u8],
        settings: Option<&Fields>,
        weights: &mut Weights,
    ) -> Result<Self, LoadError> {
        weights.hash_bytes(bytes);
        let words = Words::load(file, bytes)?;
        let special_tokens = settings.map(special_tokens).unwrap_or_default();
        let turn_end =
            special_tokens.iter().find(|(name, _)| name == "eos_token").and_then(|(_, token)| words.token(token));
        let chat = match chat_source(folder, settings)? {
            Some((path, source)) => {
                weights.hash_bytes(source.as_bytes());
                Some(ChatTemplate::compile(&path, &source, special_tokens)?)
            }
            None => None,
        };
        Ok(Self { words, chat, turn_end })
    }

    fn card(self, config: Config, fingerprint: Fingerprint, instructions: String) -> ModelCard {
        let mut end_tokens = config.end_tokens;
        if end_tokens.is_empty() {
            end_tokens.extend(self.turn_end);
        }
        ModelCard {
            context_tokens: config.context,
            vocabulary: config.vocabulary,
            fingerprint,
            instructions,
            words: self.words,
            chat: self.chat,
            begin_token: config.begin_token,
            end_tokens,
            turn_end: self.turn_end,
            compiler: OnceLock::new(),
        }
    }
}

/// Variables such as `bos_token` with their texts; a token is a string or an object with one.
fn special_tokens(settings: &Fields) -> Vec<(String, String)> {
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
        .into_iter()
        .filter_map(|name| {
            let value = settings.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name.to_owned(), text.to_owned()))
        })
        .collect()
}

/// The chat template and the file it stands in: chat_template.jinja, else tokenizer_config.json
/// with one template or a list of named ones, of which "default" holds.
fn chat_source(folder: &Path, settings: Option<&Fields>) -> Result<Option<(PathBuf, String)>, LoadError> {
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        let source = std::fs::read_to_string(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
        return Ok(Some((path, source)));
    }
    let Some((settings, value)) = settings.and_then(|settings| Some((settings, settings.get("chat_template")?))) else {
        return Ok(None);
    };
    let source = match value {
        Value::Array(named) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str()),
        _ => value.as_str(),
    };
    match source {
        Some(source) => Ok(Some((settings.path().to_owned(), source.to_owned()))),
        None => Err(settings
            .wrong("chat_template", "is neither a template nor a list of named templates with one called default")),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })
}
