//! Rows of agents and of their runs.

use super::{META, Store, StoreError, encode};
use agentd_domain::ids::{AgentId, AgentName, OwnerId};
use agentd_domain::launcher::ExitRecord;
use agentd_domain::paths;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

pub(super) const AGENT: TableDefinition<u128, &[u8]> = TableDefinition::new("agent");
/// `<owner>/<name>` to the agent: a name is unique per owner.
const NAME: TableDefinition<&str, u128> = TableDefinition::new("agent_name");
/// Agent and run to [`RunRow`]. Run ids are UUIDv7, so they sort by their start.
const RUN: TableDefinition<(u128, u128), &[u8]> = TableDefinition::new("run");

/// The ledger keeps so many runs of each agent.
const RUNS_KEPT: usize = 50;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRow {
    /// Version of this layout.
    pub v: u32,
    pub agent_id: AgentId,
    pub owner_id: OwnerId,
    pub name: AgentName,
    pub version: String,
    /// SHA-256 of the package, lower-case hex.
    pub digest: String,
    /// `agent.toml`, word for word.
    pub manifest: String,
    pub uid: u32,
    pub wanted: bool,
    pub bundled: bool,
    pub restarts: u32,
    pub installed_unix_ms: i64,
    /// Whose child it is. Its package and manifest are its parent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<AgentId>,
    /// What its parent adds to the program's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRow {
    pub v: u32,
    pub ended_unix_ms: i64,
    pub exit: ExitRecord,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(AGENT)?;
    txn.open_table(NAME)?;
    txn.open_table(RUN)?;
    Ok(())
}

/// In the table of the store itself: the hash of the root whose bundled agents were installed last.
const BUNDLED_FROM: &str = "bundled_from";

impl Store {
    /// The root hash (hex) of the image whose bundled agents are all installed.
    pub fn bundled_from(&self) -> Result<Option<String>, StoreError> {
        self.read(|txn| {
            let row = txn.open_table(META)?.get(BUNDLED_FROM)?;
            Ok(Ok(row.map(|row| String::from_utf8_lossy(row.value()).into_owned())))
        })
    }

    pub fn set_bundled_from(&self, root_hash: &str) -> Result<(), StoreError> {
        self.write(|txn| {
            txn.open_table(META)?.insert(BUNDLED_FROM, root_hash.as_bytes())?;
            Ok(Ok(()))
        })
    }

    /// A uid that no agent had before.
    pub fn next_uid(&self) -> Result<u32, StoreError> {
        self.next_uid_below(paths::UID_AGENTS_END)
    }

    /// The same for a child: agents that start children all day leave half of all uids to their owner.
    pub fn next_child_uid(&self) -> Result<u32, StoreError> {
        self.next_uid_below(paths::UID_AGENTS_FIRST.midpoint(paths::UID_AGENTS_END))
    }

    fn next_uid_below(&self, end: u32) -> Result<u32, StoreError> {
        self.write(|txn| {
            let mut meta = txn.open_table(META)?;
            let next = meta.get("next_uid")?.and_then(|row| row.value().first_chunk().copied());
            let uid = next.map_or(paths::UID_AGENTS_FIRST, u32::from_le_bytes);
            if uid >= end {
                return Ok(Err(StoreError::UidsSpent));
            }
            meta.insert("next_uid", (uid + 1).to_le_bytes().as_slice())?;
            Ok(Ok(uid))
        })
    }

    /// A new agent; its name must be free.
    pub fn add_agent(&self, row: &AgentRow) -> Result<(), StoreError> {
        self.write(|txn| add(txn, row))
    }

