//! An engine process and a client that speaks its frames.

use agentd_domain::engine::{
    ChatMessage, ClientFrame, Done, EngineStatus, Event, Generate, LoadModel, LoadedModel, ModelKind,
    ModelUsage, PROTOCOL_VERSION, Prompt, Request, Sampling, ServerFrame, Shape, Share,
};
use agentd_domain::fault::Report;
use agentd_domain::paths::{BUILTIN_EMBEDDER, BUILTIN_TINY};
use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Longer than any answer takes on a slow machine: a hang fails, it does not stay.
const DEADLINE: Duration = Duration::from_secs(120);

/// The engine's program, its back ends and the models. `None`, with the reason printed, where they are not built.
pub fn programs() -> Option<(PathBuf, PathBuf, PathBuf)> {
    let (Some(program), Some(models)) = (env::var_os("AGENTD_ENGINE_BIN"), env::var_os("AGENTD_MODELS"))
    else {
        println!(
            "SKIP: engine: AGENTD_ENGINE_BIN and AGENTD_MODELS are not set; `scripts/test host` sets them"
        );
        return None;
    };
    let program = PathBuf::from(program);
    let backends = program.parent().expect("the program's folder").join("backends");
    Some((program, backends, PathBuf::from(models)))
}

/// A running engine; killed when dropped.
pub struct Engine {
    process: Child,
    folder: TempDir,
    pub models: PathBuf,
}

impl Engine {
    /// `None`, with the reason printed, where there is no engine to test.
    pub fn start() -> Option<Self> {
        Self::start_from(|_, _| {})
    }

    /// With further arguments; `FOLDER` in one of them is an empty folder.
    pub fn start_with(arguments: &[&str]) -> Option<Self> {
        Self::start_from(|command, empty| {
            let empty = empty.to_str().expect("a plain path");
            command.args(arguments.iter().map(|argument| argument.replace("FOLDER", empty)));
        })
    }

    /// With whatever is done to its command; the path is an empty folder.
    pub fn start_from(more: impl FnOnce(&mut Command, &Path)) -> Option<Self> {
        let (_, backends, _) = programs()?;
        Self::start_on(&backends, more)
    }

    /// With other back ends than those that lie beside it.
    pub fn start_on(backends: &Path, more: impl FnOnce(&mut Command, &Path)) -> Option<Self> {
        let (program, _, models) = programs()?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let empty = folder.path().join("swap");
        std::fs::create_dir(&empty).expect("an empty folder");
        let mut command = Command::new(&program);
        command.arg("--listen").arg(folder.path().join("engine.sock")).arg("--backends").arg(backends);
        more(&mut command, &empty);
        let mut process = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let stderr = process.stderr.take().expect("a pipe");
        let mut lines = BufReader::new(stderr);
        let mut seen = String::new();
        while !seen.contains("engine ready") {
            let count = lines.read_line(&mut seen).expect("reading the engine's log");
            assert!(count > 0, "the engine ended before it was ready:\n{seen}");
        }
        // Its further lines belong to whoever looks at the test's output.
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                eprintln!("engine: {line}");
            }
        });
        Some(Self { process, folder, models })
    }

    pub fn connect(&self) -> Client {
        let mut client = self.connect_raw();
        match client.ask(Request::Hello { version: PROTOCOL_VERSION }) {
            Event::Hello { version, devices } => {
                assert_eq!(version, PROTOCOL_VERSION);
                assert!(!devices.is_empty());
            }
            other => panic!("expected a hello, got {other:?}"),
        }
        client
    }

    /// Without a hello.
    pub fn connect_raw(&self) -> Client {
        let stream =
            UnixStream::connect(self.folder.path().join("engine.sock")).expect("the engine's socket");
        stream.set_read_timeout(Some(DEADLINE)).expect("a read timeout");
        Client { stream, next_id: 1 }
    }

    /// Names of its threads.
    pub fn threads(&self) -> Vec<String> {
        let folder = format!("/proc/{}/task", self.process.id());
        let tasks = std::fs::read_dir(folder).expect("the engine's threads").flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.map(|name| name.trim().to_owned()).collect()
    }

    pub fn tiny(&self) -> PathBuf {
        self.models.join(BUILTIN_TINY)
    }

    pub fn embedder(&self) -> PathBuf {
        self.models.join(BUILTIN_EMBEDDER)
    }

    /// A place for files that a test makes.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub struct Client {
    stream: UnixStream,
    next_id: u64,
}

/// How a generation ended, and its text.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    /// Sum of the tokens that the pieces stand for.
    pub piece_tokens: u32,
    pub end: Result<Done, Report>,
}

