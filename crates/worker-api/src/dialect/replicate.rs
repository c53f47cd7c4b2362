//! Replicate's predictions: asked for, waited for, and looked at again until they have ended. They come whole.

use super::{Dialect, Encoded, Pending, ProviderError, Reply, StreamDecoder, StreamEvent, Streaming};
use super::{conversation, errors, parameters};
use crate::providers::Provider;
use genmill_core::attempt::{FinishReason, Usage};
use genmill_core::job::JobSpec;
use genmill_core::request::{Input, Role};
use serde_json::{Value, json};

/// The longest answer that is taken, in bytes.
const ANSWER_BYTES_MAX: usize = 32 * 1024 * 1024;

/// How long the answer to a request may wait for the prediction, in seconds. Until it is there nobody knows how to call the
/// prediction off.
const WAIT_S: u64 = 2;

/// The shortest life of a prediction that may be asked for, in seconds.
const LIFE_S_MIN: u64 = 5;

/// The dialect.
#[derive(Debug)]
pub(super) struct Replicate;

impl Dialect for Replicate {
    fn encode(&self, spec: &JobSpec, model: &str, provider: &Provider, _streaming: Streaming) -> Encoded {
        let mut body = json!({"input": {"prompt": prompt(&spec.input)}});
        let system = conversation::system(&spec.input);
        if !system.is_empty() {
            body["input"]["system_prompt"] = json!(system.join("\n\n"));
        }
        // A version is named by itself; the newest of a model by its owner and name.
        let path = match model.split_once(':') {
            Some((_, version)) => {
                body["version"] = json!(version);
                "/predictions".to_owned()
            }
            None => format!("/models/{model}/predictions"),
        };
        let left_out = parameters::fill(&mut body, spec, model, provider, rows(spec));
        let mut headers = parameters::headers(provider);
        headers.push(("prefer".to_owned(), format!("wait={WAIT_S}")));
        // Should nobody be there any more to call it off, it ends by itself.
        let life_s = spec.timeout_ms.map(|timeout_ms| timeout_ms.div_ceil(1_000).max(LIFE_S_MIN));
        headers.extend(life_s.map(|life_s| ("cancel-after".to_owned(), format!("{life_s}s"))));
        Encoded { path, headers, body: body.to_string(), left_out }
    }

    fn pending(&self, body: &[u8]) -> Option<Pending> {
        let prediction: Value = serde_json::from_slice(body).ok()?;
        let waits = matches!(prediction["status"].as_str()?, "starting" | "processing" | "queued");
        let url = |name: &str| prediction["urls"][name].as_str().map(str::to_owned);
        url("get").filter(|_| waits).map(|look| Pending { look, cancel: url("cancel") })
    }

    fn decode(&self, body: &[u8]) -> Result<Reply, ProviderError> {
        let prediction = errors::json(body, "the answer is not a prediction")?;
        match prediction["status"].as_str() {
            Some("succeeded") => {}
            Some("canceled" | "aborted") => return Err(ProviderError::saying("the prediction was cancelled there")),
            _ if !prediction["error"].is_null() => return Err(errors::of_value(&prediction)),
            _ => return Err(ProviderError::saying("the answer is not a prediction that has ended")),
        }
        let text = match &prediction["output"] {
            Value::String(text) => text.clone(),
            Value::Array(pieces) => pieces.iter().filter_map(Value::as_str).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
                return Err(ProviderError::saying("the prediction is no text"));
            }
        };
        let count = |name: &str| prediction["metrics"][name].as_u64();
        let usage = count("input_token_count").zip(count("output_token_count"));
        let usage = usage.map(|(prompt_tokens, completion_tokens)| {
            StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens: 0, completion_tokens })
        });
        // Why it ended is not told.
        let events = [StreamEvent::Text(text), StreamEvent::Finished(FinishReason::Unknown)];
        Reply::of(events.into_iter().chain(usage).collect())
    }

    fn decoder(&self) -> Box<dyn StreamDecoder + Send> {
        Box::new(Whole::default())
    }
}

