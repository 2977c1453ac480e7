//! Random requests of many agents over real sockets, as runs send them: does an answer ever hold another's words, or
//! does a request ever change another's memory?
//!
//! `ISOLATION_REQUESTS=100000` is the long form (`scripts/test long memory-isolation`), `ISOLATION_SEED` repeats a run.
//! The same requests against a router with a look-up by id over all agents must be caught.

use super::{grant, made, other, scene};
use crate::agent_api::serve::serve_both;
use crate::agent_api::{Caller, router};
use agentd_domain::memory_api::{Access, Quota};
use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

const AGENTS: usize = 6;
const REQUESTS: u64 = 600;

fn mark(who: usize) -> String {
    format!("mark{who:03}x")
}

fn collection_mark(which: usize) -> String {
    format!("shared{which:03}x")
}

/// Collection 0 is read by the first half and written by agent 0; collection 1 by nobody but agent 5.
fn may_read(who: usize, which: usize) -> bool {
    if which == 0 { who < AGENTS / 2 } else { who == AGENTS - 1 }
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: usize) -> usize {
        (self.next() % most as u64) as usize
    }
}

/// A run's connection to its own socket.
struct Line {
    stream: BufReader<TcpStream>,
}

impl Line {
    async fn to(address: SocketAddr) -> Self {
        Self { stream: BufReader::new(TcpStream::connect(address).await.expect("connected")) }
    }

    async fn ask(&mut self, method: &str, path: &str, header: &str, body: Option<&Value>) -> (u16, String) {
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} /agent/v1/memory/{path} HTTP/1.1\r\nhost: 127.0.0.1:7070\r\n{header}content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let stream = self.stream.get_mut();
        // In one piece: two would wait for each other, forty milliseconds each (Nagle's algorithm and delayed answers).
        stream.write_all([head, body].concat().as_bytes()).await.expect("sent");
        let mut line = String::new();
        self.stream.read_line(&mut line).await.expect("a status");
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| panic!("{path}: {line}"));
        let (mut length, mut chunked) = (0, false);
        loop {
            line.clear();
            self.stream.read_line(&mut line).await.expect("a header");
            let Some((name, value)) = line.split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().expect("a length"),
                "transfer-encoding" => chunked = value.trim() == "chunked",
                _ => {}
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await.expect("a body");
        while chunked {
            line.clear();
            self.stream.read_line(&mut line).await.expect("a length");
            let length = usize::from_str_radix(line.trim(), 16).expect("a length");
            // The chunk and the end of its line.
            let mut chunk = vec![0; length + 2];
            self.stream.read_exact(&mut chunk).await.expect("a chunk");
            body.extend_from_slice(&chunk[..length]);
            chunked = length > 0;
        }
        (status, String::from_utf8(body).expect("UTF-8"))
    }
}

struct Crowd {
    lines: Vec<Line>,
    ids: Vec<Vec<String>>,
    agents: Vec<String>,
    leak: Option<String>,
}

impl Crowd {
    fn look(&mut self, who: usize, what: &str, answer: &str) {
        let foreign = (0..AGENTS).filter(|other| *other != who).map(mark);
        let shared = (0..2).filter(|which| !may_read(who, *which)).map(collection_mark);
        if let Some(found) = foreign.chain(shared).find(|mark| answer.contains(mark)) {
            self.leak.get_or_insert_with(|| format!("{what}: {who} was told of {found}: {answer}"));
        }
    }

    async fn ask(&mut self, who: usize, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
        self.ask_with(who, method, path, "", body).await
    }

    async fn ask_with(
        &mut self,
        who: usize,
        method: &str,
        path: &str,
        header: &str,
        body: Option<Value>,
    ) -> (u16, String) {
        let (status, answer) = self.lines[who].ask(method, path, header, body.as_ref()).await;
        assert!(status < 500, "{method} {path}: {answer}");
        self.look(who, &format!("{method} {path}"), &answer);
        (status, answer)
    }

    fn note(&mut self, who: usize, status: u16, answer: &str) {
        let told: Value = serde_json::from_str(answer).unwrap_or_default();
        if let (200, Some(id)) = (status, told["id"].as_str()) {
            self.ids[who].push(id.to_owned());
        }
    }

