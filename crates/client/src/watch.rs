//! Following one job: its text as it is generated, then the job.

use crate::follow::{Follow, follow};
use crate::{Client, Error, v1};
use futures_util::stream::Stream;
use tonic::{Response, Status, Streaming};

/// What happens to a watched job.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More text.
    Text(v1::TextDelta),
    /// A new attempt started: text seen before is void and comes anew.
    Restarted {
        /// The new attempt.
        epoch: u32,
    },
    /// The job has ended. The last event.
    Finished(Box<v1::Job>),
}

/// How much of a job's text has been seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The attempt that wrote it; 0: none seen yet.
    pub epoch: u32,
    /// Bytes seen, of several samples those of the first.
    pub offset: u64,
    /// Bytes seen of the samples after the first; what is left out is 0.
    pub more: Vec<u64>,
}

impl Position {
    /// Moves on past a piece of text.
    fn pass(&mut self, delta: &v1::TextDelta) {
        let seen = delta.offset.saturating_add(u64::try_from(delta.text.len()).unwrap_or(u64::MAX));
        self.epoch = delta.epoch;
        match usize::try_from(delta.sample).unwrap_or(usize::MAX).checked_sub(1) {
            None => self.offset = seen,
            // No job has more samples than this.
            Some(index) if index < 1_024 => {
                self.more.resize(self.more.len().max(index + 1), 0);
                self.more[index] = seen;
            }
            Some(_) => {}
        }
    }
}

impl Client {
    /// Follows a job from the beginning of its text, also after its end. Resumes by itself when the connection breaks.
    ///
    /// ```no_run
    /// use futures_util::TryStreamExt as _;
    /// use genmill_client::Event;
    ///
    /// # async fn run(client: genmill_client::Client, job_id: &str) -> Result<(), genmill_client::Error> {
    /// let mut events = std::pin::pin!(client.watch(job_id));
    /// while let Some(event) = events.try_next().await? {
    ///     match event {
    ///         Event::Text(delta) => print!("{}", delta.text),
    ///         Event::Restarted { epoch } => println!("\n-- attempt {epoch} --"),
    ///         Event::Finished(job) => println!("\n{:?}", job.state()),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch(&self, job_id: &str) -> impl Stream<Item = Result<Event, Error>> + Send + use<> {
        self.watch_from(job_id, Position::default())
    }

    /// Follows a job from `position` on.
    pub fn watch_from(
        &self,
        job_id: &str,
        position: Position,
    ) -> impl Stream<Item = Result<Event, Error>> + Send + use<> {
        follow(self, Watch { job_id: job_id.to_owned(), position, finished: false })
    }
}

struct Watch {
    job_id: String,
    position: Position,
    finished: bool,
}

impl Follow for Watch {
    type Response = v1::WatchJobResponse;
    type Item = Event;

    async fn open(&self, client: &Client) -> Result<Response<Streaming<v1::WatchJobResponse>>, Status> {
        let Position { epoch, offset, more } = self.position.clone();
        let request = v1::WatchJobRequest { job_id: self.job_id.clone(), epoch, offset, more_offsets: more };
        client.jobs().watch_job(request).await
    }

    fn accept(&mut self, response: v1::WatchJobResponse) -> Result<Option<Event>, Error> {
        use v1::watch_job_response::Event as Sent;
        Ok(match response.event {
            Some(Sent::Text(delta)) => {
                self.position.pass(&delta);
                Some(Event::Text(delta))
            }
            Some(Sent::Restarted(v1::Restarted { epoch })) => {
                self.position = Position { epoch, ..Position::default() };
                Some(Event::Restarted { epoch })
            }
            Some(Sent::Job(job)) => {
                self.finished = true;
                Some(Event::Finished(Box::new(job)))
            }
            // An event of a later version.
            None => None,
        })
    }

    fn is_over(&self) -> bool {
        self.finished
    }

    fn may_end(&self) -> bool {
        self.finished
    }
}
