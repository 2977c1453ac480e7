//! What stands under a record's number?
//!
//! In:    one transaction, reading or writing. Out: the record, its life, both parts of its vector.
//! Always: a number has all of record and life or none of them; a vector has both parts or none.
//! Not here: how they fill pages (`pack.rs`); ids, words, claims and links (`write/`).

use crate::error::{Damage, StoreError};
use crate::life::{LIFE_BYTES, Life};
use crate::pack::{COARSE, Entries, FINE, Going, LIVES, Pack, RECORDS};
use crate::record::Record;
use crate::seal::{Nonces, Seal};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, Table, WriteTransaction};

/// The four tables in one transaction.
pub(crate) struct Rows<'a, T> {
    seal: &'a Seal,
    records: Pack<T>,
    lives: Pack<T>,
    coarse: Pack<T>,
    fine: Pack<T>,
}

pub(crate) type ReadRows<'a> = Rows<'a, ReadOnlyTable<u64, &'static [u8]>>;
pub(crate) type WriteRows<'txn> = Rows<'txn, Table<'txn, u64, &'static [u8]>>;

/// A vector as it is stored: whose it is, and its parts (`vector.rs`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredVector {
    pub(crate) embedder: u32,
    pub(crate) first: Vec<u8>,
    pub(crate) fine: Vec<u8>,
}

impl<'a> ReadRows<'a> {
    pub(crate) fn read(txn: &ReadTransaction, seal: &'a Seal) -> Result<Self, StoreError> {
        Ok(Self {
            seal,
            records: Pack::read(txn, &RECORDS)?,
            lives: Pack::read(txn, &LIVES)?,
            coarse: Pack::read(txn, &COARSE)?,
            fine: Pack::read(txn, &FINE)?,
        })
    }
}

impl<'txn> WriteRows<'txn> {
    pub(crate) fn write(txn: &'txn WriteTransaction, seal: &'txn Seal) -> Result<Self, StoreError> {
        Ok(Self {
            seal,
            records: Pack::write(txn, &RECORDS)?,
            lives: Pack::write(txn, &LIVES)?,
            coarse: Pack::write(txn, &COARSE)?,
            fine: Pack::write(txn, &FINE)?,
        })
    }

    pub(crate) fn put_record(&mut self, seq: u64, content: Vec<u8>) {
        self.records.insert(seq, content);
    }

    pub(crate) fn put_life(&mut self, seq: u64, life: Life) {
        self.lives.insert(seq, life.to_bytes().to_vec());
    }

    pub(crate) fn put_vector(&mut self, seq: u64, embedder: u32, first: &[u8], fine: Vec<u8>) {
        let mut coarse = Vec::with_capacity(4 + first.len());
        coarse.extend(embedder.to_le_bytes());
        coarse.extend_from_slice(first);
        self.coarse.insert(seq, coarse);
        self.fine.insert(seq, fine);
    }

    /// Takes everything under this number away.
    pub(crate) fn remove(&mut self, seq: u64) {
        for pack in [&mut self.records, &mut self.lives, &mut self.coarse, &mut self.fine] {
            pack.remove(seq);
        }
    }

    /// Takes both parts of its vector away.
    pub(crate) fn remove_vector(&mut self, seq: u64) {
        self.coarse.remove(seq);
        self.fine.remove(seq);
    }

    pub(crate) fn flush(&mut self, nonces: &mut Nonces, entries: &mut Entries) -> Result<(), StoreError> {
        for pack in [&mut self.records, &mut self.lives, &mut self.coarse, &mut self.fine] {
            pack.flush(self.seal, nonces, entries)?;
        }
        Ok(())
    }
}

impl<T: ReadableTable<u64, &'static [u8]>> Rows<'_, T> {
    pub(crate) fn has(&self, seq: u64) -> Result<bool, StoreError> {
        self.lives.contains(self.seal, seq)
    }

    /// The record of a number that some index names.
    pub(crate) fn record(&self, seq: u64) -> Result<Record, StoreError> {
        let record = self.records.with(self.seal, seq, |content| decode(seq, content))?;
        Ok(record.ok_or(Damage::RecordMissing { seq })??)
    }

    /// The life of a number that some index names.
    pub(crate) fn life(&self, seq: u64) -> Result<Life, StoreError> {
        let life = self.lives.with(self.seal, seq, |content| life(seq, content))?;
        Ok(life.ok_or(Damage::RecordMissing { seq })??)
    }

    pub(crate) fn for_each_record(
        &self,
        mut each: impl FnMut(u64, Record) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.records.for_each(self.seal, |seq, content| each(seq, decode(seq, content)?))
    }

    pub(crate) fn for_each_life(
        &self,
        mut each: impl FnMut(u64, Life) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.lives.for_each(self.seal, |seq, content| each(seq, life(seq, content)?))
    }

    /// Lives from below this number back, until `each` says that it is enough.
    pub(crate) fn lives_back_from(
        &self,
        before: u64,
        mut each: impl FnMut(u64, Life) -> Result<Going, StoreError>,
    ) -> Result<(), StoreError> {
        self.lives.back_from(self.seal, before, |seq, content| each(seq, life(seq, content)?))
    }

    /// Every vector's embedder and first part.
    pub(crate) fn for_each_coarse(
        &self,
        mut each: impl FnMut(u64, u32, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.coarse.for_each(self.seal, |seq, content| {
            let (embedder, first) = coarse(seq, content)?;
            each(seq, embedder, first)
        })
    }

    /// Whose vector a record has, if it has one.
    pub(crate) fn embedder_of(&self, seq: u64) -> Result<Option<u32>, StoreError> {
        let found =
            self.coarse.with(self.seal, seq, |content| coarse(seq, content).map(|(number, _)| number))?;
        Ok(found.transpose()?)
    }

    /// The second part of its vector, if it has one.
    pub(crate) fn fine(&self, seq: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.fine.get(self.seal, seq)
    }

    pub(crate) fn vector(&self, seq: u64) -> Result<Option<StoredVector>, StoreError> {
        let first = self.coarse.with(self.seal, seq, |content| {
            coarse(seq, content).map(|(embedder, first)| (embedder, first.to_vec()))
        })?;
        let Some((embedder, first)) = first.transpose()? else { return Ok(None) };
        let fine = self.fine.get(self.seal, seq)?.ok_or(Damage::Vector { seq })?;
        Ok(Some(StoredVector { embedder, first, fine }))
    }
}

fn decode(seq: u64, content: &[u8]) -> Result<Record, Damage> {
    Record::from_bytes(content).map_err(|why| Damage::Record { seq, why: why.to_string() })
}

fn life(seq: u64, content: &[u8]) -> Result<Life, Damage> {
    let row: &[u8; LIFE_BYTES] = content.try_into().map_err(|_| Damage::RecordMissing { seq })?;
    Life::from_bytes(seq, row)
}

fn coarse(seq: u64, content: &[u8]) -> Result<(u32, &[u8]), Damage> {
    let (number, first) = content.split_first_chunk().ok_or(Damage::Vector { seq })?;
    Ok((u32::from_le_bytes(*number), first))
}
