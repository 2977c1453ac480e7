//! Which partitions of devices are defined, and which agents are in them.

use super::{Store, StoreError, encode};
use agentd_domain::ids::AgentId;
use agentd_domain::ledger::{Partition, PartitionId};
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Name to [`PartitionRow`].
const PARTITION: TableDefinition<&str, &[u8]> = TableDefinition::new("partition");
/// Agent to the name of its partition; who has no row is in the default one.
const IN_PARTITION: TableDefinition<u128, &str> = TableDefinition::new("agent_partition");

#[derive(Debug, Serialize, Deserialize)]
struct PartitionRow {
    /// Version of this layout.
    v: u32,
    partition: Partition,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(PARTITION)?;
    txn.open_table(IN_PARTITION)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    txn.open_table(IN_PARTITION)?.remove(agent.0.as_u128())?;
    Ok(())
}

impl Store {
    /// Sorted by name.
    pub fn partitions(&self) -> Result<Vec<Partition>, StoreError> {
        self.read(|txn| {
            let mut all = Vec::new();
            for row in txn.open_table(PARTITION)?.iter()? {
                let (name, bytes) = row?;
                match self.decode::<PartitionRow>(&format!("partition {}", name.value()), bytes.value()) {
                    Ok(row) => all.push(row.partition),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(all))
        })
    }

    pub fn assigned_partitions(&self) -> Result<BTreeMap<AgentId, PartitionId>, StoreError> {
        self.read(|txn| {
            let mut all = BTreeMap::new();
            for row in txn.open_table(IN_PARTITION)?.iter()? {
                let (agent, name) = row?;
                // A name that no version would have written assigns nobody.
                if let Ok(id) = name.value().parse() {
                    all.insert(AgentId(Uuid::from_u128(agent.value())), id);
                }
            }
            Ok(Ok(all))
        })
    }

    /// All of both tables, in one transaction.
    pub fn set_partitions(
        &self,
        partitions: &[Partition],
        assigned: &BTreeMap<AgentId, PartitionId>,
    ) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(PARTITION)?;
            table.retain(|_, _| false)?;
            for partition in partitions {
                let row = PartitionRow { v: 1, partition: partition.clone() };
                table.insert(partition.id.as_str(), encode(&row).as_slice())?;
            }
            let mut table = txn.open_table(IN_PARTITION)?;
            table.retain(|_, _| false)?;
            for (agent, id) in assigned {
                table.insert(agent.0.as_u128(), id.as_str())?;
            }
            Ok(Ok(()))
        })
    }
}
