//! `WatchJob`: a job's text as it comes, from any offset, and the job when it has ended.

use super::Answers;
use crate::hub::Bell;
use crate::mill::{Mill, api_error};
use genmill_core::ids::JobId;
use genmill_core::job::Job;
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
    mill.queue.watch(id, 0).await.map_err(api_error)?;
    let (out, answers) = mpsc::channel(EVENTS_MAX);
    let watcher = Watcher { mill: mill.clone(), id, epoch: asked.epoch, offset: asked.offset, out };
    mill.shutdown.spawn(watcher.run(bell));
    Ok(Box::pin(ReceiverStream::new(answers)))
}

/// Where a watcher stands.
struct Watcher {
    mill: Mill,
    id: JobId,
    epoch: u32,
    offset: u64,
    out: Out,
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
        let mut seen = self.mill.queue.watch(self.id, self.offset).await.map_err(api_error)?;
        if self.epoch != 0 && seen.epoch.0 != self.epoch {
            self.offset = 0;
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
        if self.offset > seen.text_bytes {
            // It was there before: Redis has lost the end of the text, and the worker sends it again.
            if same_attempt {
                return Ok(false);
            }
            return Err(self.bad_offset(seen.text_bytes).into());
        }
        let text = std::str::from_utf8(&seen.text).map_err(|_| self.bad_offset(seen.text_bytes))?;
        self.send_text(text).await?;
        Ok(false)
    }

    async fn end(&mut self, job: Job) -> Result<(), Ended> {
        if let Some(generation) = &job.generation {
            let text = &generation.text;
            let offset = usize::try_from(self.offset).unwrap_or(usize::MAX);
            let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
            let rest = text.get(offset..).ok_or_else(|| self.bad_offset(bytes))?;
            self.send_text(rest).await?;
        }
        self.send(Event::Job(to_pb::job(job))).await
    }

    async fn send_text(&mut self, mut text: &str) -> Result<(), Ended> {
        while !text.is_empty() {
            let (piece, rest) = text.split_at(text.floor_char_boundary(PIECE_BYTES_MAX));
            let delta = v1::TextDelta { epoch: self.epoch, offset: self.offset, text: piece.to_owned() };
            self.offset += u64::try_from(piece.len()).unwrap_or(0);
            self.send(Event::Text(delta)).await?;
            text = rest;
        }
        Ok(())
    }

    async fn send(&self, event: Event) -> Result<(), Ended> {
        Ok(self.out.send(Ok(v1::WatchJobResponse { event: Some(event) })).await?)
    }

    fn bad_offset(&self, bytes: u64) -> ApiError {
        let offset = self.offset;
        let message =
            format!("offset: {offset} is beyond the text, which has {bytes} bytes, or inside one of its characters");
        ApiError::new(Reason::InvalidRequest, message)
    }
}
