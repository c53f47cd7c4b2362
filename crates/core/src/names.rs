//! Short names that users give: tenants and experiments. Never here: model names (see `model`).

use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is not a name: use 1 to 64 characters of [A-Za-z0-9._-]")]
pub struct BadName {
    /// The refused name, shortened.
    pub name: String,
}

fn check_name(name: &str) -> Result<(), BadName> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
        return Err(BadName { name: name.chars().take(80).collect() });
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Parses a name of 1 to 64 characters of `[A-Za-z0-9._-]`.
            ///
            /// # Errors
            /// [`BadName`] for anything else.
            pub fn parse(name: &str) -> Result<Self, BadName> {
                check_name(name)?;
                Ok(Self(name.to_owned()))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = BadName;
            fn try_from(name: String) -> Result<Self, BadName> {
                Self::parse(&name)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// Who a job belongs to: the unit of fairness and of idempotency.
    Tenant
}

name_type! {
    /// A set of jobs that belong together.
    Experiment
}

impl Default for Tenant {
    /// The tenant of requests that name none.
    fn default() -> Self {
        Self("default".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, accepted: bool) {
        assert_eq!(Tenant::parse(name).is_ok(), accepted, "{name:?}");
    }

    #[test]
    fn a_name_is_1_to_64_plain_characters() {
        check("default", true);
        check("a.b-C_9", true);
        check(&"x".repeat(64), true);
        check(&"x".repeat(65), false);
        check("", false);
        check("a b", false);
        check("{x}", false);
        check("ü", false);
    }
}
