//! Which records answer a question?
//!
//! In:    a question, perhaps its vectors, one snapshot of the file, the index in memory.
//! Out:   hits, best first, explained if asked.
//! Steps: a scan of 8-bit vectors says how near every record is; `rank/` judges by that and by words, neighbours,
//!        sessions, speakers, time and use; the best are judged again with their whole vectors; those whose texts fit the
//!        token budget are read.
//! Always: one snapshot for the whole answer; a record that is not yet committed is not seen. What is forgotten is as if
//!        it had never been told: it is counted nowhere and is nobody's neighbour.
//! Cost:  a question for vectors alone ([`Signals::Meaning`]) is the plain nearest vectors, without `rank/`.

use crate::corpus::Told;
use crate::error::{Damage, StoreError};
use crate::explain;
use crate::index::{self, Index, Seen};
use crate::life::Life;
use crate::plan::{self, At, Question};
use crate::rank::{self, Corpus, Nearness, Ranked, Signal, Weights};
use crate::read::View;
use crate::record::{self, Record};
use crate::tables::Counters;
use crate::vector::Vector;
use crate::write::{EmbedderDigest, Embedding};
use agentd_domain::agent_api::{Hit, Recall, Recalled, Signals};
use redb::ReadTransaction;
use std::collections::HashMap;

/// So many are judged again with whole vectors, or twice what was asked for: the 8-bit scan errs by less than 0.001 of a
/// cosine, which moves a record by a place or two.
const RESCORED_MIN: usize = 16;
/// The same where nothing but vectors counts: with 40 for ten the first ten were those of an exact scan in every
/// measured case.
const NEAREST_MIN: usize = 40;

/// What is known when a question is asked, besides itself.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// Of which time it is.
    pub at: At,
    /// "Last week" is counted from there; none: from the latest that the store knows of.
    pub now_unix_ms: Option<i64>,
    /// None: it is answered without meaning.
    pub vectors: Option<QuestionVectors>,
}

/// What the embedder must read so that a question is answered by meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The question, how its answer would be told, and words of it that no record has.
    pub texts: Vec<String>,
    /// Of those words.
    terms: Vec<String>,
}

/// The vectors of what was wanted.
#[derive(Debug, Clone, PartialEq)]
pub struct QuestionVectors {
    embedder: EmbedderDigest,
    /// Of the question, and of its answer as it would be told.
    texts: Vec<Vec<f32>>,
    words: Vec<(String, Vec<f32>)>,
}

impl Wanted {
    /// None when it is not one vector for each text.
    pub fn with(self, embedder: EmbedderDigest, mut vectors: Vec<Vec<f32>>) -> Option<QuestionVectors> {
        if vectors.len() != self.texts.len() {
            return None;
        }
        let words = vectors.split_off(self.texts.len() - self.terms.len());
        let words = self.terms.into_iter().zip(words).collect();
        Some(QuestionVectors { embedder, texts: vectors, words })
    }
}

impl From<Embedding> for QuestionVectors {
    /// Of the question alone.
    fn from(embedding: Embedding) -> Self {
        Self { embedder: embedding.embedder, texts: vec![embedding.vector], words: Vec::new() }
    }
}

/// What the embedder should read of a question.
pub(crate) fn wanted(view: View<'_>, index: &Index, request: &Recall, question: &Question) -> Wanted {
    let seen = Seen::new(&question.tiers, question.at);
    let speaks = |term: &str| Told::speaker_of(view.seal, index, &seen, term).is_some();
    let read = rank::Question::read(&request.query, 0);
    let told = rank::as_told(&request.query, speaks);
    let mut wanted = Wanted { texts: vec![request.query.clone(), told], terms: Vec::new() };
    // Without any word there is nothing that they could be kin of.
    let unknown = read
        .terms
        .into_iter()
        .filter(|term| !index.kin.is_empty() && !index.kin.knows(&term.text) && !speaks(&term.text));
    for term in unknown.take(plan::ASKED_WORDS_MOST) {
        wanted.texts.push(term.word);
        wanted.terms.push(term.text);
    }
    wanted
}

