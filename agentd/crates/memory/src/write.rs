//! What does one transaction change?
//!
//! In:    a transaction, a batch of works. Out: per work its outcome, for the index its changes.
//! Always: text, vector, postings, counts and the idempotency key of a record change in one transaction, and an
//!         outcome is told to nobody before that transaction is committed (`run.rs`). A refused work changes
//!         nothing; an error of the disk ends the whole transaction.
//! Thread: the store's writer, and whoever opens the store before that thread exists.

use crate::error::{Damage, Refusal, RefusedVector, StoreError};
use crate::index::Change;
use crate::plan::{self, Budgets, Checked};
use crate::postings::{self, Block, Posting};
use crate::record::{Record, tier_code};
use crate::tables::{
    BY_ID, COUNTERS, Counters, EMBEDDER, IDENTITY, IdentityRow, META, ONCE, PENDING, POSTING, RANK, RECORD,
    VECTOR,
};
use crate::text;
use crate::vector::Vector;
use agentd_domain::agent_api::{EmbedState, Remembered, Tier};
use agentd_domain::ids::{OwnerId, RecordId};
use redb::{ReadableTable, Table, WriteTransaction};
use std::collections::BTreeMap;
use uuid::{NoContext, Timestamp, Uuid};

/// SHA-256 of the embedding model's file.
pub type EmbedderDigest = [u8; 32];

/// A vector and who made it.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    pub embedder: EmbedderDigest,
    pub vector: Vec<f32>,
}

/// What `complete_embedding` did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Completed {
    pub embedded: u64,
    /// Their records stay pending: an embedder that gives such vectors is broken.
    pub refused: Vec<RefusedVector>,
}

/// What `use_embedder` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbedderUse {
    /// Records that wait for a vector of this embedder.
    pub pending: u64,
    pub changed: bool,
}

#[derive(Debug)]
pub(crate) struct RememberWork {
    pub(crate) record: Checked,
    pub(crate) recorded_unix_ms: i64,
    pub(crate) key: Option<String>,
    pub(crate) embedding: Option<Embedding>,
}

/// One open transaction with all that a work needs. Postings are gathered and written once per batch.
pub(crate) struct Batch<'txn> {
    owner: OwnerId,
    budgets: &'txn Budgets,
    counters: Counters,
    meta: Table<'txn, &'static str, &'static [u8]>,
    record: Table<'txn, u64, &'static [u8]>,
    by_id: Table<'txn, u128, u64>,
    rank: Table<'txn, u64, (u8, u32)>,
    vector: Table<'txn, u64, (u32, &'static [u8])>,
    pending: Table<'txn, u64, ()>,
    posting: Table<'txn, &'static [u8], &'static [u8]>,
    embedder: Table<'txn, u32, (&'static [u8; 32], u32)>,
    once: Table<'txn, &'static str, (i64, u64)>,
    new_postings: BTreeMap<(Tier, String), Vec<Posting>>,
    changes: Vec<Change>,
    /// The latest time any work of this batch was told at.
    told_unix_ms: Option<i64>,
}

/// Old idempotency keys are dropped at every so many-th transaction.
const COMMITS_PER_CLEANING: u64 = 1024;

impl<'txn> Batch<'txn> {
    pub(crate) fn begin(
        txn: &'txn WriteTransaction,
        owner: OwnerId,
        budgets: &'txn Budgets,
    ) -> Result<Self, StoreError> {
        let meta = txn.open_table(META)?;
        let counters = match meta.get(COUNTERS)? {
            Some(row) => Counters::from_bytes(row.value())?,
            None => Counters::default(),
        };
        Ok(Self {
            owner,
            budgets,
            counters,
            meta,
            record: txn.open_table(RECORD)?,
            by_id: txn.open_table(BY_ID)?,
            rank: txn.open_table(RANK)?,
            vector: txn.open_table(VECTOR)?,
            pending: txn.open_table(PENDING)?,
            posting: txn.open_table(POSTING)?,
            embedder: txn.open_table(EMBEDDER)?,
            once: txn.open_table(ONCE)?,
            new_postings: BTreeMap::new(),
            changes: Vec::new(),
            told_unix_ms: None,
        })
    }

