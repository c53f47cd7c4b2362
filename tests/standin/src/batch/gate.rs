//! Holds up calls that make batches, before anything of them is read. Never here: what becomes of them then.

use super::Shared;
use axum::extract::Request;
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use tokio::sync::watch;

/// What happens to the next call that makes a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Gate {
    /// It goes through.
    #[default]
    Open,
    /// It is held up; those after it go through.
    Armed,
    /// One is held up.
    Holds,
}

/// Lets calls through that the gate does not hold up.
pub(crate) async fn pass(provider: Shared, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let ends = ["/messages/batches", "/v1/batches", "/batch/jobs", ":batchGenerateContent"];
    let makes = request.method() == Method::POST && ends.iter().any(|end| path.ends_with(end));
    let gate = &provider.batches.gate;
    let held = makes
        && gate.send_if_modified(|gate| {
            *gate == Gate::Armed && {
                *gate = Gate::Holds;
                true
            }
        });
    if held {
        drop(gate.subscribe().wait_for(|gate| *gate == Gate::Open).await);
    }
    next.run(request).await
}

/// A gate that is open.
pub(super) fn open() -> watch::Sender<Gate> {
    watch::Sender::new(Gate::Open)
}
