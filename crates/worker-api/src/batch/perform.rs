//! Submits, looks at and reads batches. Never here: the search for one (`search`), which jobs they have, and what is done next
//! (`genmill-worker`).

use super::calls::{Calls, CarriedOut, Failed};
use super::named::named;
use super::packing::{ITEMS_MAX, Packing};
use super::results::Collecting;
use super::{BatchApi, Line, Request, Source, State, Submission, Turns, custom_id, file_at, read_custom_id};
use crate::auth::Credentials;
use crate::call::{said, told, unsupported};
use crate::catalog::Endpoint;
use crate::dialect::{Encoded, Streaming};
use crate::failure::{Fault, Kind};
use crate::perform::Performer;
use crate::wait::asked_ms;
use genmill_core::attempt::{Failure, FailureClass};
use genmill_core::ids::{Epoch, JobId};
use genmill_core::job::JobSpec;
use genmill_core::model::Lane;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_worker::batches::{
    Arrived, Batch, BatchOffer, Found, PerformBatches, Prepared, Refusal, Stage, Unsubmitted,
};
use genmill_worker::hold::Hold;
use http::HeaderMap;
use std::collections::BTreeMap;
use tokio::sync::mpsc;

/// How many bytes of items go out at once, whatever a provider takes: a worker has them all in memory. What has no room is
/// not sent on, and goes into a later batch.
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// The name of a batch that no provider was told of, because none of its items can be asked.
const NOTHING: &str = "nothing";

impl Performer {
    /// How the jobs of a lane go out in batches, if they can.
    pub(crate) fn batch_api(&self, lane: &Lane) -> Option<&'static dyn BatchApi> {
        self.limits.batches.then(|| self.catalog.endpoints.get(lane).and_then(api_of)).flatten()
    }

    /// How a batch's provider is called, with the key that the batch has.
    fn desk<'a>(&'a self, batch: &'a Batch) -> Result<Desk<'a>, Failure> {
        let lane = batch.model.lane();
        let missing = |what: &str| Failure::new(FailureClass::Auth, format!("{what} lane {lane}"));
        if !self.catalog.endpoints.contains_key(&lane) {
            return Err(missing("this worker has no provider for"));
        }
        let endpoint = self.keys.endpoint(&lane, batch.key.as_ref());
        let endpoint = endpoint.ok_or_else(|| missing("this worker has not the key of the batch any more, for"))?;
        let api = api_of(endpoint).ok_or_else(|| missing("this worker knows no batch API of"))?;
        let model = batch.model.backend_name();
        let dialect = endpoint.dialect(model);
        let calls = Calls { http: &self.http, endpoint, dialect, limits: self.limits };
        Ok(Desk { performer: self, api, calls, submission: Submission { tag: &batch.tag, model } })
    }
}

fn api_of(endpoint: &Endpoint) -> Option<&'static dyn BatchApi> {
    endpoint.provider.batch.as_deref().and_then(super::find)
}

/// Where a batch's provider is dealt with.
pub(super) struct Desk<'a> {
    pub(super) performer: &'a Performer,
    pub(super) api: &'static dyn BatchApi,
    pub(super) calls: Calls<'a>,
    submission: Submission<'a>,
}

/// What a batch is made with.
#[derive(Debug)]
pub struct Ready {
    /// The request that makes it; `None` when none of its items can be asked.
    request: Option<Request>,
    /// The file that has its items.
    file: Option<String>,
    /// Its items, in their order.
    items: Vec<(JobId, Epoch)>,
}

impl PerformBatches for Performer {
    type Ready = Ready;

    fn batch_offers(&self) -> Vec<BatchOffer> {
        let offer = |(lane, endpoint): (&Lane, &Endpoint)| {
            let api = self.batch_api(lane)?;
            let items_max = api.items_max().min(ITEMS_MAX);
            // Half, because texts may take twice as much when they are escaped.
            let bytes_max = api.bytes_max().min(BYTES_MAX) / 2;
            let keyed = !matches!(endpoint.credentials, Credentials::None);
            let key = self.keys.first(lane).filter(|_| keyed).cloned();
            Some(BatchOffer { lane: lane.batch(), key, items_max, bytes_max })
        };
        self.catalog.endpoints.iter().filter_map(offer).collect()
    }

    async fn prepare(&self, batch: &Batch) -> Result<Prepared<Ready>, Refusal> {
        self.desk(batch)?.prepare(batch).await
    }

    async fn create(&self, batch: &Batch, ready: Ready, hold: &Hold) -> Result<String, Unsubmitted> {
        self.desk(batch).map_err(|failure| Unsubmitted::Refused(failure.into()))?.create(batch, ready, hold).await
    }

