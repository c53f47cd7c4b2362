//! Random schedules of a whole engine: requests come in bursts, some are cancelled, and every text that is finished is
//! the one that the request has alone.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::backend::cuda::Cuda;
use crate::backend::cuda::check::{Dice, Wrong};
use crate::backend::cuda::device::{Device, Dtype};
use crate::backend::cuda::launch::HEAD_WIDTHS;
use crate::config::Config;
use crate::{Engine, EngineOptions, Event, FinishReason, Form, Model, ModelPaths, Prompt, Request, RequestId, Shaping};

/// Requests of a model.
pub(crate) const REQUESTS: usize = 8;

/// How long a request may take.
const WITHIN: Duration = Duration::from_secs(120);

/// Some share beginnings, so that blocks are shared; temperatures and lengths differ. One needs the host between two steps: a
/// form. Some are penalised or hold ends off, and some end by a stop string, which the host finds when another step has begun.
pub(crate) fn request(index: usize) -> Request {
    let beginning = ["Money: $0.16 per hour, 75% of the budget is spent.", "def add(a, b): return a + b"][index % 2];
    let text = beginning.chars().cycle().take(9 + index * 23 % 90).collect();
    Request {
        temperature: [0.0, 0.9, 1.4][index % 3],
        top_p: [1.0, 0.9][index % 2],
        top_k: [0, 20][index / 2 % 2],
        seed: index as u64,
        shaping: Shaping {
            frequency_penalty: if index == 2 { 0.5 } else { 0.0 },
            min_tokens: if index == 3 { 4 } else { 0 },
            logit_bias: if index == 4 { (5..90).map(|token| (token, 3.0)).collect() } else { BTreeMap::new() },
            ..Shaping::default()
        },
        form: (index == 5).then(|| Form::Regex("[a-z ]{2,12}".to_owned())),
        stop: if index.is_multiple_of(2) { ["e", "0", " "].map(str::to_owned).to_vec() } else { Vec::new() },
        logprobs: (index == 6).then_some(2),
        prompt_logprobs: (index == 7).then_some(1),
        ..Request::greedy(Prompt::Text(text), 3 + index * 5 % 14)
    }
}

fn wrong(what: impl std::fmt::Display) -> Wrong {
    Wrong::Differs(what.to_string())
}

fn submit(engine: &Engine, index: usize) -> Result<(RequestId, Receiver<Event>), Wrong> {
    let (sender, events) = channel();
    // Whoever has seen enough may be gone.
    let id = engine.submit(request(index), Box::new(move |event| drop(sender.send(event)))).map_err(wrong)?;
    Ok((id, events))
}

/// The text of a request and why it ended.
fn end(events: &Receiver<Event>) -> Result<(String, FinishReason), Wrong> {
    loop {
        match events.recv_timeout(WITHIN).map_err(wrong)? {
            Event::Finished(completion) => return Ok((completion.text, completion.reason)),
            Event::Failed(error) => return Err(wrong(error)),
            Event::Started | Event::Text { .. } => {}
        }
    }
}

/// Runs so many schedules of a fixture's model.
pub(crate) fn schedules<D: Device + Clone>(
    device: &D,
    folder: &Path,
    count: usize,
    dice: &mut Dice,
) -> Result<(), Wrong> {
    if !HEAD_WIDTHS.contains(&Config::read(folder).map_err(wrong)?.head_dim) {
        return Ok(());
    }
    let paths = ModelPaths { model_path: folder.to_owned(), tokenizer_path: None };
    let backend = || Cuda::new(device.clone(), Dtype::Bf16);
    let start = |step_tokens, backend: Cuda<D>| {
        let model = Model::on(&paths, ("bfloat16", None), || Ok(backend)).map_err(wrong)?;
        // So few blocks that those that are kept have to go now and then.
        let options = EngineOptions { kv_tokens: 768, max_sequences: 5, step_tokens, ..EngineOptions::default() };
        Engine::start(model, options).map_err(wrong)
    };
    let engine = start(256, backend())?;
    let mut alone = Vec::new();
    for index in 0..REQUESTS {
        alone.push(end(&submit(&engine, index)?.1)?);
    }
    // Among others steps are filled up, recorded and repeated; alone they are not.
    let engine = start(dice.one(&[16, 23, 48, 100]), backend().with_graphs())?;
    for schedule in 0..count {
        let burst: Vec<usize> = (0..dice.of(2..9)).map(|_| dice.of(0..REQUESTS)).collect();
        let mut open = Vec::new();
        for index in burst {
            let (id, events) = submit(&engine, index)?;
            // Some are cancelled at once, some while they run.
            let cancelled = dice.of(0..5) == 0;
            if cancelled && dice.chance() {
                drop(events.recv_timeout(WITHIN));
            }
            if cancelled {
                engine.cancel(id);
            }
            open.push((index, events));
        }
        for (index, events) in open {
            let (text, reason) = end(&events)?;
            let (expected, expected_reason) = &alone[index];
            let is_same = match reason {
                FinishReason::Cancelled => expected.starts_with(&text),
                _ => text == *expected && reason == *expected_reason,
            };
            if !is_same {
                return Err(wrong(format_args!(
                    "{}, schedule {schedule}, request {index}: {text:?} ({reason:?}), alone {expected:?} ({expected_reason:?})",
                    folder.display()
                )));
            }
        }
    }
    Ok(())
}
