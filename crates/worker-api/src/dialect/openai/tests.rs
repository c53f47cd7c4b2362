//! What is sent, byte for byte, and what is understood.

use super::*;
use crate::fixture::{messages, spec};
use crate::providers::Table;
use genmill_core::request::Role;
use proptest::prelude::*;

pub(super) fn encoded(provider: &str, spec: &JobSpec, streaming: Streaming) -> Encoded {
    let table = Table::embedded().unwrap();
    let mut encoded = OpenAi.encode(spec, spec.model.backend_name(), table.find(provider).unwrap(), streaming);
    // Whether a map keeps its order depends on what else is built.
    let mut body: Value = serde_json::from_str(&encoded.body).unwrap();
    body.sort_all_objects();
    encoded.body = body.to_string();
    encoded
}

fn body_of(provider: &str, spec: &JobSpec) -> String {
    let body: Value = serde_json::from_str(&encoded(provider, spec, Streaming::On).body).unwrap();
    serde_json::to_string_pretty(&body).unwrap()
}

fn full(model: &str) -> JobSpec {
    let mut spec = spec(model, "");
    spec.input = messages(&[(Role::System, "Be brief."), (Role::User, "Hi"), (Role::Assistant, "Hello")]);
    spec.sampling.top_p = Some(0.9);
    spec.sampling.top_k = Some(40);
    spec.sampling.stop = ["a", "b", "c", "d", "e"].map(str::to_owned).to_vec();
    spec
}