fn rows(spec: &JobSpec) -> Vec<parameters::Row<'static>> {
    let sampling = &spec.sampling;
    let controls = &sampling.controls;
    let number = |number: Option<f64>| number.map(|number| json!(number));
    // They are one text, parted by commas; one that has a comma is left to the worker.
    let stops: Vec<&str> = sampling.stop.iter().map(String::as_str).filter(|stop| !stop.contains(',')).collect();
    vec![
        ("max_tokens", "input.max_tokens", Some(json!(sampling.max_tokens))),
        ("temperature", "input.temperature", Some(json!(sampling.temperature))),
        ("top_p", "input.top_p", number(sampling.top_p)),
        ("top_k", "input.top_k", sampling.top_k.map(|top_k| json!(top_k))),
        ("seed", "input.seed", Some(json!(parameters::seed(sampling.seed)))),
        ("stop", "input.stop_sequences", (!stops.is_empty()).then(|| json!(stops.join(",")))),
        ("frequency_penalty", "input.frequency_penalty", number(controls.frequency_penalty)),
        ("presence_penalty", "input.presence_penalty", number(controls.presence_penalty)),
    ]
}

/// The conversation without its system messages, as one text.
fn prompt(input: &Input) -> String {
    let Input::Messages(messages) = input else { return super::tgi::prompt(input) };
    let said = messages.iter().filter(|message| message.role != Role::System).cloned().collect();
    super::tgi::prompt(&Input::Messages(said))
}

/// Takes an answer that comes whole, in whatever pieces the network makes of it.
#[derive(Debug, Default)]
struct Whole {
    body: Vec<u8>,
}

impl StreamDecoder for Whole {
    fn push(&mut self, bytes: &[u8]) -> Vec<StreamEvent> {
        if self.body.len() + bytes.len() > ANSWER_BYTES_MAX {
            return vec![StreamEvent::Error(ProviderError::saying("the answer is too long"))];
        }
        self.body.extend_from_slice(bytes);
        Vec::new()
    }

    fn end(&mut self) -> Vec<StreamEvent> {
        let body = std::mem::take(&mut self.body);
        match Replicate.decode(&body) {
            Ok(reply) => {
                let finished = reply.finish_reason.map(StreamEvent::Finished);
                let rest = finished.into_iter().chain(reply.usage.map(StreamEvent::Usage)).chain([StreamEvent::Done]);
                std::iter::once(StreamEvent::Text(reply.text)).chain(rest).collect()
            }
            Err(error) => vec![StreamEvent::Error(error)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_that_goes_on_is_looked_at_again() {
        let urls = r#"{"get":"https://x/p/1","cancel":"https://x/p/1/cancel"}"#;
        let prediction = |status: &str| format!(r#"{{"status":"{status}","urls":{urls}}}"#);
        let (look, cancel) = ("https://x/p/1".to_owned(), Some("https://x/p/1/cancel".to_owned()));
        assert_eq!(Replicate.pending(prediction("processing").as_bytes()), Some(Pending { look, cancel }));
        assert_eq!(Replicate.pending(prediction("succeeded").as_bytes()), None);
        assert_eq!(Replicate.pending(b"oops"), None);
    }

    #[test]
    fn a_prediction_does_not_outlive_its_attempt_for_long() {
        let table = crate::providers::Table::embedded().unwrap();
        let check = |timeout_ms, expect: Option<&str>| {
            let spec = JobSpec { timeout_ms, ..crate::fixture::spec("litellm_replicate/a/b", "hi") };
            let sent = Replicate.encode(&spec, "a/b", table.find("replicate").unwrap(), Streaming::Off);
            let life = sent.headers.iter().find(|(name, _)| name == "cancel-after").map(|(_, life)| life.as_str());
            assert_eq!(life, expect);
        };
        check(Some(60_001), Some("61s"));
        check(Some(100), Some("5s"));
        check(None, None);
    }

    #[test]
    fn a_failed_prediction_tells_why() {
        let told = Replicate.decode(br#"{"status":"failed","error":"out of memory","output":null}"#).unwrap_err();
        assert_eq!(told.message, "out of memory");
        assert!(Replicate.decode(br#"{"status":"canceled","error":null}"#).is_err());
        assert!(Replicate.decode(br#"{"status":"succeeded","output":{"image":1}}"#).is_err());
    }
}
