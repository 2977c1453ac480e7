//! The task that owns the connection.
//!
//! It connects, greets, reads what is loaded, then carries frames both ways until the connection ends, and
//! begins again. Requests that arrive while there is no engine are answered at once with the reason.

use super::plan::{self, Choice, Next};
use super::wire::{self, Reader, WireError, Writer};
use super::{Command, Engine, QUEUE, Stage, View, Wanted, out_of_order};
use agentd_domain::engine::{
    ClientFrame, Device, Event, LoadedModel, ModelKind, PROTOCOL_VERSION, Request, ServerFrame,
};
use agentd_domain::fault::Report;
use agentd_domain::launcher::{EngineSpec, Listing};
use agentd_sandbox::client::Launcher;
use agentd_serving::{Leaving, Piece};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// The device set of host memory; its socket is `host.sock`.
const SET: &str = "host";
const GREETING_LIMIT: Duration = Duration::from_secs(20);
/// Between attempts to reach an engine: short, because everything waits for it; doubled up to the second.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// The slowest disk that models are read from.
const READ_LEAST_BYTES_PER_S: u64 = 5_000_000;

/// A file that ended so many engines in a row is to blame.
const DEATHS_MOST: u32 = 2;

/// Generations of one caller that go on without a reader, for a client that may return. More are cancelled: a caller
/// that leaves again and again must not fill the engine.
const ALONE_MOST: usize = 4;

/// What the task needs of the world.
pub struct Links {
    pub launcher: Launcher,
    pub sockets: PathBuf,
    /// Of the engine's cgroup.
    pub memory_max_bytes: u64,
    /// How long a load may take, besides the time for reading the file.
    pub load_patience: Duration,
    /// Asked before each load, with what the engine has; blocks.
    pub gate: Gate,
}

/// Whether a model may be loaded beside what is there.
pub type Gate = Arc<dyn Fn(&Choice, &[Device], &[LoadedModel]) -> Result<(), Report> + Send + Sync>;

/// Starts the task on the current runtime. A new engine's process is asked for when `begin` is over: loading models
/// keeps a small machine busy for seconds. One that runs already, because agentd was restarted, is used at once.
pub fn start(links: Links, begin: impl Future<Output = ()> + Send + 'static) -> Engine {
    let (commands, queue) = mpsc::channel(QUEUE);
    let (wanted, wish) = watch::channel(None);
    let start = View {
        stage: Stage::Starting,
        devices: Vec::new(),
        models: Vec::new(),
        default_chat: None,
        failed: BTreeMap::new(),
    };
    let (shown, view) = watch::channel(Arc::new(start));
    let (failed, deaths) = (BTreeMap::new(), BTreeMap::new());
    let task = Task { links, queue, wish, shown, failed, deaths, suspect: None, restarts: None };
    let launcher = task.links.launcher.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = begin => {}
            () = runs_already(launcher) => {}
        }
        task.run().await;
    });
    Engine { commands, wanted, view }
}

/// Returns if the launcher holds a living engine now, and else never.
async fn runs_already(launcher: Launcher) {
    let listing = tokio::task::spawn_blocking(move || launcher.list()).await;
    let lives = |listing: &Listing| listing.engines.iter().any(|engine| engine.set == SET && engine.pid != 0);
    if !matches!(&listing, Ok(Ok(listing)) if lives(listing)) {
        std::future::pending::<()>().await;
    }
}

struct Task {
    links: Links,
    queue: mpsc::Receiver<Command>,
    /// `None` until somebody has said what is wanted: what an engine holds from before is left alone until then.
    wish: watch::Receiver<Option<Wanted>>,
    shown: watch::Sender<Arc<View>>,
    /// Survives a reconnection: a file that ended the engine must not end it again and again.
    failed: BTreeMap<String, Report>,
    /// How often in a row an engine ended while it loaded this model.
    deaths: BTreeMap<String, u32>,
    /// An engine was lost while it loaded this model, and it is not known yet what ended it.
    suspect: Option<String>,
    /// How often its launcher had started the engine again when it was reached last. A new launcher begins with 0.
    restarts: Option<u32>,
}

