//! A run's own socket, through which a test speaks for its agent.
//!
//! By HTTP/1.0, so that an answer is its bytes up to the end and has no chunks.

use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Longer than any answer of a tiny model takes; a hang fails, it does not stay.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Clone)]
pub struct Line(PathBuf);

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// In lower case.
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or(Value::Null)
    }
}

impl Line {
    /// `pid` is the run's jail's.
    pub fn of_run(pid: i32) -> Self {
        Self(PathBuf::from(format!("/proc/{pid}/root/run/agentd.sock")))
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.0).expect("the agent's socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        stream
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        let mut stream = self.connect();
        let head = format!("GET {path} HTTP/1.0\r\nhost: x\r\n\r\n");
        stream.write_all(head.as_bytes()).expect("agentd reads");
        let answer = answer(&mut stream);
        (answer.status, answer.json())
    }

    pub fn post(&self, body: &Value) -> (u16, Value) {
        let answer = self.whole(body);
        (answer.status, answer.json())
    }

    pub fn whole(&self, body: &Value) -> Answer {
        let mut stream = self.connect();
        send(&mut stream, body);
        answer(&mut stream)
    }

    /// Status and code of a refusal that has OpenAI's form.
    pub fn refusal(&self, body: &Value) -> (u16, String) {
        let (status, answer) = self.post(body);
        let error = &answer["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{status}: {answer}");
        (status, error["code"].as_str().unwrap_or_default().to_owned())
    }
}

/// To `/v1/completions`.
pub fn send(stream: &mut UnixStream, body: &Value) {
    send_to(stream, "/v1/completions", body);
}

pub fn send_to(stream: &mut UnixStream, path: &str, body: &Value) {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    // A server that refuses early closes early.
    let _ = stream.write_all(&[head.as_bytes(), body.as_bytes()].concat());
}

/// All that comes until the end.
pub fn answer(stream: &mut UnixStream) -> Answer {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    Answer {
        status: status.unwrap_or_else(|| panic!("no answer: {text:?}")),
        head: head.to_ascii_lowercase(),
        body: body.to_owned(),
    }
}
