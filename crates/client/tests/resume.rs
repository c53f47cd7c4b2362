//! The client against a server that breaks its streams: nothing is lost, nothing is submitted twice.

#![expect(clippy::unwrap_used, reason = "the stand-in server is part of the tests")]

use futures_util::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use genmill_client::{Acknowledgement, Client, Error, Event, FinishedJob, Outcome, Reason, Request, Until, v1};
use genmill_wire::error::ApiError;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::transport::server::TcpIncoming;
use tonic::{Response, Status, Streaming};
use v1::job_service_server::{JobService, JobServiceServer};
use v1::watch_job_response::Event as Sent;

type Answer<T> = Result<Response<T>, Status>;
type Script<T> = VecDeque<Vec<Result<T, Status>>>;

/// A server that plays scripts: each call of a watch plays the next one. Bulk submission acknowledges so many items
/// as the script says, then breaks.
#[derive(Default)]
struct Played {
    watch: Script<v1::WatchJobResponse>,
    watch_calls: Vec<v1::WatchJobRequest>,
    watch_jobs: Script<v1::WatchJobsResponse>,
    watch_jobs_calls: Vec<v1::WatchJobsRequest>,
    submit_breaks: VecDeque<(u64, Status)>,
    submitted: Vec<String>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Played>>);

fn gone() -> Status {
    Status::unavailable("gone")
}

#[tonic::async_trait]
impl JobService for Fake {
    async fn submit_job(&self, _: tonic::Request<v1::SubmitJobRequest>) -> Answer<v1::SubmitJobResponse> {
        let job = v1::Job { id: "j".to_owned(), ..v1::Job::default() };
        Ok(Response::new(v1::SubmitJobResponse { job: Some(job), existed: false }))
    }

    type SubmitJobsStream = BoxStream<'static, Result<v1::SubmitJobsResponse, Status>>;
    async fn submit_jobs(
        &self,
        requests: tonic::Request<Streaming<v1::SubmitJobsRequest>>,
    ) -> Answer<Self::SubmitJobsStream> {
        let stop = self.0.lock().unwrap().submit_breaks.pop_front();
        let fake = self.clone();
        let items = requests.into_inner().enumerate().map(move |(index, request)| {
            let index = u64::try_from(index).unwrap();
            if let Some((_, status)) = stop.as_ref().filter(|(after, _)| index == *after) {
                return Err(status.clone());
            }
            let id = request?.request.unwrap().request_id;
            let outcome = v1::submit_jobs_response::Outcome::JobId(format!("job of {id}"));
            fake.0.lock().unwrap().submitted.push(id);
            Ok(v1::SubmitJobsResponse { index, outcome: Some(outcome), existed: false })
        });
        Ok(Response::new(items.boxed()))
    }

    type WatchJobStream = BoxStream<'static, Result<v1::WatchJobResponse, Status>>;
    async fn watch_job(&self, request: tonic::Request<v1::WatchJobRequest>) -> Answer<Self::WatchJobStream> {
        let mut played = self.0.lock().unwrap();
        played.watch_calls.push(request.into_inner());
        Ok(Response::new(stream::iter(played.watch.pop_front().ok_or_else(gone)?).boxed()))
    }

    type WatchJobsStream = BoxStream<'static, Result<v1::WatchJobsResponse, Status>>;
    async fn watch_jobs(&self, request: tonic::Request<v1::WatchJobsRequest>) -> Answer<Self::WatchJobsStream> {
        let mut played = self.0.lock().unwrap();
        played.watch_jobs_calls.push(request.into_inner());
        Ok(Response::new(stream::iter(played.watch_jobs.pop_front().ok_or_else(gone)?).boxed()))
    }

    async fn get_job(&self, _: tonic::Request<v1::GetJobRequest>) -> Answer<v1::GetJobResponse> {
        Err(ApiError::new(Reason::JobNotFound, "no such job").into())
    }

    async fn list_jobs(&self, request: tonic::Request<v1::ListJobsRequest>) -> Answer<v1::ListJobsResponse> {
        let page: u32 = request.into_inner().page_token.parse().unwrap_or(0);
        let job = |n: u32| v1::Job { id: format!("{page}.{n}"), ..v1::Job::default() };
        let next_page_token = if page < 2 { (page + 1).to_string() } else { String::new() };
        // A page may be empty although more follow.
        let jobs = if page == 1 { Vec::new() } else { vec![job(0), job(1)] };
        Ok(Response::new(v1::ListJobsResponse { jobs, next_page_token }))
    }

