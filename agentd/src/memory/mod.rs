//! How do an agent's texts get their vectors, and its questions theirs?
//!
//! Owns:  the pool of open memory stores (`/data/agents/<id>/memory.redb`): the lately used ones are open.
//! In:    `remember` and `recall` of agents; the engine's embedder as it comes and goes.
//! Out:   what `agentd_memory` answers.
//! Always: a text is stored whether or not the engine answers; without a vector it is found by its words, and gets
//!         its vector when the embedder is there. Two completions of one store never run at once, and a text that
//!         is wanted twice in a row is embedded once (`vectors.rs`).
//! Threads: the stores block, so they are called on blocking threads; the engine is asked from tasks.

mod tend;
mod vectors;

use crate::clock;
use crate::engine::{Embedder, Engine, Stage};
use agentd_domain::agent_api::{EmbedState, Recall, Recalled, Remember, Remembered, Signals, Tier};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use agentd_memory::{
    Budgets, Embedding, Identity, Limits, NewRecord, Options, Pending, Pool, Store, StoreError,
};
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
    folder: PathBuf,
    owner: OwnerId,
    engine: Engine,
    pool: Pool,
    known: Mutex<HashMap<AgentId, Arc<Memory>>>,
    /// Somewhere a record waits for its vector.
    waiting: Notify,
}

struct Memory {
    path: PathBuf,
    identity: Identity,
    pool: Pool,
    /// A record may wait for its vector: since a restart, or because it was told while the engine was away.
    waits: AtomicBool,
    /// The embedder that the store was told of.
    embedder: Mutex<Option<Embedder>>,
    /// Held while vectors are being made for what waits.
    completing: Mutex<()>,
    vectors: Vectors,
}

impl Memories {
    /// Starts the task that completes what waits, on the current runtime.
    pub fn start(folder: PathBuf, owner: OwnerId, engine: Engine) -> Self {
        let (pool, known) = (Pool::new(Limits::default()), Mutex::default());
        let memories = Self(Arc::new(Inner { folder, owner, engine, pool, known, waiting: Notify::new() }));
        tokio::spawn(memories.clone().complete_all());
        tokio::spawn(memories.clone().tend_all());
        memories
    }

    /// Answers when the record is on disk. With a key that was used in the last 24 hours, the first answer again.
    pub async fn remember(
        &self,
        agent: AgentId,
        request: Remember,
        key: Option<String>,
    ) -> Result<Remembered, Report> {
        let memory = self.memory(agent).await?;
        let has_meaning = matches!(request.tier, Tier::Spirit | Tier::Knowledge);
        let embedding =
            if has_meaning { self.embed(&request.text, REMEMBER_PATIENCE, &memory).await } else { None };
        let new = NewRecord { idempotency_key: key, ..NewRecord::new(request, clock::unix_ms()) };
        let remembered = blocking(&memory, move |store| store.remember(new, embedding)).await?;
        if remembered.state == EmbedState::Pending {
            memory.waits.store(true, Ordering::SeqCst);
            self.0.waiting.notify_one();
        }
        Ok(remembered)
    }

    pub async fn recall(&self, agent: AgentId, request: Recall) -> Result<Recalled, Report> {
        let memory = self.memory(agent).await?;
        let mut embedding = None;
        if request.signals != Some(Signals::Words) {
            self.engine_settled().await;
            embedding = self.embed(&request.query, RECALL_PATIENCE, &memory).await;
            if embedding.is_some() {
                // What was told while the engine was away is to be found by its meaning too.
                let _ = timeout(SETTLE_PATIENCE, self.complete(&memory)).await;
            }
        }
        blocking(&memory, move |store| store.recall(&request, embedding.as_ref())).await
    }

    /// Closes an agent's store, because its files are about to be removed.
    pub async fn close(&self, agent: AgentId) {
        let Some(memory) = self.0.known.lock().await.remove(&agent) else { return };
        // Waits for who uses it, and for the writer's thread.
        let closed = tokio::task::spawn_blocking(move || memory.pool.close(&memory.path)).await;
        if !matches!(closed, Ok(true)) {
            tracing::warn!(agent_id = %agent, "a memory store was still in use when its files were removed");
        }
    }

    async fn memory(&self, agent: AgentId) -> Result<Arc<Memory>, Report> {
        let (memory, is_new) = {
            let mut known = self.0.known.lock().await;
            let is_new = !known.contains_key(&agent);
            let memory = known.entry(agent).or_insert_with(|| {
                Arc::new(Memory {
                    path: self.0.folder.join(agent.to_string()).join("memory.redb"),
                    identity: Identity { agent_id: agent, owner_id: self.0.owner },
                    pool: self.0.pool.clone(),
                    waits: AtomicBool::new(true),
                    embedder: Mutex::default(),
                    completing: Mutex::default(),
                    vectors: Vectors::default(),
                })
            });
            (Arc::clone(memory), is_new)
        };
        if is_new {
            // Its records may wait since before a restart.
            self.0.waiting.notify_one();
        }
        Ok(memory)
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
            let vectors = self.vectors_of(memory, &embedder, batch).await?;
            let digest = embedder.digest;
            let completed = blocking(memory, move |store| store.complete_embedding(digest, vectors)).await?;
            if let Some(refused) = completed.refused.first() {
                // The same texts would be refused for ever.
                return Err(Report::bug(
                    "embedder_broken",
                    "records were not embedded",
                    format!("{refused:?}"),
                    "restart the appliance; the records are found by their words meanwhile",
                ));
            }
        }
    }

    /// Joins what is being made already, and asks for all the others at once.
    async fn vectors_of(
        &self,
        memory: &Memory,
        embedder: &Embedder,
        batch: Vec<Pending>,
    ) -> Result<Vec<(RecordId, Vec<f32>)>, Report> {
        let mut vectors = Vec::with_capacity(batch.len());
        let (mut ids, mut texts) = (Vec::new(), Vec::new());
        for Pending { id, text } in batch {
            match memory.vectors.known(embedder, &text) {
                Some(making) => vectors.push((id, making.await?.to_vec())),
                None => {
                    ids.push(id);
                    texts.push(text);
                }
            }
        }
        if !texts.is_empty() {
            let answer = self.0.engine.embed_with(embedder.name.clone(), texts).await?;
            vectors.extend(ids.into_iter().zip(answer.vectors));
        }
        Ok(vectors)
    }

    /// Completes whenever something waits or another embedder is there.
    async fn complete_all(self) {
        let mut view = self.0.engine.watch();
        let mut last = None;
        loop {
            let embedder = view.borrow_and_update().embedder();
            let mut failed = false;
            if embedder.is_some() {
                let known: Vec<_> = self.0.known.lock().await.values().cloned().collect();
                for memory in known {
                    if embedder == last && !memory.waits.load(Ordering::SeqCst) {
                        continue;
                    }
                    if let Err(report) = self.complete(&memory).await {
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
    let (pool, path, identity) = (memory.pool.clone(), memory.path.clone(), memory.identity);
    let done = tokio::task::spawn_blocking(move || {
        let store = pool.lease(&path, || Options::new(identity, Budgets::agent()))?;
        work(&store)
    });
    match done.await {
        Ok(result) => result.map_err(|error| error.report()),
        Err(_) => Err(thread_lost()),
    }
}

fn thread_lost() -> Report {
    Report::bug("memory_thread", "the memory did not answer", "its thread ended early", "try again")
}
