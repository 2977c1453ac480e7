use super::*;
use crate::children;
use crate::engine::testing::FakeEngine;
use crate::engine::{self, Choice, Stage, Wanted};
use crate::store::{AgentRow, Store};
use crate::tokens::nothing;
use agentd_capability::parse_manifest;
use agentd_capability::token::{Fresh, RootKey, attenuate};
use agentd_domain::agent_api::TOKEN_HEADER;
use agentd_domain::engine::ModelKind;
use agentd_domain::ids::OwnerId;
use agentd_domain::rights::{Narrowing, Rights};
use agentd_domain::token::{RevocationId, Shown};
use agentd_sandbox::client::Launcher;
use axum::http::Method;
use axum::{Extension, Router};
use serde_json::{Value, json};
use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use tower::ServiceExt;
use uuid::Uuid;

pub(super) fn rights_of(api: &[&str]) -> Rights {
    Rights {
        api: api.iter().map(|right| (*right).to_owned()).collect(),
        ..nothing(AgentId(Uuid::nil())).rights
    }
}

pub(super) struct Scene {
    pub(super) folder: tempfile::TempDir,
    pub(super) fake: FakeEngine,
    pub(super) caller: Caller,
    felt: tokio::sync::mpsc::Receiver<crate::agents::nerves::Felt>,
}

const ALL: [&str; 4] = ["memory.recall.spirit", "memory.remember.spirit", "messages", "models"];

pub(super) fn router_of(caller: &Caller) -> Router {
    router().layer(Extension(caller.clone()))
}

impl Scene {
    pub(super) async fn new(rights: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let fake = FakeEngine::start(folder.path(), Arc::default());
        let engine = engine::start(
            engine::Links {
                launcher: Launcher::at(folder.path().join("none")),
                sockets: folder.path().to_owned(),
                memory_max_bytes: 1,
                load_patience: std::time::Duration::from_secs(2),
                gate: crate::engine::testing::open_gate(),
            },
            std::future::ready(()),
        );
        let choice = |name: &str, kind| Choice { name: name.to_owned(), path: format!("/{name}"), kind };
        engine.want(Wanted {
            embedder: Some(choice("minilm", ModelKind::Embedding)),
            chat: vec![choice("tiny", ModelKind::Chat)],
            ..Wanted::default()
        });
        engine.watch().wait_for(|view| view.stage == Stage::Ready).await.expect("ready");
        let db = Db::new(Store::open(&folder.path().join("system.redb")).expect("opens"));
        let agent = AgentId(Uuid::from_u128(1));
        db.here().add_agent(&row_of(agent, db.owner())).expect("added");
        std::fs::create_dir(folder.path().join(agent.to_string())).expect("made");
        let memories = Memories::start(
            crate::memory::Folders {
                agents: folder.path().to_owned(),
                knowledge: folder.path().join("knowledge"),
            },
            db.clone(),
            engine.clone(),
        );
        let audit = Audit::default();
        let key = RootKey::from_secret(&[7; 32]).expect("a key");
        let tokens = Tokens::open(key, db.clone()).expect("opened");
        let children = Children::new(children::Links {
            db: db.clone(),
            tokens: tokens.clone(),
            audit: audit.clone(),
            launcher: Launcher::at(folder.path().join("none")),
            folder: folder.path().to_owned(),
        });
        let inbox = Inbox::new(db.clone());
        let (nerves, felt) = Nerves::new();
        let services = Services {
            inbox,
            db,
            memories,
            engine,
            gpu: crate::gpu::Gpu::new(0),
            audit,
            launcher: Launcher::at(folder.path().join("none")),
            tokens,
            children,
            nerves,
        };
        let held = Verified { rights: rights_of(rights), expires_unix_s: None, ..nothing(agent) };
        let caller = Caller {
            agent,
            name: "test".parse().expect("a name"),
            run: RunId(Uuid::from_u128(2)),
            held: Arc::new(held),
            shown: None,
            services,
        };
        Self { folder, fake, caller, felt }
    }

    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: String,
    ) -> (u16, String) {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(Body::from(body)).expect("a request");
        let response = router_of(&self.caller).oneshot(request).await.expect("answered");
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(bytes.to_vec()).expect("utf-8"))
    }

    /// The keys of the record of requests, oldest first.
    fn requests(&self) -> Vec<Option<String>> {
        let rows = self.caller.services.db.here().requests(self.caller.agent).expect("read");
        rows.into_iter().map(|row| row.key).collect()
    }

    pub(super) async fn post(&self, path: &str, key: Option<&str>, body: &Value) -> (u16, Value) {
        let (status, text) = self.ask(Method::POST, path, key, body.to_string()).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }
}

