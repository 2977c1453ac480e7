//! An agent that behaves badly in one way, named by its first argument.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

/// A thousand hours are as good as for ever.
const FOR_EVER: Duration = Duration::from_secs(3_600_000);

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("exit") => {
            println!("leaving at once");
            ExitCode::from(3)
        }
        // Touches every page, so that the memory is really charged to the cgroup.
        Some("eat-memory" | "livelock") => {
            println!("eating");
            let mut eaten: Vec<Vec<u8>> = Vec::new();
            loop {
                eaten.push(vec![1; 1 << 20]);
                std::hint::black_box(&eaten);
            }
        }
        // Well behaved, and quiet.
        Some("sit") => {
            println!("sitting");
            std::thread::sleep(FOR_EVER);
            ExitCode::SUCCESS
        }
        // Takes its message and does nothing with it.
        Some("hang") => loop {
            let (status, _) = ask("GET", "/agent/v1/messages/next?wait_s=20", "");
            if status == 200 {
                println!("hanging");
                std::thread::sleep(FOR_EVER);
            }
            std::thread::sleep(Duration::from_millis(200));
        },
        // Says that it hurts, with what would be markup on a page, and asks how it is seen.
        Some("hurt") => {
            let pain = r#"{"kind":"sensor.lost","severity":"high","message":"the <b>boiler</b> is silent"}"#;
            println!("pain {}", ask("POST", "/agent/v1/self/pain", pain).0);
            std::thread::sleep(Duration::from_secs(5));
            println!("self {}", ask("GET", "/agent/v1/self", "").1);
            std::thread::sleep(FOR_EVER);
            ExitCode::SUCCESS
        }
        // A call of the kill list. Should it return, the wall did not hold.
        Some("reboot") => {
            println!("rebooting: {:?}", rustix::system::reboot(rustix::system::RebootCommand::CadOff));
            ExitCode::SUCCESS
        }
        // Starts threads against its limit for a while, then behaves.
        Some("threads") => {
            println!("starting threads");
            let end = std::time::Instant::now() + Duration::from_secs(20);
            while std::time::Instant::now() < end {
                let sleeper = || std::thread::sleep(FOR_EVER);
                if std::thread::Builder::new().stack_size(64 << 10).spawn(sleeper).is_err() {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            println!("calm again");
            std::thread::sleep(FOR_EVER);
            ExitCode::SUCCESS
        }
        other => {
            eprintln!("unknown way to misbehave: {other:?}");
            ExitCode::from(64)
        }
    }
}

/// HTTP/1.0, so that the answer ends with the connection; status 0 when there is none.
fn ask(method: &str, path: &str, body: &str) -> (u16, String) {
    let attempt = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect("127.0.0.1:7070")?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nhost: 127.0.0.1:7070\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = attempt().unwrap_or_default();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0), body.to_owned())
}
