//! What a sick model does to the engine: it harms the requests it touches and no others.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::backend::Batch;
use crate::decoder::{Forward, Room};
use crate::model::{LoadOptions, ModelPaths};

/// Prefers token 10, except after token 56 ("X"), where it is ill.
struct Sick {
    illness: Illness,
    logits: Vec<f32>,
    fault: Option<String>,
}

#[derive(Clone, Copy)]
enum Illness {
    Nan,
    Panic,
    /// The device has failed, and whatever is read from it is no number.
    Fault,
}

const VOCABULARY: usize = 640;

impl Forward for Sick {
    fn reserve(&mut self, _: Room) {}

    fn forward(&mut self, batch: &Batch) -> &[f32] {
        self.logits = vec![0.0; batch.outputs.len() * VOCABULARY];
        for (logits, row) in self.logits.chunks_mut(VOCABULARY).zip(&batch.outputs) {
            logits[10] = 1.0;
            if batch.ids[*row as usize] == 56 {
                match self.illness {
                    Illness::Nan => logits[333] = f32::NAN,
                    Illness::Panic => panic!("a kernel failed"),
                    Illness::Fault => self.fault = Some("the device fell off the bus".to_owned()),
                }
            }
        }
        if self.fault.is_some() {
            self.logits.fill(f32::NAN);
        }
        &self.logits
    }

    fn fault(&self) -> Option<String> {
        self.fault.clone()
    }

    fn vocabulary(&self) -> usize {
        VOCABULARY
    }
}

fn engine(illness: Illness) -> Engine {
    let model_path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2");
    let paths = ModelPaths { model_path, tokenizer_path: None };
    let model = Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap();
    let sick = Box::new(Sick { illness, logits: Vec::new(), fault: None });
    Engine::start(model.with_forward(sick), EngineOptions::default()).unwrap()
}

fn submit(engine: &Engine, prompt: &str) -> Receiver<Event> {
    let (sender, events) = channel();
    let request = Request::greedy(Prompt::Text(prompt.to_owned()), 100);
    engine.submit(request, Box::new(move |event| drop(sender.send(event)))).unwrap();
    events
}

fn last(events: &Receiver<Event>) -> Event {
    events.iter().last().unwrap()
}

#[test]
fn a_nan_fails_its_own_request_alone() {
    let engine = engine(Illness::Nan);
    let (well, ill) = (submit(&engine, "O"), submit(&engine, "X"));
    match last(&ill) {
        Event::Failed(RequestError::NotFinite { position: 1, source }) => {
            assert_eq!(source.token, 333);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(last(&well), Event::Finished(done) if done.completion_tokens == 100));
    assert_eq!(engine.free().kv_tokens, EngineOptions::default().kv_tokens);
}

#[test]
fn a_panic_in_a_step_fails_the_sequence_that_causes_it_alone() {
    let engine = engine(Illness::Panic);
    // The ill one comes in while the others run, and does not disturb their steps or their texts.
    let expected = match last(&submit(&engine, "O")) {
        Event::Finished(done) => done.text,
        other => panic!("{other:?}"),
    };
    let well: Vec<_> = (0..5).map(|_| submit(&engine, "O")).collect();
    for _ in 0..3 {
        match last(&submit(&engine, "X")) {
            Event::Failed(RequestError::Step { message }) => assert_eq!(message, "a kernel failed"),
            other => panic!("{other:?}"),
        }
    }
    for events in well {
        match last(&events) {
            Event::Finished(done) => assert_eq!((done.completion_tokens, &done.text), (100, &expected)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(engine.free().kv_tokens, EngineOptions::default().kv_tokens);
}

/// A request in whose first event the engine waits until the sender is dropped, so that all that is submitted meanwhile
/// comes into one step.
fn held(engine: &Engine) -> (Sender<()>, Receiver<Event>) {
    let (hold, held) = channel::<()>();
    let (sender, first) = channel();
    let request = Request::greedy(Prompt::Text("O".to_owned()), 1);
    let mut held = Some(held);
    let sink = move |event| {
        if let Some(held) = held.take() {
            held.recv().unwrap_err();
        }
        drop(sender.send(event));
    };
    engine.submit(request, Box::new(sink)).unwrap();
    (hold, first)
}

/// Nobody's request is at fault, so others may do them all; the engine ends, so that its worker does.
#[test]
fn a_device_that_fails_hands_every_request_back_and_ends_the_engine() {
    let engine = engine(Illness::Fault);
    let (hold, first) = held(&engine);
    let all: Vec<_> = ["O", "O", "X", "O"].map(|prompt| submit(&engine, prompt)).into();
    drop(hold);
    assert!(matches!(last(&first), Event::Finished(_)));
    for events in all {
        assert!(matches!(last(&events), Event::Finished(done) if done.reason == FinishReason::Cancelled));
    }
    let ended = (0..1000).any(|_| {
        std::thread::park_timeout(Duration::from_millis(5));
        engine.has_ended()
    });
    assert!(ended);
    let refused = engine.submit(Request::greedy(Prompt::Text("O".to_owned()), 1), Box::new(drop));
    assert!(matches!(refused, Err(SubmitError::Stopped)));
}

#[test]
fn ill_and_well_sequences_of_one_step_are_told_apart() {
    let engine = engine(Illness::Panic);
    let (hold, first) = held(&engine);
    let rest: Vec<_> = ["O", "X", "O", "X", "O"].map(|prompt| (prompt, submit(&engine, prompt))).into();
    drop(hold);
    assert!(matches!(last(&first), Event::Finished(_)));
    for (prompt, events) in rest {
        match (prompt, last(&events)) {
            ("O", Event::Finished(done)) => assert_eq!(done.completion_tokens, 100),
            ("X", Event::Failed(RequestError::Step { .. })) => {}
            (_, other) => panic!("{prompt}: {other:?}"),
        }
    }
    assert_eq!(engine.free().kv_tokens, EngineOptions::default().kv_tokens);
}
