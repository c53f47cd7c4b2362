//! The environment: the process's variables, and below them those of `.env`. Nothing else reads either.

use std::collections::BTreeMap;
use std::path::Path;

/// Variables by name. Values are never printed: they may be keys.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

/// Why `.env` could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}")]
pub struct BadDotEnv {
    path: String,
    #[source]
    source: dotenvy::Error,
}

impl Environment {
    /// Reads the process's variables, and what `.env` in `folder` adds to them.
    ///
    /// # Errors
    /// [`BadDotEnv`] when there is a `.env` that is not of the form `NAME=value`.
    pub fn read(folder: &Path) -> Result<Self, BadDotEnv> {
        let mut variables = BTreeMap::new();
        let path = folder.join(".env");
        if path.is_file() {
            let fail = |source| BadDotEnv { path: path.display().to_string(), source };
            for variable in dotenvy::from_path_iter(&path).map_err(fail)? {
                let (name, value) = variable.map_err(fail)?;
                variables.insert(name, value);
            }
        }
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
