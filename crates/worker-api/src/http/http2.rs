//! HTTP/2, by the crate h2: connections that many requests share. Never here: when another connection is opened (`pool`).

use super::message::{self, Lost, Request, Response, Stage};
use super::tasks::Tasks;
use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::Method;
use http::header::{CONTENT_LENGTH, HeaderValue};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use url::Position;

/// The most requests that share a connection, also where the provider would take more: what is lost of one packet holds
/// all of them up.
const STREAMS_MAX: usize = 100;

/// How often the other end is asked whether it is still there, and how long it may take to say so. Many answers take
/// longer than this to begin.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How much a provider may send ahead of what is read: of one answer, and of all answers of a connection, in bytes.
const ANSWER_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// A connection. Copies of it are the same connection; each counts as a request on it.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    sender: SendRequest<Bytes>,
    /// How many requests the provider takes at once; its end is that of the connection.
    room: watch::Receiver<usize>,
    /// Whether it takes no more requests. The references to it are counted.
    leaving: Arc<AtomicBool>,
}

/// A request that came to nothing.
pub(super) struct Failed {
    pub(super) lost: Lost,
    /// The request, where the provider has not looked at it: it may go out again on another connection.
    pub(super) untouched: Option<Request>,
}

impl From<Lost> for Failed {
    fn from(lost: Lost) -> Self {
        Self { lost, untouched: None }
    }
}

impl Connection {
    /// Begins to speak HTTP/2.
    pub(super) async fn begin(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        tasks: &Tasks,
    ) -> Result<Self, Lost> {
        let mut builder = Builder::new();
        builder.enable_push(false).initial_window_size(ANSWER_WINDOW_BYTES);
        builder.initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        // Until the provider has said how many requests it takes, it gets none: what it has no room for would wait in here.
        builder.initial_max_send_streams(0);
        let handshake = builder.handshake(stream).await;
        let (sender, mut connection) = handshake.map_err(|error| Lost::at(Stage::Connect, error))?;
        let pings = connection.ping_pong();
        let (told, mut room) = watch::channel(0);
        // It ends when nobody can send over it any more and all answers are there.
        tasks.spawn(async move {
            let served = poll_fn(|cx| {
                let polled = Pin::new(&mut connection).poll(cx);
                let now = connection.max_concurrent_send_streams();
                told.send_if_modified(|room| std::mem::replace(room, now) != now);
                polled
            });
            let ended = tokio::select! {
                // First: after a stop of this process, what came meanwhile counts.
                biased;
                ended = served => ended.map_err(io::Error::other),
                silent = silence(pings) => Err(silent),
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended");
            }
        });
        let settled = room.wait_for(|room| *room > 0).await.map(|_| ());
        settled.map_err(|_| Lost::at(Stage::Connect, "it closed the connection at once"))?;
        Ok(Self { sender, room, leaving: Arc::default() })
    }

    /// Whether it can take another request.
    pub(super) fn has_room(&self) -> bool {
        self.is_open() && self.load() < (*self.room.borrow()).min(STREAMS_MAX)
    }

    pub(super) fn is_open(&self) -> bool {
        !self.leaving.load(Relaxed) && self.room.has_changed().is_ok()
    }

    /// How many requests are on it, seen from where it is kept.
    pub(super) fn load(&self) -> usize {
        Arc::strong_count(&self.leaving) - 1
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn exchange(self, request: Request) -> Result<Response, Failed> {
        let Self { sender, leaving, .. } = self;
        let untouched = |request, error| {
            leaving.store(true, Relaxed);
            Err(Failed { lost: Lost::at(Stage::Connect, error), untouched: Some(request) })
        };
        let mut head = http::Request::new(());
        // Who calls is told by headers: a name in the URL has no place here (RFC 9113, section 8.3.1).
        let url = &request.url;
        let bare = format!("{}://{}", url.scheme(), &url[Position::BeforeHost..Position::AfterQuery]);
        *head.uri_mut() = bare.parse().map_err(|error| Lost::at(Stage::Request, error))?;
        *head.method_mut() = request.method.clone();
        *head.headers_mut() = request.headers.clone();
        if request.method == Method::POST {
            head.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(request.body.len()));
        }
        *head.version_mut() = http::Version::HTTP_2;
        let mut sender = match sender.ready().await {
            Ok(sender) => sender,
            Err(error) => return untouched(request, error),
        };
        let (mut answer, mut stream) = match sender.send_request(head, request.body.is_empty()) {
            Ok(sent) => sent,
            // No other connection takes what is no request.
            Err(error) if !error.is_io() && !error.is_go_away() && !error.is_remote() => {
                return Err(Lost::at(Stage::Request, error).into());
            }
            Err(error) => return untouched(request, error),
        };
        // Else it would count as somebody who may still send.
        drop(sender);
        let answered = tokio::select! {
            biased;
            answered = &mut answer => answered,
            // Whoever answers before the whole body is there has seen enough of it.
            // Where that fails, the answer tells why.
            _ = send(&mut stream, request.body.clone()) => answer.await,
        };
        // What an answer came before needs no room any more.
        stream.reserve_capacity(0);
        match answered {
            Ok(answer) => {
                let (head, body) = answer.into_parts();
                let body = message::Body::Http2(Body { body, _counted: leaving });
                Ok(Response { status: head.status, headers: head.headers, body })
            }
            Err(error) if was_untouched(&error) => untouched(request, error),
            Err(error) => Err(Lost::exchange(error).into()),
        }
    }
}

/// Waits until the other end is silent for too long.
async fn silence(pings: Option<PingPong>) -> io::Error {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(PING_EVERY).await;
        match timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection tells why.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => return io::Error::new(io::ErrorKind::TimedOut, "its other end has gone silent"),
        }
    }
}

/// Sends a body as fast as it is taken.
async fn send(stream: &mut SendStream<Bytes>, mut body: Bytes) -> Result<(), h2::Error> {
    while !body.is_empty() {
        stream.reserve_capacity(body.len());
        let mut room = stream.capacity();
        if room == 0 {
            let Some(more) = poll_fn(|cx| stream.poll_capacity(cx)).await else {
                // The stream has ended; the answer tells why.
                return Ok(());
            };
            room = more?;
        }
        let piece = body.split_to(room.min(body.len()));
        stream.send_data(piece, body.is_empty())?;
    }
    Ok(())
}

/// Whether the provider says that it has not processed the request (RFC 9113, section 8.7).
fn was_untouched(error: &h2::Error) -> bool {
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    let leaving = error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
    error.is_remote() && (refused || leaving)
}

/// A body on its way.
#[derive(Debug)]
pub(super) struct Body {
    body: RecvStream,
    /// Counts as a request until it is read or dropped.
    _counted: Arc<AtomicBool>,
}

impl Body {
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Lost> {
        let Some(bytes) = self.body.data().await.transpose().map_err(Lost::exchange)? else { return Ok(None) };
        // Room for as much again.
        self.body.flow_control().release_capacity(bytes.len()).map_err(Lost::exchange)?;
        Ok(Some(bytes))
    }
}
