//! The client and its single calls. The streams have files of their own.

use crate::connect::{connect, with_scheme};
use crate::patience::PATIENCE;
use crate::watch::Event;
use crate::{Error, v1};
use futures_util::stream::{self, Stream, StreamExt as _, TryStreamExt as _};
use genmill_wire::MESSAGE_BYTES_MAX;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Response, Status};
use v1::job_service_client::JobServiceClient;
use v1::model_service_client::ModelServiceClient;
use v1::queue_service_client::QueueServiceClient;

/// How many jobs are asked for at once by [`Client::list`].
const PAGE_SIZE: u32 = 100;

/// A connection to a Genmill server. Clones share it.
#[derive(Clone, Debug)]
pub struct Client {
    server: String,
    patience: Duration,
    jobs: JobServiceClient<Channel>,
    models: ModelServiceClient<Channel>,
    queue: QueueServiceClient<Channel>,
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The generated text.
    pub text: String,
    /// The whole job: usage, latency, cost, the request as admitted.
    pub job: v1::Job,
}

/// An accepted job.
#[derive(Clone, Debug, PartialEq)]
pub struct Submitted {
    /// The job as admitted: defaults filled in, seed drawn.
    pub job: v1::Job,
    /// True when its `request_id` had been submitted before: `job` is that earlier job.
    pub existed: bool,
}

impl Client {
    /// Connects to `server`, such as `http://127.0.0.1:50051`.
    ///
    /// # Errors
    /// [`Error::BadAddress`], or [`Error::Unreachable`] when nobody answers there.
    pub async fn connect(server: &str) -> Result<Self, Error> {
        let server = with_scheme(server)?;
        let channel = connect(&server).await?;
        let jobs = JobServiceClient::new(channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let queue = QueueServiceClient::new(channel.clone());
        let models = ModelServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { server, patience: PATIENCE, jobs, models, queue })
    }

    /// Changes how long a stream waits for a server that is away before it fails; a minute unless set.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    /// The generated client; cheap to clone, and calls need one of their own.
    pub(crate) fn jobs(&self) -> JobServiceClient<Channel> {
        self.jobs.clone()
    }

    /// The same for the queue's service.
    pub(crate) fn queue(&self) -> QueueServiceClient<Channel> {
        self.queue.clone()
    }

    pub(crate) fn error(&self, status: Status) -> Error {
        Error::from_status(&self.server, status)
    }

    pub(crate) fn answer<T>(&self, answered: Result<Response<T>, Status>) -> Result<T, Error> {
        answered.map(Response::into_inner).map_err(|status| self.error(status))
    }

    fn job(&self, answered: Option<v1::Job>) -> Result<v1::Job, Error> {
        answered.ok_or(Error::Protocol { problem: "an answer that must hold a job holds none" })
    }

    /// Submits a job and waits for its result.
    ///
    /// # Errors
    /// [`Error::JobFailed`] when the job ends without a result, else what [`Self::submit`] and [`Self::watch`] fail with.
    pub async fn generate(&self, request: impl Into<v1::GenerationRequest>) -> Result<Generation, Error> {
        let submitted = self.submit(request).await?;
        let mut events = Box::pin(self.watch(&submitted.job.id));
        while let Some(event) = events.try_next().await? {
            if let Event::Finished(job) = event {
                return generation(*job);
            }
        }
        Err(Error::Protocol { problem: "a watch ended without the job" })
    }

    /// Submits a job. It is stored durably when this returns. Tried once: after [`Error::Unreachable`] it may or may not
    /// have been accepted, and a `request_id` makes it safe to try again.
    ///
    /// # Errors
    /// [`Error::Refused`] when the request is wrong or nobody can serve it.
    pub async fn submit(&self, request: impl Into<v1::GenerationRequest>) -> Result<Submitted, Error> {
        let request = v1::SubmitJobRequest { request: Some(request.into()) };
        let answer = self.answer(self.jobs().submit_job(request).await)?;
        Ok(Submitted { job: self.job(answer.job)?, existed: answer.existed })
    }

