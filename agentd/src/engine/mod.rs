//! How does agentd use its engine, a process that may die at any time?
//!
//! Owns:  the one connection to `/run/agentd/engines/host.sock`, the list of models that are loaded and how they are used.
//! In:    requests through [`Engine`] from any task; the models there are through [`Engine::want`].
//! Out:   answers; and for everybody who watches, [`View`].
//!
//! ```text
//! Down ── launcher starts it, socket answers ──▶ Loading ── every wanted model loaded or refused ──▶ Ready
//!   ▲                                                │                                                │
//!   └───────────────── connection lost ──────────────┴────────────────────────────────────────────────┘
//! ```
//!
//! Always: a model that the engine holds already (agentd was restarted) is not loaded again. A request given to
//!         an engine that died is answered with an error that says so; one that comes later waits for its model, which
//!         the next engine gets first. Nothing waits for ever: an engine that does not come to an end of a load is ended,
//!         and the next one starts.
//! Which:  one engine holds all models of its device set: they share its threads, its devices' contexts and what is
//!         learned of them, and weights are held once. A load that could end it is tried in a process of its own before
//!         (`planner.rs`).
//! Threads: one task on the data plane owns the connection; everything else talks to it over a bounded channel.
//!
//! | module | question |
//! |---|---|
//! | `run` | what comes and goes over the connection, and what if it breaks? |
//! | `session` | what is open on it? |
//! | `loads`, `plan` | which model is next, and what becomes of who waits? |
//! | `gate` | may it be loaded? (asked of `crate::gpu`) |
//! | `drain` | how does it make way for another one? |
//! | `uses`, `waiting` | who uses which model, who waits for one? |
//! | `planner` | what will it take, exactly? |

mod drain;
mod gate;
mod loads;
mod plan;
mod planner;
mod run;
mod session;
#[cfg(test)]
mod several;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
mod uses;
mod waiting;
mod wire;

pub use drain::Drained;
pub use gate::{Ask, Gate, Holder, Terms, Verdict};
#[cfg(test)]
pub use plan::load;
pub use plan::{Choice, Wanted};
pub use planner::{Planner, Unplanned};
pub use run::{Links, SET, start};
pub use uses::{InUse, Seen};
pub use waiting::Asker;

use agentd_domain::engine::{Device, EngineStatus, Event, Generate, LoadedModel, ModelKind, Request};
use agentd_domain::fault::Report;
use agentd_serving::{Embeddings, EngineHandle, Leaving, Pending, Piece, Pieces, ServedModel};
use futures::stream;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use uses::Uses;

/// Requests on their way to the connection's task; beyond, callers wait.
const QUEUE: usize = 64;
/// Embedding a batch under plain emulation takes seconds; a minute means that the engine is stuck.
const EMBED_LIMIT: Duration = Duration::from_secs(60);
const STATUS_LIMIT: Duration = Duration::from_secs(3);
/// How long a generation goes on for a reader that may return: as long as the engine itself keeps one.
const RETURN_LIMIT: Duration = Duration::from_secs(60);

/// What is known of the engine without asking it.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    pub stage: Stage,
    pub devices: Vec<Device>,
    pub models: Vec<LoadedModel>,
    /// Models that a request may name, loaded or not, without the embedder.
    pub installed: Vec<Choice>,
    /// The embedder as it was loaded last.
    pub embedder_seen: Option<LoadedModel>,
    /// What is on its way.
    pub loading: Option<String>,
    /// The chat model that `default` means, loaded or not.
    pub default_chat: Option<String>,
    /// Models that the engine refused, and why.
    pub failed: BTreeMap<String, Report>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Not reached for the first time yet.
    Starting,
    Loading,
    Ready,
    Down(Report),
}

/// The model that makes memories' vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Embedder {
    pub name: String,
    pub digest: [u8; 32],
    pub dimension: u32,
}

impl View {
    pub fn embedder(&self) -> Option<Embedder> {
        let seen = self.embedder_seen.as_ref()?;
        let model = self.models.iter().find(|model| *model == seen)?;
        let digest = hex::decode(&model.sha256).ok()?.try_into().ok()?;
        Some(Embedder { name: model.model.clone(), digest, dimension: model.dimension })
    }
}

