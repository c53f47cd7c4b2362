//! The whole backend on the kernels compiled for the host: every fixture's logits, and the promise that they do not
//! depend on chunks or neighbours.

use std::path::PathBuf;
use std::sync::mpsc::channel;

use super::*;
use crate::backend::cuda::check::Dice;
use crate::backend::cuda::check::schedules::{REQUESTS, request};
use crate::backend::cuda::emulator::Emulator;
use crate::decoder::tests::fixtures;
use crate::decoder::{Decoder, Forward as _, Room};
use crate::shape::Shaper;
use crate::weights::Weights;
use crate::{Completion, Engine, EngineOptions, Event, FinishReason, Model, ModelPaths, Request, Shaping, StartError};

/// Every fixture on a device of this type.
fn check_fixtures(dtype: Dtype) {
    let Some(device) = Emulator::start() else { return };
    let mut done = 0;
    for folder in fixtures() {
        match check::model::fixture(&device, &folder, dtype) {
            Ok(Some(apart)) => {
                println!("{}: {apart}", folder.display());
                done += 1;
            }
            Ok(None) => println!("{}: heads of a width that there is no kernel for", folder.display()),
            Err(wrong) => panic!("{}: {wrong}", folder.display()),
        }
    }
    assert!(done >= 15, "{done}");
}

#[test]
fn bfloat16_is_near_transformers_and_does_not_depend_on_chunks_or_neighbours() {
    check_fixtures(Dtype::Bf16);
}

#[test]
fn float16_is_near_transformers() {
    check_fixtures(Dtype::F16);
}