    /// Writes what was gathered; the transaction is ready to commit afterwards.
    pub(crate) fn finish(mut self) -> Result<(Counters, Vec<Change>), StoreError> {
        for ((tier, term), new) in std::mem::take(&mut self.new_postings) {
            append_postings(&mut self.posting, tier, &term, &new)?;
        }
        self.clean_keys()?;
        self.counters.commits += 1;
        self.meta.insert(COUNTERS, self.counters.to_bytes().as_slice())?;
        Ok((self.counters, self.changes))
    }

    pub(crate) fn remember(&mut self, work: &RememberWork) -> Result<Remembered, StoreError> {
        self.told_unix_ms = self.told_unix_ms.max(Some(work.recorded_unix_ms));
        if let Some(earlier) = self.earlier(work)? {
            return Ok(earlier);
        }
        let tier = work.record.tier;
        let record = self.record_of(work);
        plan::check_room(tier, self.counters.tier(tier), self.budgets.of(tier)?, record.encoded_bytes())?;
        let vector = self.usable_vector(tier, work.embedding.as_ref())?;

        let seq = self.counters.next_seq;
        self.counters.next_seq += 1;
        let words = self.gather_postings(seq, &record);
        self.record.insert(seq, record.to_bytes().as_slice())?;
        self.by_id.insert(record.id.0.as_u128(), seq)?;
        self.rank.insert(seq, (tier_code(tier), words))?;
        if let Some(key) = &work.key {
            self.once.insert(key.as_str(), (work.recorded_unix_ms, seq))?;
        }
        let state = self.place_vector(seq, tier, vector.as_ref())?;

        let held = self.counters.tier_mut(tier);
        held.records += 1;
        held.bytes += record.encoded_bytes();
        held.words += u64::from(words);
        self.changes.push(Change::Added { seq, tier, words, vector: vector.map(|v| v.coarse()) });
        Ok(Remembered { id: record.id, state })
    }

    /// The same request again, within 24 hours: its first answer, never a second record.
    fn earlier(&self, work: &RememberWork) -> Result<Option<Remembered>, StoreError> {
        let Some(key) = &work.key else { return Ok(None) };
        let Some((used_unix_ms, seq)) = self.once.get(key.as_str())?.map(|row| row.value()) else {
            return Ok(None);
        };
        // A clock that was set back makes the age negative: then the key still counts.
        if work.recorded_unix_ms.saturating_sub(used_unix_ms) > plan::IDEMPOTENCY_KEPT_MS {
            return Ok(None);
        }
        let record = {
            let row = self.record.get(seq)?.ok_or(Damage::RecordMissing { seq })?;
            decode(seq, row.value())?
        };
        if !is_same_request(&record, &work.record) {
            return Err(Refusal::KeyReused.into());
        }
        let state = if !plan::has_meaning(record.tier) {
            EmbedState::WordsOnly
        } else if self.pending.get(seq)?.is_some() {
            EmbedState::Pending
        } else {
            EmbedState::Embedded
        };
        Ok(Some(Remembered { id: record.id, state }))
    }

    fn record_of(&self, work: &RememberWork) -> Record {
        Record {
            id: new_id(work.recorded_unix_ms),
            owner: self.owner,
            tier: work.record.tier,
            role: work.record.role,
            source: work.record.source,
            reference: work.record.reference.clone(),
            event_unix_ms: work.record.event_unix_ms.unwrap_or(work.recorded_unix_ms),
            recorded_unix_ms: work.recorded_unix_ms,
            text: work.record.text.clone(),
        }
    }

    /// A vector of another embedder, or a broken one, is as good as none: the record waits for a good one.
    fn usable_vector(&self, tier: Tier, embedding: Option<&Embedding>) -> Result<Option<Vector>, StoreError> {
        let Some(embedding) = embedding.filter(|_| plan::has_meaning(tier)) else { return Ok(None) };
        let Some((digest, dimension)) = self.current_embedder()? else { return Ok(None) };
        if digest != embedding.embedder {
            return Ok(None);
        }
        match Vector::new(&embedding.vector, dimension) {
            Ok(vector) => Ok(Some(vector)),
            Err(why) => {
                tracing::warn!(%why, "the embedder gave an unusable vector; the record is stored without it");
                Ok(None)
            }
        }
    }

