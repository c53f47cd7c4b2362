//! Passes the text of a lane's running attempts on to the queue, a few times a second and together: what a call costs is
//! shared by every attempt that has text.

use crate::perform::Reported;
use genmill_core::ids::{Epoch, JobId, LaneNumber, WorkerId};
use genmill_queue::{Held, Piece, Queue};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Text is passed on this often at most, so that a fast model does not cost a call per token…
const COALESCE: Duration = Duration::from_millis(30);

/// …or once an attempt has this many pieces, which are tokens of most models.
const PIECES_AT_ONCE: usize = 16;

/// Text that Redis did not take is sent again this long afterwards.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Pieces that may wait to be passed on; whoever reports more then waits.
pub(crate) const PIECES_MAX: usize = 4096;

/// How many attempts' text one call carries at most: bounds the time one script takes.
const BATCH: usize = 100;

/// Passes on what comes through `reported` until its senders are gone.
pub(crate) async fn pass_on(queue: Queue, lane: LaneNumber, worker: WorkerId, mut reported: mpsc::Receiver<Reported>) {
    let mut texts = Texts::default();
    let mut waiting = Vec::new();
    let mut failed = false;
    loop {
        if !texts.any_unsent() && !receive(&mut reported, &mut waiting, &mut texts).await {
            return;
        }
        let due = Instant::now() + if failed { AGAIN_AFTER } else { COALESCE };
        while failed || !texts.full {
            tokio::select! {
                biased;
                () = sleep_until(due) => break,
                open = receive(&mut reported, &mut waiting, &mut texts) => if !open { break },
            }
        }
        failed = false;
        // The results of those have it, or nobody is to see it.
        texts.forget_ended();
        for pieces in texts.unsent().chunks(BATCH) {
            match queue.append(lane, &worker, pieces).await {
                Ok(stored) => pieces.iter().zip(stored).for_each(|(piece, stored)| texts.sent(piece.held, stored)),
                Err(error) => {
                    failed = true;
                    tracing::warn!(error = error.in_full(), jobs = pieces.len(), "text is not shown while it comes");
                }
            }
        }
    }
}

/// Takes what has been reported. False once nobody reports any more.
async fn receive(reported: &mut mpsc::Receiver<Reported>, waiting: &mut Vec<Reported>, texts: &mut Texts) -> bool {
    let received = reported.recv_many(waiting, PIECES_MAX).await;
    waiting.drain(..).for_each(|reported| texts.add(reported));
    received > 0
}

/// The texts of running attempts, each from its beginning: Redis may lose the end of what it had.
#[derive(Debug, Default)]
struct Texts {
    attempts: BTreeMap<(JobId, Epoch), Text>,
    /// An attempt has as much as is sent at once.
    full: bool,
}

#[derive(Debug)]
struct Text {
    text: String,
    /// Bytes of it that the queue has; `None` when it takes no more, because the lease was lost.
    stored: Option<usize>,
    /// Pieces since it was last sent.
    pieces: usize,
    /// Dangles once no more can come.
    open: Weak<()>,
}

impl Text {
    fn unsent(&self) -> Option<(usize, &str)> {
        let stored = self.stored?;
        let rest = self.text.get(stored..).filter(|rest| !rest.is_empty())?;
        Some((stored, rest))
    }
}

impl Texts {
    fn add(&mut self, reported: Reported) {
        let Reported { held, text, open } = reported;
        let open = || Text { text: String::new(), stored: Some(0), pieces: 0, open: Arc::downgrade(&open) };
        let attempt = self.attempts.entry((held.id, held.epoch)).or_insert_with(open);
        if attempt.stored.is_some() {
            attempt.text.push_str(&text);
            attempt.pieces += 1;
            self.full |= attempt.pieces >= PIECES_AT_ONCE;
        }
    }

    fn any_unsent(&self) -> bool {
        self.attempts.values().any(|attempt| attempt.unsent().is_some())
    }

    /// What the queue does not have, as far as is known.
    fn unsent(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        self.full = false;
        for ((id, epoch), attempt) in &mut self.attempts {
            attempt.pieces = 0;
            if let Some((offset, text)) = attempt.unsent() {
                let (held, offset) = (Held { id: *id, epoch: *epoch }, u64::try_from(offset).unwrap_or(u64::MAX));
                pieces.push(Piece { held, offset, text: text.to_owned() });
            }
        }
        pieces
    }

    /// The queue has so many bytes of an attempt's text now: fewer than it was sent when it had lost some before.
    fn sent(&mut self, held: Held, stored: Option<u64>) {
        if let Some(attempt) = self.attempts.get_mut(&(held.id, held.epoch)) {
            attempt.stored = stored.and_then(|bytes| usize::try_from(bytes).ok());
            if attempt.stored.is_none() {
                attempt.text = String::new();
            }
        }
    }

    /// Forgets attempts that have ended. What the queue did not take of their text stands in their results.
    fn forget_ended(&mut self) {
        self.attempts.retain(|_, attempt| attempt.open.strong_count() > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_core::time::UnixMs;

    const WHOLE: &str = "Grüße an alle";

    struct Bench {
        texts: Texts,
        open: Arc<()>,
        held: Held,
    }

    impl Bench {
        fn new() -> Self {
            let held = Held { id: JobId::new(UnixMs(1), LaneNumber(1), 1), epoch: Epoch(1) };
            Self { texts: Texts::default(), open: Arc::default(), held }
        }

        fn report(&mut self, text: &str) {
            self.texts.add(Reported { held: self.held, text: text.to_owned(), open: self.open.clone() });
        }

        fn unsent(&mut self) -> Option<(u64, String)> {
            self.texts.unsent().pop().map(|piece| (piece.offset, piece.text))
        }
    }

    #[test]
    fn text_is_sent_from_where_the_queue_has_it() {
        for (stored, expect) in [
            (Some(15), None),
            // A call whose answer was lost had added more; one that failed had added less, or Redis has lost some.
            (Some(7), Some((7, " an alle"))),
            (Some(0), Some((0, WHOLE))),
            // Not a text of this attempt: what Redis has is beyond it, or ends inside a character.
            (Some(99), None),
            (Some(3), None),
            (None, None),
        ] {
            let mut bench = Bench::new();
            bench.report("Grüße");
            assert_eq!(bench.unsent(), Some((0, "Grüße".to_owned())));
            bench.report(" an alle");
            bench.texts.sent(bench.held, stored);
            let expect = expect.map(|(offset, text)| (offset, text.to_owned()));
            assert_eq!((bench.texts.any_unsent(), bench.unsent()), (expect.is_some(), expect), "{stored:?}");
        }
    }

    #[test]
    fn sixteen_pieces_of_an_attempt_do_not_wait() {
        let mut bench = Bench::new();
        for _ in 0..2 {
            for _ in 0..PIECES_AT_ONCE {
                assert!(!bench.texts.full);
                bench.report("x");
            }
            assert!(bench.texts.full);
            bench.unsent();
        }
    }

    #[test]
    fn an_attempt_is_forgotten_once_nothing_can_come() {
        let mut bench = Bench::new();
        bench.report("x");
        bench.texts.forget_ended();
        assert!(bench.texts.any_unsent());
        bench.open = Arc::default();
        bench.texts.forget_ended();
        assert!(bench.texts.attempts.is_empty());
    }
}
