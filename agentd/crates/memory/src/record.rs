//! What does a record say, and how does it look on disk?
//!
//! In:    a [`Record`]. Out: the content of a sealed row of the table `record`, and back. FORMAT.md lists it byte by
//!        byte. An own layout and not JSON: it is a third smaller, its size is known before it is written
//!        (budgets count it), and a reader of another version notices at the first byte.
//! Always: a record never changes once it is written; what changes stands in `life.rs`. The seal around it notices
//!        a flipped bit, so there is no checksum here.

use agentd_domain::agent_api::{Source, Tier};
use agentd_domain::ids::{OwnerId, RecordId};
use uuid::Uuid;

/// The first byte of every record. Raised when the layout changes; older layouts stay readable.
pub(crate) const RECORD_VERSION: u8 = 2;

/// version, which texts there are, number of evidence; id; owner; what it supersedes. Then the texts.
pub(crate) const HEAD_BYTES: usize = 1 + 1 + 1 + 16 + 16 + 16;

const REFERENCE: u8 = 1;
const SESSION: u8 = 2;
const CLAIM: u8 = 4;

/// An insight names at most so many records: its number is one byte, and nobody reads more.
pub(crate) const EVIDENCE_MOST: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) id: RecordId,
    pub(crate) owner: OwnerId,
    pub(crate) reference: Option<String>,
    /// The run or conversation it belongs to.
    pub(crate) session: Option<String>,
    pub(crate) claim: Option<Claim>,
    /// The record whose place it took.
    pub(crate) supersedes: Option<RecordId>,
    /// What an insight was drawn from.
    pub(crate) evidence: Vec<RecordId>,
    pub(crate) text: String,
}

/// What a record says of what: "Ana", "lives in". Two records with the same claim speak of the same thing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Claim {
    pub subject: String,
    pub predicate: String,
    /// There is one answer at a time: a later one closes the earlier. Otherwise all stand beside each other.
    pub functional: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRecord {
    #[error("its layout is version {found}, this program reads up to {RECORD_VERSION}")]
    Version { found: u8 },
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
    /// What kind of memory a record is. An insight is drawn from other records, which it names.
    Role {
        Event = 0, "event";
        Fact = 1, "fact";
        Preference = 2, "preference";
        Procedure = 3, "procedure";
        Identity = 4, "identity";
        Insight = 5, "insight";
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
    /// What the record takes on disk before it is sealed; budgets count this.
    pub(crate) fn encoded_bytes(&self) -> u64 {
        let claim = self.claim.as_ref().map_or(0, |c| 1 + 4 + c.subject.len() + c.predicate.len());
        let short = |text: &Option<String>| text.as_ref().map_or(0, |t| 2 + t.len());
        let texts = short(&self.reference) + short(&self.session) + claim;
        (HEAD_BYTES + 16 * self.evidence.len() + texts + self.text.len()) as u64
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_bytes() as usize);
        let flag = |there: bool, flag: u8| if there { flag } else { 0 };
        let flags = flag(self.reference.is_some(), REFERENCE)
            | flag(self.session.is_some(), SESSION)
            | flag(self.claim.is_some(), CLAIM);
        // The limits of plan.rs keep every length far below what its field holds.
        out.extend([RECORD_VERSION, flags, self.evidence.len() as u8]);
        out.extend_from_slice(self.id.0.as_bytes());
        out.extend_from_slice(self.owner.0.as_bytes());
        out.extend_from_slice(self.supersedes.map(|id| id.0).unwrap_or_default().as_bytes());
        for id in &self.evidence {
            out.extend_from_slice(id.0.as_bytes());
        }
        for text in [&self.reference, &self.session].into_iter().flatten() {
            put_short(&mut out, text);
        }
        if let Some(claim) = &self.claim {
            out.push(u8::from(claim.functional));
            put_short(&mut out, &claim.subject);
            put_short(&mut out, &claim.predicate);
        }
        out.extend_from_slice(self.text.as_bytes());
        out
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, BadRecord> {
        match bytes.first() {
            Some(&RECORD_VERSION) => {}
            Some(&found) => return Err(BadRecord::Version { found }),
            None => return Err(BadRecord::Malformed("empty")),
        }
        let mut rest = bytes;
        let [_, flags, evidence] = take::<3>(&mut rest)?;
        if flags & !(REFERENCE | SESSION | CLAIM) != 0 {
            return Err(BadRecord::Malformed("flags"));
        }
        let id = take_id(&mut rest)?;
        let owner = OwnerId(Uuid::from_bytes(take(&mut rest)?));
        let supersedes = Some(take_id(&mut rest)?).filter(|id| !id.0.is_nil());
        let evidence = (0..evidence).map(|_| take_id(&mut rest)).collect::<Result<_, _>>()?;
        let mut short = |there: u8| match flags & there {
            0 => Ok(None),
            _ => take_short(&mut rest).map(Some),
        };
        let (reference, session) = (short(REFERENCE)?, short(SESSION)?);
        let claim = match flags & CLAIM {
            0 => None,
            _ => {
                let [functional] = take::<1>(&mut rest)?;
                let (subject, predicate) = (take_short(&mut rest)?, take_short(&mut rest)?);
                Some(Claim { subject, predicate, functional: functional != 0 })
            }
        };
        let text = text_of(rest)?;
        Ok(Self { id, owner, reference, session, claim, supersedes, evidence, text })
    }
}

pub(crate) fn source(kind: SourceKind, reference: Option<String>) -> Source {
    Source { kind: kind.name().to_owned(), reference }
}

fn put_short(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

pub(crate) fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], BadRecord> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(BadRecord::Malformed("short"))?;
    *rest = tail;
    Ok(*head)
}

