//! Model names: the prefix picks the backend, the rest picks the route. One table, [`PREFIXES`].
//!
//! Never here: which models exist or who serves them (see `registration`).

use serde::{Deserialize, Serialize};

/// A backend, as one row of [`PREFIXES`].
#[derive(Debug, PartialEq, Eq)]
pub struct Prefix {
    /// What model names begin with, before the underscore.
    pub name: &'static str,
    /// How jobs find a worker.
    pub routing: Routing,
    /// The daemon that serves it, for error messages.
    pub daemon: &'static str,
}

/// How the part after the prefix picks a lane.
#[derive(Debug, PartialEq, Eq)]
pub enum Routing {
    /// A local backend: a lane for each model.
    Model,
    /// A remote backend whose names are `provider/model`, or bare: then the model's name tells the provider.
    Provider {
        /// The provider of a name without a slash, unless `bare` tells another.
        default: &'static str,
        /// How bare names of other providers begin, and those providers.
        bare: &'static [(&'static str, &'static str)],
        /// Other ways to write the beginning of a name, and the one that counts.
        also: &'static [(&'static str, &'static str)],
    },
    /// A remote backend that is itself the only provider.
    Only {
        /// The provider.
        provider: &'static str,
    },
}

/// LiteLLM's names. Bare Gemini models are those of AI Studio; `vertex_ai/` names those of Vertex.
const LITELLM: Routing = Routing::Provider { default: "openai", bare: BARE, also: ALSO };

const BARE: &[(&str, &str)] = &[
    ("claude-", "anthropic"),
    ("gemini-", "gemini"),
    ("command-", "cohere"),
    ("c4ai-", "cohere"),
    ("deepseek-", "deepseek"),
    ("jamba-", "ai21"),
    ("j2-", "ai21"),
    // Bedrock names models by vendor, or by the part of the world that answers and vendor.
    ("ai21.", "bedrock"),
    ("amazon.", "bedrock"),
    ("anthropic.", "bedrock"),
    ("cohere.", "bedrock"),
    ("deepseek.", "bedrock"),
    ("google.", "bedrock"),
    ("meta.", "bedrock"),
    ("minimax.", "bedrock"),
    ("mistral.", "bedrock"),
    ("moonshot.", "bedrock"),
    ("moonshotai.", "bedrock"),
    ("nvidia.", "bedrock"),
    ("openai.", "bedrock"),
    ("qwen.", "bedrock"),
    ("twelvelabs.", "bedrock"),
    ("writer.", "bedrock"),
    ("zai.", "bedrock"),
    ("apac.", "bedrock"),
    ("au.", "bedrock"),
    ("ca.", "bedrock"),
    ("eu.", "bedrock"),
    ("global.", "bedrock"),
    ("in.", "bedrock"),
    ("jp.", "bedrock"),
    ("us.", "bedrock"),
    ("us-gov.", "bedrock"),
];

const ALSO: &[(&str, &str)] = &[
    ("amazon-nova/", "amazon_nova/"),
    ("anthropic_text/", "anthropic/"),
    ("azure_text/", "azure/"),
    ("bedrock/converse/", "bedrock/"),
    ("bedrock/invoke/", "bedrock/"),
    ("bedrock_converse/", "bedrock/"),
    ("bigmodel/", "zhipu/"),
    ("cohere_chat/", "cohere/"),
    ("custom/", "custom_openai/"),
    ("openai/responses/", "openai_responses/"),
    ("openai_like/", "custom_openai/"),
    // Its name begins as the prefix does, which lists may leave out.
    ("proxy/", "litellm_proxy/"),
    ("vertex_ai_beta/", "vertex_ai/"),
    ("watsonx_text/", "watsonx/"),
];

/// The provider of a name without a slash.
fn provider_of_bare(name: &str, default: &'static str, bare: &[(&str, &'static str)]) -> &'static str {
    bare.iter().find(|(start, _)| name.starts_with(start)).map_or(default, |(_, provider)| provider)
}

/// Every backend prefix.
pub const PREFIXES: &[Prefix] = &[
    Prefix { name: "vllm", routing: Routing::Model, daemon: "genmill-worker-gpu" },
    Prefix { name: "hf", routing: Routing::Model, daemon: "genmill-worker-gpu" },
    Prefix { name: "llamacpp", routing: Routing::Model, daemon: "genmill-worker-gpu" },
    Prefix { name: "litellm", routing: LITELLM, daemon: "genmill-worker-api" },
    Prefix { name: "openrouter", routing: Routing::Only { provider: "openrouter" }, daemon: "genmill-worker-api" },
];

