//! Which words has the store a vector of, and which still want one?
//!
//! A question finds by words of like meaning (`rank/kin.rs`) what it does not say itself. For that each distinct term is
//! embedded once, alone, as it was first written.
//!
//! Owns:   the table `word`, and the row of `meta` that says how far the texts were read for it.
//! Always: disposable. Nothing is lost without it but the signal; another embedder begins it anew, and so does a
//!         store that is written anew under another key: so the words of what was purged are not carried over.
//! Never:  a look at it while a record is told. It is filled afterwards, a batch at a time, as vectors are.

use crate::error::{Damage, Refusal, StoreError};
use crate::index::{Change, Index, Seen, read_counters};
use crate::plan::At;
use crate::rank::word_vector;
use crate::read::View;
use crate::seal::{Hashed, Row, Seal};
use crate::tables::{META, VOCABULARY, WORD};
use crate::text;
use crate::vector::coarse_of_stored;
use crate::write::{Batch, EmbedderDigest};
use agentd_domain::agent_api::Tier;
use redb::{ReadTransaction, ReadableTable};
use std::collections::HashSet;

/// Texts that are read for one batch at most.
const TEXTS_AT_ONCE: usize = 2048;
/// How far the texts were read is written down after so many, even if no new word was among them.
const TEXTS_WORTH_NOTING: usize = 256;

/// Words that want a vector.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PendingWords {
    /// What the embedder gets, each alone.
    pub words: Vec<String>,
    terms: Vec<String>,
    /// All texts before this number have been read.
    next_seq: u64,
    /// There may be more.
    pub more: bool,
    /// Texts that were read.
    read: usize,
}

impl PendingWords {
    /// There is nothing to embed, and nothing to write down: a few texts without a new word are read again next time.
    pub fn is_nothing(&self) -> bool {
        self.words.is_empty() && !self.more && self.read < TEXTS_WORTH_NOTING
    }
}

/// How far the texts were read, and for which embedder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Progress {
    pub(crate) embedder: u32,
    pub(crate) next_seq: u64,
}

impl Progress {
    fn of(row: Option<&[u8]>) -> Result<Self, Damage> {
        let Some(row) = row else { return Ok(Self::default()) };
        let row: &[u8; 12] = row.try_into().map_err(|_| Damage::Meta(VOCABULARY))?;
        let (embedder, next) = row.split_first_chunk::<4>().ok_or(Damage::Meta(VOCABULARY))?;
        let next: &[u8; 8] = next.try_into().map_err(|_| Damage::Meta(VOCABULARY))?;
        Ok(Self { embedder: u32::from_le_bytes(*embedder), next_seq: u64::from_le_bytes(*next) })
    }

    fn to_bytes(self) -> [u8; 12] {
        let mut row = [0; 12];
        row[..4].copy_from_slice(&self.embedder.to_le_bytes());
        row[4..].copy_from_slice(&self.next_seq.to_le_bytes());
        row
    }
}

fn progress(txn: &ReadTransaction) -> Result<Progress, StoreError> {
    let meta = txn.open_table(META)?;
    let row = meta.get(VOCABULARY)?;
    Ok(Progress::of(row.as_ref().map(|row| row.value()))?)
}

/// Calls `each` with every term, and the scale and numbers of its vector, if they are of this embedder.
pub(crate) fn for_each(
    txn: &ReadTransaction,
    seal: &Seal,
    embedder: u32,
    mut each: impl FnMut(&str, f32, &[i8]),
) -> Result<(), StoreError> {
    if embedder == 0 || progress(txn)?.embedder != embedder {
        return Ok(());
    }
    let table = match txn.open_table(WORD) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut buffer = Vec::new();
    for row in table.iter()? {
        let (mark, sealed) = row?;
        let content = seal.open(Row::Word, mark.value(), sealed.value(), &mut buffer).ok_or(Damage::Word)?;
        let (length, rest) = content.split_first().ok_or(Damage::Word)?;
        let (term, first) = rest.split_at_checked(usize::from(*length)).ok_or(Damage::Word)?;
        let term = std::str::from_utf8(term).map_err(|_| Damage::Word)?;
        let dimension = first.len().checked_sub(4).ok_or(Damage::Word)?;
        let (scale, values) = coarse_of_stored(first, dimension).ok_or(Damage::Word)?;
        let values: Vec<i8> = values.iter().map(|value| *value as i8).collect();
        each(term, scale, &values);
    }
    Ok(())
}

