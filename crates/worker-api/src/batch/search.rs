//! Searches for a batch that was submitted by somebody who could not say so. Never here: when, and what follows
//! (`genmill-worker`).

use super::perform::Desk;
use super::{Listed, Request, Source, State, Tag, custom_id};
use crate::failure::Fault;
use genmill_core::attempt::{Failure, FailureClass};
use genmill_core::time::UnixMs;
use genmill_worker::batches::{Batch, Found};
use std::collections::HashSet;
use std::time::Duration;

/// How far a provider's clock may be behind.
const CLOCKS: Duration = Duration::from_secs(24 * 60 * 60);

/// How many pages of a list are read in search of a batch.
const PAGES_MAX: usize = 1_000;

impl Desk<'_> {
    pub(super) async fn find(&self, batch: &Batch, others: &[String]) -> Result<Found, Failure> {
        let since = UnixMs(batch.since.0.saturating_sub(millis(CLOCKS)));
        let others: HashSet<&str> = others.iter().map(String::as_str).collect();
        let (mut next, mut runs) = (None, false);
        for _ in 0..PAGES_MAX {
            let answer = self.json(Request::get(self.api.list(since, next.as_deref()))).await?;
            let page = self.api.page(&answer, next.as_deref());
            let may_be = |listed: &&Listed| {
                // Time tells only where there is no tag.
                let untagged = matches!(listed.tag, Tag::InResults(_));
                let old = untagged && listed.created.is_some_and(|created| created < since);
                let another = listed.items.zip(batch.submitted).is_some_and(|(items, submitted)| items != submitted);
                !old && !another && !others.contains(listed.remote.as_str())
            };
            for listed in page.batches.iter().filter(may_be) {
                match self.is_it(listed, batch).await? {
                    Is::It => return Ok(Found::Here(listed.remote.clone())),
                    Is::Unknown => runs = true,
                    Is::Never(why) => return Ok(Found::Never(why)),
                    Is::Another => {}
                }
            }
            let Some(following) = page.next.filter(|_| !self.is_past(&page.batches, since)) else {
                return Ok(if runs { Found::NotYet } else { Found::NotThere });
            };
            next = Some(following);
        }
        let name = &self.calls.endpoint.name;
        Ok(Found::Never(format!("{name} lists more batches than are searched for one that may have been submitted")))
    }

    /// Whether all that follows in a list is older than what is sought.
    fn is_past(&self, batches: &[Listed], since: UnixMs) -> bool {
        let old = |listed: &Listed| listed.created.is_some_and(|created| created < since);
        self.api.newest_first() && batches.last().is_some_and(old)
    }

    /// Whether a batch in a list is the one that is sought.
    async fn is_it(&self, listed: &Listed, batch: &Batch) -> Result<Is, Failure> {
        let it = |is: bool| if is { Is::It } else { Is::Another };
        Ok(match &listed.tag {
            Tag::Is(tag) => it(*tag == batch.tag),
            Tag::Other => Is::Another,
            Tag::InNameOf(file) => match self.json(Request::get(file.clone())).await {
                Ok(answer) => it(answer["filename"].as_str().is_some_and(|name| name.contains(&batch.tag))),
                // Somebody deleted it, who knows it.
                Err(failure) if failure.class == FailureClass::NotFound => Is::Another,
                Err(failure) => return Err(failure),
            },
            Tag::InResults(State::Ended { sources, .. }) if sources.is_empty() => Is::Never(format!(
                "{} does not tell the results of {} any more, which may be the batch",
                self.calls.endpoint.name, listed.remote
            )),
            Tag::InResults(State::Ended { sources, .. }) => match self.has_ours(sources, batch).await {
                Ok(has) => it(has),
                Err(failure) if failure.class == FailureClass::Invalid => Is::Never(failure.message),
                Err(failure) => return Err(failure),
            },
            Tag::InResults(State::Works) => Is::Unknown,
            Tag::InResults(State::Refused { .. }) => Is::Another,
        })
    }

    /// Whether there are results of a batch's items.
    async fn has_ours(&self, sources: &[Source], batch: &Batch) -> Result<bool, Failure> {
        let ours: Vec<String> = batch.items.iter().map(|item| custom_id(item.id, item.epoch)).collect();
        let ours: HashSet<&str> = ours.iter().map(String::as_str).collect();
        for source in sources {
            let mut results = self.calls.results(source).await.map_err(Fault::into_failure)?;
            while let Some(records) = results.next().await.map_err(Fault::into_failure)? {
                let answered = |record: &Vec<u8>| self.api.result(record);
                let mut answered = records.iter().flatten().filter_map(answered);
                if answered.any(|answered| ours.contains(answered.custom_id.as_str())) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Whether a batch is the one that is sought.
enum Is {
    It,
    Another,
    /// That is told when it has ended.
    Unknown,
    /// That is never told, and why.
    Never(String),
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
