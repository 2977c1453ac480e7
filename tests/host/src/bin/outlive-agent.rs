//! An agent that asks and remembers without end, and writes down what was acknowledged.
//!
//! In:    agentd's API on 127.0.0.1:7070; `/work/stop`: while it exists, nothing new is begun, and `/work/resting` says
//!        that nothing is under way.
//! Out:   `/work/acknowledged.jsonl`, one line per operation, written after its answer's end was seen.
//! Always: an operation follows from the agent's name and the operation's number alone, body and key. So it is
//!         repeated with the same key until it is acknowledged: after a broken connection by this process, and by
//!         the next one when this was killed in between.
//! Never:  a memory of its own for what it has done but that file.

#![forbid(unsafe_code)]

use echo_agent::http::{self, Body, Request};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

const AUTHORITY: &str = "127.0.0.1:7070";
const ACKNOWLEDGED: &str = "/work/acknowledged.jsonl";
const STOP: &str = "/work/stop";
const RESTING: &str = "/work/resting";
/// An answer of the tiny model takes milliseconds; a busy machine and a dead agentd some seconds.
const SILENCE: Duration = Duration::from_secs(30);
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MOST: Duration = Duration::from_millis(200);

/// What came of one attempt.
enum Attempt {
    /// The answer with its end.
    Whole(Value),
    /// To be tried again; the text that came before it broke off.
    Broken(String),
    /// agentd says that this will never do.
    Refused(String),
}

fn main() -> io::Result<()> {
    let name = own_name();
    let mut log = OpenOptions::new().create(true).append(true).open(ACKNOWLEDGED)?;
    // The one that may be in doubt is the first after those that are acknowledged.
    let mut number = acknowledged()? + 1;
    println!("{name} begins with operation {number}");
    loop {
        if Path::new(STOP).exists() {
            fs::write(RESTING, "")?;
            std::thread::sleep(PAUSE_MOST);
            continue;
        }
        let _ = fs::remove_file(RESTING);
        let dice = dice(&name, number);
        let line = match dice % 10 {
            0..=4 => complete(&name, number, dice),
            5..=8 => remember(&name, number, dice),
            _ => repeat(&name, number, dice),
        };
        write_line(&mut log, &line)?;
        number += 1;
        // So that twenty of these do not only measure the machine.
        std::thread::sleep(Duration::from_millis(20 + dice / 100 % 100));
    }
}

/// Numbers for everything that is to differ between operations.
fn dice(name: &str, number: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (name, number).hash(&mut hasher);
    hasher.finish()
}

fn acknowledged() -> io::Result<u64> {
    let text = fs::read_to_string(ACKNOWLEDGED)?;
    let numbers = text.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        line["number"].as_u64()
    });
    Ok(numbers.max().unwrap_or(0))
}

/// One write: a line is whole or absent.
fn write_line(log: &mut File, line: &Value) -> io::Result<()> {
    log.write_all(format!("{line}\n").as_bytes())
}

fn own_name() -> String {
    let mut pause = PAUSE_FIRST;
    loop {
        let request = Request {
            method: "GET",
            path: "/agent/v1/self",
            headers: &[],
            body: Body::None,
            patience: SILENCE,
        };
        let answer = http::send(AUTHORITY, &request).and_then(http::Response::text);
        let name = answer.ok().and_then(|text| {
            let value: Value = serde_json::from_str(&text).ok()?;
            value["name"].as_str().map(str::to_owned)
        });
        if let Some(name) = name {
            return name;
        }
        wait(&mut pause);
    }
}

fn wait(pause: &mut Duration) {
    std::thread::sleep(*pause);
    *pause = (*pause * 2).min(PAUSE_MOST);
}

/// Random sampling without a seed: only the very same generation has the same text again.
fn completion_of(name: &str, number: u64, dice: u64) -> (&'static str, String, Value) {
    let body = json!({
        "model": "tiny", "stream": true, "stream_options": { "include_usage": true }, "temperature": 1.0,
        "max_tokens": 32 + dice / 10_000 % 200,
        "messages": [{ "role": "user", "content": format!("This is operation {number} of {name}.") }],
    });
    ("/v1/chat/completions", format!("{name}-{number}"), body)
}

fn memory_of(name: &str, number: u64, dice: u64) -> (&'static str, String, Value) {
    let tier = if (dice / 10_000).is_multiple_of(4) { "spirit" } else { "working" };
    let text =
        format!("operation {number} of {name}: {}", "word ".repeat(1 + dice as usize / 1_000_000 % 40));
    ("/agent/v1/memory/remember", format!("{name}-{number}"), json!({ "tier": tier, "text": text }))
}

