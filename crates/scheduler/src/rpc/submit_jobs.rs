//! `SubmitJobs`: many jobs, an acknowledgement for each. What has arrived is submitted together.

use super::Answers;
use crate::mill::Mill;
use crate::submission::Answer;
use futures_util::{StreamExt as _, stream};
use genmill_wire::v1;
use genmill_wire::v1::submit_jobs_response::Outcome;
use tonic::{Status, Streaming};

/// How many jobs are submitted together at most. Bounds the time one script takes.
const BATCH: usize = 200;

pub(super) fn serve(mill: Mill, items: Streaming<v1::SubmitJobsRequest>) -> Answers<v1::SubmitJobsResponse> {
    let batches = items.ready_chunks(BATCH).scan(0_u64, |first, batch| {
        let index = *first;
        *first += u64::try_from(batch.len()).unwrap_or(u64::MAX);
        std::future::ready(Some((index, batch)))
    });
    let answers = batches.then(move |(first, batch)| {
        let mill = mill.clone();
        async move { stream::iter(submit(&mill, first, batch).await) }
    });
    // The stream ends behind its first error: what follows has not been submitted.
    let ended = |failed: &mut bool, answer: Result<_, Status>| {
        let end = std::mem::replace(failed, answer.is_err());
        std::future::ready((!end).then_some(answer))
    };
    Box::pin(answers.flatten().scan(false, ended))
}

async fn submit(
    mill: &Mill,
    first: u64,
    batch: Vec<Result<v1::SubmitJobsRequest, Status>>,
) -> Vec<Result<v1::SubmitJobsResponse, Status>> {
    let mut requests = Vec::with_capacity(batch.len());
    let mut broken = None;
    for item in batch {
        match item {
            Ok(item) => requests.push(item.request.unwrap_or_default()),
            Err(status) => {
                broken = Some(Err(status));
                break;
            }
        }
    }
    let mut answers: Vec<_> = match mill.submit(requests).await {
        Ok(answers) => (first..).zip(answers).map(|(index, answer)| Ok(response(index, answer))).collect(),
        Err(error) => vec![Err(error.into())],
    };
    answers.extend(broken);
    answers
}

fn response(index: u64, answer: Answer) -> v1::SubmitJobsResponse {
    match answer {
        Ok(accepted) => v1::SubmitJobsResponse {
            index,
            outcome: Some(Outcome::JobId(accepted.id.to_string())),
            existed: accepted.existed,
        },
        Err(error) => {
            let refusal = v1::Refusal {
                code: error.reason.code().into(),
                reason: error.reason.name().to_owned(),
                message: error.message,
            };
            v1::SubmitJobsResponse { index, outcome: Some(Outcome::Refusal(refusal)), existed: false }
        }
    }
}
