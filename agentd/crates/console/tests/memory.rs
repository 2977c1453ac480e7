//! Memories and shared knowledge over the management API and on the pages, with the fake appliance behind them.

mod fake;

use agentd_console::{Auth, router};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use fake::{Fake, Files, TestClock};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::Arc;
use tower::ServiceExt;

const FIRST: &str = "00000000-0000-7000-8000-000000000001";
const SECOND: &str = "00000000-0000-7000-8000-000000000002";

struct Scene {
    fake: Arc<Fake>,
    router: Router,
    token: String,
}

impl Scene {
    async fn new() -> Self {
        let (fake, clock, files) =
            (Arc::new(Fake::default()), TestClock::default(), Arc::new(Files::default()));
        let auth = Arc::new(Auth::open(files, clock.boot()).expect("opens"));
        let router = router(fake.clone(), auth.clone());
        let mut scene = Self { fake, router, token: String::new() };
        let claim =
            json!({ "code": auth.claim_code().expect("unclaimed"), "password": "correct horse battery" });
        let (_, answer) = scene.send("POST", "/api/v1/claim", "application/json", claim.to_string()).await;
        let session: Value = serde_json::from_str(&answer).expect("a session");
        scene.token = session["token"].as_str().expect("a token").to_owned();
        scene
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: impl Into<Body>,
    ) -> (StatusCode, String) {
        let request = Request::builder().method(method).uri(path).header("content-type", kind);
        let request = request.header("authorization", format!("Bearer {}", self.token));
        let request = request.body(body.into()).expect("a request");
        let response = self.router.clone().oneshot(request).await.expect("answered");
        let status = response.status();
        let location = response.headers().get("location").map(|to| to.to_str().expect("text").to_owned());
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        (status, location.unwrap_or_else(|| String::from_utf8(bytes.to_vec()).expect("UTF-8")))
    }

