//! Rows of the messages that people send to agents, and of the answers.

use super::{Store, StoreError, encode};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// Agent and sequence number to [`MessageRow`].
const MESSAGE: TableDefinition<(u128, u64), &[u8]> = TableDefinition::new("message");
/// The same key to the number of deliveries, for messages without an answer.
const WAITING: TableDefinition<(u128, u64), u32> = TableDefinition::new("message_waiting");
/// `<agent>/<the sender's key>` to the message's number.
const KEY: TableDefinition<&str, u64> = TableDefinition::new("message_key");
/// Agent to the next sequence number: they are never reused, even when old messages are dropped.
const NEXT: TableDefinition<u128, u64> = TableDefinition::new("message_next");

/// Messages further back than these are forgotten once they are answered.
const KEPT: u64 = 500;
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
    txn.open_table(WAITING)?;
    txn.open_table(KEY)?;
    txn.open_table(NEXT)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    let id = agent.0.as_u128();
    txn.open_table(MESSAGE)?.retain_in((id, 0)..=(id, u64::MAX), |_, _| false)?;
    txn.open_table(WAITING)?.retain_in((id, 0)..=(id, u64::MAX), |_, _| false)?;
    let (first, last) = super::keys_of(agent);
    txn.open_table(KEY)?.retain_in(first.as_str()..last.as_str(), |_, _| false)?;
    txn.open_table(NEXT)?.remove(id)?;
    Ok(())
}

impl Store {
    /// Queues a message and gives its number. With a key that a kept message carries, that one's number.
    pub fn add_message(&self, agent: AgentId, row: &MessageRow) -> Result<u64, StoreError> {
        let id = agent.0.as_u128();
        self.write(|txn| {
            let mut keys = txn.open_table(KEY)?;
            let key = row.key.as_ref().map(|key| format!("{agent}/{key}"));
            if let Some(key) = &key
                && let Some(seq) = keys.get(key.as_str())?
            {
                return Ok(Ok(seq.value()));
            }
            let mut waiting = txn.open_table(WAITING)?;
            let count = waiting.range((id, 0)..=(id, u64::MAX))?.count();
            if count >= WAITING_MOST {
                return Ok(Err(StoreError::InboxFull { waiting: count }));
            }
            let mut next = txn.open_table(NEXT)?;
            let seq = next.get(id)?.map_or(1, |row| row.value());
            next.insert(id, seq + 1)?;
            let mut messages = txn.open_table(MESSAGE)?;
            messages.insert((id, seq), encode(row).as_slice())?;
            waiting.insert((id, seq), 0)?;
            if let Some(key) = &key {
                keys.insert(key.as_str(), seq)?;
            }
            let before = (id, seq.saturating_sub(KEPT));
            let old = messages.range((id, 0)..before)?.map(|entry| entry.map(|(key, _)| key.value()));
            for old in old.collect::<Result<Vec<_>, _>>()? {
                if waiting.get(old)?.is_none()
                    && let Some(bytes) = messages.remove(old)?
                    && let Ok(MessageRow { key: Some(key), .. }) = serde_json::from_slice(bytes.value())
                {
                    keys.remove(format!("{agent}/{key}").as_str())?;
                }
            }
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

    /// Numbers of messages without an answer and how often each was delivered, oldest first.
    pub fn waiting_messages(&self, agent: AgentId) -> Result<Vec<(u64, u32)>, StoreError> {
        let id = agent.0.as_u128();
        self.read(|txn| {
            let mut waiting = Vec::new();
            for entry in txn.open_table(WAITING)?.range((id, 0)..=(id, u64::MAX))? {
                let (key, attempts) = entry?;
                waiting.push((key.value().1, attempts.value()));
            }
            Ok(Ok(waiting))
        })
    }

    /// The newest messages before this one, newest first.
    pub fn messages_before(
        &self,
        agent: AgentId,
        seq: u64,
        most: usize,
    ) -> Result<Vec<MessageRow>, StoreError> {
        let id = agent.0.as_u128();
        self.read(|txn| {
            let mut rows = Vec::new();
            for entry in txn.open_table(MESSAGE)?.range((id, 0)..(id, seq))?.rev().take(most) {
                let (key, bytes) = entry?;
                match self.decode(&format!("message {}", key.value().1), bytes.value()) {
                    Ok(row) => rows.push(row),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(rows))
        })
    }

    /// Counts one delivery more, and gives the message.
    pub fn deliver_message(&self, agent: AgentId, seq: u64) -> Result<MessageRow, StoreError> {
        let key = (agent.0.as_u128(), seq);
        self.write(|txn| {
            let mut waiting = txn.open_table(WAITING)?;
            let attempts = waiting.get(key)?.map_or(0, |attempts| attempts.value());
            waiting.insert(key, attempts.saturating_add(1))?;
            let table = txn.open_table(MESSAGE)?;
            let row = table.get(key)?;
            Ok(match row {
                Some(bytes) => self.decode(&format!("message {seq}"), bytes.value()),
                None => Err(StoreError::NoMessage(seq.to_string())),
            })
        })
    }

    /// Enters the answer. The first one stays.
    pub fn answer_message(
        &self,
        agent: AgentId,
        seq: u64,
        outcome: Outcome,
        unix_ms: i64,
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
            if row.state == MessageState::Waiting {
                row.state = MessageState::Answered { outcome, unix_ms };
                table.insert(key, encode(&row).as_slice())?;
                txn.open_table(WAITING)?.remove(key)?;
            }
            Ok(Ok(row))
        })
    }
}
