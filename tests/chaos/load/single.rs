//! A caller of one job at a time: submits it, sometimes twice, follows its text or reads it now and then, sometimes
//! cancels it, and reads the result more than once.

use super::{AGAIN_AFTER, Caller, Event, Wanted, is_final, sleep};
use genmill_client::{Error, Request};
use std::time::{Duration, UNIX_EPOCH};
use tokio_stream::StreamExt as _;

/// What happens to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    /// Its text comes word by word.
    Slow,
    /// The provider fails in the first call.
    FailsOnce,
    /// The provider's answer breaks off in the first call.
    BreaksOnce,
    /// The provider refuses it for good.
    Refused,
    /// The first attempt takes longer than it may.
    TimesOutOnce,
    /// It is cancelled soon.
    Cancelled,
    /// It may end after its deadline.
    Late,
}

const KINDS: &[Kind] = &[
    Kind::Plain,
    Kind::Plain,
    Kind::Slow,
    Kind::Slow,
    Kind::FailsOnce,
    Kind::BreaksOnce,
    Kind::Refused,
    Kind::TimesOutOnce,
    Kind::Cancelled,
    Kind::Cancelled,
    Kind::Late,
];

impl Kind {
    const fn script(self) -> &'static str {
        match self {
            Self::Plain => "!sleep=120",
            Self::Slow => "!slow-stream=40",
            Self::FailsOnce => "!status=429 times=1 retry-after-ms=300",
            Self::BreaksOnce => "!cut-after=3 times=1",
            Self::Refused => "!status=400",
            Self::TimesOutOnce => "!sleep=6000 times=1",
            Self::Cancelled => "!slow-stream=300",
            Self::Late => "!sleep=900",
        }
    }
}

/// Works until it is told to stop.
pub(super) async fn work(mut caller: Caller) {
    while !caller.stop.is_cancelled() {
        let kind = *caller.dice.pick(KINDS).unwrap_or(&Kind::Plain);
        one(&mut caller, kind).await;
    }
}

async fn one(caller: &mut Caller, kind: Kind) {
    let wanted =
        Wanted { model: caller.any_model(), script: kind.script(), words: caller.dice.between(2, 14), tokens_max: 40 };
    let (request_id, request) = caller.request(&wanted);
    let request = with_bounds(caller, kind, request.tenant("callers"));
    let Some(id) = caller.submit(&request_id, &request).await else { return };
    if kind == Kind::Cancelled {
        cancel(caller, &id).await;
    }
    // Every other one follows the text; the others look now and then.
    let followed = caller.dice.roll(2) == 0 && follow(caller, &id).await;
    while !followed && !caller.read(&id).await.is_some_and(|job| is_final(job.state())) {
        sleep(AGAIN_AFTER).await;
    }
    match caller.dice.roll(6) {
        0 => drop(caller.submit(&request_id, &request).await),
        // Once its deadline has passed, the other request is wrong by itself.
        1 if kind != Kind::Late => reuse(caller, &request_id, request).await,
        _ => {}
    }
    caller.read(&id).await;
}

fn with_bounds(caller: &mut Caller, kind: Kind, request: Request) -> Request {
    match kind {
        Kind::TimesOutOnce => request.timeout(Duration::from_millis(700)),
        Kind::Late => {
            let deadline_ms = caller.history.clock().now_ms() + caller.dice.between(500, 2_500);
            request.deadline(UNIX_EPOCH + Duration::from_millis(deadline_ms))
        }
        _ => request,
    }
}

async fn cancel(caller: &mut Caller, id: &str) {
    let wait_ms = caller.dice.between(0, 900);
    sleep(Duration::from_millis(wait_ms)).await;
    caller.history.note(Event::CancelAsked { job: id.to_owned() });
    match caller.until_answered(|| caller.client.cancel(id)).await {
        Ok(job) => caller.history.note(Event::CancelAnswered { job: job.id }),
        Err(error) => caller.trouble("cancelling", &error),
    }
}

/// Follows a job's text to its end. False when that failed.
async fn follow(caller: &Caller, id: &str) -> bool {
    let mut text = String::new();
    let mut events = Box::pin(caller.client.watch(id));
    while let Some(event) = events.next().await {
        match event {
            Ok(genmill_client::Event::Text(delta)) => text.push_str(&delta.text),
            Ok(genmill_client::Event::Restarted { .. }) => text.clear(),
            Ok(genmill_client::Event::Finished(job)) => {
                caller.history.note(Event::Seen { job: job.id.clone(), face: super::Face::of(&job) });
                if job.result.is_some() {
                    caller.history.note(Event::Text { job: job.id, text });
                }
                return true;
            }
            Err(error) => caller.trouble("watching", &error),
        }
    }
    false
}

/// Uses a request id for another request, which must be refused.
async fn reuse(caller: &Caller, request_id: &str, request: Request) {
    let other = request.prompt("!echo=something else");
    let answer = match caller.until_answered(|| caller.client.submit(other.clone())).await {
        Ok(submitted) => format!("accepted as {}", submitted.job.id),
        Err(Error::Refused { reason, .. }) => reason.name().to_owned(),
        Err(error) => return caller.trouble("using a request id again", &error),
    };
    caller.history.note(Event::Reused { request_id: request_id.to_owned(), answer });
}
