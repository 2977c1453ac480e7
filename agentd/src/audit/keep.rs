//! The thread that chains, stores and signs.
//!
//! ```text
//! waits ──▶ one transaction with all that waits ──▶ waits
//!   ▲                     │ cannot be written
//!   └── a pause ◀── put back, and a problem on the board
//! ```
//! Opening checks the records behind the newest head, a few hundred at most; `agentctl audit verify` checks all. A
//! log that is not whole is told on the board and in the log, and goes on behind its last row: what follows is kept
//! all the same, and the bad record stays the first that `verify` names.

use super::plan::Counted;
use super::{Audit, Progress, now};
use crate::clock;
use crate::health::{Board, Weight};
use crate::store::{AUDIT_MOST_BYTES, AuditEnd, Db, Dropped, Front, StoreError};
use agentd_audit::{Signer, follow, genesis, link};
use agentd_domain::audit::{Actor, Digest, Entry, Head, Linked, Record, VERSION, Verdict};
use agentd_domain::fault::Report;
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use std::time::Duration;

/// A head is about as long as two records.
const HEAD_EVERY_RECORDS: u64 = 256;
/// For so long whoever can write the store could replace the newest records unseen.
const HEAD_AFTER_MS: u64 = 30 * 1000;
/// A full disk does not become empty faster.
const TRY_AGAIN: Duration = Duration::from_secs(5);
const PLACE: &str = "audit";

pub(super) struct Keeper {
    audit: Audit,
    db: Db,
    signer: Signer,
    board: Arc<Board>,
    end: End,
    most_bytes: u64,
}

/// The end of the log, and where it begins.
struct End {
    seq: u64,
    hash: Digest,
    front: Front,
    /// Records that no head vouches for, and since when there are any.
    unsigned: u64,
    unsigned_since_ms: Option<u64>,
}

/// What was found when the log was opened, besides its end.
enum Found {
    Whole,
    New,
    OtherKey { old: String },
    Damaged { where_: String },
}

struct Turn {
    batch: Vec<Counted>,
    /// Calls of `report` that are dealt with when the batch is stored.
    upto: u64,
    seal: bool,
    over: bool,
}

impl Keeper {
    pub(super) fn open(audit: Audit, db: Db, signer: Signer, board: Arc<Board>) -> Result<Self, StoreError> {
        Self::open_with(audit, db, signer, board, AUDIT_MOST_BYTES)
    }

    pub(super) fn open_with(
        audit: Audit,
        db: Db,
        signer: Signer,
        board: Arc<Board>,
        most_bytes: u64,
    ) -> Result<Self, StoreError> {
        let (end, found) = judged(db.here().audit_end()?, &signer, clock::boot_ms());
        let told = |action: &str, detail: &str| {
            Entry::new(Actor::Appliance, action, Verdict::Allowed).detail(detail)
        };
        match found {
            Found::Whole => {}
            Found::New => audit.report(told("audit.begin", "")),
            Found::OtherKey { old } => {
                db.here().drop_audit_heads()?;
                audit.report(told("audit.key", &format!("the heads of the key {old} were dropped")));
            }
            Found::Damaged { where_ } => {
                board.set(PLACE, Weight::Degraded, damaged(&where_));
                audit.report(told("audit.damaged", &where_));
            }
        }
        Ok(Self { audit, db, signer, board, end, most_bytes })
    }

    pub(super) fn run(mut self) {
        let mut failing = false;
        loop {
            let turn = self.wait(failing);
            let (upto, over) = (turn.upto, turn.over);
            let sealed = match self.write(&turn.batch, turn.seal || over) {
                Ok(sealed) => {
                    if failing {
                        self.board.clear(PLACE);
                    }
                    failing = false;
                    sealed
                }
                Err(error) => {
                    self.board.set(PLACE, Weight::Degraded, error.report("the audit log is not written"));
                    self.audit.lock().pending.put_back(turn.batch);
                    failing = true;
                    false
                }
            };
            self.audit.0.progress.send_modify(|progress| {
                let stored = if failing { progress.stored } else { upto };
                let sealed = if sealed { upto.max(1) } else { progress.sealed };
                *progress = Progress { stored, sealed, failing, ended: over };
            });
            if over {
                return;
            }
        }
    }

