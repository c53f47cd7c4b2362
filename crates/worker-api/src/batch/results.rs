//! Reads what a batch came to, and tells of each item once. Never here: where it is to be read (`perform`).

use super::perform::Desk;
use super::{Answer, Answered, Source, Turns, custom_id, is_custom_id};
use crate::call::{Ended, said, told};
use crate::collect::Collected;
use crate::failure::{Fault, Kind};
use crate::perform::performed;
use crate::prices::Class;
use genmill_core::attempt::{Failure, FailureClass, Outcome, Performed};
use genmill_core::job::JobSpec;
use genmill_core::money::Cost;
use genmill_worker::batches::{Arrived, Item};
use std::collections::BTreeMap;
use tokio::sync::mpsc;

/// The reading of what a batch came to.
pub(super) struct Collecting<'a> {
    desk: &'a Desk<'a>,
    turns: Turns,
    /// The items of which nothing was told yet.
    wanted: BTreeMap<String, &'a Item>,
    results: mpsc::Sender<Arrived>,
    /// How many results were read, of whatever items.
    understood: usize,
    /// How many that are none.
    strange: usize,
}

impl<'a> Collecting<'a> {
    pub(super) fn new(desk: &'a Desk<'a>, items: &'a [Item], turns: Turns, results: mpsc::Sender<Arrived>) -> Self {
        let wanted = items.iter().map(|item| (custom_id(item.id, item.epoch), item)).collect();
        Self { desk, turns, wanted, results, understood: 0, strange: 0 }
    }

    pub(super) async fn collect(mut self, sources: &[Source]) -> Result<(), Failure> {
        for source in sources {
            self.read(source).await?;
        }
        if self.strange > 0 {
            let (provider, strange) = (&self.desk.calls.endpoint.name, self.strange);
            tracing::warn!(provider, strange, "what a batch came to has parts that are no results");
        }
        if self.strange > 1 && self.understood == 0 {
            // To be submitted again they would be paid again, and again not be understood.
            let what = "told what a batch came to in a way that is not understood";
            return Err(self.desk.calls.fault(Kind::Invalid, what).into_failure());
        }
        self.tell_rest().await
    }

    /// Sends on what can be read at one source, each result once.
    async fn read(&mut self, source: &Source) -> Result<(), Failure> {
        let mut results = self.desk.calls.results(source).await.map_err(Fault::into_failure)?;
        while let Some(records) = results.next().await.map_err(Fault::into_failure)? {
            for record in records {
                let answered = record.and_then(|record| self.desk.api.result(&record));
                match answered.filter(|answered| is_custom_id(&answered.custom_id)) {
                    Some(answered) => self.take(&answered).await?,
                    None => self.strange += 1,
                }
            }
        }
        Ok(())
    }

    async fn take(&mut self, answered: &Answered) -> Result<(), Failure> {
        self.understood += 1;
        // One may come twice, or be of a job that is not wanted any more.
        let Some(item) = self.wanted.get(&answered.custom_id).copied() else { return Ok(()) };
        let performed = self.performed(item, answered);
        self.wanted.remove(&answered.custom_id);
        self.send(item, performed).await
    }

    async fn send(&self, item: &Item, performed: Performed) -> Result<(), Failure> {
        let sent = self.results.send(Arrived { id: item.id, epoch: item.epoch, performed }).await;
        sent.map_err(|_| Failure::new(FailureClass::Transient, "what a batch came to is not taken any more"))
    }

    /// What came of an item.
    fn performed(&self, item: &Item, answered: &Answered) -> Performed {
        let calls = &self.desk.calls;
        let sampling = &item.spec.sampling;
        let mut collected = Collected::new(&sampling.stop).of_samples(sampling.controls.samples());
        let ended = match &answered.answer {
            Answer::Body(body) => match calls.dialect.decode(body.as_bytes()) {
                Ok(reply) => {
                    collected.take_reply(reply, 0);
                    Ended::Answered
                }
                Err(error) => Ended::Broken(told(calls.endpoint, 200, error, &said(&item.spec))),
            },
            Answer::Refused { status, body } => Ended::Refused(self.desk.refused(*status, body, &said(&item.spec))),
            Answer::GivenUp if self.turns != Turns::All => return no_turn(),
            Answer::GivenUp => Ended::Refused(calls.fault(Kind::Transient, "gave the request up")),
        };
        collected.left_out(&self.desk.encode(&item.spec).left_out);
        let cost = self.cost(&item.spec, &ended, &collected);
        let mut performed = performed(ended, collected, cost);
        // When the first of it was there, nobody knows; and what it tells of limits is not about those of single calls.
        performed.observation = None;
        if let Outcome::Generated(generation) = &mut performed.outcome {
            generation.first_token_ms = None;
        }
        performed
    }

    /// What an item cost, at the price of batches. Never an estimate.
    fn cost(&self, spec: &JobSpec, ended: &Ended, collected: &Collected) -> Option<Cost> {
        if matches!(ended, Ended::Refused(_)) {
            return Some(Cost::NOTHING);
        }
        let amount = collected.billed().or_else(|| {
            let usage = collected.usage()?;
            self.desk.performer.priced(self.desk.calls.endpoint, spec, Class::Batch, collected, &usage)
        });
        amount.map(Cost::exact)
    }

    /// Tells of the items of which the provider told nothing.
    async fn tell_rest(&self) -> Result<(), Failure> {
        for item in self.wanted.values() {
            let performed = match (self.desk.encoded(&item.spec), self.turns) {
                // It was not submitted, because it cannot be asked.
                (Err(fault), _) => failed(fault, Some(Cost::NOTHING)),
                (Ok(_), Turns::Some) => no_turn(),
                // It may have been paid for. That counts as a failure, lest it be so again and again.
                (Ok(_), Turns::All | Turns::Told) => {
                    let what = "ended a batch and did not tell what came of the request";
                    failed(self.desk.calls.fault(Kind::Transient, what), None)
                }
            };
            self.send(item, performed).await?;
        }
        Ok(())
    }
}

fn failed(fault: Fault, cost: Option<Cost>) -> Performed {
    Performed { outcome: Outcome::Failed(fault.into_failure()), cost, observation: None }
}

/// The batch ended before its turn.
fn no_turn() -> Performed {
    Performed { outcome: Outcome::HandedBack, cost: Some(Cost::NOTHING), observation: None }
}
