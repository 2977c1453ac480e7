//! How does one record look on disk?
//!
//! In:    a [`Record`]. Out: the bytes of a value of the table `record`, and back. FORMAT.md lists them byte by
//!        byte. An own layout and not JSON: it is a third smaller, its size is known before it is written
//!        (quotas count it), and a reader of another version notices at the first byte.
//! Always: the last four bytes are the CRC-32 of all before; redb's own checksums are looked at only when it
//!        repairs a file, so a flipped bit would otherwise reach an agent as its memory.

use agentd_domain::agent_api::{Source, Tier};
use agentd_domain::ids::{OwnerId, RecordId};
use uuid::Uuid;

/// The first byte of every record. Raised when the layout changes; older layouts stay readable.
pub(crate) const RECORD_VERSION: u8 = 1;

/// version, tier, role, source kind; id; owner; event, recorded; two lengths. Then reference, text, CRC.
const HEAD_BYTES: usize = 4 + 16 + 16 + 8 + 8 + 2 + 4;
const CRC_BYTES: usize = 4;
/// No reference, as opposed to an empty one.
const NO_REFERENCE: u16 = u16::MAX;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) id: RecordId,
    pub(crate) owner: OwnerId,
    pub(crate) tier: Tier,
    pub(crate) role: Role,
    pub(crate) source: SourceKind,
    pub(crate) reference: Option<String>,
    pub(crate) event_unix_ms: i64,
    pub(crate) recorded_unix_ms: i64,
    pub(crate) text: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRecord {
    #[error("its layout is version {found}, this program reads up to {RECORD_VERSION}")]
    Version { found: u8 },
    #[error("its checksum does not match")]
    Checksum,
    #[error("it is malformed: {0}")]
    Malformed(&'static str),
}

/// A closed set with a name for people and a byte for the disk. Bytes are never given a second meaning.
macro_rules! coded {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $code:literal, $text:literal;)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($variant,)+ }

        impl $name {
            pub const NAMES: &'static [&'static str] = &[$($text,)+];

            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$variant),)+ _ => None }
            }

            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            pub(crate) fn code(self) -> u8 {
                match self { $(Self::$variant => $code,)+ }
            }

            pub(crate) fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

coded!(
    /// What kind of memory a record is.
    Role {
        Event = 0, "event";
        Fact = 1, "fact";
        Preference = 2, "preference";
        Procedure = 3, "procedure";
        Identity = 4, "identity";
    }
);

coded!(
    /// Who said it first. Trust follows from it.
    SourceKind {
        User = 0, "user";
        Agent = 1, "agent";
        Tool = 2, "tool";
        Web = 3, "web";
        Recall = 4, "recall";
    }
);

pub(crate) const TIERS: [Tier; 5] =
    [Tier::Working, Tier::Active, Tier::Spirit, Tier::Codegraph, Tier::Knowledge];

pub(crate) fn tier_code(tier: Tier) -> u8 {
    match tier {
        Tier::Working => 0,
        Tier::Active => 1,
        Tier::Spirit => 2,
        Tier::Codegraph => 3,
        Tier::Knowledge => 4,
    }
}

pub(crate) fn tier_from_code(code: u8) -> Option<Tier> {
    TIERS.get(usize::from(code)).copied()
}

