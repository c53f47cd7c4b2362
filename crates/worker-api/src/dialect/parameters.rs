//! Which parameters a request sets, and which of them a body has room for. Never here: how a dialect writes them.

use crate::providers::Provider;
use genmill_core::controls::{Controls, ReasoningEffort, StructuredOutput, Tool, ToolChoice};
use genmill_core::image::{Detail, Image, Source};
use genmill_core::job::JobSpec;
use genmill_core::request::{Input, Sampling};
use serde_json::{Value, json};

/// A parameter as Genmill names it, the place in the body that has it (fields parted by `.`), its value when it is set.
pub(super) type Row<'a> = (&'static str, &'a str, Option<Value>);

/// Whether a request sets a parameter.
type Asks = fn(&Sampling) -> bool;

/// Every parameter that can go missing, and whether a request sets it to anything that makes a difference. Not among
/// them: stop strings, which the worker keeps itself.
const ASKED: &[(&str, Asks)] = &[
    ("max_tokens", |_| true),
    ("temperature", |_| true),
    ("seed", |_| true),
    ("top_p", |sampling| sampling.top_p.is_some_and(|p| p < 1.0)),
    ("top_k", |sampling| sampling.top_k.is_some()),
    ("min_p", |sampling| sampling.controls.min_p.is_some_and(|p| p > 0.0)),
    ("frequency_penalty", |sampling| sampling.controls.frequency_penalty.is_some_and(|x| x != 0.0)),
    ("presence_penalty", |sampling| sampling.controls.presence_penalty.is_some_and(|x| x != 0.0)),
    ("repetition_penalty", |sampling| sampling.controls.repetition_penalty.is_some_and(|x| x != 1.0)),
    ("logit_bias", |sampling| !sampling.controls.logit_bias.is_empty()),
    ("logprobs", |sampling| sampling.controls.logprobs.is_some()),
    ("structured_output", |sampling| sampling.controls.structured_output.is_some()),
    ("tools", |sampling| !sampling.controls.tools.is_empty()),
    ("tool_choice", |sampling| {
        sampling.controls.tool_choice.as_ref().is_some_and(|choice| *choice != ToolChoice::Auto)
    }),
    ("reasoning_effort", |sampling| sampling.controls.reasoning_effort.is_some()),
    ("n", |sampling| sampling.controls.samples() > 1),
];

/// Whether an image needs something of a provider.
type Needs = fn(&Image) -> bool;

/// What images need, under names like those of parameters.
const IMAGES_NEED: &[(&str, Needs)] = &[
    ("images", |_| true),
    ("image_urls", |image| matches!(image.source, Source::Url(_))),
    ("image_detail", |image| image.detail.is_some_and(|detail| detail != Detail::Auto)),
];

/// For the rows of a dialect that has images in its messages, by their bytes at least.
pub(super) const IMAGES: Row<'static> = ("images", IN_MESSAGES, Some(Value::Null));

/// For those of one whose providers fetch images.
pub(super) const IMAGE_URLS: Row<'static> = ("image_urls", IN_MESSAGES, Some(Value::Null));

/// For those of one that has a place for how closely to look.
pub(super) const IMAGE_DETAIL: Row<'static> = ("image_detail", IN_MESSAGES, Some(Value::Null));

/// The place of what stands in the messages already.
const IN_MESSAGES: &str = "";

/// What is never left out, since something else would be answered then, and what to do instead.
pub(crate) const NEVER_LEFT_OUT: &[(&str, &str)] = &[
    ("n", "submit as many jobs"),
    ("images", "ask a model that sees"),
    ("image_urls", "send the images' bytes, in `data`"),
    ("image_media_type", "tell the media_type of images by URL"),
];

/// Parameters that admission fills in where a request has none, so that a job cannot tell whether anybody wanted them.
pub(crate) const FILLED_IN: &[&str] = &["max_tokens", "temperature", "seed"];

/// Puts the rows that are set, and that provider and model take, into a body. Returns the parameters that are set but
/// have no place in it.
pub(super) fn fill<'a>(
    body: &mut Value,
    spec: &JobSpec,
    model: &str,
    provider: &Provider,
    rows: impl IntoIterator<Item = Row<'a>>,
) -> Vec<&'static str> {
    let mut sent = Vec::new();
    for (name, place, value) in rows {
        let Some(value) = value else { continue };
        // A provider may refuse one value only, or one type of value.
        let word = value.as_str().or_else(|| value["type"].as_str());
        let takes_value = || word.is_none_or(|word| provider.takes(model, &format!("{name}={word}")));
        if provider.takes(model, name) && takes_value() {
            put(body, place, value);
            sent.push(name);
        }
    }
    let asked = ASKED.iter().filter(|(_, asks)| asks(&spec.sampling)).map(|(name, _)| *name);
    let needed = IMAGES_NEED.iter().filter(|(_, needs)| spec.input.images().any(needs)).map(|(name, _)| *name);
    asked.chain(needed).filter(|name| !sent.contains(name)).collect()
}

