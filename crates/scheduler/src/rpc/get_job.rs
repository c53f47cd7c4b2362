//! `GetJob`: one job, whole.

use crate::mill::{Mill, api_error};
use genmill_wire::{from_pb, to_pb, v1};
use tonic::Status;

pub(super) async fn serve(mill: &Mill, asked: v1::GetJobRequest) -> Result<v1::GetJobResponse, Status> {
    let job = mill.queue.get(from_pb::job_id(&asked.job_id)?).await.map_err(api_error)?;
    Ok(v1::GetJobResponse { job: Some(to_pb::job(job)) })
}