impl Record {
    /// What the record takes on disk as a value; quotas count this.
    pub(crate) fn encoded_bytes(&self) -> u64 {
        (HEAD_BYTES + self.reference.as_ref().map_or(0, String::len) + self.text.len() + CRC_BYTES) as u64
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_bytes() as usize);
        out.extend_from_slice(&[RECORD_VERSION, tier_code(self.tier), self.role.code(), self.source.code()]);
        out.extend_from_slice(self.id.0.as_bytes());
        out.extend_from_slice(self.owner.0.as_bytes());
        out.extend_from_slice(&self.event_unix_ms.to_le_bytes());
        out.extend_from_slice(&self.recorded_unix_ms.to_le_bytes());
        // The limits of plan.rs keep both lengths far below what their fields hold.
        let reference = self.reference.as_deref().map_or(NO_REFERENCE, |r| r.len() as u16);
        out.extend_from_slice(&reference.to_le_bytes());
        out.extend_from_slice(&(self.text.len() as u32).to_le_bytes());
        out.extend_from_slice(self.reference.as_deref().unwrap_or_default().as_bytes());
        out.extend_from_slice(self.text.as_bytes());
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, BadRecord> {
        // The version first: a later layout may keep its checksum elsewhere.
        match bytes.first() {
            Some(&RECORD_VERSION) => {}
            Some(&found) => return Err(BadRecord::Version { found }),
            None => return Err(BadRecord::Malformed("empty")),
        }
        let (body, crc) = bytes.split_last_chunk::<CRC_BYTES>().ok_or(BadRecord::Malformed("short"))?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return Err(BadRecord::Checksum);
        }
        let mut rest = body;
        let [_, tier, role, source] = take::<4>(&mut rest)?;
        let id = RecordId(Uuid::from_bytes(take(&mut rest)?));
        let owner = OwnerId(Uuid::from_bytes(take(&mut rest)?));
        let event_unix_ms = i64::from_le_bytes(take(&mut rest)?);
        let recorded_unix_ms = i64::from_le_bytes(take(&mut rest)?);
        let reference_bytes = u16::from_le_bytes(take(&mut rest)?);
        let text_bytes = u32::from_le_bytes(take(&mut rest)?) as usize;
        let reference = match reference_bytes {
            NO_REFERENCE => None,
            length => Some(take_text(&mut rest, usize::from(length))?),
        };
        let text = take_text(&mut rest, text_bytes)?;
        if !rest.is_empty() {
            return Err(BadRecord::Malformed("bytes after the text"));
        }
        Ok(Self {
            id,
            owner,
            tier: tier_from_code(tier).ok_or(BadRecord::Malformed("tier"))?,
            role: Role::from_code(role).ok_or(BadRecord::Malformed("role"))?,
            source: SourceKind::from_code(source).ok_or(BadRecord::Malformed("source"))?,
            reference,
            event_unix_ms,
            recorded_unix_ms,
            text,
        })
    }

    pub(crate) fn source(&self) -> Source {
        Source { kind: self.source.name().to_owned(), reference: self.reference.clone() }
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], BadRecord> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(BadRecord::Malformed("short"))?;
    *rest = tail;
    Ok(*head)
}

fn take_text(rest: &mut &[u8], length: usize) -> Result<String, BadRecord> {
    let (head, tail) = rest.split_at_checked(length).ok_or(BadRecord::Malformed("short"))?;
    *rest = tail;
    String::from_utf8(head.to_vec()).map_err(|_| BadRecord::Malformed("text is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_record() -> impl Strategy<Value = Record> {
        (
            any::<u128>(),
            any::<u128>(),
            0usize..5,
            0u8..5,
            0u8..5,
            proptest::option::of(".{0,40}"),
            any::<i64>(),
            any::<i64>(),
            ".{0,300}",
        )
            .prop_map(|(id, owner, tier, role, source, reference, event, recorded, text)| Record {
                id: RecordId(Uuid::from_u128(id)),
                owner: OwnerId(Uuid::from_u128(owner)),
                tier: TIERS[tier],
                role: Role::from_code(role).unwrap(),
                source: SourceKind::from_code(source).unwrap(),
                reference,
                event_unix_ms: event,
                recorded_unix_ms: recorded,
                text,
            })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(record in any_record()) {
            let bytes = record.to_bytes();
            prop_assert_eq!(bytes.len() as u64, record.encoded_bytes());
            prop_assert_eq!(Record::from_bytes(&bytes).unwrap(), record);
        }

        #[test]
        fn one_flipped_bit_is_noticed(record in any_record(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = record.to_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Record::from_bytes(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Record::from_bytes(&bytes).is_err());
        }
    }

    #[test]
    fn a_later_layout_is_named() {
        assert_eq!(Record::from_bytes(&[9, 0, 0]), Err(BadRecord::Version { found: 9 }));
    }

    #[test]
    fn the_layout_is_the_one_of_the_format_page() {
        let record = Record {
            id: RecordId(Uuid::from_u128(1)),
            owner: OwnerId(Uuid::from_u128(2)),
            tier: Tier::Spirit,
            role: Role::Fact,
            source: SourceKind::User,
            reference: Some("m1".into()),
            event_unix_ms: 3,
            recorded_unix_ms: 4,
            text: "hi".into(),
        };
        let mut expected = vec![1, 2, 1, 0];
        expected.extend_from_slice(&1u128.to_be_bytes());
        expected.extend_from_slice(&2u128.to_be_bytes());
        expected.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 0, 0]);
        expected.extend_from_slice(b"m1hi");
        let crc = crc32fast::hash(&expected);
        expected.extend_from_slice(&crc.to_le_bytes());
        assert_eq!(record.to_bytes(), expected);
    }
}
