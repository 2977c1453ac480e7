//! Long because all that concerns routes is here, and each is listed once. The router over the fake appliance, without
//! a network: who may do what, limits, headers, sessions.

mod fake;

use agentd_console::auth::{CODE_LIFETIME, Entrance, IDLE};
use agentd_console::{Auth, router};
use agentd_domain::fault::Report;
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use fake::{Fake, Files, TestClock};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tower::ServiceExt;

const PASSWORD: &str = "correct horse battery";

struct Scene {
    fake: Arc<Fake>,
    auth: Arc<Auth>,
    clock: TestClock,
    files: Arc<Files>,
    router: Router,
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    fn report(&self) -> Report {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().expect("text"))
    }
}

impl Scene {
    fn new() -> Self {
        let (fake, clock, files) =
            (Arc::new(Fake::default()), TestClock::default(), Arc::new(Files::default()));
        let auth = Arc::new(Auth::open(files.clone(), clock.boot()).expect("opens"));
        let router = router(fake.clone(), auth.clone());
        Self { fake, auth, clock, files, router }
    }

    async fn send(&self, request: Request<Body>) -> Reply {
        let response: Response<Body> = self.router.clone().oneshot(request).await.expect("infallible");
        let (parts, body) = response.into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        Reply { status: parts.status, headers: parts.headers, body }
    }

    async fn post(&self, path: &str, token: Option<&str>, body: Value) -> Reply {
        self.send(
            with(token, Request::post(path).header("content-type", "application/json"))
                .body(Body::from(body.to_string()))
                .expect("a request"),
        )
        .await
    }

    async fn get(&self, path: &str, token: Option<&str>) -> Reply {
        self.send(with(token, Request::get(path)).body(Body::empty()).expect("a request")).await
    }

    async fn claim(&self) -> String {
        let code = self.auth.claim_code().expect("unclaimed");
        let reply = self.post("/api/v1/claim", None, json!({"code": code, "password": PASSWORD})).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        reply.json()["token"].as_str().expect("a token").to_owned()
    }
}

fn with(token: Option<&str>, request: axum::http::request::Builder) -> axum::http::request::Builder {
    match token {
        Some(token) => request.header("authorization", format!("Bearer {token}")),
        None => request,
    }
}

/// Every route with its method. The count is checked against the router's source: a new route cannot be forgotten.
const GATED_API: &[(&str, &str)] = &[
    ("POST", "/api/v1/logout"),
    ("GET", "/api/v1/status"),
    ("POST", "/api/v1/plan"),
    ("GET", "/api/v1/agents"),
    ("POST", "/api/v1/agents"),
    ("GET", "/api/v1/agents/echo"),
    ("DELETE", "/api/v1/agents/echo"),
    ("POST", "/api/v1/agents/echo/start"),
    ("POST", "/api/v1/agents/echo/stop"),
    ("GET", "/api/v1/agents/echo/logs"),
    ("POST", "/api/v1/agents/echo/chat"),
    ("GET", "/api/v1/devices"),
    ("PUT", "/api/v1/partitions/chat"),
    ("DELETE", "/api/v1/partitions/chat"),
    ("PUT", "/api/v1/agents/echo/partition"),
    ("PUT", "/api/v1/agents/echo/device"),
    ("GET", "/api/v1/models/tiny/plan"),
    ("POST", "/api/v1/models/tiny/pull"),
    ("PUT", "/api/v1/models/tiny/pin"),
    ("DELETE", "/api/v1/models/tiny/pin"),
    ("POST", "/api/v1/plan-model"),
    ("GET", "/api/v1/models"),
    ("PUT", "/api/v1/models/tiny"),
    ("DELETE", "/api/v1/models/tiny"),
    ("GET", "/api/v1/secrets"),
    ("POST", "/api/v1/secrets"),
    ("DELETE", "/api/v1/secrets/mail"),
    ("GET", "/api/v1/audit"),
    ("GET", "/api/v1/audit/head"),
    ("GET", "/api/v1/agents/echo/token"),
    ("POST", "/api/v1/tokens/mint"),
    ("POST", "/api/v1/tokens/attenuate"),
    ("POST", "/api/v1/tokens/inspect"),
    ("POST", "/api/v1/tokens/verify"),
    ("POST", "/api/v1/tokens/revoke"),
    ("GET", "/api/v1/tokens/revoked"),
    ("GET", "/api/v1/tokens/key"),
    ("POST", "/api/v1/reboot"),
    ("POST", "/api/v1/poweroff"),
    ("GET", "/api/v1/agents/echo/memory"),
    ("GET", "/api/v1/agents/echo/memory/records"),
    ("POST", "/api/v1/agents/echo/memory/search"),
    ("GET", "/api/v1/agents/echo/memory/records/1"),
    ("GET", "/api/v1/agents/echo/memory/records/1/history"),
    ("POST", "/api/v1/agents/echo/memory/records/1/correct"),
    ("POST", "/api/v1/agents/echo/memory/records/1/pin"),
    ("POST", "/api/v1/agents/echo/memory/records/1/forget"),
    ("POST", "/api/v1/agents/echo/memory/records/1/purge"),
    ("POST", "/api/v1/agents/echo/memory/records/1/restore"),
    ("GET", "/api/v1/agents/echo/memory/journal"),
    ("GET", "/api/v1/agents/echo/memory/blocks"),
    ("PUT", "/api/v1/agents/echo/memory/blocks/goals"),
    ("DELETE", "/api/v1/agents/echo/memory/blocks/goals"),
    ("POST", "/api/v1/agents/echo/memory/check"),
    ("GET", "/api/v1/knowledge"),
    ("PUT", "/api/v1/knowledge/house"),
    ("DELETE", "/api/v1/knowledge/house"),
    ("PUT", "/api/v1/knowledge/house/grants/echo"),
    ("DELETE", "/api/v1/knowledge/house/grants/echo"),
    ("POST", "/api/v1/knowledge/house/documents"),
    ("DELETE", "/api/v1/knowledge/house/documents/1"),
];
const GATED_WEB: &[(&str, &str)] = &[
    ("GET", "/"),
    ("GET", "/agents"),
    ("GET", "/agents/echo"),
    ("POST", "/agents/echo/start"),
    ("POST", "/agents/echo/stop"),
    ("POST", "/agents/echo/remove"),
    ("GET", "/agents/echo/chat"),
    ("POST", "/agents/echo/chat"),
    ("GET", "/agents/echo/memory"),
    ("POST", "/agents/echo/memory"),
    ("GET", "/agents/echo/memory/journal"),
    ("GET", "/agents/echo/memory/records/1"),
    ("POST", "/agents/echo/memory/records/1/forget"),
    ("POST", "/agents/echo/memory/check"),
    ("GET", "/knowledge"),
    ("POST", "/knowledge"),
    ("POST", "/knowledge/house/remove"),
    ("POST", "/knowledge/house/grant"),
    ("POST", "/knowledge/house/documents"),
    ("GET", "/devices"),
    ("POST", "/devices/partitions"),
    ("POST", "/devices/partitions/chat/remove"),
    ("POST", "/devices/assign"),
    ("POST", "/devices/grant"),
    ("GET", "/models"),
    ("POST", "/models/tiny/remove"),
    ("POST", "/models/tiny/pin"),
    ("POST", "/models/tiny/unpin"),
    ("GET", "/audit"),
    ("POST", "/reboot"),
    ("POST", "/poweroff"),
    ("POST", "/sign-out"),
];
const OPEN: &[(&str, &str)] = &[
    ("GET", "/healthz"),
    ("GET", "/assets/0/console.css"),
    ("GET", "/claim"),
    ("POST", "/claim"),
    ("GET", "/sign-in"),
    ("POST", "/sign-in"),
    ("POST", "/api/v1/claim"),
    ("POST", "/api/v1/login"),
];

