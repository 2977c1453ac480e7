//! How do an agent's texts get their vectors, and its questions theirs?
//!
//! Owns:  the pool of open memory stores (`/data/agents/<id>/memory.redb`, `/data/knowledge/<id>.redb`): the lately used
//!        ones are open.
//! In:    what agents and their owner want of memories; runs that begin and end; the engine's embedder as it comes and
//!        goes.
//! Out:   what `agentd_memory` answers.
//! Always: a text is stored whether or not the engine answers; without a vector it is found by its words, and gets
//!         its vector when the embedder is there. Two completions of one store never run at once, and a text that
//!         is wanted twice in a row is embedded once (`vectors.rs`). Whose memory is meant is an argument that the
//!         caller's socket, or the owner's path, decided; nothing below looks at a request for it.
//! Rooms: `tiers.rs` (blocks, records, journal), `sessions.rs` (runs begin and end, hits were given), `knowledge.rs`
//!        (shared collections), `echo.rs` (what was recalled is not told again), `shape.rs` (the API's words),
//!        `orders.rs` (the owner), `tend.rs`, `vectors.rs`.
//! Threads: the stores block, so they are called on blocking threads; the engine is asked from tasks.

mod echo;
mod knowledge;
mod meaning;
mod orders;
mod parts;
mod sessions;
mod shape;
mod tend;
mod tiers;
mod vectors;

pub use knowledge::{CollectionRow, DOCUMENT_MOST_BYTES, Writer};
pub use tiers::NotWritten;

use crate::clock;
use crate::engine::{Embedder, Engine, Stage};
use crate::store::Db;
use agentd_domain::agent_api::{EmbedState, Recall, Recalled, Remembered, Signals, Tier};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, OwnerId, RunId};
use agentd_domain::memory_api::{Quota, Told};
use agentd_domain::rights::{Limit, Rights};
use agentd_memory::{
    Asked, At, Budgets, Duplicates, Embedding, Identity, Limits, NewRecord, Options, Pool, Store, StoreError,
};
use echo::Given;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;
use vectors::Vectors;

/// A text is embedded before it is stored if the engine answers so soon; otherwise afterwards.
const REMEMBER_PATIENCE: Duration = Duration::from_secs(3);
/// A question waits longer: without a vector it is answered by words alone.
const RECALL_PATIENCE: Duration = Duration::from_secs(30);
/// For an engine that is starting, and for records that still wait for their vector.
const SETTLE_PATIENCE: Duration = Duration::from_secs(20);
/// Texts per request to the engine: some seconds of work on a slow machine.
const BATCH: usize = 16;
/// After a failed completion.
const PAUSE: Duration = Duration::from_secs(5);

/// All agents' memories. Cheap to clone.
#[derive(Clone)]
pub struct Memories(Arc<Inner>);

struct Inner {
    folders: Folders,
    db: Db,
    owner: OwnerId,
    engine: Engine,
    pool: Pool,
    known: Mutex<HashMap<AgentId, Arc<Memory>>>,
    /// Of collections, by their own ids.
    shared: Mutex<HashMap<AgentId, Arc<Memory>>>,
    /// Somewhere a record waits for its vector.
    waiting: Notify,
}

/// Where stores are.
#[derive(Debug, Clone)]
pub struct Folders {
    /// One folder per agent.
    pub agents: PathBuf,
    /// One file per collection; made when there is the first.
    pub knowledge: PathBuf,
}

/// Who decides what a store may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    /// The token of the agent whose it is.
    Token,
    /// Its owner.
    Quota(Quota),
}

struct Memory {
    path: PathBuf,
    identity: Identity,
    bound: Bound,
    db: Db,
    pool: Pool,
    /// A record may wait for its vector: since a restart, or because it was told while the engine was away.
    waits: AtomicBool,
    /// The embedder that the store was told of.
    embedder: Mutex<Option<Embedder>>,
    /// Held while vectors are being made for what waits.
    completing: Mutex<()>,
    /// Held while a run that is over is settled.
    settling: Mutex<()>,
    vectors: Vectors,
    given: Given,
}

/// By whom something is told.
#[derive(Debug, Clone, Copy)]
pub struct Teller {
    pub agent: AgentId,
    pub run: RunId,
}

impl Memories {
    /// Starts the task that completes what waits, on the current runtime.
    pub fn start(folders: Folders, db: Db, engine: Engine) -> Self {
        let (pool, known, shared) = (Pool::new(Limits::default()), Mutex::default(), Mutex::default());
        let (owner, waiting) = (db.owner(), Notify::new());
        let memories = Self(Arc::new(Inner { folders, db, owner, engine, pool, known, shared, waiting }));
        tokio::spawn(memories.clone().complete_all());
        tokio::spawn(memories.clone().tend_all());
        memories
    }

