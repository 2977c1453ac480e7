//! Rows of the audit log.
//!
//! Lines are kept as an export has them, so that what is read is what was signed. Who chains and signs them is
//! `crate::audit`, the one writer.

use super::{META, Store, StoreError};
use agentd_audit::{authentic, linked_line, signed_line};
use agentd_domain::audit::{Digest, Linked, SignedHead};
use agentd_domain::ids::AgentId;
use redb::{AccessGuard, ReadableTable, TableDefinition, WriteTransaction};

/// Sequence number to the record's line.
const AUDIT: TableDefinition<u64, &[u8]> = TableDefinition::new("audit");
/// The number of the newest record it vouches for to the head's line.
const HEAD: TableDefinition<u64, &[u8]> = TableDefinition::new("audit_head");
/// In the table of the store itself: how many bytes both tables hold, counted as [`weight`] does.
const BYTES: &str = "audit_bytes";

/// The log's share of the data partition: about 40,000 records. redb needs up to twice that on disk.
pub const AUDIT_MOST_BYTES: u64 = 16 * 1024 * 1024;
/// An answer is made in memory.
const PAGE_MOST_BYTES: usize = 1024 * 1024;
/// A key and redb's own bookkeeping of a small row.
const ROW_BYTES: u64 = 32;

/// The log as the last commit left it.
#[derive(Debug, Default)]
pub struct AuditEnd {
    /// The newest head that its own key has signed.
    pub head: Option<SignedHead>,
    /// Newer rows of heads that nobody has signed so.
    pub bad_heads: u64,
    /// The rows behind the head; of the whole log when there is none.
    pub unsigned: Vec<(u64, Vec<u8>)>,
    /// The number of the first and of the last row, when there are any.
    pub rows: Option<(u64, u64)>,
}

/// Where the log begins now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Front {
    pub first_seq: u64,
    pub before: Digest,
}

/// Which lines are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditQuery {
    /// Records after this one, oldest first; without it the newest ones.
    pub after: Option<u64>,
    pub most: usize,
    /// Only this agent's records, and no heads.
    pub agent: Option<AgentId>,
}

pub(super) fn create_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(AUDIT)?;
    txn.open_table(HEAD)?;
    Ok(())
}

impl Store {
    pub fn audit_end(&self) -> Result<AuditEnd, StoreError> {
        self.read(|txn| {
            let (records, heads) = (txn.open_table(AUDIT)?, txn.open_table(HEAD)?);
            let mut end = AuditEnd::default();
            for entry in heads.iter()?.rev() {
                let (_, row) = entry?;
                end.head = serde_json::from_slice(row.value()).ok().filter(authentic);
                if end.head.is_some() {
                    break;
                }
                end.bad_heads += 1;
            }
            if let (Some((first, _)), Some((last, _))) = (records.first()?, records.last()?) {
                end.rows = Some((first.value(), last.value()));
            }
            let signed_seq = end.head.as_ref().map_or(0, |signed| signed.head.seq);
            for entry in records.range(signed_seq.saturating_add(1)..)? {
                let (seq, row) = entry?;
                end.unsigned.push((seq.value(), row.value().to_vec()));
            }
            Ok(Ok(end))
        })
    }

