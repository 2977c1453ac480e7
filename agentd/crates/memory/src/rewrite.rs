//! How does a purged record cease to exist on the medium, and how does an old store become a new one?
//!
//! redb never writes over a page that a committed transaction has written; a purged record stays in free pages until
//! they are used again. So within a day after something was purged the whole store is written anew under a new key,
//! and the old key is destroyed: whatever pages are left over, nothing opens them.
//!
//! Steps, and what a power cut after each leaves:
//! 1. a new key is on disk: the store with its old key; the next opening destroys the new one.
//! 2. the new file stands beside the store: the same; the next opening removes it.
//! 3. one rename puts it in the store's place, the directory is synced: either store, each with its key there.
//! 4. opening it destroys every key that it does not name: repeated at every opening until it is done.
//!
//! Always: what is copied is what is live, superseded or a restorable tombstone; of what was purged only the
//!         journal's line is left. The store keeps its id, its sequence numbers and its counters.

use crate::error::{Damage, OpenError, StoreError};
use crate::file::{Open, begin_write, open_error};
use crate::forget::{decay, trust};
use crate::index::read_counters;
use crate::key::StoreKey;
use crate::life::{Life, OPEN_END, State};
use crate::plan::{Budgets, Duplicates};
use crate::read::{View, blocks, entry};
use crate::record::{Record, Role, SourceKind, take, take_text, tier_from_code};
use crate::seal::{Row, Seal};
use crate::tables::{
    COARSE, Counters, EMBEDDER, FINE, FORMAT_VERSION, IDENTITY, Identity, IdentityRow, JOURNAL, LIFE, LINK,
    META, ONCE, RECORD, SESSION, TierCounts,
};
use crate::text::WORDS_VERSION;
use crate::vector::Vector;
use crate::write::{Batch, Ground, decode};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use std::path::Path;
use uuid::Uuid;

/// Records per transaction of the new file: its words are gathered in memory until then.
const AT_ONCE: usize = 4096;

/// What a record of the old file becomes in the new one.
struct Copied {
    seq: u64,
    record: Record,
    life: Life,
    /// Whose vector it has, and the vector.
    vector: Option<(u32, Vector)>,
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
        let old = View { txn: &txn, seal: &open.seal };
        let counters = read_counters(&txn)?;
        let seal = Seal::new(&key.secret);
        let mut writer = Writer::begin(next, &seal, open.row.store, open.row.identity.owner_id, &counters)?;
        let (lives, coarse, fine) = (txn.open_table(LIFE)?, txn.open_table(COARSE)?, txn.open_table(FINE)?);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for row in txn.open_table(RECORD)?.iter()? {
            let (seq, row) = row?;
            let seq = seq.value();
            let life = lives.get(seq)?.ok_or(Damage::RecordMissing { seq })?;
            let vector = match (coarse.get(seq)?, fine.get(seq)?) {
                (Some(first), Some(second)) => {
                    let (number, first) = first.value();
                    let (place, damage) = (seq.to_be_bytes(), || Damage::Vector { seq });
                    let first = old.seal.open(Row::Coarse, &place, first, &mut a).ok_or_else(damage)?;
                    let second =
                        old.seal.open(Row::Fine, &place, second.value(), &mut b).ok_or_else(damage)?;
                    Some((number, Vector::of_stored(first, second).ok_or_else(damage)?))
                }
                _ => None,
            };
            let life = Life::from_bytes(seq, life.value())?;
            writer.add(Copied { seq, record: decode(old.seal, seq, row.value())?, life, vector })?;
        }
        writer.finish(IdentityRow { key: key.id, words: WORDS_VERSION, ..open.row }, |batch| {
            copy_what_is_not_sealed(&txn, batch)?;
            for row in txn.open_table(JOURNAL)?.iter()? {
                let (number, row) = row?;
                batch.put_entry(number.value(), entry(old, number.value(), row.value())?)?;
            }
            for block in blocks(old)? {
                batch.put_block(&block)?;
            }
            (batch.counters.blocks, batch.counters.block_bytes) = (counters.blocks, counters.block_bytes);
            batch.note_rewritten(now_unix_ms, counters.purged)
        })
    };
    copy().map_err(|error| open_error(path, error))
}