/// Why a connection's life ended.
enum End {
    /// agentd drops its engine: nobody is left to ask.
    NoMoreCommands,
    Lost(WireError),
}

impl Task {
    async fn run(mut self) {
        let mut pause = RETRY_FIRST;
        loop {
            match self.connect().await {
                Ok((reader, session)) => {
                    pause = RETRY_FIRST;
                    tracing::info!(models = session.loaded.len(), "engine connected");
                    self.judge().await;
                    match self.serve(reader, session).await {
                        End::NoMoreCommands => return,
                        End::Lost(error) => self.show_down(&lost_report(&error)),
                    }
                }
                Err(report) => self.show_down(&report),
            }
            if !self.refuse_for(pause).await {
                return;
            }
            pause = (pause * 2).min(RETRY_MOST);
        }
    }

    fn show_down(&self, report: &Report) {
        if !matches!(&self.shown.borrow().stage, Stage::Down(old) if old == report) {
            tracing::warn!(problem = %report, "the engine is away");
        }
        self.show(Stage::Down(report.clone()), Vec::new(), None);
    }

    fn show(&self, stage: Stage, models: Vec<LoadedModel>, devices: Option<Vec<Device>>) {
        let wish = self.wish.borrow().clone().unwrap_or_default();
        let default_chat = plan::chat(&wish, &self.failed)
            .filter(|choice| {
                models.iter().any(|model| model.kind == ModelKind::Chat && model.model == choice.name)
            })
            .map(|choice| choice.name.clone());
        self.shown.send_modify(|view| {
            let devices = devices.unwrap_or_else(|| view.devices.clone());
            let failed = self.failed.clone();
            *view = Arc::new(View { stage, devices, models, default_chat, failed });
        });
    }

