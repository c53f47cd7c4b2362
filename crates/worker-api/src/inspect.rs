//! `genmill providers`: what is known of providers, and whether they answer. Never here: generating anything.

use crate::auth::Credentials;
use crate::catalog::{Endpoint, Sources};
use crate::credit::{self, Credit};
use crate::failure::{classify, redact};
use crate::http::{Http, Lost, Request, Settings, Trouble, Unsent};
use crate::providers::{KeyNeed, OWN_FILE, Provider, Table};
use anyhow::Context as _;
use genmill_core::registration::Availability;
use genmill_daemon::run::load;
use http::StatusCode;
use serde_json::Value;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long a provider may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest list of models that is read, in bytes.
const LIST_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What is asked of the table.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List all providers: name, dialect, address, and whether they can be called
    List {
        /// Only those that can be called with the keys and addresses that are set
        #[arg(long)]
        ready: bool,
    },
    /// Show a provider's row, where its calls go, and which variables may hold its key
    Show {
        /// The provider, as in litellm_NAME/model
        name: String,
    },
    /// Ask a provider for its list of models: is it there, does it take the key, how long does it take, what credit is left
    Test {
        /// The provider, as in litellm_NAME/model
        name: String,
        /// Fail when it does not list this model
        #[arg(long, value_name = "NAME")]
        model: Option<String>,
    },
}

/// Runs a command. The exit code is 1 when a provider cannot be called, 2 when the configuration is wrong.
#[must_use]
pub fn run(args: &Args, config: Option<&Path>) -> ExitCode {
    print(told(args, config))
}

/// Prints what was found, or what went wrong.
pub(crate) fn print(told: anyhow::Result<(Vec<String>, ExitCode)>) -> ExitCode {
    match told {
        Ok((lines, code)) => {
            let printed = writeln!(std::io::stdout().lock(), "{}", lines.join("\n"));
            if printed.is_ok() { code } else { ExitCode::FAILURE }
        }
        Err(error) => {
            drop(writeln!(std::io::stderr().lock(), "error: {error:#}"));
            ExitCode::from(genmill_daemon::run::EXIT_WRONG_CONFIG)
        }
    }
}

fn told(args: &Args, config: Option<&Path>) -> anyhow::Result<(Vec<String>, ExitCode)> {
    let loaded = load(config)?;
    let folder = &loaded.config.models.dir;
    let table = Table::read(folder)?;
    let sources = Sources { table: &table, settings: &loaded.config.providers, environment: &loaded.environment };
    match &args.command {
        Command::List { ready } => Ok((list(&sources, *ready), ExitCode::SUCCESS)),
        Command::Show { name } => Ok((show(&sources, name, folder)?, ExitCode::SUCCESS)),
        Command::Test { name, model } => {
            genmill_daemon::tls::install();
            let http = Http::new(&Settings::of(&loaded.config.api))?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (found, tested) = runtime.block_on(test(&sources, name, model.as_deref(), &http));
            let code = if tested.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            let failed = tested.err().map(|problem| format!("FAILED: {problem}"));
            Ok((found.into_iter().chain(failed).map(|line| format!("{name}: {line}")).collect(), code))
        }
    }
}

/// What keeps a provider from being called, or that nothing does.
fn state(endpoint: &Result<Endpoint, Availability>) -> String {
    match endpoint {
        Ok(endpoint) if matches!(endpoint.credentials, Credentials::None) => "ready, without a key".to_owned(),
        Ok(_) | Err(Availability::Ready | Availability::Loading | Availability::Available) => "ready".to_owned(),
        Err(Availability::KeyMissing { variable }) => format!("set {variable}"),
        Err(Availability::Unavailable { reason }) => reason.clone(),
    }
}

