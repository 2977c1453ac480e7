//! Does the file say the same everywhere?
//!
//! Two depths: [`check_counts`] compares the sizes of tables with the counters and costs nothing; it runs at
//! every opening. [`check`] reads every record, writes down what its indexes should hold, and compares.

use crate::error::{Damage, StoreError};
use crate::index::{embedder, read_counters};
use crate::plan;
use crate::postings;
use crate::record::{TIERS, tier_code, tier_from_code};
use crate::tables::{BY_ID, Counters, PENDING, POSTING, RANK, RECORD, TierCounts, VECTOR};
use crate::text;
use crate::vector::stored_bytes;
use crate::write::decode;
use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata};
use std::collections::BTreeMap;

/// What a whole reading found to be consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    pub records: u64,
    pub vectors: u64,
    pub pending: u64,
    pub postings: u64,
}

pub(crate) fn check_counts(txn: &ReadTransaction) -> Result<Counters, StoreError> {
    let counters = read_counters(txn)?;
    let records = txn.open_table(RECORD)?.len()?;
    let with_meaning: u64 =
        TIERS.into_iter().filter(|t| plan::has_meaning(*t)).map(|t| counters.tier(t).records).sum();
    let pairs = [
        ("records and the tiers' sum", records, counters.records()),
        ("records and their ids", records, txn.open_table(BY_ID)?.len()?),
        ("records and their ranks", records, txn.open_table(RANK)?.len()?),
        ("pending records and their counter", txn.open_table(PENDING)?.len()?, counters.pending),
        (
            "records with meaning and those with a vector or pending",
            with_meaning,
            counters.vectors + counters.pending,
        ),
    ];
    for (what, one, other) in pairs {
        if one != other {
            return Err(Damage::Counts(format!("{what}: {one} and {other}")).into());
        }
    }
    Ok(counters)
}

pub(crate) fn check(txn: &ReadTransaction) -> Result<Checked, StoreError> {
    let counters = check_counts(txn)?;
    let (tiers, expected) = check_records(txn, &counters)?;
    if tiers != counters.tiers {
        return Err(Damage::Counts(format!("tiers hold {tiers:?}, counted are {:?}", counters.tiers)).into());
    }
    let postings = check_postings(txn, expected)?;
    let vectors = check_vectors(txn, &counters)?;
    Ok(Checked { records: counters.records(), vectors, pending: counters.pending, postings })
}

type Expected = BTreeMap<(u8, String, u64), u32>;

fn check_records(
    txn: &ReadTransaction,
    counters: &Counters,
) -> Result<([TierCounts; 5], Expected), StoreError> {
    let (by_id, rank) = (txn.open_table(BY_ID)?, txn.open_table(RANK)?);
    let mut tiers = [TierCounts::default(); 5];
    let mut expected = Expected::new();
    for row in txn.open_table(RECORD)?.iter()? {
        let (seq, row) = row?;
        let seq = seq.value();
        let record = decode(seq, row.value())?;
        let mut words = 0;
        for (term, count) in text::term_counts(&record.text) {
            words += count;
            expected.insert((tier_code(record.tier), term, seq), count);
        }
        let held = &mut tiers[usize::from(tier_code(record.tier))];
        held.records += 1;
        held.bytes += record.encoded_bytes();
        held.words += u64::from(words);
        let known = seq < counters.next_seq
            && by_id.get(record.id.0.as_u128())?.is_some_and(|found| found.value() == seq)
            && rank.get(seq)?.is_some_and(|found| found.value() == (tier_code(record.tier), words));
        if !known {
            return Err(
                Damage::Record { seq, why: "its id, rank or number disagrees with it".to_owned() }.into()
            );
        }
    }
    Ok((tiers, expected))
}

fn check_postings(txn: &ReadTransaction, mut expected: Expected) -> Result<u64, StoreError> {
    let mut found = 0;
    let mut strange = None;
    for row in txn.open_table(POSTING)?.iter()? {
        let (key, block) = row?;
        let key = key.value();
        let malformed = || Damage::Postings(format!("key {key:?}"));
        let (head, _first_seq) = key.split_last_chunk::<8>().ok_or_else(malformed)?;
        let [tier, term @ .., 0] = head else { return Err(malformed().into()) };
        let term = std::str::from_utf8(term).map_err(|_| malformed())?;
        postings::for_each(block.value(), |posting| {
            found += 1;
            if expected.remove(&(*tier, term.to_owned(), posting.seq)) != Some(posting.count) {
                strange = Some(format!("`{term}` in record {}", posting.seq));
            }
        })
        .map_err(|e| Damage::Postings(e.to_string()))?;
    }
    match (strange, expected.into_keys().next()) {
        (None, None) => Ok(found),
        (Some(strange), _) => Err(Damage::Postings(format!("{strange} is not in the text")).into()),
        (None, Some((_, term, seq))) => {
            Err(Damage::Postings(format!("`{term}` of record {seq} is missing")).into())
        }
    }
}

fn check_vectors(txn: &ReadTransaction, counters: &Counters) -> Result<u64, StoreError> {
    let (rank, pending) = (txn.open_table(RANK)?, txn.open_table(PENDING)?);
    let mut current = 0;
    for row in txn.open_table(VECTOR)?.iter()? {
        let (seq, row) = row?;
        let (seq, (number, bytes)) = (seq.value(), row.value());
        let (_, dimension) = embedder(txn, number)?;
        let tier = rank.get(seq)?.and_then(|found| tier_from_code(found.value().0));
        if bytes.len() != stored_bytes(dimension as usize) || !tier.is_some_and(plan::has_meaning) {
            return Err(Damage::Vector { seq }.into());
        }
        if (number == counters.embedder) == pending.get(seq)?.is_some() {
            return Err(
                Damage::Counts(format!("record {seq} has a vector and is pending, or neither")).into()
            );
        }
        current += u64::from(number == counters.embedder);
    }
    if current != counters.vectors {
        return Err(Damage::Counts(format!("{current} vectors, counted are {}", counters.vectors)).into());
    }
    Ok(current)
}
