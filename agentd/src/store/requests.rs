//! What each agent has asked of models: the record of requests.
//!
//! Always: a request with a key is entered in the transaction that keeps its answer, before the answer's end is sent:
//!         who has seen the end finds the row, and a retry with the same key finds it too and enters nothing.
//! Bounded: the newest rows of each agent, and sums over all.

use super::agents::AGENT;
use super::once::{self, Kept};
use super::{Store, StoreError, encode};
use agentd_domain::ids::AgentId;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

/// Agent and number to [`RequestRow`]. Numbers begin with 1 and have no gap.
const REQUEST: TableDefinition<(u128, u64), &[u8]> = TableDefinition::new("request");
/// Agent to [`Totals`].
const TOTAL: TableDefinition<u128, &[u8]> = TableDefinition::new("request_total");

/// Rows of one agent: about 250 KB, and a day of one request in a minute and a half. The sums go on.
const ROWS_KEPT: u64 = 1_000;

/// A request to a model that was answered to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRow {
    pub v: u32,
    /// When its answer was at its end.
    pub unix_ms: i64,
    pub path: String,
    /// The client's `Idempotency-Key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    pub model: String,
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
}

/// Over all requests of an agent, also those whose rows are gone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub v: u32,
    /// The number of the newest row too.
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// Whether a request was entered by this call or had been before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    Now,
    Before,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(REQUEST)?;
    txn.open_table(TOTAL)?;
    Ok(())
}

pub(super) fn forget(txn: &WriteTransaction, agent: AgentId) -> Result<(), redb::Error> {
    let agent = agent.0.as_u128();
    txn.open_table(REQUEST)?.retain_in((agent, 0)..=(agent, u64::MAX), |_, _| false)?;
    txn.open_table(TOTAL)?.remove(agent)?;
    Ok(())
}

impl Store {
    /// Enters a request and keeps its answer under `place`, both or neither. A request whose place holds an answer
    /// already is one that was entered.
    pub fn settle(
        &self,
        agent: AgentId,
        row: &RequestRow,
        answer: Option<(&str, &Kept)>,
    ) -> Result<Settled, StoreError> {
        let id = agent.0.as_u128();
        self.write(|txn| {
            // It was removed while it asked: nothing of it may come back.
            if txn.open_table(AGENT)?.get(id)?.is_none() {
                return Ok(Err(StoreError::NoAgent(agent.to_string())));
            }
            if let Some((place, kept)) = answer {
                match once::kept_in(self, txn, agent, place, kept.unix_ms)? {
                    Ok(None) => once::keep_in(txn, agent, place, kept)?,
                    Ok(Some(earlier)) if earlier.request == kept.request => return Ok(Ok(Settled::Before)),
                    Ok(Some(_)) => return Ok(Err(StoreError::KeyReused)),
                    Err(error) => return Ok(Err(error)),
                }
            }
            let mut totals = txn.open_table(TOTAL)?;
            let before = match totals.get(id)? {
                None => Ok(Totals { v: 1, ..Totals::default() }),
                Some(bytes) => self.decode::<Totals>(&format!("requests of {agent}"), bytes.value()),
            };
            let mut sum = match before {
                Ok(sum) => sum,
                Err(error) => return Ok(Err(error)),
            };
            sum.requests += 1;
            sum.prompt_tokens += u64::from(row.prompt_tokens);
            sum.completion_tokens += u64::from(row.completion_tokens);
            totals.insert(id, encode(&sum).as_slice())?;
            let mut rows = txn.open_table(REQUEST)?;
            rows.insert((id, sum.requests), encode(row).as_slice())?;
            if let Some(old) = sum.requests.checked_sub(ROWS_KEPT) {
                rows.remove((id, old))?;
            }
            Ok(Ok(Settled::Now))
        })
    }
}