/// The engine for everybody else. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    wanted: watch::Sender<Option<Wanted>>,
    view: watch::Receiver<Arc<View>>,
    uses: Uses,
}

enum Command {
    /// A request with one answer.
    One { request: Request, answer: oneshot::Sender<Result<Event, Report>> },
    Generate {
        generate: Generate,
        pieces: mpsc::UnboundedSender<Result<Piece, Report>>,
        ticket: u64,
        held: InUse,
    },
    /// Somebody wants a model that is not there, and waits.
    Have { model: String, asker: Asker, answer: waiting::Answer },
    /// The engine is to end when what it has begun is done, or at the latest then.
    Drain { within: Duration, why: Report, answer: oneshot::Sender<Drained> },
    /// What devices are to be held to may be something else now.
    Reconsider,
    /// The reader of this generation is gone.
    GiveUp { ticket: u64, leaving: Leaving },
}

impl Engine {
    /// Replaces what is to be loaded.
    pub fn want(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|old| {
            let changed = old.as_ref() != Some(&wanted);
            *old = Some(wanted);
            changed
        });
    }

    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// A model for one use: it stays as long as what is given lives. Waits until it is loaded, if it can be.
    pub async fn have(&self, model: &str, asker: Asker) -> Result<InUse, Report> {
        if let Some(inside) = self.uses.enter(model) {
            return Ok(inside);
        }
        let (answer, answered) = oneshot::channel();
        let wish = Command::Have { model: model.to_owned(), asker, answer };
        self.commands.send(wish).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// How a model is used.
    pub fn seen(&self, model: &str) -> Seen {
        self.uses.seen(model)
    }

    /// Ends the engine's process when it has finished what it has begun, or when that time is over, and starts another.
    /// Nothing new goes to it meanwhile: who wants a model waits for the next engine.
    pub async fn drain(&self, within: Duration, why: Report) -> Result<Drained, Report> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Drain { within, why, answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }

    /// Asks anew what the engine is to be held to: at once where that can be done to one that lives, else when nobody
    /// uses it.
    pub async fn reconsider(&self) {
        // Without a task there is no engine to hold.
        let _ = self.commands.send(Command::Reconsider).await;
    }

    /// Asks the engine itself.
    pub async fn status(&self) -> Result<EngineStatus, Report> {
        match self.one(Request::Status, STATUS_LIMIT).await? {
            Event::Status(status) => Ok(status),
            other => Err(out_of_order("status", &other)),
        }
    }

    /// One vector per text, made by the embedder of [`View::embedder`].
    pub async fn embed_with(&self, model: String, inputs: Vec<String>) -> Result<Embeddings, Report> {
        let count = inputs.len();
        match self.one(Request::Embed { model, inputs }, EMBED_LIMIT).await? {
            Event::Embeddings { vectors, tokens, .. } if vectors.len() == count => {
                Ok(Embeddings { vectors, tokens })
            }
            other => Err(out_of_order("embed", &other)),
        }
    }

    /// The same of any model that makes vectors, which comes first if it is not there.
    pub async fn embed_for(
        &self,
        model: String,
        inputs: Vec<String>,
        asker: Asker,
    ) -> Result<Embeddings, Report> {
        let _held = self.have(&model, asker).await?;
        self.embed_with(model, inputs).await
    }

    async fn one(&self, request: Request, limit: Duration) -> Result<Event, Report> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.commands.send(Command::One { request, answer }).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())?
        };
        tokio::time::timeout(limit, asked).await.map_err(|_| silent(limit))?
    }

    /// A generation of a model that is held for it.
    pub async fn generation(
        &self,
        generate: Generate,
        leaving: Leaving,
        held: InUse,
    ) -> Result<Pieces, Report> {
        static TICKETS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let ticket = TICKETS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (pieces, mut received) = mpsc::unbounded_channel();
        self.commands.send(Command::Generate { generate, pieces, ticket, held }).await.map_err(|_| gone())?;
        let mut guard = GiveUp { commands: self.commands.clone(), ticket, leaving, ended: false };
        // The first piece tells whether the request was taken: only then an error can still be a status.
        let first = match received.recv().await {
            Some(Ok(piece)) => piece,
            Some(Err(report)) => {
                guard.ended = true;
                return Err(report);
            }
            None => return Err(gone()),
        };
        let rest =
            stream::unfold((received, guard, Some(first)), |(mut received, mut guard, first)| async move {
                let item = match first {
                    Some(piece) => Ok(piece),
                    None => received.recv().await?,
                };
                guard.ended |= !matches!(item, Ok(Piece::Text(_)));
                Some((item, (received, guard, None)))
            });
        Ok(Box::pin(rest))
    }
}

