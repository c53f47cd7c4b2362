//! Where tokens come from: for a signed statement of a Google account, a person's refresh token, a key of IBM's, or for being on
//! a machine of Google's.

use crate::BAD_KEY;
use axum::Json;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use serde_json::{Value, json};

/// What stands before the name of whoever asked, in the tokens.
pub(crate) const TOKEN: &str = "token-of-";

/// `POST /token` and `POST /identity/token`: a form. The token names who asked.
pub(crate) async fn give(body: Bytes) -> Response {
    let form = String::from_utf8_lossy(&body).into_owned();
    let field = |name: &str| form.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let who = field("apikey").map(str::to_owned).or_else(|| field("refresh_token").map(str::to_owned));
    let who = who.or_else(|| field("assertion").and_then(issuer));
    match who {
        Some(who) if who != BAD_KEY => token(&who),
        _ => (StatusCode::BAD_REQUEST, Json(json!({"error": "invalid_grant"}))).into_response(),
    }
}

/// `GET /computeMetadata/v1/instance/service-accounts/default/token`: asked by mistake nothing is told.
pub(crate) async fn of_machine(headers: HeaderMap) -> Response {
    match headers.get("metadata-flavor") {
        Some(flavor) if flavor == "Google" => token("machine"),
        _ => StatusCode::FORBIDDEN.into_response(),
    }
}

fn token(who: &str) -> Response {
    Json(json!({"access_token": format!("{TOKEN}{who}"), "expires_in": 3_600, "token_type": "Bearer"})).into_response()
}

/// Who signed a JSON web token.
fn issuer(token: &str) -> Option<String> {
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?).ok()?;
    claims["iss"].as_str().map(str::to_owned)
}