/// Have all texts been read?
pub(crate) fn is_complete(view: View<'_>) -> Result<bool, StoreError> {
    let (counters, done) = (read_counters(view.txn)?, progress(view.txn)?);
    Ok(counters.embedder == 0 || done.embedder == counters.embedder && done.next_seq == counters.next_seq)
}

/// The next words without a vector, in the order they were told.
pub(crate) fn pending(view: View<'_>, index: &Index, most: usize) -> Result<PendingWords, StoreError> {
    let counters = read_counters(view.txn)?;
    let done = progress(view.txn)?;
    let from = if done.embedder == counters.embedder { done.next_seq } else { 0 };
    let mut found = PendingWords { next_seq: from, ..PendingWords::default() };
    if counters.embedder == 0 {
        return Ok(found);
    }
    let mut met = HashSet::new();
    let (rows, seen) = (view.rows()?, Seen::new(&[Tier::Spirit, Tier::Knowledge], At::Latest));
    for slot in index.slots_from(from) {
        if found.read == TEXTS_AT_ONCE || found.words.len() >= most {
            found.more = true;
            break;
        }
        let seq = index.seq(slot);
        found.next_seq = seq + 1;
        if !index.is_among(slot, &seen) {
            continue;
        }
        found.read += 1;
        for word in text::content_words(&rows.record(seq)?.text) {
            let Some(term) = text::terms(&word).into_iter().next() else { continue };
            if !index.kin.knows(&term) && met.insert(term.clone()) {
                found.terms.push(term);
                found.words.push(word);
            }
        }
    }
    Ok(found)
}

impl Batch<'_> {
    /// Vectors of words, by this embedder. One that is no vector is left out: its word has no kin.
    pub(crate) fn complete_words(
        &mut self,
        embedder: &EmbedderDigest,
        pending: &PendingWords,
        vectors: &[Vec<f32>],
    ) -> Result<(), StoreError> {
        let Some((digest, dimension)) = self.current_embedder()? else {
            return Err(Refusal::OtherEmbedder.into());
        };
        if digest != *embedder || vectors.len() != pending.words.len() {
            return Err(Refusal::OtherEmbedder.into());
        }
        let done = Progress::of(self.meta_row(VOCABULARY)?.as_deref())?;
        if done.embedder != self.counters.embedder {
            self.word.retain(|_, _| false)?;
        }
        let mut words = Vec::with_capacity(vectors.len());
        for (term, vector) in pending.terms.iter().zip(vectors) {
            let coarse = word_vector(vector).filter(|coarse| coarse.values.len() == dimension as usize);
            let Some(coarse) = coarse else { continue };
            let mut content = Vec::with_capacity(1 + term.len() + 4 + coarse.values.len());
            // A term has at most 32 characters.
            content.push(u8::try_from(term.len()).unwrap_or(u8::MAX));
            content.extend_from_slice(term.as_bytes());
            content.extend_from_slice(&coarse.scale.to_le_bytes());
            content.extend(coarse.values.iter().map(|value| *value as u8));
            let mark = self.ground.seal.mark(Hashed::Term, term.as_bytes());
            let sealed = self.seal(Row::Word, &mark, &content)?;
            self.word.insert(&mark, sealed.as_slice())?;
            words.push((term.clone(), coarse));
        }
        let next_seq = pending.next_seq;
        self.put_meta(VOCABULARY, &Progress { embedder: self.counters.embedder, next_seq }.to_bytes())?;
        self.changes.push(Change::Words(words));
        Ok(())
    }
}
