//! Who decides reports here; what becomes of it?
//!
//! Owns:  the audit log: what waits (`plan.rs`), the thread that chains, stores and signs (`keep.rs`), the key
//!        (`key.rs`). Records and heads are values of `agentd_domain::audit`; `agentd-audit` checks them.
//! In:    [`Entry`]s, from any thread, without waiting. Out: lines for the management API.
//! Always: no decision waits for the disk unless it asks to ([`Audit::record`], for the owner's orders). What is
//!         reported is committed a few milliseconds later, many together; a power cut may lose that last moment, and
//!         the counts of repetitions since the last record (`plan.rs`: a minute for what was denied, an hour for
//!         what was allowed). When the disk does not take it, it waits in memory within bounds, and what exceeds
//!         them is counted by whose it is and its verdict.
//! Never:  a prompt, an answer, a password.

mod keep;
mod key;
mod orders;
mod plan;

pub use key::{open as open_key, report as key_report};
pub use orders::{Order, entrance};

use crate::clock;
use crate::health::Board;
use crate::store::{AuditQuery, Db};
use agentd_audit::Signer;
use agentd_domain::audit::{Entry, SignedHead};
use agentd_domain::fault::Report;
use plan::{Now, Pending};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A commit takes milliseconds; an owner does not wait for a disk that hangs.
const STORED_PATIENCE: Duration = Duration::from_secs(2);

/// The log for everybody else. Cheap to clone.
#[derive(Clone, Default)]
pub struct Audit(Arc<Shared>);

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    wake: Condvar,
    progress: watch::Sender<Progress>,
    /// There when the log is kept.
    db: OnceLock<Db>,
}

#[derive(Default)]
struct Inner {
    pending: Pending,
    /// Calls of `report` so far.
    reported: u64,
    /// A head is wanted that vouches for this many calls.
    seal_wanted: u64,
    closing: bool,
}

/// How many calls of `report` are dealt with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    stored: u64,
    sealed: u64,
    /// The last commit failed.
    failing: bool,
    ended: bool,
}

impl Audit {
    /// Begins to keep what is reported, and what was reported so far. Blocks for the store.
    pub fn keep(&self, db: Db, signer: Signer, board: Arc<Board>) -> Result<(), Report> {
        let what = "the audit log is not kept";
        let keeper = keep::Keeper::open(self.clone(), db.clone(), signer, board);
        let keeper = keeper.map_err(|error| error.report(what))?;
        let thread = std::thread::Builder::new().name("audit".to_owned()).spawn(move || keeper.run());
        thread.map_err(|error| {
            Report::environment("threads_spent", what, error.to_string(), "reboot the appliance")
        })?;
        let _ = self.0.db.set(db);
        Ok(())
    }

    /// Never waits.
    pub fn report(&self, entry: Entry) {
        self.take(entry);
    }

    /// Waits until it is on the disk, but not for ever.
    pub async fn record(&self, entry: Entry) {
        let ticket = self.take(entry);
        let mut progress = self.0.progress.subscribe();
        if self.0.db.get().is_some() {
            let stored = progress.wait_for(|now| now.stored >= ticket || now.failing || now.ended);
            let _ = tokio::time::timeout(STORED_PATIENCE, stored).await;
        }
    }

    /// A head that vouches for all that was reported before.
    pub async fn head(&self) -> Result<SignedHead, Report> {
        let what = "no head of the audit log was read";
        let db = self.0.db.get().ok_or_else(|| not_kept(what))?;
        let ticket = {
            let mut inner = self.lock();
            inner.seal_wanted = inner.reported.max(1);
            inner.seal_wanted
        };
        self.0.wake.notify_one();
        let mut progress = self.0.progress.subscribe();
        let sealed = progress.wait_for(|now| now.sealed >= ticket || now.failing || now.ended);
        let _ = tokio::time::timeout(STORED_PATIENCE, sealed).await;
        let head = db.call(|store| store.audit_head()).await.map_err(|error| error.report(what))?;
        head.ok_or_else(|| not_kept(what))
    }

    /// Lines of an export.
    pub async fn lines(&self, query: AuditQuery) -> Result<Vec<u8>, Report> {
        let what = "the audit log was not read";
        let db = self.0.db.get().ok_or_else(|| not_kept(what))?;
        db.call(move |store| store.audit_lines(&query)).await.map_err(|error| error.report(what))
    }

    /// Writes what waits and signs it. Waits for that, but not for ever.
    pub async fn close(&self) {
        self.lock().closing = true;
        self.0.wake.notify_one();
        let mut progress = self.0.progress.subscribe();
        if self.0.db.get().is_some() {
            let _ = tokio::time::timeout(STORED_PATIENCE, progress.wait_for(|now| now.ended)).await;
        }
    }

    /// For tests of those who report: what would be written if agentd ended now.
    #[cfg(test)]
    pub fn reported(&self) -> Vec<(Entry, u32)> {
        let batch = self.lock().pending.drain_all(now());
        batch.into_iter().map(|counted| (counted.entry, counted.count)).collect()
    }

    fn take(&self, entry: Entry) -> u64 {
        let mut inner = self.lock();
        inner.reported += 1;
        inner.pending.take(entry, now());
        let ticket = inner.reported;
        drop(inner);
        self.0.wake.notify_one();
        ticket
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves an entry that is counted or not; both are whole.
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Now {
    Now { unix_ms: clock::unix_ms(), boot_ms: clock::boot_ms() }
}

fn not_kept(what: &str) -> Report {
    Report::environment(
        "audit_not_kept",
        what,
        "the audit log is not kept",
        "`agentctl status` shows why; without a data and a state partition there is none",
    )
}

#[cfg(test)]
mod tests;
