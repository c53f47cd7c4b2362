//! `CancelJob`: one job.

use crate::mill::{Mill, api_error};
use genmill_wire::{from_pb, to_pb, v1};
use tonic::Status;

pub(super) async fn serve(mill: &Mill, asked: v1::CancelJobRequest) -> Result<v1::CancelJobResponse, Status> {
    let id = from_pb::job_id(&asked.job_id)?;
    mill.queue.cancel(id.lane(), &[id]).await.map_err(api_error)?;
    let job = mill.queue.get(id).await.map_err(api_error)?;
    Ok(v1::CancelJobResponse { job: Some(to_pb::job(job)) })
}
