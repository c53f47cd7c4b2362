//! /healthz (the process answers) and /readyz (it can do its work), for people and for Kubernetes; /metrics for Prometheus,
//! where a daemon measures something.

use crate::shutdown::Shutdown;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Whether a daemon can do its work, and if not, why. Clones share one state.
#[derive(Clone, Debug)]
pub struct Readiness {
    state: watch::Sender<Result<(), String>>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self { state: watch::Sender::new(Err("starting".to_owned())) }
    }
}

impl Readiness {
    /// Says that work can be done.
    pub fn ready(&self) {
        drop(self.state.send_replace(Ok(())));
    }

    /// Says that it cannot, and why.
    pub fn not_ready(&self, why: impl Into<String>) {
        drop(self.state.send_replace(Err(why.into())));
    }
}

/// Why an address cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {listen}")]
pub struct CannotListen {
    /// The address.
    pub listen: String,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// Listens on `HOST:PORT`; returns the listener and the address that was bound.
///
/// # Errors
/// [`CannotListen`] when the address is taken or none.
pub async fn bind(listen: &str) -> Result<(TcpListener, SocketAddr), CannotListen> {
    let fail = |source| CannotListen { listen: listen.to_owned(), source };
    let listener = TcpListener::bind(listen).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    Ok((listener, address))
}

/// Tells what was measured, in the text format of Prometheus (version 0.0.4).
pub type Metrics = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves both endpoints on `listen` until shutdown; returns the address that was bound.
///
/// # Errors
/// [`CannotListen`] when the address is taken or none.
pub async fn serve(listen: &str, readiness: Readiness, shutdown: &Shutdown) -> Result<SocketAddr, CannotListen> {
    serve_routes(listen, routes(readiness), shutdown).await
}

/// Serves these endpoints and /metrics.
///
/// # Errors
/// [`CannotListen`] when the address is taken or none.
pub async fn serve_with_metrics(
    listen: &str,
    readiness: Readiness,
    metrics: Metrics,
    shutdown: &Shutdown,
) -> Result<SocketAddr, CannotListen> {
    let told = async move || ([(CONTENT_TYPE, "text/plain; version=0.0.4")], metrics());
    serve_routes(listen, routes(readiness).route("/metrics", get(told)), shutdown).await
}

fn routes(readiness: Readiness) -> Router {
    Router::new().route("/healthz", get(async || "ok\n")).route("/readyz", get(readyz)).with_state(readiness)
}

async fn serve_routes(listen: &str, routes: Router, shutdown: &Shutdown) -> Result<SocketAddr, CannotListen> {
    let (listener, address) = bind(listen).await?;
    let token = shutdown.token();
    shutdown.spawn(async move {
        let server = axum::serve(listener, routes).with_graceful_shutdown(token.cancelled_owned());
        if let Err(error) = server.await {
            tracing::warn!(%error, "health endpoints ended");
        }
    });
    Ok(address)
}

async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, String) {
    match &*readiness.state.borrow() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}
