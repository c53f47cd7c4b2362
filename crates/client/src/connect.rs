//! From a server's address to a connection.

use crate::Error;
use crate::error::root_cause;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Uri};

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an open connection is probed, so that a watch on a vanished machine does not hang.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long the answer to a probe may take.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How many bytes of one answer or stream may wait to be read: enough to keep a fast and distant server busy.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// And of all together: the most that HTTP/2 knows. What is not read of one stream counts here as well, so with less, a
/// watch that nobody reads on for a while would hold up every other call over the same connection.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// The address with its scheme: `HOST:PORT` means `http://HOST:PORT`.
pub(crate) fn with_scheme(server: &str) -> Result<String, Error> {
    let bad = |problem| Err(Error::BadAddress { server: server.to_owned(), problem });
    match server.split_once("://") {
        _ if server.is_empty() => bad("it is empty; write http://HOST:PORT"),
        Some(("http", rest)) if !rest.is_empty() => Ok(server.to_owned()),
        Some(("https", _)) => bad("TLS is not supported by this client; end it in a proxy and write http://HOST:PORT"),
        Some(_) => bad("write http://HOST:PORT"),
        None => Ok(format!("http://{server}")),
    }
}

/// Connects. The channel reconnects by itself later on.
pub(crate) async fn connect(server: &str) -> Result<Channel, Error> {
    let bad = |problem| Error::BadAddress { server: server.to_owned(), problem };
    let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|_| bad("write http://HOST:PORT"))?;
    if !has_sound_port(endpoint.uri()) {
        return Err(bad("its port is no number up to 65535; write http://HOST:PORT"));
    }
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .user_agent(concat!("genmill/", env!("CARGO_PKG_VERSION")))
        .map_err(|_| Error::Protocol { problem: "this client's own name is no HTTP header" })?;
    let unreachable = |error: tonic::transport::Error| {
        let source = root_cause(&error).into();
        Error::Unreachable { server: server.to_owned(), source }
    };
    endpoint.connect().await.map_err(unreachable)
}

/// False for `host:99999` and `host:`, which the URI's parser lets pass as a host without port.
fn has_sound_port(uri: &Uri) -> bool {
    let Some(authority) = uri.authority() else { return false };
    authority.port_u16().is_some() || authority.as_str().ends_with(authority.host())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_a_port() {
        let sound = |uri: &'static str| has_sound_port(&Uri::from_static(uri));
        assert!(sound("http://a:5") && sound("http://a") && sound("http://[::1]:5/") && sound("http://[::1]"));
        assert!(!sound("http://a:99999") && !sound("http://a:"));
    }

    fn check(server: &str, expect: Option<&str>) {
        assert_eq!(with_scheme(server).ok().as_deref(), expect, "{server}");
    }

    #[test]
    fn an_address_may_leave_out_its_scheme() {
        check("127.0.0.1:5", Some("http://127.0.0.1:5"));
        check("http://a:5", Some("http://a:5"));
        check("https://a:5", None);
        check("redis://a:5", None);
        check("http://", None);
        check("", None);
    }
}
