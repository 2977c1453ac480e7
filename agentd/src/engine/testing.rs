//! An engine that holds no model: speaks the frames, answers by rule, and dies when it is told to.

use super::gate::{Ask, Gate, Verdict};
use agentd_domain::engine::{
    ClientFrame, Device, Done, EngineStatus, Event, FinishReason, LoadModel, LoadedModel, ModelKind,
    ModelUsage, PROTOCOL_VERSION, Request, ServerFrame,
};
use agentd_domain::fault::Report;
use agentd_domain::launcher;
use agentd_sandbox::wire;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// A launcher that starts and ends engines as it is told, by the word, and keeps what it was told.
pub fn fake_launcher(path: &Path) -> Arc<Mutex<Vec<launcher::Request>>> {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
    };
    use std::os::fd::AsFd;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    bind(&socket, &SocketAddrUnix::new(path).expect("a path")).expect("bound");
    listen(&socket, 8).expect("listening");
    let asked: Arc<Mutex<Vec<launcher::Request>>> = Arc::default();
    let keep = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut runs_with = None;
        while let Ok(peer) = accept(&socket) {
            let Ok((request, _)) = wire::receive::<launcher::Request>(peer.as_fd()) else { continue };
            let response = match &request {
                launcher::Request::List { .. } => launcher::Response::Listing(Default::default()),
                launcher::Request::StartEngine(spec) => {
                    // As the launcher: limits of a group are changed, what a process sees is not.
                    let seen = |spec: &launcher::EngineSpec| {
                        let seen = spec.device_limits.iter().filter(|limit| limit.is_seen()).cloned();
                        (spec.hidden.clone(), seen.collect::<Vec<_>>())
                    };
                    let sees = runs_with.get_or_insert_with(|| seen(spec));
                    if *sees == seen(spec) {
                        launcher::Response::EngineStarted { pid: 1 }
                    } else {
                        let what = "the launcher did not do it";
                        let report = Report::caller("engine_conflict", what, "other limits", "stop it first");
                        launcher::Response::Refused(report)
                    }
                }
                launcher::Request::StopEngine { .. } => {
                    runs_with = None;
                    launcher::Response::Done
                }
                _ => launcher::Response::Done,
            };
            keep.lock().expect("unpoisoned").push(request);
            let _ = wire::send(peer.as_fd(), &response, &[]);
        }
    });
    asked
}

/// Lets every model through.
pub fn open_gate() -> Arc<dyn Gate> {
    struct Open;
    impl Gate for Open {
        fn admit(&self, _: Ask) -> BoxFuture<'static, Verdict> {
            async { Verdict::Load(None) }.boxed()
        }

        fn not_loaded(&self, _: &str) {}
    }
    Arc::new(Open)
}

/// What the fake has seen and holds; shared with the test.
#[derive(Default)]
pub struct Seen {
    pub loaded: Vec<LoadedModel>,
    pub loads: Vec<String>,
    pub unloads: Vec<String>,
    /// What the engine says of itself.
    pub usage: Vec<ModelUsage>,
    pub devices: Vec<Device>,
    pub cancelled: Vec<String>,
    pub generated: Vec<String>,
    /// Texts that got a vector, each as often as it was asked for.
    pub embedded: Vec<String>,
}

