//! How many bytes each agent has moved by each of its rules today.

use super::{Store, StoreError, encode};
use agentd_domain::ids::AgentId;
use redb::{TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// `<agent>/<rule>` to [`Moved`]. The rule is the text of the right: another rule has a budget of its own.
const MOVED: TableDefinition<&str, &[u8]> = TableDefinition::new("net_moved");

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    pub v: u32,
    /// Days of UTC since 1970.
    pub day: i64,
    /// Both ways together.
    pub bytes: u64,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(MOVED)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    let (first, last) = super::keys_of(agent);
    txn.open_table(MOVED)?.retain_in(first.as_str()..last.as_str(), |_, _| false)?;
    Ok(())
}

impl Store {
    pub fn moved(&self, agent: AgentId, rule: &str) -> Result<Option<Moved>, StoreError> {
        let key = format!("{agent}/{rule}");
        self.read(|txn| match txn.open_table(MOVED)?.get(key.as_str())? {
            None => Ok(Ok(None)),
            Some(bytes) => Ok(self.decode(&key, bytes.value()).map(Some)),
        })
    }

    /// All in one transaction.
    pub fn set_moved(&self, rows: &[(AgentId, String, Moved)]) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(MOVED)?;
            for (agent, rule, moved) in rows {
                table.insert(format!("{agent}/{rule}").as_str(), encode(moved).as_slice())?;
            }
            drop(table);
            Ok(Ok(()))
        })
    }
}
