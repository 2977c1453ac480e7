//! An agent that has children. Its last argument says who it is in its family; it prints what it was answered, a line
//! each: name, status, body. The test reads them in its log.
#![forbid(unsafe_code)]

use agentd_domain::agent_api::TOKEN_HEADER;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn main() {
    let who = std::env::args().next_back().unwrap_or_default();
    say("self", ask("GET", "/agent/v1/self", "", ""));
    match who.as_str() {
        "parent" => parent(),
        "child" => child(),
        "brief" => return println!("a brief life is over"),
        "thief" => return thief(),
        other => println!("unknown member of the family: {other}"),
    }
    // What is revoked is seen by a call that is denied, or not seen any more.
    let mut last = 0;
    loop {
        let status = ask("GET", "/agent/v1/messages/next?wait_s=0", "", "").map_or(0, |(status, _)| status);
        if status != last {
            println!("messages are answered with {status}");
            last = status;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn parent() {
    let start = |name: &str, key: &str, body: &str| say(name, ask("POST", "/agent/v1/agents", key, body));
    let child =
        r#"{"arguments":["child"],"by":{"api":["messages"],"limits":{"memory.max":16777216,"pids":4}}}"#;
    let life = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
    start("child", &life, child);
    // The same request again is the same child.
    start("again", &life, child);
    start("other", &life, r#"{"arguments":["brief"]}"#);
    start("right", "", r#"{"arguments":["child"],"by":{"api":["models"]}}"#);
    start("large", "", r#"{"arguments":["child"],"by":{"limits":{"memory.max":1073741824}}}"#);
    start("shared", "", r#"{"arguments":["child"],"by":{"limits":{"pids":30}}}"#);
    start("brief", "", r#"{"arguments":["brief"],"by":{"api":[]}}"#);
    start("third", "", r#"{"arguments":["child"]}"#);
    say("children", ask("GET", "/agent/v1/agents", "", ""));
}

fn child() {
    say("start", ask("POST", "/agent/v1/agents", "", r#"{"arguments":["child"]}"#));
    say(
        "remember",
        ask("POST", "/agent/v1/memory/remember", "", r#"{"tier":"spirit","text":"not allowed"}"#),
    );
}

/// With somebody else's token, which its package brought, and with its own.
fn thief() {
    let stolen = std::fs::read_to_string("/agent/stolen").unwrap_or_default();
    let with = |token: &str, path: &str| send("GET", path, &format!("{TOKEN_HEADER}: {token}\r\n"), "");
    for path in ["/agent/v1/self", "/agent/v1/agents", "/agent/v1/messages/next?wait_s=0", "/v1/models"] {
        say("stolen", with(stolen.trim(), path));
    }
    let own = ask("GET", "/agent/v1/token", "", "").map(|(_, body)| body).unwrap_or_default();
    let own = own.split_once("\"token\":\"").and_then(|(_, rest)| rest.split('"').next()).unwrap_or("");
    say("own", with(own, "/agent/v1/self"));
}

fn say(name: &str, answer: std::io::Result<(u16, String)>) {
    match answer {
        Ok((status, body)) => println!("{name} {status} {}", body.replace('\n', " ")),
        Err(error) => println!("{name} 0 {error}"),
    }
}

fn ask(method: &str, path: &str, key: &str, body: &str) -> std::io::Result<(u16, String)> {
    let key = if key.is_empty() { String::new() } else { format!("idempotency-key: {key}\r\n") };
    send(method, path, &key, body)
}

/// HTTP/1.0, so that the answer ends with the connection and is not cut into chunks.
fn send(method: &str, path: &str, headers: &str, body: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect("127.0.0.1:7070")?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nhost: 127.0.0.1:7070\r\n{headers}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, body.to_owned()))
}
