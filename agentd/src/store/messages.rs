//! Rows of the messages that people send to agents, and of the answers.

use super::{Store, StoreError, encode};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// Agent and sequence number to [`MessageRow`].
const MESSAGE: TableDefinition<(u128, u64), &[u8]> = TableDefinition::new("message");
/// Agent to the next sequence number: they are never reused, even when old messages are dropped.
const NEXT: TableDefinition<u128, u64> = TableDefinition::new("message_next");

/// Answered messages beyond these are forgotten, oldest first.
const KEPT: usize = 500;
/// More unanswered messages than this mean that nobody answers.
pub const WAITING_MOST: usize = 100;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageRow {
    pub v: u32,
    pub from: String,
    pub text: String,
    pub sent_unix_ms: i64,
    /// The sender's idempotency key.
    pub key: Option<String>,
    /// How often an agent has been given it.
    pub attempts: u32,
    pub state: MessageState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MessageState {
    Waiting,
    Answered { outcome: Outcome, unix_ms: i64 },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    Done { text: String, notes: Vec<String> },
    Failed { report: Report },
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(MESSAGE)?;
    txn.open_table(NEXT)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: u128) -> Result<(), redb::Error> {
    txn.open_table(MESSAGE)?.retain_in((agent, 0)..=(agent, u64::MAX), |_, _| false)?;
    txn.open_table(NEXT)?.remove(agent)?;
    Ok(())
}

impl Store {
    /// Queues a message and gives its number. With a key that a kept message carries, that one's number.
    pub fn add_message(&self, agent: AgentId, row: &MessageRow) -> Result<u64, StoreError> {
        let agent = agent.0.as_u128();
        self.write(|txn| {
            let mut messages = txn.open_table(MESSAGE)?;
            let mut waiting = 0;
            let mut answered = Vec::new();
            for entry in messages.range((agent, 0)..=(agent, u64::MAX))? {
                let (key, bytes) = entry?;
                let (_, seq) = key.value();
                let old: MessageRow = match self.decode(&format!("message {seq}"), bytes.value()) {
                    Ok(old) => old,
                    Err(error) => return Ok(Err(error)),
                };
                if old.key.is_some() && old.key == row.key {
                    return Ok(Ok(seq));
                }
                match old.state {
                    MessageState::Waiting => waiting += 1,
                    MessageState::Answered { .. } => answered.push(seq),
                }
            }
            if waiting >= WAITING_MOST {
                return Ok(Err(StoreError::InboxFull { waiting }));
            }
            for &seq in answered.iter().take(answered.len().saturating_sub(KEPT - 1)) {
                messages.remove((agent, seq))?;
            }
            let mut next = txn.open_table(NEXT)?;
            let seq = next.get(agent)?.map_or(1, |row| row.value());
            next.insert(agent, seq + 1)?;
            messages.insert((agent, seq), encode(row).as_slice())?;
            Ok(Ok(seq))
        })
    }

    pub fn message(&self, agent: AgentId, seq: u64) -> Result<Option<MessageRow>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(MESSAGE)?;
            let Some(bytes) = table.get((agent.0.as_u128(), seq))? else { return Ok(Ok(None)) };
            Ok(self.decode(&format!("message {seq}"), bytes.value()).map(Some))
        })
    }

    /// All that are kept, oldest first.
    pub fn messages(&self, agent: AgentId) -> Result<Vec<(u64, MessageRow)>, StoreError> {
        let agent = agent.0.as_u128();
        self.read(|txn| {
            let mut rows = Vec::new();
            for entry in txn.open_table(MESSAGE)?.range((agent, 0)..=(agent, u64::MAX))? {
                let (key, bytes) = entry?;
                let (_, seq) = key.value();
                match self.decode(&format!("message {seq}"), bytes.value()) {
                    Ok(row) => rows.push((seq, row)),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(rows))
        })
    }

    /// Counts one delivery more.
    pub fn deliver_message(&self, agent: AgentId, seq: u64) -> Result<MessageRow, StoreError> {
        self.change_message(agent, seq, |row| row.attempts += 1)
    }

    /// Enters the answer. The first one stays.
    pub fn answer_message(
        &self,
        agent: AgentId,
        seq: u64,
        outcome: Outcome,
        unix_ms: i64,
    ) -> Result<MessageRow, StoreError> {
        self.change_message(agent, seq, |row| {
            if row.state == MessageState::Waiting {
                row.state = MessageState::Answered { outcome, unix_ms };
            }
        })
    }

    fn change_message(
        &self,
        agent: AgentId,
        seq: u64,
        change: impl FnOnce(&mut MessageRow),
    ) -> Result<MessageRow, StoreError> {
        let key = (agent.0.as_u128(), seq);
        self.write(|txn| {
            let mut table = txn.open_table(MESSAGE)?;
            let found = match table.get(key)? {
                Some(bytes) => self.decode::<MessageRow>(&format!("message {seq}"), bytes.value()),
                None => Err(StoreError::NoMessage(seq.to_string())),
            };
            let mut row = match found {
                Ok(row) => row,
                Err(error) => return Ok(Err(error)),
            };
            change(&mut row);
            table.insert(key, encode(&row).as_slice())?;
            Ok(Ok(row))
        })
    }
}