impl Prefix {
    /// The row named `name`.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        PREFIXES.iter().find(|prefix| prefix.name == name)
    }

    /// True when jobs go to a remote provider.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.routing != Routing::Model
    }

    /// The one way to write a model's name: without the provider that a bare name means.
    fn canonical(&self, rest: &str) -> String {
        let also = if let Routing::Provider { also, .. } = &self.routing { *also } else { &[] };
        let counts = also.iter().find_map(|(other, counts)| Some(format!("{counts}{}", rest.strip_prefix(other)?)));
        let rest = counts.as_deref().unwrap_or(rest);
        let bare = match &self.routing {
            Routing::Provider { default, bare, .. } => {
                let told = rest
                    .split_once('/')
                    .filter(|(provider, model)| *provider == provider_of_bare(model, default, bare));
                told.map_or(rest, |(_, model)| model)
            }
            Routing::Model | Routing::Only { .. } => rest,
        };
        // Without its provider a model with a slash would name another one.
        let rest = if bare.contains('/') { rest } else { bare };
        format!("{}_{rest}", self.name)
    }

    /// The name of the configuration section and file that lists this backend's models.
    #[must_use]
    pub fn section(&self) -> String {
        format!("{}_models", self.name)
    }

    /// Makes a whole model name from a listed one, which may or may not carry the prefix already.
    ///
    /// # Errors
    /// [`BadModelName`] when the result is no model name.
    pub fn qualify(&self, listed: &str) -> Result<ModelName, BadModelName> {
        let bare = listed.strip_prefix(self.name).and_then(|rest| rest.strip_prefix('_')).unwrap_or(listed);
        ModelName::parse(&format!("{}_{bare}", self.name))
    }
}

/// A model name with a known prefix, such as `litellm_groq/llama3-8b-8192`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelName(String);

/// Why a text is not a model name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadModelName {
    /// No known prefix.
    #[error("model `{name}` has no known backend prefix: model names begin with {}", known_prefixes())]
    UnknownPrefix {
        /// The refused name, shortened.
        name: String,
    },
    /// A known prefix, but what follows is unusable.
    #[error("model `{name}` is not usable: {problem}")]
    Malformed {
        /// The refused name, shortened.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

fn known_prefixes() -> String {
    PREFIXES.iter().map(|prefix| format!("{}_", prefix.name)).collect::<Vec<_>>().join(", ")
}

impl ModelName {
    /// Parses a name.
    ///
    /// # Errors
    /// [`BadModelName`] when the prefix is unknown, or the rest is empty, too long, or has control characters.
    pub fn parse(name: &str) -> Result<Self, BadModelName> {
        let short: String = name.chars().take(120).collect();
        let known = name.split_once('_').and_then(|(prefix, rest)| Some((Prefix::find(prefix)?, rest)));
        let Some((prefix, rest)) = known else {
            return Err(BadModelName::UnknownPrefix { name: short });
        };
        let problem = match (&prefix.routing, rest.split_once('/')) {
            _ if rest.is_empty() => Some("nothing follows the prefix"),
            _ if name.len() > 256 => Some("it is longer than 256 bytes"),
            _ if name.chars().any(char::is_control) => Some("it has control characters"),
            _ if rest.trim() != rest => Some("it has spaces around it"),
            (Routing::Provider { .. }, Some(("", _) | (_, ""))) => Some("write PROVIDER/MODEL"),
            _ => None,
        };
        match problem {
            Some(problem) => Err(BadModelName::Malformed { name: short, problem }),
            None => Ok(Self(prefix.canonical(rest))),
        }
    }

    /// The whole name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn split(&self) -> (&str, &str) {
        self.0.split_once('_').unwrap_or((&self.0, ""))
    }

    /// The row of the backend.
    #[must_use]
    pub fn prefix(&self) -> &'static Prefix {
        // `parse` let only known prefixes through; the first row stands in for the impossible.
        Prefix::find(self.split().0).unwrap_or(&PREFIXES[0])
    }

    /// The lane the model's jobs go to.
    #[must_use]
    pub fn lane(&self) -> Lane {
        let (prefix, rest) = self.split();
        let route = match &self.prefix().routing {
            Routing::Model => rest,
            Routing::Provider { default, bare, .. } => {
                rest.split_once('/').map_or_else(|| provider_of_bare(rest, default, bare), |(provider, _)| provider)
            }
            Routing::Only { provider } => *provider,
        };
        Lane { prefix: prefix.to_owned(), route: route.to_owned() }
    }

    /// The name that the backend itself knows: without prefix, and without provider where the lane names it.
    #[must_use]
    pub fn backend_name(&self) -> &str {
        let (_, rest) = self.split();
        match &self.prefix().routing {
            Routing::Model | Routing::Only { .. } => rest,
            Routing::Provider { .. } => rest.split_once('/').map_or(rest, |(_, model)| model),
        }
    }
}

impl TryFrom<String> for ModelName {
    type Error = BadModelName;
    fn try_from(name: String) -> Result<Self, BadModelName> {
        Self::parse(&name)
    }
}

