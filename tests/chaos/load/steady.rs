//! A tenant whose backlog never runs empty: as jobs end, it submits more. Two of them must be served alike.

use super::{Caller, Wanted};
use crate::chaos::world::MODELS;
use genmill_client::{Until, v1};
use std::collections::BTreeMap;
use tokio_stream::StreamExt as _;

/// How many of its jobs are unfinished while it works: far more than the look-ahead holds.
const UNFINISHED: usize = 150;

/// How many jobs it submits at once.
const WAVE: usize = 30;

/// Works until it is told to stop and all its jobs have been told.
pub(super) async fn work(mut caller: Caller, tokens_max: u32) {
    let name = caller.name.clone();
    let filter = v1::JobFilter { tenant: name.clone(), ..v1::JobFilter::default() };
    let mut finished = Box::pin(caller.watch(&name, filter, Until::Dropped));
    let mut unfinished = 0;
    loop {
        while unfinished + WAVE <= UNFINISHED && !caller.stop.is_cancelled() {
            unfinished += wave(&mut caller, tokens_max).await;
        }
        if unfinished == 0 {
            return;
        }
        match finished.next().await {
            Some(job) => unfinished -= usize::from(caller.told(&name, job).is_some()),
            None => return,
        }
    }
}

async fn wave(caller: &mut Caller, tokens_max: u32) -> usize {
    let mut requests = BTreeMap::new();
    for _ in 0..WAVE {
        // Some take longer than a lease lasts without a heartbeat.
        let most_ms = if caller.dice.roll(10) == 0 { 4_000 } else { 400 };
        let script = format!("!sleep={}", caller.dice.between(150, most_ms));
        let words = u64::from(tokens_max) / 4;
        let wanted = Wanted { model: MODELS[0].name, script: &script, words, tokens_max };
        let (request_id, request) = caller.request(&wanted);
        requests.insert(request_id, request.tenant(&caller.name));
    }
    caller.submit_all(requests).await.len()
}
