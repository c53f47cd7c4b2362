//! What chat completions have beside text: messages that call tools, tools, forms of the answer, log probabilities.

use super::StreamEvent;
use crate::dialect::parameters::{self, Row};
use crate::dialect::{calls, images};
use crate::providers::Want;
use genmill_core::attempt::TokenLogprob;
use genmill_core::controls::{Controls, ToolChoice};
use genmill_core::request::ChatMessage;
use serde_json::{Map, Value, json};

/// A message as it is sent.
pub(super) fn message(message: &ChatMessage) -> Value {
    let mut out = json!({"role": message.role.name(), "content": images::chat_content(message)});
    if !message.tool_calls.is_empty() {
        out["tool_calls"] = message.tool_calls.iter().map(calls::sent).collect();
    }
    if !message.tool_call_id.is_empty() {
        out["tool_call_id"] = json!(message.tool_call_id);
    }
    out
}

/// Takes from messages how closely to look at their images.
pub(super) fn forget_detail(messages: &mut Value) {
    let contents = messages.as_array_mut().into_iter().flatten().filter_map(|said| said.get_mut("content"));
    for part in contents.filter_map(Value::as_array_mut).flatten() {
        if let Some(image) = part.get_mut("image_url").and_then(Value::as_object_mut) {
            image.remove("detail");
        }
    }
}

/// Adds to a body what a provider wants beside what others do.
pub(super) fn add(want: Want, body: &mut Value) {
    match want {
        Want::CallIndex => {
            for calls in list_in(body, "messages").filter_map(|said| said.get_mut("tool_calls")) {
                for (place, call) in calls.as_array_mut().into_iter().flatten().enumerate() {
                    call["index"] = json!(place);
                }
            }
            if let Some(choice) = body.get_mut("tool_choice").filter(|choice| choice.is_object()) {
                (choice["index"], choice["id"], choice["function"]["arguments"]) = (json!(0), json!(""), json!(""));
            }
        }
        Want::ToolDescription => {
            for function in list_in(body, "tools").filter_map(|tool| tool.get_mut("function")) {
                if function["description"].is_null() {
                    function["description"] = function["name"].clone();
                }
            }
        }
    }
}

fn list_in<'a>(body: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    body.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

/// The parameters beside the usual ones: each as Genmill names it, the field it is sent in, its value.
pub(super) fn parameters(controls: &Controls) -> Vec<Row<'static>> {
    let number = |number: Option<f64>| number.map(|number| json!(number));
    let bias: Map<String, Value> =
        controls.logit_bias.iter().map(|(token, bias)| (token.to_string(), whole(*bias))).collect();
    let format = parameters::schema(controls)
        .map(|schema| json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}));
    vec![
        ("min_p", "min_p", number(controls.min_p)),
        ("frequency_penalty", "frequency_penalty", number(controls.frequency_penalty)),
        ("presence_penalty", "presence_penalty", number(controls.presence_penalty)),
        ("repetition_penalty", "repetition_penalty", number(controls.repetition_penalty)),
        ("logit_bias", "logit_bias", (!bias.is_empty()).then_some(Value::Object(bias))),
        ("logprobs", "logprobs", controls.logprobs.map(|_| json!(true))),
        ("logprobs", "top_logprobs", controls.logprobs.filter(|top| *top > 0).map(|top| json!(top))),
        ("structured_output", "response_format", format),
        ("tools", "tools", parameters::tools(controls, parameters::function)),
        ("tool_choice", "tool_choice", controls.tool_choice.as_ref().map(tool_choice)),
        ("reasoning_effort", "reasoning_effort", controls.reasoning_effort.map(|effort| json!(effort.name()))),
        ("n", "n", controls.n.filter(|n| *n > 1).map(|n| json!(n))),
        parameters::IMAGES,
        parameters::IMAGE_URLS,
        parameters::IMAGE_DETAIL,
    ]
}

fn tool_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::Auto => json!("auto"),
        ToolChoice::None => json!("none"),
        ToolChoice::Required => json!("required"),
        ToolChoice::Tool(name) => json!({"type": "function", "function": {"name": name}}),
    }
}

