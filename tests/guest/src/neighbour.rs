//! An agent that works quietly beside others: it recalls what it has remembered and asks for sixteen tokens, in turn,
//! and says of each how long it took: `recall 12345 us ok`, `chat 123456 us ok`. Anything but an answer is `failed`.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const FACTS: [&str; 8] = [
    "The spare key hangs behind the blue door.",
    "The boiler in the cellar was serviced by Mr Keller.",
    "Anna's train arrives on Thursday at nine.",
    "The bees were moved to the upper meadow in May.",
    "The old printer needs the driver from its own disk.",
    "Grandmother's bread wants two hours under a cloth.",
    "The gate's code is the year in which the house was built.",
    "The lease of the garage ends in October.",
];
const RECALL: &str = r#"{"query":"Who looked after our heating?","k":4,"tiers":["spirit"]}"#;
const CHAT: &str = r#"{"model":"default","temperature":0,"max_tokens":16,"messages":[{"role":"user","content":"Good day"}]}"#;
/// Longer than an answer takes on the slowest machine; shorter than anybody's patience.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    for fact in FACTS {
        let body = format!(r#"{{"tier":"spirit","role":"fact","text":"{fact}"}}"#);
        while !ask("/agent/v1/memory/remember", &body).is_ok_and(|status| status == 200) {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    // The model may still be loading.
    while !ask("/v1/chat/completions", CHAT).is_ok_and(|status| status == 200) {
        std::thread::sleep(Duration::from_secs(1));
    }
    println!("begins");
    loop {
        for (name, path, body) in
            [("recall", "/agent/v1/memory/recall", RECALL), ("chat", "/v1/chat/completions", CHAT)]
        {
            let begin = Instant::now();
            let answer = ask(path, body);
            let took = begin.elapsed().as_micros();
            match answer {
                Ok(200) => println!("{name} {took} us ok"),
                Ok(status) => println!("{name} {took} us failed: status {status}"),
                Err(error) => println!("{name} {took} us failed: {error}"),
            }
        }
    }
}

/// HTTP/1.0, so that the answer ends with the connection.
fn ask(path: &str, body: &str) -> std::io::Result<u16> {
    let mut stream = TcpStream::connect("127.0.0.1:7070")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nhost: 127.0.0.1:7070\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.ok_or_else(|| std::io::Error::other("no answer"))
}
