//! The loop of a lane whose jobs go out in batches: it fills them, holds them, and takes over those that nobody holds.
//!
//! Never here: what becomes of a batch once it is full (`batch`).

use crate::batch::{Driver, Told};
use crate::batches::{BatchOffer, PerformBatches};
use crate::hold::Moment;
use crate::lane::LEAVE_WITHIN;
use crate::refusal::tag_of;
use crate::run::Options;
use futures_util::future::join_all;
use genmill_core::gate::KeyId;
use genmill_core::ids::{Epoch, LaneNumber};
use genmill_core::model::ModelName;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_queue::{BatchRecord, BatchState, Held, Lease, Parking, Queue, QueueError, Room, Slots};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

/// How often it looks for jobs.
const CLAIM_EVERY: Duration = Duration::from_secs(1);

/// How many jobs are claimed together.
const CLAIM_MAX: u32 = 500;

/// So many batches of a lane are held at most when another one is begun. Further jobs wait in the queue, where they can be cancelled for nothing.
const BATCHES_MAX: usize = 20;

/// So many of a lane are held at most with those that were taken over: what another worker has left, and parts of batches that
/// were refused, must not wait for a day until others have ended.
const HELD_MAX: usize = 2 * BATCHES_MAX;

/// How batches are timed.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// How long a batch is filled, unless it is full before.
    pub fill: Duration,
    /// How long between two looks at what a provider works on.
    pub poll: Duration,
    /// How long is searched for a batch that may have been submitted, before it is submitted again.
    pub settle: Duration,
}

/// Serves the lanes whose jobs go out in batches until `stop` is cancelled. What was submitted is taken over by others then.
///
/// # Errors
/// [`QueueError`] when Redis does not answer at the start.
pub(crate) async fn run<P: PerformBatches>(
    queue: Queue,
    performer: Arc<P>,
    options: Arc<Options>,
    times: Batching,
    stop: CancellationToken,
) -> Result<(), QueueError> {
    let mut lanes = Vec::new();
    for offer in performer.batch_offers() {
        let number = queue.open_lane(&offer.lane).await?;
        let (queue, performer, options) = (queue.clone(), performer.clone(), options.clone());
        let tasks = JoinSet::new();
        lanes.push(BatchLane {
            queue,
            performer,
            options,
            times,
            offer,
            number,
            holds: BTreeMap::new(),
            filled: HashMap::new(),
            tasks,
            unparked: Vec::new(),
        });
    }
    join_all(lanes.into_iter().map(|lane| lane.run(&stop))).await;
    Ok(())
}

/// A batch that this worker holds.
struct Holds {
    epoch: Epoch,
    told: Arc<Told>,
    task: AbortHandle,
}

/// A batch that is being filled.
struct Filled {
    tag: String,
    until: Instant,
    jobs: usize,
    bytes: usize,
}

struct BatchLane<P> {
    queue: Queue,
    performer: Arc<P>,
    options: Arc<Options>,
    times: Batching,
    offer: BatchOffer,
    number: LaneNumber,
    /// By tag.
    holds: BTreeMap<String, Holds>,
    filled: HashMap<ModelName, Filled>,
    tasks: JoinSet<()>,
    /// Claimed, but Redis did not take them into a batch yet.
    unparked: Vec<Lease>,
}