fn copy_what_is_not_sealed(txn: &ReadTransaction, batch: &mut Batch<'_>) -> Result<(), StoreError> {
    let records = txn.open_table(RECORD)?;
    for row in txn.open_table(ONCE)?.iter()? {
        let (key, row) = row?;
        let (used, seq, _) = row.value();
        if records.get(seq)?.is_some() {
            // The request's hash was made with the old key: zeros mean that the record itself is compared.
            batch.once.insert(key.value(), (used, seq, &[0; 16]))?;
        }
    }
    for row in txn.open_table(LINK)?.iter()? {
        batch.link.insert(row?.0.value(), ())?;
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
                let (seq, vector) = (copied.seq, copied.vector);
                let current = vector.as_ref().filter(|(number, _)| *number == self.old.embedder);
                batch.put(seq, &copied.record, copied.life, current.map(|(_, vector)| vector))?;
                // A vector of an earlier embedder: the record waits, and going back finds it.
                if let Some((number, vector)) = vector.filter(|(number, _)| *number != self.old.embedder) {
                    batch.put_vector(seq, number, &vector)?;
                }
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

/// Tables of format 1 that format 2 has no longer, or has otherwise.
mod first {
    use super::TableDefinition;

    pub(super) const VECTOR: TableDefinition<u64, (u32, &[u8])> = TableDefinition::new("vector");
    pub(super) const ONCE: TableDefinition<&str, (i64, u64)> = TableDefinition::new("once");
}

/// A store of format 1, whose rows were not sealed.
pub(crate) fn from_first_format(
    old: &Database,
    next: &Database,
    key: &StoreKey,
    path: &Path,
) -> Result<(), OpenError> {
    let copy = || {
        let txn = old.begin_read()?;
        let row = first_identity(&txn, key)?;
        let counters = first_counters(&txn)?;
        let seal = Seal::new(&key.secret);
        let mut writer = Writer::begin(next, &seal, row.store, row.identity.owner_id, &counters)?;
        let vectors = txn.open_table(first::VECTOR)?;
        for one in txn.open_table(RECORD)?.iter()? {
            let (seq, bytes) = one?;
            let seq = seq.value();
            let (record, life) = first_record(seq, bytes.value())?;
            let vector = match vectors.get(seq)? {
                None => None,
                Some(stored) => {
                    let (number, bytes) = stored.value();
                    Some((number, first_vector(bytes).ok_or(Damage::Vector { seq })?))
                }
            };
            writer.add(Copied { seq, record, life, vector })?;
        }
        writer.finish(row, |batch| {
            for one in txn.open_table(EMBEDDER)?.iter()? {
                let (number, one) = one?;
                let (digest, dimension) = one.value();
                batch.put_embedder(number.value(), digest, dimension)?;
            }
            for one in txn.open_table(first::ONCE)?.iter()? {
                let (name, one) = one?;
                let (used, seq) = one.value();
                batch.take_over_key(name.value(), used, seq)?;
            }
            Ok(())
        })
    };
    copy().map_err(|error| open_error(path, error))
}

/// Whose store of format 1 it is.
pub(crate) fn first_agent(identity: &[u8]) -> Result<AgentId, Damage> {
    let bytes: &[u8; 56] = identity.try_into().map_err(|_| Damage::Meta(IDENTITY))?;
    Ok(AgentId(Uuid::from_bytes(std::array::from_fn(|i| bytes[24 + i]))))
}

/// Format 1: `identity` of 56 bytes, without a key.
fn first_identity(txn: &ReadTransaction, key: &StoreKey) -> Result<IdentityRow, StoreError> {
    let meta = txn.open_table(META)?;
    let row = meta.get(IDENTITY)?.ok_or(Damage::Meta(IDENTITY))?;
    let bytes: &[u8; 56] = row.value().try_into().map_err(|_| Damage::Meta(IDENTITY))?;
    let uuid = |at: usize| Uuid::from_bytes(std::array::from_fn(|i| bytes[at + i]));
    Ok(IdentityRow {
        format: FORMAT_VERSION,
        words: WORDS_VERSION,
        store: uuid(8),
        identity: Identity { agent_id: AgentId(uuid(24)), owner_id: OwnerId(uuid(40)) },
        key: key.id,
    })
}

/// Format 1: twenty numbers.
fn first_counters(txn: &ReadTransaction) -> Result<Counters, StoreError> {
    let meta = txn.open_table(META)?;
    let row = meta.get(crate::tables::COUNTERS)?.ok_or(Damage::Meta(crate::tables::COUNTERS))?;
    let bytes: &[u8; 160] = row.value().try_into().map_err(|_| Damage::Meta(crate::tables::COUNTERS))?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at * 8 + i]));
    let tiers = std::array::from_fn(|tier| TierCounts {
        records: number(5 + tier * 3),
        bytes: number(6 + tier * 3),
        words: number(7 + tier * 3),
        ..TierCounts::default()
    });
    Ok(Counters {
        commits: number(0),
        next_seq: number(1),
        embedder: number(2) as u32,
        vectors: number(3),
        pending: number(4),
        tiers,
        ..Counters::default()
    })
}

