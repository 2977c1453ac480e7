//! An agent that asks the chat model what it is told to: a message says how often at once, and the body of the request;
//! the reply is an answer's status and body, of one that failed if one did. Each message and each request has a thread of
//! its own.
#![forbid(unsafe_code)]

use agentd_domain::agent_api::{Message, ReplyPart};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

fn main() {
    println!("asks what it is told to");
    loop {
        match ask("GET", "/agent/v1/messages/next?wait_s=20", "") {
            Ok((200, body)) => match serde_json::from_str::<Message>(&body) {
                Ok(message) => drop(std::thread::spawn(move || serve(&message))),
                Err(error) => println!("a message was not understood: {error}"),
            },
            Ok((204, _)) => {}
            Ok((status, body)) => wait(&format!("{status} {body}")),
            Err(error) => wait(&error.to_string()),
        }
    }
}

fn serve(message: &Message) {
    let (times, body) = message.text.split_once(' ').unwrap_or(("1", &message.text));
    let times = times.parse().unwrap_or(1).clamp(1, 16);
    let request = |_| {
        let body = body.to_owned();
        std::thread::spawn(move || ask("POST", "/v1/chat/completions", &body))
    };
    // All are begun before the first is waited for.
    let threads: Vec<_> = (0..times).map(request).collect();
    let answers = threads.into_iter().map(|thread| match thread.join() {
        Ok(Ok((status, body))) => (status, body),
        Ok(Err(error)) => (0, error.to_string()),
        Err(_) => (0, "its thread panicked".to_owned()),
    });
    let worst = answers.min_by_key(|(status, _)| *status == 200);
    let text = worst.map(|(status, body)| format!("{status} {body}")).unwrap_or_default();
    println!("{text}");
    let parts = [ReplyPart::Text { text }, ReplyPart::Done];
    let lines: String =
        parts.iter().filter_map(|part| serde_json::to_string(part).ok()).map(|line| line + "\n").collect();
    match ask("POST", &format!("/agent/v1/messages/{}/reply", message.id), &lines) {
        Ok((204, _)) => {}
        other => println!("the reply was not taken: {other:?}"),
    }
}

fn wait(why: &str) {
    println!("{why}");
    std::thread::sleep(Duration::from_secs(1));
}

/// HTTP/1.0, so that the answer ends with the connection and is not cut into chunks.
fn ask(method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect("127.0.0.1:7070")?;
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
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
