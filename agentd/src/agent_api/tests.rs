use super::*;
use crate::engine::testing::FakeEngine;
use crate::engine::{self, Choice, Stage, Wanted};
use crate::store::Store;
use agentd_domain::engine::ModelKind;
use agentd_sandbox::client::Launcher;
use axum::http::Method;
use serde_json::{Value, json};
use std::future::pending;
use tower::ServiceExt;
use uuid::Uuid;

struct Scene {
    folder: tempfile::TempDir,
    fake: FakeEngine,
    caller: Caller,
    felt: tokio::sync::mpsc::Receiver<crate::agents::nerves::Felt>,
}

const ALL: [&str; 4] = ["memory.recall.spirit", "memory.remember.spirit", "messages", "models"];

impl Scene {
    async fn new(rights: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let fake = FakeEngine::start(folder.path(), Arc::default());
        let engine = engine::start(
            engine::Links {
                launcher: Launcher::at(folder.path().join("none")),
                sockets: folder.path().to_owned(),
                memory_max_bytes: 1,
            },
            std::future::ready(()),
        );
        let choice = |name: &str, kind| Choice { name: name.to_owned(), path: format!("/{name}"), kind };
        engine.want(Wanted {
            embedder: Some(choice("minilm", ModelKind::Embedding)),
            chat: vec![choice("tiny", ModelKind::Chat)],
        });
        engine.watch().wait_for(|view| view.stage == Stage::Ready).await.expect("ready");
        let db = Db::new(Store::open(&folder.path().join("system.redb")).expect("opens"));
        let agent = AgentId(Uuid::from_u128(1));
        std::fs::create_dir(folder.path().join(agent.to_string())).expect("made");
        let memories = Memories::start(folder.path().to_owned(), db.owner(), engine.clone());
        let (nerves, felt) = Nerves::new();
        let services = Services {
            inbox: Inbox::new(db.clone()),
            db,
            memories,
            engine,
            audit: Audit::default(),
            launcher: Launcher::at(folder.path().join("none")),
            nerves,
        };
        let caller = Caller {
            agent,
            name: "test".parse().expect("a name"),
            run: RunId(Uuid::from_u128(2)),
            rights: Arc::new(rights.iter().map(|right| (*right).to_owned()).collect()),
            services,
        };
        Self { folder, fake, caller, felt }
    }

    async fn ask(&self, method: Method, path: &str, key: Option<&str>, body: String) -> (u16, String) {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(Body::from(body)).expect("a request");
        let response = router(self.caller.clone()).oneshot(request).await.expect("answered");
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(bytes.to_vec()).expect("utf-8"))
    }

    async fn post(&self, path: &str, key: Option<&str>, body: &Value) -> (u16, Value) {
        let (status, text) = self.ask(Method::POST, path, key, body.to_string()).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }
}

fn fact(text: &str) -> Value {
    json!({ "tier": "spirit", "text": text, "role": "fact" })
}

#[tokio::test]
async fn what_is_remembered_is_recalled_by_its_meaning() {
    let scene = Scene::new(&ALL).await;
    for text in ["my grandfather built a ship", "I like plums"] {
        let (status, answer) = scene.post("/agent/v1/memory/remember", None, &fact(text)).await;
        assert_eq!((status, &answer["state"]), (200, &json!("embedded")), "{answer}");
    }
    let (status, answer) = scene.post("/agent/v1/memory/recall", None, &json!({ "query": "ocean" })).await;
    assert_eq!(
        (status, &answer["hits"][0]["text"]),
        (200, &json!("my grandfather built a ship")),
        "{answer}"
    );
}

