//! The table of providers, `providers.toml`, and what is special about each. Never here: keys, which are configuration
//! (see `catalog`).

use crate::auth::AuthKind;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A provider, as one row of the table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Where its API is; `None` when that must be configured.
    pub base_url: Option<String>,
    /// What follows an address that was set without a path.
    pub base_path: Option<String>,
    /// Variables that set the base URL, besides those made of the name.
    #[serde(default)]
    pub base_url_variables: Vec<String>,
    /// Variables that may hold its key; the first is the one to name to people.
    pub keys: Vec<String>,
    /// Whether it serves calls without a key.
    #[serde(default, rename = "key")]
    pub key_need: KeyNeed,
    /// How it is spoken to: the name of a dialect.
    pub dialect: String,
    /// How its batches are spoken of: the name of a batch API; `None` when it has none that is known.
    pub batch: Option<String>,
    /// What follows the base URL, where it is not the dialect's own path.
    pub path: Option<String>,
    /// What its calls are proven with.
    #[serde(default)]
    pub auth: AuthKind,
    /// Where tokens come from, where that is not told by what they are given for.
    pub token_uri: Option<String>,
    /// Where its key goes, when not where the dialect has it: a header that has the key alone.
    pub key_header: Option<String>,
    /// A path below the base URL that only a good key may read, where the dialect's list of models is open to all.
    pub check_path: Option<String>,
    /// Where, below the base URL, an account's credit is told; a key that may not know is told its own limit at
    /// `check_path`. Both in OpenRouter's form.
    pub credit_path: Option<String>,
    /// Where, below the base URL, the record of a call is kept, with `{id}` for its id.
    pub generation_path: Option<String>,
    /// Names in braces within `base_url`, `path`, `headers` and `body`, and the variables that may hold what stands for them.
    #[serde(default)]
    pub parts: BTreeMap<String, Vec<String>>,
    /// Texts of the filled address and what stands in their place, where an address is not made of its parts alone.
    #[serde(default)]
    pub replaced: BTreeMap<String, String>,
    /// Its name for `model`.
    pub model_field: Option<String>,
    /// Fields of every body.
    #[serde(default)]
    pub body: BTreeMap<String, String>,
    /// How its models are told how long to think, where its dialect knows several ways.
    pub thinking: Option<Thinking>,
    /// Headers of every call.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Whether answers come in pieces.
    #[serde(default = "yes")]
    pub streaming: bool,
    /// Whether it may be asked for the usage at the end of a stream.
    #[serde(default = "yes")]
    pub stream_usage: bool,
    /// Its name for `max_tokens`.
    pub max_tokens_field: Option<String>,
    /// Its name for `seed`.
    pub seed_field: Option<String>,
    /// The provider whose prices it has.
    pub priced_as: Option<String>,
    /// Parameters it refuses.
    #[serde(default)]
    pub drop: Vec<String>,
    /// What it wants beside what others do.
    #[serde(default)]
    pub wants: Vec<Want>,
    /// What differs for some of its models.
    #[serde(default)]
    pub models: Vec<ModelQuirks>,
}

fn yes() -> bool {
    true
}

/// Whether a provider serves calls without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyNeed {
    /// It does not.
    #[default]
    Required,
    /// It may, as servers of one's own do.
    Optional,
}

/// How models are told how long to think.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Thinking {
    /// By a number of tokens.
    #[default]
    Budget,
    /// By a word.
    Level,
}

/// What some providers want that others do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    /// The place of each call among those of its message; whoever chooses a tool by its name writes that as a call too.
    CallIndex,
    /// A description of every tool.
    ToolDescription,
}

/// What differs for the models whose names begin in one of some ways.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelQuirks {
    /// The beginnings.
    pub starts_with: Vec<String>,
    /// How they are spoken to.
    pub dialect: Option<String>,
    /// What follows the base URL for them.
    pub path: Option<String>,
    /// Their name for `max_tokens`.
    pub max_tokens_field: Option<String>,
    /// How they are told how long to think.
    pub thinking: Option<Thinking>,
    /// Parameters they refuse, besides those that the provider refuses for all.
    #[serde(default)]
    pub drop: Vec<String>,
}

impl Provider {
    fn model_quirks(&self, model: &str) -> Option<&ModelQuirks> {
        let fits = |row: &&ModelQuirks| row.starts_with.iter().any(|start| model.starts_with(start.as_str()));
        self.models.iter().find(fits)
    }

    /// The name that the provider has for `max_tokens` of `model`.
    #[must_use]
    pub fn max_tokens_field(&self, model: &str) -> Option<&str> {
        let of_model = self.model_quirks(model).and_then(|row| row.max_tokens_field.as_deref());
        of_model.or(self.max_tokens_field.as_deref())
    }

