//! The inference engine: tokens, KV blocks, weights, kernels and continuous batching.
//!
//! Never here: jobs, Redis, HTTP, money, async. A [`Model`] is loaded from a Hugging Face folder or
//! a GGUF file,
//! an [`Engine`] owns it on one thread, requests go in through [`Engine::submit`] and events come
//! out through the sink given with each request.
//!
//! The contract: with a seed, or at temperature 0, the tokens of a request are bit for bit the
//! same alone, in any batch, and under any chunking of its prompt. [`backend`] says how.

pub mod architectures;
pub mod ask;
pub mod backend;
pub mod bandwidth;
pub mod chat;
pub mod config;
mod decoder;
pub mod engine;
mod error;
pub mod footprint;
#[cfg(any(test, feature = "cuda"))]
mod generate_batch;
mod gguf;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod kv;
mod linear;
#[cfg(any(test, feature = "cuda"))]
mod made_up;
mod math;
pub mod measure;
pub mod model;
pub mod quantized;
pub mod raw;
pub mod rope;
pub mod sampler;
pub mod schedule;
pub mod shape;
pub mod sim;
#[cfg(any(test, feature = "cuda"))]
mod small_engines;
pub mod text;
pub mod tools;
mod weights;

pub use chat::ChatMessage;
pub use engine::{
    Completion, Engine, EngineOptions, Event, FinishReason, Free, Output, Prompt, Request, RequestError, RequestId,
    SequenceUnderway, Sink, StartError, SubmitError, Underway,
};
pub use error::LoadError;
pub use footprint::Footprint;
pub use genmill_grammar::Form;
#[cfg(feature = "cuda")]
pub use model::GpuOptions;
pub use model::{Fingerprint, LoadOptions, Model, ModelCard, ModelPaths, PromptError};
pub use sampler::Scored;
pub use shape::Shaping;
pub use tools::{Call, Tool};
