//! Every fixture's texts and rendered chats, as transformers gave them.

use genmill_engine::text::Special;
use genmill_engine::{ChatMessage, FinishReason};
use serde_json::Value;

use crate::broken::copy;
use crate::{engine, fixture, fixtures, greedy, load, submit};

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

/// GPT-2's own files instead of a tokenizer.json: the same tokens and texts.
#[test]
fn a_tokenizer_in_two_files_is_the_same() {
    let folder = copy("gpt2");
    let path = folder.path().join("tokenizer.json");
    let tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::remove_file(path).unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    write("vocab.json", tokenizer["model"]["vocab"].to_string());
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge.as_array() {
        Some(pair) => format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        None => format!("{}\n", merge.as_str().unwrap()),
    });
    write("merges.txt", format!("#version: 0.2\n{}", merges.collect::<String>()));
    let (model, whole) = (load(folder.path()), load(&fixture("gpt2")));
    let prompts = reference("gpt2")["cases"].as_array().unwrap().clone();
    for case in prompts.iter().map(|case| case["prompt"].as_str().unwrap()).chain(["one<|endoftext|>two"]) {
        let [ids, expected] = [&model, &whole].map(|model| model.card().encode(case, Special::Add).unwrap());
        assert_eq!(ids, expected);
        let texts = [&model, &whole].map(|model| {
            let mut stream = model.card().stream();
            let text: String = ids.iter().map(|id| stream.push(*id)).collect();
            text + &stream.finish()
        });
        assert_eq!(texts[0], texts[1]);
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