#[test]
fn a_plain_prompt_is_one_user_message() {
    let encoded = encoded("openai", &spec("litellm_gpt-4", "Say \"hi\"\n"), Streaming::Off);
    assert_eq!(encoded.path, "/chat/completions");
    insta::assert_snapshot!(encoded.body, @r#"{"max_tokens":250,"messages":[{"content":"Say \"hi\"\n","role":"user"}],"model":"gpt-4","seed":7,"temperature":0.1}"#);
}

#[test]
fn bodies() {
    insta::assert_snapshot!("together_ai", body_of("together_ai", &full("litellm_together_ai/meta-llama/Llama-3")));
    insta::assert_snapshot!("openai", body_of("openai", &full("litellm_gpt-4o")));
    insta::assert_snapshot!("openai_reasoning", body_of("openai", &full("litellm_o3-mini")));
    insta::assert_snapshot!("mistral", body_of("mistral", &full("litellm_mistral/mistral-small")));
    insta::assert_snapshot!("openrouter", body_of("openrouter", &full("openrouter_openai/gpt-4o")));
}

#[test]
fn a_provider_may_have_its_own_path_and_headers() {
    let local = encoded("docker_model_runner", &spec("litellm_docker_model_runner/x", "hi"), Streaming::On);
    assert_eq!(local.path, "/v1/chat/completions");
    let headers = encoded("openrouter", &spec("openrouter_x/y", "hi"), Streaming::On).headers;
    assert!(headers.contains(&("X-Title".to_owned(), "Genmill".to_owned())));
    assert!(headers.contains(&("content-type".to_owned(), "application/json".to_owned())));
}

fn usage(prompt_tokens: u64, cached_prompt_tokens: u64, completion_tokens: u64) -> StreamEvent {
    StreamEvent::Usage(Usage { prompt_tokens, cached_prompt_tokens, completion_tokens })
}

fn text(text: &str) -> StreamEvent {
    StreamEvent::Text(text.to_owned())
}

fn error(status: Option<u16>, code: &str, message: &str) -> ProviderError {
    ProviderError { status, code: code.to_owned(), message: message.to_owned(), ..ProviderError::default() }
}

pub(super) fn check(data: &str, expect: &[StreamEvent]) {
    assert_eq!(events(data), expect, "{data}");
}

#[test]
fn text_comes_from_every_shape_of_content() {
    check(r#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#, &[text("a")]);
    check(r#"{"choices":[{"delta":{"content":"a"},"message":{"content":"so far a"}}]}"#, &[text("a")]);
    check(r#"{"choices":[{"message":{"content":"a"}}]}"#, &[text("a")]);
    let parts = r#"{"choices":[{"message":{"content":[{"type":"text","text":"a"},{"type":"image"},{"text":"b"}]}}]}"#;
    check(parts, &[text("ab")]);
    let thinking =
        r#"{"choices":[{"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"x"}]}]}}]}"#;
    check(thinking, &[StreamEvent::Reasoning("x".to_owned())]);
    check(r#"{"choices":[{"message":{"content":null,"refusal":"I cannot."}}]}"#, &[text("I cannot.")]);
    check(
        r#"{"choices":[{"delta":{"reasoning":"hm","reasoning_content":"hm"}}]}"#,
        &[StreamEvent::Reasoning("hm".to_owned())],
    );
    check(
        r#"{"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}"#,
        &[StreamEvent::Reasoning("hm".to_owned())],
    );
    check(r#"{"choices":[{"delta":{"content":"","reasoning":"hm"}}]}"#, &[StreamEvent::Reasoning("hm".to_owned())]);
    let other = StreamEvent::OfSample { sample: 1, event: Box::new(text("other")) };
    check(r#"{"choices":[{"index":1,"delta":{"content":"other"}}]}"#, std::slice::from_ref(&other));
    check(r#"{"choices":[{"message":{"content":"a"}},{"message":{"content":"other"}}]}"#, &[text("a"), other]);
    check(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, &[]);
}

#[test]
fn the_fingerprint_of_the_system_is_read() {
    let told = StreamEvent::Fingerprint("fp_1".to_owned());
    check(r#"{"choices":[{"delta":{"content":"a"}}],"system_fingerprint":"fp_1"}"#, &[text("a"), told]);
    check(r#"{"choices":[{"delta":{"content":"a"}}],"system_fingerprint":null}"#, &[text("a")]);
    let whole = r#"{"choices":[{"message":{"content":"a"}}],"system_fingerprint":"fp_1"}"#;
    assert_eq!(OpenAi.decode(whole.as_bytes()).unwrap().fingerprint, "fp_1");
}

#[test]
fn finish_reasons_are_mapped() {
    let check = |reason: &str, expect: FinishReason| {
        check(
            &format!(r#"{{"choices":[{{"delta":{{}},"finish_reason":"{reason}"}}]}}"#),
            &[StreamEvent::Finished(expect)],
        );
    };
    check("stop", FinishReason::Stop);
    check("STOP", FinishReason::Stop);
    check("eos", FinishReason::Stop);
    check("length", FinishReason::Length);
    check("model_length", FinishReason::Length);
    check("content_filter", FinishReason::ContentFilter);
    check("tool_calls", FinishReason::ToolCalls);
    check("something new", FinishReason::Unknown);
}

#[test]
fn usage_is_read_wherever_it_stands() {
    check(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}}"#, &[usage(3, 0, 5)]);
    check(r#"{"choices":[],"x_groq":{"usage":{"prompt_tokens":3,"completion_tokens":5}}}"#, &[usage(3, 0, 5)]);
    let cached = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":4}}}"#;
    check(cached, &[usage(9, 4, 1)]);
    let deepseek = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1,"prompt_cache_hit_tokens":6}}"#;
    check(deepseek, &[usage(9, 6, 1)]);
    let written = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":4,"cache_write_tokens":3}}}"#;
    let details = UsageDetails { cache_write_tokens: 3, reasoning_tokens: 0 };
    check(written, &[usage(9, 4, 1), StreamEvent::UsageDetails(details)]);
    let moonshot = r#"{"choices":[{"delta":{},"usage":{"prompt_tokens":3.0,"completion_tokens":5}}]}"#;
    check(moonshot, &[usage(3, 0, 5)]);
    check(r#"{"choices":[],"usage":{"prompt_tokens":3.5,"completion_tokens":5}}"#, &[]);
    let more_than_there_is = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,"cached_tokens":4}}"#;
    check(more_than_there_is, &[usage(3, 3, 5)]);
    check(r#"{"choices":[],"usage":null}"#, &[]);
    check(r#"{"choices":[],"usage":{"prompt_tokens":null,"completion_tokens":5}}"#, &[]);
}

#[test]
fn reasoning_is_added_only_where_the_total_says_it_is_outside() {
    let usage_of = |total: u64| {
        format!(
            r#"{{"choices":[],"usage":{{"prompt_tokens":10,"completion_tokens":5,"total_tokens":{total},"completion_tokens_details":{{"reasoning_tokens":4}}}}}}"#
        )
    };
    let details = |cache_write_tokens, reasoning_tokens| {
        StreamEvent::UsageDetails(UsageDetails { cache_write_tokens, reasoning_tokens })
    };
    check(&usage_of(15), &[usage(10, 0, 5), details(0, 4)]);
    check(&usage_of(19), &[usage(10, 0, 9), details(0, 4)]);
    check(
        r#"{"usage":{"prompt_tokens":10,"completion_tokens":5,"prompt_tokens_details":{"cache_write_tokens":7,"cached_tokens":2}}}"#,
        &[usage(10, 2, 5), details(7, 0)],
    );
}

#[test]
fn a_tier_with_a_price_of_its_own_is_told() {
    check(r#"{"choices":[],"service_tier":"priority"}"#, &[StreamEvent::Class(Class::Priority)]);
    check(r#"{"choices":[],"service_tier":"flex"}"#, &[StreamEvent::Class(Class::Flex)]);
    for usual in [r#""default""#, r#""auto""#, r#""batch""#, "null", "1"] {
        check(&format!(r#"{{"choices":[],"service_tier":{usual}}}"#), &[]);
    }
}

#[test]
fn an_answer_without_any_choice_is_none() {
    let error = OpenAi.decode(br#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":0}}"#).unwrap_err();
    assert_eq!(error.message, "the answer says nothing");
}

#[test]
fn the_billed_figure_is_read_digit_by_digit() {
    let check = |cost: &str, picodollars: Option<u128>| {
        let data = format!(r#"{{"choices":[],"usage":{{"cost":{cost}}}}}"#);
        let expect: Vec<_> = picodollars.map(Picodollars).map(StreamEvent::Billed).into_iter().collect();
        assert_eq!(events(&data), expect, "{cost}");
    };
    check("0.00014", Some(140_000_000));
    check("1.4e-05", Some(14_000_000));
    check("123456789.000000000001", Some(123_456_789_000_000_000_001));
    check("\"0.1\"", Some(100_000_000_000));
    check("0", Some(0));
    check("null", None);
    check("-1", None);
    check(r#"{"total_cost":0.0061,"request_cost":0.006,"currency":"USD"}"#, Some(6_100_000_000));
    check(r#"null,"cost_in_usd_ticks":1230"#, Some(123_000));
}

#[test]
fn errors_in_an_answer_are_told() {
    let check = |data: &str, expect: ProviderError| check(data, &[StreamEvent::Error(expect)]);
    check(
        r#"{"error":{"code":502,"message":"Upstream failed"},"choices":[{"delta":{"content":""},"finish_reason":"error"}]}"#,
        error(Some(502), "502", "Upstream failed"),
    );
    check(r#"{"error":{"message":"no","type":"server_error","code":null}}"#, error(None, "server_error", "no"));
    check(
        r#"{"choices":[{"delta":{},"finish_reason":"error"}]}"#,
        error(None, "", "the provider failed while it answered"),
    );
    check(r#"{"object":"error","message":"no","type":"BadRequestError","code":400}"#, error(Some(400), "400", "no"));
    check("{\"choices\":[{\"delta\":{\"con", error(None, "", "the answer is not a chat completion"));
    check("<html>", error(None, "", "the answer is not a chat completion"));
}

#[test]
fn what_is_no_completion_and_no_error_is_passed_over() {
    check(r#"{"type":"ping"}"#, &[]);
    check(r#"{"id":"x","choices":[],"prompt_filter_results":[{"prompt_index":0}]}"#, &[]);
    check("[DONE]", &[StreamEvent::Done]);
}

#[test]
fn a_whole_answer_is_read() {
    let body = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":2,"cost":0.5}}"#;
    let reply = OpenAi.decode(body.as_bytes()).unwrap();
    let usage = Usage { prompt_tokens: 1, cached_prompt_tokens: 0, completion_tokens: 2 };
    let billed = Some(Picodollars(500_000_000_000));
    let expect = Reply {
        text: "hi".to_owned(),
        finish_reason: Some(FinishReason::Length),
        usage: Some(usage),
        billed,
        ..Reply::default()
    };
    assert_eq!(reply, expect);
    let empty = OpenAi.decode(br#"{"choices":[{"message":{"content":null},"finish_reason":"stop"}]}"#).unwrap();
    assert_eq!((empty.text.as_str(), empty.finish_reason), ("", Some(FinishReason::Stop)));
    assert!(OpenAi.decode(b"{}").is_err());
    assert!(OpenAi.decode(b"null").is_err());
    assert!(OpenAi.decode(&body.as_bytes()[..40]).is_err());
}

#[test]
fn refusals_of_every_shape_are_read() {
    let check = |body: &str, expect: ProviderError| assert_eq!(OpenAi.decode_error(body.as_bytes()), expect, "{body}");
    let full = r#"{"error":{"message":"no","type":"invalid_request_error","param":null,"code":"model_not_found"}}"#;
    check(full, error(None, "model_not_found", "no"));
    check(r#"{"error":"no"}"#, error(None, "", "no"));
    check(r#"{"error":"no","error_type":"overloaded"}"#, error(None, "", "no"));
    check(r#"[{"error":{"code":400,"message":"no"}}]"#, error(Some(400), "400", "no"));
    check(r#"{"errors":[{"code":"x","message":"no"}]}"#, error(None, "x", "no"));
    check(r#"{"message":"no","code":"y"}"#, error(None, "y", "no"));
    check(r#"{"detail":"no"}"#, error(None, "", "no"));
    let quoting =
        r#"{"detail":[{"loc":["body","messages",0],"msg":"too long","input":"the secret prompt","type":"t"}]}"#;
    check(quoting, error(None, "", "body.messages.0: too long"));
    check("upstream timed out\n", error(None, "", "upstream timed out"));
    check("<html><body>Bad gateway</body></html>", error(None, "", "the answer is a web page"));
    check("", error(None, "", ""));
}

const STREAM: &str = concat!(
    ": OPENROUTER PROCESSING\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\r\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"grüße \"}}]}\n\n",
    "event: message\nid: 3\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"世界🦀\"}}]}\r\r",
    "data: {\"choices\":[{\"index\":0,\n",
    "data: \"delta\":{\"content\":null},\"finish_reason\":\"stop\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":5,\"cost\":1e-6}}\n\n",
    "data: [DONE]",
);

fn decoded(pieces: &[&[u8]]) -> Vec<StreamEvent> {
    let mut decoder = OpenAi.decoder();
    let mut events: Vec<StreamEvent> = pieces.iter().flat_map(|piece| decoder.push(piece)).collect();
    events.extend(decoder.end());
    events
}

#[test]
fn a_stream_is_read() {
    let expect = [
        text("grüße "),
        text("世界🦀"),
        StreamEvent::Finished(FinishReason::Stop),
        usage(3, 0, 5),
        StreamEvent::Billed(Picodollars(1_000_000)),
        StreamEvent::Done,
    ];
    assert_eq!(decoded(&[STREAM.as_bytes()]), expect);
}

proptest! {
    #[test]
    fn any_split_of_a_stream_reads_the_same(cuts in proptest::collection::vec(0..STREAM.len(), 0..40)) {
        let mut cuts = cuts;
        cuts.sort_unstable();
        let starts = std::iter::once(0).chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain([STREAM.len()]);
        let pieces: Vec<&[u8]> = starts.zip(ends).map(|(start, end)| &STREAM.as_bytes()[start..end]).collect();
        prop_assert_eq!(decoded(&pieces), decoded(&[STREAM.as_bytes()]));
    }

    #[test]
    fn no_bytes_panic(bytes: Vec<u8>) {
        decoded(&[&bytes, b"\n\n"]);
        drop(OpenAi.decode(&bytes));
        OpenAi.decode_error(&bytes);
    }
}
