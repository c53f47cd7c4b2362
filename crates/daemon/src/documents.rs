//! Reading what people write in YAML or JSON: a wrong key is refused with its place and the nearest known one.

use crate::config::with_nearest;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What is wrong with a document, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadDocument(String);

/// Reads a document in YAML or JSON. An empty one is null.
///
/// # Errors
/// With the place in the text when it is neither, with the path of the value when it is not what was expected.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, BadDocument> {
    // JSON first: it is nearly YAML, but not quite (escapes of characters outside the basic plane).
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(error) if text.trim_start().starts_with(['{', '[']) && !error.is_syntax() => {
            return Err(BadDocument(error.to_string()));
        }
        Err(_) => serde_saphyr::from_str_with_options(text, serde_saphyr::options! { budget: None })
            .map_err(|error| BadDocument(error.to_string()))?,
    };
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let problem = with_nearest(&error.into_inner().to_string());
        let place = if path == "." { String::new() } else { format!("{path}: ") };
        BadDocument(format!("{place}{problem}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        name: String,
        #[serde(default)]
        parts: Vec<Self>,
    }

    fn refused(text: &str, says: &str) {
        let error = format!("{:#}", parse::<Sample>(text).unwrap_err());
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn yaml_and_json_read_the_same() {
        let yaml = parse::<Sample>("name: a\nparts:\n  - name: 😀\n").unwrap();
        let json = parse::<Sample>(r#"{"name": "a", "parts": [{"name": "\ud83d\ude00"}]}"#).unwrap();
        assert_eq!(yaml, json);
        assert_eq!(parse::<Sample>("{name: a}").unwrap().name, "a");
    }

    #[test]
    fn a_wrong_key_is_refused_with_its_place_and_the_nearest() {
        refused("name: a\npart: []", "unknown key `part`: did you mean `parts`?");
        refused("name: a\nparts:\n  - nmae: b", "parts[0]");
        refused("name: a\nparts:\n  - nmae: b", "did you mean `name`?");
        refused("zzz: 1", "known are name, parts");
        refused("name: [", "line");
        refused("name: [a]", "name: invalid type");
        refused("parts: []", "missing field `name`");
    }
}
