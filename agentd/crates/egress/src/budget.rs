//! How many bytes may an agent still move?
//!
//! Always: bytes are reserved before they are moved and settled after, so a hundred connections at once spend no
//!         more than one would. A connection has several budgets (its rule's, its agent's, those of the agents above that
//!         one), and a byte counts once in each.
//! Never:  a clock. Whoever owns a budget refills it when its day begins.
//!
//! A connection that waits for bytes holds a reservation (at most [`CHUNK_BYTES`] each way), so a budget that is
//! almost spent refuses that much early rather than one byte late.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most that one read or write moves; also the size of a connection's buffers.
pub const CHUNK_BYTES: usize = 16 * 1024;

/// For what a budget was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    Rule,
    Agent,
    /// An agent above it, whose rights it has a part of.
    Family,
}

#[derive(Debug)]
pub struct ByteBudget {
    left: AtomicU64,
    /// Settled, since the last refill. What is reserved and not settled is in neither.
    spent: AtomicU64,
}

/// All budgets that one connection counts against; none is no limit.
#[derive(Debug, Clone)]
pub struct Purse(Arc<[(Whose, Arc<ByteBudget>)]>);

/// Bytes that are taken from each budget and not yet moved. What is not settled goes back.
#[derive(Debug)]
pub struct Reserved {
    purse: Purse,
    bytes: u64,
}

impl ByteBudget {
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(bytes), spent: AtomicU64::new(0) })
    }

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

    /// Another limit for the same day: what was moved stays moved.
    pub fn change(&self, before: u64, after: u64) {
        let left = |left: u64| Some(after.saturating_sub(before.saturating_sub(left)));
        // The closure never refuses.
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left);
    }

    /// Up to `want` bytes, and at least `least`; or nothing.
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
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, back);
    }
}

impl Purse {
    pub fn new(budgets: impl IntoIterator<Item = (Whose, Arc<ByteBudget>)>) -> Self {
        Self(budgets.into_iter().collect())
    }

    /// Up to `want` bytes, and at least `least`, from every budget; or the one that has not so many.
    pub fn reserve(&self, least: u64, want: u64) -> Result<Reserved, Whose> {
        let mut bytes = want;
        for (number, (whose, budget)) in self.0.iter().enumerate() {
            let before = self.0.iter().take(number);
            let taken = budget.take(least, bytes);
            // The others have no more than this one gives.
            before.for_each(|(_, budget)| budget.give(bytes - taken.unwrap_or(0)));
            bytes = taken.ok_or(*whose)?;
        }
        Ok(Reserved { purse: self.clone(), bytes })
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
        for (_, budget) in self.purse.0.iter() {
            budget.spent.fetch_add(moved, Ordering::Relaxed);
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        for (_, budget) in self.purse.0.iter() {
            budget.give(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn purse(budgets: &[&Arc<ByteBudget>]) -> Purse {
        let whose = [Whose::Rule, Whose::Agent, Whose::Family];
        Purse::new(whose.into_iter().zip(budgets.iter().map(|budget| Arc::clone(budget))))
    }

    #[test]
    fn fifty_at_once_spend_what_one_could() {
        let budget = ByteBudget::new(10);
        let purse = purse(&[&budget]);
        let held: Vec<_> = (0..50).filter_map(|_| purse.reserve(1, 1).ok()).collect();
        assert_eq!(held.len(), 10);
        assert_eq!(purse.reserve(1, 1).unwrap_err(), Whose::Rule);
        drop(held);
        assert_eq!((budget.left(), budget.spent()), (10, 0), "what is only reserved is not spent");
    }

    #[test]
    fn the_budget_that_is_spent_is_named_and_the_others_keep_what_they_had() {
        let (rule, agent, family) = (ByteBudget::new(100), ByteBudget::new(50), ByteBudget::new(20));
        let purse = purse(&[&rule, &agent, &family]);
        assert_eq!(purse.reserve(30, 30).unwrap_err(), Whose::Family);
        assert_eq!(purse.reserve(60, 60).unwrap_err(), Whose::Agent);
        assert_eq!([rule.left(), agent.left(), family.left()], [100, 50, 20]);
        purse.reserve(1, 30).unwrap().settle(15);
        assert_eq!([rule.left(), agent.left(), family.left()], [85, 35, 5]);
        assert_eq!(Purse::new([]).reserve(1, 7).unwrap().bytes(), 7, "no budget is no limit");
    }

    #[test]
    fn another_limit_leaves_what_was_moved_moved() {
        let budget = ByteBudget::new(100);
        purse(&[&budget]).reserve(60, 60).unwrap().settle(60);
        budget.change(100, 200);
        assert_eq!(budget.left(), 140);
        budget.change(200, 50);
        assert_eq!(budget.left(), 0);
    }

    #[test]
    fn threads_race_and_lose_nothing() {
        let budget = ByteBudget::new(10_000);
        let purse = purse(&[&budget]);
        let spent = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Ok(reserved) = purse.reserve(1, 7) {
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
        /// Whatever is done, what was spent and what is left add up, in each budget.
        #[test]
        fn the_books_balance(steps in proptest::collection::vec((0u64..20, 0u64..40, 0u64..50), 0..40)) {
            let budgets = [ByteBudget::new(200), ByteBudget::new(300), ByteBudget::new(150)];
            let purse = purse(&[&budgets[0], &budgets[1], &budgets[2]]);
            let mut spent = 0;
            for (least, more, moved) in steps {
                if let Ok(reserved) = purse.reserve(least, least + more) {
                    prop_assert!(reserved.bytes() >= least && reserved.bytes() <= least + more);
                    let moved = moved.min(reserved.bytes());
                    reserved.settle(moved);
                    spent += moved;
                }
                prop_assert_eq!(budgets.each_ref().map(|b| b.left()), [200 - spent, 300 - spent, 150 - spent]);
                prop_assert_eq!(budgets.each_ref().map(|b| b.spent()), [spent; 3]);
            }
        }
    }
}
