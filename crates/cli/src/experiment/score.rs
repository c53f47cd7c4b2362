//! What came of the jobs so far, per model. Pure. Never here: how it is shown.

use super::plan::Plan;
use genmill_client::v1;
use std::collections::HashMap;

/// The score of a run.
#[derive(Debug)]
pub(crate) struct Score {
    /// Jobs whose end is not known yet, by request id.
    open: HashMap<String, usize>,
    tallies: Vec<Tally>,
    jobs: usize,
    /// How many ended without a job to learn from: refused, or no longer kept.
    jobless: usize,
}

/// What came of a model's jobs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) jobs: u64,
    pub(crate) ok: u64,
    pub(crate) failed: u64,
    /// Jobs whose prompt says what is expected.
    pub(crate) expecting: u64,
    pub(crate) correct: u64,
    pub(crate) tokens: u64,
    latencies_ms: Vec<u64>,
    first_start_ms: Option<i64>,
    last_end_ms: Option<i64>,
    cost: Cost,
    /// Of some jobs it is estimated.
    pub(crate) cost_estimated: bool,
}

/// A sum of costs; `None` once one of them is unknown.
#[derive(Clone, Copy, Debug)]
struct Cost(Option<u64>);

impl Default for Cost {
    fn default() -> Self {
        Self(Some(0))
    }
}

impl Score {
    pub(crate) fn new(plan: &Plan) -> Self {
        let open = (0..plan.jobs()).map(|index| (plan.request_id(index), index)).collect();
        let mut tally = Tally::default();
        for prompt in &plan.experiment.prompts {
            tally.jobs += 1;
            tally.expecting += u64::from(prompt.expect.is_some());
        }
        Self { open, tallies: vec![tally; plan.experiment.models.len()], jobs: plan.jobs(), jobless: 0 }
    }

    /// Per model, in the experiment's order.
    pub(crate) fn tallies(&self) -> &[Tally] {
        &self.tallies
    }

    pub(crate) fn finished(&self) -> usize {
        self.jobs - self.open.len()
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.open.is_empty()
    }

    pub(crate) fn all_succeeded(&self) -> bool {
        self.tallies.iter().all(|tally| tally.ok == tally.jobs)
    }

    /// True when a job was seen for every prompt and model, whatever came of it.
    pub(crate) fn has_every_job(&self) -> bool {
        self.is_complete() && self.jobless == 0
    }

    /// Notes that a job was refused, so that its cost is not known either: it may have run before. Returns its number, if it is one of this run whose end was not known.
    pub(crate) fn note_refused(&mut self, request_id: &str) -> Option<usize> {
        let index = self.open.remove(request_id)?;
        let prompts = self.jobs / self.tallies.len();
        let tally = &mut self.tallies[index / prompts];
        tally.failed += 1;
        tally.cost = Cost::UNKNOWN;
        self.jobless += 1;
        Some(index)
    }

    /// Notes a finished job. Returns its number and whether its text is correct, if it is one of this run whose end was
    /// not known.
    pub(crate) fn note_job(&mut self, plan: &Plan, request_id: &str, job: &v1::Job) -> Option<(usize, Option<bool>)> {
        let index = self.open.remove(request_id)?;
        let (model, prompt) = plan.job(index);
        let correct = prompt.expect.as_ref().map(|expect| is_correct(job, expect));
        self.tallies[model].note(job, correct);
        Some((index, correct))
    }

    /// Counts the jobs of which nothing can be learned any more as failed. Returns how many they are.
    pub(crate) fn note_lost(&mut self) -> usize {
        let lost: Vec<String> = self.open.keys().cloned().collect();
        for request_id in &lost {
            self.note_refused(request_id);
        }
        lost.len()
    }
}

/// True when the text, without space around it, is one of the accepted answers.
fn is_correct(job: &v1::Job, expect: &[String]) -> bool {
    let text = job.result.as_ref().map(|result| result.text.trim());
    text.is_some_and(|text| expect.iter().any(|accepted| accepted.trim() == text))
}

