//! How does a purged record cease to exist on the medium, and how does an old store become a new one?
//!
//! redb never writes over a page that a committed transaction has written; a purged record stays in free pages until
//! they are used again. So within a day after something was purged the whole store is written anew under a new key,
//! and the old key is destroyed: whatever pages are left over, nothing opens them.
//!
//! A store of an earlier format becomes one of this format in the same way: `first.rs`, `second.rs`.
//!
//! Steps, and what a power cut after each leaves:
//! 1. a new key is on disk: the store with its old key; the next opening destroys the new one.
//! 2. the new file stands beside the store: the same; the next opening removes it.
//! 3. one rename puts it in the store's place, the directory is synced: either store, each with its key there.
//! 4. opening it destroys every key that it does not name: repeated at every opening until it is done.
//!
//! Always: what is copied is what is live, superseded or a restorable tombstone; of what was purged only the
//!         journal's line is left. The store keeps its id, its sequence numbers and its counters.

mod first;
mod second;

pub(crate) use first::{first_agent, from_first_format};
pub(crate) use second::from_second_format;

use crate::error::{Damage, OpenError, StoreError};
use crate::file::{Open, begin_write, open_error};
use crate::index::read_counters;
use crate::key::StoreKey;
use crate::life::Life;
use crate::plan::{Budgets, Duplicates};
use crate::read::{View, blocks, entry};
use crate::record::Record;
use crate::rows::StoredVector;
use crate::seal::Seal;
use crate::tables::{Counters, EMBEDDER, IdentityRow, JOURNAL, LINK, LINK_WINDOW, ONCE, SESSION, TierCounts};
use crate::text::WORDS_VERSION;
use crate::write::{Batch, Ground};
use agentd_domain::ids::OwnerId;
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable};
use std::path::Path;
use uuid::Uuid;

/// Records per transaction of the new file: its words are gathered in memory until then.
const AT_ONCE: usize = 4096;

/// What a record of the old file becomes in the new one.
struct Copied {
    seq: u64,
    record: Record,
    life: Life,
    vector: Option<StoredVector>,
}

/// The same store under another key.
pub(crate) fn under_another_key(
    open: &Open,
    next: &Database,
    key: &StoreKey,
    now_unix_ms: i64,
    path: &Path,
) -> Result<(), OpenError> {
    let copy = || {
        let txn = open.database.begin_read()?;
        let old = View::of(open, &txn);
        let counters = read_counters(&txn)?;
        let seal = Seal::new(&key.secret);
        let mut writer = Writer::begin(next, &seal, open.row.store, open.row.identity.owner_id, &counters)?;
        let rows = old.rows()?;
        rows.for_each_record(|seq, record| {
            writer.add(Copied { seq, record, life: rows.life(seq)?, vector: rows.vector(seq)? })
        })?;
        writer.finish(IdentityRow { key: key.id, words: WORDS_VERSION, ..open.row }, |batch| {
            copy_what_is_not_sealed(&txn, batch)?;
            copy_journal_and_blocks(old, batch, &counters)?;
            batch.note_rewritten(now_unix_ms, counters.purged)
        })
    };
    copy().map_err(|error| open_error(path, error))
}

fn copy_what_is_not_sealed(txn: &ReadTransaction, batch: &mut Batch<'_>) -> Result<(), StoreError> {
    for row in txn.open_table(ONCE)?.iter()? {
        let (key, row) = row?;
        let (used, seq, _) = row.value();
        if batch.has(seq)? {
            // The request's hash was made with the old key: zeros mean that the record itself is compared.
            batch.once.insert(key.value(), (used, seq, &[0; 16]))?;
        }
    }
    for row in txn.open_table(LINK)?.iter()? {
        let link = row?.0.value();
        // One whose second record is gone says nothing any more.
        if link.1 != LINK_WINDOW || batch.has(link.2)? {
            batch.link.insert(link, ())?;
        }
    }
    for row in txn.open_table(SESSION)?.iter()? {
        let (session, row) = row?;
        batch.session.insert(session.value(), row.value())?;
    }
    for row in txn.open_table(EMBEDDER)?.iter()? {
        let (number, row) = row?;
        let (digest, dimension) = row.value();
        batch.put_embedder(number.value(), digest, dimension)?;
    }
    Ok(())
}

fn copy_journal_and_blocks(
    old: View<'_>,
    batch: &mut Batch<'_>,
    counters: &Counters,
) -> Result<(), StoreError> {
    for row in old.txn.open_table(JOURNAL)?.iter()? {
        let (number, row) = row?;
        batch.put_entry(number.value(), entry(old, number.value(), row.value())?)?;
    }
    for block in blocks(old)? {
        batch.put_block(&block)?;
    }
    (batch.counters.blocks, batch.counters.block_bytes) = (counters.blocks, counters.block_bytes);
    (batch.counters.purged, batch.counters.first_purged_unix_ms) = (0, 0);
    Ok(())
}

/// Fills a new file, some thousand records a transaction.
struct Writer<'a> {
    next: &'a Database,
    seal: &'a Seal,
    store: Uuid,
    owner: OwnerId,
    budgets: Budgets,
    old: Counters,
    waiting: Vec<Copied>,
}

impl<'a> Writer<'a> {
    fn begin(
        next: &'a Database,
        seal: &'a Seal,
        store: Uuid,
        owner: OwnerId,
        old: &Counters,
    ) -> Result<Self, StoreError> {
        let budgets = Budgets::new([]);
        Ok(Self { next, seal, store, owner, budgets, old: *old, waiting: Vec::new() })
    }

    fn add(&mut self, copied: Copied) -> Result<(), StoreError> {
        self.waiting.push(copied);
        if self.waiting.len() < AT_ONCE { Ok(()) } else { self.write(|_| Ok(())) }
    }

    /// One transaction with all that waits.
    fn write(
        &mut self,
        also: impl FnOnce(&mut Batch<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let txn = begin_write(self.next)?;
        {
            let ground = Ground {
                owner: self.owner,
                budgets: &self.budgets,
                duplicates: Duplicates::Keep,
                seal: self.seal,
                store: self.store,
            };
            let mut batch = Batch::begin(&txn, ground)?;
            batch.counters.embedder = self.old.embedder;
            for copied in self.waiting.drain(..) {
                batch.put_copied(copied.seq, &copied.record, copied.life, copied.vector)?;
            }
            also(&mut batch)?;
            batch.finish()?;
        }
        Ok(txn.commit()?)
    }

    fn finish(
        mut self,
        row: IdentityRow,
        also: impl FnOnce(&mut Batch<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let old = self.old;
        self.write(|batch| {
            batch.counters.next_seq = old.next_seq;
            batch.counters.next_entry = old.next_entry;
            // A reopened store must not look younger than what it acknowledged.
            batch.counters.commits = batch.counters.commits.max(old.commits);
            also(batch)?;
            batch.write_identity(row)
        })?;
        self.compare(&old)
    }

    /// Nothing was lost on the way: what is about to take the store's place holds what the store holds.
    fn compare(&self, old: &Counters) -> Result<(), StoreError> {
        let new = read_counters(&self.next.begin_read()?)?;
        let same = |tier: fn(&TierCounts) -> u64| new.tiers.iter().map(tier).eq(old.tiers.iter().map(tier));
        let whole = same(|t| t.records) && same(|t| t.forgotten) && new.vectors == old.vectors;
        if !whole || new.pending != old.pending {
            return Err(Damage::Counts(format!("written anew: {new:?}, before: {old:?}")).into());
        }
        Ok(())
    }
}
