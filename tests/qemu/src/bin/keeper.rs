//! An agent that writes to every tier once, and at each start says what it finds there, each answer on a line of its
//! own: name, status, body. The test reads them in its log.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

fn main() {
    let told = ask("GET", "blocks/goals", "").is_ok_and(|(status, _)| status == 200);
    if !told {
        tell();
    }
    for (name, method, path, body) in [
        ("log", "GET", "working?run=all", ""),
        ("prompt", "GET", "prompt", ""),
        ("spirit", "POST", "recall", r#"{"query":"Where is the key of the attic?","tiers":["spirit"]}"#),
        ("knowledge", "POST", "recall", r#"{"query":"Who services the boiler?","tiers":["knowledge"]}"#),
    ] {
        say(name, method, path, body);
    }
    println!("the keeper has looked");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn tell() {
    say("logged", "POST", "remember", r#"{"tier":"working","text":"The keeper came to the house."}"#);
    say(
        "told",
        "POST",
        "remember",
        r#"{"tier":"spirit","role":"fact","text":"The attic key hangs behind the clock.","source":{"kind":"user"}}"#,
    );
    // The owner grants it while this runs.
    let document =
        r#"{"title":"manual","text":"The boiler in the cellar is serviced by Mrs. Brandt every March."}"#;
    loop {
        match ask("POST", "knowledge/house/documents", document) {
            Ok((200, _)) => break,
            _ => std::thread::sleep(Duration::from_millis(300)),
        }
    }
    // Last: with it all was told.
    say("written", "PUT", "blocks/goals", r#"{"text":"look after the house","version":0}"#);
}

fn say(name: &str, method: &str, path: &str, body: &str) {
    match ask(method, path, body) {
        Ok((status, body)) => println!("{name} {status} {}", body.replace('\n', "\\n").replace('\r', "")),
        Err(error) => println!("{name} 0 {error}"),
    }
}

/// HTTP/1.0, so that the answer ends with the connection and is not cut into chunks.
fn ask(method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect("127.0.0.1:7070")?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let length = body.len();
    write!(
        stream,
        "{method} /agent/v1/memory/{path} HTTP/1.0\r\nhost: 127.0.0.1:7070\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, body.to_owned()))
}
