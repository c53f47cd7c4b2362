//! Values that several tests start from.

use genmill_core::controls::{Controls, ReasoningEffort, StructuredOutput, Tool, ToolCall, ToolChoice};
use genmill_core::image::{Detail, Image, Part};
use genmill_core::job::JobSpec;
use genmill_core::model::ModelName;
use genmill_core::names::Tenant;
use genmill_core::request::{ChatMessage, Input, Priority, Role, Sampling};
use std::collections::BTreeMap;

/// A job with a plain prompt and nothing special.
pub(crate) fn spec(model: &str, prompt: &str) -> JobSpec {
    JobSpec {
        model: ModelName::parse(model).unwrap(),
        input: Input::Prompt(prompt.to_owned()),
        sampling: Sampling {
            max_tokens: 250,
            temperature: 0.1,
            top_p: None,
            top_k: None,
            seed: 7,
            stop: Vec::new(),
            controls: Controls::default(),
        },
        labels: BTreeMap::new(),
        tenant: Tenant::default(),
        experiment: None,
        priority: Priority::Normal,
        request_id: None,
        timeout_ms: None,
        deadline: None,
        not_before: None,
        context_tokens: None,
        prefix: None,
        seed_given: false,
        redriven_from: None,
        batch: false,
    }
}

/// A conversation.
pub(crate) fn messages(messages: &[(Role, &str)]) -> Input {
    let message = |(role, content): &(Role, &str)| ChatMessage::new(*role, *content);
    Input::Messages(messages.iter().map(message).collect())
}

/// The beginning of a PNG.
pub(crate) const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// A question about images: one by its bytes, and others by URL.
pub(crate) fn with_images(urls: &[&str]) -> JobSpec {
    let mut spec = spec("litellm_x/y", "");
    let image = |image: Result<Image, String>| Part::Image(image.unwrap());
    let data = Image { detail: Some(Detail::Low), ..Image::of(PNG.to_vec(), "").unwrap() };
    let urls = urls.iter().map(|url| image(Image::at((*url).to_owned(), "")));
    let parts = [Part::Text("Which animals?".to_owned()), Part::Image(data)].into_iter().chain(urls).collect();
    spec.input = Input::Messages(vec![ChatMessage { parts, ..ChatMessage::new(Role::User, "") }]);
    spec
}

/// A job with everything that a remote model may be asked for, also what does not go together.
pub(crate) fn rich() -> JobSpec {
    let mut spec = spec("litellm_groq/the-model", "");
    let call = |id: &str, city: &str| ToolCall {
        id: id.to_owned(),
        name: "get_weather".to_owned(),
        arguments: format!("{{\"city\":\"{city}\"}}"),
    };
    let answer =
        |id: &str, text: &str| ChatMessage { tool_call_id: id.to_owned(), ..ChatMessage::new(Role::Tool, text) };
    spec.input = Input::Messages(vec![
        ChatMessage::new(Role::System, "Be brief."),
        ChatMessage::new(Role::User, "Weather in Paris and Rome?"),
        ChatMessage {
            tool_calls: vec![call("c1", "Paris"), call("c2", "Rome")],
            ..ChatMessage::new(Role::Assistant, "Let me look.")
        },
        answer("c1", "{\"sky\":\"clear\"}"),
        answer("c2", "rain"),
        ChatMessage::new(Role::User, "And \"now\"?"),
    ]);
    let tool = |name: &str, description: &str, parameters: &str| Tool {
        name: name.to_owned(),
        description: description.to_owned(),
        parameters: parameters.to_owned(),
    };
    spec.sampling.max_tokens = 5_000;
    spec.sampling.top_k = Some(40);
    spec.sampling.stop = ["a", "b", "c", "d", "e", "f"].map(str::to_owned).to_vec();
    spec.sampling.controls = Controls {
        frequency_penalty: Some(0.5),
        presence_penalty: Some(-0.5),
        repetition_penalty: Some(1.1),
        logprobs: Some(2),
        structured_output: Some(StructuredOutput::JsonSchema(r#"{"type":"object"}"#.to_owned())),
        tools: vec![
            tool(
                "get_weather",
                "The weather of a city.",
                r#"{"type":"object","properties":{"city":{"type":"string"}}}"#,
            ),
            tool("now", "", ""),
        ],
        tool_choice: Some(ToolChoice::Tool("get_weather".to_owned())),
        reasoning_effort: Some(ReasoningEffort::Medium),
        ..Controls::default()
    };
    spec
}
