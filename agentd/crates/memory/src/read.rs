//! Which records answer a question?
//!
//! In:    a question, perhaps its vector, one snapshot of the file, the index in memory.
//! Out:   hits, best first, explained if asked.
//! Steps: words (BM25 over the postings of the asked tiers) and meaning (a scan of 8-bit vectors) score every
//!        record; the best few are scored again with their 16-bit vectors; the best k whose texts fit the token
//!        budget are read.
//! Always: one snapshot for the whole answer; a record that is not yet committed is not seen.

use crate::error::{Damage, StoreError};
use crate::index::{self, Index};
use crate::plan::{self, Question, Scored};
use crate::postings::{self, Posting};
use crate::record::{Record, Role};
use crate::tables::{BY_ID, Counters, PENDING, POSTING, RECORD, VECTOR};
use crate::text;
use crate::vector::Vector;
use crate::write::{EmbedderDigest, EmbedderUse, Embedding, decode};
use agentd_domain::agent_api::{Explain, Hit, Recalled, Signals, Source, Tier};
use agentd_domain::ids::{OwnerId, RecordId};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable};

/// So many are scored again with 16-bit vectors, or four times what was asked for: with 40 for a k of 10 the
/// first ten were those of an exact scan in every measured case.
const RESCORED_MIN: usize = 40;

/// A record whose text waits for a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub id: RecordId,
    pub text: String,
}

/// One record with all that is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub id: RecordId,
    pub owner: OwnerId,
    pub tier: Tier,
    pub role: Role,
    pub text: String,
    pub event_unix_ms: i64,
    pub recorded_unix_ms: i64,
    pub source: Source,
    /// Version of the record's layout on disk.
    pub format: u8,
    /// Whose vector it has; perhaps of an embedder that is not the current one.
    pub embedder: Option<EmbedderDigest>,
}

pub(crate) fn recall(
    txn: &ReadTransaction,
    index: &Index,
    question: &Question,
    embedding: Option<&Embedding>,
) -> Result<Recalled, StoreError> {
    let counters = index::read_counters(txn)?;
    let vector = match question.signals {
        Signals::Words => None,
        Signals::Both | Signals::Meaning => query_vector(txn, index, &counters, embedding)?,
    };
    if question.signals == Signals::Meaning && vector.is_none() {
        return Err(StoreError::EmbedderAway);
    }
    let words_only = question.signals == Signals::Both && vector.is_none();
    let signals = if words_only { Signals::Words } else { question.signals };

    let words = match signals {
        Signals::Meaning => vec![0.0; index.len()],
        Signals::Both | Signals::Words => score_words(txn, index, &counters, question)?,
    };
    let mut scored = score_all(index, question, signals, &words, vector.as_ref());
    if let Some(vector) = &vector {
        let most = RESCORED_MIN.max(4 * question.k);
        scored = rescore(txn, counters.embedder, plan::best(scored, most), signals, vector)?;
    }
    let hits = read_hits(txn, plan::best(scored, question.k), question)?;
    let hits = plan::within_budget(hits, question.budget_tokens, |hit| &hit.text);
    Ok(Recalled { hits, pending: counters.pending, words_only })
}

/// The question's vector, if it lies in the space of the vectors it would be compared with.
fn query_vector(
    txn: &ReadTransaction,
    index: &Index,
    counters: &Counters,
    embedding: Option<&Embedding>,
) -> Result<Option<Vector>, StoreError> {
    let Some(embedding) = embedding else { return Ok(None) };
    // Different only between a change of the embedder and the index's rebuilding.
    if counters.embedder == 0 || index.embedder != counters.embedder {
        return Ok(None);
    }
    let (digest, dimension) = index::embedder(txn, counters.embedder)?;
    if digest != embedding.embedder {
        return Ok(None);
    }
    match Vector::new(&embedding.vector, dimension) {
        Ok(vector) => Ok(Some(vector)),
        Err(why) => {
            tracing::warn!(%why, "the embedder gave an unusable vector; the question is answered by words");
            Ok(None)
        }
    }
}

/// Per slot of the index, how much of the question's words its record has.
fn score_words(
    txn: &ReadTransaction,
    index: &Index,
    counters: &Counters,
    question: &Question,
) -> Result<Vec<f32>, StoreError> {
    let (records, words) = question
        .tiers
        .iter()
        .map(|t| counters.tier(*t))
        .fold((0, 0), |(r, w), t| (r + t.records, w + t.words));
    let mean_words = if records > 0 { words as f32 / records as f32 } else { 0.0 };
    let table = txn.open_table(POSTING)?;
    let mut scores = vec![0.0f32; index.len()];
    let mut all_idf = 0.0;
    for (term, asked) in &question.terms {
        let found = postings_of(&table, question, term)?;
        let idf = plan::idf(records, found.len() as u64) * *asked as f32;
        all_idf += idf;
        for posting in found {
            // A posting newer than the index belongs to a record that is not acknowledged yet.
            if let Some(slot) = index.slot(posting.seq) {
                scores[slot] += idf * plan::term_weight(posting.count, index.words(slot), mean_words);
            }
        }
    }
    for score in &mut scores {
        *score = plan::words_score(*score, all_idf);
    }
    Ok(scores)
}

