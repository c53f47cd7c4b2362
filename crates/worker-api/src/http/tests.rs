//! Connections to real servers: which are kept, shared and left.

use super::*;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// Does something beside the test.
#[expect(clippy::disallowed_methods, reason = "what a test begins ends with its runtime")]
pub(super) fn spawned<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(task)
}

/// A server with a certificate of its own.
struct Server {
    url: String,
    certificate: NamedTempFile,
    connections: Arc<AtomicUsize>,
    /// Those of them that it has open.
    open: Arc<AtomicUsize>,
    /// Ends it.
    close: CancellationToken,
}

/// Says how many requests its connection has had before, once this one is whole and `together` are there.
async fn serve(
    request: http::Request<Incoming>,
    count: usize,
    together: Arc<tokio::sync::Barrier>,
) -> Result<http::Response<Full<Bytes>>, hyper::Error> {
    request.into_body().collect().await?;
    together.wait().await;
    Ok(http::Response::new(Full::new(Bytes::from(count.to_string()))))
}

impl Server {
    /// One that speaks `protocol`, answers `together` requests at once, and takes `streams` of them on a connection.
    async fn start(protocol: &'static str, together: usize, streams: u32) -> Self {
        genmill_daemon::tls::install();
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let mut certificate = NamedTempFile::new().unwrap();
        certificate.write_all(cert.pem().as_bytes()).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let mut config = config.with_single_cert(vec![cert.der().clone()], key).unwrap();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let tls = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}/v1", listener.local_addr().unwrap().port());
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        let (open, close) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let (opened, ending) = (Arc::clone(&open), close.clone());
        let together = Arc::new(tokio::sync::Barrier::new(together));
        spawned(async move {
            while let Some(Ok((stream, _))) = ending.run_until_cancelled(listener.accept()).await {
                let (ending, opened) = (ending.clone(), Arc::clone(&opened));
                let (tls, counted, together) = (tls.clone(), Arc::clone(&counted), Arc::clone(&together));
                spawned(async move {
                    let Ok(stream) = tls.accept(stream).await else { return };
                    counted.fetch_add(1, Relaxed);
                    opened.fetch_add(1, Relaxed);
                    let requests = AtomicUsize::new(0);
                    let service = service_fn(move |request: http::Request<Incoming>| {
                        serve(request, requests.fetch_add(1, Relaxed), Arc::clone(&together))
                    });
                    let stream = TokioIo::new(stream);
                    if protocol == "h2" {
                        let mut builder = http2::Builder::new(TokioExecutor::new());
                        let serve = builder.max_concurrent_streams(streams).serve_connection(stream, service);
                        drop(ending.run_until_cancelled(serve).await);
                    } else {
                        let serve = http1::Builder::new().serve_connection(stream, service);
                        drop(ending.run_until_cancelled(serve).await);
                    }
                    opened.fetch_sub(1, Relaxed);
                });
            }
        });
        Self { url, certificate, connections, open, close }
    }

    fn http(&self) -> Http {
        http(Some(self.certificate.path().to_owned()))
    }
}

fn http(ca_file: Option<PathBuf>) -> Http {
    genmill_daemon::tls::install();
    Http::new(&Settings { connect_timeout: Duration::from_secs(20), proxy: None, ca_file }).unwrap()
}

async fn get(http: &Http, url: &str) -> Result<String, Lost> {
    let mut response = http.send_unproven(Request::get(url)?).await?;
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await? {
        body.extend_from_slice(&bytes);
    }
    Ok(String::from_utf8(body).unwrap())
}

