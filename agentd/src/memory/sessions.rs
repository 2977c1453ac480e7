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
use std::collections::VecDeque;
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
        // What stores' answers are merged by.
        let request_explained = Recall { explain: request.explain || !shared.is_empty(), ..request.clone() };
        if !tiers.is_empty() {
            let recalled = self.recall_in(&own, Recall { tiers, ..request_explained.clone() }, at).await?;
            self.strengthen(&own, recalled.hits.iter().map(|hit| hit.id).collect());
            answers.push(recalled);
        }
        if !shared.is_empty() {
            // Who reads shared knowledge leaves no trace in it that another reader could see.
            for collection in self.readable(agent, collections.as_deref()).await? {
                let asked = Recall { tiers: shared.clone(), ..request_explained.clone() };
                answers.push(self.recall_in(&collection, asked, at).await?);
            }
        }
        let recalled = merged(answers, &request);
        own.given.note(recalled.hits.iter().flat_map(texts));
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

/// The best of all, within what was asked for. Scores are comparable within one store's answer only, so each store's order
/// stands, and of the next ones of all stores that goes first whose words and meaning, which are shares of what the
/// question asks, come to more.
fn merged(answers: Vec<Recalled>, request: &Recall) -> Recalled {
    let pending = answers.iter().map(|answer| answer.pending).sum();
    let words_only = answers.iter().any(|answer| answer.words_only);
    let one = answers.len() <= 1;
    let mut rest: Vec<VecDeque<Hit>> = answers.into_iter().map(|answer| answer.hits.into()).collect();
    let mut hits = Vec::new();
    let of_question = |hit: &Hit| hit.explain.as_ref().map_or(0.0, |why| why.words + why.meaning.max(0.0));
    let next = |rest: &[VecDeque<Hit>]| {
        let heads = rest.iter().enumerate().filter_map(|(at, hits)| Some((at, of_question(hits.front()?))));
        heads.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map(|(at, _)| at)
    };
    while let Some(hit) = next(&rest).and_then(|at| rest[at].pop_front()) {
        hits.push(hit);
    }
    if !one {
        hits.truncate(request.k.unwrap_or(agentd_memory::plan::K_DEFAULT) as usize);
        let mut left = request.budget_tokens.unwrap_or(u32::MAX);
        hits.retain(|hit| {
            let chars = texts(hit).map(|text| text.chars().count()).sum::<usize>();
            let cost = u32::try_from(chars.div_ceil(4)).unwrap_or(u32::MAX);
            let fits = cost <= left;
            left -= if fits { cost } else { 0 };
            fits
        });
    }
    for hit in &mut hits {
        hit.explain = hit.explain.take().filter(|_| request.explain);
    }
    Recalled { hits, pending, words_only }
}

/// Its own, and those around it.
fn texts(hit: &Hit) -> impl Iterator<Item = &str> {
    hit.before.iter().chain([&hit.text]).chain(&hit.after).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer(hits: &[(&str, f32, f32, f32)]) -> Recalled {
        let hit = |(text, score, words, meaning): &(&str, f32, f32, f32)| {
            json!({
                "id": uuid::Uuid::nil(), "tier": "spirit", "role": "fact", "text": text, "event_unix_ms": 0,
                "recorded_unix_ms": 0, "source": { "kind": "user" }, "score": score,
                "explain": { "words": words, "meaning": meaning, "matched": [] },
            })
        };
        let hits: Vec<_> = hits.iter().map(hit).collect();
        serde_json::from_value(json!({ "hits": hits, "pending": 1, "words_only": false })).expect("an answer")
    }

    #[test]
    fn stores_are_merged_by_what_the_question_asks_and_keep_their_own_order() {
        let own = answer(&[("a", 9.0, 0.9, 0.9), ("b", 8.0, 0.1, 0.1), ("c", 7.0, 0.8, 0.8)]);
        let shared = answer(&[("x", 0.3, 0.5, 0.5), ("y", 0.2, 0.2, -0.9)]);
        let request = Recall { query: "q".to_owned(), k: Some(4), ..Recall::default() };
        let found = merged(vec![own.clone(), shared], &request);
        let texts: Vec<&str> = found.hits.iter().map(|hit| hit.text.as_str()).collect();
        assert_eq!(texts, ["a", "x", "b", "c"]);
        assert!(found.pending == 2 && found.hits.iter().all(|hit| hit.explain.is_none()));
        // One store's answer stays as it is.
        assert_eq!(merged(vec![own], &request).hits.len(), 3);
        assert!(merged(Vec::new(), &request).hits.is_empty());
    }
}