    fn place_vector(
        &mut self,
        seq: u64,
        tier: Tier,
        vector: Option<&Vector>,
    ) -> Result<EmbedState, StoreError> {
        match vector {
            Some(vector) => {
                self.vector.insert(seq, (self.counters.embedder, vector.to_bytes().as_slice()))?;
                self.counters.vectors += 1;
                Ok(EmbedState::Embedded)
            }
            None if plan::has_meaning(tier) => {
                self.pending.insert(seq, ())?;
                self.counters.pending += 1;
                Ok(EmbedState::Pending)
            }
            None => Ok(EmbedState::WordsOnly),
        }
    }

    fn gather_postings(&mut self, seq: u64, record: &Record) -> u32 {
        let mut words = 0u32;
        for (term, count) in text::term_counts(&record.text) {
            words += count;
            self.new_postings.entry((record.tier, term)).or_default().push(Posting { seq, count });
        }
        words
    }

    fn current_embedder(&self) -> Result<Option<(EmbedderDigest, u32)>, StoreError> {
        match self.counters.embedder {
            0 => Ok(None),
            number => {
                let row = self.embedder.get(number)?.ok_or(Damage::Embedder(number))?;
                let (digest, dimension) = row.value();
                Ok(Some((*digest, dimension)))
            }
        }
    }

    pub(crate) fn complete(
        &mut self,
        embedder: &EmbedderDigest,
        vectors: &[(RecordId, Vec<f32>)],
    ) -> Result<Completed, StoreError> {
        let Some((digest, dimension)) = self.current_embedder()? else {
            return Err(Refusal::OtherEmbedder.into());
        };
        if digest != *embedder {
            return Err(Refusal::OtherEmbedder.into());
        }
        let mut done = Completed::default();
        for (id, values) in vectors {
            let Some(seq) = self.by_id.get(id.0.as_u128())?.map(|row| row.value()) else { continue };
            let vector = match Vector::new(values, dimension) {
                Ok(vector) => vector,
                Err(why) => {
                    done.refused.push(RefusedVector { id: *id, why });
                    continue;
                }
            };
            if self.pending.remove(seq)?.is_none() {
                continue;
            }
            self.vector.insert(seq, (self.counters.embedder, vector.to_bytes().as_slice()))?;
            self.counters.pending -= 1;
            self.counters.vectors += 1;
            done.embedded += 1;
            self.changes.push(Change::Embedded { seq, vector: vector.coarse() });
        }
        Ok(done)
    }

    /// Another digest is another space: old vectors stay on disk under their embedder's number, are compared
    /// no more, and every record waits until it has a vector of the new one. Going back finds the old ones.
    pub(crate) fn use_embedder(
        &mut self,
        digest: &EmbedderDigest,
        dimension: u32,
    ) -> Result<EmbedderUse, StoreError> {
        if dimension == 0 || dimension > crate::vector::DIMENSION_MAX {
            return Err(Refusal::Dimension(dimension).into());
        }
        let number = self.number_of(digest, dimension)?;
        if number == self.counters.embedder {
            return Ok(EmbedderUse { pending: self.counters.pending, changed: false });
        }
        self.counters.embedder = number;
        self.counters.vectors = 0;
        self.counters.pending = 0;
        self.pending.retain(|_, ()| false)?;
        for row in self.rank.iter()? {
            let (seq, row) = row?;
            let (seq, (tier, _)) = (seq.value(), row.value());
            if !crate::record::tier_from_code(tier).is_some_and(plan::has_meaning) {
                continue;
            }
            if self.vector.get(seq)?.is_some_and(|row| row.value().0 == number) {
                self.counters.vectors += 1;
            } else {
                self.pending.insert(seq, ())?;
                self.counters.pending += 1;
            }
        }
        self.changes.push(Change::Rebuild);
        Ok(EmbedderUse { pending: self.counters.pending, changed: true })
    }

    fn number_of(&mut self, digest: &EmbedderDigest, dimension: u32) -> Result<u32, StoreError> {
        let mut last = 0;
        for row in self.embedder.iter()? {
            let (number, row) = row?;
            let (known, known_dimension) = row.value();
            last = number.value();
            if known == digest {
                if known_dimension != dimension {
                    return Err(Refusal::DimensionChanged { known: known_dimension, named: dimension }.into());
                }
                return Ok(last);
            }
        }
        self.embedder.insert(last + 1, (digest, dimension))?;
        Ok(last + 1)
    }