#[test]
fn these_tests_know_every_route() {
    let source = include_str!("../src/router.rs");
    let methods = ["get(", "post(", "put(", "delete("].iter();
    let routes = source.lines().filter(|line| line.trim_start().starts_with(".route("));
    let in_source: usize =
        routes.map(|line| methods.clone().map(|m| line.matches(m).count()).sum::<usize>()).sum();
    assert_eq!(in_source, GATED_API.len() + GATED_WEB.len() + OPEN.len());
}

#[tokio::test]
async fn nothing_is_done_without_a_session_and_every_answer_has_strict_headers() {
    let scene = Scene::new();
    scene.claim().await;
    for wrong in [None, Some("wrong"), Some("")] {
        for (method, path) in GATED_API.iter().chain(GATED_WEB).chain(OPEN).chain(&[
            ("GET", "/none"),
            ("GET", "/api/v1/none"),
            ("PATCH", "/healthz"),
        ]) {
            let request = with(wrong, Request::builder().method(*method).uri(*path))
                .body(Body::empty())
                .expect("a request");
            let reply = scene.send(request).await;
            let scene_text = format!("{method} {path} with {wrong:?}: {}", reply.status);
            if GATED_API.contains(&(method, path)) {
                assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{scene_text}");
                assert_eq!(reply.report().code, "unauthorized");
                assert_eq!(reply.header("www-authenticate"), "Bearer");
            }
            if GATED_WEB.contains(&(method, path)) {
                assert_eq!(reply.status, StatusCode::SEE_OTHER, "{scene_text}");
                assert_eq!(reply.header("location"), "/sign-in");
            }
            let policy = reply.header("content-security-policy");
            assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{scene_text}");
            assert!(policy.contains("frame-ancestors 'none'") && policy.contains("base-uri 'none'"));
            assert_eq!(reply.header("x-content-type-options"), "nosniff", "{scene_text}");
            assert_eq!(reply.header("referrer-policy"), "no-referrer", "{scene_text}");
            assert_eq!(reply.header("cross-origin-opener-policy"), "same-origin", "{scene_text}");
            assert_eq!(reply.header("cache-control"), "no-store", "{scene_text}");
            assert!(!reply.headers.contains_key("strict-transport-security"), "it would lock the owner out");
        }
    }
    assert!(scene.fake.calls().is_empty(), "{:?}", scene.fake.calls());
}

