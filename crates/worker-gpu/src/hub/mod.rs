//! Models of the Hugging Face hub: found in the cache that all its tools share, else downloaded into it.
//!
//! Never here: what is in a model. The cache is looked at first; a model that lies there whole is used without asking
//! anybody. All of this blocks, so it runs on the thread that loads models, never on the runtime's.

mod cache;
mod download;
mod progress;

use anyhow::{Context as _, bail};
use genmill_daemon::config;
use genmill_daemon::environment::Environment;
use genmill_daemon::models::ModelPath;
use genmill_daemon::secret::Secret;
use reqwest::Url;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How downloads are made.
#[derive(Clone, Debug)]
pub struct Hub {
    endpoint: Url,
    token: Option<Secret>,
    cache: PathBuf,
    offline: bool,
    stop: CancellationToken,
    /// How long to wait before a broken download goes on; doubled each time.
    retry_wait: Duration,
}

impl Hub {
    /// Reads the configuration; `stop` ends downloads.
    ///
    /// # Errors
    /// When the endpoint is no URL, or no folder for the cache is known.
    pub fn new(hub: &config::Hub, environment: &Environment, stop: CancellationToken) -> anyhow::Result<Self> {
        let endpoint =
            Url::parse(hub.endpoint.trim_end_matches('/')).context("hub.endpoint (HF_ENDPOINT) is no URL")?;
        let home = hub.home.clone().or_else(|| {
            let caches = environment.get("XDG_CACHE_HOME").map(PathBuf::from);
            let caches = caches.or_else(|| Some(Path::new(environment.get("HOME")?).join(".cache")));
            Some(caches?.join("huggingface"))
        });
        let cache = hub.cache.clone().or_else(|| Some(home.as_ref()?.join("hub")));
        let saved = || std::fs::read_to_string(home.as_ref()?.join("token")).ok();
        let saved = || saved().map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        Ok(Self {
            endpoint,
            token: hub.token.clone().or_else(|| saved().map(Secret::new)),
            cache: cache.context("no folder for models of the hub is known: set HF_HOME")?,
            offline: hub.offline,
            stop,
            retry_wait: Duration::from_secs(1),
        })
    }

    /// The same with another wait before a broken download goes on.
    #[must_use]
    pub fn with_retry_wait(self, retry_wait: Duration) -> Self {
        Self { retry_wait, ..self }
    }

    /// The folder of a model: the one at `path`, the one in the cache, or the one downloaded now.
    ///
    /// # Errors
    /// When it is in neither place and cannot be downloaded, with what was looked for where and what to do.
    pub fn folder(&self, path: &ModelPath) -> anyhow::Result<PathBuf> {
        if path.resolved.exists() {
            return Ok(path.resolved.clone());
        }
        let Some(name) = Name::parse(&path.written) else { bail!(path.missing()) };
        let place = cache::Place::new(&self.cache, &name);
        if let Some(folder) = place.complete() {
            tracing::info!(model = name.0, folder = %folder.display(), "found in the cache of the hub");
            return Ok(folder);
        }
        let looked = format!(
            "the model `{name}` is neither at {} nor, as a whole, in {}",
            path.resolved.display(),
            place.folder().display(),
            name = name.0
        );
        if self.offline {
            bail!(
                "{looked}, and HF_HUB_OFFLINE forbids downloads: unset it, set MODELS_DIR to the folder that has the \
                 model or HF_HOME to that of a cache that has it, or fetch it with `hf download {}`",
                name.0
            );
        }
        let download = download::Download { hub: self, name: &name, place: &place };
        download.run().with_context(|| format!("{looked}, and it could not be downloaded from {}", self.endpoint))
    }
}

/// A model's name on the hub: `org/name`, or `name` for the oldest ones.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name(String);

impl Name {
    /// The name that a path in the model configuration may be.
    fn parse(written: &Path) -> Option<Self> {
        let name = written.to_str()?;
        let part = |part: &str| {
            let usual = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
            !part.is_empty() && part.chars().all(usual) && !part.starts_with(['.', '-']) && !part.contains("..")
        };
        let parts: Vec<&str> = name.split('/').collect();
        (parts.len() <= 2 && name.len() <= 96 && parts.into_iter().all(part)).then(|| Self(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_hub_are_looked_for_there() {
        for name in ["gpt2", "openai-community/gpt2", "Qwen/Qwen2.5-0.5B"] {
            assert_eq!(Name::parse(Path::new(name)), Some(Name(name.to_owned())));
        }
        for path in ["/models/x", "a/b/c", "../x", "a/..", "a//b", "./x", "", "a b", "a/.git"] {
            assert_eq!(Name::parse(Path::new(path)), None, "{path}");
        }
    }
}
