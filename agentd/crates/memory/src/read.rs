//! Which records answer a question?
//!
//! In:    a question, perhaps its vector, one snapshot of the file, the index in memory.
//! Out:   hits, best first, explained if asked.
//! Steps: words (BM25 over the postings of the asked tiers) and meaning (a scan of 8-bit vectors) score every
//!        record; the best few are scored again with their whole vectors; the best k whose texts fit the token
//!        budget are read.
//! Always: one snapshot for the whole answer; a record that is not yet committed is not seen.

use crate::error::{Damage, StoreError};
use crate::index::{self, Index};
use crate::journal::Entry;
use crate::life::{Life, State};
use crate::pack::Going;
use crate::plan::{self, Question, Scored};
use crate::postings;
use crate::record::{self, Claim, Record, Role};
use crate::rows::ReadRows;
use crate::seal::{Hashed, Row, Seal};
use crate::tables::{BLOCK, BY_ID, Counters, JOURNAL, LINK, LINK_SUPERSEDED, PENDING, POSTING};
use crate::text;
use crate::vector::Vector;
use crate::write::{
    Block, EmbedderDigest, EmbedderUse, Embedding, block_mark, open_block, open_prompt_block,
};
use agentd_domain::agent_api::{Explain, Hit, Recalled, Signals, Source, Tier};
use agentd_domain::ids::{OwnerId, RecordId};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable};

/// So many are scored again with whole vectors, or four times what was asked for: with 40 for a k of 10 the
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
    pub session: Option<String>,
    pub claim: Option<Claim>,
    pub supersedes: Option<RecordId>,
    pub evidence: Vec<RecordId>,
    /// State, validity, strength and the rest of what changes.
    pub life: Life,
    /// Version of the record's layout on disk.
    pub format: u8,
    /// Whose vector it has; perhaps of an embedder that is not the current one.
    pub embedder: Option<EmbedderDigest>,
}

/// Which records a listing shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    /// Empty: all.
    pub tiers: Vec<Tier>,
    /// Empty: all.
    pub states: Vec<State>,
    /// Only those told before this record; the listing goes from the latest back.
    pub before: Option<RecordId>,
    pub most: usize,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    /// The record, what it took the place of, and what took its place: from the earliest told to the latest.
    pub chain: Vec<Stored>,
    /// What the journal says of any of these, earliest first. Of a purged record it is all there is.
    pub entries: Vec<Entry>,
}

/// One snapshot of the file, and what opens its rows.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) txn: &'a ReadTransaction,
    pub(crate) seal: &'a Seal,
}

impl<'a> View<'a> {
    /// What stands under the records' numbers.
    pub(crate) fn rows(self) -> Result<ReadRows<'a>, StoreError> {
        ReadRows::read(self.txn, self.seal)
    }
}

