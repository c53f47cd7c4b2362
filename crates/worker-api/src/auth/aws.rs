//! Signatures of calls to Amazon (Signature Version 4). Pure: the time is an argument.

use crate::url::escaped_but;
use genmill_core::time::UnixMs;
use genmill_daemon::secret::Secret;
use ring::{digest, hmac};
use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};
use url::Url;

/// The name of the way of signing.
const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// Whose calls are signed, and where they go.
#[derive(Clone, Debug)]
pub struct AwsCredentials {
    /// Names the key.
    pub access_key: String,
    /// The key.
    pub secret_key: Secret,
    /// Comes with keys that hold for a while only.
    pub session_token: Option<Secret>,
    /// The region whose service is called.
    pub region: String,
    /// The service, as signatures name it.
    pub service: &'static str,
}

/// The headers that sign a call.
#[must_use]
pub fn sign(
    credentials: &AwsCredentials,
    method: &str,
    url: &Url,
    body: &[u8],
    now: UnixMs,
) -> Vec<(&'static str, String)> {
    let at = UNIX_EPOCH.checked_add(Duration::from_millis(now.0)).unwrap_or(UNIX_EPOCH);
    let time = humantime::format_rfc3339_seconds(at).to_string().replace(['-', ':'], "");
    let day = &time[..8];
    let mut signed = vec![("host", host(url)), ("x-amz-date", time.clone())];
    signed.extend(credentials.session_token.as_ref().map(|t| ("x-amz-security-token", t.reveal().to_owned())));
    let names = signed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
    let lines: String = signed.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    // Every segment is escaped once more, as all services but one want it.
    let (path, query) = (escaped_but(url.path(), b"/"), canonical_query(url));
    let request = format!("{method}\n{path}\n{query}\n{lines}\n{names}\n{}", sha256(body));
    let scope = format!("{day}/{}/{}/aws4_request", credentials.region, credentials.service);
    let text = format!("{ALGORITHM}\n{time}\n{scope}\n{}", sha256(request.as_bytes()));
    let key = format!("AWS4{}", credentials.secret_key.reveal());
    let parts = [day, &credentials.region, credentials.service, "aws4_request", &text];
    let signature = hex(&parts.iter().fold(key.into_bytes(), |key, part| hmac(&key, part)));
    let access_key = &credentials.access_key;
    let authorization =
        format!("{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}");
    // The HTTP client writes the host itself.
    signed.into_iter().skip(1).chain([("authorization", authorization)]).collect()
}

fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn canonical_query(url: &Url) -> String {
    let mut pairs: Vec<&str> = url.query().map(|query| query.split('&').collect()).unwrap_or_default();
    pairs.sort_unstable();
    pairs.join("&")
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        write!(text, "{byte:02x}").unwrap_or_default();
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The credentials and the time of Amazon's own test suite (aws-sig-v4-test-suite).
    fn signature(method: &str, url: &str, session_token: Option<&str>) -> String {
        let credentials = AwsCredentials {
            access_key: "AKIDEXAMPLE".to_owned(),
            secret_key: Secret::new("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"),
            session_token: session_token.map(Secret::new),
            region: "us-east-1".to_owned(),
            service: "service",
        };
        let headers = sign(&credentials, method, &Url::parse(url).unwrap(), b"", UnixMs(1_440_938_160_000));
        assert_eq!(headers[0], ("x-amz-date", "20150830T123600Z".to_owned()));
        headers.last().unwrap().1.clone()
    }

    #[test]
    fn signatures_are_those_of_amazons_test_suite() {
        let check = |method, url: &str, expect: &str| {
            assert_eq!(signature(method, url, None).rsplit_once('=').unwrap().1, expect, "{method} {url}");
        };
        let at = "https://example.amazonaws.com";
        check("GET", at, "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31");
        check("POST", at, "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b");
        check(
            "GET",
            &format!("{at}/?Param2=value2&Param1=value1"),
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        );
    }

    #[test]
    fn what_is_signed_is_named() {
        let told = signature("GET", "https://example.amazonaws.com", Some("t"));
        let head = "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, \
                    SignedHeaders=host;x-amz-date;x-amz-security-token, Signature=";
        assert!(told.starts_with(head), "{told}");
    }
}
