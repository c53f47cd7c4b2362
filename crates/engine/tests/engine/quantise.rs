//! Float checkpoints brought to q8_0 while they are loaded.

use genmill_engine::quantized::Format;
use genmill_engine::{Engine, EngineOptions, Footprint, LoadOptions, Model, ModelPaths, Request};

use crate::{fixture, fixtures, greedy, load, submit};

fn quantised(name: &str) -> Model {
    let paths = ModelPaths { model_path: fixture(name), tokenizer_path: None };
    Model::load(&paths, &LoadOptions { threads: 2, quantize: Some(Format::Q8_0) }).unwrap()
}

fn start(model: Model) -> Engine {
    let options =
        EngineOptions { kv_tokens: 8192, max_sequences: 32, step_tokens: 64, max_waiting: 64, ..Default::default() };
    Engine::start(model, options).unwrap()
}

/// Log probabilities of all tokens of a text, given those before.
fn scores(engine: &Engine, text: &str) -> Vec<(u32, f32)> {
    let request = Request { prompt_logprobs: Some(0), ..greedy(text, 1) };
    let scored = submit(engine, request).unwrap().completion().prompt_logprobs;
    scored.iter().map(|scored| (scored.token, scored.logprob)).collect()
}

#[test]
fn it_is_the_model_of_the_q8_0_file() {
    let (ours, file) = (start(quantised("qwen2")), start(load(&fixture("..").join("gguf/qwen2-q8_0.gguf"))));
    for prompt in ["The scheduler hands each job", "1 + 1 =", "a"] {
        let request = || Request { logprobs: Some(3), temperature: 1.0, seed: 7, ..greedy(prompt, 24) };
        let [ours, file] = [&ours, &file].map(|engine| submit(engine, request()).unwrap().completion());
        assert_eq!(ours.logprobs, file.logprobs);
    }
}

#[test]
fn every_family_stays_near_its_float_weights() {
    for name in &fixtures() {
        let (near, exact) = (start(quantised(name)), start(load(&fixture(name))));
        let prompt = "The scheduler hands each job";
        let text = format!("{prompt}{}", submit(&exact, greedy(prompt, 24)).unwrap().completion().text);
        let (near, exact) = (scores(&near, &text), scores(&exact, &text));
        assert_eq!(near.len(), exact.len());
        // Those have no rows of whole blocks.
        assert_eq!(near == exact, ["gpt2-odd", "phi3-long", "qwen2-untied"].contains(&&**name), "{name}");
        let off = near.iter().zip(&exact).map(|(near, exact)| f64::from((near.1 - exact.1).abs()));
        let mean = off.sum::<f64>() / near.len() as f64;
        assert!(mean < 0.1, "{name}: {mean}");
    }
}

#[test]
fn the_fingerprint_tells_it() {
    let (near, exact) = (quantised("qwen2"), load(&fixture("qwen2")));
    let (near, exact) = (near.card().fingerprint(), exact.card().fingerprint());
    assert_eq!((near.dtype, exact.dtype), ("q8_0", "float32"));
    assert_eq!(near.model, exact.model);
}

#[test]
fn it_takes_less_memory_and_says_so_before() {
    let bytes = |quantize| {
        let options = LoadOptions { threads: 1, quantize };
        Footprint::read(&fixture("llama3"), &options).unwrap().weights_bytes
    };
    assert!(bytes(Some(Format::Q8_0)) * 3 < bytes(None));
}
