//! A tenant that sends experiments in bulk, breaks its streams, sends again, cancels some as a whole, and reads the results
//! with one watch.

use super::{Caller, Event, Wanted, sleep};
use genmill_client::{Until, v1};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio_stream::StreamExt as _;

/// Works until it is told to stop.
pub(super) async fn work(mut caller: Caller) {
    while !caller.stop.is_cancelled() {
        experiment(&mut caller).await;
        let rest_ms = caller.dice.between(100, 1_500);
        sleep(Duration::from_millis(rest_ms)).await;
    }
}

async fn experiment(caller: &mut Caller) {
    let experiment = format!("{}-{}", caller.name, caller.drawn);
    let mut requests = BTreeMap::new();
    for _ in 0..caller.dice.between(20, 50) {
        // Some make the provider fail once; their jobs are tried again.
        let script = match caller.dice.roll(8) {
            0 => "!status=500 times=1",
            1 => "!cut-after=2 times=1",
            _ => "!sleep=100",
        };
        let model = caller.any_model();
        let wanted = Wanted { model, script, words: caller.dice.between(3, 12), tokens_max: 40 };
        let (request_id, request) = caller.request(&wanted);
        requests.insert(request_id, request.tenant(&caller.name).experiment(&experiment).priority(v1::Priority::Bulk));
    }
    // The stream breaks in the middle. Whatever was stored by then, all is sent again.
    let broken_after = usize::try_from(caller.dice.between(1, 20)).unwrap_or(1);
    caller.send(&requests, broken_after).await;
    let jobs = caller.submit_all(requests).await;
    let filter = v1::JobFilter { experiment: experiment.clone(), ..v1::JobFilter::default() };
    if caller.dice.roll(3) == 0 {
        for job in &jobs {
            caller.history.note(Event::CancelAsked { job: job.clone() });
        }
        match caller.until_answered(|| caller.client.cancel_all(filter.clone())).await {
            Ok(_) => jobs.into_iter().for_each(|job| caller.history.note(Event::CancelAnswered { job })),
            Err(error) => caller.trouble("cancelling many", &error),
        }
    }
    let mut finished = Box::pin(caller.watch(&experiment, filter, Until::Idle));
    while let Some(job) = finished.next().await {
        caller.told(&experiment, job);
    }
}
