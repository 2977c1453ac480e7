//! What does the life of a run mean for its agent's memory?
//!
//! A run is a session: what it logs and remembers belongs to it. When it is over, what of its log is worth keeping goes
//! to the long memory (`agentd_memory::forget` decides), and the log goes a day later. What recall gave to a run is
//! strengthened, and noted so that it is not told again (`echo.rs`).
//!
//! Always: a session is the run's id, which the launcher's listeners decided. A run whose end nobody told, because power
//!         or agentd went first, is settled when the next one begins.
//! Never:  a store is made because a run begins or ends.

use super::{Memories, Memory, blocking, budgets_within};
use crate::clock;
use agentd_domain::agent_api::{Hit, Recall, Recalled, Tier};
use agentd_domain::fault::Report;
use agentd_domain::ids::{AgentId, RecordId, RunId};
use agentd_domain::memory_api::CollectionName;
use agentd_domain::rights::Rights;
use agentd_memory::{At, Budgets, Embedding, Listing, SessionEnd};
use std::sync::Arc;

/// Of a run's log so many of the last items are compared by meaning, the others by words: some seconds of the engine.
const EMBEDDED_MOST: usize = 128;

impl Memories {
    /// A run is served, perhaps by another agentd than it began under. What its token says about room holds from now
    /// on, and runs before it are over.
    pub async fn begin_run(&self, agent: AgentId, run: RunId, rights: Rights) {
        let Some(memory) = self.existing(agent).await else { return };
        let _alone = memory.settling.lock().await;
        let wanted = budgets_within(&rights);
        let held = blocking(&memory, |store| Ok(store.budgets().clone())).await;
        if held.is_ok_and(|held: Budgets| held != wanted) {
            // The next who comes opens it with what the token says now.
            let closing = Arc::clone(&memory);
            let _ = tokio::task::spawn_blocking(move || closing.pool.close(&closing.path)).await;
        }
        let session = Some(run.to_string());
        let ended = blocking(&memory, move |store| store.end_sessions_but(session, clock::unix_ms())).await;
        match ended {
            Ok(0) => {}
            Ok(runs) => {
                tracing::info!(agent_id = %agent, runs, "runs that ended untold were settled");
                self.wake(&memory);
            }
            Err(problem) => tracing::warn!(agent_id = %agent, %problem, "earlier runs were not settled"),
        }
    }

    /// A run is over; answers at once, the work is done behind it.
    pub fn end_run(&self, agent: AgentId, run: RunId) {
        let memories = self.clone();
        tokio::spawn(async move {
            if let Err(problem) = memories.settle(agent, run).await {
                // The next run's beginning settles it.
                tracing::warn!(agent_id = %agent, run_id = %run, %problem, "a run's log was not settled now");
            }
        });
    }

    async fn settle(&self, agent: AgentId, run: RunId) -> Result<(), Report> {
        let Some(memory) = self.existing(agent).await else { return Ok(()) };
        let _alone = memory.settling.lock().await;
        let session = run.to_string();
        let items = blocking(&memory, {
            let session = session.clone();
            move |store| {
                let listing =
                    Listing { tiers: vec![Tier::Working], most: 2 * EMBEDDED_MOST, ..Listing::default() };
                let mut items = store.list(&listing)?;
                items.retain(|item| item.session.as_ref() == Some(&session));
                items.truncate(EMBEDDED_MOST);
                Ok(items.into_iter().map(|item| (item.id, item.text)).collect())
            }
        });
        let embeddings = self.vectors_if_there(&memory, items.await?).await;
        let end = SessionEnd { session, ended_unix_ms: clock::unix_ms(), embeddings };
        let ended = blocking(&memory, move |store| store.end_session(end)).await?;
        tracing::info!(
            agent_id = %agent,
            run_id = %run,
            items = ended.items,
            promoted = ended.promoted.len(),
            repeated = ended.repeated,
            no_room = ended.no_room,
            "a run's log was settled"
        );
        self.wake(&memory);
        Ok(())
    }

