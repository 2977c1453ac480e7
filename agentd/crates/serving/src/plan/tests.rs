use super::*;
use proptest::prelude::*;
use serde_json::json;

fn loaded() -> Vec<ServedModel> {
    let model = |name: &str, kind, default, dimension| ServedModel {
        name: name.to_owned(),
        kind,
        default,
        dimension,
    };
    vec![
        model("tiny", ModelKind::Chat, true, 64),
        model("other", ModelKind::Chat, false, 64),
        model("minilm", ModelKind::Embedding, true, 384),
    ]
}

fn plan_chat(body: Value) -> Result<Planned, ApiError> {
    chat(serde_json::from_value(body).expect("a request"), &loaded(), "k".to_owned())
}

fn hello() -> Value {
    json!([{ "role": "user", "content": "hello" }])
}

#[test]
fn default_and_absent_mean_the_default_chat_model() {
    for body in [json!({ "messages": hello() }), json!({ "model": "default", "messages": hello() })] {
        assert_eq!(plan_chat(body).expect("planned").generate.model, "tiny");
    }
    assert_eq!(
        plan_chat(json!({ "model": "other", "messages": hello() })).expect("planned").generate.model,
        "other"
    );
}

#[test]
fn an_unknown_model_is_named_with_those_that_exist() {
    let error = plan_chat(json!({ "model": "gpt-9", "messages": hello() })).expect_err("refused");
    assert_eq!((error.status, error.code.as_str()), (404, "model_not_found"));
    assert!(error.message.contains("gpt-9") && error.message.contains("tiny, other"), "{}", error.message);
}

#[test]
fn an_embedding_model_does_not_chat() {
    let error = plan_chat(json!({ "model": "minilm", "messages": hello() })).expect_err("refused");
    assert_eq!(error.code, "model_not_found");
}

#[test]
fn without_a_model_the_client_is_told_to_come_back() {
    let request: ChatRequest = serde_json::from_value(json!({ "messages": hello() })).expect("a request");
    let error = chat(request, &[], "k".to_owned()).expect_err("refused");
    assert_eq!((error.status, error.code.as_str()), (503, "model_not_ready"));
}

#[test]
fn parts_become_text_and_developer_becomes_system() {
    let planned = plan_chat(json!({ "messages": [
        { "role": "developer", "content": "be short" },
        { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
        { "role": "assistant", "content": null },
    ]}))
    .expect("planned");
    let Prompt::Messages(messages) = planned.generate.prompt else { panic!("messages expected") };
    let seen: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(seen, [("system", "be short"), ("user", "ab"), ("assistant", "")]);
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        (json!({ "n": 0 }), "out_of_range"),
        (json!({ "n": 9 }), "out_of_range"),
        (json!({ "tools": [{ "type": "function" }] }), "tools_unsupported"),
        (json!({ "logprobs": true }), "logprobs_unsupported"),
        (json!({ "response_format": { "type": "xml" } }), "response_format_unsupported"),
        (json!({ "response_format": { "type": "json_schema", "json_schema": {} } }), "schema_missing"),
        (
            json!({ "response_format": { "type": "json_object" }, "grammar": "root ::= [a-z]" }),
            "grammar_conflict",
        ),
        (json!({ "temperature": 3.0 }), "out_of_range"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "stop": [""] }), "stop"),
        (json!({ "messages": [] }), "messages_empty"),
        (json!({ "messages": [{ "role": "wizard", "content": "x" }] }), "role_unknown"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            "content_unsupported",
        ),
    ];
    for (extra, code) in cases {
        let mut body = json!({ "messages": hello() });
        body.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        let error = plan_chat(body).expect_err(code);
        assert_eq!((error.status, error.code.as_str()), (400, code));
    }
}

#[test]
fn empty_tools_and_unknown_parameters_are_tolerated() {
    let body = json!({ "messages": hello(), "tools": [], "logprobs": false, "n": 1, "user": "x", "store": true,
                       "response_format": { "type": "text" }, "parallel_tool_calls": true });
    assert_eq!(plan_chat(body).expect("planned").delivery, Delivery::Whole);
}

#[test]
fn the_newer_name_of_the_limit_wins() {
    let body = json!({ "messages": hello(), "max_tokens": 5, "max_completion_tokens": 7, "stream": true,
                       "stream_options": { "include_usage": true }, "stop": "END", "seed": -1 });
    let planned = plan_chat(body).expect("planned");
    assert_eq!(planned.generate.max_tokens, 7);
    assert_eq!(planned.generate.stop, ["END"]);
    assert_eq!(planned.generate.sampling.seed, Some(u32::MAX));
    assert_eq!(planned.delivery, Delivery::Stream { usage: true });
}

#[test]
fn a_plain_completion_without_a_limit_is_short() {
    let request = serde_json::from_value(json!({ "prompt": ["once"] })).expect("a request");
    let planned = completion(request, &loaded(), "k".to_owned()).expect("planned");
    assert_eq!(planned.generate.max_tokens, 16);
    assert!(matches!(planned.generate.prompt, Prompt::Text(text) if text == "once"));
}

#[test]
fn embeddings_take_texts_only() {
    let plan = |body: Value| embeddings(serde_json::from_value(body).expect("a request"), &loaded());
    let planned = plan(json!({ "input": ["a", "b"], "encoding_format": "base64", "dimensions": 384 }))
        .expect("planned");
    assert_eq!(planned.encoding, Encoding::Base64);
    assert_eq!(planned.model, "minilm");
    for (body, code) in [
        (json!({ "input": [1, 2] }), "input_kind"),
        (json!({ "input": [] }), "input_count"),
        (json!({ "input": "a", "dimensions": 12 }), "dimensions_unsupported"),
        (json!({ "input": "a", "encoding_format": "int8" }), "encoding_format"),
    ] {
        assert_eq!(plan(body).expect_err(code).code, code);
    }
}

proptest! {
    /// Whatever the numbers are, what reaches the engine lies within the sampler's range.
    #[test]
    fn sampling_stays_in_range(temperature in prop::num::f64::ANY, top_p in prop::num::f64::ANY, top_k in any::<i64>(), seed in any::<i64>()) {
        let common = Common { temperature: Some(temperature), top_p: Some(top_p), top_k: Some(top_k), seed: Some(seed), ..Common::default() };
        if let Ok(sampling) = sampling(&common) {
            prop_assert!((0.0..=2.0).contains(&sampling.temperature));
            prop_assert!((0.0..=1.0).contains(&sampling.top_p));
            prop_assert!(top_k >= -1 && top_k <= i64::from(u32::MAX));
        } else {
            prop_assert!(!(0.0..=2.0).contains(&temperature) || !(0.0..=1.0).contains(&top_p)
                || top_k < -1 || top_k > i64::from(u32::MAX));
        }
    }
}

#[test]
fn the_form_of_an_answer_reaches_the_engine() {
    let shape = |more: Value| {
        let mut body = json!({ "messages": hello() });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        plan_chat(body).expect("planned").generate.shape
    };
    assert_eq!(shape(json!({})), Shape::Free);
    assert_eq!(shape(json!({ "response_format": { "type": "text" } })), Shape::Free);
    assert_eq!(shape(json!({ "response_format": { "type": "json_object" } })), Shape::JsonObject);
    let schema = json!({ "type": "object", "properties": { "b": { "type": "integer" }, "a": {} } });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } });
    let Shape::JsonSchema(text) = shape(json!({ "response_format": format })) else { panic!("a schema") };
    assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), schema);
    assert_eq!(shape(json!({ "grammar": "root ::= \"a\"" })), Shape::Grammar("root ::= \"a\"".to_owned()));
}
