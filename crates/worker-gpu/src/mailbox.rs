//! What an engine's thread leaves for the task that waits for it. The engine never waits; what piles up is bounded by
//! the text of one request.

use genmill_engine::{Completion, Event, RequestError, Sink};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// How a request ended.
pub(crate) type Ended = Result<Completion, RequestError>;

#[derive(Default)]
struct Letters {
    text: String,
    ended: Option<Ended>,
}

/// Text and end of one request.
#[derive(Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    arrived: Notify,
}

impl Mailbox {
    /// Where the engine leaves its events.
    pub(crate) fn sink(self: &Arc<Self>) -> Sink {
        let mailbox = self.clone();
        Box::new(move |event| mailbox.put(event))
    }

    fn put(&self, event: Event) {
        {
            let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                Event::Started => return,
                Event::Text { delta } => letters.text.push_str(&delta),
                Event::Finished(completion) => letters.ended = Some(Ok(completion)),
                Event::Failed(error) => letters.ended = Some(Err(error)),
            }
        }
        self.arrived.notify_one();
    }

    /// Waits until something is there and takes it: new text, and the end when it has come. May be dropped at any
    /// point.
    pub(crate) async fn take(&self) -> (String, Option<Ended>) {
        loop {
            let arrived = self.arrived.notified();
            {
                let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
                if !letters.text.is_empty() || letters.ended.is_some() {
                    return (std::mem::take(&mut letters.text), letters.ended.take());
                }
            }
            arrived.await;
        }
    }
}