/// A number, without a fraction where it has none: OpenAI's schema has whole biases only.
fn whole(number: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "a bias, which is small")]
    let whole = number as i64;
    if number.fract() == 0.0 { json!(whole) } else { json!(number) }
}

/// Log probabilities of a choice.
pub(super) fn logprobs(logprobs: &Value) -> Option<StreamEvent> {
    logprobs_of(&logprobs["content"])
}

/// Log probabilities in a list, as others have them too.
pub(in crate::dialect) fn logprobs_of(content: &Value) -> Option<StreamEvent> {
    let content = content.as_array().filter(|content| !content.is_empty())?;
    Some(StreamEvent::Logprobs(content.iter().map(logprob).collect()))
}

fn logprob(token: &Value) -> TokenLogprob {
    #[expect(clippy::cast_possible_truncation, reason = "log probabilities are kept in float32")]
    let number = |value: &Value| value.as_f64().map(|number| number as f32);
    TokenLogprob {
        token_id: None,
        token: token["token"].as_str().unwrap_or_default().to_owned(),
        logprob: number(&token["logprob"]),
        top: token["top_logprobs"].as_array().into_iter().flatten().map(logprob).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, encoded};
    use super::*;
    use crate::dialect::Streaming;
    use crate::fixture::spec;
    use genmill_core::controls::{ReasoningEffort, StructuredOutput, Tool, ToolCall};
    use genmill_core::request::{Input, Role};

    #[test]
    fn what_steers_a_generation_is_sent_and_what_a_provider_refuses_is_dropped() {
        let mut spec = spec("litellm_x/y", "hi");
        spec.sampling.controls = Controls {
            min_p: Some(0.1),
            frequency_penalty: Some(0.5),
            repetition_penalty: Some(1.1),
            logit_bias: [(7, -100.0)].into(),
            logprobs: Some(2),
            structured_output: Some(StructuredOutput::JsonSchema(r#"{"type":"object"}"#.to_owned())),
            ..Controls::default()
        };
        let body = |provider| encoded(provider, &spec, Streaming::Off).body;
        insta::assert_snapshot!(body("fireworks_ai"), @r#"{"frequency_penalty":0.5,"logit_bias":{"7":-100},"logprobs":true,"max_tokens":250,"messages":[{"content":"hi","role":"user"}],"min_p":0.1,"model":"y","repetition_penalty":1.1,"response_format":{"json_schema":{"name":"answer","schema":{"type":"object"}},"type":"json_schema"},"seed":7,"temperature":0.1,"top_logprobs":2}"#);
        assert!(!body("openai").contains("min_p") && !body("openai").contains("repetition_penalty"));
        assert!(body("openai").contains("logit_bias"));
    }

    #[test]
    fn calls_and_answers_are_sent_as_chat_apis_take_them() {
        let mut spec = spec("litellm_x/y", "");
        let call = ToolCall { id: "c".to_owned(), name: "f".to_owned(), arguments: "{}".to_owned() };
        let asked = ChatMessage { tool_calls: vec![call], ..ChatMessage::new(Role::Assistant, "") };
        let answer = ChatMessage { tool_call_id: "c".to_owned(), ..ChatMessage::new(Role::Tool, "4") };
        spec.input = Input::Messages(vec![asked, answer]);
        let tool = Tool { name: "f".to_owned(), description: String::new(), parameters: "{}".to_owned() };
        spec.sampling.controls.tools = vec![tool];
        insta::assert_snapshot!(encoded("openai", &spec, Streaming::Off).body, @r#"{"max_tokens":250,"messages":[{"content":"","role":"assistant","tool_calls":[{"function":{"arguments":"{}","name":"f"},"id":"c","type":"function"}]},{"content":"4","role":"tool","tool_call_id":"c"}],"model":"y","seed":7,"temperature":0.1,"tools":[{"function":{"name":"f","parameters":{}},"type":"function"}]}"#);
    }

    #[test]
    fn pieces_of_calls_and_log_probabilities_are_read() {
        let part = |index, id: &str, name: &str, arguments: &str| StreamEvent::ToolCall {
            index,
            part: ToolCall { id: id.to_owned(), name: name.to_owned(), arguments: arguments.to_owned() },
        };
        check(
            r#"{"choices":[{"delta":{"tool_calls":[{"index":1,"id":"c","function":{"name":"f","arguments":""}}]}}]}"#,
            &[part(1, "c", "f", "")],
        );
        check(
            r#"{"choices":[{"message":{"tool_calls":[{"id":"c","function":{"name":"f","arguments":{"a":1}}}]}}]}"#,
            &[part(0, "c", "f", r#"{"a":1}"#)],
        );
        let best = TokenLogprob { token_id: None, token: "b".to_owned(), logprob: Some(-0.5), top: Vec::new() };
        let first = TokenLogprob { token: "a".to_owned(), logprob: Some(-1.0), top: vec![best.clone()], ..best };
        check(
            r#"{"choices":[{"delta":{},"logprobs":{"content":[{"token":"a","logprob":-1.0,"top_logprobs":[{"token":"b","logprob":-0.5}]}]}}]}"#,
            &[StreamEvent::Logprobs(vec![first])],
        );
    }

    #[test]
    fn how_closely_to_look_is_told_to_who_takes_it() {
        let spec = crate::fixture::with_images(&[]);
        let says = |provider| encoded(provider, &spec, Streaming::Off);
        let (told, untold) = (says("openai"), says("together_ai"));
        assert!(told.body.contains("\"detail\":\"low\"") && told.left_out.is_empty(), "{told:?}");
        assert!(!untold.body.contains("detail") && untold.left_out == ["image_detail"], "{untold:?}");
    }

    #[test]
    fn what_some_want_beside_what_others_do_is_added() {
        let mut spec = crate::fixture::rich();
        let Input::Messages(said) = &spec.input else { unreachable!() };
        spec.input = Input::Messages(said[2..3].to_vec());
        let Controls { tools, tool_choice, .. } = spec.sampling.controls;
        spec.sampling.controls = Controls { tools: tools[1..].to_vec(), tool_choice, ..Controls::default() };
        spec.sampling.stop.clear();
        spec.sampling.top_k = None;
        let sent = |provider| encoded(provider, &spec, Streaming::Off);
        insta::assert_snapshot!(sent("together_ai").body, @r#"{"max_tokens":5000,"messages":[{"content":"Let me look.","role":"assistant","tool_calls":[{"function":{"arguments":"{\"city\":\"Paris\"}","name":"get_weather"},"id":"c1","index":0,"type":"function"},{"function":{"arguments":"{\"city\":\"Rome\"}","name":"get_weather"},"id":"c2","index":1,"type":"function"}]}],"model":"the-model","seed":7,"temperature":0.1,"tool_choice":{"function":{"arguments":"","name":"get_weather"},"id":"","index":0,"type":"function"},"tools":[{"function":{"name":"now","parameters":{"properties":{},"type":"object"}},"type":"function"}]}"#);
        let perplexity = sent("perplexity");
        assert_eq!(perplexity.left_out, ["seed", "tool_choice"]);
        insta::assert_snapshot!(perplexity.body, @r#"{"max_tokens":5000,"messages":[{"content":"Let me look.","role":"assistant","tool_calls":[{"function":{"arguments":"{\"city\":\"Paris\"}","name":"get_weather"},"id":"c1","type":"function"},{"function":{"arguments":"{\"city\":\"Rome\"}","name":"get_weather"},"id":"c2","type":"function"}]}],"model":"the-model","temperature":0.1,"tools":[{"function":{"description":"now","name":"now","parameters":{"properties":{},"type":"object"}},"type":"function"}]}"#);
    }

    #[test]
    fn one_value_of_a_parameter_may_be_refused() {
        let mut spec = spec("litellm_groq/x", "hi");
        let mut left_out = |effort| {
            spec.sampling.controls.reasoning_effort = Some(effort);
            encoded("groq", &spec, Streaming::Off).left_out
        };
        assert!(left_out(ReasoningEffort::Low).is_empty());
        assert_eq!(left_out(ReasoningEffort::Minimal), ["reasoning_effort"]);
    }
}
