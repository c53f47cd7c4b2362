//! Where the account is found for which Google is called, in the places and the order that Google's own tools look in
//! (application default credentials). Never here: what is done with it (`auth::google`).

use crate::auth::google::GoogleAccount;
use genmill_daemon::environment::Environment;
use genmill_daemon::secret::Secret;
use std::path::{Path, PathBuf};

/// The variable that names the host at which machines of Google's are given tokens. Only when it is set is that asked:
/// elsewhere nobody answers there, or somebody else does.
pub(super) const MACHINE_HOST: &str = "GCE_METADATA_HOST";

/// The account: what the key is or names, else the file that `gcloud auth application-default login` leaves, else that
/// of the machine. `None` when there is none.
pub(super) fn account(key: Option<&Secret>, environment: &Environment) -> Option<Result<GoogleAccount, String>> {
    let named = "which GOOGLE_APPLICATION_CREDENTIALS names";
    if let Some(key) = key.map(Secret::reveal) {
        let is_file = !key.trim_start().starts_with('{');
        let whole =
            || GoogleAccount::parse(key).map_err(|bad| format!("what GOOGLE_APPLICATION_CREDENTIALS has {bad}"));
        return Some(if is_file { of_file(Path::new(key), named) } else { whole() });
    }
    if let Some(file) = left_by_gcloud(environment).filter(|file| file.is_file()) {
        return Some(of_file(&file, "which `gcloud auth application-default login` wrote"));
    }
    let host = environment.get(MACHINE_HOST)?;
    Some(GoogleAccount::of_machine(host).map_err(|bad| format!("{MACHINE_HOST} {bad}")))
}

fn of_file(file: &Path, whence: &str) -> Result<GoogleAccount, String> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {shown}, {whence}: {error}"))?;
    GoogleAccount::parse(&text).map_err(|bad| format!("{shown}, {whence}, {bad}"))
}

fn left_by_gcloud(environment: &Environment) -> Option<PathBuf> {
    let configured = environment.get("CLOUDSDK_CONFIG").map(PathBuf::from);
    let folder = configured.or_else(|| Some(Path::new(environment.get("HOME")?).join(".config/gcloud")))?;
    Some(folder.join("application_default_credentials.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERSON: &str =
        r#"{"type":"authorized_user","client_id":"c","client_secret":"s","refresh_token":"r","quota_project_id":"p"}"#;

    fn found(key: Option<&str>, variables: &[(&str, &str)]) -> Option<Result<String, String>> {
        let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let account = account(key.map(Secret::new).as_ref(), &environment)?;
        Some(account.map(|account| format!("{account:?}").split("kind: ").last().unwrap_or_default().to_owned()))
    }

    #[test]
    fn an_account_is_looked_for_where_googles_tools_do() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(".config/gcloud");
        let (home, gcloud) = (home.path().to_str().unwrap(), folder.to_str().unwrap());
        let machine = ("GCE_METADATA_HOST", "metadata.google.internal");
        let (user, of_machine) = (Some(Ok("User }".to_owned())), Some(Ok("Machine }".to_owned())));
        assert_eq!((found(None, &[]), found(None, &[("HOME", home)])), (None, None));
        assert_eq!(found(None, &[("HOME", home), machine]), of_machine);
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("application_default_credentials.json");
        std::fs::write(&file, PERSON).unwrap();
        assert_eq!(found(None, &[("HOME", home), machine]), user);
        assert_eq!(found(None, &[("HOME", "/nowhere"), ("CLOUDSDK_CONFIG", gcloud)]), user);
        let other = found(Some(r#"{"type":"external_account"}"#), &[("HOME", home)]).unwrap().unwrap_err();
        assert!(other.starts_with("what GOOGLE_APPLICATION_CREDENTIALS has is of the kind"), "{other}");
        std::fs::write(&file, "{}").unwrap();
        let bad = found(None, &[("HOME", home)]).unwrap().unwrap_err();
        assert!(bad.starts_with(file.to_str().unwrap()) && bad.contains("`gcloud auth"), "{bad}");
        let bad = found(None, &[("GCE_METADATA_HOST", "http://x")]).unwrap().unwrap_err();
        assert_eq!(bad, "GCE_METADATA_HOST is not of the form HOST or HOST:PORT");
    }
}