    async fn tell(&mut self, who: usize, random: &mut Random) {
        let tier = ["working", "spirit"][random.below(2)];
        let text = format!("{} ship plum number {}", mark(who), random.next());
        let (status, answer) =
            self.ask(who, "POST", "remember", Some(json!({ "tier": tier, "text": text }))).await;
        self.note(who, status, &answer);
    }

    async fn one(&mut self, random: &mut Random) {
        let (who, whose) = (random.below(AGENTS), random.below(AGENTS));
        let id = match self.ids[whose].len() {
            0 => return self.tell(who, random).await,
            many => self.ids[whose][random.below(many)].clone(),
        };
        match random.below(14) {
            0 => self.tell(who, random).await,
            1 | 2 => {
                let (status, _) = self.ask(who, "GET", &format!("records/{id}"), None).await;
                if status == 200 && who != whose {
                    self.leak.get_or_insert_with(|| format!("{who} read {id} of {whose}"));
                }
            }
            3 => drop(self.ask(who, "GET", &format!("records/{id}/history"), None).await),
            4 | 5 => {
                let query = [mark(whose), "ship".to_owned(), collection_mark(random.below(2))]
                    [random.below(3)]
                .clone();
                let tiers =
                    [json!(["spirit", "working"]), json!(["knowledge"]), json!(["spirit", "knowledge"])];
                let tiers = tiers[random.below(3)].clone();
                let body = json!({ "query": query, "tiers": tiers, "signals": "words", "k": 20 });
                drop(self.ask(who, "POST", "recall", Some(body)).await);
            }
            6 => drop(self.ask(who, "GET", &format!("records?tier=working&before={id}"), None).await),
            7 => drop(
                self.ask(
                    who,
                    "GET",
                    ["journal", "working?run=all", "usage", "knowledge"][random.below(4)],
                    None,
                )
                .await,
            ),
            8 => {
                let body = json!({ "text": format!("{} plan {}", mark(who), random.next()), "version": random.below(3) });
                drop(self.ask(who, "PUT", &format!("blocks/only-{who}"), Some(body)).await);
            }
            9 => drop(self.ask(who, "GET", &format!("blocks/only-{whose}"), None).await),
            // What names somebody else names nobody.
            10 => {
                let agent = self.agents[whose].clone();
                let header = format!("x-agent-id: {agent}\r\nagentd-agent: {agent}\r\n");
                drop(self.ask_with(who, "GET", "records?tier=working", &header, None).await);
                drop(self.ask(who, "GET", &format!("records?tier=working&agent={agent}"), None).await);
            }
            11 => {
                let name = ["first", "second"][random.below(2)];
                let text = format!("{} by {}", collection_mark(usize::from(name == "second")), random.next());
                let body = json!({ "title": "t", "text": text });
                let (status, answer) =
                    self.ask(who, "POST", &format!("knowledge/{name}/documents"), Some(body)).await;
                if status == 200 && (who, name) != (0, "first") {
                    self.leak.get_or_insert_with(|| format!("{who} wrote {name}: {answer}"));
                }
            }
            _ => self.attempt(who, whose, &id, random).await,
        }
    }

    /// Against another's record: judged by that one.
    async fn attempt(&mut self, who: usize, whose: usize, id: &str, random: &mut Random) {
        let of = |text: &str| {
            let mut record: Value = serde_json::from_str(text).unwrap_or_default();
            for passing in ["presence", "uses", "strength", "last_used_unix_ms"] {
                record[passing] = Value::Null;
            }
            record
        };
        let path = format!("records/{id}");
        let before = self.ask(whose, "GET", &path, None).await;
        let (deed, body) = [
            ("forget", None),
            ("restore", None),
            ("pin", Some(json!({ "pinned": random.below(2) == 0 }))),
            ("correct", Some(json!({ "text": format!("{} corrected {}", mark(who), random.next()) }))),
        ][random.below(4)]
        .clone();
        let (status, answer) = self.ask(who, "POST", &format!("{path}/{deed}"), body).await;
        if who == whose {
            return self.note(who, status, &answer);
        }
        let after = self.ask(whose, "GET", &path, None).await;
        if status < 300 || (before.0, of(&before.1)) != (after.0, of(&after.1)) {
            self.leak.get_or_insert_with(|| format!("{who} could {deed} {id} of {whose}: {answer}"));
        }
    }
}

