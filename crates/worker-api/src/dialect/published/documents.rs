//! The documents of a folder: which of them tell of an operation that a dialect calls, and what they say of its body.
//!
//! Read are OpenAPI 3 (YAML or JSON), Google's discovery documents, and protobuf files. Which dialect an operation is of is
//! told by its path, and whose it is by the name of its file or folder: `openai/openapi.yaml`, `mistral.json`.

use super::requests::table;
use crate::dialect::published::json::JsonSchema;
use crate::dialect::published::proto;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// An operation that a dialect calls.
pub(super) struct Operation {
    /// File and path.
    pub(super) place: String,
    /// Who calls it.
    pub(super) dialect: &'static str,
    /// Whose it is, where that is told.
    pub(super) provider: Option<String>,
    pub(super) schema: Schema,
}

/// What bodies must be.
pub(super) enum Schema {
    Json(Box<JsonSchema>),
    Proto(proto::Message),
}

impl Schema {
    /// What is wrong with a body.
    pub(super) fn problems(&self, body: &Value) -> Vec<String> {
        match self {
            Self::Json(schema) => schema.problems(body),
            Self::Proto(message) => message.problems(body),
        }
    }
}

/// What may stand before an operation's path.
#[derive(PartialEq)]
enum Before {
    /// A version, or what is named by a parameter.
    Usual,
    Anything,
    Nothing,
}

/// The paths of operations, and the dialects that call them; the first that fits counts.
const PATHS: &[(&str, Before, &str)] = &[
    ("/chat/completions", Before::Usual, "openai"),
    ("/responses", Before::Usual, "openai-responses"),
    ("/messages", Before::Usual, "anthropic"),
    ("/publishers/{publishersId}/models/{modelsId}:generateContent", Before::Anything, "vertex"),
    (":generateContent", Before::Anything, "gemini"),
    ("/v2/chat", Before::Nothing, "cohere-v2"),
    ("/api/chat", Before::Nothing, "ollama"),
    ("/converse", Before::Anything, "bedrock-converse"),
    ("/ml/v1/text/chat", Before::Nothing, "watsonx"),
    ("/generate", Before::Nothing, "tgi"),
    ("/predictions", Before::Usual, "replicate"),
];

fn dialect(path: &str) -> Option<&'static str> {
    let usual = |segment: &str| {
        let version = segment.strip_prefix('v').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        version
            || segment.starts_with('{')
            || ["", "api", "openai", "inference", "deployments", "models"].contains(&segment)
    };
    let fits = |(end, before, _): &&(&str, Before, &str)| {
        path.strip_suffix(end).is_some_and(|start| match before {
            Before::Usual => start.split('/').all(usual),
            Before::Anything => true,
            Before::Nothing => start.is_empty(),
        })
    };
    PATHS.iter().find(fits).map(|(.., dialect)| *dialect)
}

/// All operations that are known, of all documents below `folder`.
pub(super) fn operations(folder: &Path) -> Vec<Operation> {
    let mut files = Vec::new();
    collect(folder, &mut files);
    files.sort();
    files.iter().flat_map(|file| read(folder, file)).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}

fn read(folder: &Path, file: &Path) -> Vec<Operation> {
    let name = file.strip_prefix(folder).unwrap().display().to_string();
    let provider = provider(&name);
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("proto") => {
            let message = proto::Message::find(folder, file);
            let operation =
                |message| Operation { place: name, dialect: "gemini", provider, schema: Schema::Proto(message) };
            message.map(operation).into_iter().collect()
        }
        Some("json" | "yaml" | "yml") => {
            let text = std::fs::read_to_string(file).unwrap();
            let document = match genmill_daemon::documents::parse::<Value>(&text) {
                Ok(document) => document,
                Err(error) => {
                    eprintln!("{name} is passed over: {error}");
                    return Vec::new();
                }
            };
            let operation = |(path, dialect, schema)| Operation {
                place: format!("{name}, {path}"),
                dialect,
                provider: provider.clone(),
                schema: Schema::Json(Box::new(schema)),
            };
            bodies(&document).into_iter().map(operation).collect()
        }
        _ => Vec::new(),
    }
}

/// The provider with the longest name of those that a file's name has in it.
fn provider(file: &str) -> Option<String> {
    let letters = |text: &str| text.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "");
    let file = letters(file);
    let table = table();
    let named = table.names().filter(|name| name.len() > 2 && file.contains(&letters(name)));
    named.max_by_key(|name| name.len()).map(str::to_owned)
}