    async fn find(&self, batch: &Batch, others: &[String]) -> Result<Found, Failure> {
        self.desk(batch)?.find(batch, others).await
    }

    async fn look(&self, batch: &Batch, remote: &str) -> Result<Stage, Failure> {
        if remote == NOTHING {
            return Ok(Stage::Ended);
        }
        let desk = self.desk(batch)?;
        Ok(match desk.state(remote).await? {
            State::Works => Stage::Works,
            State::Ended { .. } => Stage::Ended,
            State::Refused { status, body, lines, items } => Stage::Refused(Refusal {
                failure: desk.refused(status, &body, &[]).into_failure(),
                named: match items {
                    Some(items) if !lines.is_empty() => desk.named_in(&items, status, &lines).await?,
                    _ => Vec::new(),
                },
            }),
        })
    }

    async fn collect(&self, batch: &Batch, remote: &str, results: mpsc::Sender<Arrived>) -> Result<(), Failure> {
        let desk = self.desk(batch)?;
        let (sources, turns) = match remote {
            NOTHING => (Vec::new(), Turns::All),
            _ => match desk.state(remote).await? {
                State::Ended { sources, turns } => (sources, turns),
                State::Refused { .. } => (Vec::new(), Turns::Some),
                State::Works => {
                    return Err(desk.calls.fault(Kind::Transient, "works on the batch still").into_failure());
                }
            },
        };
        Collecting::new(&desk, &batch.items, turns, results).collect(&sources).await
    }

    async fn clear(&self, batch: &Batch, remote: &str) -> Result<(), Failure> {
        if remote == NOTHING {
            return Ok(());
        }
        let desk = self.desk(batch)?;
        let answer = match desk.json(Request::get(desk.api.batch(remote))).await {
            // Whoever deleted it has seen to that.
            Err(failure) if failure.class == FailureClass::NotFound => return Ok(()),
            told => told?,
        };
        desk.delete(&desk.api.files(&answer)).await
    }

    async fn cancel(&self, batch: &Batch, remote: &str) -> Result<(), Failure> {
        if remote == NOTHING {
            return Ok(());
        }
        let desk = self.desk(batch)?;
        let Err(failed) = desk.calls.json(desk.api.cancel(remote), &[]).await else { return Ok(()) };
        // One that has ended by itself cannot be ended.
        match desk.state(remote).await? {
            State::Works => Err(failed.fault.into_failure()),
            State::Ended { .. } | State::Refused { .. } => Ok(()),
        }
    }
}

