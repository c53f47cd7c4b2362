//! Google's accounts, as their files have them, and what they are exchanged with for a token. Pure but for the signature.

use super::tokens::{TokenRequest, With};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use genmill_core::time::UnixMs;
use genmill_daemon::secret::Secret;
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject as _;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use url::Url;

/// What tokens are for.
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";

/// How long a token is asked for, in seconds: the longest that is given.
const LIFETIME_S: u64 = 3_600;

/// Where users' tokens come from.
const USER_TOKEN_URI: &str = "https://oauth2.googleapis.com/token";

/// Where a machine of Google's is given tokens for its own account, at the host for that.
const MACHINE_PATH: &str = "/computeMetadata/v1/instance/service-accounts/default/token";

/// The names of that host on all machines of Google's, and its address there. Names that lead to such an address are not
/// looked up, whoever asks (`guard`); this one nobody chooses.
const MACHINE_HOSTS: &[&str] = &["metadata", "metadata.google.internal"];
const MACHINE_ADDRESS: &str = "169.254.169.254";

/// An account.
#[derive(Clone, Debug)]
pub struct GoogleAccount {
    /// The project that it belongs to, when told.
    pub project: Option<String>,
    /// The project to whose quota calls count, where it is not that of the account.
    pub quota_project: Option<String>,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    /// A service's, which signs what it asks with.
    Service { email: String, key_id: String, key: Arc<RsaKeyPair>, token_uri: Url },
    /// A person's, as `gcloud auth application-default login` writes it.
    User { client_id: String, client_secret: Secret, refresh_token: Secret, token_uri: Url },
    /// That of the machine on which this runs.
    Machine { token_uri: Url },
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Service { .. } => "Service",
            Self::User { .. } => "User",
            Self::Machine { .. } => "Machine",
        })
    }
}

/// Why a file is none of an account that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAccount {
    /// It is not of the form.
    #[error("is not the JSON key file of a service account, nor that of `gcloud auth application-default login`")]
    Malformed,
    /// It is of another kind.
    #[error("is of the kind `{0}`, which is not known: use the JSON key file of a service account")]
    Unknown(String),
    /// Its private key cannot be read.
    #[error("has a private_key that is no RSA key in PKCS #8 (PEM)")]
    Key,
    /// The host for tokens of machines is none.
    #[error("is not of the form HOST or HOST:PORT")]
    Host,
    /// Its token_uri would get what is secret without TLS.
    #[error("has a token_uri that is not on https")]
    Insecure,
}

/// A file as it is written.
#[derive(Deserialize)]
struct Written {
    r#type: String,
    project_id: Option<String>,
    quota_project_id: Option<String>,
    client_email: Option<String>,
    private_key_id: Option<String>,
    private_key: Option<String>,
    token_uri: Option<String>,
    client_id: Option<String>,
    client_secret: Option<String>,
    refresh_token: Option<String>,
}

