//! Which records contain a term, and how often?
//!
//! A term's records are kept in blocks of at most [`BLOCK_RECORDS`], each a value of the table `posting`:
//! a record that is added rewrites one small block per term. A row per posting would be simpler, but costs
//! 2.5 times the time and twice the file. Most terms occur once in a record: that costs no byte of its own.
//!
//! Pure: bytes in, bytes out; sealed by whoever stores them. FORMAT.md describes them.

use crate::pack::{put_varint, take_varint};
use crate::seal::Mark;
use agentd_domain::agent_api::Tier;

/// Appending rewrites the last block, so it must stay well under one page of 4 KiB; 512 take 0.6 to 1.5 KiB.
pub(crate) const BLOCK_RECORDS: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Posting {
    pub(crate) seq: u64,
    pub(crate) count: u32,
}

/// A block that does not decode: the file was changed by something else than this crate.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
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

/// The number in a key.
pub(crate) fn begun(key: &Key) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| key[17 + i]))
}

/// One block: for each posting a varint of twice the distance from the one before (the first: from the number in the
/// key), and one more if it occurs more than once; then how often, as a varint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    bytes: Vec<u8>,
    len: usize,
    last_seq: u64,
}

impl Block {
    /// An empty block whose key has this number.
    pub(crate) fn begun(seq: u64) -> Self {
        Self { bytes: Vec::new(), len: 0, last_seq: seq }
    }

    pub(crate) fn of(begun: u64, postings: &[Posting]) -> Self {
        let mut block = Self::begun(begun);
        postings.iter().for_each(|posting| block.push(*posting));
        block
    }

    /// A block that was written before, to be gone on with.
    pub(crate) fn from_bytes(begun: u64, bytes: &[u8]) -> Result<Self, Malformed> {
        let mut block = Self::begun(begun);
        for_each(begun, bytes, |posting| {
            block.len += 1;
            block.last_seq = posting.seq;
        })?;
        block.bytes = bytes.to_vec();
        Ok(block)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len >= BLOCK_RECORDS
    }

    /// `seq` must be larger than every seq in the block: sequence numbers are given in order of commit.
    pub(crate) fn push(&mut self, posting: Posting) {
        debug_assert!(self.len == 0 || posting.seq > self.last_seq);
        let often = posting.count != 1;
        put_varint(&mut self.bytes, (posting.seq - self.last_seq) << 1 | u64::from(often));
        if often {
            put_varint(&mut self.bytes, u64::from(posting.count));
        }
        self.last_seq = posting.seq;
        self.len += 1;
    }
}

/// Calls `each` for every posting of an encoded block whose key has the number `begun`.
pub(crate) fn for_each(begun: u64, bytes: &[u8], mut each: impl FnMut(Posting)) -> Result<(), Malformed> {
    let (mut at, mut seq) = (0, begun);
    while at < bytes.len() {
        let malformed = Malformed { at };
        let distance = take_varint(bytes, &mut at).ok_or(malformed)?;
        seq = seq.checked_add(distance >> 1).ok_or(Malformed { at })?;
        let count = match distance & 1 {
            0 => 1,
            _ => take_varint(bytes, &mut at).and_then(|c| u32::try_from(c).ok()).ok_or(Malformed { at })?,
        };
        each(Posting { seq, count });
    }
    Ok(())
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
            let mut block = Block::begun(first);
            let mut expected = Vec::new();
            let mut seq = first;
            for (step, count) in steps {
                block.push(Posting { seq, count });
                expected.push(Posting { seq, count });
                seq += step;
            }
            let mut found = Vec::new();
            for_each(first, block.as_bytes(), |p| found.push(p)).unwrap();
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(&Block::of(first, &found), &block);
            prop_assert_eq!(Block::from_bytes(first, block.as_bytes()).unwrap(), block);
        }

        #[test]
        fn any_bytes_are_refused_or_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = for_each(7, &bytes, |_| ());
        }
    }

    #[test]
    fn a_block_is_as_on_the_format_page() {
        let block = Block::of(300, &[Posting { seq: 300, count: 1 }, Posting { seq: 400, count: 3 }]);
        assert_eq!(block.as_bytes(), [0, 0xC9, 1, 3]);
        assert!(for_each(300, &block.as_bytes()[..2], |_| ()).is_err(), "cut within a number");
        assert!(for_each(300, &block.as_bytes()[..3], |_| ()).is_err(), "cut before how often");
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
