//! Hints to workers and events for watchers, over connections of their own.
//!
//! Both are hints only: whoever misses one finds the truth in the records. Both reconnect by themselves, and say so,
//! because something may have been missed meanwhile.

use crate::connection::Connection;
use crate::error::QueueError;
use crate::queue::Queue;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use genmill_core::ids::{JobId, LaneNumber};
use redis::aio::PubSub;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// The longest wait between two tries to reconnect.
const RECONNECT_MS_MAX: u64 = 2_000;

/// How long a server may take until it has subscribed us.
const SUBSCRIBE_WITHIN: Duration = Duration::from_secs(3);

/// What a worker is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// The lane has work.
    Work(LaneNumber),
    /// A running job of the lane was cancelled: send a heartbeat.
    Cancel(LaneNumber),
    /// Anything may have happened in any lane.
    Missed,
}

/// What watchers are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The job has more text, or a new attempt.
    Text(JobId),
    /// The job has finished.
    Finished(JobId),
    /// Anything may have happened to any job.
    Missed,
}

#[derive(Clone, Debug)]
enum Topic {
    Channels(Vec<String>),
    Pattern(String),
}

/// One subscription that outlives its connections.
struct Subscription {
    connection: Connection,
    topic: Topic,
    link: Link,
}

enum Link {
    Up(PubSub),
    /// Kept between calls of `next`, which may be dropped at any point: else a busy caller would begin anew every time.
    Lost(BoxFuture<'static, PubSub>),
}

impl Topic {
    async fn subscribe(&self, connection: &mut Connection, failures: u32) -> Result<PubSub, redis::RedisError> {
        match self {
            Self::Channels(channels) => {
                let channel = channels.first().map_or("", String::as_str);
                let mut link = connection.pubsub(channel, failures).await?;
                link.subscribe(channels).await?;
                Ok(link)
            }
            Self::Pattern(pattern) => {
                let mut link = connection.pubsub(pattern, failures).await?;
                link.psubscribe(pattern).await?;
                Ok(link)
            }
        }
    }

    /// Subscribes within [`SUBSCRIBE_WITHIN`].
    async fn subscribe_in_time(&self, connection: &mut Connection, failures: u32) -> Result<PubSub, redis::RedisError> {
        let subscribing = tokio::time::timeout(SUBSCRIBE_WITHIN, self.subscribe(connection, failures));
        subscribing.await.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))
    }

    /// Subscribes, however often it takes.
    async fn subscribe_again(self, mut connection: Connection) -> PubSub {
        let mut failures = 0;
        loop {
            let error = match self.subscribe_in_time(&mut connection, failures).await {
                Ok(link) => return link,
                Err(error) => error,
            };
            if failures == 0 {
                tracing::warn!(%error, "the subscription is lost; trying to get it back");
            }
            let wait_ms = 100_u64 << failures.min(10);
            tokio::time::sleep(Duration::from_millis(wait_ms.min(RECONNECT_MS_MAX))).await;
            failures += 1;
        }
    }
}

impl Subscription {
    async fn connect(mut connection: Connection, topic: Topic) -> Result<Self, QueueError> {
        let subscribed = topic.subscribe_in_time(&mut connection, 0).await;
        let link = Link::Up(subscribed.map_err(|source| QueueError::from_redis("subscribing", source))?);
        Ok(Self { connection, topic, link })
    }

    /// The next message, or `None` when the connection was lost and made anew. May be dropped at any point.
    async fn next(&mut self) -> Option<redis::Msg> {
        if let Link::Up(link) = &mut self.link {
            if let Some(message) = link.on_message().next().await {
                return Some(message);
            }
            let again = self.topic.clone().subscribe_again(self.connection.clone());
            self.link = Link::Lost(Box::pin(again));
        }
        if let Link::Lost(again) = &mut self.link {
            self.link = Link::Up(again.await);
        }
        None
    }
}

/// A worker's hints, for all its lanes.
pub struct Hints {
    subscription: Subscription,
    lanes: HashMap<String, LaneNumber>,
}

impl std::fmt::Debug for Hints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hints").field("lanes", &self.lanes).finish_non_exhaustive()
    }
}

impl Hints {
    /// The next hint. Never ends; may be dropped at any point.
    pub async fn next(&mut self) -> Hint {
        loop {
            let Some(message) = self.subscription.next().await else { return Hint::Missed };
            let Some(lane) = self.lanes.get(message.get_channel_name()) else { continue };
            match message.get_payload_bytes() {
                b"w" => return Hint::Work(*lane),
                b"c" => return Hint::Cancel(*lane),
                _ => {}
            }
        }
    }
}

/// Events of all jobs.
pub struct Events {
    subscription: Subscription,
    /// Of the last message, not yet told.
    waiting: VecDeque<Event>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// The next event. Never ends; may be dropped at any point.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return event;
            }
            let Some(message) = self.subscription.next().await else { return Event::Missed };
            let Some((kind, ids)) = message.get_payload_bytes().split_first() else { continue };
            let ids = ids.chunks(16).filter_map(JobId::from_bytes);
            match kind {
                b't' => self.waiting.extend(ids.map(Event::Text)),
                b'f' => self.waiting.extend(ids.map(Event::Finished)),
                _ => {}
            }
        }
    }
}

impl Queue {
    /// Subscribes to the hints of `lanes`. To be called before the first claim, so that none is missed.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn hints(&self, lanes: &[LaneNumber]) -> Result<Hints, QueueError> {
        let lanes: HashMap<String, LaneNumber> = lanes.iter().map(|lane| (self.keys.hints(*lane), *lane)).collect();
        let topic = Topic::Channels(lanes.keys().cloned().collect());
        Ok(Hints { subscription: Subscription::connect(self.connection.clone(), topic).await?, lanes })
    }

    /// Subscribes to the events of all jobs. One subscription serves any number of watchers.
    ///
    /// # Errors
    /// [`QueueError`] when Redis does not answer.
    pub async fn events(&self) -> Result<Events, QueueError> {
        let topic = Topic::Pattern(self.keys.all_events());
        let subscription = Subscription::connect(self.connection.clone(), topic).await?;
        Ok(Events { subscription, waiting: VecDeque::new() })
    }
}
