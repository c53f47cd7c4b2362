//! What is left to do at the provider for a call whose answer nobody reads any more: its work is called off where it would
//! go on, and what it cost is looked up where a record of it is kept.

use crate::catalog::Endpoint;
use crate::http::{Http, Request};
use crate::url::escaped;
use genmill_core::money::Picodollars;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// The waits before each look: a record is there a moment after its call has ended. Together they are less than a worker
/// gives to a call that it tells to stop.
const LOOKS: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(600), Duration::from_millis(800)];

/// How long one look may take.
const PATIENCE: Duration = Duration::from_millis(700);

/// All of it: what is not known by then stays unknown.
const PATIENCE_IN_ALL: Duration = Duration::from_millis(2_500);

/// The longest record that is read, in bytes.
const RECORD_BYTES_MAX: usize = 64 * 1024;

/// What the provider's record says that the call `id` cost; `None` when it keeps none, or does not tell in time.
pub(crate) async fn settle(http: &Http, endpoint: &Endpoint, id: Option<&str>) -> Option<Picodollars> {
    let path = endpoint.provider.generation_path.as_deref()?.replace("{id}", &escaped(id?));
    let url = format!("{}{path}", endpoint.base_url.as_str().trim_end_matches('/'));
    let looked = async {
        for wait in LOOKS {
            sleep(wait).await;
            if let Ok(Some(cost)) = timeout(PATIENCE, look(http, endpoint, &url)).await {
                return Some(cost);
            }
        }
        None
    };
    let cost = timeout(PATIENCE_IN_ALL, looked).await.ok().flatten();
    tracing::debug!(provider = endpoint.name, known = cost.is_some(), "asked what a broken call cost");
    cost
}

/// Tells the provider that nobody wants the answer of a call any more, which it would work at and bill otherwise. Whether
/// it hears that changes nothing here.
pub(crate) async fn call_off(http: &Http, endpoint: &Endpoint, url: &str) {
    let Ok(request) = Request::post(url, "") else { return };
    let told = timeout(PATIENCE_IN_ALL, http.send(endpoint, request)).await;
    let heard = matches!(told, Ok(Ok(response)) if response.status().is_success());
    tracing::debug!(provider = endpoint.name, heard, "called off what nobody waits for");
}

async fn look(http: &Http, endpoint: &Endpoint, url: &str) -> Option<Picodollars> {
    let mut response = http.send(endpoint, Request::get(url).ok()?).await.ok()?;
    if !response.status().is_success() {
        return None;
    }
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await.ok()? {
        body.extend_from_slice(&bytes);
        if body.len() > RECORD_BYTES_MAX {
            return None;
        }
    }
    recorded(&body)
}

/// A record, as far as it is read.
#[derive(Deserialize)]
struct Record<'a> {
    #[serde(borrow)]
    data: Costs<'a>,
}

#[derive(Deserialize)]
struct Costs<'a> {
    /// In dollars, kept as it is written.
    #[serde(borrow)]
    total_cost: &'a RawValue,
}

/// What a record says.
fn recorded(body: &[u8]) -> Option<Picodollars> {
    let record: Record<'_> = serde_json::from_slice(body).ok()?;
    Picodollars::parse_dollars(record.data.total_cost.get().trim_matches('"')).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_tells_the_cost_to_the_last_digit() {
        let check = |body: &str, expect: Option<u128>| assert_eq!(recorded(body.as_bytes()), expect.map(Picodollars));
        check(r#"{"data":{"id":"gen-1","total_cost":0.000012345,"usage":0.1}}"#, Some(12_345_000));
        check(r#"{"data":{"total_cost":"1e-6"}}"#, Some(1_000_000));
        check(r#"{"data":{"total_cost":null}}"#, None);
        check(r#"{"data":{}}"#, None);
        check("oops", None);
    }
}