    /// The first name in braces that nothing stands for yet.
    #[must_use]
    pub fn missing_part(&self) -> Option<&str> {
        let texts = || self.base_url.iter().chain(&self.path).chain(self.headers.values()).chain(self.body.values());
        self.parts.keys().find(|part| texts().any(|text| text.contains(&format!("{{{part}}}")))).map(String::as_str)
    }

    /// How `model` is spoken to: the name of a dialect.
    #[must_use]
    pub fn dialect(&self, model: &str) -> &str {
        self.model_quirks(model).and_then(|row| row.dialect.as_deref()).unwrap_or(&self.dialect)
    }

    /// What follows the base URL for `model`, where it is not the dialect's own path.
    #[must_use]
    pub fn path(&self, model: &str) -> Option<String> {
        let of_model = self.model_quirks(model).and_then(|row| row.path.as_deref());
        of_model.or(self.path.as_deref()).map(|path| path.replace("{model}", model))
    }

    /// How `model` is told how long to think.
    #[must_use]
    pub fn thinking(&self, model: &str) -> Thinking {
        self.model_quirks(model).and_then(|row| row.thinking).or(self.thinking).unwrap_or_default()
    }

    /// The row with `value` in place of a name in braces.
    #[must_use]
    pub fn with_part(mut self, name: &str, value: &str) -> Self {
        let name = format!("{{{name}}}");
        let texts = self.base_url.iter_mut().chain(&mut self.path);
        for text in texts.chain(self.headers.values_mut()).chain(self.body.values_mut()) {
            *text = text.replace(&name, value);
        }
        for (before, after) in &self.replaced {
            self.base_url = self.base_url.map(|url| url.replace(before, after));
        }
        self
    }

    /// Whether `model` takes a parameter.
    #[must_use]
    pub fn takes(&self, model: &str, parameter: &str) -> bool {
        let of_model = self.model_quirks(model).map_or(&[][..], |row| &row.drop);
        !self.drop.iter().chain(of_model).any(|dropped| dropped == parameter)
    }
}

/// All known providers by name.
#[derive(Clone, Debug)]
pub struct Table(BTreeMap<String, Provider>);

/// The file with a user's own rows, in the folder of the model lists.
pub const OWN_FILE: &str = "providers.toml";

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The user's file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is malformed.
    #[error("{place} is no table of providers")]
    Malformed {
        /// The file.
        place: String,
        /// Where, and what is wrong.
        #[source]
        source: Box<toml::de::Error>,
    },
}

impl Table {
    /// The table that this worker was built with.
    ///
    /// # Errors
    /// When the file is malformed, which a test rules out.
    pub fn embedded() -> Result<Self, toml::de::Error> {
        Self::with_own("")
    }

    /// The table that this worker was built with, changed by the rows of `folder`'s [`OWN_FILE`] when there is one.
    ///
    /// # Errors
    /// [`TableError`] when that file cannot be read, or is malformed.
    pub fn read(folder: &Path) -> Result<Self, TableError> {
        let path = folder.join(OWN_FILE);
        let own = match std::fs::read_to_string(&path) {
            Ok(own) => own,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(TableError::Unreadable { path, source }),
        };
        Self::with_own(&own)
            .map_err(|source| TableError::Malformed { place: path.display().to_string(), source: Box::new(source) })
    }

    /// The embedded table, changed by other rows: a new name adds a provider, a known one changes what it sets.
    fn with_own(own: &str) -> Result<Self, toml::de::Error> {
        let mut table: toml::Table = toml::from_str(include_str!("providers.toml"))?;
        // Read by themselves first, so that an error tells a line of the user's file.
        for (name, row) in toml::from_str::<toml::Table>(own)? {
            match (table.get_mut(&name).and_then(toml::Value::as_table_mut), row) {
                (Some(known), toml::Value::Table(row)) => known.extend(row),
                (_, row) => drop(table.insert(name, row)),
            }
        }
        resolve_likeness(table).try_into().map(Self)
    }

    /// The row of a provider.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Provider> {
        self.0.get(name)
    }

    /// The names of all providers.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The known name that is most like `name`, when any is.
    #[must_use]
    pub fn nearest(&self, name: &str) -> Option<&str> {
        let rated = self.names().map(|known| (strsim::jaro_winkler(name, known), known));
        rated.filter(|(likeness, _)| *likeness > 0.8).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known)
    }
}

/// Gives every row that is `like` another one what it does not set itself. A row is like one that is like none.
fn resolve_likeness(rows: toml::Table) -> toml::Table {
    let resolved = |row: &toml::Value| {
        let mut own = row.as_table()?.clone();
        let like = own.remove("like")?;
        let known = rows.get(like.as_str()?)?.as_table().filter(|known| !known.contains_key("like"))?;
        let mut row = known.clone();
        row.entry("priced_as").or_insert(like);
        row.extend(own);
        Some(toml::Value::Table(row))
    };
    rows.iter().map(|(name, row)| (name.clone(), resolved(row).unwrap_or_else(|| row.clone()))).collect()
}

