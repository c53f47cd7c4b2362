//! What this worker serves: the listed models, joined with the provider table, the configuration and the environment.
//!
//! Never here: calling a provider (see `perform`).

mod google;

use crate::auth::aws::AwsCredentials;
use crate::auth::{AuthKind, Credentials};
use crate::dialect::{self, Dialect};
use crate::guard;
use crate::http::is_loopback;
use crate::providers::{KeyNeed, Provider, Table, variable_stem};
use genmill_core::model::{BadModelName, Lane, ModelName, Prefix};
use genmill_core::registration::{Availability, ServedModel};
use genmill_daemon::config;
use genmill_daemon::environment::Environment;
use genmill_daemon::models::ListedModel;
use genmill_daemon::secret::Secret;
use std::collections::BTreeMap;
use std::path::PathBuf;
use url::Url;

/// The variables that have Amazon's keys.
const AWS_KEYS: [&str; 2] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];

/// Settings of providers by name, as `genmill.toml` has them.
pub type Settings = BTreeMap<String, config::Provider>;

/// Where calls of a lane go.
#[derive(Clone)]
pub struct Endpoint {
    /// The provider's name.
    pub name: String,
    /// What is special about it.
    pub provider: Provider,
    /// How it is spoken to.
    pub dialect: &'static dyn Dialect,
    /// Where its API is. The key is sent there and nowhere else.
    pub base_url: Url,
    /// What its calls are proven with.
    pub credentials: Credentials,
    /// More keys, each as good.
    pub more_keys: Vec<Secret>,
}

impl Endpoint {
    /// The header in which the provider wants its key, and what stands before it.
    pub(crate) fn key_header(&self) -> (&str, &'static str) {
        let at = self.dialect.key_header();
        self.provider.key_header.as_deref().map_or((at.name, at.scheme), |header| (header, ""))
    }

    /// The provider whose prices hold.
    pub(crate) fn priced_as(&self) -> &str {
        self.provider.priced_as.as_deref().unwrap_or(&self.name)
    }

    /// How a model is spoken to.
    #[must_use]
    pub fn dialect(&self, model: &str) -> &'static dyn Dialect {
        dialect::find(self.provider.dialect(model)).unwrap_or(self.dialect)
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("name", &self.name).field("host", &self.base_url.host_str()).finish()
    }
}

/// The models of the configuration, and the providers behind those that can be served.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// Every listed model of a remote backend, each once.
    pub models: Vec<ServedModel>,
    /// The lanes whose provider can be called.
    pub endpoints: BTreeMap<Lane, Endpoint>,
}

/// Why the configuration makes no catalog.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// A listed name is no model name.
    #[error("{}: a listed name is not usable", file.display())]
    Name {
        /// The file that lists it.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        source: BadModelName,
    },
    /// Settings for a provider that does not exist.
    #[error("[providers.{name}]: no such provider{}", did_you_mean(nearest.as_deref()))]
    Provider {
        /// The name.
        name: String,
        /// A known name that is like it.
        nearest: Option<String>,
    },
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default()
}

impl Catalog {
    /// A line for a person: where a model would be called, or what is missing.
    #[must_use]
    pub fn describe(&self, model: &ServedModel) -> String {
        let name = &model.name;
        match (&model.availability, self.endpoints.get(&name.lane())) {
            (Availability::KeyMissing { variable }, _) => format!("{name} cannot be called: set {variable}"),
            (Availability::Unavailable { reason }, _) => format!("{name} cannot be called: {reason}"),
            (_, Some(endpoint)) => format!("{name} is called at {}", endpoint.base_url),
            (_, None) => format!("{name} has no endpoint"),
        }
    }