fn take_id(rest: &mut &[u8]) -> Result<RecordId, BadRecord> {
    take(rest).map(Uuid::from_bytes).map(RecordId)
}

fn take_short(rest: &mut &[u8]) -> Result<String, BadRecord> {
    let length = u16::from_le_bytes(take(rest)?);
    take_text(rest, usize::from(length))
}

pub(crate) fn take_text(rest: &mut &[u8], length: usize) -> Result<String, BadRecord> {
    let (head, tail) = rest.split_at_checked(length).ok_or(BadRecord::Malformed("short"))?;
    *rest = tail;
    text_of(head)
}

fn text_of(bytes: &[u8]) -> Result<String, BadRecord> {
    String::from_utf8(bytes.to_vec()).map_err(|_| BadRecord::Malformed("text is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u128) -> RecordId {
        RecordId(Uuid::from_u128(n))
    }

    fn any_record() -> impl Strategy<Value = Record> {
        let claim = (".{0,20}", ".{0,20}", any::<bool>())
            .prop_map(|(subject, predicate, functional)| Claim { subject, predicate, functional });
        (
            any::<u128>(),
            any::<u128>(),
            proptest::option::of(".{0,40}"),
            proptest::option::of(".{0,40}"),
            proptest::option::of(claim),
            proptest::option::of(1u128..),
            proptest::collection::vec(any::<u128>(), 0..4),
            ".{0,300}",
        )
            .prop_map(|(own, owner, reference, session, claim, supersedes, evidence, text)| Record {
                id: id(own),
                owner: OwnerId(Uuid::from_u128(owner)),
                reference,
                session,
                claim,
                supersedes: supersedes.map(id),
                evidence: evidence.into_iter().map(id).collect(),
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
        fn a_cut_or_strange_record_is_refused_or_read_without_panic(
            record in any_record(), cut in any::<prop::sample::Index>(),
            bytes in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            let whole = record.to_bytes();
            // Cut within the head: always refused. Cut within the text: the seal notices.
            let cut = cut.index(whole.len());
            prop_assert!(cut >= HEAD_BYTES || Record::from_bytes(&whole[..cut]).is_err());
            let _ = Record::from_bytes(&bytes);
        }
    }

    #[test]
    fn a_later_layout_is_named() {
        assert_eq!(Record::from_bytes(&[9, 0, 0]), Err(BadRecord::Version { found: 9 }));
    }

    #[test]
    fn the_layout_is_the_one_of_the_format_page() {
        let claim = Claim { subject: "Ana".into(), predicate: "city".into(), functional: true };
        let record = Record {
            id: id(1),
            owner: OwnerId(Uuid::from_u128(2)),
            reference: Some("m1".into()),
            session: Some("r".into()),
            claim: Some(claim),
            supersedes: Some(id(3)),
            evidence: vec![id(4)],
            text: "hi".into(),
        };
        let mut expected = vec![2, 7, 1];
        for number in 1u128..=4 {
            expected.extend_from_slice(&number.to_be_bytes());
        }
        expected.extend_from_slice(b"\x02\0m1\x01\0r\x01\x03\0Ana\x04\0cityhi");
        assert_eq!(record.to_bytes(), expected);
    }
}
