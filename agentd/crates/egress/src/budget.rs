//! How many bytes may an agent still move?
//!
//! Always: bytes are reserved before they are moved and settled after, so a hundred connections at once spend no
//!         more than one would. A budget may stand below another (a rule's below the agent's); a byte counts in both.
//! Never:  a clock. Whoever owns the budget refills it when its day begins.
//!
//! A connection that waits for bytes holds a reservation (at most [`CHUNK_BYTES`] each way), so a budget that is
//! almost spent refuses that much early rather than one byte late.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most that one read or write moves; also the size of a connection's buffers.
pub const CHUNK_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub struct ByteBudget {
    left: AtomicU64,
    /// Settled, since the last refill. What is reserved and not settled is in neither.
    spent: AtomicU64,
    above: Option<Arc<ByteBudget>>,
}

/// Bytes that are taken from a budget and not yet moved. What is not settled goes back.
#[derive(Debug)]
pub struct Reserved {
    budget: Arc<ByteBudget>,
    bytes: u64,
}

impl ByteBudget {
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(bytes), spent: AtomicU64::new(0), above: None })
    }

    /// No limit in practice: 16 exbibytes.
    pub fn unlimited() -> Arc<Self> {
        Self::new(u64::MAX)
    }

    pub fn below(above: &Arc<Self>, bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicU64::new(bytes),
            spent: AtomicU64::new(0),
            above: Some(Arc::clone(above)),
        })
    }

    /// What this budget alone has left.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// What was moved since it was made or refilled, without what is only reserved.
    pub fn spent(&self) -> u64 {
        self.spent.load(Ordering::Relaxed)
    }

    /// Sets what is left, at the start of a new day. Reservations that are still open return later, on top of it.
    pub fn refill(&self, bytes: u64) {
        self.left.store(bytes, Ordering::Relaxed);
        self.spent.store(0, Ordering::Relaxed);
    }

    /// Up to `want` bytes, and at least `least`, from this budget and all above it; or nothing.
    pub fn reserve(self: &Arc<Self>, least: u64, want: u64) -> Option<Reserved> {
        let mine = self.take(least, want)?;
        let Some(above) = &self.above else {
            return Some(Reserved { budget: Arc::clone(self), bytes: mine });
        };
        let Some(mut granted) = above.reserve(least, mine) else {
            self.give(mine);
            return None;
        };
        self.give(mine - granted.bytes);
        let bytes = std::mem::take(&mut granted.bytes);
        Some(Reserved { budget: Arc::clone(self), bytes })
    }

    fn take(&self, least: u64, want: u64) -> Option<u64> {
        let mut taken = 0;
        // The counter guards no other memory, so no ordering is needed.
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                taken = left.min(want);
                (taken >= least).then(|| left - taken)
            })
            .ok()
            .map(|_| taken)
    }

    fn give(&self, bytes: u64) {
        let back = |left: u64| Some(left.saturating_add(bytes));
        // The closure never refuses.
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, back);
    }
}

impl Reserved {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// `moved` bytes were spent; the rest goes back.
    pub fn settle(mut self, moved: u64) {
        let moved = moved.min(self.bytes);
        self.bytes -= moved;
        let mut budget = Some(&self.budget);
        while let Some(here) = budget {
            here.spent.fetch_add(moved, Ordering::Relaxed);
            budget = here.above.as_ref();
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut budget = Some(&self.budget);
        while let Some(here) = budget {
            here.give(self.bytes);
            budget = here.above.as_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fifty_at_once_spend_what_one_could() {
        let budget = ByteBudget::new(10);
        let held: Vec<_> = (0..50).filter_map(|_| budget.reserve(1, 1)).collect();
        assert_eq!(held.len(), 10);
        assert!(budget.reserve(1, 1).is_none());
        drop(held);
        assert_eq!((budget.left(), budget.spent()), (10, 0), "what is only reserved is not spent");
    }

    #[test]
    fn threads_race_and_lose_nothing() {
        let budget = ByteBudget::new(10_000);
        let spent = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Some(reserved) = budget.reserve(1, 7) {
                        let moved = reserved.bytes().div_ceil(2);
                        reserved.settle(moved);
                        spent.fetch_add(moved, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(spent.into_inner(), 10_000);
    }

    proptest! {
        /// Whatever is done, what was spent and what is left add up, in a budget and in the one above it.
        #[test]
        fn the_books_balance(steps in proptest::collection::vec((0u64..20, 0u64..40, 0u64..50), 0..40)) {
            let above = ByteBudget::new(300);
            let below = ByteBudget::below(&above, 200);
            let mut spent = 0;
            for (least, more, moved) in steps {
                if let Some(reserved) = below.reserve(least, least + more) {
                    prop_assert!(reserved.bytes() >= least && reserved.bytes() <= least + more);
                    let moved = moved.min(reserved.bytes());
                    reserved.settle(moved);
                    spent += moved;
                }
                prop_assert_eq!((below.spent(), above.spent()), (spent, spent));
                prop_assert_eq!(below.left(), 200 - spent);
                prop_assert_eq!(above.left(), 300 - spent);
            }
        }
    }
}
