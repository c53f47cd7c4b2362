//! `genmill models`: what can be asked for.

use crate::exit::Ending;
use crate::table::{self, Column};
use crate::{output, show};
use genmill_client::{Client, v1};

/// List the models, available or not
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only models of this backend, such as vllm or litellm
    #[arg(long, value_name = "NAME")]
    prefix: Option<String>,
    /// Print each model as one line of JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let mut models = Client::connect(server).await?.list_models().await?;
    if let Some(prefix) = &args.prefix {
        let start = format!("{}_", prefix.trim_end_matches('_'));
        models.retain(|model| model.name.starts_with(&start));
    }
    if args.json {
        for model in &models {
            output::line(&genmill_wire::json::to_json("Model", model)?)?;
        }
    } else {
        let nothing = "no such models: they come with the workers that have them in their configuration";
        table::print(COLUMNS, models.iter().map(row).collect(), nothing)?;
    }
    Ok(Ending::Done)
}

const COLUMNS: [Column; 5] = [
    Column::Text("name"),
    Column::Text("available"),
    Column::Text("loaded"),
    Column::Text("workers"),
    Column::Text("why not"),
];

/// Whether a job would start at once: on how many of its workers, or whether one is loading it.
fn loaded(model: &v1::Model) -> String {
    match (model.ready_workers.len(), model.loading_workers.len()) {
        (0, 0) if model.available => "no".to_owned(),
        (0, 0) => show::NOTHING.to_owned(),
        (0, _) => "loading".to_owned(),
        (ready, _) if ready == model.workers.len() => "yes".to_owned(),
        (ready, _) => format!("{ready} of {}", model.workers.len()),
    }
}

fn row(model: &v1::Model) -> [String; 5] {
    let or_nothing = |text: String| if text.is_empty() { show::NOTHING.to_owned() } else { text };
    [
        model.name.clone(),
        if model.available { "yes" } else { "no" }.to_owned(),
        loaded(model),
        or_nothing(model.workers.join(" ")),
        or_nothing(model.unavailable_reason.clone()),
    ]
}
