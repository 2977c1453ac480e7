//! `agentctl` as a test uses it: the program that people get, with a home of its own.

use crate::setup;
use agentd_domain::fault::Report;
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

#[derive(Debug, Clone)]
pub struct Ctl {
    home: PathBuf,
    host: String,
}

/// How a call ended.
#[derive(Debug, Clone)]
pub struct Answer {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ctl {
    pub fn new(home: &Path, port: u16) -> Self {
        Self { home: home.to_owned(), host: format!("https://127.0.0.1:{port}") }
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Starts a call and leaves it running.
    pub fn spawn(&self, arguments: &[&str]) -> Result<Talking> {
        let mut child = self.command(arguments).spawn().context("cannot start agentctl")?;
        let lines = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Talking { child, lines })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(setup().cache.path("programs-target/release/agentctl"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", &self.home)
            .env("AGENTCTL_HOST", &self.host)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Result<Answer> {
        self.input(arguments, "")
    }

    /// The same with standard input.
    pub fn input(&self, arguments: &[&str], input: &str) -> Result<Answer> {
        let mut child = self.command(arguments).spawn().context("cannot start agentctl")?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that does not read its input closes it; that is not an error here.
            stdin.write_all(input.as_bytes()).ok();
        }
        let output = child.wait_with_output()?;
        Ok(Answer {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// With `--json`, parsed.
    pub fn json<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let mut all = arguments.to_vec();
        all.push("--json");
        let answer = self.run(&all)?;
        let text = answer.success()?;
        serde_json::from_str(&text).with_context(|| format!("agentctl {arguments:?} printed {text}"))
    }

    /// With `--json`, expected to fail with a report.
    pub fn refused(&self, arguments: &[&str]) -> Result<Report> {
        let mut all = arguments.to_vec();
        all.push("--json");
        self.run(&all)?.report()
    }
}

/// A call that is still running.
pub struct Talking {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Talking {
    /// Reads on until a line holds the words.
    pub fn wait_for_line(&mut self, words: &str) -> Result<String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line)? == 0 {
                bail!("agentctl ended before it said {words:?}");
            }
            if line.contains(words) {
                return Ok(line);
            }
        }
    }

    pub fn kill(mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Sends a body of zeros to a route that takes a small one, with openssl as a client that does not care, and
/// returns the first line of the answer.
pub fn post_zeros(host: &str, path: &str, bytes: u64) -> Result<String> {
    let address = host.trim_start_matches("https://");
    let mut child = Command::new("openssl")
        .args(["s_client", "-quiet", "-connect", address])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start openssl")?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {bytes}\r\n\r\n"
    );
    let sender = std::thread::spawn(move || {
        // The server answers and closes before everything is sent.
        let block = vec![0; 64 << 10];
        let mut sent = stdin.write_all(head.as_bytes());
        for _ in 0..bytes / block.len() as u64 {
            if sent.is_err() {
                break;
            }
            sent = stdin.write_all(&block);
        }
    });
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no standard output")?).read_line(&mut line)?;
    child.kill().ok();
    child.wait()?;
    sender.join().ok();
    Ok(line)
}

impl Answer {
    /// Standard output, or an error with everything.
    pub fn success(&self) -> Result<String> {
        match self.code {
            Some(0) => Ok(self.stdout.clone()),
            code => bail!("exit code {code:?}\nstdout: {}\nstderr: {}", self.stdout, self.stderr),
        }
    }

    /// The report on standard error of a call with `--json` that failed.
    pub fn report(&self) -> Result<Report> {
        if self.code == Some(0) {
            bail!("it succeeded and printed {}", self.stdout);
        }
        self.stderr
            .lines()
            .find_map(|line| serde_json::from_str(line).ok())
            .with_context(|| format!("no report on standard error: {}", self.stderr))
    }
}