/// Makes many requests at once.
async fn together(http: &Http, url: &str, count: usize) {
    let asked: Vec<_> = std::iter::repeat_with(|| (http.clone(), url.to_owned())).take(count).collect();
    let asked = asked.into_iter().map(|(http, url)| spawned(async move { get(&http, &url).await }));
    for asked in asked.collect::<Vec<_>>() {
        asked.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn requests_share_connections_where_the_provider_speaks_http2() {
    let server = Server::start("h2", 120, 30).await;
    let http = server.http();
    together(&http, &server.url, 120).await;
    // As few as have room for all, but for those that were opened before it was known how many take how much.
    let opened = server.connections.load(Relaxed);
    assert!((4..=7).contains(&opened), "{opened}");
}

#[tokio::test]
async fn what_may_be_called_off_has_a_connection_to_itself() {
    let server = Server::start("http/1.1", 1, 0).await;
    let http = server.http();
    assert_eq!(get(&http, &server.url).await.unwrap(), "0");
    for (may_leave, expect) in [(true, Some("0")), (false, None), (true, Some("0"))] {
        let request = Request::post(&server.url, "12345").unwrap().gated(move || may_leave);
        let answered = async {
            let mut response = http.send_unproven(request).await?;
            Ok::<_, Lost>(response.chunk().await?.unwrap_or_default())
        };
        assert_eq!(answered.await.ok().as_deref(), expect.map(str::as_bytes), "{may_leave}");
    }
    assert_eq!(get(&http, &server.url).await.unwrap(), "1");
}

#[tokio::test]
async fn requests_have_a_connection_each_where_the_provider_does_not() {
    let server = Server::start("http/1.1", 20, 0).await;
    let http = server.http();
    for _ in 0..3 {
        together(&http, &server.url, 20).await;
    }
    assert_eq!(server.connections.load(Relaxed), 20);
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_not_trusted() {
    let server = Server::start("h2", 1, 1).await;
    let lost = get(&http(None), &server.url).await.unwrap_err();
    assert_eq!(lost.stage, Stage::Connect);
    let told = Trouble::of(&lost).to_string();
    assert!(told.contains("its certificate is of an authority that is not known here"), "{told}");
    assert_eq!(get(&server.http(), &server.url).await.unwrap(), "0");
}

/// Serves connections one after the other, each with the answers of a script; how often it was asked.
async fn scripted(script: Vec<Vec<&'static str>>) -> (String, JoinHandle<Vec<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let served = spawned(async move {
        let mut served = Vec::new();
        for answers in script {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut count = 0;
            for answer in answers {
                if !read_request(&mut stream).await {
                    break;
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
                count += 1;
            }
            served.push(count);
        }
        served
    });
    (url, served)
}

/// Reads a request without a body; whether there was one.
async fn read_request(stream: &mut TcpStream) -> bool {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return false,
        }
    }
    true
}

const ONE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1";
const TWO: &str = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n2";
const CLOSING: &str = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\n1";
const TOO_MUCH: &str = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1HTTP/1.1 200 OK\r\n";

#[tokio::test]
async fn a_connection_serves_again_unless_its_other_end_is_done_with_it() {
    // The second connection is closed when its server has given one answer, the third when it says so.
    let (url, served) = scripted(vec![vec![ONE, TWO, CLOSING], vec![TOO_MUCH, ONE], vec![ONE]]).await;
    let http = http(None);
    for expect in ["1", "2", "1", "1", "1"] {
        assert_eq!(get(&http, &url).await.unwrap(), expect);
    }
    assert_eq!(served.await.unwrap(), [3, 1, 1]);
}

#[tokio::test]
async fn a_connection_that_was_closed_while_nobody_used_it_is_not_used() {
    let (url, served) = scripted(vec![vec![ONE], vec![TWO]]).await;
    let http = http(None);
    assert_eq!(get(&http, &url).await.unwrap(), "1");
    // The server closes when its script is at its end, and accepts the next one after that.
    let second = loop {
        // Asked until the end of the connection has come: before it, the request may get lost on it.
        match get(&http, &url).await {
            Ok(answer) => break answer,
            Err(lost) => assert_eq!(lost.stage, Stage::Exchange),
        }
    };
    assert_eq!(second, "2");
    assert_eq!(served.await.unwrap(), [1, 1]);
}

#[tokio::test]
async fn however_many_connections_were_closed_a_new_one_is_made() {
    let server = Server::start("http/1.1", 300, 0).await;
    let http = server.http();
    together(&http, &server.url, 300).await;
    assert_eq!(http.idle(&server.url), 300);
    let (plain, served) = scripted(vec![vec![ONE]]).await;
    // All of them are gone before anybody looks.
    server.close.cancel();
    while server.open.load(Relaxed) > 0 {
        tokio::task::yield_now().await;
    }
    let lost = get(&http, &server.url).await.unwrap_err();
    assert_eq!((lost.stage, http.idle(&server.url)), (Stage::Connect, 0), "nobody listens any more");
    assert_eq!(get(&http, &plain).await.unwrap(), "1");
    assert_eq!(served.await.unwrap(), [1]);
}