impl Tally {
    fn note(&mut self, job: &v1::Job, correct: Option<bool>) {
        match &job.result {
            Some(result) => {
                self.ok += 1;
                self.tokens += result.usage.as_ref().map_or(0, |usage| usage.completion_tokens);
                let latency = result.latency.as_ref();
                self.latencies_ms.extend(latency.map(|latency| latency.total_ms.saturating_sub(latency.queued_ms)));
            }
            None => self.failed += 1,
        }
        self.correct += u64::from(correct == Some(true));
        let started = job.started_at.as_ref().map(milliseconds);
        let ended = job.finished_at.as_ref().map(milliseconds);
        self.first_start_ms = [self.first_start_ms, started].into_iter().flatten().min();
        self.last_end_ms = self.last_end_ms.max(ended);
        self.cost = self.cost.plus(job);
        self.cost_estimated |= job.cost.as_ref().is_some_and(|cost| cost.estimated);
    }

    /// The share of expecting jobs that are correct; `None` when none expects anything.
    pub(crate) fn correct_share(&self) -> Option<f64> {
        share(self.correct, self.expecting)
    }

    /// The latency that half of the jobs stayed below; `None` when none succeeded.
    pub(crate) fn p50_ms(&self) -> Option<u64> {
        let mut sorted = self.latencies_ms.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len().saturating_sub(1) / 2).copied()
    }

    /// Generated tokens per second; `None` when no time passed.
    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        let span_ms = u64::try_from(self.last_end_ms?.saturating_sub(self.first_start_ms?)).ok()?;
        Some(1_000.0 * share(self.tokens, span_ms)?)
    }

    /// What the jobs cost together, in nanodollars; `None` when that is unknown.
    pub(crate) fn cost_nanodollars(&self) -> Option<u64> {
        self.cost.0
    }
}

impl Cost {
    const UNKNOWN: Self = Self(None);

    /// A job that never ran costs nothing; one that ran at an unknown price makes the sum unknown.
    fn plus(self, job: &v1::Job) -> Self {
        let cost = match &job.cost {
            Some(cost) => Some(cost.nanodollars),
            None => (job.attempts == 0).then_some(0),
        };
        Self(self.0.zip(cost).map(|(sum, cost)| sum.saturating_add(cost)))
    }
}

/// The share of correct answers that a random choice would have; `None` unless every prompt has `choices` and `expect`.
pub(crate) fn random_share(plan: &Plan) -> Option<f64> {
    let prompts = &plan.experiment.prompts;
    let shares = prompts.iter().map(|prompt| {
        let (expect, choices) = (prompt.expect.as_ref()?, prompt.choices.as_ref()?);
        let hits = choices.iter().filter(|choice| expect.contains(choice)).count();
        share(u64::try_from(hits).ok()?, u64::try_from(choices.len()).ok()?)
    });
    let sum = shares.sum::<Option<f64>>()?;
    u32::try_from(prompts.len()).ok().map(|count| sum / f64::from(count))
}

