//! Which records contain a term, and how often?
//!
//! A term's records are kept in blocks of at most [`BLOCK_RECORDS`], each a value of the table `posting`:
//! a record that is added rewrites one small block per term. A row per posting would be simpler, but costs
//! 2.5 times the time and twice the file.
//!
//! Pure: bytes in, bytes out; sealed by whoever stores them. FORMAT.md describes them.

use crate::seal::Mark;
use agentd_domain::agent_api::Tier;

/// Appending rewrites the last block, so it must stay well under one page of 4 KiB; 256 take 0.5 to 1.3 KiB.
pub(crate) const BLOCK_RECORDS: u16 = 256;

const HEADER_BYTES: usize = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Posting {
    pub(crate) seq: u64,
    pub(crate) count: u32,
}

/// A block that does not decode: the file was changed by something else than this crate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a block of postings is malformed at byte {at}")]
pub(crate) struct Malformed {
    pub(crate) at: usize,
}

/// Tier, keyed hash of the term, the sequence number a block was begun with (big-endian): blocks of a term lie
/// together, in order.
pub(crate) type Key = [u8; 25];

pub(crate) fn key(tier: Tier, mark: &Mark, first_seq: u64) -> Key {
    let mut key = [0; 25];
    key[0] = crate::record::tier_code(tier);
    key[1..17].copy_from_slice(mark);
    key[17..].copy_from_slice(&first_seq.to_be_bytes());
    key
}

/// One block: how many, the last seq, then for each a pair of varints (distance from the one before, count).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Block {
    bytes: Vec<u8>,
}

impl Block {
    pub(crate) fn of(postings: &[Posting]) -> Self {
        let mut block = Self::default();
        postings.iter().for_each(|posting| block.push(*posting));
        block
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn len(&self) -> u16 {
        self.bytes.first_chunk().map_or(0, |b| u16::from_le_bytes(*b))
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= BLOCK_RECORDS
    }

    pub(crate) fn last_seq(&self) -> u64 {
        self.bytes.get(2..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
    }

    /// `seq` must be larger than every seq in the block: sequence numbers are given in order of commit.
    pub(crate) fn push(&mut self, posting: Posting) {
        if self.bytes.is_empty() {
            self.bytes.resize(HEADER_BYTES, 0);
        }
        debug_assert!(self.len() == 0 || posting.seq > self.last_seq());
        let distance = posting.seq - if self.len() == 0 { 0 } else { self.last_seq() };
        let count = self.len() + 1;
        put_varint(&mut self.bytes, distance);
        put_varint(&mut self.bytes, u64::from(posting.count));
        self.bytes[..2].copy_from_slice(&count.to_le_bytes());
        self.bytes[2..HEADER_BYTES].copy_from_slice(&posting.seq.to_le_bytes());
    }
}

/// Calls `each` for every posting of an encoded block.
pub(crate) fn for_each(bytes: &[u8], mut each: impl FnMut(Posting)) -> Result<(), Malformed> {
    let count = bytes.first_chunk().map(|b| u16::from_le_bytes(*b)).ok_or(Malformed { at: 0 })?;
    let mut at = HEADER_BYTES;
    let mut seq = 0u64;
    for _ in 0..count {
        let distance = take_varint(bytes, &mut at)?;
        seq = seq.checked_add(distance).ok_or(Malformed { at })?;
        let count = u32::try_from(take_varint(bytes, &mut at)?).map_err(|_| Malformed { at })?;
        each(Posting { seq, count });
    }
    if at == bytes.len() { Ok(()) } else { Err(Malformed { at }) }
}

/// LEB128, as in Protocol Buffers.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(bytes: &[u8], at: &mut usize) -> Result<u64, Malformed> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at).ok_or(Malformed { at: *at })?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Malformed { at: *at })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_block_gives_back_what_was_pushed(
            steps in proptest::collection::vec((1u64..1 << 40, 1u32..), 1..256), first in 0u64..1000
        ) {
            let mut block = Block::default();
            let mut expected = Vec::new();
            let mut seq = first;
            for (step, count) in steps {
                block.push(Posting { seq, count });
                expected.push(Posting { seq, count });
                seq += step;
            }
            let mut found = Vec::new();
            for_each(block.as_bytes(), |p| found.push(p)).unwrap();
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(usize::from(block.len()), expected.len());
            prop_assert_eq!(Block::of(&found), block);
        }

        #[test]
        fn any_bytes_are_refused_or_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = for_each(&bytes, |_| ());
        }
    }

    #[test]
    fn a_cut_block_is_malformed() {
        let mut block = Block::default();
        block.push(Posting { seq: 300, count: 2 });
        let bytes = block.as_bytes();
        for end in 0..bytes.len() {
            assert!(for_each(&bytes[..end], |_| ()).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn keys_of_a_term_sort_by_seq_and_keep_to_themselves() {
        let keys = [
            key(Tier::Working, &[9; 16], 300),
            key(Tier::Spirit, &[7; 16], 1),
            key(Tier::Spirit, &[7; 16], 256),
            key(Tier::Spirit, &[8; 16], 0),
        ];
        assert!(keys.is_sorted());
    }
}