pub(crate) fn recall(
    view: View<'_>,
    index: &Index,
    question: &Question,
    embedding: Option<&Embedding>,
) -> Result<Recalled, StoreError> {
    let counters = index::read_counters(view.txn)?;
    let vector = match question.signals {
        Signals::Words => None,
        Signals::Both | Signals::Meaning => query_vector(view.txn, index, &counters, embedding)?,
    };
    if question.signals == Signals::Meaning && vector.is_none() {
        return Err(StoreError::EmbedderAway);
    }
    let words_only = question.signals == Signals::Both && vector.is_none();
    let signals = if words_only { Signals::Words } else { question.signals };

    let words = match signals {
        Signals::Meaning => vec![0.0; index.len()],
        Signals::Both | Signals::Words => score_words(view, index, question)?,
    };
    let mut scored = score_all(index, question, signals, &words, vector.as_ref());
    if let Some(vector) = &vector {
        let most = RESCORED_MIN.max(4 * question.k);
        scored = rescore(view, counters.embedder, plan::best(scored, most), signals, vector)?;
    }
    let hits = read_hits(view, plan::best(scored, question.k), question)?;
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
fn score_words(view: View<'_>, index: &Index, question: &Question) -> Result<Vec<f32>, StoreError> {
    let (records, words) = index.standing(&question.tiers);
    let mean_words = if records > 0 { words as f32 / records as f32 } else { 0.0 };
    let table = view.txn.open_table(POSTING)?;
    let mut scores = vec![0.0f32; index.len()];
    let mut all_idf = 0.0;
    for (term, asked) in &question.terms {
        let found = postings_of(view, &table, index, question, term)?;
        let idf = plan::idf(records, found.len() as u64) * *asked as f32;
        all_idf += idf;
        for (slot, count) in found {
            scores[slot] += idf * plan::term_weight(count, index.words(slot), mean_words);
        }
    }
    for score in &mut scores {
        *score = plan::words_score(*score, all_idf);
    }
    Ok(scores)
}

/// Slots of the records with this term that the question may see, and how often they have it. A posting that is
/// newer than the index belongs to a record that is not acknowledged yet.
fn postings_of(
    view: View<'_>,
    table: &ReadOnlyTable<&'static [u8], &'static [u8]>,
    index: &Index,
    question: &Question,
    term: &str,
) -> Result<Vec<(usize, u32)>, StoreError> {
    let mark = view.seal.mark(Hashed::Term, term.as_bytes());
    let mut found = Vec::new();
    for tier in &question.tiers {
        let (from, to) = (postings::key(*tier, &mark, 0), postings::key(*tier, &mark, u64::MAX));
        for row in table.range(from.as_slice()..=to.as_slice())? {
            let (key, sealed) = row?;
            let key: postings::Key =
                key.value().try_into().map_err(|_| Damage::Postings("a key of another length".to_owned()))?;
            for posting in open_block(view.seal, &key, sealed.value())? {
                if let Some(slot) = index.slot(posting.seq)
                    && index.is_seen(slot, &question.tiers, question.at)
                {
                    found.push((slot, posting.count));
                }
            }
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
        for (slot, cosine) in index.scan(&coarse, &question.tiers, question.at) {
            meaning[slot] = Some(cosine);
        }
    }
    (0..index.len())
        .filter(|slot| {
            // Both are only of records that the question may see.
            words[*slot] > 0.0 || meaning[*slot].is_some()
        })
        .map(|slot| {
            let (words, meaning) = (words[slot], meaning[slot].unwrap_or(0.0));
            Scored { seq: index.seq(slot), words, meaning, score: plan::fuse(signals, words, meaning) }
        })
        .collect()
}

fn rescore(
    view: View<'_>,
    embedder: u32,
    mut scored: Vec<Scored>,
    signals: Signals,
    query: &Vector,
) -> Result<Vec<Scored>, StoreError> {
    let rows = view.rows()?;
    for one in &mut scored {
        let seq = one.seq;
        if let Some(stored) = rows.vector(seq)?.filter(|stored| stored.embedder == embedder) {
            let cosine = query.cosine_with_stored(&stored.first, &stored.fine);
            one.meaning = cosine.ok_or(Damage::Vector { seq })?;
            one.score = plan::fuse(signals, one.words, one.meaning);
        }
    }
    Ok(scored)
}

fn read_hits(view: View<'_>, best: Vec<Scored>, question: &Question) -> Result<Vec<Hit>, StoreError> {
    let rows = view.rows()?;
    best.into_iter()
        .map(|scored| {
            let (record, life) = (rows.record(scored.seq)?, rows.life(scored.seq)?);
            Ok(hit(record, &life, scored, question))
        })
        .collect()
}

fn hit(record: Record, life: &Life, scored: Scored, question: &Question) -> Hit {
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
        tier: life.tier,
        role: life.role.name().to_owned(),
        event_unix_ms: life.event_unix_ms,
        recorded_unix_ms: life.recorded_unix_ms,
        source: record::source(life.source, record.reference),
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
pub(crate) fn pending(view: View<'_>, most: usize) -> Result<Vec<Pending>, StoreError> {
    let rows = view.rows()?;
    let mut batch = Vec::new();
    for row in view.txn.open_table(PENDING)?.iter()?.take(most) {
        let record = rows.record(row?.0.value())?;
        batch.push(Pending { id: record.id, text: record.text });
    }
    Ok(batch)
}

pub(crate) fn get(view: View<'_>, id: RecordId) -> Result<Option<Stored>, StoreError> {
    match seq_of(view, id)? {
        None => Ok(None),
        Some(seq) => stored(view, &view.rows()?, seq).map(Some),
    }
}

fn seq_of(view: View<'_>, id: RecordId) -> Result<Option<u64>, StoreError> {
    Ok(view.txn.open_table(BY_ID)?.get(id.0.as_u128())?.map(|row| row.value()))
}

fn stored(view: View<'_>, rows: &ReadRows<'_>, seq: u64) -> Result<Stored, StoreError> {
    let (record, life) = (rows.record(seq)?, rows.life(seq)?);
    let embedder = match rows.embedder_of(seq)? {
        None => None,
        Some(number) => Some(index::embedder(view.txn, number)?.0),
    };
    Ok(Stored {
        id: record.id,
        owner: record.owner,
        tier: life.tier,
        role: life.role,
        text: record.text,
        event_unix_ms: life.event_unix_ms,
        recorded_unix_ms: life.recorded_unix_ms,
        source: record::source(life.source, record.reference),
        session: record.session,
        claim: record.claim,
        supersedes: record.supersedes,
        evidence: record.evidence,
        life,
        format: record::RECORD_VERSION,
        embedder,
    })
}

/// Records from the latest told back.
pub(crate) fn list(view: View<'_>, listing: &Listing) -> Result<Vec<Stored>, StoreError> {
    let before = match listing.before {
        Some(id) => seq_of(view, id)?.unwrap_or(u64::MAX),
        None => u64::MAX,
    };
    let rows = view.rows()?;
    let mut found = Vec::new();
    rows.lives_back_from(before, |seq, life| {
        if found.len() == listing.most {
            return Ok(Going::Enough);
        }
        let wanted = (listing.tiers.is_empty() || listing.tiers.contains(&life.tier))
            && (listing.states.is_empty() || listing.states.contains(&life.state));
        if wanted {
            found.push(stored(view, &rows, seq)?);
        }
        Ok(Going::On)
    })?;
    Ok(found)
}

/// A chain of corrections is followed so far; nobody corrects one thing more often.
const CHAIN_MOST: usize = 1000;

pub(crate) fn history(view: View<'_>, id: RecordId) -> Result<History, StoreError> {
    let rows = view.rows()?;
    let mut chain = Vec::new();
    let mut wanted = vec![id];
    if let Some(seq) = seq_of(view, id)? {
        let link = view.txn.open_table(LINK)?;
        let mut seen = std::collections::BTreeSet::from([seq]);
        let mut open = vec![seq];
        while let Some(seq) = open.pop().filter(|_| seen.len() < CHAIN_MOST) {
            let record = stored(view, &rows, seq)?;
            let mut next = Vec::new();
            if let Some(before) = record.supersedes {
                next.extend(seq_of(view, before)?);
            }
            for row in link.range((seq, LINK_SUPERSEDED, 0)..=(seq, LINK_SUPERSEDED, u64::MAX))? {
                next.push(row?.0.value().2);
            }
            open.extend(next.into_iter().filter(|seq| seen.insert(*seq)));
        }
        chain = seen.into_iter().map(|seq| stored(view, &rows, seq)).collect::<Result<Vec<_>, _>>()?;
        wanted = chain.iter().map(|stored| stored.id).collect();
    }
    let mut entries = Vec::new();
    for row in view.txn.open_table(JOURNAL)?.iter()? {
        let (number, row) = row?;
        let entry = entry(view, number.value(), row.value())?;
        if wanted.contains(&entry.id) || entry.other.is_some_and(|other| wanted.contains(&other)) {
            entries.push(entry);
        }
    }
    Ok(History { chain, entries })
}

/// The newest entries of the journal, newest first, before the one of this number.
pub(crate) fn journal(view: View<'_>, before: u64, most: usize) -> Result<Vec<(u64, Entry)>, StoreError> {
    view.txn
        .open_table(JOURNAL)?
        .range(..before)?
        .rev()
        .take(most)
        .map(|row| {
            let (number, row) = row?;
            Ok((number.value(), entry(view, number.value(), row.value())?))
        })
        .collect()
}

pub(crate) fn entry(view: View<'_>, number: u64, sealed: &[u8]) -> Result<Entry, Damage> {
    let mut content = Vec::new();
    let content =
        view.seal.open(Row::Journal, &number.to_be_bytes(), sealed, &mut content).ok_or(Damage::Journal)?;
    Entry::from_bytes(content)
}

pub(crate) fn block(view: View<'_>, key: &str) -> Result<Option<Block>, StoreError> {
    let mark = block_mark(view.seal, key);
    match view.txn.open_table(BLOCK)?.get(&mark)? {
        None => Ok(None),
        Some(row) => Ok(Some(open_prompt_block(view.seal, &mark, row.value())?)),
    }
}

/// All blocks, by key.
pub(crate) fn blocks(view: View<'_>) -> Result<Vec<Block>, StoreError> {
    let mut blocks = Vec::new();
    for row in view.txn.open_table(BLOCK)?.iter()? {
        let (mark, row) = row?;
        blocks.push(open_prompt_block(view.seal, mark.value(), row.value())?);
    }
    blocks.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(blocks)
}
