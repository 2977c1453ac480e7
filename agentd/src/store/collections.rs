//! Which collections of shared knowledge are there, and who may read or write them?

use super::learned::Row;
use super::{Store, StoreError, encode};
use crate::memory::CollectionRow;
use agentd_domain::ids::AgentId;
use agentd_domain::memory_api::CollectionName;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use std::collections::BTreeMap;

/// A collection's name to where it is and whose it is.
const COLLECTION: TableDefinition<&str, &[u8]> = TableDefinition::new("collection");

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(COLLECTION)?;
    Ok(())
}

/// An agent that is gone holds nothing: its id is never given again, but a list should say the truth.
pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    let mut table = txn.open_table(COLLECTION)?;
    let mut changed = Vec::new();
    for row in table.iter()? {
        let (name, bytes) = row?;
        if let Ok(mut row) = serde_json::from_slice::<Row<CollectionRow>>(bytes.value())
            && row.row.grants.remove(&agent).is_some()
        {
            changed.push((name.value().to_owned(), row));
        }
    }
    for (name, row) in changed {
        table.insert(name.as_str(), encode(&row).as_slice())?;
    }
    Ok(())
}

impl Store {
    /// By name. One that cannot be read is an error: what it grants is not known.
    pub fn collections(&self) -> Result<BTreeMap<CollectionName, CollectionRow>, StoreError> {
        self.read(|txn| {
            let mut all = BTreeMap::new();
            for row in txn.open_table(COLLECTION)?.iter()? {
                let (name, bytes) = row?;
                let Ok(name) = name.value().parse::<CollectionName>() else { continue };
                match self.decode::<Row<CollectionRow>>(&format!("collection {name}"), bytes.value()) {
                    Ok(row) => drop(all.insert(name, row.row)),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(all))
        })
    }

    /// Changes one collection's row, or makes or removes it, in one transaction. Gives what it is now.
    pub fn change_collection(
        &self,
        name: &CollectionName,
        change: impl FnOnce(Option<CollectionRow>) -> Option<CollectionRow>,
    ) -> Result<Option<CollectionRow>, StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(COLLECTION)?;
            let before = match table.get(name.as_str())? {
                None => None,
                Some(bytes) => {
                    match self.decode::<Row<CollectionRow>>(&format!("collection {name}"), bytes.value()) {
                        Ok(row) => Some(row.row),
                        Err(error) => return Ok(Err(error)),
                    }
                }
            };
            let after = change(before);
            match &after {
                Some(row) => drop(table.insert(name.as_str(), encode(&Row { v: 1, row }).as_slice())?),
                None => drop(table.remove(name.as_str())?),
            }
            Ok(Ok(after))
        })
    }
}