#[tokio::test]
async fn strangers_learn_the_health_and_nothing_else() {
    let scene = Scene::new();
    let reply = scene.get("/healthz", None).await;
    assert_eq!(reply.json(), json!({"health": "yellow"}));
    for path in ["/claim", "/healthz"] {
        let text = scene.get(path, None).await.text();
        for secret in [scene.auth.claim_code().expect("unclaimed").as_str(), "0.1.0", "10.0.2.15"] {
            assert!(!text.contains(secret), "{path} shows {secret}");
        }
    }
}

#[tokio::test]
async fn claiming_makes_an_owner_once() {
    let scene = Scene::new();
    assert_eq!(scene.get("/", None).await.header("location"), "/claim");
    assert_eq!(scene.get("/sign-in", None).await.header("location"), "/claim");
    let code = scene.auth.claim_code().expect("unclaimed");
    let token = scene.claim().await;
    assert_eq!(scene.get("/api/v1/status", Some(&token)).await.status, StatusCode::OK);
    assert_eq!(scene.auth.claim_code(), None);
    let again = scene.post("/api/v1/claim", None, json!({"code": code, "password": PASSWORD})).await;
    assert_eq!(again.status, StatusCode::CONFLICT);
    assert_eq!(scene.get("/claim", None).await.header("location"), "/sign-in");

    let wrong = scene.post("/api/v1/login", None, json!({"password": "correct horse batterie"})).await;
    assert_eq!(wrong.status, StatusCode::UNAUTHORIZED);
    let right = scene.post("/api/v1/login", None, json!({"password": PASSWORD})).await;
    assert_eq!(right.status, StatusCode::OK);

    let rebooted = Auth::open(scene.files.clone(), scene.clock.boot()).expect("opens");
    assert!(rebooted.is_claimed());
    assert_eq!(rebooted.claim_code(), None);
}

#[tokio::test]
async fn two_claims_at_once_make_one_owner() {
    let scene = Scene::new();
    let code = scene.auth.claim_code().expect("unclaimed");
    let claim = || scene.post("/api/v1/claim", None, json!({"code": code, "password": PASSWORD}));
    let (one, other, third) = tokio::join!(claim(), claim(), claim());
    let mut statuses = [one.status, other.status, third.status];
    statuses.sort();
    assert_eq!(statuses, [StatusCode::OK, StatusCode::CONFLICT, StatusCode::CONFLICT]);
}