    async fn cancel_job(&self, _: tonic::Request<v1::CancelJobRequest>) -> Answer<v1::CancelJobResponse> {
        Ok(Response::new(v1::CancelJobResponse::default()))
    }

    async fn cancel_jobs(&self, _: tonic::Request<v1::CancelJobsRequest>) -> Answer<v1::CancelJobsResponse> {
        Ok(Response::new(v1::CancelJobsResponse { cancelled: 2, cancelling: 1 }))
    }
}

/// A client of a server that plays `played`, and what the server saw. The server ends with the set.
async fn start(played: Played) -> (Client, Fake, JoinSet<()>) {
    let fake = Fake(Arc::new(Mutex::new(played)));
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let service = JobServiceServer::new(fake.clone());
    let mut server = JoinSet::new();
    server.spawn(async move {
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
    });
    (Client::connect(&address.to_string()).await.unwrap(), fake, server)
}

fn text(epoch: u32, offset: u64, text: &str) -> Result<v1::WatchJobResponse, Status> {
    let delta = v1::TextDelta { epoch, offset, text: text.to_owned(), sample: 0 };
    Ok(v1::WatchJobResponse { event: Some(Sent::Text(delta)) })
}

fn ended(job: v1::Job) -> Result<v1::WatchJobResponse, Status> {
    Ok(v1::WatchJobResponse { event: Some(Sent::Job(job)) })
}

fn succeeded(text: &str) -> v1::Job {
    let result = v1::Result { text: text.to_owned(), ..v1::Result::default() };
    v1::Job { state: v1::JobState::Succeeded.into(), result: Some(result), ..v1::Job::default() }
}

#[tokio::test]
async fn a_broken_watch_goes_on_where_it_was() {
    let restarted = Ok(v1::WatchJobResponse { event: Some(Sent::Restarted(v1::Restarted { epoch: 2 })) });
    let watch = VecDeque::from([
        vec![text(1, 0, "Hä"), Err(gone())],
        // Ends in good order, but too early.
        vec![text(1, 3, "l")],
        vec![restarted, Err(gone())],
        vec![text(2, 0, "Ho"), ended(succeeded("Ho")), Err(gone())],
    ]);
    let (client, fake, _server) = start(Played { watch, ..Played::default() }).await;
    let events: Vec<Event> = client.watch("j").try_collect().await.unwrap();
    assert_eq!(events.len(), 5);
    assert!(matches!(events.last(), Some(Event::Finished(_))));
    let places: Vec<_> = fake.0.lock().unwrap().watch_calls.iter().map(|call| (call.epoch, call.offset)).collect();
    assert_eq!(places, [(0, 0), (1, 3), (1, 4), (2, 0)]);
}

#[tokio::test]
async fn a_watch_that_is_refused_fails_at_once() {
    let refused = ApiError::new(Reason::InvalidRequest, "offset");
    let watch = VecDeque::from([vec![Err(refused.into())]]);
    let (client, fake, _server) = start(Played { watch, ..Played::default() }).await;
    let events: Vec<_> = client.watch("j").collect().await;
    assert!(matches!(events.as_slice(), [Err(Error::Refused { reason: Reason::InvalidRequest, .. })]));
    assert_eq!(fake.0.lock().unwrap().watch_calls.len(), 1);
}

#[tokio::test]
async fn patience_ends() {
    let (client, _, _server) = start(Played::default()).await;
    let client = client.with_patience(Duration::from_millis(300));
    let events: Vec<_> = client.watch("j").collect().await;
    assert!(matches!(events.as_slice(), [Err(Error::Unreachable { .. })]), "{events:?}");
}

#[tokio::test]
async fn generate_waits_for_the_result() {
    let watch = VecDeque::from([vec![text(1, 0, "4"), ended(succeeded("4"))]]);
    let (client, _, _server) = start(Played { watch, ..Played::default() }).await;
    assert_eq!(client.generate(Request::new("vllm_x").prompt("2 + 2 =")).await.unwrap().text, "4");
}

#[tokio::test]
async fn generate_fails_when_the_job_does() {
    let job = v1::Job { state: v1::JobState::Expired.into(), ..v1::Job::default() };
    let watch = VecDeque::from([vec![ended(job)]]);
    let (client, _, _server) = start(Played { watch, ..Played::default() }).await;
    let error = client.generate(Request::new("vllm_x").prompt("x")).await.unwrap_err();
    assert!(matches!(error, Error::JobFailed { .. }), "{error}");
}

