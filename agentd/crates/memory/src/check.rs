//! Does the file say the same everywhere?
//!
//! Two depths: [`check_counts`] compares the sizes of tables with the counters and costs nothing; it runs at
//! every opening. [`check`] opens every sealed row, writes down what its indexes should hold, and compares.

use crate::error::{Damage, StoreError};
use crate::forget::supersede;
use crate::index::{embedder, read_counters};
use crate::life::State;
use crate::pack::{COARSE, Entries, FINE, LIVES, RECORDS};
use crate::plan;
use crate::postings;
use crate::read::{View, blocks, entry};
use crate::record::{TIERS, tier_code};
use crate::seal::{Hashed, Mark};
use crate::tables::{
    BY_ID, CLAIM, Counters, ENTRIES, JOURNAL, LINK, LINK_WINDOW, META, PENDING, POSTING, TierCounts,
    entries_from_bytes,
};
use crate::text;
use crate::vector::{coarse_bytes, coarse_of_stored};
use crate::write::open_block;
use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata};
use std::collections::{BTreeMap, HashMap};

/// What a whole reading found to be consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    pub records: u64,
    /// Records that are tombstones.
    pub forgotten: u64,
    pub vectors: u64,
    pub pending: u64,
    pub postings: u64,
    pub blocks: u64,
    pub entries: u64,
}

