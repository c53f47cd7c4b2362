//! Clients that use the mill while things go wrong, and write down what they see. Several tenants: two with a steady
//! backlog, one that sends in bulk and breaks its streams, some callers of single jobs. Never here: what goes wrong (see
//! `world`), nor judging what was seen (see `check`).

mod bulk;
mod single;
mod steady;

use super::history::{Event, Face, History};
use super::world::MODELS;
use crate::dice::Dice;
use genmill_client::{Acknowledgement, Client, Error, FinishedJob, Outcome, Reason, Request, v1};
use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

/// The tenants that always have work waiting, with what a job of theirs may generate: the jobs of one are thrice as large.
pub const STEADY: [(&str, u32); 2] = [("steady-small", 20), ("steady-large", 60)];

/// How many callers of single jobs there are.
const CALLERS: usize = 5;

/// How long a single call is waited for before it is made again: a connection may be held for longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// The wait before a call is made again.
const AGAIN_AFTER: Duration = Duration::from_millis(150);

/// Reasons for which a request is refused while workers or Redis are away. Submitted later, it is accepted.
pub const PASSING: [Reason; 5] = [
    Reason::NoLiveWorker,
    Reason::ModelNotListed,
    Reason::ModelUnavailable,
    Reason::KeyMissing,
    Reason::QueueUnavailable,
];

/// Clients at work.
#[derive(Debug)]
pub struct Load {
    clients: JoinSet<()>,
    stop: CancellationToken,
    /// A watch of all jobs, from the first to the last.
    witness: JoinSet<()>,
    told: watch::Receiver<usize>,
}

impl Load {
    /// Sets all clients to work on a mill. What they do depends on `seed`, when they do it on the mill.
    #[must_use]
    pub fn start(clients: &[Client], history: &History, seed: u64) -> Self {
        let stop = CancellationToken::new();
        let mut dice = Dice::new(seed ^ 0x6c6f_6164);
        let mut caller = |name: &str| Caller {
            name: name.to_owned(),
            client: dice.pick(clients).unwrap_or(&clients[0]).clone(),
            history: history.clone(),
            dice: Dice::new(dice.roll(u64::MAX)),
            stop: stop.clone(),
            drawn: 0,
        };
        let mut at_work = JoinSet::new();
        for (tenant, tokens_max) in STEADY {
            at_work.spawn(steady::work(caller(tenant), tokens_max));
        }
        at_work.spawn(bulk::work(caller("bulk")));
        for number in 0..CALLERS {
            at_work.spawn(single::work(caller(&format!("caller-{number}"))));
        }
        let (tell, told) = watch::channel(0);
        let mut witness = JoinSet::new();
        witness.spawn(bear_witness(caller("witness"), tell));
        Self { clients: at_work, stop, witness, told }
    }

    /// Lets no more work begin, and waits until all that was submitted has ended and its clients have seen it. False
    /// when that takes longer than `patience`.
    pub async fn end(&mut self, patience: Duration) -> bool {
        self.stop.cancel();
        let ended = async { while self.clients.join_next().await.is_some() {} };
        timeout(patience, ended).await.is_ok()
    }

    /// Waits until the watch of all jobs has told `jobs` of them, or for as long as `patience` lasts.
    pub async fn witness(&mut self, jobs: usize, patience: Duration) {
        // Whether it has told each of them once is for the check to say.
        drop(timeout(patience, self.told.wait_for(|told| *told >= jobs)).await);
        self.witness.abort_all();
    }
}

/// Watches all jobs, from the beginning of the run to its end.
async fn bear_witness(caller: Caller, tell: watch::Sender<usize>) {
    let mut finished = Box::pin(caller.watch("witness", v1::JobFilter::default(), genmill_client::Until::Dropped));
    while let Some(job) = finished.next().await {
        if caller.told("witness", job).is_some() {
            tell.send_modify(|told| *told += 1);
        }
    }
}

/// A client that does not give up, with a name, dice and a history of its own.
pub(super) struct Caller {
    name: String,
    client: Client,
    history: History,
    dice: Dice,
    stop: CancellationToken,
    /// How many requests it has made up.
    drawn: u64,
}

/// What a request is to do to the provider, and what is to be generated.
struct Wanted<'a> {
    model: &'static str,
    /// Directives of the stand-in.
    script: &'a str,
    words: u64,
    tokens_max: u32,
}

impl Caller {
    /// A request that no other one is like: its text names it, and so does its id.
    fn request(&mut self, wanted: &Wanted<'_>) -> (String, Request) {
        self.drawn += 1;
        let request_id = format!("{}-{}", self.name, self.drawn);
        let words: String = (1..=wanted.words).map(|word| format!(" w{word}")).collect();
        let request = Request::new(wanted.model)
            .prompt(format!("{} !echo={request_id}{words}", wanted.script))
            .max_tokens(wanted.tokens_max)
            .request_id(&request_id);
        (request_id, request)
    }

