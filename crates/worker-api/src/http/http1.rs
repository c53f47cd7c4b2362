//! HTTP/1.1 as a client speaks it (RFC 9112), on a connection that one request has to itself.
//!
//! A call of a model waits long for its answer, and thousands wait at once: so while nothing comes, a connection holds no
//! buffers. What it reads goes through one that all connections of a thread share.
//!
//! Never here: making connections (`connect`), and when they are used again (`pool`).

use super::framing::{Framing, Head, Malformed, head};
use super::message::{self, Gate, Lost, Parts, Request, Response, Shut};
use super::pool::Home;
use bytes::buf::Chain;
use bytes::{Buf, Bytes};
use http::header::{CONTENT_LENGTH, HOST, HeaderName, HeaderValue, PROXY_AUTHORIZATION, TRANSFER_ENCODING};
use http::{HeaderMap, Method};
use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop::unconstrained;
use tokio::time::timeout;
use tokio_util::io::poll_write_buf;
use url::{Position, Url};

/// The most that is read at once, in bytes.
const READ_BYTES: usize = 32 * 1024;

/// A body up to this size, in bytes, goes out together with the head.
const TOGETHER_BYTES: usize = 16 * 1024;

/// The longest head of an answer, in bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// The headers that are written by what is sent, whatever else says.
const OWN: [HeaderName; 3] = [HOST, CONTENT_LENGTH, TRANSFER_ENCODING];

/// How long the end of a body is waited for of which nothing more is wanted.
const DRAIN: Duration = Duration::from_secs(1);

thread_local! {
    static RECEIVED: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

/// What is left of a request to be sent.
struct Unsent {
    bytes: Chain<Bytes, Bytes>,
    /// The last of it, if it is not to leave without being asked about.
    last: Option<(Bytes, Gate)>,
    /// Why no more of it can be sent.
    broken: Option<io::Error>,
}

impl Unsent {
    fn is_all_sent(&self) -> bool {
        self.broken.is_none() && self.last.is_none() && !self.bytes.has_remaining()
    }
}

/// What bytes travel through.
pub(super) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// A connection that serves one request at a time.
pub(super) struct Connection {
    wire: Box<dyn Wire>,
    /// Where it leads to a proxy, which wants whole URLs and perhaps a proof.
    via: Option<Option<HeaderValue>>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("http1::Connection").finish_non_exhaustive()
    }
}

impl Connection {
    pub(super) fn new(wire: Box<dyn Wire>, via: Option<Option<HeaderValue>>) -> Self {
        Self { wire, via }
    }