    /// Joins the listed models with what is known of their providers.
    ///
    /// # Errors
    /// [`CatalogError`] when a listed name is no model name, or settings name no provider. A model that cannot be
    /// served is no error: its availability says why.
    pub fn new(
        listed: &[ListedModel],
        table: &Table,
        settings: &Settings,
        environment: &Environment,
    ) -> Result<Self, CatalogError> {
        check_settings(settings, table)?;
        let sources = Sources { table, settings, environment };
        let mut models: BTreeMap<ModelName, ServedModel> = BTreeMap::new();
        let mut endpoints = BTreeMap::new();
        for model in listed {
            let Some(prefix) = Prefix::find(model.prefix).filter(|prefix| prefix.is_remote()) else { continue };
            let name = prefix.qualify(&model.name);
            let name = name.map_err(|source| CatalogError::Name { file: model.file.clone(), source })?;
            let served = served(name, model, &sources, &mut endpoints);
            models.entry(served.name.clone()).or_insert(served);
        }
        Ok(Self { models: models.into_values().collect(), endpoints })
    }
}

fn check_settings(settings: &Settings, table: &Table) -> Result<(), CatalogError> {
    let known = |name: &str| table.names().any(|row| variable_stem(row) == variable_stem(name));
    match settings.keys().find(|name| !known(name)) {
        None => Ok(()),
        Some(name) => {
            Err(CatalogError::Provider { name: name.clone(), nearest: table.nearest(name).map(str::to_owned) })
        }
    }
}

fn served(
    name: ModelName,
    model: &ListedModel,
    sources: &Sources<'_>,
    endpoints: &mut BTreeMap<Lane, Endpoint>,
) -> ServedModel {
    let lane = name.lane();
    let availability = match sources.endpoint(&lane.route) {
        Ok(endpoint) => {
            endpoints.entry(lane).or_insert(endpoint);
            Availability::Ready
        }
        Err(missing) => missing,
    };
    ServedModel {
        name,
        availability,
        description: model.description.clone(),
        context_tokens: model.context_tokens,
        batches: false,
    }
}

/// Everything that is known of providers.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The table of providers.
    pub table: &'a Table,
    /// What `genmill.toml` says of them.
    pub settings: &'a Settings,
    /// Variables that may hold addresses and keys.
    pub environment: &'a Environment,
}

