//! What proves to a provider who calls: a key in a header, a signature, or a token that is exchanged for something else.
//!
//! Never here: where credentials come from (`catalog`), and where a key goes (`dialect`).

pub mod aws;
pub mod google;
pub mod tokens;

use crate::failure::{Fault, Kind};
use crate::http::{Http, Request};
use aws::AwsCredentials;
use genmill_core::time::UnixMs;
use genmill_daemon::clock::now_unix_ms;
use genmill_daemon::secret::Secret;
use google::GoogleAccount;
use http::{HeaderName, HeaderValue};
use serde::Deserialize;
use tokens::{TokenRequest, With};
use url::Url;

/// How calls are proven, as `providers.toml` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthKind {
    /// By a key in a header.
    #[default]
    Key,
    /// By a key in a header, or by Amazon's signatures where there is none.
    Aws,
    /// By a token of Google's, for the account whose file the key names, or that its own tools would find.
    Google,
    /// By a token of IBM's, for the key.
    Ibm,
}

/// What calls of a provider are proven with.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// Nothing: it serves without.
    None,
    /// A key in a header.
    Key(Secret),
    /// Signatures.
    Aws(AwsCredentials),
    /// Tokens of an account.
    Google(Box<GoogleAccount>),
    /// Tokens for a key.
    Ibm {
        /// The key.
        key: Secret,
        /// Where tokens come from.
        token_uri: Url,
    },
}

impl Credentials {
    /// What must not be told of them.
    #[must_use]
    pub fn secret(&self) -> Option<&str> {
        match self {
            Self::Key(key) | Self::Ibm { key, .. } => Some(key.reveal()),
            Self::Aws(credentials) => Some(credentials.secret_key.reveal()),
            Self::None | Self::Google(_) => None,
        }
    }

    /// What tells one account of a provider from another.
    pub(crate) fn account(&self) -> &str {
        match self {
            Self::None => "",
            Self::Key(key) | Self::Ibm { key, .. } => key.reveal(),
            Self::Aws(credentials) => &credentials.access_key,
            Self::Google(account) => account.name(),
        }
    }

    /// The same with another key, where calls are proven by keys.
    pub(crate) fn with_key(&self, key: &Secret) -> Self {
        match self {
            Self::Ibm { token_uri, .. } => Self::Ibm { key: key.clone(), token_uri: token_uri.clone() },
            Self::None | Self::Key(_) | Self::Aws(_) | Self::Google(_) => Self::Key(key.clone()),
        }
    }

    /// Whether they are exchanged for tokens.
    #[must_use]
    pub fn are_exchanged(&self) -> bool {
        matches!(self, Self::Google(_) | Self::Ibm { .. })
    }

    /// The project of Google's to whose quota calls count, where that must be told.
    fn quota_project(&self) -> Option<&str> {
        if let Self::Google(account) = self { account.quota_project.as_deref() } else { None }
    }

    /// The request for a token, where one is needed.
    fn token_request(&self, now: UnixMs) -> Option<TokenRequest> {
        match self {
            Self::Google(account) => account.token_request(now),
            Self::Ibm { key, token_uri } => {
                let grant = "urn:ibm:params:oauth:grant-type:apikey".to_owned();
                let form = vec![("grant_type", grant), ("apikey", key.reveal().to_owned())];
                Some(TokenRequest { url: token_uri.clone(), with: With::Form(form) })
            }
            Self::None | Self::Key(_) | Self::Aws(_) => None,
        }
    }

    /// Proves a request of `provider`; a key goes into the header `key_header`, behind `scheme`.
    ///
    /// # Errors
    /// When there is no token to be had, or a key is none that a header can have.
    pub(crate) async fn prove(
        &self,
        provider: &str,
        (key_header, scheme): (&str, &str),
        request: &mut Request,
        http: &Http,
    ) -> Result<(), Fault> {
        let headers = match self {
            Self::None => Vec::new(),
            Self::Key(key) => vec![(key_header, format!("{scheme}{}", key.reveal()))],
            Self::Aws(credentials) => {
                let now = UnixMs(now_unix_ms());
                aws::sign(credentials, request.method.as_str(), &request.url, &request.body, now)
            }
            Self::Google(_) | Self::Ibm { .. } => {
                // In a box: it is rare, and every call that waits for its answer would keep room for it.
                let token =
                    Box::pin(http.tokens().get(provider, self.account(), http, |now| self.token_request(now))).await?;
                let quota = self.quota_project().map(|project| ("x-goog-user-project", project.to_owned()));
                std::iter::once(("authorization", format!("Bearer {}", token.reveal()))).chain(quota).collect()
            }
        };
        for (name, value) in headers {
            let header = HeaderName::from_bytes(name.as_bytes()).ok().zip(HeaderValue::from_str(&value).ok());
            let Some((name, mut value)) = header else {
                return Err(Fault::new(Kind::Auth, provider, "has a key with characters that no header can have"));
            };
            value.set_sensitive(true);
            request.headers.insert(name, value);
        }
        Ok(())
    }
}