impl From<ModelName> for String {
    fn from(name: ModelName) -> Self {
        name.0
    }
}

impl std::fmt::Display for ModelName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::fmt::Debug for ModelName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Where jobs wait and are delivered: a backend prefix and a route within it (the model for local backends, the
/// provider for remote ones).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lane {
    /// The backend prefix.
    pub prefix: String,
    /// The model or provider.
    pub route: String,
}

/// What the route of a lane ends with whose jobs go out in batches.
const BATCH: &str = "+batch";

impl Lane {
    /// The lane beside this one, for jobs that go out in batches.
    #[must_use]
    pub fn batch(&self) -> Self {
        Self { prefix: self.prefix.clone(), route: format!("{}{BATCH}", self.route) }
    }

    /// Whether its jobs go out in batches.
    #[must_use]
    pub fn is_batch(&self) -> bool {
        self.route.ends_with(BATCH)
    }
}

impl std::fmt::Display for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.prefix, self.route)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, lane: &str, backend_name: &str) {
        let name = ModelName::parse(name).unwrap();
        assert_eq!(name.lane().to_string(), lane);
        assert_eq!(name.backend_name(), backend_name);
    }

    #[test]
    fn the_prefix_picks_the_lane() {
        check("vllm_Qwen2.5-0.5B", "vllm:Qwen2.5-0.5B", "Qwen2.5-0.5B");
        check("hf_org/some_model", "hf:org/some_model", "org/some_model");
        check("litellm_gpt-4", "litellm:openai", "gpt-4");
        check("litellm_groq/llama3-8b-8192", "litellm:groq", "llama3-8b-8192");
        check("litellm_together_ai/meta-llama/Llama-3", "litellm:together_ai", "meta-llama/Llama-3");
        check("litellm_claude-3-5-haiku-20241022", "litellm:anthropic", "claude-3-5-haiku-20241022");
        check("litellm_gemini-2.0-flash", "litellm:gemini", "gemini-2.0-flash");
        check("litellm_vertex_ai/gemini-2.0-flash", "litellm:vertex_ai", "gemini-2.0-flash");
        check("litellm_us.anthropic.claude-sonnet-4-v1:0", "litellm:bedrock", "us.anthropic.claude-sonnet-4-v1:0");
        check("litellm_deepseek-chat", "litellm:deepseek", "deepseek-chat");
        check("openrouter_openai/gpt-4o", "openrouter:openrouter", "openai/gpt-4o");
    }

    #[test]
    fn other_ways_to_write_a_name_mean_the_same_model() {
        let name = |name| ModelName::parse(name).unwrap();
        assert_eq!(name("litellm_cohere_chat/command-r"), name("litellm_command-r"));
        assert_eq!(name("litellm_bedrock/converse/meta.llama3-v1:0"), name("litellm_bedrock/meta.llama3-v1:0"));
        assert_eq!(name("litellm_proxy/x"), name("litellm_litellm_proxy/x"));
    }

    #[test]
    fn a_bare_name_and_one_with_the_default_provider_are_one_model() {
        let name = |name| ModelName::parse(name).unwrap();
        assert_eq!(name("litellm_openai/gpt-4"), name("litellm_gpt-4"));
        assert_eq!(name("litellm_anthropic/claude-3-opus"), name("litellm_claude-3-opus"));
        assert_eq!(name("litellm_openai/claude-3-opus").lane().route, "openai");
        assert_eq!(name("litellm_openai/claude-3-opus").backend_name(), "claude-3-opus");
        assert_eq!(name("litellm_openai/org/x").lane().route, "openai");
        assert_eq!(name("litellm_openai/org/x").backend_name(), "org/x");
        assert_ne!(name("vllm_openai/gpt-4"), name("vllm_gpt-4"));
    }

    #[test]
    fn an_unknown_prefix_is_refused_and_the_known_ones_are_named() {
        for name in ["", "gpt-4", "vlm_x", "_x"] {
            let error = ModelName::parse(name).unwrap_err();
            assert!(matches!(error, BadModelName::UnknownPrefix { .. }), "{name}");
            assert!(error.to_string().contains("vllm_, hf_, llamacpp_, litellm_, openrouter_"));
        }
    }

    #[test]
    fn a_name_that_routes_nowhere_is_refused() {
        for name in ["vllm_", "litellm_/x", "litellm_openai/", "hf_a\nb", "hf_ a", &format!("hf_{}", "x".repeat(300))] {
            assert!(matches!(ModelName::parse(name), Err(BadModelName::Malformed { .. })), "{name}");
        }
    }

    #[test]
    fn a_listed_name_may_carry_its_prefix() {
        let litellm = Prefix::find("litellm").unwrap();
        for listed in ["gpt-4", "litellm_gpt-4"] {
            assert_eq!(litellm.qualify(listed).unwrap().as_str(), "litellm_gpt-4");
        }
    }
}
