//! What does one transaction change?
//!
//! In:    a transaction, a batch of works. Out: per work its outcome, for the index its changes.
//! Always: text, vector, postings, life, journal, counts and the idempotency key of a record change in one
//!         transaction, and an outcome is told to nobody before that transaction is committed (`run.rs`). A refused
//!         work changes nothing; an error of the disk ends the whole transaction.
//! Thread: the store's writer, and whoever opens the store before that thread exists.
//!
//! | file | works |
//! |---|---|
//! | `prepare.rs` | (before the transaction: the words and the rounded vector of a record) |
//! | `remember.rs` | a record is told |
//! | `embed.rs` | vectors come, and embedders change |
//! | `room.rs` | a tier is full |
//! | `forget.rs` | forget, restore, pin, correct, use, roll back, sweep |
//! | `session.rs` | a run ends |
//! | `block.rs` | the blocks that are always in the prompt |

mod block;
mod embed;
mod forget;
mod prepare;
mod remember;
mod room;
mod session;

pub use block::Block;
pub(crate) use block::{BlockWork, block_mark, check_block, open_block as open_prompt_block};
pub use embed::{Completed, EmbedderDigest, EmbedderUse, Embedding, Made};
pub(crate) use forget::CorrectWork;
pub use forget::{ForgetMode, RolledBack, Swept};
pub(crate) use prepare::{Marker, Meaning, Ready, Terms, share_out};
pub(crate) use remember::{RememberWork, session_number};
pub use session::{SessionEnd, SessionEnded};

use crate::error::{Damage, Refusal, StoreError};
use crate::index::Change;
use crate::journal::{Deed, Entry, Why};
use crate::life::{Life, State};
use crate::pack::Entries;
use crate::plan::{self, Budgets, Duplicates};
use crate::postings::{self, Posting};
use crate::record::Record;
use crate::rows::{StoredVector, WriteRows};
use crate::seal::{Mark, Nonces, Row, Seal};
use crate::tables::{
    BLOCK, BY_ID, CANARY, CLAIM, COUNTERS, Counters, EMBEDDER, ENTRIES, IDENTITY, IdentityRow, JOURNAL, LINK,
    META, ONCE, PENDING, POSTING, SESSION, WORD, entries_from_bytes, entries_to_bytes,
};
use crate::vector::{Parts, Vector};
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::{OwnerId, RecordId};
use redb::{ReadableTable, Table, WriteTransaction};
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hasher};
use uuid::{NoContext, Timestamp, Uuid};

/// Old idempotency keys are dropped at every so many-th transaction.
const COMMITS_PER_CLEANING: u64 = 1024;

/// What a batch needs to know of its store.
#[derive(Clone, Copy)]
pub(crate) struct Ground<'a> {
    pub(crate) owner: OwnerId,
    pub(crate) budgets: &'a Budgets,
    pub(crate) duplicates: Duplicates,
    pub(crate) seal: &'a Seal,
    /// The store's own id: salt of hashes that outlive a key.
    pub(crate) store: Uuid,
}

/// One open transaction with all that a work needs. Postings are gathered and written once per batch.
pub(crate) struct Batch<'txn> {
    pub(crate) ground: Ground<'txn>,
    nonces: Nonces,
    pub(crate) counters: Counters,
    meta: Table<'txn, &'static str, &'static [u8]>,
    entries: Entries,
    rows: WriteRows<'txn>,
    by_id: Table<'txn, u128, u64>,
    pending: Table<'txn, u64, ()>,
    posting: Table<'txn, &'static [u8], &'static [u8]>,
    embedder: Table<'txn, u32, (&'static [u8; 32], u32)>,
    pub(crate) once: Table<'txn, &'static [u8; 16], (i64, u64, &'static [u8; 16])>,
    claim: Table<'txn, &'static [u8], ()>,
    pub(crate) link: Table<'txn, (u64, u8, u64), ()>,
    pub(crate) session: Table<'txn, u64, (u64, i64)>,
    block: Table<'txn, &'static [u8; 16], &'static [u8]>,
    journal: Table<'txn, u64, &'static [u8]>,
    pub(crate) word: Table<'txn, &'static [u8; 16], &'static [u8]>,
    new_postings: HashMap<(Tier, Mark), Vec<Posting>, ByMark>,
    gone_postings: BTreeMap<(Tier, Mark), Vec<u64>>,
    /// Hashing a term costs more than looking it up, and a batch meets most of its terms again.
    marker: Marker<'txn>,
    pub(crate) changes: Vec<Change>,
    /// The latest time any work of this batch was told at.
    told_unix_ms: Option<i64>,
}

