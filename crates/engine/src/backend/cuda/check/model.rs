//! A whole model: its logits are near those of transformers, and do not depend on chunks or neighbours.

use std::path::Path;

use serde_json::Value;

use crate::backend::Batch;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::check::{Wrong, same};
use crate::backend::cuda::device::{Device, Dtype};
use crate::backend::cuda::launch::HEAD_WIDTHS;
use crate::config::Config;
use crate::decoder::{Decoder, Forward as _, Room};
use crate::weights::Weights;

/// How far logits may be from those in float32, as a part of their spread.
const fn most_apart(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::Bf16 => 0.15,
        Dtype::F16 => 0.02,
    }
}

/// A prompt and the logits after it.
struct Case {
    ids: Vec<u32>,
    logits: Vec<f32>,
}

/// Blocks in no particular order.
fn table(first: u32) -> Vec<u32> {
    (0..12).map(|index| first + (index * 7) % 12).collect()
}

fn wrong(folder: &Path, what: impl std::fmt::Display) -> Wrong {
    Wrong::Differs(format!("{}: {what}", folder.display()))
}

fn cases(folder: &Path) -> Result<Vec<Case>, Wrong> {
    let text = std::fs::read(folder.join("reference.json")).map_err(|error| wrong(folder, error))?;
    let reference: Value = serde_json::from_slice(&text).map_err(|error| wrong(folder, error))?;
    let numbers = |case: &Value, field: &str| -> Option<Vec<f64>> {
        case.get(field)?.as_array()?.iter().map(Value::as_f64).collect()
    };
    let case = |case: &Value| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "written from such numbers")]
        Some(Case {
            ids: numbers(case, "input_ids")?.into_iter().map(|id| id as u32).collect(),
            logits: numbers(case, "next_logits")?.into_iter().map(|logit| logit as f32).collect(),
        })
    };
    let cases = reference.get("cases").and_then(Value::as_array).and_then(|all| all.iter().map(case).collect());
    cases.ok_or_else(|| wrong(folder, "reference.json has no cases"))
}

/// The logits after the last of `ids`, computed in chunks of that size.
fn logits<D: Device>(decoder: &mut Decoder<Cuda<D>>, ids: &[u32], chunk: usize) -> Vec<f32> {
    let mut batch = Batch::default();
    let (mut start, mut last) = (0, Vec::new());
    for part in ids.chunks(chunk) {
        batch.clear();
        batch.push(part, start, ids.len(), &table(3));
        batch.want_logits();
        start += part.len();
        last = decoder.forward(&batch).to_vec();
    }
    last
}

/// How far apart logits are, as a part of their spread.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "vocabularies are exact in float32")]
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let spread: f32 = expected.iter().map(|x| (x - mean).powi(2)).sum();
    let error: f32 = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    (error / spread).sqrt()
}

/// Checks a fixture: a folder with a model and what transformers makes of it. How far its logits are from those, or
/// None where there are no kernels for its heads.
pub(crate) fn fixture<D: Device + Clone>(device: &D, folder: &Path, dtype: Dtype) -> Result<Option<f32>, Wrong> {
    let config = Config::read(folder).map_err(|error| wrong(folder, error))?;
    if !HEAD_WIDTHS.contains(&config.head_dim) {
        return Ok(None);
    }
    let cases = cases(folder)?;
    let mut weights = Weights::open(folder).map_err(|error| wrong(folder, error))?;
    let decoder = Decoder::load(Cuda::new(device.clone(), dtype), config, &mut weights);
    let mut decoder = decoder.map_err(|error| wrong(folder, error))?;
    decoder.reserve(Room { rows: 256, outputs: 8, blocks: 40, tokens: 640 });
    let each: Vec<Vec<f32>> = cases.iter().map(|case| logits(&mut decoder, &case.ids, 128)).collect();
    let worst = each.iter().zip(&cases).map(|(found, case)| apart(found, &case.logits)).fold(0.0, f32::max);
    // A NaN is not within.
    let within = worst <= most_apart(dtype) && each.iter().flatten().all(|logit| logit.is_finite());
    if !within {
        return Err(wrong(folder, format_args!("logits are {worst} apart from those of transformers")));
    }
    if dtype == Dtype::F16 {
        // The kernels differ in how they round, and in nothing that the other type would not show.
        return Ok(Some(worst));
    }
    // Tokens one by one are decode's, those of a chunk prefill's. The last case is the longest.
    let short = cases.iter().zip(&each).take(2).map(|case| (case, 1));
    let long = cases.iter().zip(&each).next_back().into_iter().flat_map(|case| [(case, 6), (case, 17)]);
    for ((case, whole), chunk) in short.chain(long) {
        same("logits in chunks", &logits(&mut decoder, &case.ids, chunk), whole, (0.0, 0.0))?;
    }
    let mut batch = Batch::default();
    for (index, case) in (0..).zip(cases.iter().rev().take(3)) {
        batch.push(&case.ids, 0, case.ids.len(), &table(index * 12));
        batch.want_logits();
    }
    let vocabulary = decoder.vocabulary();
    for (together, alone) in decoder.forward(&batch).chunks(vocabulary).zip(each.iter().rev()) {
        same("logits among others", together, alone, (0.0, 0.0))?;
    }
    Ok(Some(worst))
}