#[tokio::test]
async fn a_wrong_code_twenty_times_then_the_right_one() {
    let scene = Scene::new();
    let code = scene.auth.claim_code().expect("unclaimed");
    let claim = |code: &str| scene.post("/api/v1/claim", None, json!({"code": code, "password": PASSWORD}));
    let mut statuses = Vec::new();
    for _ in 0..20 {
        let reply = claim("2222-2222-2222").await;
        if reply.status == StatusCode::TOO_MANY_REQUESTS {
            assert_eq!(reply.report().code, "too_many_requests");
            assert!(reply.header("retry-after").parse::<u64>().expect("seconds") >= 1);
        } else {
            assert_eq!(reply.report().code, "claim_code_wrong");
        }
        statuses.push(reply.status.as_u16());
    }
    assert_eq!(statuses[..5], [400; 5]);
    assert_eq!(statuses[5..], [429; 15]);
    // Guesses at every free moment for a quarter of an hour: the waits rise, and stay at a minute.
    let mut guesses = 0;
    let mut waits = Vec::new();
    loop {
        let reply = claim("2222-2222-2222").await;
        match reply.status {
            StatusCode::TOO_MANY_REQUESTS => {
                let wait: u64 = reply.header("retry-after").parse().expect("seconds");
                waits.push(wait);
                scene.clock.advance(Duration::from_secs(wait));
            }
            _ => guesses += 1,
        }
        if guesses == 9 {
            break;
        }
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    // The owner waits once, and is in.
    let held = claim(&code).await;
    assert_eq!(held.status, StatusCode::TOO_MANY_REQUESTS, "the right code waits like any other");
    scene.clock.advance(Duration::from_secs(held.header("retry-after").parse().expect("seconds")));
    let reply = claim(&code).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
}

#[tokio::test]
async fn a_code_lives_a_quarter_of_an_hour() {
    let scene = Scene::new();
    let old = scene.auth.claim_code().expect("unclaimed");
    scene.clock.advance(CODE_LIFETIME - Duration::from_secs(1));
    assert_eq!(scene.auth.claim_code().as_ref(), Some(&old));
    scene.clock.advance(Duration::from_secs(1));
    let reply = scene.post("/api/v1/claim", None, json!({"code": old, "password": PASSWORD})).await;
    assert_eq!(reply.report().code, "claim_code_wrong");
    assert_ne!(scene.auth.claim_code().expect("unclaimed"), old);
    scene.claim().await;
}

#[tokio::test]
async fn weak_passwords_do_not_cost_the_code() {
    let scene = Scene::new();
    let code = scene.auth.claim_code().expect("unclaimed");
    for _ in 0..20 {
        let reply = scene.post("/api/v1/claim", None, json!({"code": code, "password": "short"})).await;
        assert_eq!((reply.status.as_u16(), reply.report().code.as_str()), (400, "password_weak"));
    }
    scene.claim().await;
}

#[tokio::test]
async fn sessions_end_by_the_boot_clock_and_by_signing_out() {
    let scene = Scene::new();
    let token = scene.claim().await;
    scene.clock.advance(IDLE - Duration::from_secs(1));
    assert_eq!(scene.get("/api/v1/status", Some(&token)).await.status, StatusCode::OK);
    scene.clock.advance(IDLE);
    assert_eq!(scene.get("/api/v1/status", Some(&token)).await.status, StatusCode::UNAUTHORIZED);

    let login = scene.post("/api/v1/login", None, json!({"password": PASSWORD})).await;
    let token = login.json()["token"].as_str().expect("a token").to_owned();
    assert_eq!(scene.post("/api/v1/logout", Some(&token), json!({})).await.status, StatusCode::NO_CONTENT);
    assert_eq!(scene.get("/api/v1/status", Some(&token)).await.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn signing_out_ends_what_streams() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let request = with(Some(&token), Request::get("/api/v1/agents/echo/logs?lines=1&follow=true"))
        .body(Body::empty())
        .expect("a request");
    let mut body = scene.router.clone().oneshot(request).await.expect("infallible").into_body();
    let first = body.frame().await.expect("a line").expect("no error");
    assert!(first.data_ref().expect("data").ends_with(b"\n"));
    scene.fake.say_in_log("live");
    let live = body.frame().await.expect("a line").expect("no error");
    assert!(String::from_utf8_lossy(live.data_ref().expect("data")).contains("live"));
    scene.auth.logout(&token);
    assert!(body.frame().await.is_none(), "the stream ends with its session");
}

#[tokio::test]
async fn a_client_that_goes_ends_its_stream() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let request = with(Some(&token), Request::get("/api/v1/agents/echo/logs?follow=true"))
        .body(Body::empty())
        .expect("a request");
    let response = scene.router.clone().oneshot(request).await.expect("infallible");
    assert_eq!(scene.fake.followers(), 1);
    drop(response);
    assert_eq!(scene.fake.followers(), 0);
}

#[tokio::test]
async fn a_request_of_100_mb_is_refused_before_it_is_read() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let chat = "/api/v1/agents/echo/chat";
    for path in
        ["/api/v1/login", chat, "/api/v1/plan", "/api/v1/agents/echo/start", "/sign-in", "/agents/echo/chat"]
    {
        let read = Arc::new(AtomicU64::new(0));
        let request = with(Some(&token), Request::post(path))
            .header("content-length", 100_000_000)
            .header("content-type", "application/json")
            .body(counted(read.clone()))
            .expect("a request");
        let reply = scene.send(request).await;
        assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE, "{path}");
        let report = reply.report();
        assert_eq!(report.code, "too_large");
        assert!(report.why.contains("8 MiB") && !report.fix.is_empty(), "{report}");
        assert_eq!(read.load(Ordering::SeqCst), 0, "{path}");
    }
    // Without an announced length it is read up to the limit, and no further.
    let read = Arc::new(AtomicU64::new(0));
    let request = with(Some(&token), Request::post(chat))
        .header("content-type", "application/json")
        .body(counted(read.clone()))
        .expect("a request");
    let reply = scene.send(request).await;
    assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(read.load(Ordering::SeqCst) <= 9 << 20);
    assert!(scene.fake.calls().is_empty());
}

/// 100 MB in pieces of 64 KiB; counts what is taken.
fn counted(read: Arc<AtomicU64>) -> Body {
    let piece = Bytes::from(vec![b' '; 64 * 1024]);
    let pieces = (0..100_000_000 / piece.len()).map(move |_| {
        read.fetch_add(piece.len() as u64, Ordering::SeqCst);
        Ok::<_, std::io::Error>(piece.clone())
    });
    Body::from_stream(futures::stream::iter(pieces))
}

#[tokio::test]
async fn a_model_of_100_mb_passes_through_piece_by_piece() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let read = Arc::new(AtomicU64::new(0));
    let request =
        with(Some(&token), Request::put("/api/v1/models/big")).body(counted(read)).expect("a request");
    let reply = scene.send(request).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    assert_eq!(reply.json()["bytes"], 100_000_000 / (64 * 1024) * (64 * 1024));
}

#[tokio::test]
async fn an_upload_that_breaks_off_is_an_error() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let pieces = [Ok(Bytes::from_static(b"GGUF")), Err(std::io::Error::other("gone"))];
    let body = Body::from_stream(futures::stream::iter(pieces));
    let request = with(Some(&token), Request::put("/api/v1/models/cut")).body(body).expect("a request");
    assert_eq!(scene.send(request).await.report().code, "upload_broken");
    assert!(scene.fake.calls().is_empty());
}

#[tokio::test]
async fn names_that_are_none_reach_nobody() {
    let scene = Scene::new();
    let token = scene.claim().await;
    for path in
        ["/api/v1/agents/..%2F..%2Fetc", "/api/v1/agents/Echo", "/api/v1/agents/%00", "/api/v1/agents/-"]
    {
        let reply = scene.get(path, Some(&token)).await;
        assert_eq!(reply.report().code, "agent_name_malformed", "{path}");
    }
    for name in ["..", ".hidden", "a%2Fb", "%FF", &"x".repeat(97)] {
        let request = with(Some(&token), Request::put(format!("/api/v1/models/{name}")))
            .body(Body::empty())
            .expect("a request");
        let reply = scene.send(request).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{name}");
    }
    assert!(scene.fake.calls().is_empty());
    let by_id = scene.get("/api/v1/agents/01993f21-7c4a-7000-8000-000000000001", Some(&token)).await;
    assert_eq!(by_id.json()["name"], "echo");
    let none = scene.get("/api/v1/agents/nobody", Some(&token)).await;
    assert_eq!((none.status, none.report().code.as_str()), (StatusCode::NOT_FOUND, "not_found"));
}