/// The known operations of a document, with what their bodies must be.
fn bodies(document: &Value) -> Vec<(String, &'static str, JsonSchema)> {
    if document["discoveryVersion"].is_string() {
        return methods(&document["resources"]).iter().filter_map(|method| discovered(document, method)).collect();
    }
    let posted = document["paths"].as_object().into_iter().flatten();
    let posted = posted.filter_map(|(path, item)| Some((path, dialect(path)?, item.get("post")?)));
    let body = |(path, dialect, operation): (&String, _, &Value)| {
        let body = resolved(document, &operation["requestBody"]);
        let schema = body["content"].as_object()?.iter().find(|(kind, _)| kind.starts_with("application/json"))?.1;
        Some((path.clone(), dialect, JsonSchema::new(&schema["schema"], document)))
    };
    posted.filter_map(body).collect()
}

fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let target = value["$ref"].as_str().and_then(|place| document.pointer(place.strip_prefix('#')?));
    target.unwrap_or(value)
}

/// All methods of a discovery document.
fn methods(resources: &Value) -> Vec<Value> {
    let each = |resource: &Value| {
        let own = resource["methods"].as_object().into_iter().flatten().map(|(_, method)| method.clone());
        own.chain(methods(&resource["resources"])).collect::<Vec<_>>()
    };
    resources.as_object().into_iter().flatten().flat_map(|(_, resource)| each(resource)).collect()
}

fn discovered(document: &Value, method: &Value) -> Option<(String, &'static str, JsonSchema)> {
    let path = method["flatPath"].as_str().or(method["path"].as_str())?;
    Some((path.to_owned(), dialect(&format!("/{path}"))?, JsonSchema::new(&method["request"], document)))
}

#[test]
fn an_operation_is_known_by_its_path() {
    for (path, expect) in [
        ("/v1/chat/completions", Some("openai")),
        ("/deployments/{deployment-id}/chat/completions", Some("openai")),
        ("/threads/{thread_id}/messages", None),
        ("/v1/messages", Some("anthropic")),
        ("/v1beta/models/{modelsId}:generateContent", Some("gemini")),
        ("/model/{modelId}/converse", Some("bedrock-converse")),
        ("/api/generate", None),
        ("/models/{model_owner}/{model_name}/predictions", Some("replicate")),
    ] {
        assert_eq!(dialect(path), expect, "{path}");
    }
    assert_eq!(provider("specs/openai-openapi.yaml").as_deref(), Some("openai"));
    assert_eq!(provider("openrouter/openapi.json").as_deref(), Some("openrouter"));
}

#[test]
fn a_document_is_read_with_all_that_vendors_write() {
    let folder = tempfile::tempdir().unwrap();
    let text = r##"
openapi: 3.0.0
paths:
  /chat/completions:
    post:
      requestBody: {$ref: "#/components/requestBodies/Chat"}
  /threads/{thread_id}/messages: {post: {}}
components:
  requestBodies:
    Chat: {content: {"application/json": {schema: {$ref: "#/components/schemas/Request"}}}}
  schemas:
    Request:
      type: object
      properties:
        model: {anyOf: [{type: string, pattern: '^(?!no-)[\w.-]+$'}, {type: string, enum: [gpt-4o]}]}
        seed: {type: integer, minimum: -9223372036854776000, maximum: 9223372036854776000, nullable: true}
        filter: {$ref: "#/components/schemas/Filter"}
      required: [model]
    Filter: {$recursiveAnchor: true, type: object, properties: {of: {$ref: "#/components/schemas/Filter"}}}
"##;
    std::fs::create_dir(folder.path().join("openai")).unwrap();
    std::fs::write(folder.path().join("openai/openapi.yaml"), text).unwrap();
    std::fs::write(folder.path().join("notes.json"), "no document").unwrap();
    let [operation] = &operations(folder.path())[..] else { panic!("one operation is known") };
    let told = (operation.place.as_str(), operation.dialect, operation.provider.as_deref());
    assert_eq!(told, ("openai/openapi.yaml, /chat/completions", "openai", Some("openai")));
    let check = |body: Value, problems: usize| assert_eq!(operation.schema.problems(&body).len(), problems, "{body}");
    check(serde_json::json!({"model": "gpt-4o", "seed": 7, "filter": {"of": {"of": {}}}}), 0);
    check(serde_json::json!({"model": "gpt-4o", "seed": null}), 0);
    check(serde_json::json!({"model": "gpt-4o", "filter": {"of": {"off": {}}}}), 1);
}
