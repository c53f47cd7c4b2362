//! The RPCs: one file each, one line each in the services below.

mod cancel_job;
mod cancel_jobs;
mod get_job;
mod get_model;
mod list_jobs;
mod list_lanes;
mod list_models;
mod matching;
mod purge;
mod redrive;
mod settings;
mod submit_job;
mod submit_jobs;
mod watch_job;
mod watch_jobs;

use crate::mill::Mill;
use futures_util::Stream;
use genmill_wire::v1::job_service_server::{JobService, JobServiceServer};
use genmill_wire::v1::model_service_server::{ModelService, ModelServiceServer};
use genmill_wire::v1::queue_service_server::{QueueService, QueueServiceServer};
use genmill_wire::{DESCRIPTORS, MESSAGE_BYTES_MAX, v1};
use std::pin::Pin;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Response, Status, Streaming, async_trait};

/// What a connection may have on its way to us, in bytes.
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// What one stream of it may have.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// All services: jobs, models, queue, health, reflection.
pub(crate) async fn router(mill: Mill) -> anyhow::Result<Router> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<JobServiceServer<Mill>>().await;
    health.set_serving::<ModelServiceServer<Mill>>().await;
    health.set_serving::<QueueServiceServer<Mill>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let jobs = JobServiceServer::new(mill.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let queue = QueueServiceServer::new(mill.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let models = ModelServiceServer::new(mill).max_decoding_message_size(MESSAGE_BYTES_MAX);
    Ok(Server::builder()
        // A client may send many small frames at once. The transport counts unread small frames against half of the
        // connection's window, so that window is large; one stream's is not, so that no caller fills memory.
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        // Most tools still ask for the older name.
        .add_service(reflection().build_v1alpha()?)
        .add_service(jobs)
        .add_service(models)
        .add_service(queue))
}

#[async_trait]
impl JobService for Mill {
    async fn submit_job(&self, r: Request<v1::SubmitJobRequest>) -> Result<Response<v1::SubmitJobResponse>, Status> {
        submit_job::serve(self, r.into_inner()).await.map(Response::new)
    }

    type SubmitJobsStream = Answers<v1::SubmitJobsResponse>;
    async fn submit_jobs(
        &self,
        r: Request<Streaming<v1::SubmitJobsRequest>>,
    ) -> Result<Response<Self::SubmitJobsStream>, Status> {
        Ok(Response::new(submit_jobs::serve(self.clone(), r.into_inner())))
    }

    async fn get_job(&self, r: Request<v1::GetJobRequest>) -> Result<Response<v1::GetJobResponse>, Status> {
        get_job::serve(self, r.into_inner()).await.map(Response::new)
    }

    async fn list_jobs(&self, r: Request<v1::ListJobsRequest>) -> Result<Response<v1::ListJobsResponse>, Status> {
        list_jobs::serve(self, r.into_inner()).await.map(Response::new)
    }

    type WatchJobStream = Answers<v1::WatchJobResponse>;
    async fn watch_job(&self, r: Request<v1::WatchJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        watch_job::serve(self.clone(), r.into_inner()).await.map(Response::new)
    }

    type WatchJobsStream = Answers<v1::WatchJobsResponse>;
    async fn watch_jobs(&self, r: Request<v1::WatchJobsRequest>) -> Result<Response<Self::WatchJobsStream>, Status> {
        watch_jobs::serve(self.clone(), r.into_inner()).map(Response::new)
    }

    async fn cancel_job(&self, r: Request<v1::CancelJobRequest>) -> Result<Response<v1::CancelJobResponse>, Status> {
        cancel_job::serve(self, r.into_inner()).await.map(Response::new)
    }

    async fn cancel_jobs(&self, r: Request<v1::CancelJobsRequest>) -> Result<Response<v1::CancelJobsResponse>, Status> {
        cancel_jobs::serve(self, r.into_inner()).await.map(Response::new)
    }
}

#[async_trait]
impl ModelService for Mill {
    async fn list_models(&self, r: Request<v1::ListModelsRequest>) -> Result<Response<v1::ListModelsResponse>, Status> {
        list_models::serve(self, r.into_inner()).await.map(Response::new)
    }

    async fn get_model(&self, r: Request<v1::GetModelRequest>) -> Result<Response<v1::GetModelResponse>, Status> {
        get_model::serve(self, r.into_inner()).await.map(Response::new)
    }
}

#[async_trait]
impl QueueService for Mill {
    async fn list_lanes(&self, _: Request<v1::ListLanesRequest>) -> Result<Response<v1::ListLanesResponse>, Status> {
        list_lanes::serve(self).await.map(Response::new)
    }

    async fn pause_lane(&self, r: Request<v1::PauseLaneRequest>) -> Result<Response<v1::PauseLaneResponse>, Status> {
        settings::pause_lane(self, &r.into_inner().lane).await?;
        Ok(Response::new(v1::PauseLaneResponse {}))
    }

    async fn pause_experiment(
        &self,
        r: Request<v1::PauseExperimentRequest>,
    ) -> Result<Response<v1::PauseExperimentResponse>, Status> {
        settings::pause_experiment(self, &r.into_inner().experiment).await?;
        Ok(Response::new(v1::PauseExperimentResponse {}))
    }

    async fn pause_tenant(
        &self,
        r: Request<v1::PauseTenantRequest>,
    ) -> Result<Response<v1::PauseTenantResponse>, Status> {
        settings::pause_tenant(self, &r.into_inner().tenant).await?;
        Ok(Response::new(v1::PauseTenantResponse {}))
    }

    async fn resume_lane(&self, r: Request<v1::ResumeLaneRequest>) -> Result<Response<v1::ResumeLaneResponse>, Status> {
        settings::resume_lane(self, &r.into_inner().lane).await?;
        Ok(Response::new(v1::ResumeLaneResponse {}))
    }

    async fn resume_experiment(
        &self,
        r: Request<v1::ResumeExperimentRequest>,
    ) -> Result<Response<v1::ResumeExperimentResponse>, Status> {
        settings::resume_experiment(self, &r.into_inner().experiment).await?;
        Ok(Response::new(v1::ResumeExperimentResponse {}))
    }

    async fn resume_tenant(
        &self,
        r: Request<v1::ResumeTenantRequest>,
    ) -> Result<Response<v1::ResumeTenantResponse>, Status> {
        settings::resume_tenant(self, &r.into_inner().tenant).await?;
        Ok(Response::new(v1::ResumeTenantResponse {}))
    }

    async fn set_lane_limits(
        &self,
        r: Request<v1::SetLaneLimitsRequest>,
    ) -> Result<Response<v1::SetLaneLimitsResponse>, Status> {
        settings::set_lane_limits(self, r.into_inner()).await?;
        Ok(Response::new(v1::SetLaneLimitsResponse {}))
    }

    async fn set_tenant_limits(
        &self,
        r: Request<v1::SetTenantLimitsRequest>,
    ) -> Result<Response<v1::SetTenantLimitsResponse>, Status> {
        settings::set_tenant_limits(self, r.into_inner()).await?;
        Ok(Response::new(v1::SetTenantLimitsResponse {}))
    }

    async fn list_settings(
        &self,
        _: Request<v1::ListSettingsRequest>,
    ) -> Result<Response<v1::ListSettingsResponse>, Status> {
        settings::list(self).await.map(Response::new)
    }

    async fn redrive(&self, r: Request<v1::RedriveRequest>) -> Result<Response<v1::RedriveResponse>, Status> {
        redrive::serve(self, r.into_inner()).await.map(Response::new)
    }

    async fn purge(&self, r: Request<v1::PurgeRequest>) -> Result<Response<v1::PurgeResponse>, Status> {
        purge::serve(self, r.into_inner()).await.map(Response::new)
    }
}
