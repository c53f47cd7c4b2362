//! Submitting many jobs over one stream: bounded, in order, and safe to break at any point.
//!
//! What has been sent but not acknowledged is kept, and sent again when the stream broke. So that nothing is submitted
//! twice, items without a `request_id` get a random one.

use crate::patience::Patience;
use crate::{Client, Error, Reason, v1};
use futures_util::TryFutureExt as _;
use futures_util::stream::{BoxStream, Fuse, Stream, StreamExt as _, unfold};
use genmill_wire::MESSAGE_BYTES_MAX;
use prost::Message as _;
use std::collections::VecDeque;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};
use v1::submit_jobs_response::Outcome as Answer;

/// Unacknowledged items that are kept at most: enough for the server to work in batches.
const WINDOW_ITEMS: usize = 2_000;
/// Unacknowledged bytes that are kept at most, give or take one item.
const WINDOW_BYTES: usize = 16 * 1024 * 1024;
/// Items on their way to the transport.
const CHANNEL_ITEMS: usize = 64;

/// What became of one item of [`Client::submit_all`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acknowledgement {
    /// Which item: its position among those given, from 0.
    pub index: u64,
    /// Its `request_id`, given or drawn.
    pub request_id: String,
    /// Accepted or refused.
    pub outcome: Outcome,
}

/// Whether an item was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is stored durably.
    Accepted {
        /// The job's id.
        job_id: String,
        /// True when the `request_id` had been submitted before with the same content.
        existed: bool,
    },
    /// It was refused; the others are not affected.
    Refused(Refusal),
}

/// Why an item was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs; `None` when this client does not know it.
    pub reason: Option<Reason>,
    /// For people: what was wrong and what to do.
    pub message: String,
}

impl Client {
    /// Submits every request of a stream and yields one acknowledgement for each, in the same order. Requests are taken
    /// from the stream as the server keeps up, so it may be endless. When the connection breaks, what was not
    /// acknowledged is sent again, within the client's patience; an error is the last item.
    ///
    /// ```no_run
    /// use futures_util::{TryStreamExt as _, stream};
    /// use genmill_client::{Outcome, Request};
    ///
    /// # async fn run(client: genmill_client::Client) -> Result<(), genmill_client::Error> {
    /// let requests = (0..100_000).map(|n| Request::new("vllm_x").prompt(format!("{n} + 1 =")).request_id(format!("sum-{n}")));
    /// let mut acknowledgements = std::pin::pin!(client.submit_all(stream::iter(requests)));
    /// while let Some(acknowledgement) = acknowledgements.try_next().await? {
    ///     if let Outcome::Refused(refusal) = acknowledgement.outcome {
    ///         eprintln!("item {}: {refusal}", acknowledgement.index);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn submit_all<S>(&self, requests: S) -> impl Stream<Item = Result<Acknowledgement, Error>> + Send + use<S>
    where
        S: Stream + Send + Unpin + 'static,
        S::Item: Into<v1::GenerationRequest> + Send,
    {
        let submission = Submission {
            client: self.clone(),
            source: requests.fuse(),
            window: Window::default(),
            connection: None,
            patience: Patience::new(self.patience()),
            failed: false,
        };
        unfold(submission, |mut submission| async move {
            if submission.failed {
                return None;
            }
            let item = submission.next().await.transpose()?;
            submission.failed = item.is_err();
            Some((item, submission))
        })
    }
}

struct Submission<S> {
    client: Client,
    source: Fuse<S>,
    window: Window,
    connection: Option<Connection>,
    patience: Patience,
    failed: bool,
}

/// One stream to the server.
struct Connection {
    /// `None` when everything has been sent, or nobody listens any more.
    to_server: Option<mpsc::Sender<v1::SubmitJobsRequest>>,
    answers: BoxStream<'static, Result<v1::SubmitJobsResponse, Status>>,
    /// How many items of the window this stream has carried.
    sent: usize,
    /// How many answers it has brought.
    answered: u64,
}

enum Step {
    Answered(Option<Result<v1::SubmitJobsResponse, Status>>),
    Sent { listening: bool },
    Taken,
}

