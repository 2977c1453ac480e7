//! How does a store of format 1 become one of this format? Its rows were not sealed.

use super::{Copied, Writer};
use crate::error::{Damage, OpenError, StoreError};
use crate::file::open_error;
use crate::forget::{decay, trust};
use crate::key::StoreKey;
use crate::life::{Life, OPEN_END, State};
use crate::record::{Record, Role, SourceKind, take, take_text, tier_from_code};
use crate::rows::StoredVector;
use crate::seal::Seal;
use crate::tables::{Counters, EMBEDDER, FORMAT_VERSION, IDENTITY, Identity, IdentityRow, META, TierCounts};
use crate::text::WORDS_VERSION;
use crate::vector::{Parts, Vector};
use agentd_domain::ids::{AgentId, OwnerId, RecordId};
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use std::path::Path;
use uuid::Uuid;

const RECORD: TableDefinition<u64, &[u8]> = TableDefinition::new("record");
const VECTOR: TableDefinition<u64, (u32, &[u8])> = TableDefinition::new("vector");
const ONCE: TableDefinition<&str, (i64, u64)> = TableDefinition::new("once");

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
        let vectors = txn.open_table(VECTOR)?;
        for one in txn.open_table(RECORD)?.iter()? {
            let (seq, bytes) = one?;
            let seq = seq.value();
            let (record, life) = first_record(seq, bytes.value())?;
            let vector = match vectors.get(seq)? {
                None => None,
                Some(stored) => {
                    let (embedder, bytes) = stored.value();
                    let Parts { first, fine } =
                        first_vector(bytes).ok_or(Damage::Vector { seq })?.parts().clone();
                    Some(StoredVector { embedder, first, fine })
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
            for one in txn.open_table(ONCE)?.iter()? {
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
