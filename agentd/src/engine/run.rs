//! The task that owns the connection.
//!
//! It connects, greets, reads what is loaded, then carries frames both ways until the connection ends, and
//! begins again. Requests that arrive while there is no engine are answered at once with the reason; who wants a model
//! waits a while, for the next one. Which model is loaded when: `loads.rs`.

use super::drain::{Drained, Renewal};
use super::gate::{Gate, Terms, Verdict};
use super::plan;
use super::session::{Busy, Open, Session};
use super::uses::Uses;
use super::waiting::Waiting;
use super::wire::{self, Reader, WireError};
use super::{Command, Engine, QUEUE, Stage, View, Wanted, out_of_order};
use agentd_domain::engine::{ClientFrame, Event, PROTOCOL_VERSION, Request, ServerFrame};
use agentd_domain::fault::Report;
use agentd_domain::launcher::{EngineSpec, Listing};
use agentd_sandbox::client::Launcher;
use agentd_serving::Piece;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// The device set of this machine's devices; its socket is `host.sock`.
pub const SET: &str = "host";
const GREETING_LIMIT: Duration = Duration::from_secs(20);
/// Between attempts to reach an engine: short, because everything waits for it; doubled up to the second.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// While an engine is to end: how often it is asked whether somebody still uses it.
const QUIET_EVERY: Duration = Duration::from_millis(200);

/// The slowest disk that models are read from.
pub(super) const READ_LEAST_BYTES_PER_S: u64 = 5_000_000;

/// A file that ended so many engines in a row is to blame.
pub(super) const DEATHS_MOST: u32 = 2;

/// Room is made for one load so many times: then others took it each time.
pub(super) const ROUNDS_MOST: u32 = 5;

/// An engine that was lost is back after a second or two. Who waits for a model longer than this without one is told.
const AWAY_MOST: Duration = Duration::from_secs(20);

/// The launcher's words for an engine that runs with other limits, and for a launcher that is not there.
const CONFLICT: &str = "engine_conflict";
const UNREACHABLE: &str = "launcher_unreachable";

/// What the task needs of the world.
pub struct Links {
    pub launcher: Launcher,
    pub sockets: PathBuf,
    /// Of the engine's cgroup.
    pub memory_max_bytes: u64,
    /// How long a load may take, besides the time for reading the file.
    pub load_patience: Duration,
    /// Asked before each load, with what the engine has.
    pub gate: Arc<dyn Gate>,
}

/// Starts the task on the current runtime. A new engine's process is asked for when `begin` is over: loading models
/// keeps a small machine busy for seconds. One that runs already, because agentd was restarted, is used at once.
pub fn start(links: Links, begin: impl Future<Output = ()> + Send + 'static) -> Engine {
    let (commands, queue) = mpsc::channel(QUEUE);
    let (wanted, wish) = watch::channel(None);
    let start = View {
        stage: Stage::Starting,
        devices: Vec::new(),
        models: Vec::new(),
        installed: Vec::new(),
        embedder_seen: None,
        loading: None,
        default_chat: None,
        failed: BTreeMap::new(),
    };
    let (shown, view) = watch::channel(Arc::new(start));
    let uses = Uses::default();
    let (told, verdicts) = mpsc::channel(4);
    let task = Task {
        links,
        queue,
        wish,
        shown,
        failed: BTreeMap::new(),
        deaths: BTreeMap::new(),
        suspect: None,
        restarts: None,
        resident: BTreeSet::new(),
        default_was: None,
        waiting: Waiting::default(),
        uses: uses.clone(),
        told,
        verdicts,
        lives: 0,
        terms: Terms::default(),
        limits_refused: false,
        renewal: None,
    };
    let launcher = task.links.launcher.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = begin => {}
            () = runs_already(launcher) => {}
        }
        task.run().await;
    });
    Engine { commands, wanted, view, uses }
}

