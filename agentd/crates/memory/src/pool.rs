//! Which of a thousand agents' stores are open right now?
//!
//! Owns:   open stores, at most so many; the rest are files. A store is a file handle, a thread, a page cache and,
//!         once it was asked something, an index of about 430 bytes per record.
//! In:     a path and its options. Out: a [`Lease`], which keeps the store open while it lives.
//! Always: at most [`Limits::open`] stores are open, and together their caches and idle indexes stay within
//!         [`Limits::cache_bytes`] and [`Limits::index_bytes`]. Room is made by closing whoever was used longest
//!         ago and is not leased; closing finishes what is queued. Who finds no room waits, at most
//!         [`Limits::patience`], and is then told so.
//! Never:  two openers of one file: who comes while it is being opened or closed waits for that.
//! Threads: any. The lock is not held while a file is opened or closed.

use crate::error::OpenError;
use crate::run::{Options, Store};
use std::collections::HashMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Stores open at once. Each has a thread and a file handle.
    pub open: usize,
    /// redb's page caches of all open stores together.
    pub cache_bytes: usize,
    /// Indexes of stores that are open and not leased; an index costs a reading of its file to come back.
    pub index_bytes: usize,
    /// How long a caller waits for room.
    pub patience: Duration,
}

impl Default for Limits {
    /// 64 stores with 4 MiB each, and the indexes of 600,000 records.
    fn default() -> Self {
        const MIB: usize = 1024 * 1024;
        Self { open: 64, cache_bytes: 256 * MIB, index_bytes: 256 * MIB, patience: Duration::from_secs(10) }
    }
}

/// What is open now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUse {
    pub open: usize,
    pub leased: usize,
    pub index_bytes: usize,
}

/// Cheap to clone: all clones are one pool.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    limits: Limits,
    state: Mutex<State>,
    /// Something was opened, closed or given back.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    slots: HashMap<PathBuf, Slot>,
    /// Rises with every use: who has the smallest was used longest ago.
    uses: u64,
}

enum Slot {
    Open {
        store: Arc<Store>,
        used: u64,
    },
    /// Being opened or closed by some thread.
    Busy,
}

/// A store that stays open while this lives.
pub struct Lease {
    store: Option<Arc<Store>>,
    pool: Arc<Inner>,
}

impl Pool {
    pub fn new(limits: Limits) -> Self {
        let limits = Limits { open: limits.open.max(1), ..limits };
        Self(Arc::new(Inner { limits, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// The store of this path, opened or made if it is not open. Blocks.
    pub fn lease(&self, path: &Path, options: impl FnOnce() -> Options) -> Result<Lease, OpenError> {
        let deadline = Instant::now() + self.0.limits.patience;
        let mut state = self.0.lock();
        loop {
            state.uses += 1;
            let (now, open) = (state.uses, state.slots.len());
            match state.slots.get_mut(path) {
                Some(Slot::Open { store, used }) => {
                    *used = now;
                    return Ok(Lease { store: Some(Arc::clone(store)), pool: Arc::clone(&self.0) });
                }
                Some(Slot::Busy) => state = self.0.wait(state, path, deadline)?,
                None if open < self.0.limits.open => break,
                None => match state.idlest() {
                    Some(idle) => state = self.0.close(state, &idle),
                    None => state = self.0.wait(state, path, deadline)?,
                },
            }
        }
        state.slots.insert(path.to_owned(), Slot::Busy);
        drop(state);
        // Given back even if the opening panics.
        let claim = Claim { pool: &self.0, path };
        let mut options = options();
        options.tuning.cache_bytes =
            options.tuning.cache_bytes.min(self.0.limits.cache_bytes / self.0.limits.open);
        let store = Arc::new(Store::open(path, options)?);
        std::mem::forget(claim);
        let mut state = self.0.lock();
        let used = state.uses;
        state.slots.insert(path.to_owned(), Slot::Open { store: Arc::clone(&store), used });
        self.0.changed.notify_all();
        drop(state);
        self.shed_indexes();
        Ok(Lease { store: Some(store), pool: Arc::clone(&self.0) })
    }

    /// Closes one store, once nobody has it leased: its files may be removed then. False: it is leased still.
    pub fn close(&self, path: &Path) -> bool {
        let deadline = Instant::now() + self.0.limits.patience;
        let mut state = self.0.lock();
        loop {
            match state.slots.get(path) {
                None => return true,
                Some(Slot::Open { store, .. }) if Arc::strong_count(store) == 1 => {
                    state = self.0.close(state, path);
                }
                Some(_) => match self.0.wait(state, path, deadline) {
                    Ok(again) => state = again,
                    Err(_) => return false,
                },
            }
        }
    }

    pub fn in_use(&self) -> PoolUse {
        let state = self.0.lock();
        let open = state.slots.values().filter_map(|slot| match slot {
            Slot::Open { store, .. } => Some(store),
            Slot::Busy => None,
        });
        let (mut leased, mut index_bytes) = (0, 0);
        for store in open {
            leased += usize::from(Arc::strong_count(store) > 1);
            index_bytes += store.index_bytes();
        }
        PoolUse { open: state.slots.len(), leased, index_bytes }
    }

    /// Drops indexes of stores nobody has leased, least lately used first, until the others fit.
    fn shed_indexes(&self) {
        let state = self.0.lock();
        let mut idle: Vec<(u64, Arc<Store>)> = Vec::new();
        let mut held = 0;
        for slot in state.slots.values() {
            if let Slot::Open { store, used } = slot {
                held += store.index_bytes();
                if Arc::strong_count(store) == 1 {
                    idle.push((*used, Arc::clone(store)));
                }
            }
        }
        idle.sort_unstable_by_key(|(used, _)| *used);
        for (_, store) in &idle {
            if held <= self.0.limits.index_bytes {
                break;
            }
            held -= store.index_bytes();
            store.drop_index();
        }
        // The counts of leases must be true again before the lock is given back.
        drop(idle);
        drop(state);
    }
}

struct Claim<'a> {
    pool: &'a Inner,
    path: &'a Path,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.pool.lock().slots.remove(self.path);
        self.pool.changed.notify_all();
    }
}

impl State {
    /// Whoever is open, not leased, and was used longest ago.
    fn idlest(&self) -> Option<PathBuf> {
        self.slots
            .iter()
            .filter_map(|(path, slot)| match slot {
                Slot::Open { store, used } if Arc::strong_count(store) == 1 => Some((*used, path)),
                _ => None,
            })
            .min()
            .map(|(_, path)| path.clone())
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        path: &Path,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, State>, OpenError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(OpenError::NoRoom { path: path.to_owned(), open: self.limits.open });
        }
        Ok(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Closes a store that nobody leases; without the lock, because it waits for the disk.
    fn close<'a>(&'a self, mut state: MutexGuard<'a, State>, path: &Path) -> MutexGuard<'a, State> {
        let closed = state.slots.insert(path.to_owned(), Slot::Busy);
        drop(state);
        drop(closed);
        let mut state = self.lock();
        state.slots.remove(path);
        self.changed.notify_all();
        state
    }
}

impl Deref for Lease {
    type Target = Store;

    fn deref(&self) -> &Store {
        // Taken only in `drop`.
        match &self.store {
            Some(store) => store,
            None => unreachable!("a lease has its store until it is dropped"),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Under the lock: a waiter that counts leases must not sleep through this one's end.
        let _state = self.pool.lock();
        self.store.take();
        self.pool.changed.notify_all();
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.store.fmt(f)
    }
}