fn list(sources: &Sources<'_>, only_ready: bool) -> Vec<String> {
    let row = |name: &str| {
        let provider = sources.table.find(name)?;
        let endpoint = sources.endpoint(name);
        if only_ready && endpoint.is_err() {
            return None;
        }
        let address = address(&endpoint, provider).unwrap_or_else(|| "-".to_owned());
        Some(format!("{name:<22} {:<22} {address:<62} {}", provider.dialect, short(&state(&endpoint))))
    };
    let head = format!("{:<22} {:<22} {:<62} STATE", "NAME", "DIALECT", "ADDRESS");
    std::iter::once(head).chain(sources.table.names().filter_map(row)).collect()
}

/// Where a provider's calls go, or would go if nothing else was set.
fn address(endpoint: &Result<Endpoint, Availability>, row: &Provider) -> Option<String> {
    endpoint.as_ref().ok().map(|endpoint| endpoint.base_url.to_string()).or_else(|| row.base_url.clone())
}

/// The first clause of a reason.
fn short(reason: &str) -> &str {
    reason.split([':', ',']).next().unwrap_or(reason)
}

fn show(sources: &Sources<'_>, name: &str, folder: &Path) -> anyhow::Result<Vec<String>> {
    let endpoint = sources.endpoint(name);
    let row = sources.table.find(name).with_context(|| state(&endpoint))?;
    let set = row.keys.iter().find(|variable| sources.environment.get(variable).is_some());
    let key = match (set, row.key_need) {
        (Some(variable), _) => format!("from {variable}"),
        (None, _) if endpoint.as_ref().is_ok_and(|endpoint| matches!(endpoint.credentials, Credentials::Aws(_))) => {
            "none: calls are signed with AWS_ACCESS_KEY_ID".to_owned()
        }
        (None, _) if endpoint.as_ref().is_ok_and(|endpoint| !matches!(endpoint.credentials, Credentials::None)) => {
            "from genmill.toml".to_owned()
        }
        (None, KeyNeed::Optional) => "none, and none is needed".to_owned(),
        (None, KeyNeed::Required) => "none".to_owned(),
    };
    let mut lines = vec![
        format!("{:<14} {name}", "name"),
        format!("{:<14} {}", "dialect", row.dialect),
        format!("{:<14} {}", "state", state(&endpoint)),
        format!("{:<14} {key}", "key"),
        format!("{:<14} {}", "key variables", row.keys.join(" ")),
    ];
    lines.extend(address(&endpoint, row).map(|address| format!("{:<14} {address}", "address")));
    for (header, value) in &row.headers {
        lines.push(format!("{:<14} {header}: {value}", "header"));
    }
    for (part, variables) in &row.parts {
        lines.push(format!("{:<14} {part} from {}", "part", variables.join(" ")));
    }
    if let Some(api) = &row.batch {
        lines.push(format!("{:<14} as {api} takes them", "batches"));
    }
    if !row.drop.is_empty() {
        lines.push(format!("{:<14} {}", "does not take", row.drop.join(" ")));
    }
    lines.push(format!("{:<14} a row [{name}] in {}", "to change it", folder.join(OWN_FILE).display()));
    Ok(lines)
}

/// What is found, a line each; the last one is what keeps the provider from being used.
async fn test(
    sources: &Sources<'_>,
    name: &str,
    model: Option<&str>,
    http: &Http,
) -> (Vec<String>, Result<(), String>) {
    let mut found = Vec::new();
    let tested = match sources.endpoint(name) {
        Ok(endpoint) => test_at(&endpoint, model, http, &mut found).await,
        Err(missing) => Err(state(&Err(missing))),
    };
    (found, tested)
}

async fn test_at(endpoint: &Endpoint, model: Option<&str>, http: &Http, found: &mut Vec<String>) -> Result<(), String> {
    let begun = Instant::now();
    if let Some(path) = &endpoint.provider.check_path {
        get(endpoint, path, http).await?;
    }
    let path =
        endpoint.dialect.models_path().ok_or("it has no list of models at its address, so only a job can tell")?;
    let list = get(endpoint, path, http).await?;
    let took_ms = begun.elapsed().as_millis();
    let models = names(&list);
    if let Some(model) = model {
        if !models.contains(&model) {
            return Err(format!("it lists {} models, but not {model}", models.len()));
        }
        let ends = rows(&list).find(|row| name(row) == Some(model)).and_then(|row| row["expiration_date"].as_str());
        found.extend(ends.map(|day| format!("WARNING: {model} is there until {day} only")));
    }
    found.push(format!("ok, {} models, {took_ms} ms, at {}", models.len(), endpoint.base_url));
    if let Some(path) = &endpoint.provider.credit_path {
        found.push(credit(endpoint, path, http).await?.finding()?);
    }
    Ok(())
}