fn row_of(agent_id: AgentId, owner_id: OwnerId) -> AgentRow {
    AgentRow {
        v: 1,
        agent_id,
        owner_id,
        name: "test".parse().expect("a name"),
        version: "1.0.0".to_owned(),
        digest: String::new(),
        manifest: String::new(),
        uid: 1_000_000,
        wanted: true,
        bundled: false,
        restarts: 0,
        installed_unix_ms: 0,
        parent: None,
        arguments: Vec::new(),
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
    // Its words are, too, each once, behind the answers.
    assert_eq!(embedded.iter().filter(|one| *one == text).count(), 1, "{embedded:?}");
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
    for (method, path, body) in cases.clone() {
        let (status, text) = scene.ask(method, path, None, body).await;
        assert_eq!(status, 403, "{path}: {text}");
        assert!(text.contains("\"forbidden\""), "{path}: {text}");
    }
    assert_eq!(scene.ask(Method::GET, "/agent/v1/self", None, String::new()).await.0, 200);
    assert_eq!(scene.memories().await, Vec::<String>::new());
    // The control: with the check replaced by "allow" the same requests are let in, and the memory is made.
    scene.caller.services.tokens.allow_all();
    for (method, path, body) in cases {
        let (status, text) = scene.ask(method, path, None, body).await;
        assert_ne!(status, 403, "{path}: {text}");
    }
    assert_eq!(scene.memories().await, ["x"]);
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
    let both = json!({ "query": "x", "tiers": ["spirit", "working"] });
    assert_eq!(scene.post("/agent/v1/memory/recall", None, &both).await.0, 403);
    // The control, with the check replaced by "allow".
    scene.caller.services.tokens.allow_all();
    assert_eq!(scene.post("/agent/v1/memory/remember", None, &body).await.0, 200);
    assert_eq!(scene.post("/agent/v1/memory/recall", None, &both).await.0, 200);
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
    assert_eq!(scene.requests(), [Some("key-false".to_owned()), Some("key-true".to_owned())]);
}

#[tokio::test]
async fn every_finished_request_to_a_model_is_entered_once() {
    let scene = Scene::new(&ALL).await;
    let chat = |stream: bool, stop: &str| json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": stream, "stop": stop });
    for stream in [true, false] {
        assert_eq!(scene.post("/v1/chat/completions", None, &chat(stream, "x")).await.0, 200);
        // It follows the answer.
        tokio::time::timeout(Duration::from_secs(20), async {
            while scene.requests().len() != 1 + usize::from(!stream) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("entered");
    }
    assert_eq!(scene.post("/v1/embeddings", Some("e"), &json!({ "input": "a ship" })).await.0, 200);
    assert_eq!(scene.post("/v1/embeddings", Some("e"), &json!({ "input": "a ship" })).await.0, 200);
    assert_eq!(scene.post("/v1/chat/completions", None, &json!({ "messages": [] })).await.0, 400);
    let (_, text) = scene.post("/v1/chat/completions", Some("d"), &chat(true, "die")).await;
    assert!(!text.to_string().contains("[DONE]"), "{text}");
    assert_eq!(scene.requests(), [None, None, Some("e".to_owned())]);
}

#[tokio::test]
async fn the_end_of_an_answer_comes_after_it_was_entered() {
    let scene = Scene::new(&ALL).await;
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": true }).to_string();
    let request = Request::post("/v1/chat/completions").header("idempotency-key", "k").body(Body::from(body));
    let response = router_of(&scene.caller).oneshot(request.expect("a request")).await.expect("answered");
    let mut body = response.into_body();
    let mut text = String::new();
    while let Some(frame) = body.frame().await {
        let data = frame.expect("whole").into_data().expect("data");
        text.push_str(&String::from_utf8_lossy(&data));
        let ended = text.contains("\"finish_reason\":\"stop\"");
        assert_eq!(scene.requests().len(), usize::from(ended), "{text}");
    }
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
}

#[tokio::test]
async fn without_its_row_an_answer_has_no_end() {
    let scene = Scene::new(&ALL).await;
    let row = row_of(scene.caller.agent, scene.caller.services.db.owner());
    scene.caller.services.db.here().remove_agent(&row).expect("removed");
    let body = |stream: bool| json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": stream });
    let (_, text) = scene.post("/v1/chat/completions", Some("s"), &body(true)).await;
    assert!(!text.to_string().contains("[DONE]") && text.to_string().contains("not_found"), "{text}");
    let (status, answer) = scene.post("/v1/chat/completions", Some("w"), &body(false)).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("not_found")), "{answer}");
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
    let Ok(crate::agents::nerves::Felt::Hurt { agent, pain: felt }) = scene.felt.try_recv() else {
        panic!("nothing was felt");
    };
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
    let response = router_of(&scene.caller).oneshot(request.expect("a request")).await.expect("answered");
    assert_eq!(beat.pulse(0).open, 1, "the stream has not left yet");
    response.into_body().collect().await.expect("a body");
    assert_eq!(beat.pulse(0).open, 0);
    let (status, _) = scene.ask(Method::POST, "/agent/v1/self/progress", None, String::new()).await;
    assert_eq!(status, 204);
}

// --- tokens ----------------------------------------------------------------------------------------------

const MANIFEST: &str = "[agent]\nname = \"test\"\nexec = [\"/agent/run\"]\n[model]\nuse = \"default\"\n\
                        [messages]\naccept = true\n[memory]\nspirit = \"rw\"\n[agents]\nchildren = 2\ndepth = 1\n";

impl Scene {
    /// The caller is an agent of the store, and has its own token.
    async fn with_token() -> (Self, String) {
        let mut scene = Self::new(&[]).await;
        let agent = scene.caller.agent;
        let db = &scene.caller.services.db;
        db.here().remove_agent(&row_of(agent, db.owner())).expect("removed");
        let token = scene.add_agent(agent, "test").await;
        scene.caller.held = Arc::new(scene.caller.services.tokens.verify(&token, agent).expect("verified"));
        (scene, token)
    }

    async fn add_agent(&self, agent: AgentId, name: &str) -> String {
        let services = &self.caller.services;
        let row = AgentRow {
            v: 1,
            agent_id: agent,
            owner_id: services.db.owner(),
            name: name.parse().expect("a name"),
            version: "1".to_owned(),
            digest: String::new(),
            manifest: MANIFEST.to_owned(),
            uid: services.db.here().next_uid().expect("a uid"),
            wanted: true,
            bundled: false,
            restarts: 0,
            installed_unix_ms: 5,
            parent: None,
            arguments: Vec::new(),
        };
        let manifest = parse_manifest(MANIFEST).expect("a manifest");
        let token = services.tokens.minted(agent, &manifest, &Narrowing::default()).expect("minted");
        services.db.here().add_agent_with(&row, &token).expect("added");
        token.token
    }

    async fn with_header(&self, path: &str, token: &str) -> (u16, String) {
        let request = Request::builder().uri(path).header(TOKEN_HEADER, token);
        let request = request.body(Body::empty()).expect("a request");
        let response = router_of(&self.caller).oneshot(request).await.expect("answered");
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(bytes.to_vec()).expect("utf-8"))
    }

    /// What the agent's memory holds, by its own store and not by what it was told.
    async fn memories(&self) -> Vec<String> {
        let recall = json!({ "query": "x", "tiers": ["spirit"] });
        let recall: agentd_domain::agent_api::Recall = serde_json::from_value(recall).expect("a query");
        let found = self
            .caller
            .services
            .memories
            .recall(self.caller.agent, recall, None, None)
            .await
            .expect("recalled");
        found.hits.into_iter().map(|hit| hit.text).collect()
    }

    fn last_record(&self) -> Entry {
        self.caller.services.audit.reported().pop().expect("a record").0
    }
}