    /// Returns a job as it is now.
    ///
    /// # Errors
    /// [`Error::NotFound`] when no job has the id.
    pub async fn get(&self, job_id: &str) -> Result<v1::Job, Error> {
        let answer = self.answer(self.jobs().get_job(v1::GetJobRequest { job_id: job_id.to_owned() }).await)?;
        self.job(answer.job)
    }

    /// Lists the jobs that match `filter`, newest first, without prompt, text and attempts. Pages are fetched as the
    /// stream is read.
    pub fn list(&self, filter: v1::JobFilter) -> impl Stream<Item = Result<v1::Job, Error>> + Send + use<> {
        self.pages(filter, false)
    }

    /// Lists the jobs that match `filter`, newest first, with all their parts.
    pub fn list_whole(&self, filter: v1::JobFilter) -> impl Stream<Item = Result<v1::Job, Error>> + Send + use<> {
        self.pages(filter, true)
    }

    fn pages(&self, filter: v1::JobFilter, whole: bool) -> impl Stream<Item = Result<v1::Job, Error>> + Send + use<> {
        let client = self.clone();
        let pages = stream::try_unfold(Some(String::new()), move |token| {
            let (client, filter) = (client.clone(), filter.clone());
            async move {
                let Some(page_token) = token else { return Ok(None) };
                let request = v1::ListJobsRequest { filter: Some(filter), page_size: PAGE_SIZE, page_token, whole };
                let page = client.answer(client.jobs().list_jobs(request).await)?;
                let next = Some(page.next_page_token).filter(|token| !token.is_empty());
                Ok(Some((stream::iter(page.jobs).map(Ok), next)))
            }
        });
        pages.try_flatten()
    }

    /// Cancels a job and returns it as it is then: still running, when its worker has yet to be told. A finished job
    /// stays as it is.
    ///
    /// # Errors
    /// [`Error::NotFound`] when no job has the id.
    pub async fn cancel(&self, job_id: &str) -> Result<v1::Job, Error> {
        let answer = self.answer(self.jobs().cancel_job(v1::CancelJobRequest { job_id: job_id.to_owned() }).await)?;
        self.job(answer.job)
    }

    /// Cancels every unfinished job that matches `filter`, of which at least one field must be set.
    ///
    /// # Errors
    /// [`Error::Refused`] when the filter is empty or wrong.
    pub async fn cancel_all(&self, filter: v1::JobFilter) -> Result<v1::CancelJobsResponse, Error> {
        self.answer(self.jobs().cancel_jobs(v1::CancelJobsRequest { filter: Some(filter) }).await)
    }

    /// Whether a job for `model` would be accepted now.
    ///
    /// # Errors
    /// Only when the server cannot be asked.
    pub async fn is_available(&self, model: &str) -> Result<bool, Error> {
        Ok(self.model(model).await?.available)
    }

    /// What is known of `model`: whether it can be used, who serves it, and if nobody, what to do. An unknown model is
    /// no error; it is not available.
    ///
    /// # Errors
    /// Only when the server cannot be asked.
    pub async fn model(&self, model: &str) -> Result<v1::Model, Error> {
        let request = v1::GetModelRequest { name: model.to_owned() };
        let answer = self.answer(self.models.clone().get_model(request).await)?;
        answer.model.ok_or(Error::Protocol { problem: "an answer that must hold a model holds none" })
    }

    /// Every model that a live worker has in its configuration, available or not, sorted by name.
    ///
    /// # Errors
    /// Only when the server cannot be asked.
    pub async fn list_models(&self) -> Result<Vec<v1::Model>, Error> {
        Ok(self.answer(self.models.clone().list_models(v1::ListModelsRequest::default()).await)?.models)
    }
}

fn generation(job: v1::Job) -> Result<Generation, Error> {
    match &job.result {
        Some(result) => Ok(Generation { text: result.text.clone(), job }),
        None => Err(Error::JobFailed { job: Box::new(job) }),
    }
}
