//! What does the embedder read for a record, for a question, and for what waits?
//!
//! In:    a store that says which texts it wants vectors of. Out: those vectors, handed in.
//! Always: a record is read with the two before it in its session, a question with the answer as it would be told and
//!         with its words that no record has. Words of records are read last, each once, when nothing else waits.

use super::{Memories, Memory, RECALL_PATIENCE, REMEMBER_PATIENCE, blocking, vectors};
use crate::engine::Embedder;
use agentd_domain::agent_api::{Recall, Tier};
use agentd_domain::fault::Report;
use agentd_memory::{Embedding, Made, NewRecord, Pending, QuestionVectors};
use tokio::time::timeout;

/// Words are short: so many are a second's work or two.
const WORDS: usize = 128;

impl Memories {
    /// The vector of a record that is about to be told, or none when there is no embedder or it takes too long.
    pub(super) async fn embed_record(&self, memory: &Memory, new: &mut NewRecord) -> Option<Embedding> {
        if !matches!(new.request.tier, Tier::Spirit | Tier::Knowledge) {
            return None;
        }
        self.0.engine.view().embedder()?;
        let (tier, text, detail) = (new.request.tier, new.request.text.clone(), new.detail.clone());
        // What is refused for its length or tier is refused by `remember`, which says why.
        let window = blocking(memory, move |store| store.window(tier, &text, &detail)).await.ok()?;
        let embedding = self.embed(&window.text, REMEMBER_PATIENCE, memory).await?;
        new.with = window.with;
        Some(embedding)
    }

    /// The vectors of a question, or none when there is no embedder or it takes too long.
    pub(super) async fn embed_question(&self, memory: &Memory, request: &Recall) -> Option<QuestionVectors> {
        let embedder = self.0.engine.view().embedder()?;
        if let Err(report) = self.introduce(memory, &embedder).await {
            tracing::warn!(problem = %report, "an embedder was not taken");
            return None;
        }
        let asked = request.clone();
        let wanted = blocking(memory, move |store| store.wanted(&asked)).await.ok()?;
        if let Some(question) = wanted.texts.first() {
            // Begun as one that may be wanted again: what is asked is often told just before or after.
            drop(memory.vectors.of(&self.0.engine, &embedder, question));
        }
        let vectors = self.vectors_of(memory, &embedder, wanted.texts.clone());
        match timeout(RECALL_PATIENCE, vectors).await {
            Ok(Ok(vectors)) => wanted.with(embedder.digest, vectors),
            Ok(Err(report)) => {
                tracing::debug!(problem = %report, "a question was not embedded now");
                None
            }
            Err(_) => None,
        }
    }

    /// Hands in vectors for a batch of records that wait.
    pub(super) async fn complete_records(
        &self,
        memory: &Memory,
        embedder: &Embedder,
        batch: Vec<Pending>,
    ) -> Result<(), Report> {
        let texts = batch.iter().map(|pending| pending.text.clone()).collect();
        let vectors = self.vectors_of(memory, embedder, texts).await?;
        let made = batch.into_iter().zip(vectors);
        let made: Vec<Made> =
            made.map(|(pending, vector)| Made { id: pending.id, vector, with: pending.with }).collect();
        let digest = embedder.digest;
        let completed = blocking(memory, move |store| store.complete_pending(digest, made)).await?;
        match completed.refused.first() {
            None => Ok(()),
            // The same texts would be refused for ever.
            Some(refused) => Err(Report::bug(
                "embedder_broken",
                "records were not embedded",
                format!("{refused:?}"),
                "restart the appliance; the records are found by their words meanwhile",
            )),
        }
    }

    /// Hands in vectors for words that want one, until none does or a record waits.
    pub(super) async fn complete_words(&self, memory: &Memory, embedder: &Embedder) -> Result<(), Report> {
        loop {
            let pending = blocking(memory, |store| store.pending_words(WORDS)).await?;
            if pending.is_nothing() {
                return Ok(());
            }
            let more = pending.more;
            let vectors = match pending.words.is_empty() {
                true => Vec::new(),
                false => {
                    self.0.engine.embed_with(embedder.name.clone(), pending.words.clone()).await?.vectors
                }
            };
            let digest = embedder.digest;
            blocking(memory, move |store| store.complete_words(digest, pending, vectors)).await?;
            if !more || memory.waits.load(std::sync::atomic::Ordering::SeqCst) {
                return Ok(());
            }
        }
    }

    /// Joins what is being made already, and asks for all the others at once.
    async fn vectors_of(
        &self,
        memory: &Memory,
        embedder: &Embedder,
        texts: Vec<String>,
    ) -> Result<Vec<Vec<f32>>, Report> {
        let mut vectors: Vec<Option<Vec<f32>>> = Vec::with_capacity(texts.len());
        let mut missing = Vec::new();
        for text in texts {
            match memory.vectors.known(embedder, &text) {
                Some(making) => vectors.push(Some(making.await?.to_vec())),
                None => {
                    vectors.push(None);
                    missing.push(text);
                }
            }
        }
        if missing.is_empty() {
            return Ok(vectors.into_iter().flatten().collect());
        }
        let expected = missing.len();
        let made = self.0.engine.embed_with(embedder.name.clone(), missing).await?.vectors;
        if made.len() != expected {
            return Err(vectors::lost());
        }
        let mut made = made.into_iter();
        Ok(vectors.into_iter().filter_map(|known| known.or_else(|| made.next())).collect())
    }
}