    /// Changes what is known of an agent. Its id and name stay.
    pub fn change_agent(
        &self,
        agent: AgentId,
        change: impl FnOnce(&mut AgentRow),
    ) -> Result<AgentRow, StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(AGENT)?;
            let found = match table.get(agent.0.as_u128())? {
                Some(bytes) => self.decode::<AgentRow>(&format!("agent {agent}"), bytes.value()),
                None => Err(StoreError::NoAgent(agent.to_string())),
            };
            let mut row = match found {
                Ok(row) => row,
                Err(error) => return Ok(Err(error)),
            };
            change(&mut row);
            table.insert(agent.0.as_u128(), encode(&row).as_slice())?;
            Ok(Ok(row))
        })
    }

    /// Nothing when there is no such agent.
    pub fn agent(&self, agent: AgentId) -> Result<Option<AgentRow>, StoreError> {
        self.read(|txn| match txn.open_table(AGENT)?.get(agent.0.as_u128())? {
            None => Ok(Ok(None)),
            Some(bytes) => Ok(self.decode(&format!("agent {agent}"), bytes.value()).map(Some)),
        })
    }

    pub fn agents(&self) -> Result<Vec<AgentRow>, StoreError> {
        self.read(|txn| {
            let mut rows = Vec::new();
            for entry in txn.open_table(AGENT)?.iter()? {
                let (key, bytes) = entry?;
                match self.decode(&format!("agent {:x}", key.value()), bytes.value()) {
                    Ok(row) => rows.push(row),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(rows))
        })
    }

    /// Forgets an agent with everything this store holds of it.
    pub fn remove_agent(&self, row: &AgentRow) -> Result<(), StoreError> {
        let agent = row.agent_id.0.as_u128();
        let name = name_key(row.owner_id, &row.name);
        self.write(|txn| {
            txn.open_table(AGENT)?.remove(agent)?;
            txn.open_table(NAME)?.remove(name.as_str())?;
            txn.open_table(RUN)?.retain_in((agent, 0)..=(agent, u128::MAX), |_, _| false)?;
            super::messages::forget(txn, row.agent_id)?;
            super::once::forget(txn, row.agent_id)?;
            super::requests::forget(txn, row.agent_id)?;
            super::tokens::forget(txn, row.agent_id)?;
            super::egress::forget(txn, row.agent_id)?;
            super::health::forget(txn, row.agent_id)?;
            super::partitions::forget(txn, row.agent_id)?;
            super::given::forget(txn, row.agent_id)?;
            super::collections::forget(txn, row.agent_id)?;
            Ok(Ok(()))
        })
    }

    /// Enters how a run ended, and how often its agent was started again. Twice is once.
    pub fn end_run(&self, exit: &ExitRecord, ended_unix_ms: i64) -> Result<(), StoreError> {
        let agent = exit.agent_id.0.as_u128();
        let row = encode(&RunRow { v: 1, ended_unix_ms, exit: exit.clone() });
        self.write(|txn| {
            if txn.open_table(AGENT)?.get(agent)?.is_none() {
                return Ok(Ok(()));
            }
            let mut runs = txn.open_table(RUN)?;
            runs.insert((agent, exit.run_id.0.as_u128()), row.as_slice())?;
            let kept = runs.range((agent, 0)..=(agent, u128::MAX))?.count();
            if kept > RUNS_KEPT {
                let oldest = runs
                    .range((agent, 0)..=(agent, u128::MAX))?
                    .next()
                    .transpose()?
                    .map(|(key, _)| key.value());
                if let Some(oldest) = oldest {
                    runs.remove(oldest)?;
                }
            }
            Ok(Ok(()))
        })
    }

    /// How the agent's newest runs ended, newest first. A row of a newer version, after a way back, may not be readable:
    /// it is left out, as nothing rests on it.
    pub fn last_exits(&self, agent: AgentId, most: usize) -> Result<Vec<ExitRecord>, StoreError> {
        let key = agent.0.as_u128();
        self.read(|txn| {
            let table = txn.open_table(RUN)?;
            let mut exits = Vec::new();
            for entry in table.range((key, 0)..=(key, u128::MAX))?.rev().take(most) {
                let (run, bytes) = entry?;
                let row: Result<RunRow, _> = self.decode(&format!("run {:?}", run.value()), bytes.value());
                match row {
                    Ok(row) => exits.push(row.exit),
                    Err(error) => tracing::warn!(%agent, %error, "how a run ended cannot be read"),
                }
            }
            Ok(Ok(exits))
        })
    }
}

pub(super) fn add(txn: &WriteTransaction, row: &AgentRow) -> Result<Result<(), StoreError>, redb::Error> {
    let name = name_key(row.owner_id, &row.name);
    let mut names = txn.open_table(NAME)?;
    if names.get(name.as_str())?.is_some() {
        return Ok(Err(StoreError::NameTaken(row.name.to_string())));
    }
    names.insert(name.as_str(), row.agent_id.0.as_u128())?;
    txn.open_table(AGENT)?.insert(row.agent_id.0.as_u128(), encode(row).as_slice())?;
    Ok(Ok(()))
}

pub(super) fn exists(txn: &WriteTransaction, agent: AgentId) -> Result<bool, redb::Error> {
    Ok(txn.open_table(AGENT)?.get(agent.0.as_u128())?.is_some())
}

fn name_key(owner: OwnerId, name: &AgentName) -> String {
    format!("{owner}/{name}")
}