impl<'txn> Batch<'txn> {
    pub(crate) fn begin(txn: &'txn WriteTransaction, ground: Ground<'txn>) -> Result<Self, StoreError> {
        let meta = txn.open_table(META)?;
        let counters = match meta.get(COUNTERS)? {
            Some(row) => Counters::from_bytes(row.value())?,
            None => Counters::default(),
        };
        let entries = match meta.get(ENTRIES)? {
            Some(row) => entries_from_bytes(row.value())?,
            None => Entries::default(),
        };
        Ok(Self {
            ground,
            nonces: Nonces::new(),
            counters,
            meta,
            entries,
            rows: WriteRows::write(txn, ground.seal)?,
            by_id: txn.open_table(BY_ID)?,
            pending: txn.open_table(PENDING)?,
            posting: txn.open_table(POSTING)?,
            embedder: txn.open_table(EMBEDDER)?,
            once: txn.open_table(ONCE)?,
            claim: txn.open_table(CLAIM)?,
            link: txn.open_table(LINK)?,
            session: txn.open_table(SESSION)?,
            block: txn.open_table(BLOCK)?,
            journal: txn.open_table(JOURNAL)?,
            word: txn.open_table(WORD)?,
            new_postings: HashMap::default(),
            gone_postings: BTreeMap::new(),
            marker: Marker::new(ground.seal),
            changes: Vec::new(),
            told_unix_ms: None,
        })
    }

    /// Writes what was gathered; the transaction is ready to commit afterwards.
    pub(crate) fn finish(mut self) -> Result<(Counters, Vec<Change>), StoreError> {
        self.flush_postings()?;
        self.rows.flush(&mut self.nonces, &mut self.entries)?;
        self.meta.insert(ENTRIES, entries_to_bytes(&self.entries).as_slice())?;
        self.clean_keys()?;
        self.counters.commits += 1;
        self.meta.insert(COUNTERS, self.counters.to_bytes().as_slice())?;
        Ok((self.counters, self.changes))
    }

    pub(crate) fn write_identity(&mut self, row: IdentityRow) -> Result<(), StoreError> {
        self.meta.insert(IDENTITY, row.to_bytes().as_slice())?;
        let canary = self.ground.seal.seal(&mut self.nonces, Row::Canary, row.key.as_bytes(), &[])?;
        self.meta.insert(CANARY, canary.as_slice())?;
        Ok(())
    }

    fn told_at(&mut self, unix_ms: i64) {
        self.told_unix_ms = self.told_unix_ms.max(Some(unix_ms));
    }

