use super::testing::{FakeEngine, Seen, done};
use super::*;
use agentd_domain::engine::{ChatMessage, Prompt, Sampling};
use agentd_domain::launcher::{EngineInfo, Listing, Request as Ask, Response};
use agentd_sandbox::client::Launcher;
use agentd_sandbox::wire as launcher_wire;
use futures::StreamExt;
use std::sync::Mutex;

pub(super) struct Scene {
    folder: tempfile::TempDir,
    pub(super) seen: Arc<Mutex<Seen>>,
    fake: Option<FakeEngine>,
}

impl Scene {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let seen = Arc::default();
        let fake = Some(FakeEngine::start(folder.path(), Arc::clone(&seen)));
        Self { folder, seen, fake }
    }

    pub(super) fn engine(&self) -> Engine {
        self.engine_behind(crate::engine::testing::open_gate())
    }

    pub(super) fn engine_behind(&self, gate: Arc<dyn Gate>) -> Engine {
        start(
            Links {
                launcher: Launcher::at(self.folder.path().join("none")),
                sockets: self.folder.path().to_owned(),
                memory_max_bytes: 1,
                load_patience: std::time::Duration::from_secs(2),
                gate,
            },
            std::future::ready(()),
        )
    }

    pub(super) fn launcher_socket(&self) -> std::path::PathBuf {
        self.folder.path().join("none")
    }

    pub(super) fn loads(&self) -> Vec<String> {
        self.seen.lock().expect("unpoisoned").loads.clone()
    }

    pub(super) fn kill_engine(&mut self) {
        self.fake = None;
        self.seen.lock().expect("unpoisoned").loaded.clear();
    }

    /// The process is gone and its memory with it, then there is a new one.
    pub(super) fn restart_engine(&mut self) {
        self.kill_engine();
        self.fake = Some(FakeEngine::start(self.folder.path(), Arc::clone(&self.seen)));
    }
}

pub(super) fn choice(name: &str, path: &str, kind: ModelKind) -> Choice {
    Choice { name: name.to_owned(), path: path.to_owned(), kind }
}

fn wanted(chat: &[(&str, &str)]) -> Wanted {
    Wanted {
        embedder: Some(choice("minilm", "/minilm", ModelKind::Embedding)),
        chat: chat.iter().map(|(name, path)| choice(name, path, ModelKind::Chat)).collect(),
        ..Wanted::default()
    }
}

pub(super) fn generate(key: &str, stop: &str) -> Generate {
    Generate {
        model: "tiny".to_owned(),
        key: key.to_owned(),
        prompt: Prompt::Messages(vec![ChatMessage { role: "user".to_owned(), content: "hi".to_owned() }]),
        sampling: Sampling::default(),
        max_tokens: 0,
        stop: vec![stop.to_owned()],
        share: Default::default(),
        shape: Default::default(),
    }
}

/// A launcher that says how often it has started the engine again; after each question `step` more.
fn launcher(path: &std::path::Path, step: Arc<std::sync::atomic::AtomicU32>) {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
    };
    use std::os::fd::AsFd;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    bind(&socket, &SocketAddrUnix::new(path).expect("a path")).expect("bound");
    listen(&socket, 8).expect("listening");
    std::thread::spawn(move || {
        let mut restarts = 0;
        while let Ok(peer) = accept(&socket) {
            let response = match launcher_wire::receive::<Ask>(peer.as_fd()) {
                Ok((Ask::List { .. }, _)) => {
                    let engine = EngineInfo { set: "host".to_owned(), pid: 1, started_boot_ms: 1, restarts };
                    restarts += step.load(std::sync::atomic::Ordering::Relaxed);
                    Response::Listing(Listing { engines: vec![engine], ..Listing::default() })
                }
                Ok((Ask::StartEngine(_), _)) => Response::EngineStarted { pid: 1 },
                _ => Response::Done,
            };
            let _ = launcher_wire::send(peer.as_fd(), &response, &[]);
        }
    });
}

/// The limit is only reached by a broken test.
pub(super) async fn ready(engine: &Engine) -> Arc<View> {
    let mut view = engine.watch();
    let ready = view.wait_for(|view| view.stage == Stage::Ready && view.default_chat.is_some());
    tokio::time::timeout(Duration::from_secs(20), ready).await.expect("in time").expect("alive").clone()
}

#[tokio::test]
async fn what_is_wanted_is_loaded_and_answers() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&[("tiny", "/tiny")]));
    let view = ready(&engine).await;
    assert_eq!(view.default_chat.as_deref(), Some("tiny"));
    assert_eq!(view.embedder().map(|embedder| embedder.dimension), Some(2));
    let pieces: Vec<_> = EngineHandle::generate(&engine, generate("k", ""), Leaving::Cancels)
        .await
        .expect("taken")
        .collect()
        .await;
    let text = |text: &str| Ok(Piece::Text(text.to_owned()));
    assert_eq!(pieces, [text("a"), text("b"), Ok(Piece::Done(done()))]);
    let vectors =
        engine.embed_with("minilm".to_owned(), vec!["a ship".to_owned()]).await.expect("embedded").vectors;
    assert_eq!(vectors, [[1.0, 0.0]]);
}

