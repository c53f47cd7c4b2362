//! Schemas in JSON, as OpenAPI and discovery documents have them, and what is wrong with a value by them.

use jsonschema::error::ValidationErrorKind;
use jsonschema::{ValidationError, Validator};
use serde_json::{Map, Value, json};

/// A schema of bodies.
pub(super) struct JsonSchema {
    root: Value,
    validator: Validator,
}

impl JsonSchema {
    /// The schema of a document, which may refer to others in it.
    pub(super) fn new(schema: &Value, document: &Value) -> Self {
        let mut root = json!({"$schema": "https://json-schema.org/draft/2020-12/schema", "allOf": [converted(schema)]});
        let mut wanted = references(&root);
        while let Some(place) = wanted.pop() {
            let path: Vec<&str> = place.trim_start_matches("#/").split('/').collect();
            let found = document.pointer(place.trim_start_matches('#'));
            let target = path.iter().fold(&mut root, |schemas, name| &mut schemas[*name]);
            if let (Value::Null, Some(found)) = (&*target, found) {
                *target = converted(found);
                wanted.extend(references(target));
            }
        }
        let validator = jsonschema::draft202012::new(&root).unwrap();
        Self { root, validator }
    }

    /// What is wrong with a body, and what it has that no schema knows.
    pub(super) fn problems(&self, body: &Value) -> Vec<String> {
        let mut problems: Vec<String> = self.validator.iter_errors(body).flat_map(|error| told(&error)).collect();
        self.unknown(&[&self.root], body, "", &mut problems);
        problems
    }

    /// Tells fields that none of the schemas of a value has. Schemas leave out that other fields are refused, but vendors
    /// refuse them.
    fn unknown(&self, schemas: &[&Value], value: &Value, place: &str, problems: &mut Vec<String>) {
        let mut schemas: Vec<&Value> = schemas.iter().flat_map(|schema| self.alternatives(schema)).collect();
        // Many refer to the same.
        schemas.sort_by_key(|schema| std::ptr::from_ref(*schema));
        schemas.dedup_by_key(|schema| std::ptr::from_ref(*schema));
        for item in value.as_array().into_iter().flatten() {
            let items: Vec<&Value> = schemas.iter().filter_map(|schema| schema.get("items")).collect();
            self.unknown(&items, item, &format!("{place}[]"), problems);
        }
        let free = |schema: &&Value| schema.get("additionalProperties").is_some_and(|more| *more != json!(false));
        let known: Vec<&Map<String, Value>> =
            schemas.iter().filter_map(|schema| schema["properties"].as_object()).collect();
        if known.is_empty() || schemas.iter().any(free) {
            return;
        }
        for (field, value) in value.as_object().into_iter().flatten() {
            let of_field: Vec<&Value> = known.iter().filter_map(|properties| properties.get(field)).collect();
            let place = format!("{place}.{field}");
            if of_field.is_empty() {
                problems.push(format!("{place} is not known"));
            }
            self.unknown(&of_field, value, &place, problems);
        }
    }

    /// A schema and all that it refers to or consists of.
    fn alternatives<'a>(&'a self, schema: &'a Value) -> Vec<&'a Value> {
        let target = schema["$ref"].as_str().and_then(|place| self.root.pointer(place.strip_prefix('#')?));
        let parts = ["allOf", "anyOf"].iter().filter_map(|field| schema[*field].as_array()).flatten();
        let within = target.into_iter().chain(parts).flat_map(|schema| self.alternatives(schema));
        std::iter::once(schema).chain(within).collect()
    }
}

/// An error, and where a value is none of several things, what keeps it from being each of them.
fn told(error: &ValidationError<'_>) -> Vec<String> {
    if let ValidationErrorKind::AnyOf { context } = error.kind() {
        let reasons = context.iter().filter_map(|errors| errors.first());
        return reasons.flat_map(told).map(|reason| format!("one of several: {reason}")).collect();
    }
    let mut message = error.to_string();
    message.truncate(message.floor_char_boundary(300));
    vec![format!("{}: {message}", error.instance_path())]
}

fn each((name, schema): (&String, &Value)) -> (String, Value) {
    (name.clone(), converted(schema))
}

/// A schema of OpenAPI 3.0 or of a discovery document as one of JSON Schema 2020-12.
fn converted(schema: &Value) -> Value {
    let Some(fields) = schema.as_object() else { return schema.clone() };
    let mut out = Map::new();
    for (field, value) in fields {
        match field.as_str() {
            "properties" => {
                drop(out.insert(field.clone(), value.as_object().into_iter().flatten().map(each).collect()));
            }
            "items" | "additionalProperties" | "not" => drop(out.insert(field.clone(), converted(value))),
            // Which of several it is, is told by a discriminator; more than one may fit.
            "oneOf" | "anyOf" | "allOf" => {
                let parts = value.as_array().into_iter().flatten().map(converted);
                out.insert(if field == "oneOf" { "anyOf" } else { field }.to_owned(), parts.collect());
            }
            "$ref" => drop(out.insert(field.clone(), json!(reference(value.as_str().unwrap_or_default())))),
            "type" if value == "any" => {}
            "required" => drop(out.insert(field.clone(), required(value, schema))),
            "exclusiveMinimum" | "exclusiveMaximum" if value.is_boolean() => {}
            "type" | "enum" | "const" | "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum"
            | "minLength" | "maxLength" | "minItems" | "maxItems" | "uniqueItems" | "pattern" => {
                drop(out.insert(field.clone(), value.clone()));
            }
            _ => {}
        }
    }
    let out = Value::Object(out);
    if schema["nullable"] == true { json!({"anyOf": [out, {"type": "null"}]}) } else { out }
}

/// What must be there; not what only answers have.
fn required(names: &Value, schema: &Value) -> Value {
    let names = names.as_array().into_iter().flatten();
    names.filter(|name| schema["properties"][name.as_str().unwrap_or_default()]["readOnly"] != true).cloned().collect()
}

/// All that a schema refers to.
fn references(schema: &Value) -> Vec<String> {
    match schema {
        Value::Object(fields) => {
            let own = fields.get("$ref").and_then(Value::as_str).map(str::to_owned);
            own.into_iter().chain(fields.values().flat_map(references)).collect()
        }
        Value::Array(items) => items.iter().flat_map(references).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    }
}

/// Discovery documents refer to schemas by their bare names.
fn reference(place: &str) -> String {
    if place.starts_with('#') { place.to_owned() } else { format!("#/schemas/{place}") }
}

#[test]
fn problems_are_seen() {
    let document = json!({"components": {"schemas": {"M": {
    "type": "object", "required": ["role", "id"], "properties": {
        "role": {"type": "string", "enum": ["user"]}, "id": {"type": "string", "readOnly": true},
        "content": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"properties": {"type": {"type": "string"}}}}]},
        "name": {"type": "string", "nullable": true},
    }}}}});
    let schema = JsonSchema::new(&json!({"$ref": "#/components/schemas/M"}), &document);
    let check =
        |body: Value, count: usize| assert_eq!(schema.problems(&body).len(), count, "{:?}", schema.problems(&body));
    check(json!({"role": "user", "content": "a", "name": null}), 0);
    check(json!({"role": "user", "content": [{"type": "text"}]}), 0);
    check(json!({"role": "model"}), 1);
    check(json!({"content": "a"}), 1);
    check(json!({"role": "user", "more": 1}), 1);
    check(json!({"role": "user", "content": [{"type": "text", "texts": 1}]}), 1);
}