    pub(crate) fn write_identity(&mut self, row: IdentityRow) -> Result<(), StoreError> {
        self.meta.insert(IDENTITY, row.to_bytes().as_slice())?;
        Ok(())
    }

    fn clean_keys(&mut self) -> Result<(), StoreError> {
        let due = self.counters.commits % COMMITS_PER_CLEANING == COMMITS_PER_CLEANING - 1;
        let Some(now_unix_ms) = self.told_unix_ms.filter(|_| due) else { return Ok(()) };
        self.once.retain(|_, (used, _)| now_unix_ms.saturating_sub(used) <= plan::IDEMPOTENCY_KEPT_MS)?;
        Ok(())
    }

    /// Writes all postings again from the texts: their rules changed (`text::WORDS_VERSION`).
    pub(crate) fn rebuild_words(&mut self) -> Result<(), StoreError> {
        self.posting.retain(|_, _| false)?;
        for tier in crate::record::TIERS {
            self.counters.tier_mut(tier).words = 0;
        }
        let mut ranks = Vec::new();
        let mut postings: BTreeMap<(Tier, String), Vec<Posting>> = BTreeMap::new();
        for row in self.record.iter()? {
            let (seq, row) = row?;
            let seq = seq.value();
            let record = decode(seq, row.value())?;
            let mut words = 0;
            for (term, count) in text::term_counts(&record.text) {
                words += count;
                postings.entry((record.tier, term)).or_default().push(Posting { seq, count });
            }
            self.counters.tier_mut(record.tier).words += u64::from(words);
            ranks.push((seq, record.tier, words));
        }
        for (seq, tier, words) in ranks {
            self.rank.insert(seq, (tier_code(tier), words))?;
        }
        self.new_postings = postings;
        self.changes.push(Change::Rebuild);
        Ok(())
    }
}

/// Whether the record came of this request. Without a time in the request it has that of the first attempt.
fn is_same_request(record: &Record, request: &Checked) -> bool {
    record.text == request.text
        && record.tier == request.tier
        && record.role == request.role
        && record.source == request.source
        && record.reference == request.reference
        && request.event_unix_ms.is_none_or(|event| event == record.event_unix_ms)
}

pub(crate) fn decode(seq: u64, bytes: &[u8]) -> Result<Record, Damage> {
    Record::from_bytes(bytes).map_err(|why| Damage::Record { seq, why: why.to_string() })
}

fn append_postings(
    table: &mut Table<'_, &'static [u8], &'static [u8]>,
    tier: Tier,
    term: &str,
    new: &[Posting],
) -> Result<(), StoreError> {
    let Some(first) = new.first() else { return Ok(()) };
    let (from, to) = (postings::key(tier, term, 0), postings::key(tier, term, u64::MAX));
    let last = match table.range(from.as_slice()..=to.as_slice())?.next_back() {
        None => None,
        Some(row) => {
            let (key, block) = row?;
            let block = Block::from_bytes(block.value()).map_err(|e| Damage::Postings(e.to_string()))?;
            Some((key.value().to_vec(), block))
        }
    };
    let (mut key, mut block) = match last {
        Some((key, block)) if !block.is_full() => (key, block),
        _ => (postings::key(tier, term, first.seq), Block::default()),
    };
    for posting in new {
        if block.is_full() {
            table.insert(key.as_slice(), block.as_bytes())?;
            key = postings::key(tier, term, posting.seq);
            block = Block::default();
        }
        block.push(*posting);
    }
    table.insert(key.as_slice(), block.as_bytes())?;
    Ok(())
}

/// RFC 9562 UUIDv7 of the time the record was told; a clock before 1970 counts as 1970.
fn new_id(recorded_unix_ms: i64) -> RecordId {
    let ms = u64::try_from(recorded_unix_ms).unwrap_or(0);
    let nanos = (ms % 1000) as u32 * 1_000_000;
    RecordId(Uuid::new_v7(Timestamp::from_unix(NoContext, ms / 1000, nanos)))
}