#[tokio::test]
async fn models_that_an_engine_holds_are_not_loaded_again() {
    let scene = Scene::new();
    let first = scene.engine();
    first.want(wanted(&[("tiny", "/tiny")]));
    ready(&first).await;
    assert_eq!(scene.loads(), ["minilm", "tiny"]);
    drop(first);
    // As a new agentd does: it connects before it has looked at the models.
    let second = scene.engine();
    let mut view = second.watch();
    view.wait_for(|view| view.models.len() == 2).await.expect("alive");
    second.want(wanted(&[("tiny", "/tiny")]));
    ready(&second).await;
    assert_eq!(scene.loads(), ["minilm", "tiny"], "nothing was loaded twice");
}

#[tokio::test]
async fn a_lost_engine_is_an_error_and_then_there_is_a_new_one() {
    let mut scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&[("tiny", "/tiny")]));
    ready(&engine).await;
    let error =
        EngineHandle::generate(&engine, generate("k", "die"), Leaving::Cancels).await.err().expect("lost");
    assert_eq!(error.code, "engine_lost");
    let mut view = engine.watch();
    view.wait_for(|view| matches!(view.stage, Stage::Down(_))).await.expect("alive");
    scene.restart_engine();
    ready(&engine).await;
    assert!(EngineHandle::generate(&engine, generate("k2", ""), Leaving::Cancels).await.is_ok());
}

#[tokio::test]
async fn a_reader_that_goes_cancels_unless_another_reads_the_same() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&[("tiny", "/tiny")]));
    ready(&engine).await;
    let first =
        EngineHandle::generate(&engine, generate("same", "hang"), Leaving::Cancels).await.expect("taken");
    let second =
        EngineHandle::generate(&engine, generate("same", "hang"), Leaving::Cancels).await.expect("taken");
    drop(first);
    engine.status().await.expect("answered after what was before it");
    assert!(scene.seen.lock().expect("unpoisoned").cancelled.is_empty());
    drop(second);
    engine.status().await.expect("answered");
    assert_eq!(scene.seen.lock().expect("unpoisoned").cancelled, ["same"]);
}

#[tokio::test]
async fn a_refused_model_gives_way_and_says_why() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&[("big", "/bad"), ("tiny", "/tiny")]));
    let view = ready(&engine).await;
    assert_eq!(view.default_chat.as_deref(), Some("tiny"));
    assert_eq!(view.failed["big"].code, "model_corrupt");
}

#[tokio::test]
async fn a_file_that_ends_engines_is_given_up() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&[("hostile", "/kills"), ("tiny", "/tiny")]));
    let view = ready(&engine).await;
    assert_eq!(view.default_chat.as_deref(), Some("tiny"));
    assert_eq!(view.failed["hostile"].code, "model_ended_engine");
    assert_eq!(scene.loads().iter().filter(|name| *name == "hostile").count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_died_with_its_launcher_is_not_the_file_s_fault() {
    let scene = Scene::new();
    let step = Arc::<std::sync::atomic::AtomicU32>::default();
    launcher(&scene.folder.path().join("none"), Arc::clone(&step));
    let engine = scene.engine();
    // Each time it is lost there is a launcher that has never started it again: a new one.
    engine.want(wanted(&[("unlucky", "/kills"), ("tiny", "/tiny")]));
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while scene.loads().iter().filter(|name| *name == "unlucky").count() < 5 {
        assert!(std::time::Instant::now() < deadline, "given up: {:?}", engine.view().failed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(engine.view().failed.is_empty());
    // Now it is the same launcher's engine each time.
    step.store(1, std::sync::atomic::Ordering::Relaxed);
    let view = ready(&engine).await;
    assert_eq!(view.failed["unlucky"].code, "model_ended_engine");
}

#[tokio::test]
async fn a_file_that_an_engine_never_finishes_loading_is_given_up() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&[("endless", "/hangs"), ("tiny", "/tiny")]));
    let view = ready(&engine).await;
    assert_eq!(view.default_chat.as_deref(), Some("tiny"));
    assert_eq!(view.failed["endless"].code, "model_ended_engine");
    assert!(view.failed["endless"].why.contains("did not come to an end"), "{}", view.failed["endless"]);
    assert_eq!(scene.loads().iter().filter(|name| *name == "endless").count(), 2);
}

#[tokio::test]
async fn without_an_engine_requests_are_refused_and_do_not_hang() {
    let mut scene = Scene::new();
    scene.fake = None;
    std::fs::remove_file(scene.folder.path().join("host.sock")).expect("removed");
    let engine = scene.engine();
    let error = engine.status().await.expect_err("nobody there");
    assert_eq!(error.code, "launcher_unreachable");
    assert!(engine.models().is_empty());
}

#[tokio::test]
async fn a_reader_that_may_return_finds_its_generation_going_on() {
    let scene = Scene::new();
    let engine = scene.engine();
    engine.want(wanted(&[("tiny", "/tiny")]));
    ready(&engine).await;
    let cancelled = || scene.seen.lock().expect("unpoisoned").cancelled.clone();
    let mut keys = Vec::new();
    for number in 0..6 {
        let key = format!("agent/{number}");
        drop(
            EngineHandle::generate(&engine, generate(&key, "hang"), Leaving::MayReturn).await.expect("taken"),
        );
        keys.push(key);
    }
    drop(
        EngineHandle::generate(&engine, generate("other/0", "hang"), Leaving::MayReturn)
            .await
            .expect("taken"),
    );
    engine.status().await.expect("answered after what was before it");
    assert_eq!(cancelled(), keys[4..], "one caller may leave four, another has four of its own");
}
