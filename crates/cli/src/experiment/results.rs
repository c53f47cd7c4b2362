//! All results of a run as JSONL, written as they come: `{"model", "prompt_id", "expect", "correct", "job"}`, or with
//! `refused` instead of a job. They are written beside the file that is asked for and take its place at the end, so that
//! an earlier run's results are lost only to better ones.

use super::plan::Plan;
use anyhow::Context as _;
use genmill_client::v1;
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

/// The file that results go to.
#[derive(Debug)]
pub(crate) struct Results {
    file: BufWriter<File>,
    /// Where they are to end up.
    path: PathBuf,
    /// Where they are until then.
    written: PathBuf,
}

impl Results {
    /// Begins anew: a resumed run is told of every job again.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let written = beside(path);
        let create = || {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            File::create(&written)
        };
        let file = create().with_context(|| format!("cannot write {}", written.display()))?;
        Ok(Self { file: BufWriter::new(file), path: path.to_owned(), written })
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

    /// Puts the results where they are to end up, in place of earlier ones. Returns where that is.
    pub(crate) fn keep(self) -> anyhow::Result<PathBuf> {
        let path = self.path.clone();
        let written = self.set_aside()?;
        if written != path {
            std::fs::rename(written, &path).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(path)
    }

    /// Puts the results where they are to end up only if nothing is there yet: they are not all. Returns where they are.
    pub(crate) fn keep_unless_there(self) -> anyhow::Result<PathBuf> {
        if self.path.exists() { self.set_aside() } else { self.keep() }
    }

    /// Leaves the results beside where they were to end up. Returns where that is.
    pub(crate) fn set_aside(mut self) -> anyhow::Result<PathBuf> {
        self.file.flush().context("cannot write all results")?;
        Ok(self.written)
    }

    /// Throws the results away.
    pub(crate) fn discard(self) {
        if self.written != self.path {
            // Nobody misses it, and the next run begins it anew.
            drop(std::fs::remove_file(&self.written));
        }
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

/// Where results are written first. What is no plain file, such as /dev/stdout, is written to as it is.
fn beside(path: &Path) -> PathBuf {
    if std::fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
        return path.to_owned();
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".partial");
    beside.into()
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
        assert_eq!(results.keep().unwrap(), path);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let first = json!({"model": "vllm_a", "prompt_id": "two", "expect": ["4", "four"], "correct": true, "job": {"id": "j"}});
        let second = json!({"model": "hf_b", "prompt_id": "2", "expect": ["6"], "correct": null, "refused": "no"});
        assert_eq!(lines, [first, second]);
    }

    /// The earlier results, the new ones (empty), and all that lies in their folder afterwards.
    fn after(end: impl FnOnce(Results)) -> (String, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.jsonl");
        std::fs::write(&path, "good").unwrap();
        let results = Results::create(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "good", "untouched until the end");
        end(results);
        let names = std::fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<String> = names.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        (std::fs::read_to_string(&path).unwrap(), names)
    }

    #[test]
    fn earlier_results_are_lost_only_to_all_results() {
        let is = |(text, names): (String, Vec<String>), expect: &str, files: &[&str]| {
            assert_eq!((text.as_str(), names), (expect, files.iter().map(|name| (*name).to_owned()).collect()));
        };
        is(after(|results| drop(results.keep().unwrap())), "", &["r.jsonl"]);
        is(after(|results| drop(results.keep_unless_there().unwrap())), "good", &["r.jsonl", "r.jsonl.partial"]);
        is(after(|results| drop(results.set_aside().unwrap())), "good", &["r.jsonl", "r.jsonl.partial"]);
        is(after(Results::discard), "good", &["r.jsonl"]);
    }

    #[test]
    fn some_results_are_better_than_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.jsonl");
        assert_eq!(Results::create(&path).unwrap().keep_unless_there().unwrap(), path);
        assert!(path.is_file());
    }

    #[test]
    fn a_device_is_written_to_as_it_is() {
        let results = Results::create(Path::new("/dev/null")).unwrap();
        assert_eq!(results.keep_unless_there().unwrap(), Path::new("/dev/null"));
        Results::create(Path::new("/dev/null")).unwrap().discard();
        assert!(!Path::new("/dev/null").is_file());
    }
}
