//! Every fixture's texts and rendered chats, as transformers gave them.

use genmill_engine::{ChatMessage, FinishReason};
use serde_json::Value;

use crate::{engine, fixture, fixtures, greedy, submit};

fn reference(name: &str) -> Value {
    let bytes = std::fs::read(fixture(name).join("reference.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn greedy_texts_are_those_of_transformers() {
    for name in &fixtures() {
        let engine = engine(name, 64);
        for case in reference(name)["cases"].as_array().unwrap() {
            let request = greedy(case["prompt"].as_str().unwrap(), 24);
            let completion = submit(&engine, request).unwrap().completion();
            assert_eq!(completion.text, case["greedy_text"].as_str().unwrap(), "{name}");
            let ids = case["greedy_ids"].as_array().unwrap();
            assert_eq!(completion.completion_tokens, ids.len());
            assert_eq!(completion.prompt_tokens, case["input_ids"].as_array().unwrap().len());
            let full = completion.completion_tokens == 24;
            assert_eq!(completion.reason == FinishReason::Length, full);
        }
    }
}

#[test]
fn chats_are_rendered_as_transformers_renders_them() {
    let mut rendered = 0;
    for name in &fixtures() {
        let reference = &reference(name)["chat"];
        let Some(messages) = reference["messages"].as_array() else { continue };
        let messages: Vec<ChatMessage> = messages
            .iter()
            .map(|message| ChatMessage::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap()))
            .collect();
        let engine = engine(name, 64);
        let text = engine.card().render_chat(&messages, &[], 0).unwrap();
        assert_eq!(text, reference["rendered"].as_str().unwrap(), "{name}");
        rendered += 1;
    }
    assert_eq!(rendered, 7);
}
