//! Passes the text of a lane's running attempts on to the queue, a few times a second and together: what a call costs is
//! shared by every attempt that has text.

use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_queue::{Piece, Queue};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;

/// Text is passed on this often at most, so that a fast model does not cost a call per token.
const COALESCE: Duration = Duration::from_millis(30);

/// Pieces that may wait to be passed on; whoever reports more then waits.
pub(crate) const PIECES_MAX: usize = 4096;

/// How many attempts' text one call carries at most: bounds the time one script takes.
const BATCH: usize = 100;

/// Passes on what comes through `pieces` until its senders are gone. Text that Redis did not take is not sent again: the
/// queue drops what would leave a gap, and the result has the whole text.
pub(crate) async fn pass_on(queue: Queue, lane: LaneNumber, worker: WorkerId, mut pieces: mpsc::Receiver<Piece>) {
    let mut waiting = Vec::new();
    while pieces.recv_many(&mut waiting, PIECES_MAX).await > 0 {
        tokio::time::sleep(COALESCE).await;
        while let Ok(piece) = pieces.try_recv() {
            waiting.push(piece);
            if waiting.len() >= 2 * PIECES_MAX {
                break;
            }
        }
        for pieces in by_attempt(waiting.drain(..)).chunks(BATCH) {
            if let Err(error) = queue.append(lane, &worker, pieces).await {
                tracing::warn!(%error, jobs = pieces.len(), "text is not shown while it comes");
            }
        }
    }
}

/// Joins the pieces of each attempt.
fn by_attempt(pieces: impl Iterator<Item = Piece>) -> Vec<Piece> {
    let mut attempts: BTreeMap<(JobId, Epoch), Piece> = BTreeMap::new();
    for piece in pieces {
        attempts
            .entry((piece.held.id, piece.held.epoch))
            .and_modify(|joined| joined.text.push_str(&piece.text))
            .or_insert(piece);
    }
    attempts.into_values().collect()
}
