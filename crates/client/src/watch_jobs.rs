//! Following many jobs with one stream: each is sent when it finishes.

use crate::follow::{Follow, follow};
use crate::{Client, Error, v1};
use futures_util::stream::Stream;
use tonic::{Response, Status, Streaming};

/// A job that has finished, and where to resume after it.
#[derive(Clone, Debug, PartialEq)]
pub struct FinishedJob {
    /// The job.
    pub job: v1::Job,
    /// What to give to [`Client::watch_jobs`] to go on after this job.
    pub cursor: String,
}

/// When a watch of many jobs ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// When every matching job that was submitted before the watch has finished and been sent.
    Idle,
    /// Never: it waits for jobs to come, until it is dropped.
    Dropped,
}

impl Client {
    /// Follows every job that matches `filter`, after `cursor` (empty: from the first job that ever finished). Resumes
    /// by itself when the connection breaks.
    ///
    /// ```no_run
    /// use futures_util::TryStreamExt as _;
    /// use genmill_client::{Until, v1};
    ///
    /// # async fn run(client: genmill_client::Client) -> Result<(), genmill_client::Error> {
    /// let filter = v1::JobFilter { experiment: "tictactoe".to_owned(), ..v1::JobFilter::default() };
    /// let mut finished = std::pin::pin!(client.watch_jobs(filter, String::new(), Until::Idle));
    /// while let Some(finished) = finished.try_next().await? {
    ///     println!("{} {:?}", finished.job.id, finished.job.state());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch_jobs(
        &self,
        filter: v1::JobFilter,
        cursor: String,
        until: Until,
    ) -> impl Stream<Item = Result<FinishedJob, Error>> + Send + use<> {
        follow(self, WatchJobs { filter, cursor, from_now: false, until })
    }

    /// Follows every job that matches `filter` and finishes from now on, until it is dropped. Resumes by itself when the
    /// connection breaks.
    pub fn watch_jobs_from_now(
        &self,
        filter: v1::JobFilter,
    ) -> impl Stream<Item = Result<FinishedJob, Error>> + Send + use<> {
        follow(self, WatchJobs { filter, cursor: String::new(), from_now: true, until: Until::Dropped })
    }
}

struct WatchJobs {
    filter: v1::JobFilter,
    cursor: String,
    /// Until the first response, which tells where that was.
    from_now: bool,
    until: Until,
}

impl Follow for WatchJobs {
    type Response = v1::WatchJobsResponse;
    type Item = FinishedJob;

    async fn open(&self, client: &Client) -> Result<Response<Streaming<v1::WatchJobsResponse>>, Status> {
        let request = v1::WatchJobsRequest {
            filter: Some(self.filter.clone()),
            cursor: self.cursor.clone(),
            until_idle: self.until == Until::Idle,
            from_now: self.from_now,
        };
        client.jobs().watch_jobs(request).await
    }

    fn accept(&mut self, response: v1::WatchJobsResponse) -> Result<Option<FinishedJob>, Error> {
        self.cursor = response.cursor;
        self.from_now = false;
        Ok(response.job.map(|job| FinishedJob { job, cursor: self.cursor.clone() }))
    }

    fn is_over(&self) -> bool {
        false
    }

    fn may_end(&self) -> bool {
        self.until == Until::Idle
    }
}