#[tokio::test]
async fn an_answer_that_is_left_ends_its_connection() {
    let cut: &str = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345";
    let (url, served) = scripted(vec![vec![cut, ONE], vec![ONE]]).await;
    let http = http(None);
    let mut response = http.send_unproven(Request::get(&url).unwrap()).await.unwrap();
    assert_eq!(response.chunk().await.unwrap().unwrap(), "12345");
    drop(response);
    assert_eq!(get(&http, &url).await.unwrap(), "1");
    assert_eq!(served.await.unwrap(), [1, 1]);
}

#[tokio::test]
async fn an_answer_is_read_on_to_its_end_when_nothing_more_of_it_is_wanted() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let http = http(None);
    let served = spawned(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(read_request(&mut stream).await);
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nDONE\r\n").await.unwrap();
        stream
    });
    let mut response = http.send_unproven(Request::get(&url).unwrap()).await.unwrap();
    assert_eq!(response.chunk().await.unwrap().unwrap(), "DONE");
    let mut stream = served.await.unwrap();
    response.drain();
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let again = async {
        assert!(read_request(&mut stream).await);
        stream.write_all(ONE.as_bytes()).await.unwrap();
    };
    // Asked when the connection has come back; where it does not come, nobody accepts another one.
    let asked = async {
        while http.idle(&url) == 0 {
            tokio::task::yield_now().await;
        }
        get(&http, &url).await.unwrap()
    };
    let (answer, ()) = tokio::join!(asked, again);
    assert_eq!(answer, "1");
}

#[tokio::test]
async fn a_server_on_this_machine_is_not_asked_for_through_a_proxy() {
    let (url, served) = scripted(vec![vec![ONE]]).await;
    let settings = Settings {
        connect_timeout: Duration::from_secs(5),
        proxy: Some("http://127.0.0.1:1".to_owned()),
        ca_file: None,
    };
    assert_eq!(get(&Http::new(&settings).unwrap(), &url).await.unwrap(), "1");
    assert_eq!(served.await.unwrap(), [1]);
}

#[tokio::test]
async fn a_proxy_is_told_whole_urls_and_who_calls() {
    genmill_daemon::tls::install();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = format!("http://user:secret@{}", listener.local_addr().unwrap());
    let served = spawned(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4_096];
        let count = stream.read(&mut request).await.unwrap();
        stream.write_all(ONE.as_bytes()).await.unwrap();
        String::from_utf8_lossy(&request[..count]).into_owned()
    });
    let settings = Settings { connect_timeout: Duration::from_secs(5), proxy: Some(proxy), ca_file: None };
    assert_eq!(get(&Http::new(&settings).unwrap(), "http://provider.example/v1").await.unwrap(), "1");
    let request = served.await.unwrap();
    assert!(request.starts_with("GET http://provider.example/v1 HTTP/1.1\r\nhost: provider.example\r\n"), "{request}");
    assert!(request.contains("proxy-authorization: Basic dXNlcjpzZWNyZXQ=\r\n"), "{request}");
}

#[test]
fn a_proxy_that_is_none_is_refused() {
    genmill_daemon::tls::install();
    for proxy in ["socks5://127.0.0.1:1", "::", ""] {
        let settings =
            Settings { connect_timeout: Duration::from_secs(5), proxy: Some(proxy.to_owned()), ca_file: None };
        assert!(matches!(Http::new(&settings), Err(HttpError::Proxy)), "{proxy}");
    }
}

fn check(url: &str, loopback: bool) {
    assert_eq!(is_loopback(&Url::parse(url).unwrap()), loopback, "{url}");
}

#[test]
fn this_machine_is_told_from_others() {
    check("http://localhost:1234/v1", true);
    check("http://127.0.0.2", true);
    check("http://[::1]:80/", true);
    check("https://api.openai.com/v1", false);
    check("http://localhost.example.com", false);
}
