//! Which models never give way.

use super::{Store, StoreError};
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use std::collections::BTreeSet;

/// Names of models; the value says nothing.
const PINNED: TableDefinition<&str, ()> = TableDefinition::new("model_pinned");

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(PINNED)?;
    Ok(())
}

impl Store {
    pub fn pinned_models(&self) -> Result<BTreeSet<String>, StoreError> {
        self.read(|txn| {
            let mut all = BTreeSet::new();
            for row in txn.open_table(PINNED)?.iter()? {
                all.insert(row?.0.value().to_owned());
            }
            Ok(Ok(all))
        })
    }

    pub fn set_pinned_model(&self, name: &str, pinned: bool) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(PINNED)?;
            if pinned {
                table.insert(name, ())?;
            } else {
                table.remove(name)?;
            }
            Ok(Ok(()))
        })
    }
}
