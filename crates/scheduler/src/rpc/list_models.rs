//! `ListModels`: every model in the configuration of a live worker.

use super::get_model::model;
use crate::mill::Mill;
use genmill_core::admit::Facts;
use genmill_core::model::{ModelName, PREFIXES, Prefix};
use genmill_wire::error::{ApiError, Reason};
use genmill_wire::v1;
use std::collections::BTreeSet;
use tonic::Status;

pub(super) async fn serve(mill: &Mill, asked: v1::ListModelsRequest) -> Result<v1::ListModelsResponse, Status> {
    let prefix = asked.prefix.trim_end_matches('_');
    if !prefix.is_empty() && Prefix::find(prefix).is_none() {
        let known: Vec<&str> = PREFIXES.iter().map(|prefix| prefix.name).collect();
        let message = format!("prefix: `{prefix}` is not known; there are {}", known.join(", "));
        return Err(ApiError::new(Reason::UnknownPrefix, message).into());
    }
    let live = mill.registrations.read().await?;
    let names: BTreeSet<&ModelName> = live.iter().flat_map(|r| r.models.iter().map(|served| &served.name)).collect();
    let names = names.into_iter().filter(|name| prefix.is_empty() || name.prefix().name == prefix);
    let models = names.map(|name| model(name, &Facts::about(name, &live)));
    let models = models.filter(|model| model.available || !asked.available_only).collect();
    Ok(v1::ListModelsResponse { models })
}