#[tokio::test]
async fn malformed_requests_say_what_is_wrong() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let path = "/api/v1/agents/echo/chat";
    for body in ["", "{", "[]", "{\"text\": 1}", "{\"text\": \"a\", \"colour\": \"red\"}", "\u{0}"] {
        let request = with(Some(&token), Request::post(path))
            .header("content-type", "application/json")
            .body(Body::from(body))
            .expect("a request");
        assert_eq!(scene.send(request).await.report().code, "request_malformed", "{body:?}");
    }
    let form = with(Some(&token), Request::post(path))
        .header("content-type", "text/plain")
        .body(Body::from("{\"text\":\"a\"}"))
        .expect("a request");
    assert_eq!(
        scene.send(form).await.report().code,
        "request_malformed",
        "what a foreign page's form can send"
    );
    for (text, code) in [(" \n", "message_empty"), (&"x".repeat(65 * 1024), "too_large")] {
        assert_eq!(scene.post(path, Some(&token), json!({"text": text})).await.report().code, code);
    }
    let query = scene.get("/api/v1/agents/echo/logs?lines=many", Some(&token)).await;
    assert_eq!(query.report().code, "query_malformed");
    let method = scene.send(Request::patch("/api/v1/status").body(Body::empty()).expect("a request")).await;
    assert_eq!(method.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(scene.fake.calls().is_empty());
}

#[tokio::test]
async fn a_chat_is_one_json_value_per_line() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let reply = scene.post("/api/v1/agents/echo/chat", Some(&token), json!({"text": "hello"})).await;
    assert_eq!(reply.header("content-type"), "application/x-ndjson");
    let parts: Vec<Value> =
        reply.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(parts.first().expect("parts")["type"], "note");
    assert_eq!(parts.last().expect("parts")["type"], "done");
    assert_eq!(scene.fake.calls(), ["chat echo hello"]);
}

#[tokio::test]
async fn a_message_has_its_key_in_the_body_or_in_the_header() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let chat = |body: Value, key: &'static str| {
        let request = with(Some(&token), Request::post("/api/v1/agents/echo/chat"))
            .header("content-type", "application/json")
            .header("idempotency-key", key);
        scene.send(request.body(Body::from(body.to_string())).expect("a request"))
    };
    chat(json!({"text": "one"}), "from-header").await;
    chat(json!({"text": "two", "idempotency_key": "from-body"}), "from-header").await;
    assert_eq!(scene.fake.key_of("one").as_deref(), Some("from-header"));
    assert_eq!(scene.fake.key_of("two").as_deref(), Some("from-body"));
    let long: &'static str = "x".repeat(129).leak();
    assert_eq!(chat(json!({"text": "three"}), long).await.report().code, "key_malformed");
}

