//! Models on Google's Vertex: Gemini's content and Anthropic's messages, each below its publisher.

use super::anthropic::Anthropic;
use super::gemini::Gemini;
use super::{Dialect, Encoded, ProviderError, Reply, StreamDecoder, Streaming};
use crate::providers::Provider;
use genmill_core::job::JobSpec;
use serde_json::{Value, json};

/// The version of Anthropic's messages that Vertex takes; it stands in the body.
const ANTHROPIC_VERSION: &str = "vertex-2023-10-16";

/// Google's own models.
#[derive(Debug)]
pub(super) struct Vertex;

impl Dialect for Vertex {
    fn models_path(&self) -> Option<&'static str> {
        None
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let mut encoded = Gemini.encode(spec, model, provider, streaming);
        // Unlike AI Studio, it does not look for itself what is behind a URL.
        if spec.input.images().any(|image| image.media_type.is_none()) {
            encoded.left_out.push("image_media_type");
        }
        Encoded { path: format!("/publishers/google{}", encoded.path), ..encoded }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        Gemini.decode(body)
    }

    fn decode_error(&self, body: &[u8]) -> ProviderError {
        Gemini.decode_error(body)
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        Gemini.decoder()
    }
}

/// Anthropic's models.
#[derive(Debug)]
pub(super) struct VertexAnthropic;

impl Dialect for VertexAnthropic {
    fn models_path(&self) -> Option<&'static str> {
        None
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let method = match streaming {
            Streaming::On => "streamRawPredict",
            Streaming::Off => "rawPredict",
        };
        let (mut body, left_out) = Anthropic::body(spec, model, provider, streaming);
        if let Some(body) = body.as_object_mut() {
            // The path names it.
            body.remove("model");
        }
        body["anthropic_version"] = json!(ANTHROPIC_VERSION);
        let path = format!("/publishers/anthropic/models/{model}:{method}");
        Encoded { path, headers: super::parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        Anthropic.decode(body)
    }

    /// Its refusals are Google's before the model is reached, and Anthropic's after that.
    fn decode_error(&self, body: &[u8]) -> ProviderError {
        let is_googles = |body: &Value| body.get(0).unwrap_or(body)["error"]["status"].is_string();
        match serde_json::from_slice(body) {
            Ok(error) if is_googles(&error) => Gemini.decode_error(body),
            _ => Anthropic.decode_error(body),
        }
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        Anthropic.decoder()
    }
}