/// The form of a provider's name in variables: `nano-gpt` is `NANO_GPT`.
#[must_use]
pub fn variable_stem(name: &str) -> String {
    name.to_uppercase().replace(['-', '.'], "_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{batch, dialect};

    #[test]
    fn every_row_is_usable() {
        let table = Table::embedded().unwrap();
        for (name, row) in &table.0 {
            assert!(!row.keys.is_empty(), "{name} names no key");
            if let Some(url) = &row.base_url {
                let url = url::Url::parse(&url.replace(['{', '}'], "")).unwrap();
                assert!(url.scheme() == "https" || row.key_need == KeyNeed::Optional, "{name}: {url}");
            }
            let dialects = row.models.iter().filter_map(|models| models.dialect.as_deref());
            assert!(dialects.into_iter().all(|dialect| dialect::find(dialect).is_some()), "{name}");
            assert!(row.batch.as_deref().is_none_or(|batch| batch::find(batch).is_some()), "{name}");
            for header in row.headers.keys() {
                assert!(http::HeaderName::from_bytes(header.as_bytes()).is_ok(), "{name}: {header}");
            }
        }
        let spoken = table.0.values().filter(|row| row.base_url.is_some() && dialect::find(&row.dialect).is_some());
        assert!(spoken.count() >= 116);
    }

    #[test]
    fn a_users_own_rows_add_providers_and_change_known_ones() {
        let own = "[mine]\nbase_url = 'https://llm.example/v1'\nkeys = ['MINE_KEY']\ndialect = 'openai'\n\
                   [groq]\nbase_url = 'https://groq.example/v1'";
        let table = Table::with_own(own).unwrap();
        assert_eq!(table.find("mine").unwrap().base_url.as_deref(), Some("https://llm.example/v1"));
        let groq = table.find("groq").unwrap();
        assert_eq!((groq.base_url.as_deref(), &*groq.keys[0]), (Some("https://groq.example/v1"), "GROQ_API_KEY"));
        assert!(Table::with_own("[mine]\ndialect = 'openai'").is_err());
        assert!(Table::with_own("[groq]\nbase_uri = 'x'").unwrap_err().to_string().contains("base_uri"));
        assert!(Table::with_own("groq = 1").is_err());
    }

    #[test]
    fn a_row_may_be_like_another_one() {
        let own = "[mine]\nlike = 'vertex_ai'\nkeys = ['MINE_KEY']\n[vertex_ai]\nauth = 'key'";
        let table = Table::with_own(own).unwrap();
        let (mine, known) = (table.find("mine").unwrap(), table.find("vertex_ai").unwrap());
        let expect =
            Provider { keys: vec!["MINE_KEY".to_owned()], priced_as: Some("vertex_ai".to_owned()), ..known.clone() };
        assert_eq!((mine, mine.auth), (&expect, AuthKind::Key), "as the known row is changed");
        for wrong in ["[mine]\nlike = 'nobody'", "[mine]\nlike = 'aiohttp_openai'", "[mine]\nlike = 1"] {
            assert!(Table::with_own(wrong).unwrap_err().to_string().contains("like"), "{wrong}");
        }
    }

    #[test]
    fn every_part_has_variables() {
        let table = Table::embedded().unwrap();
        for (name, row) in &table.0 {
            let filled = row.parts.iter().fold(row.clone(), |row, (part, variables)| {
                assert!(!variables.is_empty(), "{name}: {part}");
                row.with_part(part, "x")
            });
            assert!(filled.base_url.is_none_or(|url| !url.contains('{')), "{name}");
        }
    }

    #[test]
    fn a_model_may_differ_from_its_provider() {
        let table = Table::embedded().unwrap();
        let openai = table.find("openai").unwrap();
        assert_eq!(openai.max_tokens_field("gpt-4o"), None);
        assert_eq!(openai.max_tokens_field("o3-mini"), Some("max_completion_tokens"));
        assert!(openai.takes("gpt-4o", "temperature"));
        assert!(openai.takes("gpt-5-chat-latest", "temperature"));
        assert!(!openai.takes("gpt-5", "temperature"));
        assert!(!openai.takes("gpt-4o", "top_k"));
        assert_eq!([openai.dialect("gpt-5-pro"), openai.dialect("gpt-5")], ["openai-responses", "openai"]);
        let vertex = table.find("vertex_ai").unwrap();
        assert_eq!(vertex.path("meta/llama-4").as_deref(), Some("/endpoints/openapi/chat/completions"));
        assert_eq!((vertex.path("gemini-2.5-pro"), vertex.dialect("meta/llama-4")), (None, "openai"));
    }

    #[test]
    fn a_misspelt_name_has_a_nearest() {
        assert_eq!(Table::embedded().unwrap().nearest("togetherai"), Some("together_ai"));
        assert_eq!(Table::embedded().unwrap().nearest("zzzz"), None);
    }
}
