//! What is known of workers when a request comes in: their registrations, read for all who ask at the same time.

use crate::mill::api_error;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use genmill_core::admit::Facts;
use genmill_core::model::ModelName;
use genmill_core::registration::Registration;
use genmill_queue::Queue;
use genmill_wire::error::ApiError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How old registrations may be when a request is admitted on them.
const FRESH_FOR: Duration = Duration::from_secs(1);

/// The shortest time from one reading to the next.
const REST: Duration = Duration::from_millis(100);

/// How long a reading without which a request would be refused waits for others that need the same.
const GATHER: Duration = Duration::from_millis(10);

type Live = Arc<Vec<Registration>>;
type Read = Shared<BoxFuture<'static, Result<Live, ApiError>>>;

/// All live registrations, remembered for a moment: a bulk run must not read them for every job.
pub(crate) struct Registrations {
    queue: Queue,
    /// Those of the newest reading that went well, and when it began.
    cached: Arc<Mutex<Option<(Instant, Live)>>>,
    newest: Mutex<Option<Reading>>,
}

/// A reading that many wait for, who drive it together.
struct Reading {
    /// It does not begin earlier, so it finds whatever was registered by then.
    begins_at: Instant,
    read: Read,
}

impl Registrations {
    pub(crate) fn new(queue: Queue) -> Self {
        Self { queue, cached: Arc::default(), newest: Mutex::default() }
    }

    fn cached(&self) -> Option<Live> {
        let cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        cached.as_ref().filter(|(at, _)| at.elapsed() < FRESH_FOR).map(|(_, live)| live.clone())
    }

    /// A reading that begins at `since` or later: one that there is, or a new one not before `earliest`.
    fn reading(&self, since: Instant, earliest: Instant) -> Read {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let serves = |reading: &&Reading| reading.begins_at >= since && !matches!(reading.read.peek(), Some(Err(_)));
        if let Some(reading) = newest.as_ref().filter(serves) {
            return reading.read.clone();
        }
        let begins_at = newest.as_ref().map_or(earliest, |reading| earliest.max(reading.begins_at + REST));
        let (queue, cached) = (self.queue.clone(), self.cached.clone());
        let read = async move {
            sleep_until(begins_at).await;
            let live = Arc::new(queue.registrations().await.map_err(api_error)?);
            if live.is_empty() {
                // Perhaps there are workers, and a Redis that takes no writes has let them run out.
                queue.check_writes().await.map_err(api_error)?;
            }
            *cached.lock().unwrap_or_else(PoisonError::into_inner) = Some((begins_at, live.clone()));
            Ok(live)
        };
        let read = read.boxed().shared();
        *newest = Some(Reading { begins_at, read: read.clone() });
        read
    }

    /// Registrations as they are now, or a moment later.
    pub(crate) async fn read(&self) -> Result<Live, ApiError> {
        let now = Instant::now();
        self.reading(now, now).await
    }

    /// What is known of `model`. Only good news may be a second old: before a request is refused, they are read anew.
    pub(crate) async fn about(&self, model: &ModelName) -> Result<Facts, ApiError> {
        let now = Instant::now();
        let live = match self.cached() {
            Some(live) => live,
            None => self.reading(now.checked_sub(FRESH_FOR).unwrap_or(now), now).await?,
        };
        let facts = Facts::about(model, &live);
        if facts.check(model).is_ok() {
            return Ok(facts);
        }
        Ok(Facts::about(model, &self.reading(now, now + GATHER).await?))
    }
}
