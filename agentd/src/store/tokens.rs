//! The token of each agent, and what was revoked.

use super::{Kept, Store, StoreError, agents, encode, once};
use agentd_domain::ids::AgentId;
use agentd_domain::token::{RevocationId, Revoked};
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// Agent to [`TokenRow`].
const TOKEN: TableDefinition<u128, &[u8]> = TableDefinition::new("token");
/// Revocation id to [`RevokedRow`]. Rows stay for ever: an id that was forgotten would be valid again.
const REVOKED: TableDefinition<&str, &[u8]> = TableDefinition::new("revoked");

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    pub v: u32,
    pub token: String,
    pub minted_unix_ms: i64,
    /// SHA-256 (hex) of the rights that the manifest asked for, where the token gives just those: when an update
    /// changes them the token is renewed. Absent where the owner or a parent gave less.
    #[serde(default)]
    pub asked: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RevokedRow {
    v: u32,
    unix_ms: i64,
    by: String,
    why: String,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(TOKEN)?;
    txn.open_table(REVOKED)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    txn.open_table(TOKEN)?.remove(agent.0.as_u128())?;
    Ok(())
}

impl Store {
    pub fn token(&self, agent: AgentId) -> Result<Option<TokenRow>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(TOKEN)?;
            let Some(bytes) = table.get(agent.0.as_u128())? else { return Ok(Ok(None)) };
            Ok(self.decode(&format!("token {agent}"), bytes.value()).map(Some))
        })
    }

    /// A new agent with its token; its name must be free.
    pub fn add_agent_with(&self, row: &super::AgentRow, token: &TokenRow) -> Result<(), StoreError> {
        self.write(|txn| add(txn, row, token))
    }

    /// The same for a child, with the answer to its parent's request. When the parent has had an answer to the same
    /// key nothing is added, and that one is given back.
    pub fn add_child(
        &self,
        parent: AgentId,
        row: &super::AgentRow,
        token: &TokenRow,
        answer: Option<(&str, &Kept)>,
    ) -> Result<Option<Kept>, StoreError> {
        self.write(|txn| {
            if let Some((key, kept)) = answer {
                match once::kept_in(self, txn, parent, key, kept.unix_ms)? {
                    Ok(None) => once::keep_in(txn, parent, key, kept)?,
                    earlier => return Ok(earlier),
                }
            }
            Ok(add(txn, row, token)?.map(|()| None))
        })
    }

    /// A token in place of the one that the agent has, which is revoked by the same commit.
    pub fn replace_token(
        &self,
        agent: AgentId,
        token: &TokenRow,
        revoked: Option<&Revoked>,
    ) -> Result<(), StoreError> {
        self.write(|txn| {
            if !agents::exists(txn, agent)? {
                return Ok(Err(StoreError::NoAgent(agent.to_string())));
            }
            if let Some(revoked) = revoked {
                insert(txn, revoked)?;
            }
            txn.open_table(TOKEN)?.insert(agent.0.as_u128(), encode(token).as_slice())?;
            Ok(Ok(()))
        })
    }

    /// What was revoked before stays as it was entered.
    pub fn revoke(&self, revoked: &Revoked) -> Result<Revoked, StoreError> {
        self.write(|txn| {
            let earlier = {
                let table = txn.open_table(REVOKED)?;
                table.get(revoked.id.0.as_str())?.map(|bytes| self.entry(&revoked.id.0, bytes.value()))
            };
            match earlier {
                Some(earlier) => Ok(earlier),
                None => {
                    insert(txn, revoked)?;
                    Ok(Ok(revoked.clone()))
                }
            }
        })
    }

    pub fn revoked(&self) -> Result<Vec<Revoked>, StoreError> {
        self.read(|txn| {
            let mut entries = Vec::new();
            for entry in txn.open_table(REVOKED)?.iter()? {
                let (id, bytes) = entry?;
                match self.entry(id.value(), bytes.value()) {
                    Ok(revoked) => entries.push(revoked),
                    Err(error) => return Ok(Err(error)),
                }
            }
            entries.sort_by_key(|revoked| revoked.unix_ms);
            Ok(Ok(entries))
        })
    }

    fn entry(&self, id: &str, bytes: &[u8]) -> Result<Revoked, StoreError> {
        let row: RevokedRow = self.decode(&format!("revoked {id}"), bytes)?;
        Ok(Revoked { id: RevocationId(id.to_owned()), unix_ms: row.unix_ms, by: row.by, why: row.why })
    }
}

fn add(
    txn: &WriteTransaction,
    row: &super::AgentRow,
    token: &TokenRow,
) -> Result<Result<(), StoreError>, redb::Error> {
    let added = agents::add(txn, row)?;
    if added.is_ok() {
        txn.open_table(TOKEN)?.insert(row.agent_id.0.as_u128(), encode(token).as_slice())?;
    }
    Ok(added)
}

fn insert(txn: &WriteTransaction, revoked: &Revoked) -> Result<(), redb::Error> {
    let row = RevokedRow { v: 1, unix_ms: revoked.unix_ms, by: revoked.by.clone(), why: revoked.why.clone() };
    txn.open_table(REVOKED)?.insert(revoked.id.0.as_str(), encode(&row).as_slice())?;
    Ok(())
}
