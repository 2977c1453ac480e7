//! Answers that are kept for a client that asks again with the same `Idempotency-Key`.

use super::{Store, StoreError, encode};
use agentd_domain::ids::AgentId;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// `<agent>/<method and path>/<key>` to [`Kept`].
const ONCE: TableDefinition<&str, &[u8]> = TableDefinition::new("once");
/// The same key to when the answer was made: what is over its time is found without reading answers.
const MADE: TableDefinition<&str, i64> = TableDefinition::new("once_made");

/// For how long a retry gets the first answer.
const KEPT_MS: i64 = 24 * 3600 * 1000;
/// Most answers kept of one agent: with the largest answer (256 KiB) 64 MiB at the very most.
const KEPT_PER_AGENT: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub v: u32,
    pub unix_ms: i64,
    /// SHA-256 of the request's body: the same key with another body is a mistake.
    pub request: String,
    pub status: u16,
    pub content_type: String,
    pub body: String,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(ONCE)?;
    txn.open_table(MADE)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    let (first, last) = super::keys_of(agent);
    txn.open_table(ONCE)?.retain_in(first.as_str()..last.as_str(), |_, _| false)?;
    txn.open_table(MADE)?.retain_in(first.as_str()..last.as_str(), |_, _| false)?;
    Ok(())
}

impl Store {
    pub fn kept(&self, agent: AgentId, key: &str, now_unix_ms: i64) -> Result<Option<Kept>, StoreError> {
        let key = format!("{agent}/{key}");
        self.read(|txn| {
            let table = txn.open_table(ONCE)?;
            let Some(bytes) = table.get(key.as_str())? else { return Ok(Ok(None)) };
            let kept: Result<Kept, _> = self.decode(&key, bytes.value());
            Ok(kept.map(|kept| Some(kept).filter(|kept| is_fresh(kept, now_unix_ms))))
        })
    }

    /// Keeps an answer and drops what is over its time.
    pub fn keep(&self, agent: AgentId, key: &str, kept: &Kept) -> Result<(), StoreError> {
        self.write(|txn| keep_in(txn, agent, key, kept).map(Ok))
    }
}

/// As [`Store::kept`], within a transaction that may keep one.
pub(super) fn kept_in(
    store: &Store,
    txn: &WriteTransaction,
    agent: AgentId,
    key: &str,
    now_unix_ms: i64,
) -> Result<Result<Option<Kept>, StoreError>, redb::Error> {
    let key = format!("{agent}/{key}");
    let table = txn.open_table(ONCE)?;
    let Some(bytes) = table.get(key.as_str())? else { return Ok(Ok(None)) };
    let kept: Result<Kept, _> = store.decode(&key, bytes.value());
    Ok(kept.map(|kept| Some(kept).filter(|kept| is_fresh(kept, now_unix_ms))))
}

pub(super) fn keep_in(
    txn: &WriteTransaction,
    agent: AgentId,
    key: &str,
    kept: &Kept,
) -> Result<(), redb::Error> {
    let (first, last) = super::keys_of(agent);
    let key = format!("{agent}/{key}");
    let (mut answers, mut made) = (txn.open_table(ONCE)?, txn.open_table(MADE)?);
    let mut alive = Vec::new();
    let mut dead = Vec::new();
    for entry in made.range(first.as_str()..last.as_str())? {
        let (key, unix_ms) = entry?;
        let (key, unix_ms) = (key.value().to_owned(), unix_ms.value());
        if (kept.unix_ms - unix_ms).abs() > KEPT_MS {
            dead.push(key);
        } else {
            alive.push((unix_ms, key));
        }
    }
    alive.sort();
    let surplus = (alive.len() + 1).saturating_sub(KEPT_PER_AGENT);
    dead.extend(alive.into_iter().take(surplus).map(|(_, key)| key));
    for key in dead {
        answers.remove(key.as_str())?;
        made.remove(key.as_str())?;
    }
    answers.insert(key.as_str(), encode(kept).as_slice())?;
    made.insert(key.as_str(), kept.unix_ms)?;
    Ok(())
}

/// A clock that was set back must not make an answer immortal: age counts both ways.
fn is_fresh(kept: &Kept, now_unix_ms: i64) -> bool {
    (now_unix_ms - kept.unix_ms).abs() <= KEPT_MS
}
