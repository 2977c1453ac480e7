//! What was learned of devices and of models' files; `crate::gpu` says what it is good for.

use super::{Store, StoreError, encode};
use crate::gpu::{Counted, Overhead};
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A device's name to what it takes besides models.
const OVERHEAD: TableDefinition<&str, &[u8]> = TableDefinition::new("device_overhead");
/// A file's path to what the engine counted of it.
const COUNT: TableDefinition<&str, &[u8]> = TableDefinition::new("model_count");

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row<T> {
    /// Version of this layout.
    pub(super) v: u32,
    #[serde(flatten)]
    pub(super) row: T,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(OVERHEAD)?;
    txn.open_table(COUNT)?;
    Ok(())
}

impl Store {
    pub fn overhead(&self) -> Result<BTreeMap<String, Overhead>, StoreError> {
        self.learned(OVERHEAD)
    }

    pub fn counts(&self) -> Result<BTreeMap<String, Counted>, StoreError> {
        self.learned(COUNT)
    }

    /// A row that cannot be read was written by a later version or is damaged: it is learned again.
    pub(super) fn learned<T: DeserializeOwned>(
        &self,
        table: TableDefinition<&str, &[u8]>,
    ) -> Result<BTreeMap<String, T>, StoreError> {
        self.read(|txn| {
            let mut all = BTreeMap::new();
            for row in txn.open_table(table)?.iter()? {
                let (name, bytes) = row?;
                if let Ok(row) = serde_json::from_slice::<Row<T>>(bytes.value()) {
                    all.insert(name.value().to_owned(), row.row);
                }
            }
            Ok(Ok(all))
        })
    }

    /// All of them, in place of those that were there.
    pub(super) fn set_learned<T: Serialize>(
        &self,
        table: TableDefinition<&str, &[u8]>,
        all: &BTreeMap<String, T>,
    ) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(table)?;
            table.retain(|_, _| false)?;
            for (name, row) in all {
                table.insert(name.as_str(), encode(&Row { v: 1, row }).as_slice())?;
            }
            Ok(Ok(()))
        })
    }

    pub fn set_overhead(&self, all: &BTreeMap<String, Overhead>) -> Result<(), StoreError> {
        self.set_learned(OVERHEAD, all)
    }

    /// One file's. Rows of files that are not there any more go.
    pub fn set_count(
        &self,
        path: &str,
        counted: &Counted,
        is_there: &dyn Fn(&str) -> bool,
    ) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(COUNT)?;
            table.retain(|path, _| is_there(path))?;
            table.insert(path, encode(&Row { v: 1, row: counted }).as_slice())?;
            Ok(Ok(()))
        })
    }
}
