use super::*;
use crate::handle::Pieces;
use crate::handle::{Embeddings, Leaving, Pending, ServedModel};
use agentd_domain::engine::Done;
use agentd_domain::engine::{FinishReason, Generate, ModelKind};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::{Extension, Router};
use http_body_util::BodyExt;
use std::sync::Mutex;
use tower::ServiceExt;

/// Says its pieces, then `Done`, or fails where told to.
#[derive(Default)]
struct FakeEngine {
    pieces: Vec<&'static str>,
    fails_after: Option<usize>,
    keys: Mutex<Vec<String>>,
    leaving: Mutex<Vec<Leaving>>,
}

impl EngineHandle for FakeEngine {
    fn models(&self) -> Vec<ServedModel> {
        let model =
            |name: &str, kind| ServedModel { name: name.to_owned(), kind, default: true, dimension: 2 };
        vec![model("tiny", ModelKind::Chat), model("minilm", ModelKind::Embedding)]
    }

    fn generate(&self, request: Generate, leaving: Leaving) -> Pending<'_, Pieces> {
        self.leaving.lock().expect("unpoisoned").push(leaving);
        self.keys.lock().expect("unpoisoned").push(request.key);
        let mut said: Vec<_> = self.pieces.iter().map(|text| Ok(Piece::Text((*text).to_owned()))).collect();
        match self.fails_after {
            Some(count) => {
                said.truncate(count);
                said.push(Err(Report::environment(
                    "engine_lost",
                    "the answer was not finished",
                    "gone",
                    "retry",
                )));
            }
            None => said.push(Ok(Piece::Done(Done {
                reason: FinishReason::Length,
                prompt_tokens: 3,
                completion_tokens: self.pieces.len() as u32,
                cached_tokens: 2,
            }))),
        }
        Box::pin(async move { Ok(Box::pin(stream::iter(said)) as Pieces) })
    }

    fn embed(&self, _model: String, inputs: Vec<String>) -> Pending<'_, Embeddings> {
        let vectors = inputs.iter().map(|_| vec![0.6, 0.8]).collect();
        Box::pin(async move { Ok(Embeddings { vectors, tokens: 9 }) })
    }
}

fn router_of(front: Front) -> Router {
    router().layer(Extension(front))
}

async fn ask(
    engine: FakeEngine,
    path: &str,
    body: String,
    key: Option<&str>,
) -> (StatusCode, String, Arc<FakeEngine>) {
    let engine = Arc::new(engine);
    let front = Front { engine: engine.clone(), caller: "agent-1".to_owned(), share: Default::default() };
    let mut request = Request::post(path).header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let response =
        router_of(front).oneshot(request.body(Body::from(body)).expect("request")).await.expect("answer");
    let status = response.status();
    let bytes = response.into_body().collect().await.expect("body").to_bytes();
    (status, String::from_utf8(bytes.to_vec()).expect("utf-8"), engine)
}

fn chat_body(stream: bool) -> String {
    json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": stream,
            "stream_options": { "include_usage": true } })
    .to_string()
}

fn lines(body: &str) -> Vec<&str> {
    body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
}

#[tokio::test]
async fn a_whole_answer_has_openais_shape() {
    let engine = FakeEngine { pieces: vec!["he", "llo"], ..FakeEngine::default() };
    let (status, body, engine) = ask(engine, "/v1/chat/completions", chat_body(false), Some("once")).await;
    assert_eq!(status, StatusCode::OK);
    let value: Value = serde_json::from_str(&body).expect("json");
    assert_eq!(value["object"], "chat.completion");
    assert_eq!(
        value["choices"][0]["message"],
        json!({ "role": "assistant", "content": "hello", "refusal": null })
    );
    assert_eq!(value["choices"][0]["finish_reason"], "length");
    let details = json!({ "cached_tokens": 2 });
    assert_eq!(
        value["usage"],
        json!({ "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": details })
    );
    assert_eq!(*engine.keys.lock().expect("unpoisoned"), ["agent-1/once"]);
}

#[tokio::test]
async fn several_choices_are_several_generations_and_one_answer() {
    let engine = FakeEngine { pieces: vec!["he", "llo"], ..FakeEngine::default() };
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "n": 3, "seed": 5 }).to_string();
    let (status, body, engine) = ask(engine, "/v1/chat/completions", body, Some("k")).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let value: Value = serde_json::from_str(&body).expect("json");
    for index in 0..3 {
        assert_eq!(value["choices"][index]["index"], index);
        assert_eq!(value["choices"][index]["message"]["content"], "hello");
    }
    // The prompt once, the answers all.
    assert_eq!(
        (&value["usage"]["prompt_tokens"], &value["usage"]["completion_tokens"]),
        (&json!(3), &json!(6))
    );
    assert_eq!(*engine.keys.lock().expect("unpoisoned"), ["agent-1/k", "agent-1/k#1", "agent-1/k#2"]);
}