/// Tells when a generation's reader goes before its end.
struct GiveUp {
    commands: mpsc::Sender<Command>,
    ticket: u64,
    leaving: Leaving,
    ended: bool,
}

impl Drop for GiveUp {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // A full queue loses this; the generation then runs to its own end.
        let _ = self.commands.try_send(Command::GiveUp { ticket: self.ticket, leaving: self.leaving });
        if self.leaving == Leaving::MayReturn
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (commands, ticket) = (self.commands.clone(), self.ticket);
            runtime.spawn(async move {
                tokio::time::sleep(RETURN_LIMIT).await;
                let _ = commands.try_send(Command::GiveUp { ticket, leaving: Leaving::Cancels });
            });
        }
    }
}

impl EngineHandle for Engine {
    fn models(&self) -> Vec<ServedModel> {
        let view = self.view();
        let served = |name: &str, kind: ModelKind| ServedModel {
            name: name.to_owned(),
            kind,
            default: kind == ModelKind::Chat && view.default_chat.as_deref() == Some(name),
            // Not known before its first load.
            dimension: view.models.iter().find(|one| one.model == name).map_or(0, |one| one.dimension),
        };
        let usable = |choice: &&Choice| !view.failed.contains_key(&choice.name);
        let mut models: Vec<ServedModel> =
            view.installed.iter().filter(usable).map(|choice| served(&choice.name, choice.kind)).collect();
        // Of an engine that lived on, before it is known what is installed.
        let loaded = view.models.iter().filter(|model| model.kind == ModelKind::Chat);
        for model in loaded {
            if !models.iter().any(|one| one.name == model.model) {
                models.push(served(&model.model, ModelKind::Chat));
            }
        }
        models.extend(view.embedder_seen.as_ref().map(|model| ServedModel {
            name: model.model.clone(),
            kind: ModelKind::Embedding,
            default: true,
            dimension: model.dimension,
        }));
        models
    }

    fn generate(&self, request: Generate, leaving: Leaving) -> Pending<'_, Pieces> {
        Box::pin(async move {
            let held = self.have(&request.model, Asker::default()).await?;
            self.generation(request, leaving, held).await
        })
    }

    fn embed(&self, model: String, inputs: Vec<String>) -> Pending<'_, Embeddings> {
        Box::pin(self.embed_for(model, inputs, Asker::default()))
    }
}

fn gone() -> Report {
    Report::environment(
        "engine_lost",
        "the engine did not answer",
        "agentd is shutting down",
        "send the request again in a moment",
    )
}

fn silent(limit: Duration) -> Report {
    Report::environment(
        "timeout",
        "the engine did not answer",
        format!("it was silent for {} s", limit.as_secs()),
        "send the request again; if it stays silent, `agentctl status` shows the engine",
    )
}

fn out_of_order(asked: &str, got: &Event) -> Report {
    let kind = match got {
        Event::Hello { .. } => "hello",
        Event::Loaded(_) => "loaded",
        Event::Unloaded { .. } => "unloaded",
        Event::Status(_) => "status",
        Event::Plan(_) => "plan",
        Event::Piece { .. } => "piece",
        Event::Done(_) => "done",
        Event::Cancelled { .. } => "cancelled",
        Event::Embeddings { .. } => "embeddings",
        Event::Tokens { .. } => "tokens",
        Event::Logits { .. } => "logits",
        Event::Error(_) => "error",
    };
    Report::bug(
        "engine_protocol",
        "the engine's answer was not understood",
        format!("asked for {asked}, it answered with {kind}"),
        "agentd and the engine are of different versions: restart the appliance",
    )
}
