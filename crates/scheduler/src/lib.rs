//! The scheduler: RPCs, admission and upkeep. Stateless: any number of them may run on one Redis.
//!
//! Never here: running a model, Redis commands (`genmill-queue`), rules (`genmill-core`).

mod facts;
mod forms;
mod hub;
mod mill;
mod rpc;
mod submission;
mod upkeep;

use crate::hub::Hub;
use crate::mill::Mill;
use anyhow::Context as _;
use genmill_core::admit::Defaults;
use genmill_core::judge::Policy;
use genmill_daemon::health::{self, Readiness};
use genmill_daemon::run::{Context, print_ready};
use genmill_queue::{Options, Queue};
use std::time::Duration;
use tonic::transport::server::TcpIncoming;

/// Serves until shutdown begins, then lets open calls end.
///
/// # Errors
/// When Redis does not answer at the start, or an address cannot be listened on.
pub async fn run(context: Context) -> anyhow::Result<()> {
    let Context { config, shutdown, .. } = context;
    let options = Options { url: config.redis.url_or_default().to_owned(), namespace: config.redis.namespace.clone() };
    let queue = Queue::connect(&options).await.context("cannot use redis (set redis.url)")?;
    let hub = Hub::default();
    let events = queue.events().await?;
    shutdown.spawn(hub.clone().listen(events, shutdown.token()));
    let readiness = Readiness::default();
    let policy = Policy {
        retries_max: config.worker.retries_max,
        delay_ms_first: config.worker.retry_delay_ms,
        ..Policy::default()
    };
    shutdown.spawn(upkeep::run(queue.clone(), policy, readiness.clone(), shutdown.token()));
    let defaults = Defaults {
        max_tokens: config.scheduler.max_tokens,
        temperature: config.scheduler.temperature,
        ..Defaults::default()
    };
    let mill = Mill::new(queue, hub, defaults, shutdown.clone());
    let (listener, grpc) = health::bind(&config.scheduler.listen).await?;
    let listener = TcpIncoming::from(listener).with_nodelay(Some(true));
    let http = health::serve(&config.scheduler.http_listen, readiness.clone(), &shutdown).await?;
    readiness.ready();
    print_ready(&[("grpc", grpc.to_string()), ("http", http.to_string())])?;
    tracing::info!(%grpc, %http, "serving");
    let serving = rpc::router(mill).await?.serve_with_incoming_shutdown(listener, shutdown.token().cancelled_owned());
    let patience = async {
        shutdown.token().cancelled().await;
        tokio::time::sleep(Duration::from_millis(config.scheduler.drain_timeout_ms)).await;
    };
    tokio::select! {
        served = serving => served.context("cannot serve gRPC"),
        () = patience => {
            tracing::warn!("some calls did not end in time");
            Ok(())
        }
    }
}
