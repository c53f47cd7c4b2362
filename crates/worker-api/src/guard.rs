//! Addresses that are never called, whoever names them: those at which machines of clouds tell their secrets.
//!
//! Servers of one's own are called wherever they are: on this machine, in a private network.

use hyper_util::client::legacy::connect::dns::Name;
use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::{io, vec};
use tower_service::Service;
use url::Url;

/// Names of such places.
const NAMES: &[&str] = &["metadata", "metadata.google.internal", "metadata.goog", "instance-data"];

/// Such addresses beside the link-local ones: Amazon's and Google's by IPv6, Alibaba's, Oracle's, Azure's.
const ADDRESSES: &[IpAddr] = &[
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
];

/// The host of a URL when it must not be called.
#[must_use]
pub fn forbidden_host(url: &Url) -> Option<String> {
    let host = url.host_str()?.trim_matches(['[', ']']).trim_end_matches('.');
    let address = host.parse::<IpAddr>();
    let forbidden = address.map_or_else(|_| NAMES.contains(&host), is_forbidden);
    forbidden.then(|| host.to_owned())
}

/// Whether an address must not be called.
fn is_forbidden(address: IpAddr) -> bool {
    let forbidden = match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || within(v6).is_some_and(|v4| is_forbidden(v4.into())),
    };
    forbidden || ADDRESSES.contains(&address.to_canonical())
}

/// The older address to which gateways hand on what goes to this one: NAT64, 6to4, and the form that was given up.
fn within(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let octets = address.octets();
    let at = match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => 12,
        [0, 0, 0, 0, 0, 0, high, _] if high > 0 => 12,
        [0x2002, ..] => 2,
        _ => return None,
    };
    octets[at..].first_chunk::<4>().copied().map(Ipv4Addr::from)
}

/// Looks names up, and leaves out what must not be called: a harmless name may lead there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guarded;

impl Service<Name> for Guarded {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await;
            let found: Vec<_> = found.map_err(|error| io::Error::other(format!("dns error: {error}")))?.collect();
            let allowed: Vec<_> = found.iter().copied().filter(|at| !is_forbidden(at.ip())).collect();
            if allowed.is_empty() && !found.is_empty() {
                return Err("leads to an address that tells secrets of machines and is never called".into());
            }
            Ok(allowed.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url: &str, forbidden: bool) {
        assert_eq!(forbidden_host(&Url::parse(url).unwrap()).is_some(), forbidden, "{url}");
    }

    #[test]
    fn where_machines_tell_secrets_nobody_calls() {
        check("http://169.254.169.254/latest/meta-data", true);
        check("http://169.254.170.2/v2/credentials", true);
        check("http://[fe80::1]/", true);
        check("http://[fd00:ec2::254]/", true);
        check("http://[::ffff:169.254.169.254]/", true);
        check("http://[::169.254.169.254]/", true);
        check("http://[64:ff9b::169.254.169.254]/", true);
        check("http://[2002:a9fe:a9fe::1]/", true);
        check("http://[fd20:ce::254]/", true);
        check("http://168.63.129.16/", true);
        check("http://0xa9fea9fe/", true);
        check("http://2852039166/", true);
        check("http://metadata.google.internal/computeMetadata/v1", true);
        check("http://METADATA.google.internal./", true);
        check("http://100.100.100.200/", true);
    }

    #[test]
    fn servers_of_ones_own_are_called() {
        check("http://127.0.0.1:8000/v1", false);
        check("http://10.0.0.7/v1", false);
        check("http://[fd12::1]/v1", false);
        check("http://[::1]:8000/v1", false);
        check("http://[64:ff9b::8.8.8.8]/v1", false);
        check("http://[2606:4700::1]/v1", false);
        check("https://metadata.example.com/", false);
    }

    #[tokio::test]
    async fn names_of_this_machine_are_found() {
        let found = Guarded.call("localhost".parse().unwrap()).await.unwrap();
        assert!(found.count() > 0);
    }
}
