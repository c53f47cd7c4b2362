//! `WatchJob`: a job's text as it comes, from any offset, and the job when it has ended.

use super::Answers;
use crate::hub::Bell;
use crate::mill::{Mill, api_error};
use genmill_core::ids::JobId;
use genmill_core::job::Job;
use genmill_core::samples;
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::v1::watch_job_response::Event;
use genmill_wire::{from_pb, to_pb, v1};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Events that may wait for a slow watcher.
const EVENTS_MAX: usize = 16;

/// The longest piece of text in one event, in bytes; far below what a message may have.
const PIECE_BYTES_MAX: usize = 256 * 1024;

/// The job is read this often at least, in case an event was lost.
const LOOK_EVERY: Duration = Duration::from_secs(5);

type Out = mpsc::Sender<Result<v1::WatchJobResponse, Status>>;

pub(super) async fn serve(mill: Mill, asked: v1::WatchJobRequest) -> Result<Answers<v1::WatchJobResponse>, Status> {
    let id = from_pb::job_id(&asked.job_id)?;
    let bell = mill.hub.bell(id);
    // An unknown job is an error of the call, not of its stream.
    let job = mill.queue.get(id).await.map_err(api_error)?;
    let count = usize::try_from(job.spec.sampling.controls.samples().max(1)).unwrap_or(1);
    let (out, answers) = mpsc::channel(EVENTS_MAX);
    let wanted = std::iter::once(asked.offset).chain(asked.more_offsets).chain(std::iter::repeat(0));
    // The text of one sample is read from where it is wanted on; those of several lie in one log, which is read whole.
    let log = if count == 1 { asked.offset } else { 0 };
    let places = wanted.take(count).map(|wanted| Place { wanted, read: log }).collect();
    let watcher = Watcher { mill: mill.clone(), id, epoch: asked.epoch, log, places, out };
    mill.shutdown.spawn(watcher.run(bell));
    Ok(Box::pin(ReceiverStream::new(answers)))
}

/// Where a watcher stands.
struct Watcher {
    mill: Mill,
    id: JobId,
    epoch: u32,
    /// Bytes of the running text that were read.
    log: u64,
    /// Of each sample.
    places: Vec<Place>,
    out: Out,
}

/// Where a watcher stands in the text of a sample, in bytes.
#[derive(Clone, Copy, Default)]
struct Place {
    /// What is to be sent next.
    wanted: u64,
    /// What was read of it.
    read: u64,
}

/// Why a watcher ends before the job does.
enum Ended {
    /// Its caller has gone.
    Gone,
    /// It has to tell its caller.
    Failed(Status),
}

impl<T> From<mpsc::error::SendError<T>> for Ended {
    fn from(_: mpsc::error::SendError<T>) -> Self {
        Self::Gone
    }
}

impl From<ApiError> for Ended {
    fn from(error: ApiError) -> Self {
        Self::Failed(error.into())
    }
}

impl Watcher {
    async fn run(mut self, mut bell: Bell) {
        let stop = self.mill.shutdown.token();
        let out = self.out.clone();
        let ended = tokio::select! {
            ended = self.follow(&mut bell) => ended,
            () = out.closed() => Err(Ended::Gone),
            () = stop.cancelled() => {
                let message = "this scheduler stops: watch on from the last offset, at another one or later";
                Err(ApiError::new(Reason::QueueUnavailable, message).into())
            }
        };
        if let Err(Ended::Failed(status)) = ended {
            // Whoever has gone meanwhile needs no error.
            drop(out.try_send(Err(status)));
        }
    }

    async fn follow(&mut self, bell: &mut Bell) -> Result<(), Ended> {
        loop {
            if self.look().await? {
                return Ok(());
            }
            drop(tokio::time::timeout(LOOK_EVERY, bell.rung()).await);
        }
    }

