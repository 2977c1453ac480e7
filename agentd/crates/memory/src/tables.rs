//! Which tables does a store have, and what stands in its meta rows? FORMAT.md is the page for people. The four
//! tables of what stands under a record's number are in `pack.rs`.
//!
//! Always: a change to any of these tables happens in the same transaction as the counters that describe it.

use crate::error::Damage;
use crate::pack::Entries;
use crate::record::TIERS;
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::{AgentId, OwnerId};
use redb::TableDefinition;
use uuid::Uuid;

/// Raised when an older program would misread the file; see FORMAT.md for the migration rule.
pub const FORMAT_VERSION: u32 = 3;

/// `identity`, `canary`, `counters`, `entries` and `words`.
pub(crate) const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// Record id (its 16 bytes as a big-endian number) to sequence number.
pub(crate) const BY_ID: TableDefinition<u128, u64> = TableDefinition::new("by_id");
/// Records of a tier with meaning that have no vector of the current embedder.
pub(crate) const PENDING: TableDefinition<u64, ()> = TableDefinition::new("pending");
/// [`crate::postings::key`] to a sealed block.
pub(crate) const POSTING: TableDefinition<&[u8], &[u8]> = TableDefinition::new("term_block");
/// Embedder number to digest (SHA-256 of its file) and dimension.
pub(crate) const EMBEDDER: TableDefinition<u32, (&[u8; 32], u32)> = TableDefinition::new("embedder");
/// 16 bytes of the hash of an idempotency key to when it was used, the sequence number it led to and a keyed hash
/// of the request (zeros: not known, compare with the record).
pub(crate) const ONCE: TableDefinition<&[u8; 16], (i64, u64, &[u8; 16])> = TableDefinition::new("once");
/// Keyed hash of subject and predicate, and a sequence number (big-endian): which records make this claim.
pub(crate) const CLAIM: TableDefinition<&[u8], ()> = TableDefinition::new("claim");
/// A record, [`LINK_SUPERSEDED`] or [`LINK_EVIDENCE`], and the record that took its place or rests on it.
pub(crate) const LINK: TableDefinition<(u64, u8, u64), ()> = TableDefinition::new("link");
/// 8 bytes of the hash of a session's name to its next place and when it ended (Unix ms; 0: it goes on).
pub(crate) const SESSION: TableDefinition<u64, (u64, i64)> = TableDefinition::new("session");
/// Keyed hash of a block's name to the sealed block.
pub(crate) const BLOCK: TableDefinition<&[u8; 16], &[u8]> = TableDefinition::new("block");
/// Number, from 0, to a sealed [`crate::journal::Entry`].
pub(crate) const JOURNAL: TableDefinition<u64, &[u8]> = TableDefinition::new("journal");

/// Mark of a term to its sealed vector (`vocabulary.rs`).
pub(crate) const WORD: TableDefinition<&[u8; 16], &[u8]> = TableDefinition::new("word");

pub(crate) const LINK_SUPERSEDED: u8 = 0;
pub(crate) const LINK_EVIDENCE: u8 = 1;
/// The first's text is in the second's vector; the second may be gone.
pub(crate) const LINK_WINDOW: u8 = 2;

pub(crate) const IDENTITY: &str = "identity";
pub(crate) const COUNTERS: &str = "counters";
/// How many entries the tables of blocks hold: redb knows only how many blocks.
pub(crate) const ENTRIES: &str = "entries";
/// How far the texts were read for words that want a vector.
pub(crate) const VOCABULARY: &str = "words";
/// Sealed nothing: opens only with the store's own key.
pub(crate) const CANARY: &str = "canary";

/// Whose store is this? Checked at every opening, so that a file moved to another agent is not read as its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub agent_id: AgentId,
    pub owner_id: OwnerId,
}

/// The first row that is read: the version must be understood before anything else is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IdentityRow {
    pub(crate) format: u32,
    pub(crate) words: u32,
    pub(crate) store: Uuid,
    pub(crate) identity: Identity,
    /// Which key file the rows are sealed with.
    pub(crate) key: Uuid,
}

impl IdentityRow {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(72);
        out.extend_from_slice(&self.format.to_le_bytes());
        out.extend_from_slice(&self.words.to_le_bytes());
        out.extend_from_slice(self.store.as_bytes());
        out.extend_from_slice(self.identity.agent_id.0.as_bytes());
        out.extend_from_slice(self.identity.owner_id.0.as_bytes());
        out.extend_from_slice(self.key.as_bytes());
        out
    }

    /// The format version of a row whose remainder may be of a later layout.
    pub(crate) fn format_of(bytes: &[u8]) -> Result<u32, Damage> {
        bytes.first_chunk().map(|b| u32::from_le_bytes(*b)).ok_or(Damage::Meta(IDENTITY))
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, Damage> {
        let bytes: &[u8; 72] = bytes.try_into().map_err(|_| Damage::Meta(IDENTITY))?;
        let uuid = |at: usize| Uuid::from_slice(&bytes[at..at + 16]).map_err(|_| Damage::Meta(IDENTITY));
        Ok(Self {
            format: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            words: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            store: uuid(8)?,
            identity: Identity { agent_id: AgentId(uuid(24)?), owner_id: OwnerId(uuid(40)?) },
            key: uuid(56)?,
        })
    }
}