pub struct FakeEngine {
    pub seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

impl FakeEngine {
    /// Listens as `host.sock` in this folder; `seen` of a former life stands for an engine that lived on.
    pub fn start(folder: &Path, seen: Arc<Mutex<Seen>>) -> Self {
        let path = folder.join("host.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).expect("bound");
        let shared = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // One connection at a time, as agentd has one.
                let _ = serve(stream, &shared).await;
            }
        });
        Self { seen, task }
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends with the connection, or as if the process had died.
async fn serve(mut stream: UnixStream, seen: &Mutex<Seen>) -> std::io::Result<()> {
    loop {
        let length = stream.read_u32_le().await?;
        let mut bytes = vec![0; length as usize];
        stream.read_exact(&mut bytes).await?;
        let frame: ClientFrame = serde_json::from_slice(&bytes)?;
        let events = answer(frame.body, &mut seen.lock().expect("unpoisoned"))?;
        for body in events {
            let bytes = serde_json::to_vec(&ServerFrame { id: frame.id, body })?;
            stream.write_u32_le(bytes.len() as u32).await?;
            stream.write_all(&bytes).await?;
        }
    }
}

fn answer(request: Request, seen: &mut Seen) -> std::io::Result<Vec<Event>> {
    let died = || Err(std::io::ErrorKind::ConnectionAborted.into());
    Ok(match request {
        Request::Hello { .. } => {
            vec![Event::Hello { version: PROTOCOL_VERSION, devices: seen.devices.clone() }]
        }
        Request::Status => vec![Event::Status(EngineStatus {
            devices: seen.devices.clone(),
            gpus: Vec::new(),
            models: seen.loaded.clone(),
            backend: "fake".to_owned(),
            backends: Vec::new(),
            running_sequences: 0,
            waiting_requests: 0,
            rss_bytes: 1,
            uptime_ms: 1,
            usage: seen.usage.clone(),
        })],
        Request::Load(model) => {
            seen.loads.push(model.model.clone());
            match model.path.as_str() {
                "/kills" => return died(),
                // Memory for one chat model, whatever the ledger knows.
                "/large" if seen.loaded.iter().any(|other| other.kind == ModelKind::Chat) => {
                    vec![Event::Error(Report::environment("memory_short", "not loaded", "short", "later"))]
                }
                "/hangs" => Vec::new(),
                "/bad" => vec![Event::Error(Report::caller("model_corrupt", "not loaded", "bad", "another"))],
                _ => {
                    let model = loaded(&model);
                    seen.loaded.push(model.clone());
                    vec![Event::Loaded(model)]
                }
            }
        }
        Request::Unload { model } => {
            seen.loaded.retain(|other| other.model != model);
            seen.unloads.push(model.clone());
            vec![Event::Unloaded { model }]
        }
        Request::Embed { inputs, .. } => {
            let vectors = inputs.iter().map(|text| vector(text)).collect();
            seen.embedded.extend(inputs);
            vec![Event::Embeddings { vectors, tokens: 1, truncated: Default::default() }]
        }
        Request::Generate(generate) => {
            seen.generated.push(generate.key);
            let piece = |text: &str| Event::Piece { text: text.to_owned(), tokens: 1 };
            match generate.stop.first().map(String::as_str) {
                // An engine that ends in the middle.
                Some("die") => return died(),
                // One that never ends.
                Some("hang") => vec![piece("a")],
                _ => vec![piece("a"), piece("b"), Event::Done(done())],
            }
        }
        Request::Cancel { key } => {
            seen.cancelled.push(key.clone());
            vec![Event::Cancelled { key }]
        }
        _ => vec![Event::Error(Report::bug("fake", "not done", "the fake does not know it", "extend it"))],
    })
}

/// Two directions: texts about the sea, and all others.
fn vector(text: &str) -> Vec<f32> {
    if ["ship", "ocean", "sail"].iter().any(|word| text.contains(word)) {
        vec![1.0, 0.0]
    } else {
        vec![0.0, 1.0]
    }
}

pub fn done() -> Done {
    Done { reason: FinishReason::Stop, prompt_tokens: 1, completion_tokens: 2, cached_tokens: 0 }
}

pub fn loaded(model: &LoadModel) -> LoadedModel {
    LoadedModel {
        model: model.model.clone(),
        path: model.path.clone(),
        kind: model.kind,
        architecture: "fake".to_owned(),
        parameters: 1,
        file_bytes: 1,
        sha256: "11".repeat(32),
        context_tokens: 64,
        sequences: 1,
        dimension: if model.kind == ModelKind::Embedding { 2 } else { 0 },
        chat_template: None,
        sharing_refused: None,
        placement: model.placement.clone(),
    }
}
