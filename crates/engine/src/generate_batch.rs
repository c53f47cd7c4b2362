//! transformers' `generate_batch` on the weights of a folder, in a Python of its own: what an engine is measured beside.
//!
//! Never here: an engine of ours. The script (`generate_batch.py`) is part of the program.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    /// A model.
    pub(crate) folder: &'a Path,
    /// The number of the GPU, as `CUDA_VISIBLE_DEVICES` counts them; without one it is the processor.
    pub(crate) device: usize,
    /// The prompts of each run. The first one only warms up.
    pub(crate) runs: &'a [Vec<Vec<u32>>],
    /// Tokens of each output.
    pub(crate) output_tokens: usize,
}

/// What was found.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    /// Versions and device.
    pub(crate) setting: String,
    /// Output tokens per second, the median of the runs.
    pub(crate) tokens_per_s: f64,
}

/// Measures, or tells in a line why there is nothing to measure.
pub(crate) fn measure(python: &str, job: &Job<'_>) -> Result<Measured, String> {
    let text = json!({
        "folder": job.folder, "device": job.device, "output_tokens": job.output_tokens, "runs": job.runs,
    });
    let mut command = Command::new(python);
    command.args(["-c", include_str!("generate_batch.py")]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().map_err(|error| format!("{python} cannot be started: {error}"))?;
    if let Some(mut stdin) = process.stdin.take() {
        // A Python that ended before it read all says why.
        drop(stdin.write_all(text.to_string().as_bytes()));
    }
    let output = process.wait_with_output().map_err(|error| format!("{python} failed: {error}"))?;
    let last = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().last().unwrap_or_default().to_owned();
    let found: Value = serde_json::from_str(&last(&output.stdout))
        .map_err(|_| format!("it ended with {}: {}", output.status, last(&output.stderr)))?;
    read(&found, job)
}

/// What the script says.
fn read(found: &Value, job: &Job<'_>) -> Result<Measured, String> {
    if let Some(missing) = found.get("missing").and_then(Value::as_str) {
        return Err(missing.to_owned());
    }
    let numbers = |name: &str| -> Vec<f64> {
        let numbers = found.get(name).and_then(Value::as_array).into_iter().flatten();
        numbers.filter_map(Value::as_f64).collect()
    };
    let (seconds, tokens) = (numbers("seconds"), numbers("output_tokens"));
    let expected = job.runs.iter().skip(1).map(|prompts| (prompts.len() * job.output_tokens) as f64);
    if seconds.is_empty() || !expected.eq(tokens.iter().copied()) {
        return Err(format!("it made {tokens:?} tokens in {seconds:?} s, which is not what it was asked for"));
    }
    let text = |name: &str| found.get(name).and_then(Value::as_str).unwrap_or("?");
    let [version, torch, device, attention] = ["version", "torch", "device", "attention"].map(text);
    let mut rates: Vec<f64> = tokens.iter().zip(seconds).map(|(tokens, seconds)| tokens / seconds).collect();
    Ok(Measured {
        setting: format!("transformers {version}, torch {torch}, {attention} on {device}"),
        tokens_per_s: median(&mut rates),
    })
}

/// The one in the middle, or the upper one of two; 0 of none.
pub(crate) fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::made_up::{Folder, tests as made_up};

    fn nowhere() -> Job<'static> {
        Job { folder: Path::new(""), device: 0, runs: &[], output_tokens: 2 }
    }

    #[test]
    fn transformers_makes_tokens_of_made_up_weights() {
        let parent = tempfile::tempdir().unwrap();
        for (name, config) in [("qwen2", made_up::QWEN2), ("gpt2", made_up::GPT2)] {
            let folder = Folder::write(parent.path(), name, config).unwrap();
            let prompts = |run: u32| (0..3).map(|index| vec![run, index, 7, 8]).collect::<Vec<_>>();
            let runs: Vec<_> = (0..3).map(prompts).collect();
            match measure("python3", &Job { folder: folder.path(), runs: &runs, output_tokens: 6, ..nowhere() }) {
                Ok(measured) => {
                    println!("{name}: {measured:?}");
                    assert!(measured.tokens_per_s > 0.0 && measured.setting.starts_with("transformers "));
                }
                Err(missing) if missing.contains("No module named") || missing.contains("cannot be started") => {
                    println!("skipped: {missing}");
                }
                Err(wrong) => panic!("{name}: {wrong}"),
            }
        }
    }

    #[test]
    fn what_is_missing_is_said_in_a_line() {
        let error = measure("no-such-python", &nowhere()).unwrap_err();
        assert!(error.starts_with("no-such-python cannot be started: "), "{error}");
        assert_eq!(
            read(&json!({"missing": "No module named 'torch'"}), &nowhere()).unwrap_err(),
            "No module named 'torch'"
        );
        // Something that is no Python: it ends, and says nothing that could be read.
        let error = measure("false", &nowhere()).unwrap_err();
        assert!(error.starts_with("it ended with exit status: 1"), "{error}");
    }

    #[test]
    fn the_median_counts_and_every_token_must_be_there() {
        let runs = vec![vec![vec![1], vec![2]]; 4];
        let job = Job { runs: &runs, ..nowhere() };
        let found = |tokens: [u32; 3]| read(&json!({"seconds": [1.0, 4.0, 2.0], "output_tokens": tokens}), &job);
        assert!((found([4, 4, 4]).unwrap().tokens_per_s - 2.0).abs() < 1e-9);
        assert!(found([4, 3, 4]).unwrap_err().contains("[4.0, 3.0, 4.0] tokens"));
        assert!(read(&json!({}), &job).is_err());
    }
}