#[tokio::test]
async fn a_broken_watch_of_many_jobs_goes_on_after_its_cursor() {
    let finished = |n: u32, job| Ok(v1::WatchJobsResponse { job, cursor: n.to_string() });
    let some = || Some(v1::Job::default());
    let watch_jobs =
        VecDeque::from([vec![finished(1, some()), finished(2, None), Err(gone())], vec![finished(3, some())]]);
    let (client, fake, _server) = start(Played { watch_jobs, ..Played::default() }).await;
    let seen: Vec<FinishedJob> =
        client.watch_jobs(v1::JobFilter::default(), String::new(), Until::Idle).try_collect().await.unwrap();
    assert_eq!(seen.iter().map(|finished| finished.cursor.as_str()).collect::<Vec<_>>(), ["1", "3"]);
    let cursors: Vec<_> =
        fake.0.lock().unwrap().watch_jobs_calls.iter().map(|call| (call.cursor.clone(), call.until_idle)).collect();
    assert_eq!(cursors, [(String::new(), true), ("2".to_owned(), true)]);
}

#[tokio::test]
async fn every_item_is_acknowledged_once_and_in_order() {
    let queue_away = || ApiError::new(Reason::QueueUnavailable, "redis does not answer").into();
    let submit_breaks = VecDeque::from([(3, gone()), (0, queue_away()), (2_500, gone())]);
    let (client, fake, _server) = start(Played { submit_breaks, ..Played::default() }).await;
    let requests = (0..6_000).map(|n| Request::new("vllm_x").prompt(n.to_string()).request_id(n.to_string()));
    let acknowledgements: Vec<Acknowledgement> = client.submit_all(stream::iter(requests)).try_collect().await.unwrap();
    let expected = (0..6_000).map(|n: u64| {
        let outcome = Outcome::Accepted { job_id: format!("job of {n}"), existed: false };
        Acknowledgement { index: n, request_id: n.to_string(), outcome }
    });
    assert!(acknowledgements.into_iter().eq(expected));
    let mut submitted = fake.0.lock().unwrap().submitted.clone();
    assert!(submitted.len() >= 6_000, "unacknowledged items are sent again");
    submitted.sort_unstable();
    submitted.dedup();
    assert_eq!(submitted.len(), 6_000);
}

#[tokio::test]
async fn an_item_without_id_gets_one_of_its_own() {
    let (client, fake, _server) = start(Played::default()).await;
    let requests = (0..3).map(|_| Request::new("vllm_x").prompt("x"));
    let acknowledgements: Vec<_> = client.submit_all(stream::iter(requests)).try_collect().await.unwrap();
    let ids: Vec<_> = acknowledgements.into_iter().map(|acknowledgement| acknowledgement.request_id).collect();
    assert_eq!(fake.0.lock().unwrap().submitted, ids);
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && !ids[0].is_empty());
}

#[tokio::test]
async fn an_oversized_item_is_refused_and_the_others_are_not() {
    let (client, fake, _server) = start(Played::default()).await;
    let lengths = [1, 5 * 1024 * 1024, 1, 5 * 1024 * 1024];
    let requests = lengths.map(|length| Request::new("vllm_x").prompt("x".repeat(length)));
    let acknowledgements: Vec<_> = client.submit_all(stream::iter(requests)).try_collect().await.unwrap();
    let refused = acknowledgements.iter().map(|item| matches!(item.outcome, Outcome::Refused(_)));
    assert_eq!(refused.collect::<Vec<_>>(), [false, true, false, true]);
    assert_eq!(fake.0.lock().unwrap().submitted.len(), 2);
}

#[tokio::test]
async fn nothing_to_submit_ends_at_once() {
    let (client, _, _server) = start(Played::default()).await;
    assert_eq!(client.submit_all(stream::empty::<Request>()).count().await, 0);
}

#[tokio::test]
async fn a_list_reads_all_pages() {
    let (client, _, _server) = start(Played::default()).await;
    let jobs: Vec<v1::Job> = client.list(v1::JobFilter::default()).try_collect().await.unwrap();
    assert_eq!(jobs.iter().map(|job| job.id.as_str()).collect::<Vec<_>>(), ["0.0", "0.1", "2.0", "2.1"]);
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let (client, _, _server) = start(Played::default()).await;
    assert!(matches!(client.get("x").await, Err(Error::NotFound { message }) if message == "no such job"));
    assert!(matches!(client.cancel("x").await, Err(Error::Protocol { .. })));
}

#[tokio::test]
async fn an_address_where_nobody_answers_is_unreachable() {
    // Bound and dropped, so nobody answers there.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Client::connect(&address.to_string()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}
