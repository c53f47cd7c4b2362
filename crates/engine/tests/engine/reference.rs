//! Every fixture's texts and rendered chats, as transformers gave them.

use genmill_engine::{ChatMessage, FinishReason};
use serde_json::Value;

use crate::{engine, fixture, greedy, submit};

const FIXTURES: &[&str] =
    &["gemma2", "gpt2", "gpt2-odd", "llama2", "llama3", "mistral", "mixtral", "qwen2", "qwen2-untied", "qwen3"];

fn reference(name: &str) -> Value {
    let bytes = std::fs::read(fixture(name).join("reference.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn greedy_texts_are_those_of_transformers() {
    for name in FIXTURES {
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
    let reference = &reference("qwen2")["chat"];
    let messages: Vec<ChatMessage> = reference["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| ChatMessage::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap()))
        .collect();
    let engine = engine("qwen2", 64);
    let rendered = engine.card().render_chat(&messages, &[], 0).unwrap();
    assert_eq!(rendered, reference["rendered"].as_str().unwrap());
}