#[test]
fn random_schedules_with_cancellations_change_no_text() {
    let Some(device) = Emulator::start() else { return };
    for name in ["gpt2", "mistral"] {
        let folder = fixtures().into_iter().find(|folder| folder.ends_with(name)).unwrap();
        let mut dice = Dice::new(11);
        if let Err(wrong) = check::schedules::schedules(&device, &folder, 6, &mut dice) {
            panic!("{name}: {wrong}");
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    fixtures().into_iter().find(|folder| folder.ends_with(name)).unwrap()
}

fn start(device: &Emulator, name: &str, options: EngineOptions) -> Result<Engine, StartError> {
    let paths = ModelPaths { model_path: fixture(name), tokenizer_path: None };
    let model = Model::on(&paths, ("bfloat16", None), || Ok(Cuda::new(device.clone(), Dtype::Bf16))).unwrap();
    Engine::start_after_dry_run(model, options)
}

fn run(engine: &Engine, request: Request) -> Completion {
    let (sender, events) = channel();
    engine.submit(request, Box::new(move |event| drop(sender.send(event)))).unwrap();
    match events.iter().last() {
        Some(Event::Finished(done)) => done,
        other => panic!("{other:?}"),
    }
}

/// The tokens that follow a prompt, each computed and drawn by itself: logits on the host, shaped as for the CPU, and the
/// sampler's twin.
fn one_by_one(decoder: &mut Decoder<Cuda<Emulator>>, (prompt, ends): (&[u32], &[u32]), request: &Request) -> Vec<u32> {
    let mut shaper = Shaper::new(request.shaping.clone(), ends.to_vec(), prompt);
    let (mut ids, table, mut start) = (prompt.to_vec(), (0..20).collect::<Vec<u32>>(), 0);
    while ids.len() < prompt.len() + request.max_tokens
        && !(ids.len() > prompt.len() && ends.contains(&ids[ids.len() - 1]))
    {
        let mut batch = Batch::default();
        batch.push(&ids[start..], start, ids.len(), &table);
        batch.want_logits();
        start = ids.len();
        let mut logits = decoder.forward(&batch).to_vec();
        shaper.apply(&mut logits);
        let sampling = crate::sampler::Sampling {
            temperature: request.temperature,
            top_k: request.top_k,
            top_p: request.top_p,
            min_p: request.min_p,
            seed: request.seed,
            sample: 0,
        };
        let position = u32::try_from(ids.len()).unwrap();
        let ask = Ask { sampling, position, known: None, ..Ask::nothing() };
        let token = twin::choose(&sampling::sampled(&[ask], 1, 1)[0].rows[0], &logits);
        ids.push(token);
        shaper.count(token);
    }
    ids.split_off(prompt.len())
}

#[test]
fn an_engines_tokens_are_those_of_each_step_by_itself() {
    let Some(device) = Emulator::start() else { return };
    let engine = start(&device, "gpt2", EngineOptions { kv_tokens: 4096, ..EngineOptions::default() }).unwrap();
    let folder = fixture("gpt2");
    let config = crate::config::Config::read(&folder).unwrap();
    let mut weights = Weights::open(&folder).unwrap();
    let mut decoder = Decoder::load(Cuda::new(device, Dtype::Bf16), config, &mut weights).unwrap();
    decoder.reserve(Room { rows: 256, outputs: 1, blocks: 40, tokens: 640 });
    let mut ended_early = 0;
    for index in 0..REQUESTS {
        // What the grammar allows and what a text stops at is not known here.
        let request = Request { form: None, stop: Vec::new(), logprobs: Some(2), max_tokens: 24, ..request(index) };
        let prompt = engine.card().prompt_tokens(&request.prompt, &[], 0).unwrap();
        let ends = engine.card().end_tokens(&request.prompt);
        let expected = one_by_one(&mut decoder, (&prompt, &ends), &request);
        let done = run(&engine, request);
        let tokens: Vec<u32> = done.logprobs.iter().map(|scored| scored.token).collect();
        assert_eq!(tokens, expected, "request {index}");
        assert_eq!(done.reason == FinishReason::Stop, tokens.last().is_some_and(|token| ends.contains(token)));
        ended_early += usize::from(tokens.len() < 24);
    }
    println!("{ended_early} of {REQUESTS} came to an end token");
}

/// A step begins before the tokens of the one before are known, and they count in it all the same.
#[test]
fn a_token_on_its_way_is_penalised_and_counts_for_ends_held_off() {
    let Some(device) = Emulator::start() else { return };
    let engine = start(&device, "gpt2", EngineOptions { kv_tokens: 4096, ..EngineOptions::default() }).unwrap();
    let tokens = |shaping: Shaping, ignore_end| {
        let greedy = Request::greedy(request(0).prompt, 7);
        let done = run(&engine, Request { shaping, ignore_end, logprobs: Some(1), ..greedy });
        done.logprobs.iter().map(|scored| scored.token).collect::<Vec<_>>()
    };
    // Nothing else would come, if it did not count that each has come.
    let best = [40, 17, 300];
    for penalty in [
        Shaping { frequency_penalty: 1e4, ..Shaping::default() },
        Shaping { presence_penalty: 1e4, ..Shaping::default() },
    ] {
        let logit_bias = best.into_iter().zip([90.0, 60.0, 30.0]).collect();
        let mut chosen = tokens(Shaping { logit_bias, ..penalty }, true);
        assert_eq!(chosen[..3], best);
        chosen.sort_unstable();
        chosen.dedup();
        assert_eq!(chosen.len(), 7);
    }
    let end = engine.card().end_tokens(&request(0).prompt)[0];
    for min_tokens in [0, 1, 2, 5] {
        let logit_bias = [(end, 90.0)].into();
        let chosen = tokens(Shaping { logit_bias, min_tokens, ..Shaping::default() }, false);
        assert_eq!(chosen.iter().position(|token| *token == end), Some(min_tokens), "{chosen:?}");
    }
}

/// Steps of a device, with what it records, are those without; it records so many.
fn check_recorded(device: Emulator, expected_graphs: usize) {
    let load = |backend| {
        let folder = fixture("qwen2");
        let config = crate::config::Config::read(&folder).unwrap();
        let mut decoder = Decoder::load(backend, config, &mut Weights::open(&folder).unwrap()).unwrap();
        decoder.reserve(Room { rows: 64, outputs: 4, blocks: 100, tokens: 600 });
        decoder
    };
    let mut plain = load(Cuda::new(device.clone(), Dtype::Bf16));
    let mut recorded = load(Cuda::new(device, Dtype::Bf16).with_graphs());
    let tables: Vec<Vec<u32>> = (0..3).map(|sequence| (0..33).map(|block| 33 * sequence + block).collect()).collect();
    let (mut batch, mut dice) = (Batch::default(), Dice::new(3));
    for decoder in [&mut plain, &mut recorded] {
        for table in &tables {
            let ids: Vec<u32> = (0..262).collect();
            for (number, part) in ids.chunks(50).enumerate() {
                let mut batch = Batch::default();
                batch.push(part, 50 * number, ids.len(), table);
                decoder.forward(&batch);
            }
        }
    }
    // From one chunk of attention to two, with other tokens in each step.
    for step in 250..262 {
        batch.clear();
        for (sequence, table) in tables.iter().take(1 + step % 3).enumerate() {
            let position = step - 3 * sequence;
            batch.push(&[u32::try_from(dice.of(0..600)).unwrap()], position, position + 1, table);
            batch.want_logits();
        }
        let expected = plain.forward(&batch);
        assert!(expected.iter().all(|logit| logit.is_finite()) && recorded.forward(&batch) == expected, "step {step}");
    }
    assert_eq!(recorded.backend().fault(), None);
    let graphs = recorded.backend().graphs.as_ref().unwrap().lock().unwrap();
    assert_eq!(graphs.count(), expected_graphs);
}

#[test]
fn a_recorded_step_is_the_step() {
    let Some(device) = Emulator::start() else { return };
    // Three numbers of sequences, with one chunk and with two.
    check_recorded(device, 6);
}

#[test]
fn what_cannot_be_recorded_is_computed() {
    let Some(device) = Emulator::start() else { return };
    check_recorded(device.that_does_not_record(), 0);
}

#[test]
fn the_cache_takes_what_the_largest_step_leaves_and_nothing_is_taken_later() {
    let capacity = 24 << 20;
    let Some(device) = Emulator::with_memory(capacity) else { return };
    let wanted = EngineOptions { kv_tokens: 1 << 24, max_sequences: 4, step_tokens: 64, ..EngineOptions::default() };
    let engine = start(&device, "mistral", wanted).unwrap();
    let (got, used) = (engine.options().kv_tokens, device.used_bytes());
    assert!(got > 1024 && got < wanted.kv_tokens, "{got}");
    assert!(used > capacity / 10 * 9 && used <= capacity, "{used}");
    for index in 0..REQUESTS {
        run(&engine, request(index));
    }
    assert_eq!(device.used_bytes(), used, "steps take no memory");
    drop(engine);
    assert_eq!(device.used_bytes(), 0);

    let Some(device) = Emulator::with_memory(1 << 20) else { return };
    match start(&device, "mistral", wanted) {
        Err(StartError::Device { message }) => assert!(message.contains("out of memory"), "{message}"),
        other => panic!("{other:?}"),
    }
}

/// Steps are on their way when it fails, and none of their tokens is taken.
#[test]
fn a_device_that_fails_while_steps_are_on_their_way_hands_all_back() {
    let Some(device) = Emulator::start() else { return };
    let engine = start(&device, "gpt2", EngineOptions { kv_tokens: 4096, ..EngineOptions::default() }).unwrap();
    let long = |seed| Request { seed, temperature: 1.0, ignore_end: true, ..Request::greedy(request(0).prompt, 200) };
    let open: Vec<_> = (0..3)
        .map(|seed| {
            let (sender, events) = channel();
            engine.submit(long(seed), Box::new(move |event| drop(sender.send(event)))).unwrap();
            events
        })
        .collect();
    let begun = open[0].iter().find(|event| matches!(event, Event::Text { .. }));
    assert!(begun.is_some());
    device.fail();
    for events in open {
        match events.iter().last() {
            Some(Event::Finished(done)) => assert_eq!(done.reason, FinishReason::Cancelled),
            other => panic!("{other:?}"),
        }
    }
    let ended = (0..1000).any(|_| {
        std::thread::park_timeout(std::time::Duration::from_millis(5));
        engine.has_ended()
    });
    assert!(ended);
}

#[test]
fn what_a_step_reads_is_counted_as_it_is_held() {
    let Some(device) = Emulator::start() else { return };
    let model_bytes = |format| {
        let config = crate::config::Config::read(&fixture("qwen2")).unwrap();
        let mut weights = Weights::open(&fixture("qwen2")).unwrap();
        weights.quantise(format);
        Decoder::load(Cuda::new(device.clone(), Dtype::Bf16), config, &mut weights).unwrap().cost().model_bytes()
    };
    let (values, _) = Weights::open(&fixture("qwen2")).unwrap().size();
    // Norms and biases are few; a block of 32 quants has a scale of four bytes.
    let near = |found: u64, expected: u64| assert!(found.abs_diff(expected) < expected / 50, "{found} {expected}");
    near(model_bytes(None), 2 * values);
    near(model_bytes(Some(Format::Q8_0)), values * 36 / 32);
}

#[test]
fn a_device_that_fails_gives_no_numbers() {
    let Some(device) = Emulator::start() else { return };
    let backend = Cuda::new(device, Dtype::Bf16);
    let mut buffer = backend.upload(vec![1.0, 2.0]);
    assert_eq!(backend.read(&mut buffer, 2), [1.0, 2.0]);
    let heads = Heads { queries: 1, keys: 1, width: 7, scale: 1.0, cap: None, window: None };
    drop(backend.cache(1, 1, &heads));
    assert!(backend.fault().unwrap().contains("heads of 7 values"));
    assert!(backend.read(&mut buffer, 2).iter().all(|value| value.is_nan()));
}
