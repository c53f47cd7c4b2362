//! What an engine's thread leaves for the task that waits for it. The engine never waits; what piles up is bounded by
//! the text of one request.

use genmill_engine::{Completion, Event, RequestError, Sink};
use genmill_worker::perform::Started;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// How a request ended.
pub(crate) type Ended = Result<Completion, RequestError>;

#[derive(Default)]
struct Letters {
    /// By sample; none is empty.
    texts: Texts,
    ended: Option<Ended>,
}

/// More text of samples, by their number.
pub(crate) type Texts = BTreeMap<usize, String>;

/// Text and end of one request.
#[derive(Default)]
pub(crate) struct Mailbox {
    started: Started,
    letters: Mutex<Letters>,
    first_text: Notify,
    end: Notify,
}

impl Mailbox {
    /// An empty one, whose request has not `started`.
    pub(crate) fn new(started: Started) -> Self {
        Self { started, ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the engine leaves its events.
    pub(crate) fn sink(self: &Arc<Self>) -> Sink {
        let mailbox = self.clone();
        Box::new(move |event| mailbox.put(event))
    }

    /// Wakes the waiting task for the first text since it was there and for the end only: a wake-up costs more than a
    /// token of a small model.
    fn put(&self, event: Event) {
        let mut letters = self.lock();
        let wake = match event {
            Event::Started => return self.started.set(),
            Event::Text { sample, delta } => {
                let first = letters.texts.is_empty();
                letters.texts.entry(sample).or_default().push_str(&delta);
                first.then_some(&self.first_text)
            }
            Event::Finished(completion) => {
                letters.ended = Some(Ok(completion));
                Some(&self.end)
            }
            Event::Failed(error) => {
                letters.ended = Some(Err(error));
                Some(&self.end)
            }
        };
        drop(letters);
        if let Some(wake) = wake {
            wake.notify_one();
        }
    }

    /// Waits for the end, or for text but then at least until `not_before`, and takes what is there. May be dropped at
    /// any point.
    pub(crate) async fn take(&self, not_before: Instant) -> (Texts, Option<Ended>) {
        loop {
            let waiting = {
                let mut letters = self.lock();
                let due = !letters.texts.is_empty() && Instant::now() >= not_before;
                if due || letters.ended.is_some() {
                    return (std::mem::take(&mut letters.texts), letters.ended.take());
                }
                !letters.texts.is_empty()
            };
            tokio::select! {
                () = self.end.notified() => {}
                () = self.first_text.notified(), if !waiting => {}
                () = sleep_until(not_before), if waiting => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn text(delta: &str) -> Event {
        Event::Text { sample: 0, delta: delta.to_owned() }
    }

    #[tokio::test]
    async fn text_is_taken_at_once_or_from_the_given_time_on() {
        let mailbox = Arc::new(Mailbox::default());
        let mut sink = mailbox.sink();
        sink(text("a"));
        assert_eq!(mailbox.take(Instant::now()).await.0[&0], "a");
        tokio::time::pause();
        let later = Instant::now() + Duration::from_millis(10);
        let taking = mailbox.take(later);
        sink(text("b"));
        sink(text("c"));
        assert_eq!(taking.await.0[&0], "bc");
        assert!(Instant::now() >= later);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_does_not_wait() {
        let mailbox = Arc::new(Mailbox::default());
        let mut sink = mailbox.sink();
        let begun = Instant::now();
        let (taken, ()) = tokio::join!(mailbox.take(begun + Duration::from_secs(3600)), async {
            sink(text("a"));
            tokio::task::yield_now().await;
            sink(Event::Failed(RequestError::Step { message: "x".to_owned() }));
        });
        assert_eq!(taken.0[&0], "a");
        assert!(taken.1.unwrap().is_err());
        assert_eq!(Instant::now(), begun);
    }
}
