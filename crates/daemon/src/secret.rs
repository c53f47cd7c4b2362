//! Values that must not be shown.

use serde::{Deserialize, Serialize, Serializer};

/// What is shown in a secret's place.
pub const MASK: &str = "********";

/// A key or password: readable by code that asks for it, never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Keeps `value`.
    #[must_use]
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value, for the one place that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

/// A URL without its user name and password.
#[must_use]
pub fn mask_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let authority_end = rest.find('/').unwrap_or(rest.len());
    match rest[..authority_end].rfind('@') {
        Some(at) => format!("{scheme}://{MASK}{}", &rest[at..]),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_shown() {
        let secret = Secret::new("sk-123");
        assert_eq!(format!("{secret:?}"), MASK);
        assert_eq!(serde_json::to_string(&secret).unwrap(), format!("\"{MASK}\""));
    }

    #[test]
    fn a_url_is_shown_without_its_password() {
        assert_eq!(mask_url("redis://:pw@host:1/0"), format!("redis://{MASK}@host:1/0"));
        assert_eq!(mask_url("redis+cluster://u:pw@a:1,b:2"), format!("redis+cluster://{MASK}@a:1,b:2"));
        assert_eq!(mask_url("redis://host:1/a@b"), "redis://host:1/a@b");
        assert_eq!(mask_url("nonsense"), "nonsense");
    }
}
