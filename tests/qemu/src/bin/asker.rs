//! An agent that asks the chat model what it is told to: a message is the body of a request, the reply is the answer's
//! status and body. Each message has a thread of its own, so that several are asked at once.
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
    let text = match ask("POST", "/v1/chat/completions", &message.text) {
        Ok((status, body)) => format!("{status} {body}"),
        Err(error) => format!("0 {error}"),
    };
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
