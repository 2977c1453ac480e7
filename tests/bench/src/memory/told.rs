//! A conversation in a store of the appliance, told and asked as agentd does it.
//!
//! Always: everything goes through the store's interface: what is measured is what ships. Vectors come from the cache, by
//!         the very texts that the store wants embedded.

use super::bed::{Asked, LATER_MS};
use super::locomo::Conversation;
use super::metric::{PLACES, Recall as Found};
use super::vectors::{DIMENSION, Vectors};
use agentd_domain::agent_api::{Recall, Remember, Tier};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use agentd_memory::{Budgets, Duplicates, Identity, Made, NewRecord, Options, Store, StoreError};
use anyhow::{Context, Result, anyhow};
use std::collections::HashMap;

/// As agentd does it: records at a time, and words at a time.
const BATCH: usize = 256;
const EMBEDDER: [u8; 32] = [7; 32];

pub struct Told {
    store: Store,
    turns: HashMap<RecordId, String>,
    now_unix_ms: i64,
    _folder: tempfile::TempDir,
}

/// What a store says when it refuses, with its fix.
pub fn said(error: &StoreError) -> anyhow::Error {
    anyhow!("{}", error.report())
}

impl Told {
    pub fn new(conversation: &Conversation, vectors: &Vectors) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let identity =
            Identity { agent_id: AgentId(Default::default()), owner_id: OwnerId(Default::default()) };
        let mut options = Options::new(identity, Budgets::agent());
        // A turn said twice is evidence twice.
        options.tuning.duplicates = Duplicates::Keep;
        let store = Store::open(&folder.path().join("memory.redb"), options)?;
        store.use_embedder(EMBEDDER, DIMENSION as u32).map_err(|e| said(&e))?;
        let mut turns = HashMap::new();
        for chunk in conversation.turns.chunks(BATCH) {
            let news = chunk.iter().map(|turn| {
                let request = Remember {
                    tier: Tier::Spirit,
                    text: turn.record_text(),
                    role: None,
                    source: None,
                    event_unix_ms: Some(turn.unix_ms),
                };
                let mut new = NewRecord::new(request, turn.unix_ms);
                new.detail.session = Some(format!("session {}", turn.session));
                (new, None)
            });
            let told = store.remember_many(news.collect()).map_err(|e| said(&e))?;
            for (turn, told) in chunk.iter().zip(told) {
                turns.insert(told.map_err(|refusal| anyhow!("{refusal}"))?.id, turn.id.clone());
            }
        }
        embed(&store, vectors)?;
        let now_unix_ms = conversation.turns.last().context("no turns")?.unix_ms + LATER_MS;
        Ok(Self { store, turns, now_unix_ms, _folder: folder })
    }

    /// Ids of the turns that the store finds, best first.
    pub fn ask(&self, question: &str, vectors: &Vectors) -> Result<Vec<&str>> {
        let most = PLACES[PLACES.len() - 1] as u32;
        let request = Recall { query: question.to_owned(), k: Some(most), ..Recall::default() };
        let wanted = self.store.wanted(&request).map_err(|e| said(&e))?;
        let each = wanted.texts.iter().map(|text| Ok(vectors.of(text)?.to_vec())).collect::<Result<_>>()?;
        let asked = agentd_memory::Asked {
            now_unix_ms: Some(self.now_unix_ms),
            vectors: wanted.with(EMBEDDER, each),
            ..agentd_memory::Asked::default()
        };
        let recalled = self.store.answer(&request, &asked).map_err(|e| said(&e))?;
        let turn = |id| self.turns.get(id).map(String::as_str).context("a hit that was never told");
        recalled.hits.iter().map(|hit| turn(&hit.id)).collect()
    }

    pub fn recall(&self, asked: &[Asked], vectors: &Vectors) -> Result<Found> {
        let mut recall = Found::default();
        for one in asked {
            recall.add(one.category, &one.evidence, &self.ask(&one.text, vectors)?);
        }
        Ok(recall)
    }
}

fn embed(store: &Store, vectors: &Vectors) -> Result<()> {
    loop {
        let batch = store.pending_batch(BATCH).map_err(|e| said(&e))?;
        if batch.is_empty() {
            break;
        }
        let made = batch.into_iter().map(|pending| {
            let vector = vectors.of(&pending.text)?.to_vec();
            Ok(Made { id: pending.id, vector, with: pending.with })
        });
        store.complete_pending(EMBEDDER, made.collect::<Result<Vec<_>>>()?).map_err(|e| said(&e))?;
    }
    loop {
        let batch = store.pending_words(BATCH).map_err(|e| said(&e))?;
        let more = batch.more;
        let each = batch.words.iter().map(|word| Ok(vectors.of(word)?.to_vec())).collect::<Result<_>>()?;
        store.complete_words(EMBEDDER, batch, each).map_err(|e| said(&e))?;
        if !more {
            return Ok(());
        }
    }
}
