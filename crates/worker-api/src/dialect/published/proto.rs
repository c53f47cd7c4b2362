//! Schemas in protobuf, of which a body is the JSON form, and what is wrong with a value by them.

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde_json::Value;
use std::path::Path;

/// The method whose request is the body.
const METHOD: &str = "GenerateContent";

/// A message.
pub(super) struct Message(MessageDescriptor);

impl Message {
    /// What the method takes, where `file` has it. What the file imports is looked for where its own path begins, as in
    /// `google/ai/…`, and in `folder`.
    pub(super) fn find(folder: &Path, file: &Path) -> Option<Self> {
        if !std::fs::read_to_string(file).unwrap().contains(&format!("rpc {METHOD}(")) {
            return None;
        }
        let root = file.ancestors().find(|place| place.ends_with("google")).and_then(Path::parent).unwrap_or(folder);
        let compiled = protox::compile([file], [root, folder]).unwrap();
        let pool = DescriptorPool::from_file_descriptor_set(compiled).unwrap();
        let method = pool.services().flat_map(|service| service.methods().collect::<Vec<_>>());
        method.into_iter().find(|method| method.name() == METHOD).map(|method| Self(method.input()))
    }

    /// What is wrong with a body; only the first thing is told.
    pub(super) fn problems(&self, body: &Value) -> Vec<String> {
        let read = DynamicMessage::deserialize(self.0.clone(), body);
        read.err().into_iter().map(|error| error.to_string()).collect()
    }
}

#[test]
fn a_body_is_the_json_form_of_what_the_method_takes() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("googleapis/google/ai");
    std::fs::create_dir_all(&place).unwrap();
    let write =
        |name: &str, text: &str| std::fs::write(place.join(name), format!("syntax = \"proto3\";\n{text}")).unwrap();
    write("level.proto", "package a; enum Level { UNSPECIFIED = 0; LOW = 1; }");
    let request = "message GenerateContentRequest { string the_model = 1; Level level = 2; }";
    let service = "service S { rpc GenerateContent(GenerateContentRequest) returns (GenerateContentRequest) {} }";
    write("s.proto", &format!("package a; import \"google/ai/level.proto\"; {request} {service}"));
    assert!(Message::find(folder.path(), &place.join("level.proto")).is_none());
    let message = Message::find(folder.path(), &place.join("s.proto")).unwrap();
    let check = |body: Value, problems: usize| assert_eq!(message.problems(&body).len(), problems, "{body}");
    check(serde_json::json!({"theModel": "x", "level": "LOW"}), 0);
    check(serde_json::json!({"theModel": "x", "level": "low"}), 1);
    check(serde_json::json!({"theModels": "x"}), 1);
}