fn put(body: &mut Value, place: &str, value: Value) {
    match place.split_once('.') {
        _ if place == IN_MESSAGES => {}
        Some((first, rest)) => put(&mut body[first], rest, value),
        None => body[place] = value,
    }
}

/// The seed in 31 bits, which every provider takes; a seed that fits is sent as it is.
pub(super) fn seed(seed: u64) -> u64 {
    (seed ^ (seed >> 31) ^ (seed >> 62)) & 0x7fff_ffff
}

/// The JSON schema that the text must keep.
pub(super) fn schema(controls: &Controls) -> Option<Value> {
    match &controls.structured_output {
        Some(StructuredOutput::JsonSchema(schema)) => Some(parsed(schema)),
        // Refused at submission.
        Some(StructuredOutput::Regex(_) | StructuredOutput::Choice(_) | StructuredOutput::Lark(_)) | None => None,
    }
}

/// A schema, which was checked at submission.
pub(super) fn parsed(schema: &str) -> Value {
    serde_json::from_str(schema).unwrap_or_default()
}

/// The arguments of a call as an object; a model may have written anything, and then it is none.
pub(super) fn object(arguments: &str) -> Value {
    serde_json::from_str(arguments).ok().filter(Value::is_object).unwrap_or_else(|| json!({}))
}

/// How much to think, in the word that several dialects have for it.
pub(super) const fn level(effort: ReasoningEffort) -> &'static str {
    match effort {
        ReasoningEffort::None | ReasoningEffort::Minimal | ReasoningEffort::Low => "low",
        ReasoningEffort::Medium => "medium",
        ReasoningEffort::High => "high",
    }
}

/// Whether tools are best not named, where a dialect cannot tell that none is to be called: unless the conversation has calls,
/// which stand for nothing without them.
pub(super) fn hides_tools(spec: &JobSpec) -> bool {
    let has_calls = match &spec.input {
        Input::Prompt(_) => false,
        Input::Messages(messages) => messages.iter().any(|message| !message.tool_calls.is_empty()),
    };
    spec.sampling.controls.tool_choice == Some(ToolChoice::None) && !has_calls
}

/// The rows of such tools.
pub(super) fn hidden_tools(hidden: bool) -> [Row<'static>; 2] {
    ["tools", "tool_choice"].map(|name| (name, IN_MESSAGES, hidden.then_some(Value::Null)))
}

/// The tools in a dialect's form, when there are any.
pub(super) fn tools(controls: &Controls, form: fn(&Tool) -> Value) -> Option<Value> {
    (!controls.tools.is_empty()).then(|| controls.tools.iter().map(form).collect())
}

/// The schema of a tool's arguments; one without any takes an empty object.
pub(super) fn arguments_schema(tool: &Tool) -> Value {
    if tool.parameters.is_empty() { json!({"type": "object", "properties": {}}) } else { parsed(&tool.parameters) }
}

/// A tool as a function, in the form that OpenAI's followers took over.
pub(super) fn function(tool: &Tool) -> Value {
    let mut function = json!({"name": tool.name, "parameters": arguments_schema(tool)});
    if !tool.description.is_empty() {
        function["description"] = json!(tool.description);
    }
    json!({"type": "function", "function": function})
}

/// Strings as JSON, when there are any.
pub(super) fn list<'a>(texts: impl Iterator<Item = &'a String>) -> Option<Value> {
    let texts: Vec<&String> = texts.collect();
    (!texts.is_empty()).then(|| json!(texts))
}

/// The headers of every call of a provider, and that the body is JSON.
pub(super) fn headers(provider: &Provider) -> Vec<(String, String)> {
    let own = provider.headers.iter().map(|(name, value)| (name.clone(), value.clone()));
    own.chain([("content-type".to_owned(), "application/json".to_owned())]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_seed_is_sent_as_it_is_when_every_provider_takes_it() {
        assert_eq!(seed(0), 0);
        assert_eq!(seed(0x7fff_ffff), 0x7fff_ffff);
        assert_eq!(seed(1 << 31), 1);
    }

    #[test]
    fn a_place_may_lie_deeper() {
        let mut body = json!({"a": 1});
        put(&mut body, "b.c", json!(2));
        put(&mut body, "b.d", json!(3));
        assert_eq!(body, json!({"a": 1, "b": {"c": 2, "d": 3}}));
    }

    proptest! {
        #[test]
        fn any_seed_fits_31_bits(number: u64) {
            prop_assert!(seed(number) < 1 << 31);
        }
    }
}