    /// Adds records in one transaction. When the log has grown over `most_bytes` an eighth of it is dropped from
    /// its front, and `seal` is told so: it must give a head then, which is stored in the same transaction.
    pub fn add_audit(
        &self,
        records: &[Linked],
        front: Front,
        most_bytes: u64,
        seal: impl FnOnce(Front, Dropped) -> Option<SignedHead>,
    ) -> Result<Front, StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(AUDIT)?;
            let mut meta = txn.open_table(META)?;
            let known = meta.get(BYTES)?.and_then(|row| row.value().first_chunk().copied());
            let mut bytes = known.map_or(0, u64::from_le_bytes);
            for linked in records {
                let line = linked_line(linked);
                bytes += weight(&line);
                table.insert(linked.record.seq, line.as_slice())?;
            }
            let mut heads = txn.open_table(HEAD)?;
            let mut front = front;
            let mut dropped = Dropped::Nothing;
            if bytes > most_bytes {
                dropped = Dropped::Some;
                drop_front(&mut table, &mut heads, &mut front, &mut bytes, most_bytes - most_bytes / 8)?;
            }
            if let Some(head) = seal(front, dropped) {
                let line = signed_line(&head);
                bytes += weight(&line);
                if let Some(replaced) = heads.insert(head.head.seq, line.as_slice())? {
                    bytes = bytes.saturating_sub(weight(replaced.value()));
                }
            }
            meta.insert(BYTES, bytes.to_le_bytes().as_slice())?;
            Ok(Ok(front))
        })
    }

    /// Heads of a key that is no longer ours vouch for nothing that anybody can check.
    pub fn drop_audit_heads(&self) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut meta = txn.open_table(META)?;
            let known = meta.get(BYTES)?.and_then(|row| row.value().first_chunk().copied());
            let mut bytes = known.map_or(0, u64::from_le_bytes);
            txn.open_table(HEAD)?.retain(|_, row| {
                bytes = bytes.saturating_sub(weight(row));
                false
            })?;
            meta.insert(BYTES, bytes.to_le_bytes().as_slice())?;
            Ok(Ok(()))
        })
    }

    /// Lines of an export: records, each with the head behind it.
    pub fn audit_lines(&self, query: &AuditQuery) -> Result<Vec<u8>, StoreError> {
        self.read(|txn| {
            let (records, heads) = (txn.open_table(AUDIT)?, txn.open_table(HEAD)?);
            let rows = match query.after {
                Some(after) => gather(records.range(after.saturating_add(1)..)?, query)?,
                None => {
                    let mut newest = gather(records.iter()?.rev(), query)?;
                    newest.reverse();
                    newest
                }
            };
            let mut lines: Vec<Vec<u8>> = Vec::new();
            let kept_first = records.first()?.map(|(seq, _)| seq.value());
            // Before the first record that is kept there is a head when none was before it, or all were dropped.
            let front = match (kept_first, rows.first()) {
                (Some(kept), Some((first, _))) if kept == *first => heads.get(first - 1)?,
                (None, _) => heads.last()?.map(|(_, row)| row),
                _ => None,
            };
            lines.extend(front.map(|row| row.value().to_vec()));
            for (seq, line) in rows {
                lines.push(line);
                lines.extend(heads.get(seq)?.map(|row| row.value().to_vec()));
            }
            if query.agent.is_some() {
                // Heads vouch for the whole and not for a part.
                lines.retain(|line| serde_json::from_slice::<SignedHead>(line).is_err());
            }
            lines.iter_mut().for_each(|line| line.push(b'\n'));
            Ok(Ok(lines.concat()))
        })
    }

    /// The newest head.
    pub fn audit_head(&self) -> Result<Option<SignedHead>, StoreError> {
        self.read(|txn| {
            let heads = txn.open_table(HEAD)?;
            let Some((seq, row)) = heads.last()? else { return Ok(Ok(None)) };
            Ok(self.decode(&format!("audit_head {}", seq.value()), row.value()).map(Some))
        })
    }

    /// For tests and for nothing else: how many rows and counted bytes there are.
    #[cfg(test)]
    pub fn audit_size(&self) -> (u64, u64, u64) {
        self.read(|txn| {
            let meta = txn.open_table(META)?;
            let bytes = meta.get(BYTES)?.and_then(|row| row.value().first_chunk().copied());
            use redb::ReadableTableMetadata;
            let (records, heads) = (txn.open_table(AUDIT)?.len()?, txn.open_table(HEAD)?.len()?);
            Ok(Ok((records, heads, bytes.map_or(0, u64::from_le_bytes))))
        })
        .expect("read")
    }

    /// For tests: what somebody who can write the disk may do.
    #[cfg(test)]
    pub fn spoil_audit(&self, seq: u64, line: Option<&[u8]>) {
        self.write(|txn| {
            let mut table = txn.open_table(AUDIT)?;
            match line {
                Some(line) => drop(table.insert(seq, line)?),
                None => drop(table.remove(seq)?),
            }
            Ok(Ok(()))
        })
        .expect("written");
    }
}

/// The rows that are asked for, as far as a page goes.
fn gather<'r>(
    entries: impl Iterator<
        Item = Result<(AccessGuard<'r, u64>, AccessGuard<'r, &'static [u8]>), redb::StorageError>,
    >,
    query: &AuditQuery,
) -> Result<Vec<(u64, Vec<u8>)>, redb::Error> {
    // Inside a text its quotes would be escaped, so this finds the field alone.
    let mark = query.agent.map(|agent| format!("\"agent_id\":\"{agent}\"").into_bytes());
    let wanted = |row: &[u8]| {
        let mark = mark.as_deref();
        mark.is_none_or(|mark| row.windows(mark.len()).any(|part| part == mark))
    };
    let (mut rows, mut bytes) = (Vec::new(), 0);
    for entry in entries {
        let (seq, row) = entry?;
        if rows.len() >= query.most || bytes >= PAGE_MOST_BYTES {
            break;
        }
        if wanted(row.value()) {
            bytes += row.value().len();
            rows.push((seq.value(), row.value().to_vec()));
        }
    }
    Ok(rows)
}

/// Whether records were dropped in this transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    Nothing,
    Some,
}

fn drop_front(
    table: &mut redb::Table<'_, u64, &'static [u8]>,
    heads: &mut redb::Table<'_, u64, &'static [u8]>,
    front: &mut Front,
    bytes: &mut u64,
    least_bytes: u64,
) -> Result<(), redb::Error> {
    while *bytes > least_bytes {
        let Some((seq, row)) = table.pop_first()? else { break };
        let (seq, line) = (seq.value(), row.value().to_vec());
        *bytes = bytes.saturating_sub(weight(&line));
        front.first_seq = seq + 1;
        if let Ok(linked) = serde_json::from_slice::<Linked>(&line) {
            front.before = linked.hash;
        }
    }
    // These vouch for what is gone.
    heads.retain_in(..front.first_seq, |_, row| {
        *bytes = bytes.saturating_sub(weight(row));
        false
    })?;
    Ok(())
}

fn weight(line: &[u8]) -> u64 {
    line.len() as u64 + ROW_BYTES
}
