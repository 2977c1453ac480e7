//! An agent that asks agentd for everything it offers, once, and prints each answer on a line of its own:
//! name, status, body. The test reads them in its log. Its own tool calls are this program too.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const CHAT: &str =
    r#""model":"default","temperature":0,"max_tokens":8,"messages":[{"role":"user","content":"Good day"}]"#;

const CALLS: &str = "/agent/v1/calls";

/// As numbers the vector would be longer than a line of a log may be.
const EMBED: &str = r#"{"model":"default","input":["a ship at sea"],"encoding_format":"base64"}"#;

fn main() {
    if let Some(tool) = std::env::args().nth(1) {
        return be_a_tool(&tool);
    }
    let chat = format!("{{{CHAT}}}");
    let stream = format!("{{{CHAT},\"stream\":true}}");
    let visits: [(&str, &str, &str, &str); 12] = [
        ("self", "GET", "/agent/v1/self", ""),
        ("models", "GET", "/v1/models", ""),
        ("embeddings", "POST", "/v1/embeddings", EMBED),
        ("chat", "POST", "/v1/chat/completions", &chat),
        ("stream", "POST", "/v1/chat/completions", &stream),
        (
            "remember",
            "POST",
            "/agent/v1/memory/remember",
            r#"{"tier":"spirit","role":"fact","text":"The boiler in the cellar was serviced by Mr Keller."}"#,
        ),
        ("recall", "POST", "/agent/v1/memory/recall", r#"{"query":"Who looked after our heating?"}"#),
        (
            "nobody",
            "POST",
            "/v1/chat/completions",
            r#"{"model":"nobody","messages":[{"role":"user","content":"x"}]}"#,
        ),
        (
            "forbidden",
            "POST",
            "/agent/v1/memory/remember",
            r#"{"tier":"knowledge","role":"fact","text":"not allowed"}"#,
        ),
        ("tool", "POST", CALLS, r#"{"exec":["/agent/bin/visitor","copy"],"stdin":"seven plums"}"#),
        (
            "greedy",
            "POST",
            CALLS,
            r#"{"exec":["/agent/bin/visitor","eat"],"memory_max_bytes":16777216,"timeout_ms":60000}"#,
        ),
        ("alone", "POST", CALLS, r#"{"exec":["/agent/bin/visitor","connect"],"no_sockets":true}"#),
    ];
    for (name, method, path, body) in visits {
        match ask(method, path, body) {
            Ok((status, body)) => println!("{name} {status} {}", body.replace('\n', "\\n").replace('\r', "")),
            Err(error) => println!("{name} 0 {error}"),
        }
    }
    println!("the visit is over");
}

fn be_a_tool(what: &str) {
    match what {
        "copy" => {
            let mut text = String::new();
            let read = std::io::stdin().read_to_string(&mut text);
            println!("read {}: {text}", read.is_ok());
        }
        "eat" => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(vec![1_u8; 1 << 20]);
                std::hint::black_box(&eaten);
            }
        }
        _ => println!("{:?}", TcpStream::connect("127.0.0.1:7070").map(drop)),
    }
    std::process::exit(3);
}

/// HTTP/1.0, so that the answer ends with the connection and is not cut into chunks.
fn ask(method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect("127.0.0.1:7070")?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nhost: 127.0.0.1:7070\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, body.to_owned()))
}