/// A ratio for people; `None` when there is nothing to divide by.
#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn milliseconds(at: &prost_types::Timestamp) -> i64 {
    at.seconds.saturating_mul(1_000).saturating_add(i64::from(at.nanos / 1_000_000))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::plan::tests::sample;
    use super::*;

    /// A job that ran from second `from` to second `to`.
    pub(crate) fn job(text: &str, from: i64, to: i64) -> v1::Job {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let total_ms = u64::try_from((to - from) * 1_000).unwrap() + 7;
        let result = v1::Result {
            text: text.to_owned(),
            usage: Some(v1::Usage { completion_tokens: 10, ..v1::Usage::default() }),
            latency: Some(v1::Latency { queued_ms: 7, first_token_ms: None, total_ms }),
            ..v1::Result::default()
        };
        v1::Job {
            state: v1::JobState::Succeeded.into(),
            attempts: 1,
            started_at: at(from),
            finished_at: at(to),
            result: Some(result),
            cost: Some(v1::Cost { nanodollars: 100, estimated: false }),
            ..v1::Job::default()
        }
    }

    #[test]
    fn a_score_is_kept_per_model() {
        let plan = sample();
        let mut score = Score::new(&plan);
        let failed = v1::Job { state: v1::JobState::Failed.into(), attempts: 3, ..v1::Job::default() };
        let mut note = |index, job: &v1::Job| score.note_job(&plan, &plan.request_id(index), job);
        assert_eq!(note(0, &job(" four\n", 0, 1)), Some((0, Some(true))));
        assert_eq!(note(1, &job("7", 1, 3)), Some((1, Some(false))));
        assert_eq!(note(2, &job("x", 2, 5)), Some((2, Some(true))));
        assert_eq!(note(3, &failed), Some((3, Some(false))));
        assert_eq!(note(3, &failed), None, "a job counts once");
        assert_eq!(score.note_refused(&plan.request_id(4)), Some(4));
        assert_eq!(score.note_refused("of another run"), None);
        assert_eq!(score.finished(), 5);
        assert_eq!(score.note_lost(), 1);
        assert!(score.is_complete() && !score.all_succeeded());

        let [a, b] = score.tallies() else { panic!("two models") };
        assert_eq!((a.jobs, a.ok, a.failed, a.correct), (3, 3, 0, 2));
        assert_eq!(a.p50_ms(), Some(2_000));
        assert_eq!(a.tokens_per_second(), Some(6.0));
        assert_eq!(a.cost_nanodollars(), Some(300));
        assert_eq!((b.jobs, b.ok, b.failed, b.correct), (3, 0, 3, 0));
        assert_eq!(b.p50_ms(), None);
        assert_eq!(b.tokens_per_second(), None);
        assert_eq!(b.cost_nanodollars(), None, "it ran three times at an unknown price");
    }

    #[test]
    fn a_refused_job_is_no_job_and_its_cost_is_unknown() {
        let plan = sample();
        let mut score = Score::new(&plan);
        for index in 0..5 {
            score.note_job(&plan, &plan.request_id(index), &job("x", 0, 1));
        }
        assert!(!score.has_every_job());
        let mut whole = Score::new(&plan);
        for index in 0..6 {
            whole.note_job(&plan, &plan.request_id(index), &job("x", 0, 1));
        }
        assert!(whole.has_every_job());
        score.note_refused(&plan.request_id(5));
        assert!(score.is_complete() && !score.has_every_job());
        let costs: Vec<Option<u64>> = score.tallies().iter().map(Tally::cost_nanodollars).collect();
        assert_eq!(costs, [Some(300), None]);
    }

    fn rates(jobs: &[v1::Job], expect: (Option<u64>, Option<f64>)) {
        let plan = sample();
        let mut score = Score::new(&plan);
        for (index, job) in jobs.iter().enumerate() {
            score.note_job(&plan, &plan.request_id(index), job);
        }
        let tally = &score.tallies()[0];
        assert_eq!((tally.p50_ms(), tally.tokens_per_second()), expect);
    }

    #[test]
    fn nothing_is_divided_by_nothing() {
        rates(&[], (None, None));
        rates(&[v1::Job::default()], (None, None));
        // It began and ended in the same millisecond.
        rates(&[job("x", 1, 1)], (Some(0), None));
        // The clocks of two machines differ.
        let started_at = Some(prost_types::Timestamp { seconds: 9, nanos: 0 });
        rates(&[v1::Job { started_at, ..job("x", 1, 2) }], (Some(1_000), None));
        rates(&[job("x", 1, 2), job("x", 1, 3)], (Some(1_000), Some(10.0)));
    }

    #[test]
    fn the_baseline_is_the_mean_share_of_accepted_choices() {
        // 4 and four of [3, 4, 5, four]; 6 of [6, 7]; none of [y].
        assert_eq!(random_share(&sample()), Some((0.5 + 0.5 + 0.0) / 3.0));
        let mut plan = sample();
        plan.experiment.prompts[1].choices = None;
        assert_eq!(random_share(&plan), None);
    }
}