/// A person without JavaScript, with the cookie and the headers that a browser sends.
#[tokio::test]
async fn the_pages_work_as_plain_forms() {
    let scene = Scene::new();
    let browse = |method: Method, path: &'static str, cookie: String, form: String| {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("sec-fetch-site", "same-origin")
            .header("content-type", "application/x-www-form-urlencoded")
            .header("cookie", cookie)
            .body(Body::from(form))
            .expect("a request");
        scene.send(request)
    };
    let code = scene.auth.claim_code().expect("unclaimed");
    let differ =
        browse(Method::POST, "/claim", String::new(), format!("code={code}&password={PASSWORD}&again=other"))
            .await;
    assert_eq!(differ.status, StatusCode::BAD_REQUEST);
    assert!(differ.text().contains("The two passwords differ"));
    assert!(differ.text().contains(&format!("value=\"{code}\"")), "the code need not be typed again");
    let claimed = browse(
        Method::POST,
        "/claim",
        String::new(),
        format!("code={code}&password={PASSWORD}&again={PASSWORD}"),
    )
    .await;
    assert_eq!((claimed.status, claimed.header("location")), (StatusCode::SEE_OTHER, "/"));
    let set = claimed.header("set-cookie").to_owned();
    for attribute in ["__Host-agentd-session=", "; Secure", "; HttpOnly", "; SameSite=Strict", "; Path=/"] {
        assert!(set.contains(attribute), "{set}");
    }
    let cookie = set.split(';').next().expect("a pair").to_owned();

    for (path, expected) in [
        (
            "/",
            &[
                "0.1.0~214",
                "The time may be wrong",
                "cpu-haswell",
                "all-minilm-l6-v2",
                "echo",
                "boot",
                "not confirmed",
                "276 MiB of 978 MiB",
                "31 MiB of it for agentd",
                "118 MiB, 71 MiB of it allocated",
                "2 h 14 min",
                "AMD EPYC-Milan Processor",
                "tiny",
                "10.0.2.15/24",
            ][..],
        ),
        (
            "/agents",
            &[
                "23 MiB of 256 MiB",
                "3 of 64",
                "at most 50 % of one core",
                "Quarantined",
                "5 restarts",
                "at most 256 MiB",
                "at most 64<",
            ],
        ),
        ("/agents/echo", &["Stop", "&lt;script&gt;alert", "times in UTC", "Chat", "at most 1.0 GiB"]),
        (
            "/agents/indexer",
            &[
                "killed for going over its memory limit",
                "Raise <code>limits.memory_max</code>",
                "Start again",
            ],
        ),
        (
            "/agents/scout",
            &[
                "Throttled",
                "it starts processes against its limit",
                "71.5 %",
                "Held back over its soft memory limit 42 times",
                "sensor.lost",
                "3 times",
                "&lt;b&gt;the boiler&lt;/b&gt; does not answer",
                "forbidden system call ptrace",
                "killed by the pressure watchdog",
                "Audit trail",
                "/audit?agent=scout",
            ],
        ),
        (
            "/audit",
            &["plané &quot;x&quot;", "memory.recall.spirit", "everybody", "allowed", "agentctl audit verify"],
        ),
        ("/audit?agent=echo", &["Nothing yet", "selected"]),
        ("/models", &["half-model", "The model was not loaded", "default"]),
        (
            "/devices",
            &[
                "NVIDIA Test 24G",
                "kernel",
                "What the device reports",
                "9.4 GiB",
                "82 % busy",
                "chat",
                "guaranteed",
                "echo",
                "4096 cells",
                "1024 of them its part of shared ones",
                "2 at work, 3 waiting",
                "1 gave way, 64 MiB aside",
                "There is no device CUDA7",
                "Upper estimate",
                "Prompt tokens from the cache",
                "75 %",
                "Define a partition",
                "Put an agent into a partition",
                "value=\"2G\"",
            ],
        ),
    ] {
        let page = browse(Method::GET, path, cookie.clone(), String::new()).await;
        assert_eq!(page.status, StatusCode::OK, "{path}");
        let text = page.text();
        for words in expected {
            assert!(text.contains(words), "{path} lacks {words:?}:\n{text}");
        }
        for forbidden in ["<script>", " style=", "onclick", "javascript:"] {
            assert!(!text.contains(forbidden), "{path} holds {forbidden}, which the policy forbids");
        }
    }
    let said =
        browse(Method::POST, "/agents/echo/chat", cookie.clone(), "text=where+is+%3Cb%3E".into()).await;
    assert!(said.text().contains("where is &lt;b&gt;") && said.text().contains("stored as a memory"));
    let reloaded = browse(Method::GET, "/agents/echo/chat", cookie.clone(), String::new()).await;
    assert_eq!(reloaded.header("location"), "/agents/echo", "the address of an answer is no dead end");
    let stopped = browse(Method::POST, "/agents/echo/stop", cookie.clone(), String::new()).await;
    assert_eq!(stopped.header("location"), "/agents/echo");
    let missing = browse(Method::GET, "/agents/nobody", cookie.clone(), String::new()).await;
    assert_eq!(missing.status, StatusCode::NOT_FOUND);
    assert!(missing.header("content-type").starts_with("text/html"));
    let out = browse(Method::POST, "/sign-out", cookie.clone(), String::new()).await;
    assert!(out.header("set-cookie").contains("Max-Age=0"));
    assert_eq!(browse(Method::GET, "/", cookie, String::new()).await.header("location"), "/sign-in");
    assert_eq!(scene.fake.calls(), ["chat echo where is <b>", "stop echo"]);
}

#[tokio::test]
async fn partitions_are_changed_on_the_page() {
    let scene = Scene::new();
    let cookie = scene.claim().await;
    let send = async |path: &str, form: &str| {
        let request = with(Some(&cookie), Request::post(path))
            .header("content-type", "application/x-www-form-urlencoded");
        scene.send(request.body(Body::from(form.to_owned())).expect("a request")).await
    };
    let set = "name=new&devices=CUDA0&bytes=3G&priority=90&weight=&sequences_most=4&guaranteed=on";
    for (path, form) in [
        ("/devices/partitions", set),
        ("/devices/assign", "agent=echo&partition=new"),
        ("/devices/grant", "agent=echo&device=CUDA0"),
        ("/devices/grant", "agent=echo&device="),
        ("/devices/partitions/chat/remove", ""),
    ] {
        let reply = send(path, form).await;
        assert_eq!((reply.status, reply.header("location")), (StatusCode::SEE_OTHER, "/devices"), "{path}");
    }
    let now = scene.get("/api/v1/devices", Some(&cookie)).await.json();
    let new = now["partitions"].as_array().expect("a list").last().expect("one")["partition"].clone();
    assert_eq!(new["bytes"], 3_u64 << 30);
    assert_eq!(
        (&new["priority"], &new["weight"], &new["sequences_most"]),
        (&json!(90), &json!(100), &json!(4))
    );
    assert_eq!(new["guaranteed"], true);
    assert!(now["partitions"].as_array().expect("a list").iter().all(|one| one["partition"]["id"] != "chat"));
    for (path, form, words) in [
        ("/devices/partitions", "name=A+b&devices=CUDA0&bytes=1G", "is no name of a partition"),
        ("/devices/partitions", "name=a&devices=CUDA0&bytes=lots", "is no number of bytes"),
        ("/devices/partitions", "name=a&devices=CUDA0&bytes=1G&priority=high", "is no number that can be"),
        ("/devices/partitions/nowhere/remove", "", "there is no partition"),
        ("/devices/assign", "agent=nobody&partition=new", "nobody"),
    ] {
        let reply = send(path, form).await;
        assert!(reply.status.is_client_error(), "{path} {form}: {}", reply.status);
        assert!(
            reply.text().to_lowercase().contains(words),
            "{path} {form} lacks {words:?}:\n{}",
            reply.text()
        );
    }
    // Another site's page cannot make a browser do it.
    let forged = with(Some(&cookie), Request::post("/devices/assign"))
        .header("content-type", "application/x-www-form-urlencoded")
        .header("sec-fetch-site", "cross-site");
    let forged = forged.body(Body::from("agent=echo&partition=default")).expect("a request");
    assert_eq!(scene.send(forged).await.status, StatusCode::FORBIDDEN);
    assert_eq!(
        scene.fake.calls(),
        [
            "set partition new",
            "assign echo to new",
            "grant CUDA0 to echo",
            "grant nothing to echo",
            "remove partition chat",
            "remove partition nowhere",
            "assign nobody to new"
        ]
    );
}

