//! Rows of what hurt an agent and what was done about it.

use super::{Store, StoreError, encode};
use agentd_domain::health::History;
use agentd_domain::ids::AgentId;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// Agent to [`HealthRow`], some 20 KiB at most (`agentd_domain::health`).
const HEALTH: TableDefinition<u128, &[u8]> = TableDefinition::new("agent_health");

#[derive(Debug, Serialize, Deserialize)]
struct HealthRow {
    /// Version of this layout.
    v: u32,
    #[serde(flatten)]
    history: History,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(HEALTH)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    txn.open_table(HEALTH)?.remove(agent.0.as_u128())?;
    Ok(())
}

impl Store {
    /// What is known of an agent's health. A row that cannot be read is none: it is shown, and nothing rests on it.
    pub fn health(&self, agent: AgentId) -> Result<History, StoreError> {
        self.read(|txn| {
            let row = txn.open_table(HEALTH)?.get(agent.0.as_u128())?;
            let row = row.and_then(|row| serde_json::from_slice::<HealthRow>(row.value()).ok());
            Ok(Ok(row.map(|row| row.history).unwrap_or_default()))
        })
    }

    /// Nothing is kept of an agent that is not there any more.
    pub fn set_health(&self, agent: AgentId, history: History) -> Result<(), StoreError> {
        let row = encode(&HealthRow { v: 1, history });
        self.write(|txn| {
            if txn.open_table(super::agents::AGENT)?.get(agent.0.as_u128())?.is_some() {
                txn.open_table(HEALTH)?.insert(agent.0.as_u128(), row.as_slice())?;
            }
            Ok(Ok(()))
        })
    }
}