    /// Whether the other end has kept it open, and silent, while nothing was asked.
    pub(super) fn is_open(&mut self) -> bool {
        // Without tokio's budget: once that is spent, it calls everything pending, also what was closed.
        let asked = pin!(unconstrained(poll_fn(|cx| receive(&mut self.wire, cx, |_| ()))));
        asked.poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Sends a request and waits for the head of its answer. Once the body has been read, the connection goes `home`.
    pub(super) async fn exchange(mut self, request: Request, home: Home) -> Result<Response, Lost> {
        let mut unsent = self.written(request);
        let (head, rest) = self.head(&mut unsent).await.map_err(Lost::exchange)?;
        // An answer that came before all was sent leaves the rest unread at the other end.
        let reusable = head.keeps_open && unsent.is_all_sent();
        let mut body =
            Body { connection: Some(self), framing: head.framing, early: Bytes::new(), home: reusable.then_some(home) };
        body.begin(&rest).map_err(Lost::exchange)?;
        Ok(Response { status: head.status, headers: head.headers, body: message::Body::Http1(body) })
    }

    /// A request as it travels.
    fn written(&self, mut request: Request) -> Unsent {
        let mut body = std::mem::take(&mut request.body);
        let last = request.gate.take().map(|gate| (body.split_off(body.len().saturating_sub(1)), gate));
        let length = body.len() + last.as_ref().map_or(0, |(last, _)| last.len());
        let Parts { method, url, headers, .. } = &*request;
        let path = &url[Position::BeforePath..Position::AfterQuery];
        let target =
            if self.via.is_some() { format!("{}://{}{path}", url.scheme(), authority(url)) } else { path.into() };
        let mut out = Vec::with_capacity(512 + body.len().min(TOGETHER_BYTES));
        out.extend_from_slice(format!("{method} {target} HTTP/1.1\r\n").as_bytes());
        let mut own = HeaderMap::with_capacity(3);
        own.extend(HeaderValue::from_str(authority(url)).ok().map(|host| (HOST, host)));
        if length > 0 || *method == Method::POST {
            own.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        own.extend(self.via.clone().flatten().map(|proof| (PROXY_AUTHORIZATION, proof)));
        // What a row may say of these is for proxies and servers to mistake.
        let others = headers.iter().filter(|(name, _)| !OWN.contains(name));
        for (name, value) in own.iter().chain(others) {
            out.extend_from_slice(name.as_str().as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"\r\n");
        if body.len() <= TOGETHER_BYTES {
            out.extend_from_slice(&body);
            body = Bytes::new();
        }
        Unsent { bytes: Bytes::from(out).chain(body), last, broken: None }
    }

    /// Writes what is `unsent` and reads at the same time, until the head of an answer is there; with it, what came
    /// after it.
    async fn head(&mut self, unsent: &mut Unsent) -> Result<(Head, Vec<u8>), Broken> {
        let mut received = Vec::new();
        let mut flushed = false;
        poll_fn(|cx| {
            while unsent.broken.is_none() && !flushed {
                let wire = Pin::new(&mut self.wire);
                let written = if unsent.bytes.has_remaining() {
                    poll_write_buf(wire, cx, &mut unsent.bytes).map_ok(|_| false)
                } else {
                    wire.poll_flush(cx).map_ok(|()| true)
                };
                match written {
                    Poll::Ready(Ok(false)) => {}
                    Poll::Ready(Ok(true)) => {
                        let last = match unsent.last.take() {
                            Some((_, gate)) if !gate.is_open() => return Poll::Ready(Err(Shut.into())),
                            Some((last, _)) => last,
                            None => Bytes::new(),
                        };
                        flushed = last.is_empty();
                        // What was sent is not needed while the answer is waited for.
                        unsent.bytes = last.chain(Bytes::new());
                    }
                    // Whoever closes while it is written to may have said why before.
                    Poll::Ready(Err(error)) => unsent.broken = Some(error),
                    Poll::Pending => break,
                }
            }
            loop {
                let count = match ready!(receive(&mut self.wire, cx, |bytes| take(&mut received, bytes))) {
                    Ok(count) => count,
                    Err(error) => return Poll::Ready(Err(unsent.broken.take().unwrap_or(error).into())),
                };
                if count == 0 {
                    let closed = || io::Error::new(io::ErrorKind::UnexpectedEof, CLOSED);
                    return Poll::Ready(Err(unsent.broken.take().unwrap_or_else(closed).into()));
                }
                while let Some((found, used)) = head(&received)? {
                    let rest = received.split_off(used);
                    match found {
                        Some(found) => return Poll::Ready(Ok((found, rest))),
                        // It says that there is more to come.
                        None => received = rest,
                    }
                }
                if received.len() > HEAD_BYTES_MAX {
                    return Poll::Ready(Err(Malformed("its headers have more than 64 KiB").into()));
                }
            }
        })
        .await
    }
}

/// What is said of a connection that is closed before there is an answer.
const CLOSED: &str = "it closed the connection without an answer";

/// What ends an exchange.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it does not speak HTTP")]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Shut(#[from] Shut),
}

/// The host that a URL names, with its port where that is not the usual one.
fn authority(url: &Url) -> &str {
    &url[Position::BeforeHost..Position::AfterPort]
}

fn take(into: &mut Vec<u8>, bytes: &[u8]) -> usize {
    into.extend_from_slice(bytes);
    bytes.len()
}

/// What has come, none of it at the end.
fn receive<R>(wire: &mut Box<dyn Wire>, cx: &mut Context<'_>, take: impl FnOnce(&[u8]) -> R) -> Poll<io::Result<R>> {
    RECEIVED.with_borrow_mut(|buffer| {
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(wire).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(take(buffer.filled())))
    })
}

/// A body on its way.
#[derive(Debug)]
pub(super) struct Body {
    /// Until the body's end.
    connection: Option<Connection>,
    framing: Framing,
    /// What came with the head.
    early: Bytes,
    /// Where the connection goes when it can serve again.
    home: Option<Home>,
}

impl Body {
    /// Takes what came with the head.
    fn begin(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        let mut early = Vec::new();
        let used = self.framing.decode(bytes, &mut early)?;
        self.early = early.into();
        self.settle(used == bytes.len());
        Ok(())
    }