/// Under emulation a reply takes minutes: without a script, a person looks again, and does not say it twice.
#[tokio::test(start_paused = true)]
async fn a_slow_reply_is_shown_as_far_as_it_has_come() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let page = scene.get("/agents/echo", Some(&token)).await.text();
    let key = hidden_key(&page);
    assert_eq!(key.len(), 32);
    let next = scene.get("/agents/echo", Some(&token)).await.text();
    assert_ne!(hidden_key(&next), key, "each page has a key of its own");
    let say = async |key: &str| {
        let form = format!("key={key}&text=slow+%22one%22%0D%0Atwo");
        let request = with(Some(&token), Request::post("/agents/echo/chat"))
            .header("content-type", "application/x-www-form-urlencoded");
        scene.send(request.body(Body::from(form)).expect("a request")).await.text()
    };
    let first = say(&key).await;
    for words in ["begun", "Let me ", "not whole yet", "Look again", "value=\"slow &quot;one&quot;\ntwo\""] {
        assert!(first.contains(words), "no {words:?} in\n{first}");
    }
    assert_eq!(hidden_key(&first), key, "the button asks for this reply");
    let whole = say(&key).await;
    assert!(whole.contains("Ask me by meaning") && !whole.contains("Look again"), "{whole}");
    assert_ne!(hidden_key(&whole), key, "the next message is another one");
    assert_eq!(scene.fake.key_of("slow \"one\"\ntwo").as_deref(), Some(key.as_str()));
}

/// The first one of the page.
fn hidden_key(page: &str) -> String {
    let after = page.split_once("name=\"key\" value=\"").expect("a key").1;
    after.split_once('"').expect("its end").0.to_owned()
}

#[tokio::test]
async fn other_sites_cannot_use_the_cookie() {
    let scene = Scene::new();
    let token = scene.claim().await;
    for path in ["/reboot", "/api/v1/reboot", "/agents/echo/stop", "/sign-out", "/api/v1/agents/echo/start"] {
        for (name, value) in [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("origin", "https://evil.example"),
            ("x-none", ""),
        ] {
            let request = Request::post(path)
                .header("host", "box:8443")
                .header("cookie", format!("__Host-agentd-session={token}"))
                .header(name, value)
                .body(Body::empty())
                .expect("a request");
            let reply = scene.send(request).await;
            assert_eq!(
                (reply.status, reply.report().code.as_str()),
                (StatusCode::FORBIDDEN, "forbidden"),
                "{path} {name}: {value}"
            );
        }
    }
    assert!(scene.fake.calls().is_empty());
    assert!(scene.auth.check(&token, agentd_console::auth::Use::Active).is_some(), "still signed in");
}

#[tokio::test]
async fn a_page_that_refreshes_itself_keeps_no_session_alive() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let refresh = || {
        let request = Request::get("/")
            .header("cookie", format!("__Host-agentd-session={token}"))
            .header("x-agentd-background", "1");
        scene.send(request.body(Body::empty()).expect("a request"))
    };
    scene.clock.advance(IDLE - Duration::from_secs(1));
    assert_eq!(refresh().await.status, StatusCode::OK);
    scene.clock.advance(Duration::from_secs(1));
    assert_eq!(refresh().await.status, StatusCode::UNAUTHORIZED, "no redirect: the page must notice");
}

#[tokio::test]
async fn assets_are_kept_for_ever_under_a_name_that_changes_with_them() {
    let scene = Scene::new();
    let page = scene.get("/claim", None).await.text();
    let urls: Vec<&str> = page.split('"').filter(|part| part.starts_with("/assets/")).collect();
    assert!(urls.len() >= 3, "{urls:?}");
    for url in urls {
        let reply = scene.get(url, None).await;
        assert_eq!(reply.status, StatusCode::OK, "{url}");
        assert!(reply.header("cache-control").contains("immutable"));
        assert!(!reply.body.is_empty());
        let stale = url.replacen("/assets/", "/assets/0", 1);
        assert_eq!(scene.get(&stale, None).await.status, StatusCode::NOT_FOUND);
    }
}