    /// Answers what is asked during a pause with the reason of the pause. False when nobody can ask any more.
    async fn refuse_for(&mut self, pause: Duration) -> bool {
        let over = tokio::time::sleep(pause);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return true,
                command = self.queue.recv() => match command {
                    None => return false,
                    Some(command) => {
                        let stage = self.shown.borrow().stage.clone();
                        let report = match stage {
                            Stage::Down(report) => report,
                            _ => lost_report(&WireError::Closed),
                        };
                        refuse(command, report);
                    }
                },
            }
        }
    }

    async fn connect(&mut self) -> Result<(Reader, Session), Report> {
        let launcher = self.links.launcher.clone();
        let spec = EngineSpec {
            set: SET.to_owned(),
            memory_max_bytes: self.links.memory_max_bytes,
            device_limits: Vec::new(),
        };
        let path = self.links.sockets.join(format!("{SET}.sock"));
        let started = tokio::task::spawn_blocking(move || launcher.start_engine(spec)).await;
        // An engine that runs although the launcher cannot be asked is as good as any.
        let launcher_says = match started {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(Report::from(error)),
            Err(_) => Some(lost_report(&WireError::Closed)),
        };
        let attempt = async {
            let (mut reader, mut writer) = wire::connect(&path).await?;
            let hello = ClientFrame { id: 0, body: Request::Hello { version: PROTOCOL_VERSION } };
            writer.send(&hello).await?;
            let devices = match reader.next().await?.body {
                Event::Hello { version: PROTOCOL_VERSION, devices } => devices,
                Event::Hello { version, .. } => return Err(WireError::Version { engine: version }),
                _ => return Err(WireError::Closed),
            };
            writer.send(&ClientFrame { id: 0, body: Request::Status }).await?;
            let loaded = match reader.next().await?.body {
                Event::Status(status) => status.models,
                _ => return Err(WireError::Closed),
            };
            let busy_until = tokio::time::Instant::now();
            let open = HashMap::new();
            Ok((reader, Session { writer, devices, loaded, busy: None, busy_until, open, last_id: 0 }))
        };
        match tokio::time::timeout(GREETING_LIMIT, attempt).await {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => Err(launcher_says.unwrap_or_else(|| lost_report(&error))),
            Err(_) => Err(lost_report(&WireError::Silent(GREETING_LIMIT.as_secs()))),
        }
    }

    async fn end_engine(&self) {
        let launcher = self.links.launcher.clone();
        let ended = tokio::task::spawn_blocking(move || launcher.stop_engine(SET)).await;
        if let Ok(Err(error)) = ended {
            tracing::warn!(%error, "an engine that does nothing any more was not ended");
        }
    }

    async fn serve(&mut self, mut reader: Reader, mut session: Session) -> End {
        // Frames are read by a task of their own: reading is not to be interrupted in the middle of a frame.
        let (frames_in, mut frames) = mpsc::channel(QUEUE);
        let pump = tokio::spawn(async move {
            loop {
                let frame = reader.next().await;
                let last = frame.is_err();
                if frames_in.send(frame).await.is_err() || last {
                    return;
                }
            }
        });
        let end = loop {
            if let Err(error) = self.load_next(&mut session).await {
                break End::Lost(error);
            }
            let (busy_until, waits) = (session.busy_until, session.busy.is_some());
            let outcome = tokio::select! {
                () = tokio::time::sleep_until(busy_until), if waits => {
                    // It lives, and nothing will come of it: the next attempt has a new one.
                    self.end_engine().await;
                    break End::Lost(WireError::Stuck);
                }
                frame = frames.recv() => match frame {
                    Some(Ok(frame)) => { self.take(&mut session, frame); Ok(()) }
                    Some(Err(error)) => Err(error),
                    None => Err(WireError::Closed),
                },
                command = self.queue.recv() => match command {
                    Some(command) => session.give(command).await,
                    None => break End::NoMoreCommands,
                },
                changed = self.wish.changed() => {
                    if changed.is_err() { break End::NoMoreCommands }
                    self.failed.clear();
                    self.deaths.clear();
                    Ok(())
                }
            };
            if let Err(error) = outcome {
                break End::Lost(error);
            }
        };
        pump.abort();
        if let End::Lost(error) = &end {
            // Whatever else it was doing may have ended it as well: then nobody is blamed.
            let alone = matches!(error, WireError::Stuck)
                || session.open.values().all(|open| matches!(open, Open::Models | Open::Cancel));
            if let (Some(Busy::Loading(name)), true) = (session.busy.take(), alone) {
                match error {
                    WireError::Stuck => {
                        self.blame(name, "the engine did not come to an end of loading the file")
                    }
                    _ => self.suspect = Some(name),
                }
            }
            for (_, open) in session.open.drain() {
                open.fail(lost_report(error));
            }
        }
        end
    }

    /// What ended the engine before this one? Its launcher has counted if the engine ended by itself; an engine that
    /// died with its launcher says nothing about a file.
    async fn judge(&mut self) {
        let launcher = self.links.launcher.clone();
        let listing = tokio::task::spawn_blocking(move || launcher.list()).await;
        let of_set = |listing: Listing| listing.engines.into_iter().find(|engine| engine.set == SET);
        let restarts = listing.ok().and_then(Result::ok).and_then(of_set).map(|engine| engine.restarts);
        let before = std::mem::replace(&mut self.restarts, restarts);
        if let Some(name) = self.suspect.take()
            && restarts.is_none_or(|restarts| restarts > before.unwrap_or(0))
        {
            self.blame(name, "the engine ended while it was loading the file");
        }
    }

    fn blame(&mut self, name: String, why: &str) {
        let deaths = self.deaths.entry(name.clone()).or_default();
        *deaths += 1;
        // Once may be chance; it is tried again when the owner changes the models.
        if *deaths >= DEATHS_MOST {
            let report = killed_report(&name, why);
            self.failed.insert(name, report);
        }
    }

    /// Keeps the engine's models what is wanted, one step at a time, and shows how far that is.
    async fn load_next(&mut self, session: &mut Session) -> Result<(), WireError> {
        let wish = self.wish.borrow().clone();
        while let (None, Some(wish)) = (&session.busy, &wish) {
            match plan::next(wish, &session.loaded, &self.failed) {
                Next::Settled => break,
                Next::Unload(name) => {
                    session.busy_until = tokio::time::Instant::now() + self.links.load_patience;
                    session.send(Request::Unload { model: name.clone() }, Open::Models).await?;
                    session.busy = Some(Busy::Unloading(name));
                }
                Next::Load(choice) => {
                    if let Err(report) = self.admitted(&choice, session).await {
                        tracing::warn!(model = %choice.name, problem = %report, "a model was not admitted");
                        self.failed.insert(choice.name, report);
                        continue;
                    }
                    tracing::info!(model = %choice.name, path = %choice.path, "a model is being loaded");
                    let file = tokio::fs::metadata(&choice.path).await;
                    let reading = file.map_or(0, |file| file.len() / READ_LEAST_BYTES_PER_S);
                    let patience = self.links.load_patience + Duration::from_secs(reading);
                    session.busy_until = tokio::time::Instant::now() + patience;
                    session.send(Request::Load(plan::load(&choice)), Open::Models).await?;
                    session.busy = Some(Busy::Loading(choice.name));
                }
            }
        }
        let settled = session.busy.is_none() && wish.is_some();
        let stage = if settled { Stage::Ready } else { Stage::Loading };
        let shown = self.shown.borrow().clone();
        if shown.stage != stage || shown.models != session.loaded || shown.failed != self.failed {
            self.show(stage, session.loaded.clone(), Some(session.devices.clone()));
        }
        Ok(())
    }

    async fn admitted(&self, choice: &Choice, session: &Session) -> Result<(), Report> {
        let (gate, choice) = (Arc::clone(&self.links.gate), choice.clone());
        let (devices, loaded) = (session.devices.clone(), session.loaded.clone());
        let asked = tokio::task::spawn_blocking(move || gate(&choice, &devices, &loaded)).await;
        asked.unwrap_or_else(|error| {
            Err(Report::bug("thread_lost", "the model was not loaded", error.to_string(), "try again"))
        })
    }

    fn take(&mut self, session: &mut Session, frame: ServerFrame) {
        let Some(open) = session.open.get_mut(&frame.id) else { return };
        let last = match (open, frame.body) {
            (Open::Models, body) => {
                self.models_changed(session, body);
                true
            }
            (Open::Generation { pieces, .. }, body) => {
                let (item, last) = match body {
                    Event::Piece { text, .. } => (Ok(Piece::Text(text)), false),
                    Event::Done(done) => (Ok(Piece::Done(done)), true),
                    Event::Error(report) => (Err(report), true),
                    other => (Err(out_of_order("generate", &other)), true),
                };
                // A reader that is gone has said so by `GiveUp`.
                let _ = pieces.send(item);
                last
            }
            (Open::One(_), body) => {
                if let Some(Open::One(answer)) = session.open.remove(&frame.id) {
                    let _ = answer.send(match body {
                        Event::Error(report) => Err(report),
                        other => Ok(other),
                    });
                }
                true
            }
            (Open::Cancel, _) => true,
        };
        if last {
            session.open.remove(&frame.id);
        }
    }

    fn models_changed(&mut self, session: &mut Session, body: Event) {
        let busy = session.busy.take();
        match (body, busy) {
            (Event::Loaded(model), _) => {
                tracing::info!(model = %model.model, architecture = %model.architecture, "a model is loaded");
                self.deaths.remove(&model.model);
                session.loaded.retain(|other| other.model != model.model);
                session.loaded.push(model);
            }
            (Event::Unloaded { model }, _) => session.loaded.retain(|other| other.model != model),
            (Event::Error(report), Some(Busy::Loading(name))) => {
                tracing::warn!(model = %name, problem = %report, "a model was refused");
                self.failed.insert(name, report);
            }
            // It was not there: then it is gone as well.
            (Event::Error(_), Some(Busy::Unloading(name))) => {
                session.loaded.retain(|other| other.model != name)
            }
            (other, _) => {
                let report = out_of_order("load", &other);
                tracing::error!(problem = %report, "the engine answered a load with something else");
            }
        }
    }
}