    /// Lets go of the connection when the body has ended. `clean`: nothing came after it, which would be taken for the
    /// next answer.
    fn settle(&mut self, clean: bool) {
        if self.framing.is_done()
            && let Some(connection) = self.connection.take()
            && let Some(home) = self.home.take().filter(|_| clean)
        {
            home.bring(connection);
        }
    }

    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Lost> {
        if !self.early.is_empty() {
            return Ok(Some(std::mem::take(&mut self.early)));
        }
        let came = poll_fn(|cx| self.poll_more(cx)).await;
        if came.is_err() {
            self.connection = None;
        }
        came.map_err(Lost::exchange)
    }

    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            let Some(connection) = &mut self.connection else { return Poll::Ready(Ok(None)) };
            let mut out = Vec::new();
            let decode = |bytes: &[u8]| match bytes {
                [] => self.framing.end().map(|()| true),
                _ => self.framing.decode(bytes, &mut out).map(|used| used == bytes.len()),
            };
            let clean = ready!(receive(&mut connection.wire, cx, decode))??;
            self.settle(clean);
            if !out.is_empty() {
                return Poll::Ready(Ok(Some(out.into())));
            }
        }
    }

    /// Reads on to the end for a short while.
    pub(super) fn drain(mut self) {
        let Some(home) = self.home.clone().filter(|_| self.connection.is_some()) else { return };
        home.spawn(async move {
            // Where that takes longer, the connection ends.
            drop(timeout(DRAIN, async { while let Ok(Some(_)) = self.chunk().await {} }).await);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::message::Stage;
    use crate::http::tests::spawned;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    /// A server that reads a head, answers with `reply` and closes.
    async fn answer(mut far: DuplexStream, reply: Vec<u8>) -> String {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(far.read_u8().await.unwrap());
        }
        // Whoever has read enough closes.
        drop(far.write_all(&reply).await);
        String::from_utf8(request).unwrap()
    }

    /// What becomes of a request that is answered with `reply`, and how it was written.
    async fn asked(request: Request, via: Option<Option<HeaderValue>>, reply: &[u8]) -> (Result<String, Lost>, String) {
        let (near, far) = duplex(64);
        let server = spawned(answer(far, reply.to_vec()));
        let connection = Connection::new(Box::new(near), via);
        let read = async {
            let mut response = connection.exchange(request, Home::nowhere()).await?;
            let mut whole = format!("{} ", response.status().as_u16());
            while let Some(bytes) = response.chunk().await? {
                whole.push_str(&String::from_utf8_lossy(&bytes));
            }
            Ok(whole)
        };
        (read.await, server.await.unwrap())
    }

    async fn check(reply: &str, expect: Result<&str, &str>) {
        let (read, _) = asked(Request::get("http://a.b/c").unwrap(), None, reply.as_bytes()).await;
        let read = read.map_err(|lost| {
            assert_eq!(lost.stage, Stage::Exchange);
            crate::http::Trouble::of(&lost).to_string()
        });
        assert_eq!(read.as_deref().map_err(String::as_str), expect, "{reply}");
    }

    #[tokio::test]
    async fn answers_are_read_to_their_end() {
        let long = "x".repeat(100_000);
        check("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello and more", Ok("200 hello")).await;
        check("HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", Ok("404 hi")).await;
        check("HTTP/1.0 200 OK\r\n\r\nhello", Ok("200 hello")).await;
        check("HTTP/1.1 204 No Content\r\n\r\n", Ok("204 ")).await;
        check("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1", Ok("200 1")).await;
        check(&format!("HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n{long}"), Ok(&format!("200 {long}"))).await;
    }

    #[tokio::test]
    async fn answers_that_are_none_are_told() {
        let cut = "it closed the connection before the answer was whole";
        check("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell", Err(cut)).await;
        check("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", Err(cut)).await;
        check("HTTP/1.1 200 OK\r\ncontent-le", Err(CLOSED)).await;
        check("", Err(CLOSED)).await;
        check("<html>", Err("its answer does not begin as one of HTTP/1.1 does")).await;
        let long = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "x".repeat(70_000));
        check(&long, Err("its headers have more than 64 KiB")).await;
    }

    #[tokio::test]
    async fn requests_are_written_as_servers_and_proxies_want_them() {
        let reply = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let get = || Request::get("http://user:pw@a.b:81/c%20d?e=f#g").unwrap().with("x-key", "k").unwrap();
        let (read, written) = asked(get(), None, reply).await;
        assert_eq!(read.unwrap(), "200 ");
        assert!(written.starts_with("GET /c%20d?e=f HTTP/1.1\r\nhost: a.b:81\r\n"), "{written}");
        assert!(written.contains("\r\nx-key: k\r\n") && !written.contains("content-length"), "{written}");
        let (_, written) = asked(Request::post("http://[::1]/v1", "").unwrap(), None, reply).await;
        assert!(written.starts_with("POST /v1 HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 0\r\n"), "{written}");
        let (_, written) = asked(get(), Some(Some(HeaderValue::from_static("Basic x"))), reply).await;
        assert!(written.starts_with("GET http://a.b:81/c%20d?e=f HTTP/1.1\r\nhost: a.b:81\r\n"), "{written}");
        assert!(written.contains("proxy-authorization: Basic x\r\n"), "{written}");
        let odd = get().with("host", "x").unwrap().with("content-length", "7").unwrap();
        let (_, written) = asked(odd, None, reply).await;
        assert!(written.matches("host:").count() == 1 && !written.contains("content-length"), "{written}");
    }

    #[tokio::test]
    async fn the_last_byte_leaves_only_if_it_may() {
        for (body, first) in [("12345".to_owned(), 4), ("x".repeat(100_000), 99_999)] {
            for open in [true, false] {
                let (near, mut far) = duplex(1_000_000);
                let request = Request::post("http://a.b/c", body.clone()).unwrap().gated(move || open);
                let exchange = Connection::new(Box::new(near), None).exchange(request, Home::nowhere());
                let server = async {
                    let mut written = Vec::new();
                    let length = if open { body.len() } else { usize::MAX };
                    while far.read_buf(&mut written).await.unwrap() > 0 {
                        if String::from_utf8_lossy(&written)
                            .split_once("\r\n\r\n")
                            .is_some_and(|(_, b)| b.len() == length)
                        {
                            far.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                            break;
                        }
                    }
                    String::from_utf8(written).unwrap()
                };
                let (answered, written) = tokio::join!(exchange, server);
                let (head, sent) = written.split_once("\r\n\r\n").unwrap();
                assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
                assert_eq!((answered.is_ok(), sent.len()), (open, if open { body.len() } else { first }));
            }
        }
    }

    #[tokio::test]
    async fn an_answer_is_heard_though_the_request_was_not_read_to_its_end() {
        let request = Request::post("http://a.b/c", vec![b'x'; 1_000_000]).unwrap();
        let reply = b"HTTP/1.1 413 Too large\r\ncontent-length: 3\r\n\r\nno!";
        let (read, _) = asked(request, None, reply).await;
        assert_eq!(read.unwrap(), "413 no!");
    }
}