    /// Answers when the record is on disk. With a key that was used in the last 24 hours, the first answer again.
    /// What this agent was given by `recall` is not told again as its own.
    pub async fn remember(
        &self,
        by: Teller,
        mut told: Told,
        key: Option<String>,
    ) -> Result<Remembered, Report> {
        let own = self.memory(by.agent).await?;
        own.given.check(&mut told, key.as_deref())?;
        let (into, session) = match told.tier {
            Tier::Knowledge => (self.written(by.agent, told.collection.as_ref()).await?, None),
            _ => (Arc::clone(&own), Some(by.run.to_string())),
        };
        let mut new = shape::new_record(told, clock::unix_ms())?;
        new.idempotency_key = key.clone();
        new.detail.session = session;
        let remembered = self.remember_in(&into, new).await?;
        if let Some(key) = &key {
            own.given.answered(key);
        }
        Ok(remembered)
    }

    async fn remember_in(&self, memory: &Memory, mut new: NewRecord) -> Result<Remembered, Report> {
        let embedding = self.embed_record(memory, &mut new).await;
        let remembered = blocking(memory, move |store| store.remember(new, embedding)).await?;
        self.note_waiting(memory, remembered.state);
        Ok(remembered)
    }

    fn note_waiting(&self, memory: &Memory, state: EmbedState) {
        // A vector, or vectors of its words.
        if state != EmbedState::WordsOnly {
            memory.waits.store(true, Ordering::SeqCst);
            self.0.waiting.notify_one();
        }
    }

    /// Of one store, by whoever may read it.
    async fn recall_in(&self, memory: &Memory, request: Recall, at: At) -> Result<Recalled, Report> {
        let mut vectors = None;
        if request.signals != Some(Signals::Words) {
            self.engine_settled().await;
            vectors = self.embed_question(memory, &request).await;
            if vectors.is_some() {
                // What was told while the engine was away is to be found by its meaning too.
                let _ = timeout(SETTLE_PATIENCE, self.complete(memory)).await;
            }
        }
        let asked = Asked { at, vectors, now_unix_ms: Some(clock::unix_ms()) };
        blocking(memory, move |store| store.answer(&request, &asked)).await
    }