/// One life of the connection.
struct Session {
    writer: Writer,
    devices: Vec<Device>,
    loaded: Vec<LoadedModel>,
    busy: Option<Busy>,
    /// When what it is busy with will not be waited for any longer.
    busy_until: tokio::time::Instant,
    open: HashMap<u64, Open>,
    last_id: u64,
}

enum Busy {
    Loading(String),
    Unloading(String),
}

/// Whether a generation's pieces are still read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    Here,
    /// It may come back with the same key, and then reads from the first piece again.
    Away,
}

/// Who waits for the answer to a frame.
enum Open {
    One(oneshot::Sender<Result<Event, Report>>),
    Generation {
        key: String,
        ticket: u64,
        pieces: mpsc::UnboundedSender<Result<Piece, Report>>,
        reader: Reading,
    },
    Models,
    Cancel,
}

impl Open {
    fn fail(self, report: Report) {
        match self {
            Self::One(answer) => drop(answer.send(Err(report))),
            Self::Generation { pieces, .. } => drop(pieces.send(Err(report))),
            Self::Models | Self::Cancel => {}
        }
    }
}

impl Session {
    async fn send(&mut self, body: Request, open: Open) -> Result<(), WireError> {
        self.last_id += 1;
        self.open.insert(self.last_id, open);
        self.writer.send(&ClientFrame { id: self.last_id, body }).await
    }