/// Returns if the launcher holds a living engine now, and else never.
async fn runs_already(launcher: Launcher) {
    let listing = tokio::task::spawn_blocking(move || launcher.list()).await;
    let lives = |listing: &Listing| listing.engines.iter().any(|engine| engine.set == SET && engine.pid != 0);
    if !matches!(&listing, Ok(Ok(listing)) if lives(listing)) {
        std::future::pending::<()>().await;
    }
}

pub(super) struct Task {
    pub(super) links: Links,
    queue: mpsc::Receiver<Command>,
    /// `None` until somebody has said what is wanted: what an engine holds from before is left alone until then.
    pub(super) wish: watch::Receiver<Option<Wanted>>,
    shown: watch::Sender<Arc<View>>,
    /// Survives a reconnection: a file that ended the engine must not end it again and again.
    pub(super) failed: BTreeMap<String, Report>,
    /// How often in a row an engine ended while it loaded this model.
    pub(super) deaths: BTreeMap<String, u32>,
    /// An engine was lost while it loaded this model, and it is not known yet what ended it.
    suspect: Option<String>,
    /// How often its launcher had started the engine again when it was reached last. A new launcher begins with 0.
    restarts: Option<u32>,
    /// Models that were loaded and not sent away since: a new engine gets them again.
    pub(super) resident: BTreeSet<String>,
    /// What `default` meant before.
    pub(super) default_was: Option<String>,
    pub(super) waiting: Waiting,
    pub(super) uses: Uses,
    /// Answers of the gate.
    pub(super) told: mpsc::Sender<Told>,
    verdicts: mpsc::Receiver<Told>,
    lives: u64,
    /// What the next engine is started with.
    terms: Terms,
    /// It was not started with its limits: not asked again in this life of agentd.
    limits_refused: bool,
    /// This one is to end.
    pub(super) renewal: Option<Renewal>,
}

/// What the gate answered, to which life of the connection.
pub(super) type Told = (u64, Verdict);

/// Why a connection's life ended.
enum End {
    /// agentd drops its engine: nobody is left to ask.
    NoMoreCommands,
    Lost(WireError),
    /// It was ended to make way for another one.
    Renewed(Report),
}