#[cfg(test)]
impl Store {
    /// An agent's rows, oldest first.
    pub fn requests(&self, agent: AgentId) -> Result<Vec<RequestRow>, StoreError> {
        let agent = agent.0.as_u128();
        self.read(|txn| {
            let mut rows = Vec::new();
            for entry in txn.open_table(REQUEST)?.range((agent, 0)..=(agent, u64::MAX))? {
                let (number, bytes) = entry?;
                match self.decode(&format!("request {:?}", number.value()), bytes.value()) {
                    Ok(row) => rows.push(row),
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(rows))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Scene, agent_row};
    use super::*;
    use redb::ReadableDatabase;

    fn rows(store: &Store, agent: AgentId) -> (Vec<(u64, RequestRow)>, Totals) {
        let txn = store.database.begin_read().expect("reads");
        let id = agent.0.as_u128();
        let rows = txn.open_table(REQUEST).expect("a table");
        let rows = rows.range((id, 0)..=(id, u64::MAX)).expect("a range").map(|row| {
            let (key, bytes) = row.expect("a row");
            (key.value().1, serde_json::from_slice(bytes.value()).expect("json"))
        });
        let rows = rows.collect();
        let totals = txn.open_table(TOTAL).expect("a table");
        let total = totals.get(id).expect("read");
        (rows, total.map(|bytes| serde_json::from_slice(bytes.value()).expect("json")).unwrap_or_default())
    }

    fn row(key: Option<&str>) -> RequestRow {
        RequestRow {
            v: 1,
            unix_ms: 7,
            path: "/v1/chat/completions".to_owned(),
            key: key.map(str::to_owned),
            model: "tiny".to_owned(),
            prompt_tokens: 3,
            completion_tokens: 2,
        }
    }

    fn kept(request: &str, unix_ms: i64) -> Kept {
        Kept {
            v: 1,
            unix_ms,
            request: request.to_owned(),
            status: 200,
            content_type: "text/plain".to_owned(),
            body: Some("answer".to_owned()),
        }
    }

    #[test]
    fn a_request_with_a_key_is_entered_once_and_another_body_is_refused() {
        let scene = Scene::new();
        let store = scene.open();
        let agent = agent_row(&store, 1, "echo");
        store.add_agent(&agent).expect("added");
        let agent = agent.agent_id;
        let settle = |key: &str, request: &str, unix_ms| {
            store.settle(agent, &row(Some(key)), Some((key, &kept(request, unix_ms))))
        };
        assert_eq!(settle("a", "digest", 1).expect("entered"), Settled::Now);
        assert_eq!(settle("a", "digest", 2).expect("known"), Settled::Before);
        assert!(matches!(settle("a", "other", 3), Err(StoreError::KeyReused)));
        assert_eq!(store.settle(agent, &row(None), None).expect("entered"), Settled::Now);
        let (found, totals) = rows(&store, agent);
        assert_eq!(found, [(1, row(Some("a"))), (2, row(None))]);
        assert_eq!(totals, Totals { v: 1, requests: 2, prompt_tokens: 6, completion_tokens: 4 });
        let day_ms = 24 * 3600 * 1000;
        assert_eq!(settle("a", "other", 2 + day_ms).expect("a day later it is a new key"), Settled::Now);
    }

    #[test]
    fn rows_are_bounded_sums_are_whole_and_a_removed_agent_leaves_nothing() {
        let scene = Scene::new();
        let store = scene.open();
        let (gone, stays) = (agent_row(&store, 1, "gone"), agent_row(&store, 2, "stays"));
        for agent in [&gone, &stays] {
            store.add_agent(agent).expect("added");
            store.settle(agent.agent_id, &row(None), None).expect("entered");
        }
        // As after very many requests; each by itself is a sync of the disk.
        let sum = Totals { v: 1, requests: 1_500, prompt_tokens: 4_500, completion_tokens: 3_000 };
        let id = stays.agent_id.0.as_u128();
        let prepared = store.write(|txn| {
            txn.open_table(TOTAL)?.insert(id, encode(&sum).as_slice())?;
            let mut rows = txn.open_table(REQUEST)?;
            rows.remove((id, 1))?;
            for number in 501..=1_500 {
                rows.insert((id, number), encode(&row(None)).as_slice())?;
            }
            Ok(Ok(()))
        });
        prepared.expect("prepared");
        store.settle(stays.agent_id, &row(None), None).expect("entered");
        store.remove_agent(&gone).expect("removed");
        assert!(matches!(store.settle(gone.agent_id, &row(None), None), Err(StoreError::NoAgent(_))));
        assert_eq!(rows(&store, gone.agent_id), (Vec::new(), Totals::default()));
        let (found, totals) = rows(&store, stays.agent_id);
        assert_eq!((found.len(), found.first().map(|row| row.0)), (1_000, Some(502)));
        assert_eq!((totals.requests, totals.prompt_tokens), (1_501, 4_503));
    }
}
