//! `GetModel`: one model, who serves it, and if nobody does, why.

use crate::mill::Mill;
use genmill_core::admit::Facts;
use genmill_core::model::ModelName;
use genmill_core::registration::Availability;
use genmill_wire::v1;
use tonic::Status;

pub(super) async fn serve(mill: &Mill, asked: v1::GetModelRequest) -> Result<v1::GetModelResponse, Status> {
    let model = match ModelName::parse(&asked.name) {
        Ok(name) => {
            let live = mill.registrations.read().await?;
            model(&name, &Facts::about(&name, &live))
        }
        Err(error) => v1::Model { name: asked.name, unavailable_reason: error.to_string(), ..v1::Model::default() },
    };
    Ok(v1::GetModelResponse { model: Some(model) })
}

/// What the registrations tell about `name`.
pub(super) fn model(name: &ModelName, facts: &Facts) -> v1::Model {
    let why_not = facts.check(name).err();
    let served = facts.listed.first().map(|(_, served)| served);
    let names = |availability| facts.that_are(availability).map(ToString::to_string).collect();
    v1::Model {
        name: name.as_str().to_owned(),
        available: why_not.is_none(),
        unavailable_reason: why_not.map(|refusal| refusal.to_string()).unwrap_or_default(),
        workers: facts.serving().map(ToString::to_string).collect(),
        ready_workers: names(&Availability::Ready),
        loading_workers: names(&Availability::Loading),
        description: served.map(|served| served.description.clone()).unwrap_or_default(),
        context_tokens: served.and_then(|served| served.context_tokens),
        batches: facts.listed.iter().any(|(_, served)| served.batches),
    }
}