#[tokio::test]
async fn a_stream_of_several_choices_ends_when_all_have() {
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "n": 2, "stream": true,
                       "stream_options": { "include_usage": true } });
    let engine = FakeEngine { pieces: vec!["he", "llo"], ..FakeEngine::default() };
    let (_, text, _) = ask(engine, "/v1/chat/completions", body.to_string(), None).await;
    let lines = lines(&text);
    assert_eq!(lines.iter().filter(|line| **line == "[DONE]").count(), 1);
    assert_eq!(lines.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> =
        lines[..lines.len() - 1].iter().map(|line| serde_json::from_str(line).expect("json")).collect();
    for index in 0..2 {
        let own = || {
            chunks
                .iter()
                .flat_map(|c| c["choices"].as_array().expect("a list"))
                .filter(|c| c["index"] == index)
        };
        assert_eq!(own().filter_map(|c| c["delta"]["role"].as_str()).count(), 1);
        let said: String = own().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(said, "hello");
        assert_eq!(own().filter(|c| c["finish_reason"] == "length").count(), 1);
    }
    assert_eq!(chunks.last().expect("usage")["usage"]["completion_tokens"], 4);
    let engine = FakeEngine { pieces: vec!["he", "llo"], fails_after: Some(1), ..FakeEngine::default() };
    let (_, text, _) = ask(engine, "/v1/chat/completions", body.to_string(), None).await;
    assert!(!text.contains("[DONE]") && text.contains("engine_lost"), "{text}");
}

#[tokio::test]
async fn a_stream_opens_with_the_role_and_ends_with_usage_and_done() {
    let engine = FakeEngine { pieces: vec!["he", "llo\nworld"], ..FakeEngine::default() };
    let (_, body, _) = ask(engine, "/v1/chat/completions", chat_body(true), None).await;
    let lines = lines(&body);
    assert_eq!(lines.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> =
        lines[..lines.len() - 1].iter().map(|line| serde_json::from_str(line).expect("json")).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "hello\nworld");
    assert_eq!(chunks[3]["choices"][0]["finish_reason"], "length");
    assert_eq!(chunks[4]["usage"]["total_tokens"], 5);
    assert_eq!(chunks[4]["choices"], json!([]));
}

#[tokio::test]
async fn a_failure_midway_is_the_last_line_of_the_stream() {
    let engine = FakeEngine { pieces: vec!["he", "llo"], fails_after: Some(1), ..FakeEngine::default() };
    let (status, body, _) = ask(engine, "/v1/chat/completions", chat_body(true), None).await;
    assert_eq!(status, StatusCode::OK);
    let lines = lines(&body);
    let last: Value = serde_json::from_str(lines.last().expect("a line")).expect("json");
    assert_eq!(last["error"]["code"], "engine_lost");
    assert_eq!(last["error"]["type"], "server_error");
}

#[tokio::test]
async fn a_failure_of_a_whole_answer_is_its_status() {
    let engine = FakeEngine { pieces: vec!["he"], fails_after: Some(1), ..FakeEngine::default() };
    let (status, body, _) = ask(engine, "/v1/chat/completions", chat_body(false), None).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
}

#[tokio::test]
async fn plain_completions_stream_text() {
    let engine = FakeEngine { pieces: vec!["a", "b"], ..FakeEngine::default() };
    let body = json!({ "prompt": "x", "stream": true }).to_string();
    let (_, body, _) = ask(engine, "/v1/completions", body, None).await;
    let first: Value = serde_json::from_str(lines(&body)[0]).expect("json");
    assert_eq!((&first["object"], &first["choices"][0]["text"]), (&json!("text_completion"), &json!("a")));
}

