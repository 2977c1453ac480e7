//! Rows of what hurt an agent and what was done about it.

use super::agents::{AGENT, AgentRow};
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

    /// With how often it was started again: an end counts in both or in neither. Nothing is kept of an agent that is not
    /// there any more.
    pub fn set_health(&self, agent: AgentId, history: History, restarts: u32) -> Result<(), StoreError> {
        let key = agent.0.as_u128();
        let health = encode(&HealthRow { v: 1, history });
        self.write(|txn| {
            let mut agents = txn.open_table(AGENT)?;
            let found = match agents.get(key)? {
                Some(bytes) => self.decode::<AgentRow>(&format!("agent {agent}"), bytes.value()),
                None => return Ok(Ok(())),
            };
            let mut row = match found {
                Ok(row) => row,
                Err(error) => return Ok(Err(error)),
            };
            if row.restarts != restarts {
                row.restarts = restarts;
                agents.insert(key, encode(&row).as_slice())?;
            }
            txn.open_table(HEALTH)?.insert(key, health.as_slice())?;
            Ok(Ok(()))
        })
    }
}