/// How a caller's requests reach its router.
type Serving = fn(Caller, PathBuf, CancellationToken) -> SocketAddr;

fn as_runs(caller: Caller, socket: PathBuf, over: CancellationToken) -> SocketAddr {
    let tcp = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = tcp.local_addr().expect("an address");
    let unix = UnixListener::bind(socket).expect("a socket");
    serve_both(tcp.into(), unix.into(), caller, &over).expect("served");
    address
}

/// A double of the API that looks a record up by its id, whoever asks.
fn by_id(caller: Caller, _: PathBuf, _: CancellationToken) -> SocketAddr {
    async fn anybodys(Extension(caller): Extension<Caller>, Path(id): Path<String>) -> Response {
        let id = id.parse().expect("an id");
        for who in 1..=AGENTS as u128 {
            let agent = agentd_domain::ids::AgentId(uuid::Uuid::from_u128(who));
            if let Ok(record) = caller.services.memories.show(agent, id).await {
                return Json(record).into_response();
            }
        }
        axum::http::StatusCode::NOT_FOUND.into_response()
    }
    let tcp = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    tcp.set_nonblocking(true).expect("set");
    let address = tcp.local_addr().expect("an address");
    let app = Router::new()
        .route("/agent/v1/memory/records/{id}", get(anybodys))
        .fallback_service(router())
        .layer(Extension(caller));
    let listener = tokio::net::TcpListener::from_std(tcp).expect("a listener");
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

async fn explore(serving: Serving, seed: u64, requests: u64) -> Option<String> {
    let scene = scene().await;
    let over = CancellationToken::new();
    made(&scene, "first", Quota::default()).await;
    made(&scene, "second", Quota::default()).await;
    let mut crowd =
        Crowd { lines: Vec::new(), ids: vec![Vec::new(); AGENTS], agents: Vec::new(), leak: None };
    for who in 0..AGENTS {
        let caller = other(&scene, who as u128 + 1, who as u128 + 100);
        for (which, name) in ["first", "second"].into_iter().enumerate() {
            if may_read(who, which) {
                let access = if (who, which) == (0, 0) { Access::ReadWrite } else { Access::Read };
                grant(&caller, name, Some(access)).await;
            }
        }
        crowd.agents.push(caller.agent.to_string());
        let address = serving(caller, scene.folder.path().join(format!("{who}.sock")), over.clone());
        crowd.lines.push(Line::to(address).await);
    }
    let mut random = Random(seed);
    for who in 0..AGENTS {
        crowd.tell(who, &mut random).await;
    }
    // So that there is something to leak.
    let memories = Arc::new(scene.caller.services.memories.clone());
    for (which, name) in ["first", "second"].into_iter().enumerate() {
        let text = format!("{} ship plum", collection_mark(which));
        let document = serde_json::from_value(json!({ "title": "t", "text": text })).expect("a document");
        let name = name.parse().expect("a name");
        memories.add_document(crate::memory::Writer::Owner, name, document, None).await.expect("added");
    }
    for _ in 0..requests {
        if crowd.leak.is_some() {
            break;
        }
        crowd.one(&mut random).await;
    }
    over.cancel();
    crowd.leak
}

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_holds_another_agent_s_words() {
    let (requests, seed) = (number("ISOLATION_REQUESTS", REQUESTS), number("ISOLATION_SEED", 1));
    let began = Instant::now();
    let leak = explore(as_runs, seed, requests).await;
    println!("{requests} requests of {AGENTS} agents, seed {seed}, {:.1} s", began.elapsed().as_secs_f32());
    assert_eq!(leak, None, "ISOLATION_SEED={seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_look_up_by_id_is_caught() {
    let leak = explore(by_id, 1, REQUESTS).await;
    println!("caught: {leak:?}");
    assert!(leak.is_some());
}
