//! Forms of texts and tools from a client to a local model and back.

use super::*;
use genmill_client::{Error, Reason};

#[tokio::test(flavor = "multi_thread")]
async fn texts_keep_to_their_form_and_malformed_forms_are_refused() {
    let mill = Mill::up().await;
    let request = || Request::new(QWEN2).prompt("X moves").temperature(1.0).max_tokens(120);
    let schema = r#"{"type": "object", "properties": {"move": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["move"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}"#;
    let job = mill.run(request().json_schema(schema).samples(4).seed(1)).await;
    let result = job.result.as_ref().unwrap();
    for text in std::iter::once(&result.text).chain(result.more_samples.iter().map(|sample| &sample.text)) {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        assert!((1..=9).contains(&value["move"].as_i64().unwrap()), "{text}");
    }
    assert_eq!(result.finish_reason(), v1::FinishReason::Stop);
    assert!(["X", "O"].contains(&text(&mill.run(request().choice(["X", "O"])).await)));
    assert_eq!(text(&mill.run(request().regex("(ab){3}")).await), "ababab");
    assert_eq!(text(&mill.run(request().lark("start: \"a\" \"b\"")).await), "ab");

    let refused = async |request: Request, says: &[&str]| {
        let error = mill.client.submit(request).await.unwrap_err();
        assert!(matches!(error, Error::Refused { reason: Reason::InvalidRequest, .. }), "{error:?}");
        assert!(says.iter().all(|says| error.to_string().contains(says)), "{error}");
    };
    refused(request().json_schema("{"), &["structured_output.json_schema: EOF while parsing"]).await;
    refused(request().json_schema(r#"{"type": "objekt"}"#), &["structured_output.json_schema", "objekt"]).await;
    refused(request().regex("(a"), &["structured_output.regex", "unclosed group"]).await;
    refused(request().lark("start: x"), &["structured_output.lark", "x"]).await;
    refused(request().choice(["a", ""]), &["structured_output.choice: no choice may be empty"]).await;
    refused(request().regex("a").min_tokens(2), &["min_tokens: cannot go with structured_output"]).await;
    refused(Request::new(QWEN2).user("X").tool("f", "", "[]"), &["tools: the parameters of `f`"]).await;
    refused(request().tool("f", "", ""), &["tools: need messages"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_without_tools_refuses_them() {
    let mill = Mill::up().await;
    let job = mill.run(Request::new(QWEN2).user("What is 1 + 2?").tool("add", "Adds.", "{}").max_tokens(4)).await;
    let error = job.error.unwrap();
    assert_eq!(error.error_class(), v1::ErrorClass::Invalid);
    assert!(error.message.contains("knows no form of tool calls"), "{}", error.message);
}