    /// Without an engine a log is judged by its words.
    async fn vectors_if_there(
        &self,
        memory: &Memory,
        items: Vec<(RecordId, String)>,
    ) -> Vec<(RecordId, Embedding)> {
        let Some(embedder) = self.0.engine.view().embedder() else { return Vec::new() };
        if items.is_empty() || self.introduce(memory, &embedder).await.is_err() {
            return Vec::new();
        }
        let mut made = Vec::with_capacity(items.len());
        for batch in items.chunks(super::BATCH) {
            let texts = batch.iter().map(|(_, text)| text.clone()).collect();
            match self.0.engine.embed_with(embedder.name.clone(), texts).await {
                Ok(answer) => {
                    let vectors = answer.vectors.into_iter();
                    let embedded = vectors.map(|vector| Embedding { embedder: embedder.digest, vector });
                    made.extend(batch.iter().map(|(id, _)| *id).zip(embedded));
                }
                Err(problem) => {
                    tracing::debug!(%problem, "a log is judged by its words");
                    return made;
                }
            }
        }
        made
    }

    /// The hits are given to the agent: they are strengthened behind the answer, and are echoes when told again.
    pub async fn recall(
        &self,
        agent: AgentId,
        request: Recall,
        as_of_unix_ms: Option<i64>,
        collections: Option<Vec<CollectionName>>,
    ) -> Result<Recalled, Report> {
        let at = as_of_unix_ms.map_or(At::Latest, At::Time);
        let own = self.memory(agent).await?;
        let (shared, tiers): (Vec<Tier>, Vec<Tier>) =
            request.tiers.iter().copied().partition(|tier| *tier == Tier::Knowledge);
        let mut answers = Vec::new();
        if !tiers.is_empty() {
            let recalled = self.recall_in(&own, Recall { tiers, ..request.clone() }, at).await?;
            self.strengthen(&own, recalled.hits.iter().map(|hit| hit.id).collect());
            answers.push(recalled);
        }
        if !shared.is_empty() {
            // Who reads shared knowledge leaves no trace in it that another reader could see.
            for collection in self.readable(agent, collections.as_deref()).await? {
                let asked = Recall { tiers: shared.clone(), ..request.clone() };
                answers.push(self.recall_in(&collection, asked, at).await?);
            }
        }
        let recalled = merged(answers, &request);
        own.given.note(recalled.hits.iter().map(|hit| hit.text.as_str()));
        Ok(recalled)
    }

    fn strengthen(&self, memory: &Arc<Memory>, ids: Vec<RecordId>) {
        if ids.is_empty() {
            return;
        }
        let memory = Arc::clone(memory);
        tokio::spawn(async move {
            let used = blocking(&memory, move |store| store.used(ids, clock::unix_ms()));
            if let Err(problem) = used.await {
                tracing::debug!(%problem, "what was recalled was not strengthened");
            }
        });
    }

    /// The memory of an agent that has one.
    pub(super) async fn existing(&self, agent: AgentId) -> Option<Arc<Memory>> {
        let memory = self.memory(agent).await.ok()?;
        memory.path.exists().then_some(memory)
    }

    /// There may be records that wait for their vector.
    fn wake(&self, memory: &Memory) {
        memory.waits.store(true, std::sync::atomic::Ordering::SeqCst);
        self.0.waiting.notify_one();
    }
}

/// The best of all, within what was asked for. Scores of all stores are made with the same weights.
fn merged(answers: Vec<Recalled>, request: &Recall) -> Recalled {
    let pending = answers.iter().map(|answer| answer.pending).sum();
    let words_only = answers.iter().any(|answer| answer.words_only);
    let one = answers.len() <= 1;
    let mut hits: Vec<Hit> = answers.into_iter().flat_map(|answer| answer.hits).collect();
    if !one {
        hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.recorded_unix_ms.cmp(&a.recorded_unix_ms)));
        hits.truncate(request.k.unwrap_or(agentd_memory::plan::K_DEFAULT) as usize);
        let mut left = request.budget_tokens.unwrap_or(u32::MAX);
        hits.retain(|hit| {
            let cost = u32::try_from(hit.text.chars().count().div_ceil(4)).unwrap_or(u32::MAX);
            let fits = cost <= left;
            left -= if fits { cost } else { 0 };
            fits
        });
    }
    Recalled { hits, pending, words_only }
}