impl Desk<'_> {
    /// An item as its provider is to be asked, or why it cannot.
    pub(super) fn encoded(&self, spec: &JobSpec) -> Result<Encoded, Fault> {
        let (endpoint, limits) = (self.calls.endpoint, self.calls.limits);
        let encoded = self.encode(spec);
        match unsupported(endpoint, spec, limits.unsupported, &encoded.left_out) {
            Some(fault) => Err(fault),
            None if encoded.body.len() > self.body_bytes_max() => {
                Err(self.calls.fault(Kind::Invalid, "takes no request in a batch that is as long as this one"))
            }
            None => Ok(encoded),
        }
    }

    pub(super) fn encode(&self, spec: &JobSpec) -> Encoded {
        let provider = &self.calls.endpoint.provider;
        self.calls.dialect.encode(spec, spec.model.backend_name(), provider, Streaming::Off)
    }

    fn bytes_max(&self) -> usize {
        self.api.bytes_max().min(BYTES_MAX)
    }

    /// The longest body of an item: it has room in a batch of its own.
    fn body_bytes_max(&self) -> usize {
        self.bytes_max() - 64 * 1024
    }

    async fn prepare(&self, batch: &Batch) -> Result<Prepared<Ready>, Refusal> {
        let mut packing = Packing::new(self.api.carrier(self.submission), self.api.items_max(), self.bytes_max());
        let (mut path, mut items, mut left) = (None, Vec::new(), Vec::new());
        for item in &batch.items {
            // Why one is left out is told when results are collected.
            let Ok(encoded) = self.encoded(&item.spec) else { continue };
            let name = (item.id, item.epoch);
            if packing.add(&self.api.item(&custom_id(item.id, item.epoch), &encoded)) {
                items.push(name);
                path.get_or_insert(encoded.path);
            } else {
                left.push(name);
            }
        }
        let Some(path) = path else {
            return Ok(Prepared { ready: Ready { request: None, file: None, items }, items: 0, left });
        };
        let mut request = packing.finish();
        let mut file = None;
        if self.api.creation(self.submission, &path, "").is_some() {
            let answer = self.calls.json(request, &said_in(batch)).await;
            let answer = answer.map_err(|failed| self.refusal(failed.fault, &items))?;
            file = self.api.name(&answer);
            let creation = file.as_deref().and_then(|file| self.api.creation(self.submission, &path, file));
            let nameless = || self.calls.fault(Kind::Transient, "took a file and did not tell its name").into_failure();
            request = creation.ok_or_else(nameless)?;
        }
        let count = items.len();
        Ok(Prepared { ready: Ready { request: Some(request), file, items }, items: count, left })
    }

    async fn create(&self, batch: &Batch, ready: Ready, hold: &Hold) -> Result<String, Unsubmitted> {
        let Some(request) = ready.request else { return Ok(NOTHING.to_owned()) };
        match self.calls.json_under(hold, request, &said_in(batch)).await {
            Ok(answer) => {
                let nameless =
                    || self.calls.fault(Kind::Transient, "made a batch and did not tell its name").into_failure();
                self.api.name(&answer).ok_or_else(|| Unsubmitted::Unclear(nameless()))
            }
            Err(Failed { fault, carried_out: CarriedOut::Perhaps }) => Err(Unsubmitted::Unclear(fault.into_failure())),
            Err(Failed { fault, carried_out }) => {
                // Another one is made with another file.
                if let Err(failure) = self.delete(ready.file.as_slice()).await {
                    tracing::warn!(tag = batch.tag, message = failure.message, "a file stays at its provider");
                }
                let refusal = self.refusal(fault, &ready.items);
                Err(if carried_out == CarriedOut::Late { Unsubmitted::Late } else { Unsubmitted::Refused(refusal) })
            }
        }
    }

    /// A refusal, and which of the items it names.
    fn refusal(&self, fault: Fault, items: &[(JobId, Epoch)]) -> Refusal {
        let failure = fault.into_failure();
        let named = named(&failure.message).into_iter().filter_map(|place| items.get(place).copied());
        Refusal { named: named.map(|item| (item, failure.clone())).collect(), failure }
    }

    /// The items on lines of what was submitted, each with what is said of it. None where that cannot be read any more.
    async fn named_in(
        &self,
        submitted: &Source,
        status: u16,
        lines: &[Line],
    ) -> Result<Vec<((JobId, Epoch), Failure)>, Failure> {
        let said: BTreeMap<u64, &Line> = lines.iter().map(|line| (line.number, line)).collect();
        let (mut number, mut named) = (0, Vec::new());
        let read = async {
            let mut results = self.calls.results(submitted).await?;
            while let Some(records) = results.next().await? {
                for record in records {
                    number += 1;
                    let name = said.get(&number).zip(record.and_then(|record| name_of(&record)));
                    if let Some((line, name)) = name {
                        named.push((name, self.refused(status, &line.body, &[]).into_failure()));
                    }
                }
            }
            Ok::<(), Fault>(())
        };
        match read.await.map_err(Fault::into_failure) {
            Err(failure) if failure.class.is_retried() => Err(failure),
            Ok(()) | Err(_) => Ok(named),
        }
    }

    /// Deletes files. Of what cannot be deleted, the first failure.
    async fn delete(&self, files: &[String]) -> Result<(), Failure> {
        let mut deleted = Ok(());
        for file in files {
            let done = self.calls.done(Request::delete(file_at(file))).await.map_err(Fault::into_failure);
            deleted = deleted.and(done.or_else(|failure| match failure.class {
                FailureClass::NotFound => Ok(()),
                _ => Err(failure),
            }));
        }
        deleted
    }

    async fn state(&self, remote: &str) -> Result<State, Failure> {
        let answer = self.json(Request::get(self.api.batch(remote))).await?;
        Ok(self.api.state(&answer))
    }

    pub(super) async fn json(&self, request: Request) -> Result<serde_json::Value, Failure> {
        self.calls.json(request, &[]).await.map_err(|failed| failed.fault.into_failure())
    }

    /// What an error in a result or in place of a whole batch means.
    pub(super) fn refused(&self, status: u16, body: &str, said: &[&str]) -> Fault {
        let error = self.calls.dialect.decode_error(body.as_bytes());
        let asked_ms = asked_ms(&HeaderMap::new(), &error, UnixMs(now_unix_ms()));
        told(self.calls.endpoint, status, error, said).asked_ms(asked_ms)
    }
}

/// What jobs of a batch say.
fn said_in(batch: &Batch) -> Vec<&str> {
    batch.items.iter().flat_map(|item| said(&item.spec)).collect()
}

/// Whom a line of what was submitted is of.
fn name_of(line: &[u8]) -> Option<(JobId, Epoch)> {
    let line: serde_json::Value = serde_json::from_slice(line).ok()?;
    read_custom_id(line["custom_id"].as_str()?)
}

#[cfg(test)]
mod tests;
