//! An engine process, and questions to it.

use agentd_domain::engine::{
    ClientFrame, Device, EngineStatus, Event, Generate, LoadModel, ModelKind, PROTOCOL_VERSION, Prompt,
    Request, Sampling, ServerFrame,
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For a load or an answer; more means that the card or its driver hangs. A step's own end may come before.
const DEADLINE: Duration = Duration::from_secs(300);
const START_LIMIT: Duration = Duration::from_secs(60);

pub struct Engine {
    process: Child,
    stream: UnixStream,
    last_id: u64,
    /// The end of the step.
    until: Instant,
    pub devices: Vec<Device>,
    _folder: tempfile::TempDir,
}

/// One answer: its tokens' text, and when its first piece came.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    pub tokens: u32,
    pub first: Duration,
    pub took: Duration,
}

impl Engine {
    pub fn start(program: &Path, backends: &Path, until: Instant) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("engine.sock");
        let mut process = Command::new(program)
            .arg("--listen")
            .arg(&socket)
            .arg("--backends")
            .arg(backends)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) if begun.elapsed() < START_LIMIT && process.try_wait()?.is_none() => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => bail!("the engine did not come up: {error}"),
            }
        };
        let mut engine = Self { process, stream, last_id: 0, until, devices: Vec::new(), _folder: folder };
        match engine.ask(Request::Hello { version: PROTOCOL_VERSION })? {
            Event::Hello { devices, .. } => engine.devices = devices,
            other => bail!("expected a hello, got {other:?}"),
        }
        Ok(engine)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn load(&mut self, file: &Path, context_tokens: u32, sequences: u32) -> Result<()> {
        let path = file.to_string_lossy().into_owned();
        let load = LoadModel {
            model: "model".to_owned(),
            path,
            kind: ModelKind::Chat,
            context_tokens,
            sequences,
            placement: None,
        };
        match self.ask(Request::Load(load))? {
            Event::Loaded(_) => Ok(()),
            Event::Error(report) => Err(anyhow!("{report}")),
            other => bail!("expected a loaded model, got {other:?}"),
        }
    }

    pub fn unload(&mut self) -> Result<()> {
        self.ask(Request::Unload { model: "model".to_owned() }).map(|_| ())
    }

    pub fn status(&mut self) -> Result<EngineStatus> {
        match self.ask(Request::Status)? {
            Event::Status(status) => Ok(status),
            other => bail!("expected a status, got {other:?}"),
        }
    }

    /// Greedy answers to all prompts at once, in their order.
    pub fn greedy(&mut self, prompts: &[String], most: u32) -> Result<Vec<Answer>> {
        let begun = Instant::now();
        let mut answers: Vec<(u64, Answer, bool)> = Vec::new();
        for prompt in prompts {
            let key = format!("check-{}", self.last_id + 1);
            let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
            let prompt = Prompt::Text(prompt.clone());
            let generate = serde_json::json!({
                "model": "model", "key": key, "prompt": prompt, "sampling": sampling, "max_tokens": most,
            });
            // By JSON, so that fields which a later engine adds keep their defaults here.
            let generate: Generate = serde_json::from_value(generate)?;
            let id = self.send(Request::Generate(generate))?;
            let none = Answer { text: String::new(), tokens: 0, first: Duration::ZERO, took: Duration::ZERO };
            answers.push((id, none, false));
        }
        while answers.iter().any(|(_, _, ended)| !ended) {
            let frame = self.receive()?;
            let Some((_, answer, ended)) = answers.iter_mut().find(|(id, _, _)| *id == frame.id) else {
                bail!("an answer that nobody asked for: {frame:?}");
            };
            match frame.body {
                Event::Piece { text, .. } => {
                    if answer.text.is_empty() {
                        answer.first = begun.elapsed();
                    }
                    answer.text.push_str(&text);
                }
                Event::Done(done) => {
                    (answer.tokens, answer.took, *ended) = (done.completion_tokens, begun.elapsed(), true);
                }
                Event::Error(report) => return Err(anyhow!("{report}")),
                _ => {}
            }
        }
        Ok(answers.into_iter().map(|(_, answer, _)| answer).collect())
    }

    pub fn tokenize(&mut self, text: &str) -> Result<Vec<i32>> {
        match self.ask(Request::Tokenize { model: "model".to_owned(), text: text.to_owned() })? {
            Event::Tokens { tokens } => Ok(tokens),
            other => bail!("expected tokens, got {other:?}"),
        }
    }

    /// After the last of these tokens.
    pub fn logits(&mut self, tokens: &[i32]) -> Result<Vec<f32>> {
        let model = "model".to_owned();
        match self.ask(Request::Logits { model, tokens: tokens.to_vec(), share: None })? {
            Event::Logits { logits } => Ok(logits),
            Event::Error(report) => Err(anyhow!("{report}")),
            other => bail!("expected logits, got {other:?}"),
        }
    }

    fn ask(&mut self, request: Request) -> Result<Event> {
        self.send(request)?;
        Ok(self.receive()?.body)
    }

    fn send(&mut self, body: Request) -> Result<u64> {
        self.last_id += 1;
        let frame = serde_json::to_vec(&ClientFrame { id: self.last_id, body })?;
        self.stream.write_all(&u32::try_from(frame.len())?.to_le_bytes())?;
        self.stream.write_all(&frame)?;
        Ok(self.last_id)
    }

    fn receive(&mut self) -> Result<ServerFrame> {
        let left = self.until.saturating_duration_since(Instant::now()).min(DEADLINE);
        ensure!(!left.is_zero(), "the step's time is over");
        self.stream.set_read_timeout(Some(left))?;
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).context("the engine ended or hangs")?;
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        self.stream.read_exact(&mut body).context("the engine ended or hangs")?;
        Ok(serde_json::from_slice(&body)?)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