#[tokio::test]
async fn embeddings_come_as_numbers_or_base64() {
    let body = json!({ "input": "x" }).to_string();
    let (_, text, _) = ask(FakeEngine::default(), "/v1/embeddings", body, None).await;
    let value: Value = serde_json::from_str(&text).expect("json");
    assert_eq!(value["usage"]["prompt_tokens"], 9);
    let body = json!({ "input": "x", "encoding_format": "base64" }).to_string();
    let (_, text, _) = ask(FakeEngine::default(), "/v1/embeddings", body, None).await;
    let value: Value = serde_json::from_str(&text).expect("json");
    // 0.6f32 and 0.8f32, little-endian.
    assert_eq!(value["data"][0]["embedding"], "mpkZP83MTD8=");
}

#[tokio::test]
async fn nonsense_and_too_much_are_openai_errors() {
    let (status, body, _) = ask(FakeEngine::default(), "/v1/chat/completions", "{".to_owned(), None).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(body.contains("\"code\":\"body_invalid\""), "{body}");
    let huge = "x".repeat(MAX_BODY_BYTES + 1);
    let (status, body, _) = ask(FakeEngine::default(), "/v1/chat/completions", huge, None).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(body.contains("invalid_request_error"), "{body}");
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let front =
        Front { engine: Arc::new(FakeEngine::default()), caller: String::new(), share: Default::default() };
    let get = |path: &str| {
        let request = Request::get(path).body(Body::empty()).expect("request");
        router_of(front.clone()).oneshot(request)
    };
    assert_eq!(get("/v1/models").await.expect("answer").status(), StatusCode::OK);
    assert_eq!(get("/v1/models/minilm").await.expect("answer").status(), StatusCode::OK);
    assert_eq!(get("/v1/models/none").await.expect("answer").status(), StatusCode::NOT_FOUND);
}

/// Asks for the same twice, each time of a new engine, and gives the answers' ids and who may return.
async fn ids_of(key: Option<&str>, stream: bool) -> Vec<(Value, Vec<Leaving>)> {
    let mut seen = Vec::new();
    for _ in 0..2 {
        let engine = FakeEngine { pieces: vec!["a"], ..FakeEngine::default() };
        let (_, body, engine) = ask(engine, "/v1/chat/completions", chat_body(stream), key).await;
        let text = if stream { lines(&body)[0].to_owned() } else { body };
        let value: Value = serde_json::from_str(&text).expect("json");
        let leaving = engine.leaving.lock().expect("unpoisoned").clone();
        seen.push((value["id"].clone(), leaving));
    }
    seen
}

#[tokio::test]
async fn with_a_key_a_repeated_answer_has_the_same_id_and_its_reader_may_return() {
    for stream in [false, true] {
        let seen = ids_of(Some("k"), stream).await;
        assert_eq!(seen[0], seen[1]);
        assert_eq!(seen[0].1, [Leaving::MayReturn]);
        let seen = ids_of(None, stream).await;
        assert_ne!(seen[0].0, seen[1].0);
        assert_eq!(seen[0].1, [Leaving::Cancels]);
    }
}

#[tokio::test]
async fn the_meter_is_filled_before_the_end_is_given_out_and_not_before() {
    let engine = FakeEngine { pieces: vec!["a", "b"], ..FakeEngine::default() };
    let front = Front { engine: Arc::new(engine), caller: String::new(), share: Default::default() };
    let request = Request::post("/v1/chat/completions").body(Body::from(chat_body(true))).expect("request");
    let response = router_of(front).oneshot(request).await.expect("answer");
    let meter = response.extensions().get::<Meter>().expect("a meter").clone();
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let bytes = frame.expect("whole").into_data().expect("data");
        let ends = [&b"\"finish_reason\":\"length\""[..], b"total_tokens", b"[DONE]"];
        let is_end = ends.iter().any(|end| bytes.windows(end.len()).any(|window| window == *end));
        assert_eq!(meter.used().is_some(), is_end, "{}", String::from_utf8_lossy(&bytes));
    }
    let used = Used { model: "tiny".to_owned(), prompt_tokens: 3, completion_tokens: 2, cached_tokens: 2 };
    assert_eq!(meter.used(), Some(&used));
}

#[tokio::test]
async fn a_failed_answer_fills_no_meter() {
    let engine = FakeEngine { pieces: vec!["a"], fails_after: Some(1), ..FakeEngine::default() };
    let front = Front { engine: Arc::new(engine), caller: String::new(), share: Default::default() };
    let request = Request::post("/v1/chat/completions").body(Body::from(chat_body(true))).expect("request");
    let response = router_of(front).oneshot(request).await.expect("answer");
    let meter = response.extensions().get::<Meter>().expect("a meter").clone();
    response.into_body().collect().await.expect("body");
    assert_eq!(meter.used(), None);
}