    async fn api(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let path = format!("/api/v1/{path}");
        let (status, text) = self.send(method, &path, "application/json", body.to_string()).await;
        (status.as_u16(), serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    async fn page(&self, path: &str) -> String {
        let (status, text) = self.send("GET", path, "", Body::empty()).await;
        assert_eq!(status, StatusCode::OK, "{path}: {text}");
        no_script(path, &text);
        text
    }

    /// Where the form led.
    async fn form(&self, path: &str, body: &'static str) -> String {
        let (status, text) = self.send("POST", path, "application/x-www-form-urlencoded", body).await;
        assert_eq!(status, StatusCode::SEE_OTHER, "{path}: {text}");
        text
    }
}

/// What a memory says is text, wherever it stands.
fn no_script(path: &str, page: &str) {
    assert!(!page.contains("<script>alert"), "{path}: {page}");
}

#[tokio::test]
async fn a_person_finds_a_memory_and_sees_why_and_whence() {
    let scene = Scene::new().await;
    assert!(scene.page("/agents/echo").await.contains("href=\"/agents/echo/memory\""));
    let list = scene.page("/agents/echo/memory").await;
    assert!(list.contains("my grandfather built a ship") && list.contains("&lt;script&gt;alert"), "{list}");
    assert!(list.contains(&format!("/agents/echo/memory/records/{FIRST}")), "{list}");
    let kind = "application/x-www-form-urlencoded";
    let (status, found) =
        scene.send("POST", "/agents/echo/memory", kind, "query=ship&tier=spirit&as_of=").await;
    assert_eq!(status, StatusCode::OK);
    for words in ["my grandfather built a ship", "0.875", "meaning", "0.750", "matched", "web"] {
        assert!(found.contains(words), "{words}: {found}");
    }
    let (_, found) = scene.send("POST", "/agents/echo/memory", kind, "query=%3Cscript%3E").await;
    no_script("a hit", &found);
    assert!(found.contains("value=\"&lt;script&gt;\""), "{found}");
    let one = scene.page(&format!("/agents/echo/memory/records/{SECOND}")).await;
    for words in ["&lt;script&gt;alert", "believed 20 of 100", "half of it is gone in 30 days", "a run"] {
        assert!(one.contains(words), "{words}: {one}");
    }
    let blocks = scene.page("/agents/echo/memory?tier=active").await;
    assert!(blocks.contains("goals") && blocks.contains("version 2"), "{blocks}");
    let (status, _) = scene.send("POST", "/agents/echo/memory", kind, "query=x&as_of=soon").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let (status, _) = scene.send("GET", "/agents/echo/memory?tier=soul", "", Body::empty()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_person_corrects_pins_forgets_restores_and_deletes_with_plain_forms() {
    let scene = Scene::new().await;
    let at = format!("/agents/echo/memory/records/{FIRST}");
    let new = scene.form(&format!("{at}/correct"), "text=my+uncle+built%0D%0Aa+boat").await;
    let page = scene.page(&new).await;
    assert!(page.contains("my uncle built\na boat") && page.contains("In place of"), "{page}");
    let old = scene.page(&at).await;
    assert!(old.contains("superseded") && old.contains("it was corrected"), "{old}");
    assert!(!old.contains("Correct it"), "only what stands can be corrected");
    for (deed, shown) in [("pin", "Unpin"), ("unpin", ">Pin<"), ("forget", "Restore"), ("restore", "Forget")]
    {
        let back = scene.form(&format!("/agents/echo/memory/records/{SECOND}/{deed}"), "").await;
        assert!(scene.page(&back).await.contains(shown), "{deed}");
    }
    let gone = scene.form(&format!("/agents/echo/memory/records/{SECOND}/purge"), "").await;
    let page = scene.page(&gone).await;
    assert!(page.contains("deleted for good") && !page.contains("alert("), "{page}");
    let journal = scene.page("/agents/echo/memory/journal").await;
    assert!(journal.contains("purged") && journal.contains("somebody asked for it"), "{journal}");
    let (status, _) =
        scene.send("POST", &format!("{at}/explode"), "application/x-www-form-urlencoded", "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, _) = scene.send("GET", "/agents/echo/memory/records/7", "", Body::empty()).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, checked) = scene.send("POST", "/agents/echo/memory/check", "", Body::empty()).await;
    assert!(status == StatusCode::OK && checked.contains("is whole"), "{checked}");
}

#[tokio::test]
async fn the_api_carries_orders_out_and_names_what_is_wrong() {
    let scene = Scene::new().await;
    assert_eq!(scene.api("GET", "agents/echo/memory", Value::Null).await.1["tiers"][0]["tier"], "spirit");
    let (_, list) =
        scene.api("GET", "agents/echo/memory/records?tier=spirit&state=live&limit=5", Value::Null).await;
    assert_eq!(list["records"].as_array().map(Vec::len), Some(2), "{list}");
    let (_, found) = scene.api("POST", "agents/echo/memory/search", json!({ "query": "ship" })).await;
    assert_eq!(found["hits"][0]["explain"]["meaning"], 0.75, "{found}");
    let record = |rest: &str| format!("agents/echo/memory/records/{FIRST}{rest}");
    assert_eq!(scene.api("GET", &record(""), Value::Null).await.1["trust"], 20);
    assert_eq!(scene.api("POST", &record("/pin"), json!({ "pinned": true })).await.0, 204);
    assert_eq!(scene.api("POST", &record("/correct"), json!({ "text": "a boat" })).await.0, 200);
    for deed in ["forget", "restore", "purge"] {
        assert_eq!(scene.api("POST", &record(&format!("/{deed}")), Value::Null).await.0, 204, "{deed}");
    }
    assert_eq!(scene.api("GET", &record(""), Value::Null).await.0, 404);
    assert_eq!(scene.api("GET", &record("/history"), Value::Null).await.1["deeds"][0]["deed"], "pinned");
    assert_eq!(scene.api("GET", "agents/echo/memory/journal?limit=3", Value::Null).await.0, 200);
    assert_eq!(
        scene.api("GET", "agents/echo/memory/blocks", Value::Null).await.1["blocks"][0]["key"],
        "goals"
    );
    let write = json!({ "text": "x", "version": 2 });
    assert_eq!(scene.api("PUT", "agents/echo/memory/blocks/goals", write).await.1["version"], 3);
    assert_eq!(scene.api("DELETE", "agents/echo/memory/blocks/goals?version=3", Value::Null).await.0, 204);
    assert_eq!(scene.api("POST", "agents/echo/memory/check", Value::Null).await.1["records"], 2);
    for (method, path, body, status, code) in [
        ("GET", "agents/nobody/memory", Value::Null, 404, "not_found"),
        ("GET", "agents/echo/memory/records?tier=soul", Value::Null, 400, "query_malformed"),
        ("GET", "agents/echo/memory/records/7", Value::Null, 404, "not_found"),
        (
            "POST",
            "agents/echo/memory/search",
            json!({ "query": "x", "agent": "scout" }),
            400,
            "request_malformed",
        ),
        ("PUT", "knowledge/A%2Fb", json!({ "bytes": 1, "records": 1 }), 400, "collection_malformed"),
        ("PUT", "knowledge/house/grants/echo", json!({ "access": "own" }), 400, "request_malformed"),
    ] {
        let (found, answer) = scene.api(method, path, body).await;
        assert_eq!((found, &answer["code"]), (status, &json!(code)), "{path}: {answer}");
    }
    // No words of a memory or of a question in what is recorded of an order.
    let calls = scene.fake.calls().join("\n");
    assert!(
        calls.contains("memory.search of echo") && !calls.contains("ship") && !calls.contains("boat"),
        "{calls}"
    );
}

#[tokio::test]
async fn knowledge_is_made_granted_filled_and_taken_back() {
    let scene = Scene::new().await;
    assert!(scene.page("/knowledge").await.contains("There is none yet."));
    assert_eq!(scene.form("/knowledge", "name=house&bytes=64M&records=").await, "/knowledge");
    scene.form("/knowledge/house/grant", "agent=echo&access=read_write").await;
    scene.form("/knowledge/house/documents", "title=manual&text=%3Cscript%3Ealert(1)%3C%2Fscript%3E").await;
    let page = scene.page("/knowledge").await;
    for words in ["house", "3 of 500000 records", "of 64 MiB", "reads and writes", "echo"] {
        assert!(page.contains(words), "{words}: {page}");
    }
    scene.form("/knowledge/house/grant", "agent=echo&access=").await;
    assert!(!scene.page("/knowledge").await.contains("Take back"));
    let grants = "knowledge/house/grants/echo";
    let (_, all) = scene.api("PUT", grants, json!({ "access": "read" })).await;
    assert_eq!(all[0]["grants"].as_object().map(|grants| grants.len()), Some(1), "{all}");
    assert_eq!(scene.api("DELETE", grants, Value::Null).await.1[0]["grants"], json!({}));
    scene.form("/knowledge/house/remove", "").await;
    assert_eq!(scene.api("GET", "knowledge", Value::Null).await.1, json!([]));
    let kind = "application/x-www-form-urlencoded";
    let (status, _) = scene.send("POST", "/knowledge", kind, "name=house&bytes=much").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}
