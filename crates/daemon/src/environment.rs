//! The environment: the process's variables, and below them those of `.env`. Nothing else reads either.

use std::collections::BTreeMap;
use std::path::Path;

/// Variables by name. Values are never printed: they may be keys.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

/// Why `.env` could not be read. Never tells what stands in it: that may be a key.
#[derive(Debug, thiserror::Error)]
pub enum BadDotEnv {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A line is malformed.
    #[error("{path}, line {line}: is not of the form NAME=value, or a quote is not closed")]
    Malformed {
        /// The file.
        path: String,
        /// The first line that cannot be read, from 1.
        line: usize,
    },
}

impl BadDotEnv {
    fn new(path: &Path, text: &str, error: dotenvy::Error) -> Self {
        let path = path.display().to_string();
        match error {
            dotenvy::Error::Io(source) => Self::Unreadable { path, source },
            // The library tells the line's text; its number is found by looking for it.
            dotenvy::Error::LineParse(content, _) => {
                let first = content.lines().next().unwrap_or_default();
                let line = text.lines().position(|line| line.contains(first)).map_or(1, |index| index + 1);
                Self::Malformed { path, line }
            }
            _ => Self::Malformed { path, line: 1 },
        }
    }
}

impl Environment {
    /// What `.env` in `folder` adds to these variables, which win.
    ///
    /// # Errors
    /// [`BadDotEnv`] when there is a `.env` that is not of the form `NAME=value`.
    pub fn below(self, folder: &Path) -> Result<Self, BadDotEnv> {
        let mut variables = dot_env(folder)?;
        variables.extend(self.variables);
        Ok(Self { variables })
    }

    /// Reads the process's variables, and what `.env` in `folder` adds to them.
    ///
    /// # Errors
    /// [`BadDotEnv`] when there is a `.env` that is not of the form `NAME=value`.
    pub fn read(folder: &Path) -> Result<Self, BadDotEnv> {
        let mut variables = dot_env(folder)?;
        // Variables that are not UTF-8 cannot be meant for us.
        let utf8 = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        variables.extend(std::env::vars_os().filter_map(utf8));
        Ok(Self { variables })
    }

    /// The value of `name`; `None` when it is unset or empty.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// All variables.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

fn dot_env(folder: &Path) -> Result<BTreeMap<String, String>, BadDotEnv> {
    let path = folder.join(".env");
    if !path.is_file() {
        return Ok(BTreeMap::new());
    }
    let text = std::fs::read_to_string(&path)
        .map_err(|source| BadDotEnv::Unreadable { path: path.display().to_string(), source })?;
    let variables = dotenvy::from_read_iter(text.as_bytes());
    variables.map(|variable| variable.map_err(|error| BadDotEnv::new(&path, &text, error))).collect()
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(variables: T) -> Self {
        Self { variables: variables.into_iter().collect() }
    }
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.variables.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_line_is_named_but_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".env"), "A=1\nOPENAI_API_KEY=\"sk-secret\nB=2\n").unwrap();
        let error = Environment::read(folder.path()).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(".env, line 2"), "{shown}");
        assert!(!shown.contains("sk-secret"), "{shown}");
    }

    #[test]
    fn a_file_further_away_only_adds() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".env"), "A=far\nB=far\n").unwrap();
        let near: Environment = [("A".to_owned(), "near".to_owned())].into_iter().collect();
        let both = near.below(folder.path()).unwrap();
        assert_eq!((both.get("A"), both.get("B")), (Some("near"), Some("far")));
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let environment: Environment = [("A".to_owned(), String::new())].into_iter().collect();
        assert_eq!(environment.get("A"), None);
    }
}