#[tokio::test]
async fn a_damaged_owner_file_is_never_an_unclaimed_appliance() {
    use agentd_console::StateFiles;
    for content in [
        &b""[..],
        b"{}",
        b"{\"format\":1,\"password_hash\":\"\"}",
        b"{\"format\":2,\"password_hash\":\"x\"}",
        b"\xff",
    ] {
        let files = Arc::new(Files::default());
        files.write("owner.json", content).expect("written");
        let opened = Auth::open(files, TestClock::default().boot());
        assert!(opened.is_err(), "{content:?}");
    }
}

#[tokio::test]
async fn guarded_routes_of_other_crates_need_a_session() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let v1 = Router::new().route("/v1/models", axum::routing::get(|| async { "models" }));
    let router = scene.router.clone().merge(agentd_console::guard(scene.auth.clone(), v1));
    let ask = |token: Option<&str>| {
        let request = with(token, Request::get("/v1/models")).body(Body::empty()).expect("a request");
        router.clone().oneshot(request)
    };
    let refused = ask(None).await.expect("infallible");
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert!(refused.headers().contains_key(header::CONTENT_SECURITY_POLICY));
    assert_eq!(ask(Some(&token)).await.expect("infallible").status(), StatusCode::OK);
}

#[tokio::test]
async fn the_audit_log_is_read_line_by_line_as_it_is_kept() {
    let scene = Scene::new();
    let token = scene.claim().await;
    let token = Some(token.as_str()); // What nobody can read is shown all the same:
    let spoiled = [fake::AUDIT_EXAMPLE, b"not a record\n"].concat();
    scene.fake.set_audit(&spoiled);
    let reply = scene.get("/api/v1/audit?after=0&limit=10", token).await;
    assert_eq!(reply.header("content-type"), "application/x-ndjson");
    assert_eq!(reply.body, spoiled);
    let head = scene.get("/api/v1/audit/head", token).await.json();
    assert_eq!(head["head"]["seq"], json!(1));
    for (query, status, code) in [
        ("?after=minus", StatusCode::BAD_REQUEST, "query_malformed"),
        ("?before=1", StatusCode::BAD_REQUEST, "query_malformed"),
        ("?agent=No+Name", StatusCode::BAD_REQUEST, "agent_name_malformed"),
        ("?agent=nobody", StatusCode::NOT_FOUND, "not_found"),
    ] {
        let reply = scene.get(&format!("/api/v1/audit{query}"), token).await;
        assert_eq!((reply.status, reply.report().code.as_str()), (status, code), "{query}");
    }
    let of_nothing = scene.get("/api/v1/audit?agent=echo", token).await;
    assert_eq!((of_nothing.status, of_nothing.body.len()), (StatusCode::OK, 0));
}

#[tokio::test]
async fn who_tries_to_come_in_is_told_to_the_witness() {
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let witness = Arc::clone(&told);
    let auth = Auth::open(Arc::new(Files::default()), TestClock::default().boot()).expect("opens");
    let auth = Arc::new(auth.witnessed_by(move |attempt| {
        let why = attempt.denied.map(|denied| denied.report().code);
        witness.lock().expect("lock").push((attempt.entrance, why));
    }));
    let router = router(Arc::new(Fake::default()), auth.clone());
    let ask = |path: &'static str, body: Value| {
        let request = Request::post(path).header("content-type", "application/json");
        router.clone().oneshot(request.body(Body::from(body.to_string())).expect("a request"))
    };
    let code = auth.claim_code().expect("unclaimed");
    for body in [
        json!({"code": "wrong", "password": PASSWORD}),
        json!({"code": code, "password": "short"}),
        json!({"code": code, "password": PASSWORD}),
        json!({"code": code, "password": PASSWORD}),
    ] {
        ask("/api/v1/claim", body).await.expect("answered");
    }
    for password in ["wrong", PASSWORD] {
        ask("/api/v1/login", json!({ "password": password })).await.expect("answered");
    }
    // Without a session, and with one that is made up; opening a page without any is no attempt.
    for (path, header) in
        [("/api/v1/status", ("x", "y")), ("/", ("authorization", "Bearer x")), ("/", ("x", "y"))]
    {
        let request = Request::get(path).header(header.0, header.1).body(Body::empty()).expect("a request");
        router.clone().oneshot(request).await.expect("answered");
    }
    let expected = [
        (Entrance::Claim, Some("claim_code_wrong")),
        (Entrance::Claim, Some("password_weak")),
        (Entrance::Claim, None),
        (Entrance::Claim, Some("conflict")),
        (Entrance::SignIn, Some("unauthorized")),
        (Entrance::SignIn, None),
        (Entrance::Session, Some("unauthorized")),
        (Entrance::Session, Some("unauthorized")),
    ];
    let expected = expected.map(|(entrance, why)| (entrance, why.map(str::to_owned)));
    assert_eq!(*told.lock().expect("lock"), expected);
}