    /// Returns when there is something to do. After a failure not before a pause.
    fn wait(&self, failing: bool) -> Turn {
        let shared = &self.audit.0;
        let mut inner = self.audit.lock();
        if failing && !inner.closing {
            let paused = shared.wake.wait_timeout_while(inner, TRY_AGAIN, |inner| !inner.closing);
            inner = match paused {
                Ok((inner, _)) => inner,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        loop {
            let at = now();
            let sealed = shared.progress.borrow().sealed;
            let head_due = self.end.unsigned_since_ms.map(|since| since + HEAD_AFTER_MS);
            let seal = inner.seal_wanted > sealed || head_due.is_some_and(|due| due <= at.boot_ms);
            let counts_due = inner.pending.next_boot_ms();
            let due = inner.pending.waits() || counts_due.is_some_and(|due| due <= at.boot_ms);
            if due || seal || inner.closing {
                let over = inner.closing;
                let batch = if over { inner.pending.drain_all(at) } else { inner.pending.drain(at) };
                return Turn { batch, upto: inner.reported, seal, over };
            }
            let until = [head_due, counts_due].into_iter().flatten().min();
            inner = match until {
                None => shared.wake.wait(inner).unwrap_or_else(std::sync::PoisonError::into_inner),
                Some(until) => {
                    let pause = Duration::from_millis(until.saturating_sub(at.boot_ms));
                    match shared.wake.wait_timeout(inner, pause) {
                        Ok((inner, _)) => inner,
                        Err(poisoned) => poisoned.into_inner().0,
                    }
                }
            };
        }
    }

    /// One transaction. True when a head vouches for all of it.
    pub(super) fn write(&mut self, batch: &[Counted], seal: bool) -> Result<bool, StoreError> {
        let records = chained(&self.end, batch);
        let unsigned = self.end.unsigned + records.len() as u64;
        let seal = seal || unsigned >= HEAD_EVERY_RECORDS;
        if records.is_empty() && !seal {
            return Ok(unsigned == 0);
        }
        let (seq, hash) =
            records.last().map_or((self.end.seq, self.end.hash), |last| (last.record.seq, last.hash));
        let signer = &self.signer;
        let mut sealed = false;
        let front =
            self.db.here().add_audit(&records, self.end.front, self.most_bytes, |front, dropped| {
                sealed = seal || dropped == Dropped::Some;
                let head = Head {
                    before: front.before,
                    first_seq: front.first_seq,
                    hash,
                    key: signer.key(),
                    seq,
                    unix_ms: clock::unix_ms(),
                    v: VERSION,
                };
                sealed.then(|| signer.sign(head))
            })?;
        let since = self.end.unsigned_since_ms.unwrap_or_else(clock::boot_ms);
        let (unsigned, unsigned_since_ms) = if sealed { (0, None) } else { (unsigned, Some(since)) };
        self.end = End { seq, hash, front, unsigned, unsigned_since_ms };
        Ok(sealed)
    }
}

fn chained(end: &End, batch: &[Counted]) -> Vec<Linked> {
    let mut hash = end.hash;
    (end.seq + 1..)
        .zip(batch)
        .map(|(seq, counted)| {
            let entry = counted.entry.clone();
            let record = Record {
                action: entry.action,
                actor: entry.actor,
                agent_id: entry.agent_id,
                boot_ms: counted.at.boot_ms,
                count: counted.count,
                detail: entry.detail,
                right: entry.right,
                run_id: entry.run_id,
                seq,
                unix_ms: counted.at.unix_ms,
                v: VERSION,
                verdict: entry.verdict,
            };
            hash = link(&hash, &record);
            Linked { hash, record }
        })
        .collect()
}

/// Where the log goes on, and whether what no head vouches for follows from the newest one. Pure.
fn judged(end: AuditEnd, signer: &Signer, boot_ms: u64) -> (End, Found) {
    let first = end.rows.map_or(1, |(first, _)| first);
    let (mut front, seq, hash) = match &end.head {
        Some(signed) => {
            let head = &signed.head;
            (Front { first_seq: head.first_seq, before: head.before }, head.seq, head.hash)
        }
        None => (Front { first_seq: 1, before: genesis() }, 0, genesis()),
    };
    let lines: Vec<Option<Linked>> =
        end.unsigned.iter().map(|(_, row)| serde_json::from_slice(row).ok()).collect();
    let whole = lines.iter().map_while(Option::as_ref);
    let followed = follow(seq, hash, whole.clone()).and_then(|reached| {
        let unread = lines.iter().position(Option::is_none);
        unread.map_or(Ok(reached), |_| Err(reached.0 + 1))
    });
    let unsigned = lines.len() as u64;
    let unsigned_since_ms = (unsigned > 0).then_some(boot_ms);
    let at = |(seq, hash), front| End { seq, hash, front, unsigned, unsigned_since_ms };
    let last = end.rows.map_or(seq, |(_, last)| last.max(seq));
    match followed {
        Ok(reached) if end.bad_heads == 0 && reached.0 == last => {
            let found = match &end.head {
                None if last == 0 => Found::New,
                None => Found::Whole,
                Some(signed) if signed.head.key != signer.key() => {
                    Found::OtherKey { old: signed.head.key.to_string() }
                }
                Some(_) => Found::Whole,
            };
            (at(reached, front), found)
        }
        judged => {
            let where_ = match judged {
                Err(seq) => format!("record {seq} is the first bad one"),
                Ok((reached, _)) if reached != last => format!("record {reached} is the last, not {last}"),
                Ok(_) => format!("{} heads are not signed", end.bad_heads),
            };
            if end.head.is_none() && first > 1 {
                front = Front { first_seq: first, before: Digest([0; 32]) };
            }
            // Some hash to go on from: the one that the last row states, or the row's own.
            let row = end.unsigned.last();
            let stated = lines.last().cloned().flatten().map(|linked| linked.hash);
            let own = row.map(|(_, row)| Digest(Sha256::digest(row).into()));
            (at((last, stated.or(own).unwrap_or(hash)), front), Found::Damaged { where_ })
        }
    }
}

fn damaged(where_: &str) -> Report {
    Report::environment(
        "audit_damaged",
        "the audit log is not whole",
        where_,
        "`agentctl audit export FILE` keeps what is there, `agentctl audit verify FILE` names the first bad record",
    )
}