impl<P: PerformBatches> BatchLane<P> {
    async fn run(mut self, stop: &CancellationToken) {
        let mut claims = interval(CLAIM_EVERY);
        let mut beats = interval(Duration::from_millis(self.options.heartbeat_ms));
        for ticks in [&mut claims, &mut beats] {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        while !stop.is_cancelled() {
            let done = tokio::select! {
                () = stop.cancelled() => break,
                _ = beats.tick() => self.beat().await,
                _ = claims.tick() => self.claim().await,
                Some(ended) = self.tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(lane = %self.offer.lane, %error, "a batch's task panicked; it is taken up again");
                    }
                    // One that ended before it was done is not renewed, and so taken over after its lease.
                    self.holds.retain(|_, holds| !holds.task.is_finished());
                    Ok(())
                }
            };
            if let Err(error) = done {
                tracing::warn!(lane = %self.offer.lane, error = error.in_full(), "cannot serve a lane of batches; trying again");
            }
        }
        self.leave().await;
    }

    /// Renews its hold, and takes over what nobody holds.
    async fn beat(&mut self) -> Result<(), QueueError> {
        let worker = &self.options.worker;
        // It runs nothing by leases: with no places of its own nothing is fed before it is claimed.
        self.queue.heartbeat(self.number, worker, Slots::default(), self.options.lease_ms, &[]).await?;
        let held: Vec<(String, Epoch)> = self.holds.iter().map(|(tag, holds)| (tag.clone(), holds.epoch)).collect();
        let named: Vec<(&str, Epoch)> = held.iter().map(|(tag, epoch)| (tag.as_str(), *epoch)).collect();
        let most = HELD_MAX.saturating_sub(held.len());
        let until = Moment::now().later(self.options.lease_ms);
        let (wanted, taken) = self.queue.hold_batches(self.number, worker, self.options.lease_ms, most, &named).await?;
        for ((tag, _), wanted) in held.iter().zip(wanted) {
            match (wanted, self.holds.get(tag)) {
                (Some(wanted), Some(holds)) => {
                    holds.told.wanted.store(wanted, Ordering::Relaxed);
                    holds.told.until.send_replace(until);
                }
                (None, Some(holds)) if !holds.task.is_finished() => {
                    tracing::warn!(tag, "another worker holds this batch now");
                    holds.task.abort();
                    self.holds.remove(tag);
                }
                (_, _) => {}
            }
        }
        for record in taken {
            tracing::info!(tag = record.tag, model = %record.model, state = ?record.state, "took over a batch");
            let left = record.filled_until.ms_since(UnixMs(now_unix_ms())).min(millis(self.times.fill));
            self.hold(record, Instant::now() + Duration::from_millis(left), until);
        }
        Ok(())
    }

    fn hold(&mut self, record: BatchRecord, filled_until: Instant, until: Moment) {
        let told = Arc::new(Told::new(record.jobs.max(1), until));
        let (tag, epoch) = (record.tag.clone(), record.epoch);
        let driver = Driver {
            queue: self.queue.clone(),
            performer: self.performer.clone(),
            worker: self.options.worker.clone(),
            lane: self.number,
            lease_ms: self.options.lease_ms,
            policy: self.options.policy,
            times: self.times,
            record,
            told: told.clone(),
            failed: 0,
        };
        let task = self.tasks.spawn(driver.run(filled_until));
        self.holds.insert(tag, Holds { epoch, told, task });
    }

    /// Moves what waits into batches.
    async fn claim(&mut self) -> Result<(), QueueError> {
        let keys: Vec<KeyId> = self.offer.key.iter().cloned().collect();
        while self.holds.len() < BATCHES_MAX {
            let mut all = false;
            if self.unparked.is_empty() {
                let room = Room { free: CLAIM_MAX, tokens: None, keys: &keys };
                self.unparked =
                    self.queue.claim(self.number, &self.options.worker, room, self.options.lease_ms).await?;
                all = self.unparked.len() < CLAIM_MAX as usize;
            }
            self.unparked.sort_by(|a, b| a.spec.model.cmp(&b.spec.model));
            while let Some(first) = self.unparked.first() {
                let model = first.spec.model.clone();
                let count = self.unparked.partition_point(|lease| lease.spec.model == model);
                // Those that Redis does not take are tried again, for as long as their leases last.
                let leases: Vec<Lease> = self.unparked[..count].to_vec();
                let filled = self.fill(&model, &leases).await;
                if filled.as_ref().is_err_and(QueueError::is_passing) {
                    return filled;
                }
                self.unparked.drain(..count);
                filled?;
            }
            if all {
                break;
            }
        }
        Ok(())
    }

    /// Puts jobs of a model into its batch that is being filled, and into new ones once that is full.
    async fn fill(&mut self, model: &ModelName, leases: &[Lease]) -> Result<(), QueueError> {
        let mut left = leases;
        while let Some(first) = left.first() {
            let fresh = match self.filled.get(model) {
                Some(filled) => Instant::now() >= filled.until || !self.holds.contains_key(&filled.tag),
                None => true,
            };
            if fresh {
                let until = Instant::now() + self.times.fill;
                let tag = tag_of(first.held(), None);
                self.filled.insert(model.clone(), Filled { tag, until, jobs: 0, bytes: 0 });
            }
            let Some(filled) = self.filled.get_mut(model) else { return Ok(()) };
            let count = fits(&self.offer, filled.jobs, filled.bytes, left.iter().map(bytes_of));
            let (now, later) = left.split_at(count);
            let held_until = Moment::now().later(self.options.lease_ms);
            if !now.is_empty() {
                let parking = Parking {
                    tag: &filled.tag,
                    model,
                    key: self.offer.key.as_ref(),
                    lease_ms: self.options.lease_ms,
                    fill_ms: millis(self.times.fill),
                };
                let held: Vec<Held> = now.iter().map(Lease::held).collect();
                let Some(parked) = self.queue.park(self.number, &self.options.worker, parking, &held).await? else {
                    self.filled.remove(model);
                    if fresh {
                        // These leases began this very batch before, and it has gone on since: somebody else has it.
                        return Ok(());
                    }
                    continue;
                };
                filled.jobs += parked.len();
                filled.bytes += now.iter().map(bytes_of).sum::<usize>();
            }
            let (tag, until, jobs) = (filled.tag.clone(), filled.until, filled.jobs as u64);
            if fresh {
                self.hold(self.made(&tag, model, jobs), until, held_until);
            }
            left = later;
            if !left.is_empty() {
                // It is full.
                if let Some(holds) = self.holds.get(&tag) {
                    holds.told.full.notify_one();
                }
                self.filled.remove(model);
            }
        }
        Ok(())
    }

    /// The record of a batch as the first call that filled it made it.
    fn made(&self, tag: &str, model: &ModelName, jobs: u64) -> BatchRecord {
        let now = UnixMs(now_unix_ms());
        BatchRecord {
            tag: tag.to_owned(),
            epoch: Epoch(1),
            state: BatchState::Intent,
            model: model.clone(),
            key: self.offer.key.clone(),
            made_at: now,
            filled_until: now,
            full: false,
            tried: false,
            items: None,
            remote: None,
            jobs,
        }
    }

    /// Lets go of all its batches, so that another worker takes them over at once.
    async fn leave(mut self) {
        self.tasks.shutdown().await;
        let held: Vec<(&str, Epoch)> = self.holds.iter().map(|(tag, holds)| (tag.as_str(), holds.epoch)).collect();
        let worker = &self.options.worker;
        let leaving = async {
            self.queue.hold_batches(self.number, worker, 0, 0, &held).await?;
            self.queue.leave(self.number, worker).await
        };
        if !matches!(timeout(LEAVE_WITHIN, leaving).await, Ok(Ok(_))) {
            tracing::warn!(lane = %self.offer.lane, "left without saying so; its batches are taken over after their lease");
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn bytes_of(lease: &Lease) -> usize {
    lease.spec.bytes()
}

/// How many of the next jobs fit into a batch that has so many and so much already. At least one into an empty one.
fn fits(offer: &BatchOffer, jobs: usize, bytes: usize, next: impl Iterator<Item = usize>) -> usize {
    let sums = next.scan(bytes, |sum, bytes| {
        *sum += bytes;
        Some(*sum)
    });
    let count = sums.take(offer.items_max.saturating_sub(jobs)).take_while(|sum| *sum <= offer.bytes_max).count();
    if jobs == 0 { count.max(1) } else { count }
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_core::model::Lane;

    #[test]
    fn a_batch_takes_what_fits() {
        let lane = Lane { prefix: "p".to_owned(), route: "r".to_owned() };
        let offer = BatchOffer { lane, key: None, items_max: 5, bytes_max: 100 };
        for (jobs, bytes, next, expect) in [
            (0, 0, vec![10; 7], 5),
            (4, 40, vec![10; 7], 1),
            (5, 50, vec![10; 7], 0),
            (0, 0, vec![40, 40, 40], 2),
            (2, 80, vec![40], 0),
            (0, 0, vec![1_000, 1], 1),
        ] {
            assert_eq!(fits(&offer, jobs, bytes, next.into_iter()), expect, "{jobs} {bytes}");
        }
    }
}
