//! All tiers over HTTP, as runs use them.

mod isolation;

use crate::agent_api::Caller;
use crate::agent_api::tests::{Scene, rights_of, router_of};
use crate::memory::Writer;
use crate::tokens::nothing;
use agentd_domain::ids::{AgentId, RunId};
use agentd_domain::memory_api::{Access, Document, Order, Outcome, Quota};
use agentd_domain::token::Verified;
use axum::body::Body;
use axum::http::{Method, Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tower::ServiceExt;
use uuid::Uuid;

const TIERS: [&str; 4] = ["working", "active", "spirit", "knowledge"];

fn all_rights() -> Vec<String> {
    let deeds = ["recall", "remember", "correct", "forget"];
    TIERS.iter().flat_map(|tier| deeds.map(|deed| format!("memory.{deed}.{tier}"))).collect()
}

pub(super) async fn scene() -> Scene {
    let rights = all_rights();
    let rights: Vec<&str> = rights.iter().map(String::as_str).collect();
    Scene::new(&rights).await
}

/// Another run, of this agent or of another, in the same agentd.
pub(super) fn other(scene: &Scene, agent: u128, run: u128) -> Caller {
    let agent = AgentId(Uuid::from_u128(agent));
    std::fs::create_dir_all(scene.folder.path().join(agent.to_string())).expect("made");
    let rights = scene.caller.held.rights.clone();
    let held = Verified { rights, expires_unix_s: None, ..nothing(agent) };
    Caller { agent, run: RunId(Uuid::from_u128(run)), held: Arc::new(held), ..scene.caller.clone() }
}

async fn ask(caller: &Caller, method: Method, path: &str, body: impl Into<Body>) -> (u16, Value) {
    let request = Request::builder().method(method).uri(format!("/agent/v1/memory/{path}"));
    let request = request.body(body.into()).expect("a request");
    let response = router_of(caller).oneshot(request).await.expect("answered");
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

async fn get(caller: &Caller, path: &str) -> Value {
    let (status, answer) = ask(caller, Method::GET, path, Body::empty()).await;
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

async fn post(caller: &Caller, path: &str, body: Value) -> (u16, Value) {
    ask(caller, Method::POST, path, body.to_string()).await
}

async fn tell(caller: &Caller, body: Value) -> String {
    let (status, answer) = post(caller, "remember", body.clone()).await;
    assert_eq!(status, 200, "{body}: {answer}");
    answer["id"].as_str().expect("an id").to_owned()
}

fn texts(answer: &Value, list: &str) -> Vec<String> {
    let all = answer[list].as_array().expect("a list");
    all.iter().map(|one| one["text"].as_str().expect("a text").to_owned()).collect()
}

async fn until<T, F: Future<Output = Option<T>>>(mut look: impl FnMut() -> F) -> T {
    tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("it came")
}

#[tokio::test]
async fn the_log_of_a_run_is_read_back_word_for_word_and_searched() {
    let scene = scene().await;
    let (first, second) = (scene.caller.clone(), other(&scene, 1, 77));
    for n in 0..5 {
        tell(&first, json!({ "tier": "working", "text": format!("turn {n}:  two  spaces stay") })).await;
    }
    tell(&second, json!({ "tier": "working", "text": "another run" })).await;
    let log = get(&first, "working?limit=3").await;
    let expected: Vec<String> = [4, 3, 2].map(|n| format!("turn {n}:  two  spaces stay")).into();
    assert_eq!(texts(&log, "records"), expected);
    assert_eq!(log["records"][0]["session"], json!(first.run.to_string()), "the run's own id");
    let rest =
        get(&first, &format!("working?limit=3&before={}", log["before"].as_str().expect("more"))).await;
    assert_eq!((texts(&rest, "records").len(), &rest["before"]), (2, &Value::Null));
    assert_eq!(texts(&get(&first, "working?run=all").await, "records").len(), 6);
    assert_eq!(texts(&get(&second, "working").await, "records"), ["another run"]);
    let (_, found) =
        post(&first, "recall", json!({ "query": "turn spaces", "tiers": ["working"], "k": 2 })).await;
    assert_eq!(found["hits"].as_array().map(Vec::len), Some(2), "{found}");
    // The session is agentd's word: there is no field for it.
    let body = json!({ "tier": "working", "text": "x", "session": "another" });
    assert_eq!(post(&first, "remember", body).await.0, 400);
}

#[tokio::test]
async fn a_block_is_written_over_what_its_writer_has_seen() {
    let scene = scene().await;
    let put = |version: u64, text: &str| json!({ "text": text, "version": version }).to_string();
    let write = |body: String| ask(&scene.caller, Method::PUT, "blocks/goals", body);
    assert_eq!(write(put(0, "learn to sail")).await.1["version"], 1);
    // A retry after a broken connection is the same writing.
    assert_eq!(write(put(0, "learn to sail")).await.1["version"], 1);
    let (status, conflict) = write(put(0, "learn to fly")).await;
    assert_eq!((status, &conflict["code"]), (409, &json!("conflict")), "{conflict}");
    assert_eq!(
        (&conflict["current"]["version"], &conflict["current"]["text"]),
        (&json!(1), &json!("learn to sail"))
    );
    assert_eq!(write(put(1, "learn to fly")).await.1["version"], 2);
    assert_eq!(get(&scene.caller, "blocks/goals").await["text"], "learn to fly");
    let prompt = get(&scene.caller, "prompt").await;
    assert_eq!(prompt["text"], "<block key=\"goals\" version=\"2\">\nlearn to fly\n</block>\n");
    let (status, conflict) =
        ask(&scene.caller, Method::DELETE, "blocks/goals?version=1", Body::empty()).await;
    assert_eq!((status, &conflict["current"]["version"]), (409, &json!(2)));
    for _ in 0..2 {
        assert_eq!(ask(&scene.caller, Method::DELETE, "blocks/goals?version=2", Body::empty()).await.0, 204);
    }
    assert_eq!(ask(&scene.caller, Method::GET, "blocks/goals", Body::empty()).await.0, 404);
    let (status, full) = write(put(0, &"x".repeat(33 * 1024))).await;
    assert_eq!((status, &full["code"]), (413, &json!("blocks_full")), "{full}");
}

#[tokio::test]
async fn a_memory_is_corrected_pinned_forgotten_and_restored() {
    let scene = scene().await;
    let caller = &scene.caller;
    let id = tell(
        caller,
        json!({ "tier": "spirit", "text": "my boat is red", "role": "fact", "half_life_days": 7.5 }),
    )
    .await;
    let shown = get(caller, &format!("records/{id}")).await;
    assert_eq!((&shown["half_life_days"], &shown["state"]), (&json!(7.5), &json!("live")));
    let path = format!("records/{id}/correct");
    let correct = |text: &str| post(caller, &path, json!({ "text": text }));
    let corrected = post(caller, &path, json!({ "text": "my boat is blue" })).await.1["id"].clone();
    assert_eq!(correct("my boat is blue").await.1["id"], corrected, "a retry");
    assert_eq!(correct("my boat is green").await.0, 409);
    let new = corrected.as_str().expect("an id");
    let shown = get(caller, &format!("records/{new}")).await;
    assert_eq!(
        (&shown["source"]["kind"], &shown["trust"]),
        (&json!("agent"), &json!(70)),
        "its own word, no more"
    );
    let history = get(caller, &format!("records/{id}/history")).await;
    assert_eq!(texts(&history, "chain"), ["my boat is red", "my boat is blue"]);
    assert_eq!(history["deeds"][0]["why"], "corrected");
    assert_eq!(post(caller, &format!("records/{new}/pin"), json!({ "pinned": true })).await.0, 204);
    assert_eq!(get(caller, &format!("records/{new}")).await["pinned"], true);
    assert_eq!(post(caller, &format!("records/{new}/forget"), Value::Null).await.0, 204);
    let (_, found) = post(caller, "recall", json!({ "query": "boat" })).await;
    assert_eq!(texts(&found, "hits"), Vec::<String>::new());
    assert_eq!(texts(&get(caller, "records?state=forgotten").await, "records"), ["my boat is blue"]);
    let deeds = get(caller, "journal?limit=2").await;
    assert_eq!(
        (&deeds["deeds"][0]["deed"], &deeds["deeds"][0]["why"]),
        (&json!("forgotten"), &json!("asked"))
    );
    assert_eq!(post(caller, &format!("records/{new}/restore"), Value::Null).await.0, 204);
    let (_, found) = post(caller, "recall", json!({ "query": "boat" })).await;
    assert_eq!(texts(&found, "hits"), ["my boat is blue"]);
}

#[tokio::test]
async fn an_agent_does_not_put_its_word_over_a_person_s() {
    let scene = scene().await;
    let caller = &scene.caller;
    let told = json!({ "tier": "spirit", "text": "I am allergic to nuts", "source": { "kind": "user" } });
    let id = tell(caller, told).await;
    let (status, refused) =
        post(caller, &format!("records/{id}/correct"), json!({ "text": "I love nuts" })).await;
    assert_eq!((status, &refused["code"]), (400, &json!("untrusted_source")), "{refused}");
    let order = Order::Correct(id.parse().expect("an id"), "I am allergic to peanuts".to_owned());
    let outcome = caller.services.memories.carry_out(caller.agent, order).await.expect("corrected");
    assert!(matches!(outcome, Outcome::Remembered(_)), "{outcome:?}");
}

#[tokio::test]
async fn a_question_about_then_is_answered_as_of_then() {
    let scene = scene().await;
    let caller = &scene.caller;
    let claim = json!({ "subject": "Ana", "predicate": "lives in", "functional": true });
    for (at, town) in [(1_000, "Lisbon"), (2_000, "Porto")] {
        let text = format!("Ana lives in {town}");
        tell(
            caller,
            json!({ "tier": "spirit", "text": text, "role": "fact", "claim": claim, "event_unix_ms": at }),
        )
        .await;
    }
    let asked = |as_of: Value| {
        post(caller, "recall", json!({ "query": "where does Ana live", "as_of_unix_ms": as_of }))
    };
    assert_eq!(texts(&asked(Value::Null).await.1, "hits"), ["Ana lives in Porto"]);
    assert_eq!(texts(&asked(json!(1_500)).await.1, "hits"), ["Ana lives in Lisbon"]);
    assert_eq!(texts(&asked(json!(500)).await.1, "hits"), Vec::<String>::new());
    assert_eq!(asked(json!("yesterday")).await.0, 400);
}

#[tokio::test]
async fn each_deed_in_each_tier_needs_its_own_right() {
    let scene = scene().await;
    let full = scene.caller.clone();
    let mut ids = Vec::new();
    for tier in ["working", "spirit"] {
        ids.push((tier, tell(&full, json!({ "tier": tier, "text": format!("a word in {tier}") })).await));
    }
    let mut cases = vec![
        (Method::GET, "working".to_owned(), Value::Null, "memory.recall.working"),
        (Method::GET, "blocks".to_owned(), Value::Null, "memory.recall.active"),
        (Method::GET, "blocks/a".to_owned(), Value::Null, "memory.recall.active"),
        (Method::GET, "prompt".to_owned(), Value::Null, "memory.recall.active"),
        (Method::PUT, "blocks/a".to_owned(), json!({ "text": "x" }), "memory.remember.active"),
        (Method::DELETE, "blocks/a?version=1".to_owned(), Value::Null, "memory.forget.active"),
        (Method::GET, "records?tier=spirit".to_owned(), Value::Null, "memory.recall.spirit"),
        (Method::GET, "journal".to_owned(), Value::Null, "memory.recall.spirit"),
        (Method::GET, "knowledge".to_owned(), Value::Null, "memory.recall.knowledge"),
        (
            Method::POST,
            "remember".to_owned(),
            json!({ "tier": "knowledge", "text": "x" }),
            "memory.remember.knowledge",
        ),
        (
            Method::POST,
            "knowledge/a/documents".to_owned(),
            json!({ "title": "t", "text": "x" }),
            "memory.remember.knowledge",
        ),
        (Method::DELETE, "knowledge/a/documents/x".to_owned(), Value::Null, "memory.forget.knowledge"),
        (
            Method::POST,
            "recall".to_owned(),
            json!({ "query": "x", "tiers": ["knowledge"] }),
            "memory.recall.knowledge",
        ),
    ];
    let deeds = [
        ("correct", json!({ "text": "y" })),
        ("pin", json!({ "pinned": false })),
        ("forget", Value::Null),
        ("restore", Value::Null),
    ];
    let rights: Vec<(String, String, Value, String)> = ids
        .iter()
        .flat_map(|(tier, id)| {
            deeds.clone().map(|(deed, body)| {
                let right = if matches!(deed, "correct" | "pin") { "correct" } else { "forget" };
                (format!("records/{id}/{deed}"), (*tier).to_owned(), body, format!("memory.{right}.{tier}"))
            })
        })
        .collect();
    for (path, _, body, right) in &rights {
        cases.push((Method::POST, path.clone(), body.clone(), right));
    }
    for (method, path, body, right) in cases {
        let mut rights = all_rights();
        rights.retain(|one| one != right);
        let held = Verified {
            rights: rights_of(&rights.iter().map(String::as_str).collect::<Vec<_>>()),
            ..(*full.held).clone()
        };
        let without = Caller { held: Arc::new(held), ..full.clone() };
        let (status, answer) = ask(&without, method.clone(), &path, body.to_string()).await;
        assert_eq!((status, &answer["code"]), (403, &json!("forbidden")), "{path} without {right}: {answer}");
        assert!(answer["why"].as_str().is_some_and(|why| why.contains(right)), "{path}: {answer}");
        // With it the same request is let in; whether there is something to do is another matter.
        assert_ne!(ask(&full, method, &path, body.to_string()).await.0, 403, "{path}");
    }
}

#[tokio::test]
async fn another_agent_finds_nothing_by_id_or_by_question() {
    let scene = scene().await;
    let (mine, theirs) = (scene.caller.clone(), other(&scene, 2, 3));
    let id = tell(&mine, json!({ "tier": "spirit", "text": "the safe opens with 4711" })).await;
    ask(&mine, Method::PUT, "blocks/plan", json!({ "text": "empty the safe" }).to_string()).await;
    assert_eq!(ask(&theirs, Method::GET, &format!("records/{id}"), Body::empty()).await.0, 404);
    assert_eq!(ask(&theirs, Method::GET, &format!("records/{id}/history"), Body::empty()).await.0, 404);
    for (deed, body) in [
        ("correct", json!({ "text": "x" })),
        ("pin", json!({ "pinned": true })),
        ("forget", Value::Null),
        ("restore", Value::Null),
    ] {
        assert_eq!(post(&theirs, &format!("records/{id}/{deed}"), body).await.0, 404, "{deed}");
    }
    let (_, found) =
        post(&theirs, "recall", json!({ "query": "safe", "tiers": ["spirit", "working"] })).await;
    assert_eq!(texts(&found, "hits"), Vec::<String>::new());
    assert_eq!(ask(&theirs, Method::GET, "blocks/plan", Body::empty()).await.0, 404);
    // Evidence of another agent's is no evidence.
    let insight = json!({ "tier": "spirit", "text": "so it is", "role": "insight", "evidence": [id] });
    assert_eq!(post(&theirs, "remember", insight).await.0, 404);
    assert_eq!(get(&mine, &format!("records/{id}")).await["text"], "the safe opens with 4711");
}

#[tokio::test]
async fn what_was_recalled_is_strengthened_and_is_not_told_again() {
    let scene = scene().await;
    let caller = &scene.caller;
    let text = "my grandfather built a ship in Kiel and it sank on its first voyage";
    let id = tell(caller, json!({ "tier": "spirit", "text": text })).await;
    let (_, found) = post(caller, "recall", json!({ "query": "ship" })).await;
    assert_eq!(texts(&found, "hits"), [text]);
    let uses = || async {
        let shown = get(caller, &format!("records/{id}")).await;
        (shown["uses"] == json!(1)).then_some(())
    };
    until(uses).await;
    for echo in [
        json!({ "tier": "spirit", "text": text }),
        json!({ "tier": "spirit", "text": format!("Note: {text}."), "source": { "kind": "tool" } }),
    ] {
        let (status, refused) = post(caller, "remember", echo).await;
        assert_eq!((status, &refused["code"]), (400, &json!("recalled_text")), "{refused}");
    }
    // In the log it stays, under its own name.
    tell(caller, json!({ "tier": "working", "text": text })).await;
    assert_eq!(get(caller, "working").await["records"][0]["source"]["kind"], "recall");
}

#[tokio::test]
async fn a_run_that_ends_leaves_what_is_worth_keeping() {
    let scene = scene().await;
    let caller = &scene.caller;
    for text in ["hello there", "remember that I prefer trains to planes, always"] {
        tell(caller, json!({ "tier": "working", "text": text, "source": { "kind": "user" } })).await;
    }
    let memories = &caller.services.memories;
    memories.end_run(caller.agent, caller.run);
    let promoted = || async {
        let kept = texts(&get(caller, "records").await, "records");
        (!kept.is_empty()).then_some(kept)
    };
    assert_eq!(until(promoted).await, ["remember that I prefer trains to planes, always"]);
    let journal = get(caller, "journal").await;
    assert_eq!(
        (&journal["deeds"][0]["deed"], &journal["deeds"][0]["why"]),
        (&json!("promoted"), &json!("salient"))
    );
}

#[tokio::test]
async fn a_run_whose_end_nobody_told_is_settled_by_the_next() {
    let scene = scene().await;
    let (first, second) = (scene.caller.clone(), other(&scene, 1, 9));
    let text = "remember that I prefer trains to planes, always";
    tell(&first, json!({ "tier": "working", "text": text, "source": { "kind": "user" } })).await;
    let memories = &first.services.memories;
    // Served again after agentd was restarted: the same run goes on.
    memories.begin_run(first.agent, first.run, first.held.rights.clone()).await;
    assert_eq!(texts(&get(&first, "records").await, "records"), Vec::<String>::new());
    memories.begin_run(second.agent, second.run, second.held.rights.clone()).await;
    assert_eq!(texts(&get(&first, "records").await, "records"), [text]);
    // A run of an agent without a memory makes none.
    let blank = other(&scene, 5, 6);
    memories.begin_run(blank.agent, blank.run, blank.held.rights.clone()).await;
    assert!(!scene.folder.path().join(blank.agent.to_string()).join("memory.redb").exists());
}

#[tokio::test]
async fn the_same_request_in_another_run_is_the_same_memory() {
    let scene = scene().await;
    let body = json!({ "tier": "spirit", "text": "a plum" });
    let key = Some("message-7");
    let first = scene.post("/agent/v1/memory/remember", key, &body).await;
    let next = other(&scene, 1, 50);
    let request = Request::post("/agent/v1/memory/remember").header("idempotency-key", "message-7");
    let response = router_of(&next).oneshot(request.body(Body::from(body.to_string())).expect("a request"));
    let bytes = response.await.expect("answered").into_body().collect().await.expect("a body").to_bytes();
    let again: Value = serde_json::from_slice(&bytes).expect("JSON");
    assert_eq!(again["id"], first.1["id"], "{again}");
}

#[tokio::test]
async fn a_token_s_budget_is_kept_and_says_what_would_fit() {
    use agentd_domain::rights::Limit;
    let scene = scene().await;
    let mut rights = scene.caller.held.rights.clone();
    rights.limits.insert(Limit::StoreBytes, 40_000);
    rights.limits.insert(Limit::StoreRecords, 80);
    let key = agentd_capability::token::RootKey::from_secret(&[7; 32]).expect("a key");
    let grant = agentd_domain::token::Grant {
        holder: scene.caller.agent,
        rights: rights.clone(),
        expires_unix_s: None,
    };
    let token = agentd_capability::token::mint(&key, &grant, &agentd_capability::token::Fresh([1; 32]))
        .expect("minted");
    let row = crate::store::TokenRow { v: 1, token, minted_unix_ms: 0, asked: None };
    scene.caller.services.db.here().replace_token(scene.caller.agent, &row, None).expect("stored");
    let held = Verified { rights, ..(*scene.caller.held).clone() };
    let caller = &Caller { held: Arc::new(held), ..scene.caller.clone() };
    let within = |usage: &Value| {
        let sum = |what: &str| {
            usage["tiers"]
                .as_array()
                .expect("tiers")
                .iter()
                .map(|tier| tier[what].as_u64().expect("a number"))
                .sum::<u64>()
        };
        assert!(sum("bytes") <= 40_000 && sum("records") <= 80, "{usage}");
    };
    let mut refused = None;
    for n in 0..60 {
        let told = json!({ "tier": "spirit", "text": format!("pinned thought {n} {}", "word ".repeat(150)), "pinned": true });
        let (status, answer) = post(caller, "remember", told).await;
        within(&get(caller, "usage").await);
        if status != 200 {
            refused = Some((status, answer));
            break;
        }
    }
    let (status, answer) = refused.expect("the budget ends");
    assert_eq!((status, &answer["code"]), (413, &json!("memory_full")), "{answer}");
    let fix = answer["fix"].as_str().expect("a fix");
    let most: usize = fix
        .split("at most ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .and_then(|n| n.parse().ok())
        .expect(fix);
    // What is said to fit does, and one byte more does not.
    let of = |bytes: usize| json!({ "tier": "spirit", "text": "z".repeat(bytes), "pinned": true });
    assert_eq!(post(caller, "remember", of(most + 1)).await.0, 413);
    assert_eq!(post(caller, "remember", of(most)).await.0, 200);
    within(&get(caller, "usage").await);
    // The log is a ring: it turns, and stays within.
    for n in 0..40 {
        tell(caller, json!({ "tier": "working", "text": format!("line {n} {}", "w".repeat(400)) })).await;
    }
    within(&get(caller, "usage").await);
}

pub(super) async fn made(scene: &Scene, name: &str, quota: Quota) {
    let memories = &scene.caller.services.memories;
    memories.set_collection(name.parse().expect("a name"), quota).await.expect("made");
}

pub(super) async fn grant(caller: &Caller, name: &str, access: Option<Access>) {
    let memories = &caller.services.memories;
    memories.grant(name.parse().expect("a name"), caller.agent, access).await.expect("granted");
}

fn document(title: &str, text: &str) -> Document {
    Document { title: title.to_owned(), text: text.to_owned(), source: None, event_unix_ms: None }
}

#[tokio::test]
async fn knowledge_is_shared_by_grant_and_by_nothing_else() {
    let scene = scene().await;
    let (reader, writer, nobody) = (scene.caller.clone(), other(&scene, 2, 3), other(&scene, 3, 4));
    made(&scene, "house", Quota::default()).await;
    made(&scene, "secrets", Quota::default()).await;
    grant(&reader, "house", Some(Access::Read)).await;
    grant(&writer, "house", Some(Access::ReadWrite)).await;
    grant(&nobody, "secrets", Some(Access::Read)).await;
    let long = format!(
        "{}\n\nThe boiler is serviced by Mrs. Brandt every March.",
        "The house was built long ago. ".repeat(80)
    );
    let add = |caller: &Caller, name: &str| {
        let body = json!({ "title": "manual", "text": long }).to_string();
        let (caller, path) = (caller.clone(), format!("knowledge/{name}/documents"));
        async move { ask(&caller, Method::POST, &path, body).await }
    };
    let (status, added) = add(&writer, "house").await;
    assert_eq!(status, 200, "{added}");
    assert!(added["parts"].as_u64().is_some_and(|parts| parts >= 3), "{added}");
    assert_eq!(add(&reader, "house").await.0, 404, "it may only read");
    assert_eq!(add(&writer, "secrets").await.0, 404);
    let fact = json!({ "tier": "knowledge", "collection": "house", "text": "The attic key hangs behind the clock.", "role": "fact" });
    tell(&writer, fact.clone()).await;
    assert_eq!(post(&nobody, "remember", fact).await.0, 404);
    let asked = |caller: &Caller, body: Value| {
        let caller = caller.clone();
        async move { post(&caller, "recall", body).await }
    };
    let question = json!({ "query": "who services the boiler", "tiers": ["knowledge"] });
    for caller in [&reader, &writer] {
        let (_, found) = asked(caller, question.clone()).await;
        assert!(texts(&found, "hits")[0].contains("Mrs. Brandt"), "{found}");
        assert_eq!(
            found["hits"][0]["source"]["ref"].as_str().map(|text| text.starts_with("manual, part ")),
            Some(true)
        );
    }
    assert_eq!(texts(&asked(&nobody, question.clone()).await.1, "hits"), Vec::<String>::new());
    let named = json!({ "query": "boiler", "tiers": ["knowledge"], "collections": ["house"] });
    assert_eq!(asked(&nobody, named.clone()).await.0, 404, "as one that is not there");
    // With its own memory in one answer.
    tell(&reader, json!({ "tier": "spirit", "text": "the boiler hums at night" })).await;
    let both = json!({ "query": "boiler", "tiers": ["knowledge", "spirit"], "k": 10 });
    let (_, found) = asked(&reader, both).await;
    let tiers: Vec<&str> = found["hits"]
        .as_array()
        .expect("hits")
        .iter()
        .map(|hit| hit["tier"].as_str().expect("a tier"))
        .collect();
    assert!(tiers.contains(&"spirit") && tiers.contains(&"knowledge"), "{found}");
    // Its list shows its own grant alone.
    let listed = get(&reader, "knowledge").await;
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(listed[0]["grants"], json!({ reader.agent.to_string(): "read" }));
    // Taken back: the next request finds nothing.
    grant(&reader, "house", None).await;
    assert_eq!(asked(&reader, named).await.0, 404);
    assert_eq!(texts(&asked(&reader, question).await.1, "hits"), Vec::<String>::new());
    let id = added["document"].as_str().expect("an id");
    assert_eq!(
        ask(&writer, Method::DELETE, &format!("knowledge/house/documents/{id}"), Body::empty()).await.0,
        204
    );
    assert_eq!(
        ask(&writer, Method::DELETE, &format!("knowledge/house/documents/{id}"), Body::empty()).await.0,
        404
    );
    assert_eq!(get(&writer, "knowledge").await[0]["records"], 1, "the fact stays");
}

#[tokio::test]
async fn a_document_that_does_not_fit_leaves_nothing_behind() {
    let scene = scene().await;
    made(&scene, "small", Quota { bytes: 6_000, records: 1_000 }).await;
    let memories = &scene.caller.services.memories;
    let name = || "small".parse().expect("a name");
    let text = |n: usize| "Some sentence of a document. ".repeat(n);
    let added =
        memories.add_document(Writer::Owner, name(), document("a", &text(40)), None).await.expect("added");
    let held = memories.collections().await.expect("listed");
    let refused = memories.add_document(Writer::Owner, name(), document("b", &text(400)), None).await;
    let report = refused.expect_err("too much");
    assert_eq!(report.code, "memory_full");
    assert!(report.fix.contains("a text of at most "), "{report}");
    assert_eq!(memories.collections().await.expect("listed"), held, "{added:?}");
    // A retry of what was added is the same document.
    let key = || Some("k".to_owned());
    made(&scene, "small", Quota { bytes: 60_000, records: 1_000 }).await;
    let first =
        memories.add_document(Writer::Owner, name(), document("c", &text(100)), key()).await.expect("added");
    let held = memories.collections().await.expect("listed");
    let again =
        memories.add_document(Writer::Owner, name(), document("c", &text(100)), key()).await.expect("again");
    assert_eq!((first, held), (again, memories.collections().await.expect("listed")));
    memories.remove_collection(name()).await.expect("removed");
    let left: Vec<_> = std::fs::read_dir(scene.folder.path().join("knowledge")).expect("a folder").collect();
    assert!(left.is_empty(), "store and key are gone: {left:?}");
}

#[tokio::test]
async fn bad_bodies_are_refused_in_words_and_nothing_is_stored() {
    let scene = scene().await;
    let caller = &scene.caller;
    let hundred_megabytes = || {
        let piece = axum::body::Bytes::from(vec![b'x'; 1 << 20]);
        Body::from_stream(futures::stream::iter(
            (0..100).map(move |_| Ok::<_, std::io::Error>(piece.clone())),
        ))
    };
    let utf8 = |bytes: &[u8]| Body::from(bytes.to_vec());
    let cases: Vec<(Method, &str, Body, u16, &str)> = vec![
        (Method::POST, "remember", hundred_megabytes(), 413, "too_large"),
        (Method::POST, "recall", hundred_megabytes(), 413, "too_large"),
        (Method::PUT, "blocks/a", hundred_megabytes(), 413, "too_large"),
        (Method::POST, "knowledge/a/documents", hundred_megabytes(), 413, "too_large"),
        (
            Method::POST,
            "remember",
            utf8(b"{\"tier\":\"spirit\",\"text\":\"\xff\xfe\"}"),
            400,
            "body_not_utf8",
        ),
        (Method::POST, "recall", utf8(b"{\"query\":\"\xc3\x28\"}"), 400, "body_not_utf8"),
        (Method::PUT, "blocks/a", utf8(b"\x80"), 400, "body_not_utf8"),
        (
            Method::POST,
            "remember",
            Body::from(json!({ "tier": "spirit", "text": "x".repeat(33 * 1024) }).to_string()),
            413,
            "too_large",
        ),
        (
            Method::POST,
            "remember",
            Body::from(json!({ "tier": "spirit", "text": " \n" }).to_string()),
            400,
            "text_empty",
        ),
        (Method::POST, "remember", Body::from(r#"{"tier":"spirit","text":"\ud800"}"#), 400, "body_invalid"),
        (
            Method::POST,
            "remember",
            Body::from(json!({ "tier": "codegraph", "text": "x" }).to_string()),
            403,
            "forbidden",
        ),
        (
            Method::POST,
            "remember",
            Body::from(json!({ "tier": "spirit", "text": "x", "half_life_days": -1 }).to_string()),
            400,
            "half_life",
        ),
        (
            Method::POST,
            "remember",
            Body::from(json!({ "tier": "spirit", "text": "x", "role": "king" }).to_string()),
            400,
            "role_unknown",
        ),
        (
            Method::POST,
            "recall",
            Body::from(json!({ "query": "x".repeat(9 * 1024) }).to_string()),
            413,
            "too_large",
        ),
        (
            Method::POST,
            "recall",
            Body::from(json!({ "query": "x", "k": 1000 }).to_string()),
            400,
            "k_out_of_range",
        ),
        (Method::POST, "recall", Body::from("[".repeat(100_000)), 400, "body_invalid"),
        (Method::POST, "recall", Body::from("7"), 400, "body_invalid"),
        (
            Method::PUT,
            &*format!("blocks/{}", "k".repeat(65)),
            Body::from(r#"{"text":"x"}"#),
            413,
            "too_large",
        ),
        (Method::GET, "records/../../agents", Body::empty(), 404, "not_found"),
        (Method::GET, "records/%ff%fe", Body::empty(), 400, ""),
        (Method::GET, "records?limit=-1", Body::empty(), 400, "query_malformed"),
        (Method::GET, "records?agent=2", Body::empty(), 400, "query_malformed"),
        (
            Method::GET,
            "working?run=00000000-0000-0000-0000-000000000003",
            Body::empty(),
            400,
            "query_malformed",
        ),
        (Method::DELETE, "blocks/a", Body::empty(), 400, "query_malformed"),
    ]
    .into_iter()
    .map(|(method, path, body, status, code)| {
        (method, Box::leak(path.to_owned().into_boxed_str()) as &str, body, status, code)
    })
    .collect();
    for (method, path, body, expected, code) in cases {
        let (status, answer) = ask(caller, method, path, body).await;
        assert_eq!(status, expected, "{path}: {answer}");
        if !code.is_empty() {
            assert_eq!(answer["code"], code, "{path}: {answer}");
            assert!(answer["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{path}: {answer}");
        }
    }
    assert_eq!(
        get(caller, "usage").await["tiers"]
            .as_array()
            .expect("tiers")
            .iter()
            .map(|tier| tier["records"].as_u64().unwrap_or(1))
            .sum::<u64>(),
        0
    );
}
