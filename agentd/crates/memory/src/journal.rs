//! What was forgotten, when and why?
//!
//! In:    an [`Entry`]. Out: the content of a sealed row of the table `journal`, and back.
//! Always: written in the transaction of what it tells. It names records and never holds their words, so that it
//!         can outlive them: of a purged record it is all that is left.

use crate::error::Damage;
use crate::record::{tier_code, tier_from_code};
use agentd_domain::agent_api::Tier;
use agentd_domain::ids::RecordId;
use uuid::Uuid;

/// Newest entries that are kept; 64 bytes and a seal each, so about 6 MiB.
pub(crate) const KEPT: u64 = 50_000;

macro_rules! told {
    ($(#[$doc:meta])* $name:ident { $($(#[$each:meta])* $variant:ident = $code:literal, $text:literal;)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$each])* $variant,)+ }

        impl $name {
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            fn code(self) -> u8 {
                match self { $(Self::$variant => $code,)+ }
            }

            fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

told!(
    /// What happened to a record.
    Deed {
        /// From the log of a run to the long memory: `other` is the new record, `number` its salience.
        Promoted = 0, "promoted";
        /// Told again: `id` is the one that stays, strengthened; `number` the cosine.
        Repeated = 1, "repeated";
        /// Its interval was closed: `other` is the one that holds now.
        Superseded = 2, "superseded";
        /// It stands again.
        Reopened = 3, "reopened";
        /// Restorable.
        Forgotten = 4, "forgotten";
        Restored = 5, "restored";
        /// Gone for good.
        Purged = 6, "purged";
        Pinned = 7, "pinned";
        Unpinned = 8, "unpinned";
        /// A block of the prompt made room: `other` is the record that holds its text now.
        Demoted = 9, "demoted";
        /// The file was written anew under another key and the old one destroyed; `number` is how many were purged.
        Rewritten = 10, "rewritten";
    }
);

told!(
    /// Why it happened.
    Why {
        Asked = 0, "asked";
        /// The budget was full and it was least present; `number` is how present.
        Budget = 1, "budget";
        /// The room of its tombstone was needed before seven days were over.
        Room = 2, "room";
        /// Seven days after it was forgotten.
        TimeOver = 3, "time_over";
        /// A day after its run ended.
        RunOver = 4, "run_over";
        /// A later claim about the same thing.
        LaterClaim = 5, "later_claim";
        Corrected = 6, "corrected";
        /// Everything of its source was taken back.
        SourceRolledBack = 7, "source_rolled_back";
        /// What it rested on is gone.
        EvidenceGone = 8, "evidence_gone";
        /// Both gates: words and meaning are one.
        Duplicate = 9, "duplicate";
        /// Salient enough.
        Salient = 10, "salient";
    }
);

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    pub at_unix_ms: i64,
    pub deed: Deed,
    pub why: Why,
    pub tier: Tier,
    pub id: RecordId,
    pub other: Option<RecordId>,
    /// What the deed was decided by; 0 where it says nothing.
    pub number: f32,
}

const ENTRY_BYTES: usize = 8 + 4 + 4 + 16 + 16;

impl Entry {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(ENTRY_BYTES);
        out.extend(self.at_unix_ms.to_le_bytes());
        out.extend([self.deed.code(), self.why.code(), tier_code(self.tier), 0]);
        out.extend(self.number.to_le_bytes());
        out.extend(self.id.0.as_bytes());
        out.extend(self.other.map(|id| id.0).unwrap_or_default().as_bytes());
        out
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, Damage> {
        let damage = || Damage::Journal;
        let row: &[u8; ENTRY_BYTES] = bytes.try_into().map_err(|_| damage())?;
        let uuid = |at: usize| RecordId(Uuid::from_bytes(std::array::from_fn(|i| row[at + i])));
        Ok(Self {
            at_unix_ms: i64::from_le_bytes(std::array::from_fn(|i| row[i])),
            deed: Deed::from_code(row[8]).ok_or_else(damage)?,
            why: Why::from_code(row[9]).ok_or_else(damage)?,
            tier: tier_from_code(row[10]).ok_or_else(damage)?,
            number: f32::from_le_bytes(std::array::from_fn(|i| row[12 + i])),
            id: uuid(16),
            other: Some(uuid(32)).filter(|id| !id.0.is_nil()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_back() {
        for (deed, why) in (0..=10).map(|c| (Deed::from_code(c).unwrap(), Why::from_code(c).unwrap())) {
            let id = |n| RecordId(Uuid::from_u128(n));
            let other = (deed.code() % 2 == 0).then(|| id(8));
            let entry =
                Entry { at_unix_ms: -5, deed, why, tier: Tier::Spirit, id: id(7), other, number: 0.25 };
            assert_eq!(Entry::from_bytes(&entry.to_bytes()).unwrap(), entry);
            assert!(Entry::from_bytes(&entry.to_bytes()[1..]).is_err());
        }
    }
}