/// What is left of the credit. Keys that are no management keys are told of their own limit only.
async fn credit(endpoint: &Endpoint, path: &str, http: &Http) -> Result<Credit, String> {
    let (status, body) = fetch(endpoint, path, http).await?;
    match (status, &endpoint.provider.check_path) {
        (StatusCode::OK, _) => Ok(credit::of_account(&body)),
        (StatusCode::FORBIDDEN, Some(path)) => {
            let (status, body) = fetch(endpoint, path, http).await?;
            if status.is_success() { Ok(credit::of_key(&body)) } else { Err(refusal(endpoint, status, &body)) }
        }
        _ => Err(refusal(endpoint, status, &body)),
    }
}

/// The rows of a list of models, in any of its forms.
fn rows(list: &Value) -> impl Iterator<Item = &Value> {
    [list, &list["data"], &list["models"], &list["resources"]]
        .into_iter()
        .find_map(Value::as_array)
        .into_iter()
        .flatten()
}

fn name(row: &Value) -> Option<&str> {
    let name = ["id", "name", "model_id"].iter().find_map(|field| row[*field].as_str())?;
    Some(name.strip_prefix("models/").unwrap_or(name))
}

/// The names of models in any of the forms of their list.
fn names(list: &Value) -> Vec<&str> {
    rows(list).filter_map(name).collect()
}

/// A document of a provider's.
async fn get(endpoint: &Endpoint, path: &str, http: &Http) -> Result<Value, String> {
    let (status, body) = fetch(endpoint, path, http).await?;
    if !status.is_success() {
        return Err(refusal(endpoint, status, &body));
    }
    serde_json::from_slice(&body).map_err(|_| "its list of models is no JSON".to_owned())
}

/// What a refusal says.
fn refusal(endpoint: &Endpoint, status: StatusCode, body: &[u8]) -> String {
    let told = redact(endpoint.dialect.decode_error(body), endpoint.credentials.secret().into_iter());
    classify(&endpoint.name, status.as_u16(), &told).message
}

async fn fetch(endpoint: &Endpoint, path: &str, http: &Http) -> Result<(StatusCode, Vec<u8>), String> {
    let url = format!("{}{path}", endpoint.base_url.as_str().trim_end_matches('/'));
    let headers = endpoint.provider.headers.iter();
    let request =
        Request::get(&url).and_then(|plain| headers.clone().try_fold(plain, |r, (name, value)| r.with(name, value)));
    let trouble = |lost: Lost| Trouble::of(&lost).to_string();
    let request = request.map_err(trouble)?;
    let asked = async {
        let mut response = http.send(endpoint, request).await.map_err(|unsent| match unsent {
            Unsent::Lost(lost) => trouble(lost),
            Unsent::Fault(fault) => fault.message,
        })?;
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(trouble)? {
            body.extend_from_slice(&bytes);
            if body.len() > LIST_BYTES_MAX {
                return Err("its list of models is longer than 16 MiB".to_owned());
            }
        }
        Ok((response.status(), body))
    };
    timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err(format!("no answer in {} s", PATIENCE.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn models_are_found_in_every_form_of_their_list() {
        assert_eq!(names(&json!({"data": [{"id": "a"}, {"id": "b"}]})), ["a", "b"]);
        assert_eq!(names(&json!({"models": [{"name": "models/gemini-x"}]})), ["gemini-x"]);
        assert_eq!(names(&json!([{"id": "a"}])), ["a"]);
        assert_eq!(names(&json!({"data": 1})), [""; 0]);
    }
}