    /// Closes an agent's store and destroys it, its key first: the agent is about to be removed, and what it
    /// remembered must open no more wherever pages of it are left.
    pub async fn destroy(&self, agent: AgentId) {
        let known = self.0.known.lock().await.remove(&agent);
        let path = self.path_of(agent);
        // Waits for who uses it, and for the writer's thread.
        let destroyed = tokio::task::spawn_blocking(move || {
            if known.is_some_and(|memory| !memory.pool.close(&memory.path)) {
                tracing::warn!(agent_id = %agent, "a memory store was still in use when its key was destroyed");
            }
            agentd_memory::destroy(&path)
        });
        // The launcher removes the files in any case; whoever asked is not kept from it.
        match destroyed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(agent_id = %agent, %error, "the key of a removed agent's memory was not overwritten");
            }
            Err(error) => tracing::error!(agent_id = %agent, %error, "destroying a memory store ended early"),
        }
    }

    fn path_of(&self, agent: AgentId) -> PathBuf {
        self.0.folders.agents.join(agent.to_string()).join("memory.redb")
    }

    async fn memory(&self, agent: AgentId) -> Result<Arc<Memory>, Report> {
        let (memory, is_new) = {
            let mut known = self.0.known.lock().await;
            let is_new = !known.contains_key(&agent);
            let memory = known
                .entry(agent)
                .or_insert_with(|| Arc::new(self.at(self.path_of(agent), agent, Bound::Token)));
            (Arc::clone(memory), is_new)
        };
        if is_new {
            // Its records may wait since before a restart.
            self.0.waiting.notify_one();
        }
        Ok(memory)
    }

    fn at(&self, path: PathBuf, id: AgentId, bound: Bound) -> Memory {
        Memory {
            path,
            identity: Identity { agent_id: id, owner_id: self.0.owner },
            bound,
            db: self.0.db.clone(),
            pool: self.0.pool.clone(),
            waits: AtomicBool::new(true),
            embedder: Mutex::default(),
            completing: Mutex::default(),
            settling: Mutex::default(),
            vectors: Vectors::default(),
            given: Given::default(),
        }
    }

    /// The text's vector, or none when there is no embedder or it takes too long.
    async fn embed(&self, text: &str, patience: Duration, memory: &Memory) -> Option<Embedding> {
        let embedder = self.0.engine.view().embedder()?;
        if let Err(report) = self.introduce(memory, &embedder).await {
            tracing::warn!(problem = %report, "an embedder was not taken");
            return None;
        }
        match timeout(patience, memory.vectors.of(&self.0.engine, &embedder, text)).await {
            Ok(Ok(vector)) => Some(Embedding { embedder: embedder.digest, vector: vector.to_vec() }),
            Ok(Err(report)) => {
                tracing::debug!(problem = %report, "a text was not embedded now");
                None
            }
            Err(_) => None,
        }
    }

    /// Tells a store which embedder is in use, once per change.
    async fn introduce(&self, memory: &Memory, embedder: &Embedder) -> Result<(), Report> {
        // `try_lock` would be wrong: who holds it may be introducing another embedder.
        let mut known = memory.embedder.lock().await;
        if known.as_ref() == Some(embedder) {
            return Ok(());
        }
        let (digest, dimension) = (embedder.digest, embedder.dimension);
        blocking(memory, move |store| store.use_embedder(digest, dimension)).await?;
        *known = Some(embedder.clone());
        Ok(())
    }

    /// Waits while the engine is starting or loading, but not for one that is down.
    async fn engine_settled(&self) {
        let mut view = self.0.engine.watch();
        let settled = view.wait_for(|view| match view.stage {
            Stage::Starting | Stage::Loading => view.embedder().is_some(),
            Stage::Ready | Stage::Down(_) => true,
        });
        let _ = timeout(SETTLE_PATIENCE, settled).await;
    }

    /// Makes vectors for everything of one store that waits for one.
    async fn complete(&self, memory: &Memory) -> Result<(), Report> {
        let Some(embedder) = self.0.engine.view().embedder() else { return Ok(()) };
        self.introduce(memory, &embedder).await?;
        let _alone = memory.completing.lock().await;
        loop {
            // Before the look: what is told after it sets this again.
            memory.waits.store(false, Ordering::SeqCst);
            let batch = blocking(memory, |store| store.pending_batch(BATCH)).await?;
            if batch.is_empty() {
                return Ok(());
            }
            self.complete_records(memory, &embedder, batch).await?;
        }
    }

    /// Makes vectors for the words of one store, after its records have theirs.
    async fn words(&self, memory: &Memory) -> Result<(), Report> {
        let Some(embedder) = self.0.engine.view().embedder() else { return Ok(()) };
        self.complete_words(memory, &embedder).await
    }

    /// Completes whenever something waits or another embedder is there.
    async fn complete_all(self) {
        let mut view = self.0.engine.watch();
        let mut last = None;
        loop {
            let embedder = view.borrow_and_update().embedder();
            let mut failed = false;
            if embedder.is_some() {
                let mut known: Vec<_> = self.0.known.lock().await.values().cloned().collect();
                known.extend(self.0.shared.lock().await.values().cloned());
                for memory in known {
                    if embedder == last && !memory.waits.load(Ordering::SeqCst) {
                        continue;
                    }
                    let completed = async {
                        self.complete(&memory).await?;
                        self.words(&memory).await
                    };
                    if let Err(report) = completed.await {
                        memory.waits.store(true, Ordering::SeqCst);
                        tracing::warn!(problem = %report, "records wait longer for their vectors");
                        failed = true;
                    }
                }
            }
            if embedder != last {
                tracing::info!(
                    embedder = embedder.as_ref().map(|e| e.name.as_str()),
                    "embedder for memories"
                );
                last = embedder;
            }
            tokio::select! {
                changed = view.changed() => if changed.is_err() { return },
                () = self.0.waiting.notified() => {}
                () = tokio::time::sleep(PAUSE), if failed => {}
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    memory: &Memory,
    work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Report> {
    let (pool, path, opening) = (memory.pool.clone(), memory.path.clone(), Opening::of(memory));
    let done = tokio::task::spawn_blocking(move || {
        let store = pool.lease(&path, || opening.options())?;
        work(&store)
    });
    match done.await {
        Ok(result) => result.map_err(|error| error.report()),
        Err(_) => Err(thread_lost()),
    }
}

/// How a store is opened, by whoever comes first.
struct Opening {
    identity: Identity,
    bound: Bound,
    db: Db,
}

impl Opening {
    fn of(memory: &Memory) -> Self {
        Self { identity: memory.identity, bound: memory.bound, db: memory.db.clone() }
    }

    /// Blocks for a row of the system's store.
    fn options(self) -> Options {
        let budgets = match self.bound {
            Bound::Quota(quota) => Budgets::knowledge_within(quota.bytes, quota.records),
            Bound::Token => budgets_of(&self.db, self.identity.agent_id),
        };
        let mut options = Options::new(self.identity, budgets);
        if self.bound != Bound::Token {
            // Two documents may say the same, and one of them may go.
            options.tuning.duplicates = Duplicates::Keep;
        }
        options
    }
}

/// What an agent's token says that its memories may take. A token of before these limits, or none at all, bounds as the
/// default does.
fn budgets_of(db: &Db, agent: AgentId) -> Budgets {
    let row = db.here().token(agent).ok().flatten();
    let rights =
        row.and_then(|row| agentd_capability::token::inspect(&row.token).ok()).map(|says| says.rights);
    rights.as_ref().map_or_else(Budgets::agent, budgets_within)
}

fn budgets_within(rights: &Rights) -> Budgets {
    let limit = |limit: Limit| rights.limits.get(&limit).copied();
    match (limit(Limit::StoreBytes), limit(Limit::StoreRecords)) {
        (Some(bytes), Some(records)) => Budgets::agent_within(bytes, records),
        _ => Budgets::agent(),
    }
}

fn thread_lost() -> Report {
    Report::bug("memory_thread", "the memory did not answer", "its thread ended early", "try again")
}