fn postings_of(
    table: &ReadOnlyTable<&'static [u8], &'static [u8]>,
    question: &Question,
    term: &str,
) -> Result<Vec<Posting>, StoreError> {
    let mut found = Vec::new();
    for tier in &question.tiers {
        let (from, to) = (postings::key(*tier, term, 0), postings::key(*tier, term, u64::MAX));
        for row in table.range(from.as_slice()..=to.as_slice())? {
            let (_, block) = row?;
            postings::for_each(block.value(), |p| found.push(p))
                .map_err(|e| Damage::Postings(e.to_string()))?;
        }
    }
    Ok(found)
}

/// Every record that has anything to do with the question. Meaning is still the rough one.
fn score_all(
    index: &Index,
    question: &Question,
    signals: Signals,
    words: &[f32],
    vector: Option<&Vector>,
) -> Vec<Scored> {
    let mut meaning: Vec<Option<f32>> = vec![None; index.len()];
    if let Some(vector) = vector {
        let coarse = vector.coarse();
        for (slot, cosine) in index.scan(&coarse, &question.tiers) {
            meaning[slot] = Some(cosine);
        }
    }
    (0..index.len())
        .filter(|slot| {
            question.tiers.contains(&index.tier(*slot)) && (words[*slot] > 0.0 || meaning[*slot].is_some())
        })
        .map(|slot| {
            let (words, meaning) = (words[slot], meaning[slot].unwrap_or(0.0));
            Scored { seq: index.seq(slot), words, meaning, score: plan::fuse(signals, words, meaning) }
        })
        .collect()
}

fn rescore(
    txn: &ReadTransaction,
    embedder: u32,
    mut scored: Vec<Scored>,
    signals: Signals,
    query: &Vector,
) -> Result<Vec<Scored>, StoreError> {
    let table = txn.open_table(VECTOR)?;
    for one in &mut scored {
        let Some(row) = table.get(one.seq)? else { continue };
        let (number, bytes) = row.value();
        if number == embedder {
            one.meaning = query.cosine_with_stored(bytes).ok_or(Damage::Vector { seq: one.seq })?;
            one.score = plan::fuse(signals, one.words, one.meaning);
        }
    }
    Ok(scored)
}

fn read_hits(txn: &ReadTransaction, best: Vec<Scored>, question: &Question) -> Result<Vec<Hit>, StoreError> {
    let table = txn.open_table(RECORD)?;
    best.into_iter()
        .map(|scored| {
            let seq = scored.seq;
            let row = table.get(seq)?.ok_or(Damage::RecordMissing { seq })?;
            Ok(hit(decode(seq, row.value())?, scored, question))
        })
        .collect()
}

fn hit(record: Record, scored: Scored, question: &Question) -> Hit {
    let explain = question.explain.then(|| Explain {
        words: scored.words,
        meaning: scored.meaning,
        matched: text::term_counts(&record.text)
            .into_keys()
            .filter(|t| question.terms.contains_key(t))
            .collect(),
    });
    Hit {
        id: record.id,
        tier: record.tier,
        role: record.role.name().to_owned(),
        event_unix_ms: record.event_unix_ms,
        recorded_unix_ms: record.recorded_unix_ms,
        source: record.source(),
        text: record.text,
        score: scored.score,
        explain,
    }
}

/// What naming this embedder would find, if it is the one in use already.
pub(crate) fn embedder_in_use(
    txn: &ReadTransaction,
    digest: &EmbedderDigest,
    dimension: u32,
) -> Result<Option<EmbedderUse>, StoreError> {
    let counters = index::read_counters(txn)?;
    if counters.embedder == 0 || index::embedder(txn, counters.embedder)? != (*digest, dimension) {
        return Ok(None);
    }
    Ok(Some(EmbedderUse { pending: counters.pending, changed: false }))
}

/// The oldest records that wait for a vector.
pub(crate) fn pending(txn: &ReadTransaction, most: usize) -> Result<Vec<Pending>, StoreError> {
    let records = txn.open_table(RECORD)?;
    let mut batch = Vec::new();
    for row in txn.open_table(PENDING)?.iter()?.take(most) {
        let seq = row?.0.value();
        let row = records.get(seq)?.ok_or(Damage::RecordMissing { seq })?;
        let record = decode(seq, row.value())?;
        batch.push(Pending { id: record.id, text: record.text });
    }
    Ok(batch)
}

pub(crate) fn get(txn: &ReadTransaction, id: RecordId) -> Result<Option<Stored>, StoreError> {
    let Some(seq) = txn.open_table(BY_ID)?.get(id.0.as_u128())?.map(|row| row.value()) else {
        return Ok(None);
    };
    let records = txn.open_table(RECORD)?;
    let row = records.get(seq)?.ok_or(Damage::RecordMissing { seq })?;
    let format = row.value().first().copied().unwrap_or(0);
    let record = decode(seq, row.value())?;
    let embedder = match txn.open_table(VECTOR)?.get(seq)?.map(|row| row.value().0) {
        None => None,
        Some(number) => Some(index::embedder(txn, number)?.0),
    };
    let source = record.source();
    Ok(Some(Stored {
        id: record.id,
        owner: record.owner,
        tier: record.tier,
        role: record.role,
        text: record.text,
        event_unix_ms: record.event_unix_ms,
        recorded_unix_ms: record.recorded_unix_ms,
        source,
        format,
        embedder,
    }))
}
