//! Histories for the checker's own tests: a good one, and ways to spoil it.

use super::{Evidence, FINAL_WATCH, Rule, Settings};
use crate::chaos::history::{Entry, Event, Face};
use genmill_client::v1;
use genmill_core::time::UnixMs;
use genmill_standin::bill::{Call, CallEnd};
use genmill_wire::to_pb::timestamp;
use std::collections::BTreeMap;
use std::time::Duration;

/// Fails unless the rule finds as many violations as `says` has, and each says what stands there.
pub(super) fn check(rule: Rule, run: &Builder, says: &[&str]) {
    let found: Vec<String> = rule(&run.evidence).iter().map(ToString::to_string).collect();
    assert_eq!(found.len(), says.len(), "{found:#?}");
    for says in says {
        assert!(found.iter().any(|found| found.contains(says)), "nothing says `{says}`: {found:#?}");
    }
}

/// The line of an attempt of the worker `w`, from second 1 to second 2.
pub(super) fn attempt(epoch: u32, outcome: v1::AttemptOutcome, nanodollars: Option<u64>) -> v1::Attempt {
    v1::Attempt {
        epoch,
        worker: "w".to_owned(),
        started_at: Some(timestamp(UnixMs(1_000))),
        ended_at: Some(timestamp(UnixMs(2_000))),
        outcome: outcome.into(),
        cost: nanodollars.map(|nanodollars| v1::Cost { nanodollars, estimated: false }),
        error: None,
    }
}

/// A call of the worker `w` for a job, answered whole: 2 tokens read, 2 written, which is 1,500 nanodollars.
pub(super) fn call(job: &str) -> Call {
    Call {
        key: "key-w".to_owned(),
        content: format!("gpt-4o-mini: !echo={job} w1"),
        begun: Duration::from_millis(1_100),
        ended: Some(Duration::from_millis(1_900)),
        prompt_tokens: 2,
        completion_tokens: 2,
        usage_sent: true,
        end: CallEnd::Answered,
    }
}

/// What [`call`] costs.
pub(super) const CALL_NANODOLLARS: u64 = 1_500;

pub(super) fn job(id: &str) -> v1::Job {
    v1::Job {
        id: id.to_owned(),
        state: v1::JobState::Succeeded.into(),
        request: Some(v1::GenerationRequest {
            model: "litellm_gpt-4o-mini".to_owned(),
            input: Some(v1::generation_request::Input::Prompt(format!("!echo={id} w1"))),
            tenant: "tenant".to_owned(),
            max_tokens: Some(20),
            ..v1::GenerationRequest::default()
        }),
        attempts: 1,
        created_at: Some(timestamp(UnixMs(500))),
        started_at: Some(timestamp(UnixMs(1_000))),
        finished_at: Some(timestamp(UnixMs(2_000))),
        result: Some(v1::Result { text: format!("{id} w1"), ..v1::Result::default() }),
        cost: Some(v1::Cost { nanodollars: CALL_NANODOLLARS, estimated: false }),
        attempt_history: vec![attempt(1, v1::AttemptOutcome::Succeeded, Some(CALL_NANODOLLARS))],
        ..v1::Job::default()
    }
}

/// Makes histories.
pub(super) struct Builder {
    pub(super) evidence: Evidence,
}

impl Builder {
    /// Nothing but a worker.
    pub(super) fn empty() -> Self {
        let settings = Settings {
            calls_max: 2,
            tenant_cap: ("capped", 1),
            lane_cap: ("litellm_groq/openai/gpt-oss-20b", 1),
            retries_max: 6,
            losses_max: 3,
            lease_ms: 1_000,
        };
        let evidence = Evidence { settings, history: Vec::new(), jobs: BTreeMap::new(), calls: Vec::new() };
        Self { evidence }.event_at(0, Event::WorkerUp { slot: 0, key: "key-w".to_owned(), worker: "w".to_owned() })
    }

    /// Two jobs, `a` and `b`, which went as they should.
    pub(super) fn good() -> Self {
        let watching =
            Event::Watching { watch: FINAL_WATCH.to_owned(), tenant: String::new(), experiment: String::new() };
        ["a", "b"].into_iter().fold(Self::empty().event(watching), |run, id| run.went_well(id))
    }

    fn went_well(mut self, id: &str) -> Self {
        self.evidence.jobs.insert(id.to_owned(), job(id));
        self.evidence.calls.push(call(id));
        self.acknowledged(&format!("request-{id}"), id)
            .event(Event::Seen { job: id.to_owned(), face: Self::face(id) })
            .event(Event::Told { watch: FINAL_WATCH.to_owned(), job: id.to_owned(), face: Self::face(id) })
            .event(Event::Listed { job: id.to_owned(), state: String::new() })
    }

    pub(super) fn face(id: &str) -> Face {
        Face::of(&job(id))
    }

    pub(super) fn event(self, event: Event) -> Self {
        self.event_at(5_000, event)
    }

    pub(super) fn event_at(mut self, at_ms: u64, event: Event) -> Self {
        self.evidence.history.push(Entry { at_ms, event });
        self
    }

    pub(super) fn acknowledged(self, request_id: &str, job: &str) -> Self {
        let (request_id, job) = (request_id.to_owned(), job.to_owned());
        self.event(Event::Acknowledged { request_id, job, existed: false })
    }

    pub(super) fn forget(mut self, which: impl Fn(&Event) -> bool) -> Self {
        self.evidence.history.retain(|entry| !which(&entry.event));
        self
    }

    pub(super) fn without(mut self, id: &str) -> Self {
        self.evidence.jobs.remove(id);
        self
    }

    pub(super) fn change(mut self, id: &str, change: impl Fn(&mut v1::Job)) -> Self {
        self.evidence.jobs.get_mut(id).into_iter().for_each(change);
        self
    }
}
