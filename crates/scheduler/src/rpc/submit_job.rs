//! `SubmitJob`: one job.

use crate::mill::{Mill, api_error};
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::{to_pb, v1};
use tonic::Status;

pub(super) async fn serve(mill: &Mill, asked: v1::SubmitJobRequest) -> Result<v1::SubmitJobResponse, Status> {
    let request = asked.request.ok_or_else(|| ApiError::new(Reason::InvalidRequest, "request: must be set"))?;
    let answer = mill.submit(vec![request]).await?.pop();
    let accepted = answer.ok_or_else(|| ApiError::new(Reason::Internal, "no answer"))??;
    let job = mill.queue.get(accepted.id).await.map_err(api_error)?;
    Ok(v1::SubmitJobResponse { job: Some(to_pb::job(job)), existed: accepted.existed })
}