#[tokio::test]
async fn a_request_with_a_narrower_token_is_decided_by_that_one() {
    let (scene, token) = Scene::with_token().await;
    assert_eq!(scene.ask(Method::GET, "/v1/models", None, String::new()).await.0, 200);
    let (status, said) = scene.ask(Method::GET, "/agent/v1/token", None, String::new()).await;
    let shown: Shown = serde_json::from_str(&said).expect("a token");
    assert_eq!((status, &shown.token), (200, &token));
    let by = Narrowing { api: Some(["messages".to_owned()].into()), ..Narrowing::default() };
    let narrow = attenuate(&token, &by, &Fresh([9; 32])).expect("narrowed");
    assert_eq!(scene.with_header("/v1/models", &token).await.0, 200);
    assert_eq!(scene.with_header("/v1/models", &narrow).await.0, 403);
    assert_eq!(scene.last_record().right.as_deref(), Some("models"));
    assert_eq!(scene.with_header("/agent/v1/messages/next", &narrow).await.0, 204);
    let (_, said) = scene.with_header("/agent/v1/self", &narrow).await;
    assert!(said.contains("[\"messages\"]"), "{said}");
    // The control, with the check replaced by "allow".
    scene.caller.services.tokens.allow_all();
    assert_eq!(scene.with_header("/v1/models", &narrow).await.0, 200);
}