impl Sources<'_> {
    /// Where the calls of a provider go.
    ///
    /// # Errors
    /// What is missing.
    pub fn endpoint(&self, name: &str) -> Result<Endpoint, Availability> {
        let unavailable = |reason: String| Availability::Unavailable { reason };
        let provider = self.table.find(name).ok_or_else(|| unavailable(self.unknown(name)))?;
        let dialect = dialect::find(&provider.dialect).ok_or_else(|| unavailable(unspoken(name, provider)))?;
        let more_keys = self.settings_of(name).map(|settings| settings.api_keys.clone()).unwrap_or_default();
        let mut more_keys = more_keys.into_iter().filter(|key| !key.reveal().is_empty());
        let key = self.key(name, provider).filter(|key| !key.reveal().is_empty()).or_else(|| more_keys.next());
        let more_keys = more_keys.collect();
        let credentials = self.credentials(name, provider, key)?;
        let provider = self.filled(name, provider, &credentials).map_err(unavailable)?;
        let base_url = self.base_url(name, &provider).map_err(unavailable)?;
        Ok(Endpoint { name: name.to_owned(), provider, dialect, base_url, credentials, more_keys })
    }

    /// What calls are proven with.
    fn credentials(&self, name: &str, provider: &Provider, key: Option<Secret>) -> Result<Credentials, Availability> {
        let unavailable = |reason: String| Availability::Unavailable { reason };
        match (provider.auth, key) {
            (AuthKind::Google, key) => match google::account(key.as_ref(), self.environment) {
                Some(account) => account.map(|account| Credentials::Google(Box::new(account))).map_err(unavailable),
                None => Err(key_missing(provider)),
            },
            (AuthKind::Ibm, Some(key)) => {
                let token_uri = self.token_uri(name, provider).map_err(unavailable)?;
                Ok(Credentials::Ibm { key, token_uri })
            }
            (AuthKind::Key | AuthKind::Aws, Some(key)) => Ok(Credentials::Key(key)),
            (AuthKind::Aws, None) if self.aws(provider).is_some() => {
                Ok(self.aws(provider).map_or(Credentials::None, Credentials::Aws))
            }
            (_, None) if provider.key_need == KeyNeed::Optional => Ok(Credentials::None),
            (_, None) => Err(key_missing(provider)),
        }
    }

    /// Amazon's credentials, as its own tools find them in the environment.
    fn aws(&self, provider: &Provider) -> Option<AwsCredentials> {
        let get = |name: &str| self.environment.get(name);
        let regions = provider.parts.get("region").into_iter().flatten();
        let region = regions.into_iter().find_map(|variable| get(variable)).unwrap_or("us-east-1");
        Some(AwsCredentials {
            access_key: get(AWS_KEYS[0])?.to_owned(),
            secret_key: Secret::new(get(AWS_KEYS[1])?),
            session_token: get("AWS_SESSION_TOKEN").map(Secret::new),
            region: region.to_owned(),
            service: "bedrock",
        })
    }

    /// Where tokens come from: what the environment says, else the table.
    fn token_uri(&self, name: &str, provider: &Provider) -> Result<Url, String> {
        let variable = format!("{}_TOKEN_URI", variable_stem(name));
        let text = self.environment.get(&variable).or(provider.token_uri.as_deref()).unwrap_or_default();
        let url = Url::parse(text).ok().filter(|url| url.scheme() == "https" || is_loopback(url));
        url.ok_or_else(|| format!("the address of provider `{name}` for tokens is not on https: correct {variable}"))
    }

    /// The row with what the environment has for its parts, and what an account tells of them.
    fn filled(&self, name: &str, provider: &Provider, credentials: &Credentials) -> Result<Provider, String> {
        let mut filled = provider.clone();
        // An address that is set needs no parts.
        filled.base_url = self.set_base_url(name, provider).map(str::to_owned).or(filled.base_url);
        for (part, variables) in &provider.parts {
            if let Some(value) = variables.iter().find_map(|variable| self.environment.get(variable)) {
                filled = filled.with_part(part, value);
            }
        }
        if let Credentials::Google(account) = credentials {
            filled =
                account.project.as_deref().into_iter().fold(filled, |row, project| row.with_part("project", project));
        }
        let Some(missing) = filled.missing_part() else { return Ok(filled) };
        let variables = provider.parts.get(missing).map(|variables| variables.join(" or ")).unwrap_or_default();
        Err(format!("the {missing} of provider `{name}` is not known: set {variables} in the environment"))
    }

    fn unknown(&self, name: &str) -> String {
        let nearest = did_you_mean(self.table.nearest(name));
        format!("no provider is called `{name}`{nearest}: write the model as litellm_PROVIDER/MODEL")
    }

    fn settings_of(&self, name: &str) -> Option<&config::Provider> {
        // Names in variables cannot tell `-` from `_`.
        self.settings.iter().find(|(key, _)| variable_stem(key) == variable_stem(name)).map(|(_, settings)| settings)
    }

    /// The base URL of the configuration, else of the environment.
    fn set_base_url(&self, name: &str, provider: &Provider) -> Option<&str> {
        let stem = variable_stem(name);
        let variables = [format!("{stem}_BASE_URL"), format!("{stem}_API_BASE")];
        let configured = self.settings_of(name).and_then(|settings| settings.base_url.as_deref());
        let set = || variables.iter().chain(&provider.base_url_variables).find_map(|name| self.environment.get(name));
        configured.or_else(set)
    }

    /// The base URL: the one that is set, else that of the table.
    fn base_url(&self, name: &str, provider: &Provider) -> Result<Url, String> {
        let variable = format!("{}_BASE_URL", variable_stem(name));
        let Some(text) = provider.base_url.as_deref() else {
            return Err(format!(
                "provider `{name}` has no address of its own: set {variable} in the environment, or base_url under \
                 [providers.{name}] in genmill.toml"
            ));
        };
        let mut url =
            Url::parse(text.trim()).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        if let (Some(url), Some(path)) = (url.as_mut().filter(|url| url.path() == "/"), &provider.base_path) {
            url.set_path(path);
        }
        if let Some(host) = url.as_ref().and_then(guard::forbidden_host) {
            return Err(format!(
                "the base URL of provider `{name}` leads to {host}, which tells secrets of machines and is never called"
            ));
        }
        url.ok_or_else(|| {
            format!(
                "the base URL of provider `{name}` is not of the form https://host/path: correct {variable}, or base_url under \
                 [providers.{name}] in genmill.toml"
            )
        })
    }

    /// The key: of the configuration, else the first variable of the provider's that is set.
    fn key(&self, name: &str, provider: &Provider) -> Option<Secret> {
        let configured = self.settings_of(name).and_then(|settings| settings.api_key.clone());
        let configured = configured.filter(|key| !key.reveal().is_empty());
        configured.or_else(|| provider.keys.iter().find_map(|name| self.environment.get(name)).map(Secret::new))
    }
}