/// Format 1: version, tier, role, source; id; owner; two times; two lengths; reference, text; CRC-32.
fn first_record(seq: u64, bytes: &[u8]) -> Result<(Record, Life), StoreError> {
    let damage = |why: &str| Damage::Record { seq, why: why.to_owned() };
    let (body, crc) = bytes.split_last_chunk::<4>().ok_or_else(|| damage("short"))?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return Err(damage("its checksum does not match").into());
    }
    let read = |mut rest: &[u8]| {
        let rest = &mut rest;
        let [version, tier, role, source] = take::<4>(rest)?;
        let (id, owner) = (Uuid::from_bytes(take(rest)?), Uuid::from_bytes(take(rest)?));
        let (event, recorded) = (i64::from_le_bytes(take(rest)?), i64::from_le_bytes(take(rest)?));
        let reference = u16::from_le_bytes(take(rest)?);
        let text = u32::from_le_bytes(take(rest)?) as usize;
        let reference = match reference {
            u16::MAX => None,
            length => Some(take_text(rest, usize::from(length))?),
        };
        let text = take_text(rest, text)?;
        Ok::<_, crate::record::BadRecord>((
            [version, tier, role, source],
            id,
            owner,
            event,
            recorded,
            reference,
            text,
        ))
    };
    let (codes, id, owner, event, recorded, reference, text) =
        read(body).map_err(|e| damage(&e.to_string()))?;
    let [version, tier, role, source] = codes;
    if version != 1 {
        return Err(damage("its layout is not that of format 1").into());
    }
    let tier = tier_from_code(tier).ok_or_else(|| damage("tier"))?;
    let role = Role::from_code(role).ok_or_else(|| damage("role"))?;
    let source = SourceKind::from_code(source).ok_or_else(|| damage("source"))?;
    let record = Record {
        id: RecordId(id),
        owner: OwnerId(owner),
        reference,
        session: None,
        claim: None,
        supersedes: None,
        evidence: Vec::new(),
        text,
    };
    let life = Life {
        tier,
        role,
        source,
        state: State::Live,
        before: State::Live,
        pinned: false,
        trust: trust::of(source),
        words: 0,
        uses: 0,
        strength: decay::FIRST_STRENGTH,
        half_life_days: decay::half_life_days(role),
        event_unix_ms: event,
        recorded_unix_ms: recorded,
        valid_from_unix_ms: event,
        valid_to_unix_ms: OPEN_END,
        last_used_unix_ms: recorded,
        changed_unix_ms: 0,
        session: 0,
        order: 0,
        bytes: 0,
        told: None,
    };
    Ok((record, life))
}

/// Format 1: scale (f32), d numbers of 8 bits, d floats of 16 bits; the floats are the vector.
fn first_vector(bytes: &[u8]) -> Option<Vector> {
    let dimension = bytes.len().checked_sub(4)? / 3;
    let floats = bytes.get(4 + dimension..)?;
    let values: Vec<f32> =
        floats.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
    Vector::new(&values, u32::try_from(dimension).ok()?).ok()
}