impl<S> Submission<S>
where
    S: Stream + Send + Unpin,
    S::Item: Into<v1::GenerationRequest> + Send,
{
    async fn next(&mut self) -> Result<Option<Acknowledgement>, Error> {
        loop {
            if let Some(acknowledgement) = self.refuse_oversized() {
                return Ok(Some(acknowledgement));
            }
            if self.source.is_done() && self.window.items.is_empty() {
                return Ok(None);
            }
            match self.step().await {
                Step::Taken => {}
                Step::Sent { listening } => self.note_sent(listening),
                Step::Answered(Some(Ok(response))) => {
                    if let Some(acknowledgement) = self.acknowledge(response).await? {
                        return Ok(Some(acknowledgement));
                    }
                }
                Step::Answered(Some(Err(status))) => self.wait(self.client.error(status)).await?,
                Step::Answered(None) => {
                    let early = Status::unavailable("the stream ended early");
                    self.wait(self.client.error(early)).await?;
                }
            }
        }
    }

    /// Does the one thing that can be done first: take an item, send one, or receive an answer.
    async fn step(&mut self) -> Step {
        let done = self.source.is_done();
        let connection = self.connection.get_or_insert_with(|| Connection::open(&self.client));
        let unsent = self.window.items.get(connection.sent);
        if done && unsent.is_none() {
            // Tells the server that no more will come.
            connection.to_server = None;
        }
        let may_take = !done && unsent.is_none() && self.window.has_room();
        let may_send = unsent.is_some() && connection.to_server.is_some();
        let Connection { to_server, answers, .. } = connection;
        tokio::select! {
            answer = answers.next() => Step::Answered(answer),
            listening = send(to_server.as_ref(), unsent), if may_send => Step::Sent { listening },
            request = self.source.next(), if may_take => {
                request.into_iter().for_each(|request| self.window.push(request.into()));
                Step::Taken
            }
        }
    }

    fn note_sent(&mut self, listening: bool) {
        if let Some(connection) = &mut self.connection {
            if listening {
                connection.sent += 1;
            } else {
                // The stream broke; its answers will tell why.
                connection.to_server = None;
            }
        }
    }

    /// Takes the oldest item off the window when it is too large to be sent.
    fn refuse_oversized(&mut self) -> Option<Acknowledgement> {
        let bytes = self.window.items.front()?.bytes;
        if bytes <= MESSAGE_BYTES_MAX {
            return None;
        }
        if let Some(connection) = &mut self.connection {
            connection.sent = connection.sent.saturating_sub(1);
        }
        let message = format!("the request has {bytes} bytes; a message may have {MESSAGE_BYTES_MAX}");
        let refusal = Refusal { reason: Some(Reason::TooLarge), message };
        self.window.pop(Outcome::Refused(refusal))
    }

    /// Takes the oldest item off the window: the one that `response` is about.
    async fn acknowledge(&mut self, response: v1::SubmitJobsResponse) -> Result<Option<Acknowledgement>, Error> {
        let connection = self.connection.as_mut().filter(|connection| connection.answered == response.index);
        let Some(connection) = connection.filter(|connection| connection.sent > 0) else {
            return Err(Error::Protocol { problem: "an acknowledgement that is not for the oldest item" });
        };
        let outcome = match response.outcome {
            Some(Answer::JobId(job_id)) => Outcome::Accepted { job_id, existed: response.existed },
            Some(Answer::Refusal(refusal)) => {
                Outcome::Refused(Refusal { reason: Reason::from_name(&refusal.reason), message: refusal.message })
            }
            None => return Err(Error::Protocol { problem: "an acknowledgement without outcome" }),
        };
        if let Outcome::Refused(Refusal { reason: Some(Reason::QueueUnavailable), message }) = outcome {
            self.wait(Error::Refused { reason: Reason::QueueUnavailable, message }).await?;
            return Ok(None);
        }
        connection.answered += 1;
        connection.sent -= 1;
        self.patience.reset();
        Ok(self.window.pop(outcome))
    }

    /// Gives the stream up, and waits before another one is opened, if that can help.
    async fn wait(&mut self, error: Error) -> Result<(), Error> {
        self.connection = None;
        if !error.is_passing() {
            return Err(error);
        }
        let delay = self.patience.after_failure(Instant::now()).ok_or(error)?;
        sleep(delay).await;
        Ok(())
    }
}

impl Connection {
    fn open(client: &Client) -> Self {
        let (to_server, requests) = mpsc::channel(CHANNEL_ITEMS);
        let mut jobs = client.jobs();
        // Opened only as answers are asked for: a server may answer the call itself after the first item alone.
        let opening = async move { jobs.submit_jobs(ReceiverStream::new(requests)).await };
        let answers = opening.map_ok(Response::into_inner).try_flatten_stream().boxed();
        Self { to_server: Some(to_server), answers, sent: 0, answered: 0 }
    }
}

/// Sends an item. False when nobody listens any more.
async fn send(to_server: Option<&mpsc::Sender<v1::SubmitJobsRequest>>, item: Option<&Item>) -> bool {
    let (Some(to_server), Some(item)) = (to_server, item) else { return false };
    if item.bytes > MESSAGE_BYTES_MAX {
        // Skipped: it is refused when its turn comes.
        return true;
    }
    let permit = to_server.reserve().await;
    permit.map(|permit| permit.send(v1::SubmitJobsRequest { request: Some(item.request.clone()) })).is_ok()
}

/// The items that have been taken and not acknowledged, oldest first.
struct Window {
    items: VecDeque<Item>,
    bytes: usize,
    taken: u64,
    drawn_prefix: String,
}

struct Item {
    index: u64,
    request: v1::GenerationRequest,
    bytes: usize,
}

impl Default for Window {
    fn default() -> Self {
        // The standard library's hash keys are random; there is no other source of random numbers in it.
        let random = || RandomState::new().build_hasher().finish();
        let drawn_prefix = format!("{:016x}{:016x}", random(), random());
        Self { items: VecDeque::new(), bytes: 0, taken: 0, drawn_prefix }
    }
}

impl Window {
    fn has_room(&self) -> bool {
        self.items.len() < WINDOW_ITEMS && self.bytes < WINDOW_BYTES
    }

    fn push(&mut self, mut request: v1::GenerationRequest) {
        let index = self.taken;
        self.taken += 1;
        if request.request_id.is_empty() {
            request.request_id = format!("{}-{index}", self.drawn_prefix);
        }
        // The message around the request adds a tag and a length.
        let bytes = request.encoded_len() + 8;
        self.bytes += bytes;
        self.items.push_back(Item { index, request, bytes });
    }

    fn pop(&mut self, outcome: Outcome) -> Option<Acknowledgement> {
        let Item { index, request, bytes } = self.items.pop_front()?;
        self.bytes -= bytes;
        Some(Acknowledgement { index, request_id: request.request_id, outcome })
    }
}