impl Client {
    pub fn send(&mut self, body: Request) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let frame = serde_json::to_vec(&ClientFrame { id, body }).expect("a frame");
        self.send_bytes(&(frame.len() as u32).to_le_bytes());
        self.send_bytes(&frame);
        id
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the engine reads");
    }

    /// Takes so many bytes of whatever comes.
    pub fn read_bytes(&mut self, count: usize) {
        self.stream.read_exact(&mut vec![0; count]).expect("bytes from the engine");
    }

    pub fn receive(&mut self) -> ServerFrame {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).expect("a frame from the engine");
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        self.stream.read_exact(&mut body).expect("the frame's body");
        serde_json::from_slice(&body).expect("a server frame")
    }

    /// True when the engine closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0) | Err(_))
    }

    /// One request, one answer.
    pub fn ask(&mut self, request: Request) -> Event {
        let id = self.send(request);
        let frame = self.receive();
        assert_eq!(frame.id, id, "{:?}", frame.body);
        frame.body
    }

    pub fn load(&mut self, model: &str, path: &Path, kind: ModelKind) -> Result<LoadedModel, Report> {
        self.load_sized(model, path, kind, (0, 0))
    }

    /// With the cells of its cache and its sequences; 0 is the engine's own choice.
    pub fn load_sized(
        &mut self,
        model: &str,
        path: &Path,
        kind: ModelKind,
        (context_tokens, sequences): (u32, u32),
    ) -> Result<LoadedModel, Report> {
        let path = path.to_str().expect("a plain path").to_owned();
        let load =
            LoadModel { model: model.to_owned(), path, kind, context_tokens, sequences, placement: None };
        match self.ask(Request::Load(load)) {
            Event::Loaded(info) => Ok(info),
            Event::Error(report) => Err(report),
            other => panic!("expected a loaded model, got {other:?}"),
        }
    }

    pub fn status(&mut self) -> EngineStatus {
        match self.ask(Request::Status) {
            Event::Status(status) => status,
            other => panic!("expected a status, got {other:?}"),
        }
    }

    /// How the cache of the only chat model is used.
    pub fn usage(&mut self) -> ModelUsage {
        self.status().usage.remove(0)
    }

    pub fn tokenize(&mut self, model: &str, text: &str) -> Vec<i32> {
        match self.ask(Request::Tokenize { model: model.to_owned(), text: text.to_owned() }) {
            Event::Tokens { tokens } => tokens,
            other => panic!("expected tokens, got {other:?}"),
        }
    }

    pub fn logits(&mut self, model: &str, tokens: &[i32]) -> Vec<f32> {
        self.logits_with(model, tokens, None)
    }

    /// With what is in the cache already, if there is a share.
    pub fn logits_with(&mut self, model: &str, tokens: &[i32], share: Option<Share>) -> Vec<f32> {
        match self.ask(Request::Logits { model: model.to_owned(), tokens: tokens.to_vec(), share }) {
            Event::Logits { logits } => logits,
            other => panic!("expected logits, got {other:?}"),
        }
    }

    pub fn embed(&mut self, model: &str, inputs: &[&str]) -> (Vec<Vec<f32>>, u32) {
        let inputs = inputs.iter().map(|input| (*input).to_owned()).collect();
        match self.ask(Request::Embed { model: model.to_owned(), inputs }) {
            Event::Embeddings { vectors, truncated, .. } => (vectors, truncated),
            other => panic!("expected vectors, got {other:?}"),
        }
    }

    /// Reads one generation to its end; other requests of this connection must be answered.
    pub fn read_answer(&mut self, id: u64) -> Answer {
        let mut answers = self.read_answers(&[id]);
        answers.remove(0)
    }

    /// Reads generations that run at once, in the order of `ids`.
    pub fn read_answers(&mut self, ids: &[u64]) -> Vec<Answer> {
        let mut texts = vec![String::new(); ids.len()];
        let mut tokens = vec![0; ids.len()];
        let mut ends: Vec<Option<Result<Done, Report>>> = ids.iter().map(|_| None).collect();
        while ends.iter().any(Option::is_none) {
            let frame = self.receive();
            let index = ids.iter().position(|id| *id == frame.id).expect("a frame of these requests");
            assert!(ends[index].is_none(), "a frame after the end: {:?}", frame.body);
            match frame.body {
                Event::Piece { text, tokens: count } => {
                    texts[index].push_str(&text);
                    tokens[index] += count;
                }
                Event::Done(done) => ends[index] = Some(Ok(done)),
                Event::Error(report) => ends[index] = Some(Err(report)),
                other => panic!("unexpected {other:?}"),
            }
        }
        let answers = texts.into_iter().zip(tokens).zip(ends);
        answers
            .map(|((text, piece_tokens), end)| Answer {
                text,
                piece_tokens,
                end: end.expect("all have ended"),
            })
            .collect()
    }

    pub fn generate(&mut self, request: Generate) -> Answer {
        let id = self.send(Request::Generate(request));
        self.read_answer(id)
    }
}

pub fn greedy(key: &str, prompt: Prompt, max_tokens: u32) -> Generate {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    Generate {
        model: "tiny".to_owned(),
        key: key.to_owned(),
        prompt,
        sampling,
        max_tokens,
        stop: Vec::new(),
        share: Share::default(),
        shape: Shape::Free,
    }
}

pub fn text(text: &str) -> Prompt {
    Prompt::Text(text.to_owned())
}

pub fn user(content: &str) -> Prompt {
    Prompt::Messages(vec![ChatMessage { role: "user".to_owned(), content: content.to_owned() }])
}