impl Task {
    async fn run(mut self) {
        let mut pause = RETRY_FIRST;
        loop {
            match self.connect().await {
                Ok((_, session)) if self.needs_other_terms(&session).await => continue,
                Ok((reader, session)) => {
                    pause = RETRY_FIRST;
                    tracing::info!(models = session.loaded.len(), "engine connected");
                    self.judge().await;
                    // What was refused for want of room may fit a new one.
                    self.failed.retain(|_, report| !plan::passes(report));
                    session.loaded.iter().for_each(|model| self.uses.came(&model.model, None));
                    let end = self.serve(reader, session).await;
                    self.uses.close_all();
                    match end {
                        End::NoMoreCommands => return,
                        End::Lost(error) => self.show_down(&lost_report(&error)),
                        End::Renewed(why) => self.show_down(&why),
                    }
                    // Gone with the engine that it was about: who asked hears of it.
                    self.renewal = None;
                }
                Err(report) => {
                    self.waiting.fail_older(AWAY_MOST, &|_| report.clone());
                    self.show_down(&report);
                }
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
        self.show(Stage::Down(report.clone()), None);
    }

    pub(super) fn show(&self, stage: Stage, session: Option<&Session>) {
        let wish = self.wish.borrow().clone().unwrap_or_default();
        let default_chat = plan::chat(&wish, &self.failed).map(|choice| choice.name.clone());
        let models = session.map(|session| session.loaded.clone()).unwrap_or_default();
        let embedder =
            wish.embedder.as_ref().and_then(|choice| models.iter().find(|model| plan::is(choice, model)));
        let embedder_seen = embedder.cloned().or_else(|| self.shown.borrow().embedder_seen.clone());
        let next = View {
            stage,
            devices: session.map_or_else(|| self.shown.borrow().devices.clone(), |one| one.devices.clone()),
            models,
            installed: wish.on_demand().cloned().collect(),
            embedder_seen,
            loading: session.and_then(Session::loading).map(str::to_owned),
            default_chat,
            failed: self.failed.clone(),
        };
        self.shown.send_if_modified(|view| {
            let changed = **view != next;
            *view = Arc::new(next);
            changed
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
                    // An engine comes back: who wants a model of it waits.
                    Some(Command::Have { model, asker, answer }) => self.wait(model, asker, answer),
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
        self.lives += 1;
        let life = self.lives;
        let path = self.links.sockets.join(format!("{SET}.sock"));
        // An engine that runs although the launcher cannot be asked is as good as any.
        self.terms.hidden = self.links.gate.hidden();
        let launcher_says = self.ask_for_engine(self.terms.clone()).await.err();
        if let Some(report) = launcher_says.as_ref().filter(|_| !self.terms.limits.is_empty())
            && report.code != CONFLICT
            && report.code != UNREACHABLE
        {
            // Whatever keeps it from starting with them: it is to start.
            self.terms.limits.clear();
            self.limits_refused = true;
            self.links.gate.limited(Err(report));
        }
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
            Ok((reader, Session::new(life, writer, devices, loaded)))
        };
        match tokio::time::timeout(GREETING_LIMIT, attempt).await {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => Err(launcher_says.unwrap_or_else(|| lost_report(&error))),
            Err(_) => Err(lost_report(&WireError::Silent(GREETING_LIMIT.as_secs()))),
        }
    }

    async fn ask_for_engine(&self, terms: Terms) -> Result<(), Report> {
        let launcher = self.links.launcher.clone();
        let memory_max_bytes = self.links.memory_max_bytes;
        let spec = EngineSpec {
            set: SET.to_owned(),
            memory_max_bytes,
            device_limits: terms.limits,
            hidden: terms.hidden,
            software_devices: false,
        };
        match tokio::task::spawn_blocking(move || launcher.start_engine(spec)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(lost_report(&WireError::Closed)),
        }
    }

    /// Now that it is known which devices there are: whether another engine is needed, one that is held to its share and
    /// sees what it may. One that holds models goes on as it is: limits of its group are changed while it lives, and for
    /// all else it begins anew as soon as nobody uses it.
    async fn needs_other_terms(&mut self, session: &Session) -> bool {
        let mut wanted = self.links.gate.terms(&session.devices);
        if self.limits_refused {
            wanted.limits.clear();
        }
        let none = Terms::default();
        if wanted == none && self.terms == none {
            self.links.gate.limited(Ok(&[]));
            return false;
        }
        // A process that sees its limits from its start on is told by its driver how much there is.
        if session.loaded.is_empty() && wanted != self.terms {
            tracing::info!(
                limits = wanted.limits.len(),
                hidden = wanted.hidden.len(),
                "the engine begins anew"
            );
            self.terms = wanted;
            self.end_engine().await;
            return true;
        }
        self.settle_terms(wanted, session).await
    }

    async fn settle_terms(&mut self, wanted: Terms, session: &Session) -> bool {
        let asked = self.ask_for_engine(wanted.clone()).await;
        match asked {
            Ok(()) => {
                self.terms = wanted;
                self.renewal.take_if(|renewal| !renewal.is_urgent());
                self.links.gate.limited(Ok(&self.terms.limits));
            }
            Err(report) if report.code == CONFLICT && session.loaded.is_empty() => {
                self.terms = wanted;
                self.end_engine().await;
                return true;
            }
            Err(report) => {
                self.links.gate.limited(Err(&report));
                if report.code == CONFLICT {
                    self.terms = wanted;
                    self.renewal.get_or_insert(Renewal::when_idle(begins_anew(&report)));
                }
            }
        }
        false
    }

    /// While it serves: what it is to be held to may have changed.
    async fn reconsider(&mut self, session: &Session) {
        let mut wanted = self.links.gate.terms(&session.devices);
        if self.limits_refused {
            wanted.limits.clear();
        }
        if wanted != self.terms && self.settle_terms(wanted, session).await {
            // Ended: the connection says so in a moment.
            tracing::info!("the engine begins anew with other terms");
        }
    }

    pub(super) async fn end_engine(&self) {
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
            if self.renewal.is_some() && self.is_quiet(&session) {
                break self.renewed(&mut session).await;
            }
            let (busy_until, wait_until) = (session.busy_until, self.waiting.next_end());
            let drain_until = self.renewal.as_ref().and_then(|renewal| renewal.until);
            let outcome = tokio::select! {
                () = until(wait_until), if wait_until.is_some() => { self.waiting.expire(); Ok(()) }
                verdict = self.verdicts.recv() => match verdict {
                    Some((life, verdict)) if life == session.life => self.judged(&mut session, verdict).await,
                    _ => Ok(()),
                },
                () = until(drain_until), if drain_until.is_some() => break self.renewed(&mut session).await,
                // A use that was over without a word on the connection.
                () = tokio::time::sleep(QUIET_EVERY), if self.renewal.is_some() => Ok(()),
                () = until(busy_until), if busy_until.is_some() => {
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
                    Some(Command::Have { model, asker, answer }) => {
                        self.wait(model, asker, answer);
                        Ok(())
                    }
                    Some(Command::Drain { within, why, answer }) => {
                        self.begin_drain(&session, Instant::now() + within, why, answer);
                        Ok(())
                    }
                    Some(Command::Reconsider) => {
                        self.reconsider(&session).await;
                        Ok(())
                    }
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
            let idle = |open: &Open| matches!(open, Open::Models | Open::Usage | Open::Cancel);
            let alone = matches!(error, WireError::Stuck) || session.open.values().all(idle);
            if let Some(Busy::Loading(choice, _)) = session.busy.take() {
                self.links.gate.not_loaded(&choice.name);
                match error {
                    WireError::Stuck => {
                        self.blame(choice.name, "the engine did not come to an end of loading the file")
                    }
                    _ if alone => self.suspect = Some(choice.name),
                    _ => {}
                }
            }
            for (_, open) in session.open.drain() {
                open.fail(lost_report(error));
            }
        }
        end
    }

    async fn renewed(&mut self, session: &mut Session) -> End {
        let why =
            self.renewal.as_ref().map_or_else(|| lost_report(&WireError::Closed), |one| one.why.clone());
        if let Some(Busy::Loading(choice, _)) = session.busy.take() {
            self.links.gate.not_loaded(&choice.name);
        }
        self.renew(session).await;
        End::Renewed(why)
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
            self.waiting.fail(&name, &report);
            self.failed.insert(name, report);
        }
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
            (Open::Usage, body) => {
                self.usage(session, body);
                true
            }
            (Open::Cancel, _) => true,
        };
        if last {
            session.open.remove(&frame.id);
        }
    }
}

fn refuse(command: Command, report: Report) {
    match command {
        Command::One { answer, .. } => drop(answer.send(Err(report))),
        Command::Generate { pieces, .. } => drop(pieces.send(Err(report))),
        Command::Have { answer, .. } => drop(answer.send(Err(report))),
        // There is no engine: the next one is as it should be.
        Command::Drain { answer, .. } => drop(answer.send(Drained { broken_off: 0 })),
        Command::Reconsider | Command::GiveUp { .. } => {}
    }
}

/// For a branch that is asked only where there is a moment.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn begins_anew(why: &Report) -> Report {
    Report::environment(
        "engine_begins_anew",
        "the engine begins anew",
        why.why.clone(),
        "send the request again in a moment: the next engine is there in a second or two",
    )
}

pub(super) fn lost_report(error: &WireError) -> Report {
    Report::environment(
        "engine_lost",
        "the engine did not answer",
        error.to_string(),
        "the launcher starts it again by itself: send the request again in a moment",
    )
}

pub(super) fn killed_report(name: &str, why: &str) -> Report {
    Report::environment(
        plan::ENDED_ENGINE,
        format!("the model {name} was not loaded"),
        why,
        format!(
            "the file may be too large for this machine's memory, or damaged: `agentctl model rm {name}` removes it"
        ),
    )
}