/// What one tier holds, tombstones included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierCounts {
    pub records: u64,
    /// Sum of the encoded records: text plus 51 bytes and more.
    pub bytes: u64,
    /// Words without stop words.
    pub words: u64,
    /// Tombstones among the records ..
    pub forgotten: u64,
    /// .. and their bytes.
    pub forgotten_bytes: u64,
}

/// What the file says of itself; changes in the same transaction as the rows it counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Transactions committed since the store's birth: after a reopening it must not be smaller than before.
    pub commits: u64,
    pub next_seq: u64,
    /// 0: no embedder was ever named.
    pub embedder: u32,
    pub vectors: u64,
    pub pending: u64,
    /// The number of the next entry of the journal.
    pub next_entry: u64,
    /// Records that are gone for good since the file was written under its key.
    pub purged: u64,
    /// When the first of them went, by the clock of whoever asked; 0: none.
    pub first_purged_unix_ms: i64,
    /// Bytes of all blocks, and how many.
    pub block_bytes: u64,
    pub blocks: u64,
    pub tiers: [TierCounts; 5],
}

impl Counters {
    pub fn tier(&self, tier: Tier) -> TierCounts {
        self.tiers[usize::from(crate::record::tier_code(tier))]
    }

    pub(crate) fn tier_mut(&mut self, tier: Tier) -> &mut TierCounts {
        &mut self.tiers[usize::from(crate::record::tier_code(tier))]
    }

    pub fn records(&self) -> u64 {
        self.tiers.iter().map(|t| t.records).sum()
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut numbers =
            vec![self.commits, self.next_seq, u64::from(self.embedder), self.vectors, self.pending];
        numbers.extend([self.next_entry, self.purged, self.first_purged_unix_ms as u64]);
        numbers.extend([self.block_bytes, self.blocks]);
        let rows = self.tiers.iter();
        numbers.extend(rows.flat_map(|t| [t.records, t.bytes, t.words, t.forgotten, t.forgotten_bytes]));
        numbers.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, Damage> {
        let damage = || Damage::Meta(COUNTERS);
        let numbers: Vec<u64> = bytes
            .chunks(8)
            .map(|c| c.try_into().map(u64::from_le_bytes))
            .collect::<Result<_, _>>()
            .map_err(|_| damage())?;
        let [commits, next_seq, embedder, vectors, pending, next_entry, purged, first, blocks @ ..] =
            numbers.as_slice()
        else {
            return Err(damage());
        };
        let [block_bytes, blocks, tiers @ ..] = blocks else { return Err(damage()) };
        if tiers.len() != TIERS.len() * 5 {
            return Err(damage());
        }
        let mut counters = Self {
            commits: *commits,
            next_seq: *next_seq,
            embedder: u32::try_from(*embedder).map_err(|_| damage())?,
            vectors: *vectors,
            pending: *pending,
            next_entry: *next_entry,
            purged: *purged,
            first_purged_unix_ms: *first as i64,
            block_bytes: *block_bytes,
            blocks: *blocks,
            tiers: [TierCounts::default(); 5],
        };
        for (tier, row) in counters.tiers.iter_mut().zip(tiers.chunks_exact(5)) {
            let [records, bytes, words, forgotten, forgotten_bytes] = std::array::from_fn(|i| row[i]);
            *tier = TierCounts { records, bytes, words, forgotten, forgotten_bytes };
        }
        Ok(counters)
    }
}

pub(crate) fn entries_to_bytes(entries: &Entries) -> [u8; 32] {
    let mut out = [0; 32];
    for (to, count) in out.chunks_exact_mut(8).zip(entries) {
        to.copy_from_slice(&count.to_le_bytes());
    }
    out
}

pub(crate) fn entries_from_bytes(bytes: &[u8]) -> Result<Entries, Damage> {
    let bytes: &[u8; 32] = bytes.try_into().map_err(|_| Damage::Meta(ENTRIES))?;
    Ok(std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|b| bytes[8 * i + b]))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_rows_come_back() {
        let identity =
            Identity { agent_id: AgentId(Uuid::from_u128(5)), owner_id: OwnerId(Uuid::from_u128(6)) };
        let row =
            IdentityRow { format: 1, words: 1, store: Uuid::from_u128(7), identity, key: Uuid::from_u128(9) };
        assert_eq!(IdentityRow::from_bytes(&row.to_bytes()).unwrap(), row);
        assert!(IdentityRow::from_bytes(&row.to_bytes()[1..]).is_err());

        let mut counters =
            Counters { commits: 1, next_seq: 2, embedder: 3, vectors: 4, pending: 5, ..Counters::default() };
        *counters.tier_mut(Tier::Spirit) =
            TierCounts { records: 6, bytes: 7, words: 8, forgotten: 9, forgotten_bytes: 10 };
        assert_eq!(Counters::from_bytes(&counters.to_bytes()).unwrap(), counters);
        for end in 0..counters.to_bytes().len() {
            assert!(Counters::from_bytes(&counters.to_bytes()[..end]).is_err());
        }
    }
}