    fn any_model(&mut self) -> &'static str {
        self.dice.pick(&MODELS).map_or(MODELS[0].name, |model| model.name)
    }

    /// Makes a call until it is answered.
    async fn until_answered<T, Answered>(&self, call: impl Fn() -> Answered) -> Result<T, Error>
    where
        Answered: Future<Output = Result<T, Error>>,
    {
        loop {
            match timeout(ANSWER_WITHIN, call()).await {
                Ok(Err(error)) if error.is_passing() => {}
                Ok(answer) => return answer,
                Err(_) => {}
            }
            sleep(AGAIN_AFTER).await;
        }
    }

    fn trouble(&self, doing: &str, error: &Error) {
        let what = format!("{}, {doing}: {error} ({error:?})", self.name);
        self.history.note(Event::Trouble { what });
    }

    /// Submits one request until it is accepted; returns the job's id. `None` when its deadline has passed before.
    async fn submit(&self, request_id: &str, request: &Request) -> Option<String> {
        loop {
            let answer = self.until_answered(|| {
                self.history.note(Event::Submitting { request_id: request_id.to_owned() });
                self.client.submit(request.clone())
            });
            match answer.await {
                Ok(submitted) => {
                    self.acknowledged(request_id, &submitted.job.id, submitted.existed);
                    return Some(submitted.job.id);
                }
                Err(Error::Refused { reason, .. }) if PASSING.contains(&reason) => self.refused(request_id, reason),
                Err(Error::Refused { reason: Reason::InvalidRequest, message }) if message.contains("deadline") => {
                    self.refused(request_id, Reason::InvalidRequest);
                    return None;
                }
                Err(error) => self.trouble("submitting", &error),
            }
            sleep(AGAIN_AFTER).await;
        }
    }

    fn acknowledged(&self, request_id: &str, job: &str, existed: bool) {
        let (request_id, job) = (request_id.to_owned(), job.to_owned());
        self.history.note(Event::Acknowledged { request_id, job, existed });
    }

    fn refused(&self, request_id: &str, reason: Reason) {
        self.history.note(Event::Refused { request_id: request_id.to_owned(), reason: reason.name().to_owned() });
    }

    /// Sends requests over one stream, and leaves it after `answers`. Returns what was acknowledged, by request id.
    async fn send(&self, requests: &BTreeMap<String, Request>, answers: usize) -> BTreeMap<String, String> {
        for request_id in requests.keys() {
            self.history.note(Event::Submitting { request_id: request_id.clone() });
        }
        let all: Vec<Request> = requests.values().cloned().collect();
        let mut acknowledged = BTreeMap::new();
        let mut stream = Box::pin(self.client.submit_all(tokio_stream::iter(all)).take(answers));
        while let Some(answer) = stream.next().await {
            match answer {
                Ok(Acknowledgement { request_id, outcome: Outcome::Accepted { job_id, existed }, .. }) => {
                    self.acknowledged(&request_id, &job_id, existed);
                    acknowledged.insert(request_id, job_id);
                }
                Ok(Acknowledgement { request_id, outcome: Outcome::Refused(refusal), .. }) => match refusal.reason {
                    Some(reason) if PASSING.contains(&reason) => self.refused(&request_id, reason),
                    _ => self.history.note(Event::Trouble { what: format!("{request_id}: {refusal}") }),
                },
                Err(error) => self.trouble("submitting many", &error),
            }
        }
        acknowledged
    }

    /// Submits requests until all are accepted; returns the jobs' ids.
    async fn submit_all(&self, mut requests: BTreeMap<String, Request>) -> Vec<String> {
        let mut jobs = Vec::new();
        loop {
            let acknowledged = self.send(&requests, usize::MAX).await;
            requests.retain(|request_id, _| !acknowledged.contains_key(request_id));
            jobs.extend(acknowledged.into_values());
            if requests.is_empty() {
                return jobs;
            }
            sleep(AGAIN_AFTER).await;
        }
    }

    /// Begins to watch the jobs of a filter.
    fn watch(
        &self,
        name: &str,
        filter: v1::JobFilter,
        until: genmill_client::Until,
    ) -> impl tokio_stream::Stream<Item = Result<FinishedJob, Error>> + Send + use<> {
        self.history.note(Event::Watching {
            watch: name.to_owned(),
            tenant: filter.tenant.clone(),
            experiment: filter.experiment.clone(),
        });
        self.client.watch_jobs(filter, String::new(), until)
    }

    /// Notes what a watch told; the job's id.
    fn told(&self, name: &str, told: Result<FinishedJob, Error>) -> Option<String> {
        match told {
            Ok(FinishedJob { job, .. }) => {
                let event = Event::Told { watch: name.to_owned(), job: job.id.clone(), face: Face::of(&job) };
                self.history.note(event);
                Some(job.id)
            }
            Err(error) => {
                self.trouble("watching many", &error);
                None
            }
        }
    }

    /// Reads a job, and notes it when it is final.
    async fn read(&self, id: &str) -> Option<v1::Job> {
        match self.until_answered(|| self.client.get(id)).await {
            Ok(job) => {
                if is_final(job.state()) {
                    self.history.note(Event::Seen { job: job.id.clone(), face: Face::of(&job) });
                }
                Some(job)
            }
            Err(error) => {
                self.trouble("reading", &error);
                None
            }
        }
    }
}

/// Whether a job in this state has ended.
#[must_use]
pub fn is_final(state: v1::JobState) -> bool {
    use v1::JobState::{Cancelled, Expired, Failed, Succeeded};
    matches!(state, Succeeded | Failed | Cancelled | Expired)
}
