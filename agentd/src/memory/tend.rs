//! What must be done to memories though nobody asks?
//!
//! Every hour each agent's store is swept: tombstones of seven days and logs of runs that ended a day ago go. A store
//! in which something was purged is written anew under another key well within a day.
//!
//! Never: a store that is not there is not made, and one that does not open is reported and passed over.

use super::{Bound, Memories, Opening, clock};
use agentd_domain::ids::AgentId;
use agentd_memory::{Identity, StoreError};
use std::path::PathBuf;
use std::time::Duration;

/// A record is gone for good at most this much later than its time.
const EVERY: Duration = Duration::from_secs(60 * 60);
/// A store is written anew when so much is left of its day: what is purged within four hours goes with one writing,
/// and a night without power costs nothing.
const LEFT_MS: i64 = 20 * 60 * 60 * 1000;

/// Is it time to write a store anew? A clock that was set back makes the rest longer than a day; then it is.
fn is_due(by_unix_ms: Option<i64>, now_unix_ms: i64) -> bool {
    const DAY_MS: i64 = 24 * 60 * 60 * 1000;
    by_unix_ms.is_some_and(|by| {
        let left = by.saturating_sub(now_unix_ms);
        left <= LEFT_MS || left > DAY_MS
    })
}

impl Memories {
    pub(super) async fn tend_all(self) {
        loop {
            tokio::time::sleep(EVERY).await;
            let memories = self.clone();
            // One after the other, on a thread that may wait for disks.
            let _ = tokio::task::spawn_blocking(move || memories.tend_each()).await;
        }
    }

    fn tend_each(&self) {
        for (agent, path) in self.stores() {
            let identity = Identity { agent_id: agent, owner_id: self.0.owner };
            let opening = Opening { identity, bound: Bound::Token, db: self.0.db.clone() };
            if let Err(problem) = self.tend(&path, opening) {
                tracing::warn!(agent_id = %agent, problem = %problem.report(), "a memory was not tended; tried again in an hour");
            }
        }
        let collections = self.0.db.here().collections().unwrap_or_else(|problem| {
            tracing::warn!(%problem, "shared knowledge was not tended, for its list was not read; tried again in an hour");
            Default::default()
        });
        for row in collections.into_values() {
            let memory = self.of_collection(&row);
            if memory.path.exists()
                && let Err(problem) = self.tend(&memory.path, Opening::of(&memory))
            {
                tracing::warn!(collection = %row.id, problem = %problem.report(), "shared knowledge was not tended; tried again in an hour");
            }
        }
    }

    fn tend(&self, path: &std::path::Path, opening: Opening) -> Result<(), StoreError> {
        let store = self.0.pool.lease(path, || opening.options())?;
        let mut swept = store.sweep(clock::unix_ms())?;
        while swept.more {
            swept = store.sweep(clock::unix_ms())?;
        }
        if is_due(swept.rewrite_by_unix_ms, clock::unix_ms()) {
            store.rewrite(clock::unix_ms())?;
        }
        Ok(())
    }

    /// The agents that have a store.
    fn stores(&self) -> Vec<(AgentId, PathBuf)> {
        let Ok(folders) = std::fs::read_dir(&self.0.folders.agents) else { return Vec::new() };
        let stores = folders.flatten().filter_map(|entry| {
            let agent = entry.file_name().to_str()?.parse().ok()?;
            let path = entry.path().join("memory.redb");
            path.exists().then_some((agent, path))
        });
        stores.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_written_anew_within_its_day() {
        const HOUR_MS: i64 = 60 * 60 * 1000;
        let by = 24 * HOUR_MS;
        assert!(!is_due(None, 0));
        assert!(!is_due(Some(by), 0), "more may be purged yet");
        assert!(is_due(Some(by), 4 * HOUR_MS));
        // Looked at every hour: at the latest in the fifth, and after a night without power at once.
        assert!((0..24).any(|hour| is_due(Some(by), hour * HOUR_MS)));
        assert!(is_due(Some(by), 400 * HOUR_MS));
        assert!(is_due(Some(by), -HOUR_MS), "the clock was set back");
    }
}
