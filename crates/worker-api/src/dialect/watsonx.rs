//! IBM's watsonx: chat completions with other names for a few fields, and paths of their own.

use super::openai::OpenAi;
use super::{Dialect, Encoded, ProviderError, Reply, StreamDecoder, Streaming};
use crate::providers::Provider;
use genmill_core::job::JobSpec;
use serde_json::Value;

/// The version of the API that is spoken.
const VERSION: &str = "2025-02-11";

/// The dialect.
#[derive(Debug)]
pub(super) struct Watsonx;

impl Dialect for Watsonx {
    /// The list of models is open to all, so it tells nothing of a key; but it tells of models.
    fn models_path(&self) -> Option<&'static str> {
        Some("/ml/v1/foundation_model_specs?version=2025-02-11&limit=200")
    }

    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, streaming: Streaming) -> Encoded {
        let method = match streaming {
            Streaming::On => "chat_stream",
            Streaming::Off => "chat",
        };
        let (mut body, left_out) = OpenAi::body(spec, model, provider, Streaming::Off);
        // A choice that is a word has a field of its own.
        if let Some(fields) = body.as_object_mut()
            && let Some(choice) = fields.get("tool_choice").filter(|choice| choice.is_string()).cloned()
        {
            fields.remove("tool_choice");
            fields.insert("tool_choice_option".to_owned(), choice);
        }
        let path = format!("/ml/v1/text/{method}?version={VERSION}");
        Encoded { path, headers: super::parameters::headers(provider), body: body.to_string(), left_out }
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        OpenAi.decode(body)
    }

    /// An error tells its status beside the list of what is wrong.
    fn decode_error(&self, body: &[u8]) -> ProviderError {
        let told: Value = serde_json::from_slice(body).unwrap_or_default();
        let status = told["status_code"].as_u64().and_then(|status| u16::try_from(status).ok());
        ProviderError { status, ..OpenAi.decode_error(body) }
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        OpenAi.decoder()
    }
}