impl GoogleAccount {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// [`BadAccount`] when it is none that can be used.
    pub fn parse(text: &str) -> Result<Self, BadAccount> {
        let written: Written = serde_json::from_str(text).map_err(|_| BadAccount::Malformed)?;
        let uri = written.token_uri.as_deref().unwrap_or(USER_TOKEN_URI);
        let token_uri = Url::parse(uri).map_err(|_| BadAccount::Malformed)?;
        if token_uri.scheme() != "https" && !crate::http::is_loopback(&token_uri) {
            return Err(BadAccount::Insecure);
        }
        let kind = match written.r#type.as_str() {
            "service_account" => {
                let pem = written.private_key.ok_or(BadAccount::Malformed)?;
                let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| BadAccount::Key)?;
                let key = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).map_err(|_| BadAccount::Key)?;
                let email = written.client_email.ok_or(BadAccount::Malformed)?;
                let key_id = written.private_key_id.unwrap_or_default();
                Kind::Service { email, key_id, key: Arc::new(key), token_uri }
            }
            "authorized_user" => Kind::User {
                client_id: written.client_id.ok_or(BadAccount::Malformed)?,
                client_secret: Secret::new(written.client_secret.ok_or(BadAccount::Malformed)?),
                refresh_token: Secret::new(written.refresh_token.ok_or(BadAccount::Malformed)?),
                token_uri,
            },
            other => return Err(BadAccount::Unknown(other.to_owned())),
        };
        let quota_project = written.quota_project_id;
        Ok(Self { project: written.project_id.or_else(|| quota_project.clone()), quota_project, kind })
    }

    /// The account of the machine on which this runs, for which `host` gives tokens, as `GCE_METADATA_HOST` has it.
    ///
    /// # Errors
    /// [`BadAccount::Host`] when that is more than a host and its port.
    pub fn of_machine(host: &str) -> Result<Self, BadAccount> {
        let host = if MACHINE_HOSTS.contains(&host) { MACHINE_ADDRESS } else { host };
        let url = Url::parse(&format!("http://{host}{MACHINE_PATH}")).map_err(|_| BadAccount::Host)?;
        let token_uri =
            (url.path() == MACHINE_PATH && url.username().is_empty()).then_some(url).ok_or(BadAccount::Host)?;
        Ok(Self { project: None, quota_project: None, kind: Kind::Machine { token_uri } })
    }

    /// What tells it from other accounts.
    pub(crate) fn name(&self) -> &str {
        match &self.kind {
            Kind::Service { email, .. } => email,
            Kind::User { client_id, .. } => client_id,
            Kind::Machine { .. } => "machine",
        }
    }

    /// What a token is asked for with.
    #[must_use]
    pub fn token_request(&self, now: UnixMs) -> Option<TokenRequest> {
        let owned = |pairs: &[(&'static str, &str)]| pairs.iter().map(|(n, v)| (*n, (*v).to_owned())).collect();
        let (url, with) = match &self.kind {
            Kind::Service { email, key_id, key, token_uri } => {
                let assertion = assertion(email, key_id, key, token_uri, now)?;
                let grant = "urn:ietf:params:oauth:grant-type:jwt-bearer";
                (token_uri, With::Form(owned(&[("grant_type", grant), ("assertion", &assertion)])))
            }
            Kind::User { client_id, client_secret, refresh_token, token_uri } => {
                let form = [
                    ("grant_type", "refresh_token"),
                    ("client_id", client_id),
                    ("client_secret", client_secret.reveal()),
                    ("refresh_token", refresh_token.reveal()),
                ];
                (token_uri, With::Form(owned(&form)))
            }
            Kind::Machine { token_uri } => (token_uri, With::Place("metadata-flavor", "Google")),
        };
        Some(TokenRequest { url: url.clone(), with })
    }
}

/// What a service account says of itself, signed (a JSON web token, RS256).
fn assertion(email: &str, key_id: &str, key: &RsaKeyPair, token_uri: &Url, now: UnixMs) -> Option<String> {
    let issued_s = now.0 / 1_000;
    let head = json!({"alg": "RS256", "typ": "JWT", "kid": key_id});
    let claims = json!({
        "iss": email, "scope": SCOPE, "aud": token_uri.as_str(), "iat": issued_s, "exp": issued_s + LIFETIME_S
    });
    let encoded = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encoded(&head), encoded(&claims));
    let mut signature = vec![0; key.public().modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), text.as_bytes(), &mut signature).ok()?;
    Some(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use ring::signature::{KeyPair as _, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
    use serde_json::Value;

    /// A key that was made for tests and opens nothing.
    const KEY: &str = include_str!("test_key.pem");

    /// The file of a service account whose tokens come from `token_uri`.
    pub(crate) fn account(token_uri: &str) -> String {
        json!({
            "type": "service_account", "project_id": "the-project", "private_key_id": "k1", "private_key": KEY,
            "client_email": "mill@the-project.iam.gserviceaccount.com", "token_uri": token_uri,
        })
        .to_string()
    }

    #[test]
    fn a_service_account_signs_what_it_asks_with() {
        let account = GoogleAccount::parse(&account("https://oauth2.googleapis.com/token")).unwrap();
        assert_eq!(account.project.as_deref(), Some("the-project"));
        let request = account.token_request(UnixMs(1_700_000_000_500)).unwrap();
        assert_eq!(request.url.as_str(), "https://oauth2.googleapis.com/token");
        let With::Form(form) = &request.with else { panic!() };
        let (_, assertion) = &form[1];
        let parts: Vec<&str> = assertion.split('.').collect();
        let decoded = |part: &str| URL_SAFE_NO_PAD.decode(part).unwrap();
        let claims: Value = serde_json::from_slice(&decoded(parts[1])).unwrap();
        assert_eq!(
            claims,
            json!({
                "iss": "mill@the-project.iam.gserviceaccount.com", "scope": SCOPE, "iat": 1_700_000_000,
                "exp": 1_700_003_600, "aud": "https://oauth2.googleapis.com/token",
            })
        );
        let Kind::Service { key, .. } = &account.kind else { panic!() };
        let public = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.public_key());
        let signed = format!("{}.{}", parts[0], parts[1]);
        assert!(public.verify(signed.as_bytes(), &decoded(parts[2])).is_ok());
    }

    #[test]
    fn a_person_is_asked_for_with_a_refresh_token() {
        let file = r#"{"type":"authorized_user","client_id":"c","client_secret":"s","refresh_token":"r","quota_project_id":"p"}"#;
        let account = GoogleAccount::parse(file).unwrap();
        assert_eq!(account.project.as_deref(), Some("p"));
        let With::Form(form) = account.token_request(UnixMs(0)).unwrap().with else { panic!() };
        assert_eq!(form[0], ("grant_type", "refresh_token".to_owned()));
        let shown = format!("{account:?}");
        assert_eq!(shown, "GoogleAccount { project: Some(\"p\"), quota_project: Some(\"p\"), kind: User }");
    }

    #[test]
    fn a_machine_is_asked_for_by_being_there() {
        let url = |host| GoogleAccount::of_machine(host).map(|account| account.token_request(UnixMs(0)).unwrap().url);
        let at = |host: &str| Ok(Url::parse(&format!("http://{host}{MACHINE_PATH}")).unwrap());
        assert_eq!(url("metadata.google.internal"), at("169.254.169.254"));
        assert_eq!(url("127.0.0.1:8080"), at("127.0.0.1:8080"));
        for host in ["", "a b", "x/y?", "a@b", "h#"] {
            assert_eq!(url(host), Err(BadAccount::Host), "{host}");
        }
    }

    #[test]
    fn what_is_no_account_is_told() {
        let check = |text: &str, expect| assert_eq!(GoogleAccount::parse(text).unwrap_err(), expect);
        check("/path", BadAccount::Malformed);
        check(r#"{"type":"external_account"}"#, BadAccount::Unknown("external_account".to_owned()));
        check(&account("http://evil.example/token"), BadAccount::Insecure);
        check(&account("https://a.example").replace("BEGIN", "BEGUN"), BadAccount::Key);
        check(r#"{"type":"service_account"}"#, BadAccount::Malformed);
    }
}
