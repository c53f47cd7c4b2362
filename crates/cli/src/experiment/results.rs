//! All results of a run as JSONL, written as they come: `{"model", "prompt_id", "expect", "correct", "job"}`, or with
//! `refused` instead of a job.

use super::plan::Plan;
use anyhow::Context as _;
use genmill_client::v1;
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

/// The file that results go to.
#[derive(Debug)]
pub(crate) struct Results {
    file: BufWriter<File>,
}

impl Results {
    /// Begins anew: a resumed run is told of every job again.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let create = || {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            File::create(path)
        };
        let file = create().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file: BufWriter::new(file) })
    }

    pub(crate) fn job(
        &mut self,
        plan: &Plan,
        index: usize,
        correct: Option<bool>,
        job: &v1::Job,
    ) -> anyhow::Result<()> {
        let job = genmill_wire::json::to_json("Job", job)?;
        self.line(plan, index, correct, &format!("\"job\":{job}"))
    }

    pub(crate) fn refused(&mut self, plan: &Plan, index: usize, why: &str) -> anyhow::Result<()> {
        self.line(plan, index, None, &format!("\"refused\":{}", json!(why)))
    }

    pub(crate) fn flush(&mut self) -> anyhow::Result<()> {
        self.file.flush().context("cannot write all results")
    }

    /// Writes a line that ends with the member `end`. Put together by hand, so that what it is about comes first.
    fn line(&mut self, plan: &Plan, index: usize, correct: Option<bool>, end: &str) -> anyhow::Result<()> {
        let (_, prompt) = plan.job(index);
        let (model, id) = (json!(plan.model(index)), json!(prompt.id));
        let (expect, correct) = (json!(prompt.expect), json!(correct));
        writeln!(self.file, "{{\"model\":{model},\"prompt_id\":{id},\"expect\":{expect},\"correct\":{correct},{end}}}")
            .context("cannot write a result")
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::sample;
    use super::*;
    use serde_json::Value;

    #[test]
    fn a_result_is_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/results.jsonl");
        let plan = sample();
        let mut results = Results::create(&path).unwrap();
        let job = v1::Job { id: "j".to_owned(), ..v1::Job::default() };
        results.job(&plan, 0, Some(true), &job).unwrap();
        results.refused(&plan, 4, "no").unwrap();
        results.flush().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let first = json!({"model": "vllm_a", "prompt_id": "two", "expect": ["4", "four"], "correct": true, "job": {"id": "j"}});
        let second = json!({"model": "hf_b", "prompt_id": "2", "expect": ["6"], "correct": null, "refused": "no"});
        assert_eq!(lines, [first, second]);
    }
}
