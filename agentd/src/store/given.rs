//! Which devices are in trouble, and which are agents' own; `crate::gpu` says what follows from it.

use super::learned::Row;
use super::{Store, StoreError, encode};
use crate::gpu::{Grant, Lease, Trouble};
use agentd_domain::ids::{AgentId, RunId};
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use std::collections::BTreeMap;
use uuid::Uuid;

/// A device's id to what was said of it.
const TROUBLE: TableDefinition<&str, &[u8]> = TableDefinition::new("device_trouble");
/// An agent to the device that its owner gave to it alone.
const GRANT: TableDefinition<u128, &[u8]> = TableDefinition::new("device_grant");
/// A run to what it has of a device.
const LEASE: TableDefinition<u128, &[u8]> = TableDefinition::new("device_lease");

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(TROUBLE)?;
    txn.open_table(GRANT)?;
    txn.open_table(LEASE)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    txn.open_table(GRANT)?.remove(agent.0.as_u128())?;
    Ok(())
}

impl Store {
    /// A row that cannot be read says nothing more than that there was one: the device is looked at anew.
    pub fn troubles(&self) -> Result<BTreeMap<String, Trouble>, StoreError> {
        self.learned(TROUBLE)
    }

    /// All of them, in place of those that were there.
    pub fn set_troubles(&self, all: &BTreeMap<String, Trouble>) -> Result<(), StoreError> {
        self.set_learned(TROUBLE, all)
    }

    pub fn device_grants(&self) -> Result<BTreeMap<AgentId, Grant>, StoreError> {
        self.read(|txn| {
            let mut all = BTreeMap::new();
            for row in txn.open_table(GRANT)?.iter()? {
                let (agent, bytes) = row?;
                let agent = AgentId(Uuid::from_u128(agent.value()));
                match self.decode::<Row<Grant>>(&format!("device grant of {agent}"), bytes.value()) {
                    Ok(row) => drop(all.insert(agent, row.row)),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(all))
        })
    }

    pub fn set_device_grant(&self, agent: AgentId, grant: Option<&Grant>) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(GRANT)?;
            match grant {
                Some(row) => drop(table.insert(agent.0.as_u128(), encode(&Row { v: 1, row }).as_slice())?),
                None => drop(table.remove(agent.0.as_u128())?),
            }
            Ok(Ok(()))
        })
    }

    pub fn device_leases(&self) -> Result<BTreeMap<RunId, Lease>, StoreError> {
        self.read(|txn| {
            let mut all = BTreeMap::new();
            for row in txn.open_table(LEASE)?.iter()? {
                let (run, bytes) = row?;
                let run = RunId(Uuid::from_u128(run.value()));
                match self.decode::<Row<Lease>>(&format!("device lease of {run}"), bytes.value()) {
                    Ok(row) => drop(all.insert(run, row.row)),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(all))
        })
    }

    pub fn set_device_lease(&self, run: RunId, lease: Option<&Lease>) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(LEASE)?;
            match lease {
                Some(row) => drop(table.insert(run.0.as_u128(), encode(&Row { v: 1, row }).as_slice())?),
                None => drop(table.remove(run.0.as_u128())?),
            }
            Ok(Ok(()))
        })
    }
}
