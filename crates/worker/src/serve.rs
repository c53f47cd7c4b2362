//! A whole worker daemon around a performer: queue, health endpoints, registration, loop. Both workers start alike.

use crate::batches::PerformBatches;
use crate::batching::{self, Batching};
use crate::perform::Perform;
use crate::run::{Options, run};
use anyhow::Context as _;
use genmill_core::ids::WorkerId;
use genmill_core::judge::Policy;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_daemon::health::{self, Readiness};
use genmill_daemon::host::host_name;
use genmill_daemon::random::random_u64;
use genmill_daemon::run::{Context, print_ready};
use genmill_queue::{Queue, QueueError};
use std::future::Future;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// What tells one kind of worker from another.
#[derive(Clone, Debug)]
pub struct Kind {
    /// The first part of its workers' ids.
    pub name: &'static str,
    /// The backend prefixes whose configuration it reads.
    pub prefixes: Vec<String>,
}

/// Serves with `performer` until shutdown begins, then drains. Says `ready http=HOST:PORT` on standard output once
/// jobs can be taken.
///
/// # Errors
/// When Redis does not answer at the start, or the health address cannot be listened on.
pub async fn serve<P: Perform>(context: Context, kind: Kind, performer: Arc<P>) -> anyhow::Result<()> {
    serve_beside(context, kind, performer, |_, _, _| async { Ok(()) }).await
}

/// The same with a performer that also has jobs done in batches.
///
/// # Errors
/// As [`serve`].
pub async fn serve_batches<P: Perform + PerformBatches>(
    context: Context,
    kind: Kind,
    performer: Arc<P>,
    times: Batching,
) -> anyhow::Result<()> {
    let batches = performer.clone();
    serve_beside(context, kind, performer, |queue, options, stop| batching::run(queue, batches, options, times, stop))
        .await
}

/// Serves, and does something beside it with the same queue until shutdown begins.
async fn serve_beside<P: Perform, F: Future<Output = Result<(), QueueError>> + Send>(
    context: Context,
    kind: Kind,
    performer: Arc<P>,
    beside: impl FnOnce(Queue, Arc<Options>, CancellationToken) -> F,
) -> anyhow::Result<()> {
    let Context { config, shutdown, .. } = context;
    let redis = &config.redis;
    let at = genmill_queue::Options { url: redis.url_or_default().to_owned(), namespace: redis.namespace.clone() };
    let queue = Queue::connect(&at).await.context("cannot use redis (set redis.url)")?;
    let readiness = Readiness::default();
    let measured = performer.clone();
    let metrics = Arc::new(move || measured.metrics());
    let listen = &config.worker.http_listen;
    let http = health::serve_with_metrics(listen, readiness.clone(), metrics, &shutdown).await?;
    let options = Options {
        worker: WorkerId::new(kind.name, &host_name(), random_u64()?),
        started_at: UnixMs(now_unix_ms()),
        prefixes: kind.prefixes,
        lease_ms: config.worker.lease_ms,
        heartbeat_ms: config.worker.heartbeat_ms,
        drain_timeout_ms: config.worker.drain_timeout_ms,
        policy: Policy {
            retries_max: config.worker.retries_max,
            delay_ms_first: config.worker.retry_delay_ms,
            ..Policy::default()
        },
    };
    if performer.models().is_empty() {
        let (folder, prefixes) = (config.models.dir.display(), options.prefixes.join(", "));
        tracing::warn!(%folder, prefixes, "no model is listed for this worker: nothing to do until it is started again");
    }
    tracing::info!(worker = %options.worker, %http, "serving");
    let ready = move || {
        readiness.ready();
        if let Err(error) = print_ready(&[("http", http.to_string())]) {
            tracing::warn!(%error, "cannot say that this worker is ready");
        }
    };
    let beside = beside(queue.clone(), Arc::new(options.clone()), shutdown.token());
    tokio::try_join!(run(queue, performer, options, shutdown.token(), ready), beside)?;
    Ok(())
}
