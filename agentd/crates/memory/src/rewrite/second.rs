//! How does a store of format 2 become one of this format? Each of its rows was sealed alone.
//!
//! Its tables of a record's text, life and vector are read here; all others are as they are now.

use super::{Copied, Writer, copy_journal_and_blocks, copy_what_is_not_sealed};
use crate::error::{Damage, OpenError, StoreError};
use crate::file::{Open, open_error};
use crate::index::read_counters;
use crate::key::StoreKey;
use crate::life::{LIFE_BYTES, Life};
use crate::read::View;
use crate::record::Record;
use crate::rows::StoredVector;
use crate::seal::{Row, Seal};
use crate::tables::{FORMAT_VERSION, IdentityRow};
use crate::text::WORDS_VERSION;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::path::Path;

const RECORD: TableDefinition<u64, &[u8]> = TableDefinition::new("record");
const LIFE: TableDefinition<u64, &[u8; LIFE_BYTES]> = TableDefinition::new("life");
const COARSE: TableDefinition<u64, (u32, &[u8])> = TableDefinition::new("coarse");
const FINE: TableDefinition<u64, &[u8]> = TableDefinition::new("fine");

pub(crate) fn from_second_format(
    open: &Open,
    next: &Database,
    key: &StoreKey,
    path: &Path,
) -> Result<(), OpenError> {
    let copy = || {
        let txn = open.database.begin_read()?;
        let counters = read_counters(&txn)?;
        let seal = Seal::new(&key.secret);
        let mut writer = Writer::begin(next, &seal, open.row.store, open.row.identity.owner_id, &counters)?;
        let (lives, coarse, fine) = (txn.open_table(LIFE)?, txn.open_table(COARSE)?, txn.open_table(FINE)?);
        let mut content = Vec::new();
        for row in txn.open_table(RECORD)?.iter()? {
            let (seq, row) = row?;
            let seq = seq.value();
            let life = lives.get(seq)?.ok_or(Damage::RecordMissing { seq })?;
            let life = Life::from_bytes(seq, life.value())?;
            let text = opened(&open.seal, Row::Record, seq, row.value(), &mut content)?;
            let record =
                Record::from_bytes(text).map_err(|why| Damage::Record { seq, why: why.to_string() })?;
            let vector = match (coarse.get(seq)?, fine.get(seq)?) {
                (Some(first), Some(second)) => {
                    let (embedder, first) = first.value();
                    let first = opened(&open.seal, Row::Coarse, seq, first, &mut content)?.to_vec();
                    let fine = opened(&open.seal, Row::Fine, seq, second.value(), &mut content)?.to_vec();
                    Some(StoredVector { embedder, first, fine })
                }
                _ => None,
            };
            writer.add(Copied { seq, record, life, vector })?;
        }
        let row = IdentityRow { format: FORMAT_VERSION, key: key.id, words: WORDS_VERSION, ..open.row };
        writer.finish(row, |batch| {
            copy_what_is_not_sealed(&txn, batch)?;
            copy_journal_and_blocks(View::of(open, &txn), batch, &counters)
        })
    };
    copy().map_err(|error| open_error(path, error))
}

fn opened<'a>(
    seal: &Seal,
    row: Row,
    seq: u64,
    sealed: &[u8],
    into: &'a mut Vec<u8>,
) -> Result<&'a [u8], StoreError> {
    Ok(seal.open(row, &seq.to_be_bytes(), sealed, into).ok_or(Damage::Sealed { seq })?)
}