pub(crate) fn check_counts(txn: &ReadTransaction) -> Result<Counters, StoreError> {
    let counters = read_counters(txn)?;
    let entries = read_entries(txn)?;
    let records = RECORDS.count(&entries);
    let with_meaning: u64 =
        TIERS.into_iter().filter(|t| plan::has_meaning(*t)).map(|t| counters.tier(t).records).sum();
    let pairs = [
        ("records and the tiers' sum", records, counters.records()),
        ("records and their ids", records, txn.open_table(BY_ID)?.len()?),
        ("records and their lives", records, LIVES.count(&entries)),
        ("pending records and their counter", txn.open_table(PENDING)?.len()?, counters.pending),
        ("both parts of vectors", COARSE.count(&entries), FINE.count(&entries)),
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

fn read_entries(txn: &ReadTransaction) -> Result<Entries, StoreError> {
    let meta = txn.open_table(META)?;
    let row = meta.get(ENTRIES)?.ok_or(Damage::Meta(ENTRIES))?;
    Ok(entries_from_bytes(row.value())?)
}

pub(crate) fn check(view: View<'_>) -> Result<Checked, StoreError> {
    let counters = check_counts(view.txn)?;
    let (tiers, expected) = check_records(view, &counters)?;
    if tiers != counters.tiers {
        return Err(Damage::Counts(format!("tiers hold {tiers:?}, counted are {:?}", counters.tiers)).into());
    }
    let postings = check_postings(view, expected)?;
    let vectors = check_vectors(view, &counters)?;
    check_links(view)?;
    let blocks = blocks(view)?;
    let block_bytes: usize = blocks.iter().map(|b| b.key.len() + b.text.len()).sum();
    if (blocks.len() as u64, block_bytes as u64) != (counters.blocks, counters.block_bytes) {
        return Err(Damage::Counts("blocks and their counter".to_owned()).into());
    }
    let mut entries = 0;
    for row in view.txn.open_table(JOURNAL)?.iter()? {
        let (number, row) = row?;
        entry(view, number.value(), row.value())?;
        entries += 1;
    }
    let forgotten = counters.tiers.iter().map(|t| t.forgotten).sum();
    let (records, pending, blocks) = (counters.records(), counters.pending, counters.blocks);
    Ok(Checked { records, forgotten, vectors, pending, postings, blocks, entries })
}

/// Per tier, hash of the term and record, how often it has it.
type Expected = BTreeMap<(u8, Mark, u64), u32>;

fn check_records(view: View<'_>, counters: &Counters) -> Result<([TierCounts; 5], Expected), StoreError> {
    let by_id = view.txn.open_table(BY_ID)?;
    let claims = view.txn.open_table(CLAIM)?;
    let rows = view.rows()?;
    let mut tiers = [TierCounts::default(); 5];
    let mut expected = Expected::new();
    let mut marks: HashMap<String, Mark> = HashMap::new();
    let (mut records, mut lives, mut with_claim) = (0, 0, 0);
    rows.for_each_life(|_, _| {
        lives += 1;
        Ok(())
    })?;
    rows.for_each_record(|seq, record| {
        records += 1;
        let life = rows.life(seq)?;
        let mut words = 0;
        for (term, count) in text::term_counts(&record.text) {
            words += count;
            let mark = *marks.entry(term).or_insert_with_key(|t| view.seal.mark(Hashed::Term, t.as_bytes()));
            expected.insert((tier_code(life.tier), mark, seq), count);
        }
        let held = &mut tiers[usize::from(tier_code(life.tier))];
        held.records += 1;
        held.bytes += record.encoded_bytes();
        held.words += u64::from(words);
        if life.state == State::Forgotten {
            held.forgotten += 1;
            held.forgotten_bytes += record.encoded_bytes();
        }
        let claim_known = match &record.claim {
            None => true,
            Some(claim) => {
                with_claim += 1;
                let mut key = [0; 24];
                key[..16].copy_from_slice(&view.seal.mark(Hashed::Claim, supersede::key(claim).as_bytes()));
                key[16..].copy_from_slice(&seq.to_be_bytes());
                claims.get(key.as_slice())?.is_some()
            }
        };
        let known = seq < counters.next_seq
            && by_id.get(record.id.0.as_u128())?.is_some_and(|found| found.value() == seq)
            && (u64::from(life.bytes), life.words) == (record.encoded_bytes(), words);
        if !known || !claim_known {
            let why = "its id, life, claim or number disagrees with it".to_owned();
            return Err(Damage::Record { seq, why }.into());
        }
        Ok(())
    })?;
    let entries = read_entries(view.txn)?;
    if (records, lives) != (RECORDS.count(&entries), LIVES.count(&entries)) {
        return Err(
            Damage::Counts(format!("{records} records and {lives} lives, counted {entries:?}")).into()
        );
    }
    if claims.len()? != with_claim {
        return Err(Damage::Counts("claims and records with one".to_owned()).into());
    }
    Ok((tiers, expected))
}

fn check_postings(view: View<'_>, mut expected: Expected) -> Result<u64, StoreError> {
    let mut found = 0;
    for row in view.txn.open_table(POSTING)?.iter()? {
        let (key, sealed) = row?;
        let key: postings::Key =
            key.value().try_into().map_err(|_| Damage::Postings("a key of another length".to_owned()))?;
        let mark: Mark = std::array::from_fn(|i| key[1 + i]);
        for posting in open_block(view.seal, &key, sealed.value())? {
            found += 1;
            if expected.remove(&(key[0], mark, posting.seq)) != Some(posting.count) {
                let why = format!("record {} stands under a term that is not in its text", posting.seq);
                return Err(Damage::Postings(why).into());
            }
        }
    }
    match expected.into_keys().next() {
        None => Ok(found),
        Some((_, _, seq)) => {
            Err(Damage::Postings(format!("record {seq} does not stand under one of its terms")).into())
        }
    }
}

fn check_vectors(view: View<'_>, counters: &Counters) -> Result<u64, StoreError> {
    let pending = view.txn.open_table(PENDING)?;
    let rows = view.rows()?;
    let (mut current, mut all) = (0, 0);
    rows.for_each_coarse(|seq, number, first| {
        all += 1;
        let damage = || Damage::Vector { seq };
        let dimension = embedder(view.txn, number)?.1 as usize;
        let second = rows.vector(seq)?.ok_or_else(damage)?.fine;
        let whole =
            coarse_of_stored(first, dimension).is_some() && second.len() + 4 == coarse_bytes(dimension);
        if !whole || !plan::has_meaning(rows.life(seq)?.tier) {
            return Err(damage().into());
        }
        if (number == counters.embedder) == pending.get(seq)?.is_some() {
            let why = format!("record {seq} has a vector and is pending, or neither");
            return Err(Damage::Counts(why).into());
        }
        current += u64::from(number == counters.embedder);
        Ok(())
    })?;
    if all != COARSE.count(&read_entries(view.txn)?) {
        return Err(Damage::Counts(format!("{all} vectors of all embedders are there")).into());
    }
    if current != counters.vectors {
        return Err(Damage::Counts(format!("{current} vectors, counted are {}", counters.vectors)).into());
    }
    Ok(current)
}

/// Links name records that are there.
fn check_links(view: View<'_>) -> Result<(), StoreError> {
    let rows = view.rows()?;
    for row in view.txn.open_table(LINK)?.iter()? {
        let (from, kind, to) = row?.0.value();
        // What a vector was made of is known from before to after only.
        let named = if kind == LINK_WINDOW { &[from][..] } else { &[from, to] };
        for seq in named.iter().copied() {
            if !rows.has(seq)? {
                return Err(Damage::RecordMissing { seq }.into());
            }
        }
    }
    Ok(())
}