    /// Sends what is new; true when the job has ended.
    async fn look(&mut self) -> Result<bool, Ended> {
        let mut seen = self.mill.queue.watch(self.id, self.log).await.map_err(api_error)?;
        if self.epoch != 0 && seen.epoch.0 != self.epoch {
            self.log = 0;
            self.places.fill(Place::default());
            let restarted = v1::Restarted { epoch: seen.epoch.0 };
            self.send(Event::Restarted(restarted)).await?;
            self.epoch = seen.epoch.0;
            seen = self.mill.queue.watch(self.id, 0).await.map_err(api_error)?;
            if seen.epoch.0 != self.epoch {
                // It restarted once more in between; the next look says so.
                return Box::pin(self.look()).await;
            }
        }
        let same_attempt = self.epoch == seen.epoch.0;
        self.epoch = seen.epoch.0;
        if seen.state.is_final() {
            let job = self.mill.queue.get(self.id).await.map_err(api_error)?;
            self.end(job).await?;
            return Ok(true);
        }
        if self.log > seen.text_bytes {
            // It was there before: Redis has lost the end of the text, and the worker sends it again.
            if same_attempt {
                return Ok(false);
            }
            return Err(bad_offset(self.log, seen.text_bytes).into());
        }
        let text = std::str::from_utf8(&seen.text).map_err(|_| bad_offset(self.log, seen.text_bytes))?;
        let (parts, taken) = if self.places.len() == 1 { (vec![(0, text)], text.len()) } else { samples::parts(text) };
        self.log += bytes(taken);
        for (sample, text) in parts {
            self.pass_on(sample, text).await?;
        }
        match self.places.iter().find(|place| place.wanted > place.read) {
            Some(place) if !same_attempt => Err(bad_offset(place.wanted, place.read).into()),
            _ => Ok(false),
        }
    }

    /// Sends what is wanted of a piece of a sample's text.
    async fn pass_on(&mut self, sample: u32, text: &str) -> Result<(), Ended> {
        let Some(place) = self.places.get_mut(index(sample)) else { return Ok(()) };
        let known = place.wanted.saturating_sub(place.read);
        place.read += bytes(text.len());
        let (wanted, read) = (place.wanted, place.read);
        match usize::try_from(known) {
            Ok(known) if known <= text.len() => {
                let rest = text.get(known..).ok_or_else(|| bad_offset(wanted, read))?;
                self.send_text(sample, rest).await
            }
            _ => Ok(()),
        }
    }

    async fn end(&mut self, job: Job) -> Result<(), Ended> {
        if let Some(generation) = &job.generation {
            for (sample, place) in (0..).zip(self.places.clone()) {
                let text = generation.text_of(index(sample)).unwrap_or_default();
                let rest = usize::try_from(place.wanted).ok().and_then(|wanted| text.get(wanted..));
                let rest = rest.ok_or_else(|| bad_offset(place.wanted, bytes(text.len())))?;
                self.send_text(sample, rest).await?;
            }
        }
        self.send(Event::Job(to_pb::job(job))).await
    }

    async fn send_text(&mut self, sample: u32, mut text: &str) -> Result<(), Ended> {
        while !text.is_empty()
            && let Some(place) = self.places.get_mut(index(sample))
        {
            let (piece, rest) = text.split_at(text.floor_char_boundary(PIECE_BYTES_MAX));
            let delta = v1::TextDelta { epoch: self.epoch, offset: place.wanted, text: piece.to_owned(), sample };
            place.wanted += bytes(piece.len());
            self.send(Event::Text(delta)).await?;
            text = rest;
        }
        Ok(())
    }

    async fn send(&self, event: Event) -> Result<(), Ended> {
        Ok(self.out.send(Ok(v1::WatchJobResponse { event: Some(event) })).await?)
    }
}

fn bad_offset(offset: u64, bytes: u64) -> ApiError {
    let message =
        format!("offset: {offset} is beyond the text, which has {bytes} bytes, or inside one of its characters");
    ApiError::new(Reason::InvalidRequest, message)
}

fn bytes(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

fn index(sample: u32) -> usize {
    usize::try_from(sample).unwrap_or(usize::MAX)
}
