//! How is one command given to a running QEMU?
//!
//! A connection per command: greeting, capabilities, command, answer; events in between are passed over.
//! Source: docs/interop/qmp-spec.rst of QEMU.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// QEMU answers at once, unless the host is very busy or it is gone.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn execute(socket: &Path, command: &str, arguments: &Value) -> Result<Value> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let greeting = message(&mut reader)?;
    if greeting.get("QMP").is_none() {
        bail!("not a QMP greeting: {greeting}");
    }
    ask(&stream, &mut reader, "qmp_capabilities", &Value::Null)?;
    ask(&stream, &mut reader, command, arguments)
}

fn ask(mut to: &UnixStream, from: &mut impl BufRead, command: &str, arguments: &Value) -> Result<Value> {
    let mut request = json!({ "execute": command });
    if !arguments.is_null() {
        request["arguments"] = arguments.clone();
    }
    writeln!(to, "{request}")?;
    loop {
        let mut answer = message(from)?;
        if let Some(error) = answer.get("error") {
            bail!("{error}");
        }
        if let Some(result) = answer.get_mut("return") {
            return Ok(result.take());
        }
    }
}

fn message(from: &mut impl BufRead) -> Result<Value> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        bail!("QEMU closed the connection");
    }
    serde_json::from_str(&line).with_context(|| format!("not JSON: {line:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A QEMU that says what it is told to.
    fn server(lines: &'static [&'static str]) -> (tempfile::TempDir, std::thread::JoinHandle<Vec<String>>) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut heard = Vec::new();
            let mut stream = stream;
            for line in lines {
                if *line == "<" {
                    let mut text = String::new();
                    reader.read_line(&mut text).unwrap();
                    heard.push(text);
                } else {
                    writeln!(stream, "{line}").unwrap();
                }
            }
            heard
        });
        (folder, thread)
    }

    #[test]
    fn events_before_the_answer_are_passed_over() {
        let (folder, thread) = server(&[
            r#"{"QMP":{}}"#,
            "<",
            r#"{"return":{}}"#,
            "<",
            r#"{"event":"POWERDOWN"}"#,
            r#"{"return":{"status":"running"}}"#,
        ]);
        let result = execute(&folder.path().join("qmp"), "query-status", &Value::Null).unwrap();
        assert_eq!(result["status"], "running");
        assert!(thread.join().unwrap()[1].contains("query-status"));
    }

    #[test]
    fn an_error_is_passed_on_and_a_closed_line_is_one() {
        let (folder, thread) =
            server(&[r#"{"QMP":{}}"#, "<", r#"{"return":{}}"#, "<", r#"{"error":{"desc":"no such thing"}}"#]);
        let error = execute(&folder.path().join("qmp"), "x", &json!({"a": 1})).unwrap_err();
        assert!(format!("{error:#}").contains("no such thing"));
        thread.join().unwrap();
        let (folder, thread) = server(&[r#"{"QMP":{}}"#, "<"]);
        assert!(execute(&folder.path().join("qmp"), "x", &Value::Null).is_err());
        thread.join().unwrap();
    }
}