pub(crate) fn recall(
    view: View<'_>,
    index: &Index,
    request: &Recall,
    question: &Question,
    asked: &Asked,
) -> Result<Recalled, StoreError> {
    let counters = index::read_counters(view.txn)?;
    let vectors = usable(view.txn, index, &counters, asked.vectors.as_ref())?;
    let vector = match (question.signals, vectors) {
        (Signals::Both | Signals::Meaning, Some(vectors)) => {
            question_vector(view.txn, counters.embedder, vectors)?
        }
        _ => None,
    };
    if question.signals == Signals::Meaning && vector.is_none() {
        return Err(StoreError::EmbedderAway);
    }
    let words_only = question.signals == Signals::Both && vector.is_none();
    let seen = Seen::new(&question.tiers, question.at);
    let now_unix_ms = asked.now_unix_ms.unwrap_or_else(|| index.newest_unix_ms());
    let read = rank::Question::read(&request.query, now_unix_ms);
    let words = vectors.map_or(&[][..], |vectors| &vectors.words);
    let corpus = Told::new(view, index, &seen, now_unix_ms, words)?;
    let best = match (&vector, question.signals) {
        (Some(vector), Signals::Meaning) => nearest(&corpus, vector, question.k)?,
        (vector, _) => ranked(&corpus, &read, vector.as_ref(), question)?,
    };
    let hits = read_hits(&corpus, best, question, &read)?;
    Ok(Recalled { hits, pending: counters.pending, words_only })
}

/// The question's vectors, if they lie in the space of those that they would be compared with.
fn usable<'a>(
    txn: &ReadTransaction,
    index: &Index,
    counters: &Counters,
    vectors: Option<&'a QuestionVectors>,
) -> Result<Option<&'a QuestionVectors>, StoreError> {
    let Some(vectors) = vectors else { return Ok(None) };
    // Different only between a change of the embedder and the index's rebuilding.
    if counters.embedder == 0 || index.embedder != counters.embedder {
        return Ok(None);
    }
    let (digest, _) = index::embedder(txn, counters.embedder)?;
    Ok((digest == vectors.embedder).then_some(vectors))
}

fn question_vector(
    txn: &ReadTransaction,
    embedder: u32,
    vectors: &QuestionVectors,
) -> Result<Option<Vector>, StoreError> {
    match Vector::sum(&vectors.texts, index::embedder(txn, embedder)?.1) {
        Ok(vector) => Ok(Some(vector)),
        Err(why) => {
            tracing::warn!(%why, "the embedder gave an unusable vector; the question is answered by words");
            Ok(None)
        }
    }
}

/// What is found, and how near it is by its whole vector.
struct Found {
    ranked: Ranked,
    /// 0 where there is no vector.
    cosine: f32,
}

fn ranked(
    corpus: &Told<'_>,
    read: &rank::Question,
    vector: Option<&Vector>,
    question: &Question,
) -> Result<Vec<Found>, StoreError> {
    let most = plan::looked_at(question);
    let Some(vector) = vector else {
        let ranked = rank::rank(corpus, read, Nearness::none(), &Weights::MEASURED, most)?;
        return Ok(ranked.into_iter().map(|ranked| Found { ranked, cosine: 0.0 }).collect());
    };
    let coarse = vector.coarse();
    corpus.index.with_nearness(&coarse, corpus.seen, |nearness| {
        let mut judged = rank::judge(rank::candidates(corpus, read, nearness)?, &Weights::MEASURED);
        let whole = Whole { corpus, vector };
        let rescored = judged.len().min(RESCORED_MIN.max(2 * question.k));
        let mut cosines = HashMap::new();
        for one in judged.iter_mut().take(rescored) {
            let Some(cosine) = whole.cosine(one.slot)? else { continue };
            cosines.insert(one.slot, cosine);
            one.signals.set(Signal::Meaning, nearness.counted(cosine));
            if corpus.facts(one.slot).session == 0 {
                // Alone it is its session.
                one.signals.set(Signal::SessionMeaning, one.signals.get(Signal::Meaning));
            }
            one.score = Weights::MEASURED.sum(&one.signals);
        }
        rank::sort(&mut judged);
        let listed = rank::listed(corpus, judged, most);
        let cosine = |slot: &usize| cosines.get(slot).copied().unwrap_or(0.0);
        Ok(listed.into_iter().map(|ranked| Found { cosine: cosine(&ranked.slot), ranked }).collect())
    })
}