fn complete(name: &str, number: u64, dice: u64) -> Value {
    let (path, key, body) = completion_of(name, number, dice);
    let patience = if (dice / 100_000).is_multiple_of(4) { Patience::LeavesOnce } else { Patience::Stays };
    let mut line = insist(path, &key, &body, patience);
    line["kind"] = "completion".into();
    line["number"] = number.into();
    line
}

fn remember(name: &str, number: u64, dice: u64) -> Value {
    let (path, key, body) = memory_of(name, number, dice);
    let mut line = insist(path, &key, &body, Patience::Stays);
    line["kind"] = "memory".into();
    line["number"] = number.into();
    line["text"] = body["text"].clone();
    line
}

/// An earlier operation once more, as an agent that is not sure does.
fn repeat(name: &str, number: u64, dice_now: u64) -> Value {
    let nothing = json!({ "kind": "nothing", "number": number });
    let back = 1 + dice_now / 10_000 % 20;
    let Some(earlier) = number.checked_sub(back).filter(|earlier| *earlier > 0) else { return nothing };
    let dice = dice(name, earlier);
    let (path, key, body) = match dice % 10 {
        0..=4 => completion_of(name, earlier, dice),
        5..=8 => memory_of(name, earlier, dice),
        _ => return nothing,
    };
    let mut line = insist(path, &key, &body, Patience::Stays);
    line["kind"] = "repeat".into();
    line["number"] = number.into();
    line["of"] = earlier.into();
    line
}

/// Whether it hangs up in the middle of the first answer, as a client with too short a time limit does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    Stays,
    LeavesOnce,
}

/// Until it is acknowledged, or refused for good.
fn insist(path: &str, key: &str, body: &Value, patience: Patience) -> Value {
    let begun = Instant::now();
    let (mut pause, mut attempts, mut diverged) = (PAUSE_FIRST, 0_u32, false);
    let mut partial: Vec<String> = Vec::new();
    loop {
        attempts += 1;
        let now = if attempts == 1 { patience } else { Patience::Stays };
        let mut line = match attempt(path, key, body, now) {
            Attempt::Broken(text) => {
                partial.push(text);
                wait(&mut pause);
                continue;
            }
            Attempt::Whole(line) => line,
            Attempt::Refused(why) => json!({ "refused": why }),
        };
        if let Some(text) = line["text"].as_str() {
            diverged |= partial.iter().any(|part| !text.starts_with(part.as_str()));
        }
        let most = partial.iter().map(String::len).max().unwrap_or(0);
        line["key"] = key.into();
        line["attempts"] = attempts.into();
        line["left"] = (patience == Patience::LeavesOnce).into();
        line["diverged"] = diverged.into();
        line["partial_bytes"] = most.into();
        line["elapsed_ms"] = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX).into();
        return line;
    }
}

fn attempt(path: &str, key: &str, body: &Value, patience: Patience) -> Attempt {
    let body = body.to_string();
    let request = Request {
        method: "POST",
        path,
        headers: &[("idempotency-key", key)],
        body: Body::Whole(body.as_bytes()),
        patience: SILENCE,
    };
    let response = match http::send(AUTHORITY, &request) {
        Ok(response) => response,
        Err(_) => return Attempt::Broken(String::new()),
    };
    match response.status {
        200 if path.ends_with("/completions") => stream(response, patience),
        200 => match response.text().ok().and_then(|text| serde_json::from_str::<Value>(&text).ok()) {
            Some(answer) => Attempt::Whole(json!({ "id": answer["id"] })),
            None => Attempt::Broken(String::new()),
        },
        429 | 500..=599 => Attempt::Broken(String::new()),
        status => Attempt::Refused(format!("{status}: {}", response.text().unwrap_or_default())),
    }
}

fn stream(response: http::Response, patience: Patience) -> Attempt {
    let (mut text, mut id, mut usage) = (String::new(), Value::Null, Value::Null);
    for line in response.lines() {
        let Ok(line) = line else { return Attempt::Broken(text) };
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Attempt::Whole(json!({
                "text": text, "id": id,
                "prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"],
            }));
        }
        let Ok(chunk) = serde_json::from_str::<Value>(data) else { return Attempt::Broken(text) };
        if !chunk["error"].is_null() {
            return Attempt::Broken(text);
        }
        id = chunk["id"].clone();
        if !chunk["usage"].is_null() {
            usage = chunk["usage"].clone();
        }
        text.push_str(chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        if patience == Patience::LeavesOnce && !text.is_empty() {
            return Attempt::Broken(text);
        }
    }
    Attempt::Broken(text)
}