fn key_missing(provider: &Provider) -> Availability {
    let key = provider.keys.first().cloned().unwrap_or_default();
    let variable = match provider.auth {
        AuthKind::Aws => format!("{key}, or {} and {}", AWS_KEYS[0], AWS_KEYS[1]),
        AuthKind::Google => format!(
            "{key}, or run `gcloud auth application-default login`, or on a machine of Google's {}",
            google::MACHINE_HOST
        ),
        AuthKind::Key | AuthKind::Ibm => key,
    };
    Availability::KeyMissing { variable }
}

fn unspoken(name: &str, provider: &Provider) -> String {
    let spoken: Vec<&str> = dialect::DIALECTS.iter().map(|(name, _)| *name).collect();
    format!(
        "provider `{name}` is known but speaks `{}`, which this version of genmill-worker-api does not (it speaks {}): \
         reach the model through another provider, such as openrouter_",
        provider.dialect,
        spoken.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::google::tests::account;
    use genmill_daemon::models::LocalSettings;

    fn listed(prefix: &'static str, name: &str) -> ListedModel {
        ListedModel {
            prefix,
            name: name.to_owned(),
            path: None,
            tokenizer: None,
            description: String::new(),
            context_tokens: None,
            threads: None,
            device: None,
            local: LocalSettings::default(),
            file: PathBuf::from("litellm_models.yaml"),
        }
    }

    fn catalog(models: &[(&'static str, &str)], settings: &str, variables: &[(&str, &str)]) -> Catalog {
        let models: Vec<ListedModel> = models.iter().map(|(prefix, name)| listed(prefix, name)).collect();
        let settings: Settings = toml::from_str(settings).unwrap();
        let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Catalog::new(&models, &Table::embedded().unwrap(), &settings, &environment).unwrap()
    }

    fn endpoint(name: &str, settings: &str, variables: &[(&str, &str)]) -> (String, Option<String>) {
        let catalog = catalog(&[("litellm", name)], settings, variables);
        let endpoint = catalog.endpoints.values().next().unwrap();
        (endpoint.base_url.to_string(), endpoint.credentials.secret().map(str::to_owned))
    }

    fn availability(name: &str, variables: &[(&str, &str)]) -> Availability {
        catalog(&[("litellm", name)], "", variables).models.remove(0).availability
    }

    #[test]
    fn models_of_a_provider_share_a_lane_and_are_listed_once() {
        let keys = [("OPENAI_API_KEY", "k"), ("OPENROUTER_API_KEY", "r")];
        let models =
            [("litellm", "gpt-4"), ("litellm", "litellm_gpt-4"), ("litellm", "o1"), ("openrouter", "x/y"), ("hf", "z")];
        let catalog = catalog(&models, "", &keys);
        let names: Vec<&str> = catalog.models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!(names, ["litellm_gpt-4", "litellm_o1", "openrouter_x/y"]);
        assert!(catalog.models.iter().all(|model| model.availability == Availability::Ready));
        let lanes: Vec<String> = catalog.endpoints.keys().map(Lane::to_string).collect();
        assert_eq!(lanes, ["litellm:openai", "openrouter:openrouter"]);
    }

    #[test]
    fn a_base_url_is_taken_from_settings_then_environment_then_table() {
        let key = ("GROQ_API_KEY", "k");
        let table = "https://api.groq.com/openai/v1";
        assert_eq!(endpoint("groq/x", "", &[key]).0, table);
        assert_eq!(endpoint("groq/x", "", &[key, ("GROQ_API_BASE", "http://b/v1")]).0, "http://b/v1");
        let both = [key, ("GROQ_API_BASE", "http://b/v1"), ("GROQ_BASE_URL", "http://a/v1")];
        assert_eq!(endpoint("groq/x", "", &both).0, "http://a/v1");
        assert_eq!(endpoint("groq/x", "groq.base_url = 'http://c/v1'", &both).0, "http://c/v1");
        let others = [("FIREWORKS_API_KEY", "k"), ("FIREWORKS_API_BASE", "http://d/v1")];
        assert_eq!(endpoint("fireworks_ai/x", "", &others).0, "http://d/v1");
    }

    #[test]
    fn a_key_is_taken_from_settings_then_from_any_of_its_variables() {
        let alias = [("TOGETHERAI_API_KEY", "alias"), ("TOGETHER_API_KEY", "")];
        assert_eq!(endpoint("together_ai/x", "", &alias).1.as_deref(), Some("alias"));
        assert_eq!(endpoint("together_ai/x", "together_ai.api_key = 'own'", &alias).1.as_deref(), Some("own"));
        assert_eq!(endpoint("nano-gpt/x", "nano_gpt.api_key = 'own'", &[]).1.as_deref(), Some("own"));
    }

    #[test]
    fn a_missing_key_is_named_and_its_lane_is_not_offered() {
        let missing = |variable: &str| Availability::KeyMissing { variable: variable.to_owned() };
        assert_eq!(availability("gpt-4", &[]), missing("OPENAI_API_KEY"));
        let local = [("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")];
        assert_eq!(availability("gpt-4", &local), missing("OPENAI_API_KEY"));
        assert!(catalog(&[("litellm", "gpt-4")], "", &[]).endpoints.is_empty());
    }

    #[test]
    fn an_address_may_have_parts() {
        let url = |variables: &[(&str, &str)]| endpoint("azure/gpt-4o", "", variables).0;
        let key = ("AZURE_API_KEY", "k");
        assert_eq!(url(&[key, ("AZURE_RESOURCE", "mine")]), "https://mine.openai.azure.com/openai/v1");
        assert_eq!(url(&[key, ("AZURE_API_BASE", "https://x.example/openai/v1")]), "https://x.example/openai/v1");
    }

    #[test]
    fn an_address_without_a_path_gets_that_of_its_provider() {
        let variables = [("AZURE_API_KEY", "k"), ("AZURE_API_BASE", "https://x.openai.azure.com/")];
        assert_eq!(endpoint("azure/gpt-4o", "", &variables).0, "https://x.openai.azure.com/openai/v1");
    }

    #[test]
    fn amazon_is_called_with_a_key_or_signed() {
        let region = ("AWS_REGION", "eu-central-1");
        let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "s"), region];
        let signed = catalog(&[("litellm", "bedrock/x")], "", &keys);
        let endpoint = signed.endpoints.values().next().unwrap();
        assert_eq!(endpoint.base_url.as_str(), "https://bedrock-runtime.eu-central-1.amazonaws.com/");
        let Credentials::Aws(aws) = &endpoint.credentials else { panic!("{:?}", endpoint.credentials) };
        assert_eq!((aws.access_key.as_str(), aws.region.as_str()), ("a", "eu-central-1"));
        let both = [keys[0], keys[1], region, ("AWS_BEARER_TOKEN_BEDROCK", "b")];
        let keyed = catalog(&[("litellm", "bedrock/x")], "", &both);
        assert_eq!(keyed.endpoints.values().next().unwrap().credentials.secret(), Some("b"));
        let Availability::KeyMissing { variable } = availability("bedrock/x", &[region]) else { panic!() };
        assert_eq!(variable, "AWS_BEARER_TOKEN_BEDROCK, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
    }

    #[test]
    fn google_is_called_for_an_account_whose_project_counts_unless_another_is_named() {
        let account = account("https://oauth2.googleapis.com/token");
        let key = ("GOOGLE_APPLICATION_CREDENTIALS", account.as_str());
        let url = |variables: &[(&str, &str)]| endpoint("vertex_ai/gemini-2.5-flash", "", variables).0;
        let at = |host: &str, project: &str, location: &str| {
            format!("https://{host}aiplatform.googleapis.com/v1/projects/{project}/locations/{location}")
        };
        assert_eq!(url(&[key, ("VERTEXAI_LOCATION", "us-east5")]), at("us-east5-", "the-project", "us-east5"));
        let named = [key, ("VERTEXAI_LOCATION", "global"), ("VERTEXAI_PROJECT", "mine")];
        assert_eq!(url(&named), at("", "mine", "global"));
        let Availability::Unavailable { reason } =
            availability("vertex_ai/x", &[("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")])
        else {
            panic!()
        };
        assert!(
            reason.starts_with("cannot read /no/such/file, which GOOGLE_APPLICATION_CREDENTIALS names"),
            "{reason}"
        );
    }

    #[test]
    fn where_machines_tell_secrets_is_no_address() {
        let key = ("OPENAI_API_KEY", "k");
        for url in ["http://169.254.169.254/v1", "http://metadata.google.internal/v1", "http://[fe80::1]/v1"] {
            let Availability::Unavailable { reason } = availability("gpt-4", &[key, ("OPENAI_BASE_URL", url)]) else {
                panic!("{url}")
            };
            assert!(reason.contains("is never called"), "{reason}");
        }
    }

    #[test]
    fn a_server_of_ones_own_needs_no_key() {
        assert_eq!(endpoint("ollama/llama3", "", &[]), ("http://localhost:11434/".to_owned(), None));
        let vllm = [("HOSTED_VLLM_API_BASE", "http://gpu:8000/v1")];
        assert_eq!(endpoint("hosted_vllm/x", "", &vllm), ("http://gpu:8000/v1".to_owned(), None));
    }

    #[test]
    fn what_is_missing_is_said() {
        let check = |name: &str, variables: &[(&str, &str)], says: &str| {
            let Availability::Unavailable { reason } = availability(name, variables) else { panic!("{name}") };
            assert!(reason.contains(says), "{reason}");
        };
        check("togetherai/x", &[], "did you mean `together_ai`?");
        check("sagemaker/x", &[("AWS_ACCESS_KEY_ID", "k")], "speaks `sagemaker-sigv4`");
        check("azure/x", &[("AZURE_API_KEY", "k")], "set AZURE_RESOURCE");
        check("hosted_vllm/x", &[], "set HOSTED_VLLM_BASE_URL");
        check("gpt-4", &[("OPENAI_API_KEY", "k"), ("OPENAI_BASE_URL", "localhost:80")], "not of the form");
    }

    #[test]
    fn settings_of_an_unknown_provider_are_refused() {
        let settings = toml::from_str("opanai.api_key = 'k'").unwrap();
        let error =
            Catalog::new(&[], &Table::embedded().unwrap(), &settings, &Environment::default()).unwrap_err().to_string();
        assert_eq!(error, "[providers.opanai]: no such provider (did you mean `openai`?)");
    }
}