/// The nearest by vectors alone.
fn nearest(corpus: &Told<'_>, vector: &Vector, k: usize) -> Result<Vec<Found>, StoreError> {
    let (coarse, whole) = (vector.coarse(), Whole { corpus, vector });
    let near = corpus.index.nearest(&coarse, corpus.seen, NEAREST_MIN.max(4 * k));
    let mut found = near
        .into_iter()
        .map(|(slot, cosine)| {
            let cosine = whole.cosine(slot)?.unwrap_or(cosine);
            let mut ranked = Ranked { slot, score: cosine, signals: rank::Signals::default() };
            ranked.signals.set(Signal::Meaning, cosine);
            Ok(Found { ranked, cosine })
        })
        .collect::<Result<Vec<_>, StoreError>>()?;
    found.sort_by(|a, b| b.cosine.total_cmp(&a.cosine).then(b.ranked.slot.cmp(&a.ranked.slot)));
    found.truncate(k);
    Ok(found)
}

/// Vectors with both of their parts. A vector of an earlier embedder is not in the index.
struct Whole<'a> {
    corpus: &'a Told<'a>,
    vector: &'a Vector,
}

impl Whole<'_> {
    fn cosine(&self, slot: usize) -> Result<Option<f32>, StoreError> {
        // The index has the first part already.
        let Some(first) = self.corpus.index.first_part(slot) else { return Ok(None) };
        let seq = self.corpus.index.seq(slot);
        let Some(fine) = self.corpus.rows.fine(seq)? else { return Ok(None) };
        Ok(Some(self.vector.cosine_with_stored(&first, &fine).ok_or(Damage::Vector { seq })?))
    }
}

/// The best k whose texts fit the budget, with their neighbours if asked.
fn read_hits(
    corpus: &Told<'_>,
    best: Vec<Found>,
    question: &Question,
    read: &rank::Question,
) -> Result<Vec<Hit>, StoreError> {
    let mut purse = plan::Purse::new(question.budget_tokens);
    let mut hits = Vec::new();
    for found in best {
        if hits.len() == question.k {
            break;
        }
        let slot = found.ranked.slot;
        let (record, life) = stored(corpus, slot)?;
        if !purse.pays(&record.text) {
            continue;
        }
        let mut hit = hit(corpus, record, &life, found, question, read)?;
        for (next, around) in [(Side::Before, &mut hit.before), (Side::After, &mut hit.after)] {
            let mut at = slot;
            for _ in 0..question.neighbours {
                let Some(slot) = next.of(corpus, at) else { break };
                let text = stored(corpus, slot)?.0.text;
                if !purse.pays(&text) {
                    break;
                }
                around.push(text);
                at = slot;
            }
        }
        hit.before.reverse();
        hits.push(hit);
    }
    Ok(hits)
}

#[derive(Clone, Copy)]
enum Side {
    Before,
    After,
}

impl Side {
    fn of(self, corpus: &Told<'_>, slot: usize) -> Option<usize> {
        match self {
            Self::Before => corpus.before(slot),
            Self::After => corpus.after(slot),
        }
    }
}

fn stored(corpus: &Told<'_>, slot: usize) -> Result<(Record, Life), StoreError> {
    let seq = corpus.index.seq(slot);
    Ok((corpus.rows.record(seq)?, corpus.rows.life(seq)?))
}

fn hit(
    corpus: &Told<'_>,
    record: Record,
    life: &Life,
    found: Found,
    question: &Question,
    read: &rank::Question,
) -> Result<Hit, StoreError> {
    let explain = match (question.explain, question.signals) {
        (false, _) => None,
        (true, Signals::Meaning) => Some(explain::nearest(found.cosine)),
        (true, _) => Some(explain::explain(corpus, &found.ranked, found.cosine, &record.text, read)),
    };
    Ok(Hit {
        id: record.id,
        tier: life.tier,
        role: life.role.name().to_owned(),
        event_unix_ms: life.event_unix_ms,
        recorded_unix_ms: life.recorded_unix_ms,
        source: record::source(life.source, record.reference),
        order: record.session.as_ref().map(|_| life.order),
        session: record.session,
        before: Vec::new(),
        after: Vec::new(),
        text: record.text,
        score: found.ranked.score,
        explain,
    })
}
