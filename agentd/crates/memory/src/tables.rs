//! Which tables does a store have, and what stands in its meta rows? FORMAT.md is the page for people.
//!
//! Always: a change to any of these tables happens in the same transaction as the counters that describe it.

use crate::error::Damage;
use crate::record::TIERS;
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::{AgentId, OwnerId};
use redb::TableDefinition;
use uuid::Uuid;

/// Raised when an older program would misread the file; see FORMAT.md for the migration rule.
pub const FORMAT_VERSION: u32 = 1;

/// `identity` and `counters`.
pub(crate) const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// Sequence number, given in order of commit, to an encoded [`crate::record::Record`].
pub(crate) const RECORD: TableDefinition<u64, &[u8]> = TableDefinition::new("record");
/// Record id (its 16 bytes as a big-endian number) to sequence number.
pub(crate) const BY_ID: TableDefinition<u128, u64> = TableDefinition::new("by_id");
/// Sequence number to what ranking needs of every record: tier code, words in it.
pub(crate) const RANK: TableDefinition<u64, (u8, u32)> = TableDefinition::new("rank");
/// Sequence number to embedder number and [`crate::vector::Vector::to_bytes`].
pub(crate) const VECTOR: TableDefinition<u64, (u32, &[u8])> = TableDefinition::new("vector");
/// Records of a tier with meaning that have no vector of the current embedder.
pub(crate) const PENDING: TableDefinition<u64, ()> = TableDefinition::new("pending");
/// [`crate::postings::key`] to an encoded block.
pub(crate) const POSTING: TableDefinition<&[u8], &[u8]> = TableDefinition::new("posting");
/// Embedder number to digest (SHA-256 of its file) and dimension.
pub(crate) const EMBEDDER: TableDefinition<u32, (&[u8; 32], u32)> = TableDefinition::new("embedder");
/// Idempotency key to when it was used (Unix milliseconds) and the sequence number it led to.
pub(crate) const ONCE: TableDefinition<&str, (i64, u64)> = TableDefinition::new("once");

pub(crate) const IDENTITY: &str = "identity";
pub(crate) const COUNTERS: &str = "counters";

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
}

impl IdentityRow {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(56);
        out.extend_from_slice(&self.format.to_le_bytes());
        out.extend_from_slice(&self.words.to_le_bytes());
        out.extend_from_slice(self.store.as_bytes());
        out.extend_from_slice(self.identity.agent_id.0.as_bytes());
        out.extend_from_slice(self.identity.owner_id.0.as_bytes());
        out
    }

    /// The format version of a row whose remainder may be of a later layout.
    pub(crate) fn format_of(bytes: &[u8]) -> Result<u32, Damage> {
        bytes.first_chunk().map(|b| u32::from_le_bytes(*b)).ok_or(Damage::Meta(IDENTITY))
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, Damage> {
        let bytes: &[u8; 56] = bytes.try_into().map_err(|_| Damage::Meta(IDENTITY))?;
        let uuid = |at: usize| Uuid::from_slice(&bytes[at..at + 16]).map_err(|_| Damage::Meta(IDENTITY));
        Ok(Self {
            format: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            words: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            store: uuid(8)?,
            identity: Identity { agent_id: AgentId(uuid(24)?), owner_id: OwnerId(uuid(40)?) },
        })
    }
}

/// What one tier holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierCounts {
    pub records: u64,
    /// Sum of the encoded records: text plus about 62 bytes each.
    pub bytes: u64,
    /// Words without stop words: BM25's average length comes from it.
    pub words: u64,
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
        numbers.extend(self.tiers.iter().flat_map(|t| [t.records, t.bytes, t.words]));
        numbers.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, Damage> {
        let damage = || Damage::Meta(COUNTERS);
        let numbers: Vec<u64> = bytes
            .chunks(8)
            .map(|c| c.try_into().map(u64::from_le_bytes))
            .collect::<Result<_, _>>()
            .map_err(|_| damage())?;
        let [commits, next_seq, embedder, vectors, pending, tiers @ ..] = numbers.as_slice() else {
            return Err(damage());
        };
        if tiers.len() != TIERS.len() * 3 {
            return Err(damage());
        }
        let mut counters = Self {
            commits: *commits,
            next_seq: *next_seq,
            embedder: u32::try_from(*embedder).map_err(|_| damage())?,
            vectors: *vectors,
            pending: *pending,
            tiers: [TierCounts::default(); 5],
        };
        for (tier, row) in counters.tiers.iter_mut().zip(tiers.chunks_exact(3)) {
            *tier = TierCounts { records: row[0], bytes: row[1], words: row[2] };
        }
        Ok(counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_rows_come_back() {
        let identity =
            Identity { agent_id: AgentId(Uuid::from_u128(5)), owner_id: OwnerId(Uuid::from_u128(6)) };
        let row = IdentityRow { format: 1, words: 1, store: Uuid::from_u128(7), identity };
        assert_eq!(IdentityRow::from_bytes(&row.to_bytes()).unwrap(), row);
        assert!(IdentityRow::from_bytes(&row.to_bytes()[1..]).is_err());

        let mut counters =
            Counters { commits: 1, next_seq: 2, embedder: 3, vectors: 4, pending: 5, ..Counters::default() };
        *counters.tier_mut(Tier::Spirit) = TierCounts { records: 6, bytes: 7, words: 8 };
        assert_eq!(Counters::from_bytes(&counters.to_bytes()).unwrap(), counters);
        for end in 0..counters.to_bytes().len() {
            assert!(Counters::from_bytes(&counters.to_bytes()[..end]).is_err());
        }
    }
}