#[tokio::test]
async fn a_repeated_remember_is_one_record() {
    let scene = Scene::new(&ALL).await;
    let first = scene.post("/agent/v1/memory/remember", Some("k"), &fact("a plum")).await;
    let second = scene.post("/agent/v1/memory/remember", Some("k"), &fact("a plum")).await;
    assert_eq!(first.1["id"], second.1["id"]);
    let (_, answer) = scene.post("/agent/v1/memory/recall", None, &json!({ "query": "plum" })).await;
    assert_eq!(answer["hits"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_text_that_is_told_and_asked_is_embedded_once() {
    let scene = Scene::new(&ALL).await;
    let text = "my grandfather built a ship";
    scene.post("/agent/v1/memory/recall", None, &json!({ "query": text })).await;
    scene.post("/agent/v1/memory/remember", None, &fact(text)).await;
    let (_, answer) = scene.post("/agent/v1/memory/recall", None, &json!({ "query": text })).await;
    assert_eq!(answer["hits"][0]["text"], json!(text));
    let embedded = scene.fake.seen.lock().expect("unpoisoned").embedded.clone();
    assert_eq!(embedded, [text]);
}

#[tokio::test]
async fn every_route_needs_its_right() {
    let scene = Scene::new(&[]).await;
    let cases = [
        (Method::POST, "/agent/v1/memory/remember", fact("x").to_string()),
        (Method::POST, "/agent/v1/memory/recall", json!({ "query": "x" }).to_string()),
        (Method::GET, "/agent/v1/messages/next", String::new()),
        (Method::POST, "/agent/v1/messages/1/reply", String::new()),
        (Method::POST, "/agent/v1/calls", json!({ "exec": ["/agent/x"] }).to_string()),
        (Method::GET, "/v1/models", String::new()),
        (Method::POST, "/v1/chat/completions", "{}".to_owned()),
        (Method::POST, "/v1/embeddings", "{}".to_owned()),
    ];
    for (method, path, body) in cases {
        let (status, text) = scene.ask(method, path, None, body).await;
        assert_eq!(status, 403, "{path}: {text}");
        assert!(text.contains("\"forbidden\""), "{path}: {text}");
    }
    assert_eq!(scene.ask(Method::GET, "/agent/v1/self", None, String::new()).await.0, 200);
}

#[tokio::test]
async fn every_look_at_a_right_is_recorded() {
    let scene = Scene::new(&["messages"]).await;
    for _ in 0..3 {
        assert_eq!(scene.ask(Method::GET, "/agent/v1/messages/next", None, String::new()).await.0, 204);
        assert_eq!(scene.ask(Method::GET, "/v1/models", None, String::new()).await.0, 403);
    }
    let told = |(entry, count): (Entry, u32)| {
        assert_eq!((entry.agent_id, entry.run_id), (Some(scene.caller.agent), Some(scene.caller.run)));
        (entry.right.expect("a right"), entry.verdict, count)
    };
    let seen: Vec<_> = scene.caller.services.audit.reported().into_iter().map(told).collect();
    let expected = [
        ("messages", Verdict::Allowed, 1),
        ("models", Verdict::Denied, 1),
        ("messages", Verdict::Allowed, 2),
        ("models", Verdict::Denied, 2),
    ];
    assert_eq!(seen, expected.map(|(right, verdict, count)| (right.to_owned(), verdict, count)));
}

#[tokio::test]
async fn a_right_for_one_tier_is_none_for_another() {
    let scene = Scene::new(&ALL).await;
    let body = json!({ "tier": "working", "text": "x" });
    assert_eq!(scene.post("/agent/v1/memory/remember", None, &body).await.0, 403);
    let body = json!({ "query": "x", "tiers": ["spirit", "working"] });
    assert_eq!(scene.post("/agent/v1/memory/recall", None, &body).await.0, 403);
}

#[tokio::test]
async fn bad_requests_are_refused_in_words() {
    let scene = Scene::new(&ALL).await;
    let large = "x".repeat(BODY_MOST_BYTES + 1);
    let cases = [
        ("/agent/v1/memory/remember", None, "{".to_owned(), 400, "body_invalid"),
        (
            "/agent/v1/memory/remember",
            None,
            json!({ "tier": "spirit", "texd": "x" }).to_string(),
            400,
            "body_invalid",
        ),
        ("/agent/v1/memory/remember", None, large, 413, "too_large"),
        ("/agent/v1/memory/remember", Some(""), fact("x").to_string(), 400, "idempotency_key_invalid"),
        ("/agent/v1/nothing", None, String::new(), 404, "not_found"),
    ];
    for (path, key, body, expect, code) in cases {
        let (status, text) = scene.ask(Method::POST, path, key, body).await;
        assert_eq!(status, expect, "{path}: {text}");
        assert!(text.contains(code), "{path}: {text}");
    }
}

#[tokio::test]
async fn a_completion_asked_for_twice_is_made_once() {
    let scene = Scene::new(&ALL).await;
    for stream in [false, true] {
        let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": stream });
        let key = format!("key-{stream}");
        let first = scene.post("/v1/chat/completions", Some(&key), &body).await;
        assert_eq!(first.0, 200);
        assert_eq!(scene.post("/v1/chat/completions", Some(&key), &body).await, first);
        let other = json!({ "messages": [{ "role": "user", "content": "ho" }], "stream": stream });
        let (status, answer) = scene.post("/v1/chat/completions", Some(&key), &other).await;
        assert_eq!((status, &answer["error"]["code"]), (409, &json!("conflict")));
    }
    assert_eq!(scene.fake.seen.lock().expect("unpoisoned").generated.len(), 2);
}

#[tokio::test]
async fn a_message_is_got_and_answered() {
    let scene = Scene::new(&ALL).await;
    assert_eq!(scene.ask(Method::GET, "/agent/v1/messages/next?wait_s=0", None, String::new()).await.0, 204);
    let inbox = &scene.caller.services.inbox;
    let parts = inbox.send(scene.caller.agent, "hi".to_owned(), None, pending()).await.expect("taken");
    let (status, text) = scene.ask(Method::GET, "/agent/v1/messages/next", None, String::new()).await;
    assert_eq!(status, 200);
    let message: Message = serde_json::from_str(&text).expect("a message");
    let path = format!("/agent/v1/messages/{}/reply", message.id);
    let (status, text) = scene.ask(Method::POST, &path, None, "{\"type\":\"tex\"}\n".to_owned()).await;
    assert_eq!(status, 400, "{text}");
    assert!(text.contains("reply_malformed"));
    let lines = "{\"type\":\"text\",\"text\":\"ho\"}\n\n{\"type\":\"done\"}";
    assert_eq!(scene.ask(Method::POST, &path, None, lines.to_owned()).await.0, 204);
    let said: Vec<_> = parts
        .filter_map(async |part| match part {
            ReplyPart::Text { text } => Some(text),
            _ => None,
        })
        .collect()
        .await;
    assert_eq!(said, ["ho"]);
    assert!(scene.folder.path().exists());
}

#[tokio::test]
async fn a_pain_reaches_the_loop_and_the_eleventh_of_a_minute_does_not() {
    let mut scene = Scene::new(&[]).await;
    let pain = json!({ "kind": "tool.broken", "severity": "high", "message": "<b>no</b>" });
    for _ in 0..10 {
        assert_eq!(scene.post("/agent/v1/self/pain", None, &pain).await.0, 204);
    }
    let crate::agents::nerves::Felt::Hurt { agent, pain: felt } = scene.felt.try_recv().expect("felt");
    assert_eq!(
        (agent, felt.kind.as_str(), felt.message.as_str()),
        (scene.caller.agent, "tool.broken", "<b>no</b>")
    );
    let (status, answer) = scene.post("/agent/v1/self/pain", None, &pain).await;
    assert_eq!((status, &answer["code"]), (429, &json!("too_many_requests")), "{answer}");
    for bad in [
        json!({ "kind": "No Word", "severity": "high", "message": "" }),
        json!({ "kind": "x", "severity": "worst", "message": "" }),
        json!({ "kind": "x", "severity": "low", "message": "x".repeat(501) }),
        json!({ "kind": "x", "severity": "low", "message": "", "agent": "another" }),
    ] {
        let (status, answer) = scene.post("/agent/v1/self/pain", None, &bad).await;
        assert_eq!((status, &answer["code"]), (400, &json!("body_invalid")), "{answer}");
    }
}

#[tokio::test]
async fn requests_are_counted_and_an_open_one_is_not_the_agents_fault() {
    let scene = Scene::new(&ALL).await;
    let beat = scene.caller.services.nerves.beat(scene.caller.agent);
    scene.ask(Method::GET, "/agent/v1/self", None, String::new()).await;
    scene.ask(Method::GET, "/agent/v1/messages/next", None, String::new()).await;
    assert_eq!((beat.pulse(0).calls, beat.pulse(0).progress_ms), (2, 0), "asking for work is no progress");
    scene.ask(Method::GET, "/nowhere", None, String::new()).await;
    assert_eq!((beat.pulse(0).errors, beat.pulse(0).open), (1, 0));
    scene.post("/agent/v1/memory/remember", None, &fact("a plum")).await;
    assert!(beat.pulse(0).progress_ms > 0);
    let request = Request::builder().method(Method::POST).uri("/v1/chat/completions");
    let body =
        json!({ "model": "default", "stream": true, "messages": [{ "role": "user", "content": "x" }] });
    let request = request.header("content-type", "application/json").body(Body::from(body.to_string()));
    let response = router(scene.caller.clone()).oneshot(request.expect("a request")).await.expect("answered");
    assert_eq!(beat.pulse(0).open, 1, "the stream has not left yet");
    response.into_body().collect().await.expect("a body");
    assert_eq!(beat.pulse(0).open, 0);
    let (status, _) = scene.ask(Method::POST, "/agent/v1/self/progress", None, String::new()).await;
    assert_eq!(status, 204);
}