    pub(crate) fn meta_row(&self, name: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.meta.get(name)?.map(|row| row.value().to_vec()))
    }

    pub(crate) fn put_meta(&mut self, name: &'static str, row: &[u8]) -> Result<(), StoreError> {
        self.meta.insert(name, row)?;
        Ok(())
    }

    pub(crate) fn seal(&mut self, row: Row, key: &[u8], content: &[u8]) -> Result<Vec<u8>, StoreError> {
        Ok(self.ground.seal.seal(&mut self.nonces, row, key, content)?)
    }

    fn seq_of(&self, id: RecordId) -> Result<Option<u64>, StoreError> {
        Ok(self.by_id.get(id.0.as_u128())?.map(|row| row.value()))
    }

    fn record(&self, seq: u64) -> Result<Record, StoreError> {
        self.rows.record(seq)
    }

    fn life(&self, seq: u64) -> Result<Life, StoreError> {
        self.rows.life(seq)
    }

    /// The record of this id, tombstones included; refused when there is none.
    fn known(&self, id: RecordId) -> Result<(u64, Life), StoreError> {
        let seq = self.seq_of(id)?.ok_or(Refusal::Unknown(id))?;
        Ok((seq, self.life(seq)?))
    }

    fn set_life(&mut self, seq: u64, life: Life) -> Result<(), StoreError> {
        self.rows.put_life(seq, life);
        self.changes.push(Change::Life { seq, life });
        Ok(())
    }

    /// All records of a tier in this state, in order of telling.
    fn lives(&self, of: impl Fn(&Life) -> bool) -> Result<Vec<(u64, Life)>, StoreError> {
        let mut found = Vec::new();
        self.rows.for_each_life(|seq, life| {
            found.extend(of(&life).then_some((seq, life)));
            Ok(())
        })?;
        Ok(found)
    }

    /// Writes a whole record: its text, its words, its vector or its wait for one, and the counts.
    pub(crate) fn put(
        &mut self,
        seq: u64,
        record: &Record,
        life: Life,
        vector: Option<&Vector>,
    ) -> Result<Life, StoreError> {
        let terms = self.marker.terms(&record.text);
        self.put_ready(seq, record, life, vector.map(Vector::parts), &terms)
    }

    /// Writes a record that was in another file under this number.
    pub(crate) fn put_copied(
        &mut self,
        seq: u64,
        record: &Record,
        life: Life,
        vector: Option<StoredVector>,
    ) -> Result<(), StoreError> {
        let terms = self.marker.terms(&record.text);
        let current = vector.as_ref().filter(|vector| vector.embedder == self.counters.embedder);
        let parts = current.map(|v| Parts { first: v.first.clone(), fine: v.fine.clone() });
        self.put_ready(seq, record, life, parts.as_ref(), &terms)?;
        // A vector of an earlier embedder: the record waits, and going back finds it.
        if let Some(vector) = vector.filter(|_| parts.is_none()) {
            self.rows.put_vector(seq, vector.embedder, &vector.first, vector.fine);
        }
        Ok(())
    }

    pub(crate) fn has(&self, seq: u64) -> Result<bool, StoreError> {
        self.rows.has(seq)
    }

    /// The same, when the terms of the text are known.
    fn put_ready(
        &mut self,
        seq: u64,
        record: &Record,
        life: Life,
        vector: Option<&Parts>,
        terms: &Terms,
    ) -> Result<Life, StoreError> {
        let content = record.to_bytes();
        self.gather_postings(seq, life.tier, terms);
        let words = terms.words;
        let life = Life { words, bytes: content.len() as u32, told: Some(terms.told), ..life };
        self.rows.put_record(seq, content);
        self.by_id.insert(record.id.0.as_u128(), seq)?;
        self.rows.put_life(seq, life);
        if let Some(claim) = &record.claim {
            self.claim.insert(self.claim_key(claim, seq).as_slice(), ())?;
        }
        let held = self.counters.tier_mut(life.tier);
        held.records += 1;
        held.bytes += u64::from(life.bytes);
        held.words += u64::from(words);
        if life.state == State::Forgotten {
            held.forgotten += 1;
            held.forgotten_bytes += u64::from(life.bytes);
        }
        match vector {
            Some(parts) => {
                self.rows.put_vector(seq, self.counters.embedder, &parts.first, parts.fine.clone());
                self.counters.vectors += 1;
            }
            None if plan::has_meaning(life.tier) => {
                self.pending.insert(seq, ())?;
                self.counters.pending += 1;
            }
            None => {}
        }
        self.changes.push(Change::Added { seq, life, vector: vector.map(Parts::coarse) });
        Ok(life)
    }

    pub(crate) fn put_vector(&mut self, seq: u64, embedder: u32, vector: &Vector) {
        let parts = vector.parts();
        self.rows.put_vector(seq, embedder, &parts.first, parts.fine.clone());
    }

    /// Removes every trace of a record but the journal's.
    fn drop_row(&mut self, seq: u64) -> Result<(Record, Life), StoreError> {
        let (record, life) = (self.record(seq)?, self.life(seq)?);
        for (mark, _) in self.marker.terms(&record.text).marks {
            self.gone_postings.entry((life.tier, mark)).or_default().push(seq);
        }
        let of_current = self.rows.embedder_of(seq)?.map(|number| number == self.counters.embedder);
        self.rows.remove(seq);
        self.by_id.remove(record.id.0.as_u128())?;
        if let Some(claim) = &record.claim {
            self.claim.remove(self.claim_key(claim, seq).as_slice())?;
        }
        if of_current == Some(true) {
            self.counters.vectors -= 1;
        }
        if self.pending.remove(seq)?.is_some() {
            self.counters.pending -= 1;
        }
        self.drop_windows_with(seq)?;
        self.drop_links(seq, &record)?;
        let held = self.counters.tier_mut(life.tier);
        held.records -= 1;
        held.bytes -= u64::from(life.bytes);
        held.words -= u64::from(life.words);
        if life.state == State::Forgotten {
            held.forgotten -= 1;
            held.forgotten_bytes -= u64::from(life.bytes);
        }
        self.changes.push(Change::Removed { seq });
        Ok((record, life))
    }

    fn drop_links(&mut self, seq: u64, record: &Record) -> Result<(), StoreError> {
        let mut gone: Vec<(u64, u8, u64)> = Vec::new();
        for row in self.link.range((seq, 0, 0)..=(seq, u8::MAX, u64::MAX))? {
            gone.push(row?.0.value());
        }
        for (other, kind) in record
            .evidence
            .iter()
            .map(|id| (*id, crate::tables::LINK_EVIDENCE))
            .chain(record.supersedes.map(|id| (id, crate::tables::LINK_SUPERSEDED)))
        {
            if let Some(other) = self.seq_of(other)? {
                gone.push((other, kind, seq));
            }
        }
        // A claim may have closed several, of which the record names one; all are of the same subject and predicate.
        if let Some(claim) = &record.claim {
            let (from, to) = (self.claim_key(claim, 0), self.claim_key(claim, u64::MAX));
            for row in self.claim.range(from.as_slice()..=to.as_slice())? {
                let key = row?.0;
                let other = u64::from_be_bytes(std::array::from_fn(|i| key.value()[16 + i]));
                gone.push((other, crate::tables::LINK_SUPERSEDED, seq));
            }
        }
        for link in gone {
            self.link.remove(link)?;
        }
        Ok(())
    }

    fn note(&mut self, entry: Entry) -> Result<(), StoreError> {
        let number = self.counters.next_entry;
        let sealed = self.seal(Row::Journal, &number.to_be_bytes(), &entry.to_bytes())?;
        self.journal.insert(number, sealed.as_slice())?;
        self.counters.next_entry += 1;
        Ok(())
    }

    /// The file was written anew under its present key, without what had been purged.
    pub(crate) fn note_rewritten(&mut self, now_unix_ms: i64, purged: u64) -> Result<(), StoreError> {
        self.note(Entry {
            at_unix_ms: now_unix_ms,
            deed: Deed::Rewritten,
            why: Why::Asked,
            tier: Tier::Spirit,
            id: RecordId(self.ground.store),
            other: None,
            number: purged as f32,
        })
    }

    pub(crate) fn put_entry(&mut self, number: u64, entry: Entry) -> Result<(), StoreError> {
        let sealed = self.seal(Row::Journal, &number.to_be_bytes(), &entry.to_bytes())?;
        self.journal.insert(number, sealed.as_slice())?;
        Ok(())
    }

    pub(crate) fn put_embedder(
        &mut self,
        number: u32,
        digest: &[u8; 32],
        dimension: u32,
    ) -> Result<(), StoreError> {
        self.embedder.insert(number, (digest, dimension))?;
        Ok(())
    }

    fn gather_postings(&mut self, seq: u64, tier: Tier, terms: &Terms) {
        for (mark, count) in &terms.marks {
            self.new_postings.entry((tier, *mark)).or_default().push(Posting { seq, count: *count });
        }
    }

    pub(crate) fn flush_postings(&mut self) -> Result<(), StoreError> {
        let mut new: Vec<_> = std::mem::take(&mut self.new_postings).into_iter().collect();
        // In the order of their keys: neighbours stand in one page.
        new.sort_unstable_by_key(|(term, _)| *term);
        for ((tier, mark), new) in new {
            self.append_postings(tier, &mark, &new)?;
        }
        for ((tier, mark), gone) in std::mem::take(&mut self.gone_postings) {
            self.remove_postings(tier, &mark, gone)?;
        }
        Ok(())
    }

    /// The last block of a term in this range, as it stands.
    fn block_at(
        &self,
        from: &postings::Key,
        to: &postings::Key,
    ) -> Result<Option<(postings::Key, Vec<u8>)>, StoreError> {
        let Some(row) = self.posting.range(from.as_slice()..=to.as_slice())?.next_back() else {
            return Ok(None);
        };
        let (key, sealed) = row?;
        let key: postings::Key =
            key.value().try_into().map_err(|_| Damage::Postings("a key of another length".to_owned()))?;
        let mut content = Vec::new();
        open_terms(self.ground.seal, &key, sealed.value(), &mut content)?;
        Ok(Some((key, content)))
    }

    fn write_block(&mut self, key: &postings::Key, block: &postings::Block) -> Result<(), StoreError> {
        let sealed = self.seal(Row::TermBlock, key, block.as_bytes())?;
        self.posting.insert(key.as_slice(), sealed.as_slice())?;
        Ok(())
    }

    fn append_postings(&mut self, tier: Tier, mark: &Mark, new: &[Posting]) -> Result<(), StoreError> {
        let Some(first) = new.first() else { return Ok(()) };
        let (from, to) = (postings::key(tier, mark, 0), postings::key(tier, mark, u64::MAX));
        let begin = |seq| (postings::key(tier, mark, seq), postings::Block::begun(seq));
        let (mut key, mut block) = match self.block_at(&from, &to)? {
            None => begin(first.seq),
            Some((key, old)) => {
                let old = postings::Block::from_bytes(postings::begun(&key), &old);
                (key, old.map_err(|why| Damage::Postings(why.to_string()))?)
            }
        };
        // A full block is left as it is.
        if block.is_full() {
            (key, block) = begin(first.seq);
        }
        for posting in new {
            if block.is_full() {
                self.write_block(&key, &block)?;
                (key, block) = begin(posting.seq);
            }
            block.push(*posting);
        }
        self.write_block(&key, &block)
    }

    fn remove_postings(&mut self, tier: Tier, mark: &Mark, mut gone: Vec<u64>) -> Result<(), StoreError> {
        gone.sort_unstable();
        let from = postings::key(tier, mark, 0);
        while let Some(last) = gone.last().copied() {
            let Some((key, content)) = self.block_at(&from, &postings::key(tier, mark, last))? else {
                break;
            };
            let mut block = postings_in(&key, &content)?;
            block.retain(|posting| gone.binary_search(&posting.seq).is_err());
            let begun = postings::begun(&key);
            gone.retain(|seq| *seq < begun);
            if block.is_empty() {
                self.posting.remove(key.as_slice())?;
            } else {
                self.write_block(&key, &postings::Block::of(begun, &block))?;
            }
        }
        Ok(())
    }

    fn clean_keys(&mut self) -> Result<(), StoreError> {
        let due = self.counters.commits % COMMITS_PER_CLEANING == COMMITS_PER_CLEANING - 1;
        let Some(now_unix_ms) = self.told_unix_ms.filter(|_| due) else { return Ok(()) };
        self.once.retain(|_, (used, _, _)| now_unix_ms.saturating_sub(used) <= plan::IDEMPOTENCY_KEPT_MS)?;
        Ok(())
    }

    /// Writes all postings again from the texts: their rules changed (`text::WORDS_VERSION`).
    pub(crate) fn rebuild_words(&mut self) -> Result<(), StoreError> {
        self.posting.retain(|_, _| false)?;
        for tier in crate::record::TIERS {
            self.counters.tier_mut(tier).words = 0;
        }
        for (seq, life) in self.lives(|_| true)? {
            let terms = self.marker.terms(&self.rows.record(seq)?.text);
            self.gather_postings(seq, life.tier, &terms);
            let words = terms.words;
            self.counters.tier_mut(life.tier).words += u64::from(words);
            self.rows.put_life(seq, Life { words, told: Some(terms.told), ..life });
        }
        self.changes.push(Change::Rebuild);
        Ok(())
    }
}