    async fn give(&mut self, command: Command) -> Result<(), WireError> {
        match command {
            Command::One { request, answer } => self.send(request, Open::One(answer)).await,
            Command::Generate { generate, pieces, ticket } => {
                let key = generate.key.clone();
                let open = Open::Generation { key, ticket, pieces, reader: Reading::Here };
                self.send(Request::Generate(generate), open).await
            }
            Command::GiveUp { ticket, leaving } => self.give_up(ticket, leaving).await,
        }
    }

    /// Cancels a generation unless its reader may return, or somebody else reads it too: a retry attaches to the one
    /// it repeats.
    async fn give_up(&mut self, gone: u64, leaving: Leaving) -> Result<(), WireError> {
        let found = self.open.iter().find_map(|(id, open)| match open {
            Open::Generation { key, ticket, .. } if *ticket == gone => Some((*id, key.clone())),
            _ => None,
        });
        let Some((id, key)) = found else { return Ok(()) };
        if leaving == Leaving::MayReturn && self.alone_of(caller_of(&key)) < ALONE_MOST {
            if let Some(Open::Generation { reader, .. }) = self.open.get_mut(&id) {
                *reader = Reading::Away;
            }
            return Ok(());
        }
        self.open.remove(&id);
        let shared = self
            .open
            .values()
            .any(|open| matches!(open, Open::Generation { key: other, .. } if *other == key));
        if shared {
            return Ok(());
        }
        self.send(Request::Cancel { key }, Open::Cancel).await
    }

    /// How many generations of this caller go on without a reader.
    fn alone_of(&self, caller: &str) -> usize {
        let alone = |open: &&Open| matches!(open, Open::Generation { key, reader: Reading::Away, .. } if caller_of(key) == caller);
        self.open.values().filter(alone).count()
    }
}

/// A key begins with its caller.
fn caller_of(key: &str) -> &str {
    key.split('/').next().unwrap_or(key)
}

fn refuse(command: Command, report: Report) {
    match command {
        Command::One { answer, .. } => drop(answer.send(Err(report))),
        Command::Generate { pieces, .. } => drop(pieces.send(Err(report))),
        Command::GiveUp { .. } => {}
    }
}

fn lost_report(error: &WireError) -> Report {
    Report::environment(
        "engine_lost",
        "the engine did not answer",
        error.to_string(),
        "the launcher starts it again by itself: send the request again in a moment",
    )
}

fn killed_report(name: &str, why: &str) -> Report {
    Report::environment(
        "model_ended_engine",
        format!("the model {name} was not loaded"),
        why,
        format!(
            "the file may be too large for this machine's memory, or damaged: `agentctl model rm {name}` removes it"
        ),
    )
}