#[tokio::test]
async fn a_stolen_token_is_worth_nothing_and_is_recorded() {
    let (mut scene, _) = Scene::with_token().await;
    let theirs = scene.add_agent(AgentId(Uuid::from_u128(7)), "other").await;
    // The thief has no right of his own, so whatever he gets would come from the token.
    scene.caller.held = Arc::new(Verified { expires_unix_s: None, ..nothing(scene.caller.agent) });
    for (path, code) in [("/v1/models", "token_stolen"), ("/agent/v1/self", "token_stolen")] {
        let (status, said) = scene.with_header(path, &theirs).await;
        assert_eq!(status, 403, "{path}: {said}");
        assert!(said.contains(code), "{path}: {said}");
    }
    let record = scene.last_record();
    assert_eq!((record.action.as_str(), record.verdict), ("token.use", Verdict::Denied));
    assert_eq!((record.agent_id, record.run_id), (Some(scene.caller.agent), Some(scene.caller.run)));
    assert!(record.detail.starts_with("token_stolen"), "{}", record.detail);
    for bad in ["rubbish", &theirs[..80], &"A".repeat(40_000)] {
        let (status, said) = scene.with_header("/agent/v1/self", bad).await;
        assert!(status == 400 && said.contains("token_"), "{said}");
    }
    // The control, with the check replaced by "allow": the token is worth what it says.
    scene.caller.services.tokens.allow_all();
    let (status, said) = scene.with_header("/v1/models", &theirs).await;
    assert!(status == 200 && said.contains("tiny"), "{said}");
}

#[tokio::test]
async fn a_revoked_token_denies_every_call_at_once() {
    let (scene, _) = Scene::with_token().await;
    let services = &scene.caller.services;
    let id = scene.caller.held.revocation_ids.first().expect("an id").clone();
    assert_eq!(scene.ask(Method::GET, "/v1/models", None, String::new()).await.0, 200);
    services.tokens.revoke(id, "owner", "a test").await.expect("revoked");
    for path in ["/v1/models", "/agent/v1/self", "/agent/v1/token", "/agent/v1/agents", "/agent/v1/nowhere"] {
        let (status, said) = scene.ask(Method::GET, path, None, String::new()).await;
        assert_eq!(status, 403, "{path}: {said}");
        assert!(said.contains("token_revoked"), "{path}: {said}");
    }
    assert!(scene.caller.may("messages").is_err(), "also where a request was let in before");
    assert_eq!(scene.last_record().detail, "token_revoked");
    // The control, with the check replaced by "allow".
    services.tokens.allow_all();
    assert_eq!(scene.ask(Method::GET, "/v1/models", None, String::new()).await.0, 200);
}

#[tokio::test]
async fn a_token_that_is_over_its_time_denies_every_call() {
    let (mut scene, _) = Scene::with_token().await;
    let held = Verified { expires_unix_s: Some(1), ..(*scene.caller.held).clone() };
    scene.caller.held = Arc::new(held);
    let (status, said) = scene.ask(Method::GET, "/agent/v1/self", None, String::new()).await;
    assert!(status == 403 && said.contains("token_expired"), "{said}");
    // The control, with the check replaced by "allow".
    scene.caller.services.tokens.allow_all();
    assert_eq!(scene.ask(Method::GET, "/agent/v1/self", None, String::new()).await.0, 200);
}