pub(crate) fn open_block(seal: &Seal, key: &postings::Key, sealed: &[u8]) -> Result<Vec<Posting>, Damage> {
    let mut content = Vec::new();
    open_terms(seal, key, sealed, &mut content)?;
    postings_in(key, &content)
}

fn open_terms(seal: &Seal, key: &postings::Key, sealed: &[u8], into: &mut Vec<u8>) -> Result<(), Damage> {
    let opened = seal.open(Row::TermBlock, key, sealed, into).map(<[u8]>::len);
    into.truncate(opened.ok_or_else(|| Damage::Postings("a block does not open".to_owned()))?);
    Ok(())
}

fn postings_in(key: &postings::Key, content: &[u8]) -> Result<Vec<Posting>, Damage> {
    let mut postings = Vec::new();
    postings::for_each(postings::begun(key), content, |p| postings.push(p))
        .map_err(|e| Damage::Postings(e.to_string()))?;
    Ok(postings)
}

/// Marks are keyed hashes: eight bytes of one are as good a hash as any.
#[derive(Clone, Copy, Default)]
pub(crate) struct ByMark;

impl BuildHasher for ByMark {
    type Hasher = FirstBytes;

    fn build_hasher(&self) -> FirstBytes {
        FirstBytes(0)
    }
}

pub(crate) struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let first = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        self.0 = self.0.rotate_left(1) ^ first;
    }
}

/// RFC 9562 UUIDv7 of the time the record was told; a clock before 1970 counts as 1970.
fn new_id(recorded_unix_ms: i64) -> RecordId {
    let ms = u64::try_from(recorded_unix_ms).unwrap_or(0);
    let nanos = (ms % 1000) as u32 * 1_000_000;
    RecordId(Uuid::new_v7(Timestamp::from_unix(NoContext, ms / 1000, nanos)))
}