#[tokio::test]
async fn without_the_right_there_are_no_children() {
    let scene = Scene::new(&ALL).await;
    for (method, path) in [
        (Method::POST, "/agent/v1/agents"),
        (Method::GET, "/agent/v1/agents"),
        (Method::GET, "/agent/v1/agents/01900000-0000-7000-8000-000000000001"),
        (Method::DELETE, "/agent/v1/agents/01900000-0000-7000-8000-000000000001"),
    ] {
        let (status, said) = scene.ask(method, path, None, "{}".to_owned()).await;
        assert_eq!(status, 403, "{path}: {said}");
    }
    assert_eq!(scene.last_record().right.as_deref(), Some("agents.start"));
    // The control, with the check replaced by "allow": it is let in as far as the agents' loop, which does not run.
    scene.caller.services.tokens.allow_all();
    let (status, said) = scene.ask(Method::GET, "/agent/v1/agents", None, String::new()).await;
    assert!(status == 503 && said.contains("agents_loop"), "{status} {said}");
}

/// `scripts/bench rights` runs this with optimisation and says so; otherwise few rounds show that it works.
#[tokio::test(flavor = "multi_thread")]
async fn rights_in_numbers() {
    let (scene, token) = Scene::with_token().await;
    let (services, caller) = (&scene.caller.services, &scene.caller);
    let bench = std::env::var_os("AGENTD_BENCH").is_some();
    let (checks, shows, revocations) = if bench { (200_000, 2_000, 50) } else { (200, 5, 3) };
    // A thousand revocations of others: the look-up must not depend on them.
    for number in 0..if bench { 1_000 } else { 10_u128 } {
        let id = RevocationId(format!("{number:0128x}"));
        services.tokens.revoke(id, "owner", "").await.expect("revoked");
    }
    let percentiles = |name: &str, mut spans: Vec<u128>| {
        spans.sort_unstable();
        let at = |share: f64| spans[((spans.len() - 1) as f64 * share) as usize] as f64 / 1e3;
        println!("MEASURED {name} {:.3} {:.3}", at(0.5), at(0.99));
    };
    let measured = |rounds: usize, call: &dyn Fn()| -> Vec<u128> {
        let once = |_| {
            let begun = std::time::Instant::now();
            call();
            begun.elapsed().as_nanos()
        };
        (0..rounds).map(once).collect()
    };
    percentiles("check", measured(checks, &|| caller.may("models").expect("allowed")));
    percentiles(
        "present",
        measured(shows, &|| drop(services.tokens.verify(&token, caller.agent).expect("holds"))),
    );

    let (mut acknowledged, mut late) = (Vec::new(), Vec::new());
    for round in 0..revocations {
        let by = Narrowing::default();
        let narrow = attenuate(&token, &by, &Fresh([round; 32])).expect("narrowed");
        let held = services.tokens.verify(&narrow, caller.agent).expect("holds");
        let id = held.revocation_ids.last().expect("an id").clone();
        let (asking, over) =
            (Caller { held: Arc::new(held), ..caller.clone() }, Arc::new(AtomicBool::new(false)));
        let until = over.clone();
        let asker = std::thread::spawn(move || {
            let mut allowed = None;
            while !until.load(Ordering::Relaxed) {
                let begun = std::time::Instant::now();
                if asking.may("models").is_ok() {
                    allowed = Some(begun);
                }
            }
            allowed
        });
        tokio::time::sleep(Duration::from_millis(2)).await;
        let begun = std::time::Instant::now();
        services.tokens.revoke(id, "owner", "").await.expect("revoked");
        let answered = std::time::Instant::now();
        tokio::time::sleep(Duration::from_millis(5)).await;
        over.store(true, Ordering::Relaxed);
        let allowed = asker.join().expect("no panic");
        acknowledged.push((answered - begun).as_nanos());
        // A busy machine may have started the asker only now: then nothing was allowed.
        late.push(allowed.map_or(0, |at| at.saturating_duration_since(answered).as_nanos()));
    }
    percentiles("revoke", acknowledged);
    // What is acknowledged holds: no call is begun after it and allowed.
    assert!(late.iter().all(|span| *span == 0), "{late:?}");
    percentiles("late", late);
}
